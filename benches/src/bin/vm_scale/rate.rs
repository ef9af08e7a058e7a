//! Forks in a row.

use std::time::{Duration, Instant};

use crate::host::{Host, Ready, progress};

/// How long forks are made.
pub const SPAN: Duration = Duration::from_secs(10);
/// Children at most: blockd has some 18 open files for each, and hosts may allow it 20,000.
pub const CHILDREN_MAX: u64 = 1000;
/// Children that are removed afterwards, at most.
const REMOVED: usize = 50;

/// Children a second, for a while. All of them are there until its end; then some are removed, one
/// after the other. Returns the rate.
pub fn row(memory_mib: u64, at_once: u64) -> f64 {
    progress(&format!("forks in a row, {at_once} at once"));
    let host = Host::start(memory_mib, Ready::Shells(at_once * 2));
    let began = Instant::now();
    let mut made: Vec<String> = Vec::new();
    while began.elapsed() < SPAN && (made.len() as u64) < CHILDREN_MAX {
        let n = made.len();
        let children: Vec<String> = (0..at_once).map(|i| format!("s{n}-{i}")).collect();
        host.fork(&children, false);
        made.extend(children);
    }
    let rate = made.len() as f64 / began.elapsed().as_secs_f64();
    let removed = made.len().min(REMOVED);
    let began = Instant::now();
    made[..removed].iter().for_each(|name| host.remove(name));
    let removals = removed as f64 / began.elapsed().as_secs_f64();
    println!("| {at_once} | {} | {rate:.1} | {removals:.1} |", made.len());
    rate
}
