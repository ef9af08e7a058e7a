//! The two crash domains, with a guest's driver at work: the daemon dies and comes back under it,
//! and the machine's monitor dies and the disk is none the worse.

use std::path::Path;
use std::time::{Duration, Instant};

use offshoot_tests::daemon::Daemon;
use offshoot_tests::load::{self, Load};
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::served::{QUEUES, ServedDisk};
use offshoot_tests::store::TestStore;
use vhost_blk::client::Client;

/// Connects again to a daemon that has just come back; the socket may not be there yet.
fn reconnect(client: &mut Client, socket: &Path) {
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(e) = client.reconnect(socket) {
        assert!(Instant::now() < end, "the daemon does not come back: {e}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// So many times, or more when there is time.
fn often(times: u64) -> u64 {
    if soak() { times * 9 } else { times }
}

/// How daemons are started, the guest's rings, how often a daemon ends, and how.
struct Setup {
    options: &'static [&'static str],
    packed: bool,
    ends: u64,
    end: fn(&ServedDisk, Daemon),
}

/// With SIGKILL, in the middle of whatever it does.
fn killed(_: &ServedDisk, daemon: Daemon) {
    daemon.kill();
}

/// With SIGTERM, as a host does that shuts down. What is in work is done, what the guest goes on to
/// submit stays in its rings, and the disk is closed as if nobody was there.
fn told_to_end(bench: &ServedDisk, daemon: Daemon) {
    assert!(daemon.terminate().success(), "{}", bench.log());
    assert!(!bench.log().contains("not closed in order"), "{}", bench.log());
    let checked = bench.json(&["disk", "check", "vm"]);
    assert_eq!((&checked["clean"], &checked["stats"]["attached"]), (&true.into(), &"no".into()));
}

/// Ends the daemon at random moments of a load; returns what must be on the disk.
fn end_under_load(bench: &ServedDisk, setup: &Setup, seed: u64) -> Vec<Load> {
    let Setup { options, packed, ends, end } = *setup;
    let first = bench.daemon_with(options);
    bench.attach();
    assert_eq!(bench.writes_directly(first.pid().into()), !options.is_empty());
    let (mut client, queues) = bench.connect(packed);
    let mut rng = Rng::new(seed);
    let (loads, daemon) = load::during(bench.loads(queues, seed), |done| {
        let (mut daemon, mut gaps) = (first, Vec::new());
        for _ in 0..ends {
            // From before the first request is taken to well into the load.
            std::thread::sleep(Duration::from_micros(rng.below(120_000)));
            end(bench, daemon);
            let dead = Instant::now();
            daemon = bench.daemon_with(options);
            reconnect(&mut client, &bench.socket());
            gaps.push(dead.elapsed());
        }
        std::thread::sleep(Duration::from_millis(200));
        gaps.sort_unstable();
        let (median, worst) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
        println!("without a daemon: {median:?} (median), {worst:?} (longest) of {ends} ends");
        let served = done();
        assert!(served > ends * 20, "the load makes progress between ends: {served}");
        daemon
    });
    drop(client);
    assert!(daemon.terminate().success());
    loads
}

fn no_write_is_lost(setup: &Setup) {
    let seed = seed(77);
    println!("repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test served_crashes");
    let bench = ServedDisk::new(TestStore::new());
    let loads = end_under_load(&bench, setup, seed);
    bench.compare(&loads);
}

/// Story: the first daemons of this kind replied to a guest and kept the record of a first write in
/// their own memory; when they were killed the guest read zeroes where it had written.
#[test]
fn a_daemon_killed_under_load_loses_no_completed_write() {
    no_write_is_lost(&Setup { options: &[], packed: false, ends: often(12), end: killed });
}

#[test]
fn a_daemon_killed_under_load_loses_no_completed_write_on_packed_rings() {
    no_write_is_lost(&Setup { options: &[], packed: true, ends: often(12), end: killed });
}

/// Past the page cache a write is on its way to the device when the daemon dies, not in memory that
/// the host keeps; and what is no whole block goes through a buffer that dies with the daemon.
#[test]
fn a_daemon_killed_past_the_page_cache_loses_no_completed_write() {
    no_write_is_lost(&Setup {
        options: &["--cache", "direct"],
        packed: false,
        ends: often(4),
        end: killed,
    });
}

#[test]
fn a_daemon_that_ends_in_order_under_load_loses_nothing() {
    for packed in [false, true] {
        no_write_is_lost(&Setup { options: &[], packed, ends: often(4), end: told_to_end });
    }
}

#[test]
fn a_monitor_that_dies_leaves_a_disk_that_opens_clean() {
    let bench = ServedDisk::new(TestStore::new());
    let daemon = bench.daemon();
    bench.attach();
    for round in 0..4 {
        let (client, queues) = bench.connect(round % 2 == 1);
        for (i, queue) in (0..).zip(queues) {
            let start = (round * u64::from(QUEUES) + i) * 8192;
            Load::new(queue, start, 8192, round + i).leave(&mut |done| done < 300);
        }
        // Requests are in work, and nobody will ever look at their completions.
        drop(client);
    }
    assert!(daemon.terminate().success());
    bench.done(&["disk", "check", "vm"]);
    bench.done(&["disk", "scrub", "vm"]);
}
