//! Forks in a row.

use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use crate::host::{Host, progress};

/// How long forks are made.
pub const SPAN: Duration = Duration::from_secs(10);
/// Children that wait to be removed at most; who forks waits for it.
pub const WAIT_MAX: u64 = 50;

/// Children a second, for a while. They are removed beside, one after the other.
pub fn row(memory_mib: u64, at_once: u64) {
    progress(&format!("forks in a row, {at_once} at once"));
    let host = Host::start(memory_mib, at_once * 2);
    let began = Instant::now();
    let mut made = 0;
    let mut forking = Duration::ZERO;
    std::thread::scope(|s| {
        let forks = usize::try_from(WAIT_MAX / at_once).unwrap_or(1);
        let (to, from) = sync_channel::<Vec<String>>(forks);
        let host = &host;
        s.spawn(move || from.iter().flatten().for_each(|name| host.remove(&name)));
        while began.elapsed() < SPAN {
            let children: Vec<String> = (0..at_once).map(|i| format!("s{made}-{i}")).collect();
            host.fork(&children, false);
            made += at_once;
            to.send(children).expect("somebody removes them");
        }
        forking = began.elapsed();
    });
    let rate = |time: Duration| made as f64 / time.as_secs_f64();
    println!("| {at_once} | {made} | {:.1} | {:.1} |", rate(forking), rate(began.elapsed()));
}
