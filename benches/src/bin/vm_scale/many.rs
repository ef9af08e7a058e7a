//! One fork into many children that sleep.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host::{HEAP, Host, MIB, PAGE, Ready, ms, names, progress};

/// Time for children to come to rest.
const REST: Duration = Duration::from_secs(1);
/// Children that work at a time.
const AT_A_TIME: usize = 50;
/// Blocks of 512 bytes that a child writes to its disk.
pub const BLOCKS: u64 = 64;

/// What children use of the host, in MiB each.
struct Memory {
    private: f64,
    proportional: f64,
    /// What the host has less, with all that the kernel and the daemons keep for them.
    host: f64,
}

/// Memory that the host could give, in MiB.
fn available() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("a file of the kernel");
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.expect("a number") / 1024.0
}

fn memory(host: &Host, before: f64) -> Memory {
    // With as many shells as there were before.
    host.await_ready();
    std::thread::sleep(REST);
    let after = available();
    let stats = host.api("GET", "/v1/stats", &Value::Null);
    let children = stats.as_array().expect("a list").iter().filter(|vm| vm["name"] != "p");
    let children: Vec<&Value> = children.collect();
    let of = |key: &str| {
        let sum: f64 = children.iter().map(|vm| vm[key].as_f64().expect("bytes")).sum();
        sum / children.len() as f64 / MIB as f64
    };
    Memory {
        private: of("private_bytes"),
        proportional: of("proportional_bytes"),
        host: (before - after) / children.len() as f64,
    }
}

/// Each child rewrites a hundredth of the memory and some blocks of its disk, and sleeps again.
fn work(host: &Host, children: &[String]) -> Duration {
    let began = Instant::now();
    for some in children.chunks(AT_A_TIME) {
        let mut consoles: Vec<_> = some.iter().map(|name| host.console_of(name)).collect();
        let pages = host.pages / 100;
        let first = HEAP + host.pages / 2 * PAGE;
        for line in [format!("f {first} {pages} 7"), format!("d {BLOCKS}")] {
            consoles.iter_mut().for_each(|console| console.say(&line));
            for console in &mut consoles {
                console.hear("= ");
            }
        }
    }
    began.elapsed()
}

/// Forks a parent that sleeps into so many children, and prints a row. Returns the proportional
/// memory of an idle child, in MiB.
pub fn row(memory_mib: u64, count: u64) -> f64 {
    progress(&format!("one fork into {count}: the parent and {count} shells"));
    let host = Host::start(memory_mib, Ready::Shells(count));
    progress(&format!("one fork into {count}: the fork"));
    std::thread::sleep(REST);
    let before = available();
    let children = names(count);
    let answer = host.fork(&children, false);
    let idle = memory(&host, before);
    progress(&format!("one fork into {count}: their work"));
    let took = work(&host, &children);
    let worked = memory(&host, before);
    println!(
        "| {count} | {:.2} | {:.1} | {:.1} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | \
         {:.2} | {:.1} |",
        ms(&answer, "pause_us"),
        ms(&answer, "ready_us"),
        ms(&answer, "took_us"),
        ms(&answer, "took_us") / count as f64,
        idle.private,
        idle.proportional,
        idle.host,
        worked.private,
        worked.proportional,
        worked.host,
        took.as_secs_f64(),
    );
    idle.proportional
}
