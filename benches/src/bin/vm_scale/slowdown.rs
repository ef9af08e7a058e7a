//! What a fork costs a parent that writes its memory.

use std::time::Duration;

use offshoot_benches::figures::Figures;

use crate::clock::{self, Clock, GuestClock};
use crate::host::{HEAP, Host, Ready, names, progress};

/// Time between two notes of the guest.
const NOTE: Duration = Duration::from_millis(5);
/// Time before and after a fork that are compared.
const SPAN: Duration = Duration::from_secs(1);
/// Time to be sure that it has passed.
const MORE: Duration = Duration::from_millis(100);
/// Time for the parent to have all pages it writes for itself, before a fork.
const SETTLE: Duration = Duration::from_millis(2500);

/// Forks a parent that writes `percent` of its memory again and again, as fast as it can. Prints
/// how many pages it writes in the second after a fork, compared with the second before.
pub fn row(memory_mib: u64, rounds: u64, percent: u64, paused: bool, clock: &Clock) {
    let child = if paused { "child paused" } else { "child at work" };
    progress(&format!("slowdown, {percent} % of the memory, {child}: {rounds} rounds"));
    let mut host = Host::start(memory_mib, Ready::Shells(1));
    let pages = host.pages * percent / 100;
    let (mut rate, mut ratio) = (Figures::default(), Figures::default());
    for round in 0..=rounds {
        host.await_ready();
        let command = format!("m {HEAP} {pages} {}", clock.ticks(NOTE));
        assert_eq!(host.console.ask(&command), "writing");
        std::thread::sleep(SETTLE);
        let asked = clock::now();
        host.fork(&names(1), paused);
        std::thread::sleep(SPAN + MORE);
        host.console.say("");
        host.console.hear("= ");
        let guest = GuestClock::ask(&mut host.console);
        let span = clock.ticks(SPAN);
        let [from, at, to] = [asked - span, asked, asked + span].map(|t| guest.of_guest(t));
        let before = host.console.number(&format!("y {from} {at}"));
        let after = host.console.number(&format!("y {at} {to}"));
        assert!(before > 0 && after > 0, "the guest has no notes of the fork");
        host.remove("c0");
        // The first one is a first cut.
        if round > 0 {
            rate.add(before as f64 / SPAN.as_secs_f64() / 1e6);
            ratio.add(after as f64 / before as f64 * 100.0);
        }
    }
    println!(
        "| {percent} %, {child} | {rounds} | {:.2} | {:.1} | {:.1} | {:.1} |",
        rate.at(50),
        ratio.at(50),
        ratio.at(0),
        ratio.at(100),
    );
}
