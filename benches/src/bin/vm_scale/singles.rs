//! Forks into one child each.

use std::time::Duration;

use offshoot_benches::figures::Figures;

use crate::clock::{self, Clock, GuestClock};
use crate::host::{Host, Ready, ms, names, progress};

/// Microseconds between two writes of the parent to its disk.
const PACE_US: u64 = 1000;
/// Time for a child to write, before it is asked when it did.
const WRITE_MAX: Duration = Duration::from_millis(50);
/// Time for the host to get quiet between two forks.
const QUIET: Duration = Duration::from_millis(50);

/// Figures that are set beside those of a peer.
pub struct Singles {
    pub pause: Figures,
    pub runs: Figures,
}

/// First cuts of as many parents, each with a shell ready. Returns their pauses.
pub fn first_cuts(memory_mib: u64, parents: u64) -> Figures {
    let [mut pause, mut runs] = [Figures::default(), Figures::default()];
    for n in 1..=parents {
        progress(&format!("first cut {n} of {parents}"));
        let mut host = Host::start(memory_mib, Ready::Shells(1));
        assert_eq!(host.console.ask(&format!("e {PACE_US}")), "writing");
        let answer = host.fork(&names(1), false);
        pause.add(ms(&answer, "pause_us"));
        runs.add(ms(&answer, "ready_us"));
    }
    pause.row("pause, first cut");
    runs.row("child runs, first cut");
    pause
}

/// Later cuts of one parent, each when that is ready.
pub fn later_cuts(memory_mib: u64, rounds: u64, ready: Ready, clock: &Clock) -> Singles {
    let what = match ready {
        Ready::Shells(0) => "cold pool",
        Ready::Shells(_) => "warm pool",
        Ready::Children => "it stood by",
    };
    progress(&format!("{rounds} single forks, {what}"));
    let mut host = Host::start(memory_mib, ready);
    let [mut pause, mut disks, mut runs, mut durable]: [Figures; 4] = Default::default();
    let [mut woke, mut wrote] = [Figures::default(), Figures::default()];
    assert_eq!(host.console.ask(&format!("e {PACE_US}")), "writing");
    let child = names(1);
    for round in 0..=rounds {
        if round > 0 {
            host.await_ready();
        }
        std::thread::sleep(QUIET);
        let asked = clock::now();
        let answer = host.fork(&child, false);
        assert_eq!(answer["stood_by"], round > 0 && ready == Ready::Children);
        std::thread::sleep(WRITE_MAX);
        let guest = GuestClock::ask(&mut host.console_of("c0"));
        host.remove("c0");
        // The first one is a first cut.
        if round == 0 {
            continue;
        }
        pause.add(ms(&answer, "pause_us"));
        disks.add(ms(&answer, "disks_us"));
        runs.add(ms(&answer, "ready_us"));
        durable.add(ms(&answer, "took_us"));
        let (at_waking, at_writing) = guest.fork().expect("the child has written");
        woke.add(clock.between(asked, at_waking));
        wrote.add(clock.between(asked, at_writing));
    }
    pause.row(&format!("pause, later cuts, {what}"));
    disks.row("… of which waiting for the disk");
    runs.row(&format!("child runs, {what}"));
    woke.row("child knows that it is one, by its own clock");
    wrote.row("child's first write is on its disk, by its own clock");
    durable.row(&format!("durable, {what}"));
    Singles { pause, runs }
}
