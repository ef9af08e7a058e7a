//! What forks of a running machine with a disk cost through the daemons: vm_scale MEMORY_MIB ROUNDS
//! CHILDREN…
//!
//! A payload guest that has written all of its memory writes numbers to its disk, one request after
//! the other, all the time. It is forked through forkd's interface; its disk is forked by blockd at
//! the same instant, and every child goes on writing to its own. Prints one section of Markdown.
//!
//! *Pause*: as the parent's process measures it, from the first processor that is asked to stop
//! until the last is let go, the cut of its disk included. *Children run*: from the request until
//! all children run. *Durable*: from the request until everything is, which is when the request is
//! answered.

use std::time::{Duration, Instant};

use offshoot_tests::daemon::ask;
use offshoot_tests::vm::Lab;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Where the guest's own memory ends.
const HEAP: u64 = 0x80_0000;
/// Space that the guest's own memory and its stack need, in MiB.
const OWN_MIB: u64 = 16;
/// How long to wait for shells, or for machines to settle.
const WAIT_MAX: Duration = Duration::from_secs(300);
/// How long forks are made in a row.
const SUSTAINED: Duration = Duration::from_secs(10);

/// Figures of one kind.
#[derive(Default)]
struct Figures(Vec<f64>);

impl Figures {
    fn row(&mut self, what: &str) {
        self.0.sort_by(f64::total_cmp);
        let n = self.0.len();
        let at = |percent: usize| self.0.get((n * percent / 100).min(n - 1)).copied();
        let [p50, p90, p99] = [50, 90, 99].map(|percent| at(percent).unwrap_or(f64::NAN));
        println!("| {what} | {n} | {p50:.2} | {p90:.2} | {p99:.2} |");
    }
}

fn api(lab: &Lab, method: &str, path: &str, body: &Value) -> Value {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let reply = ask(&lab.forkd_api(), method, path, body.as_bytes()).expect("forkd answers");
    assert!(reply.status < 300, "{method} {path}: {}", String::from_utf8_lossy(&reply.body));
    if reply.body.is_empty() { Value::Null } else { reply.json() }
}

fn ms(answer: &Value, key: &str) -> f64 {
    answer[key].as_f64().expect("a number") / 1000.0
}

/// Waits until so many shells are ready.
fn await_shells(lab: &Lab, count: u64) {
    let until = Instant::now() + WAIT_MAX;
    loop {
        let health = api(lab, "GET", "/v1/health", &Value::Null);
        let pool = health["pool"].as_array().expect("a list");
        if pool.iter().any(|class| class["ready"].as_u64().is_some_and(|ready| ready >= count)) {
            return;
        }
        assert!(Instant::now() < until, "no {count} shells: {health}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn fork(lab: &Lab, children: &[String]) -> Value {
    api(lab, "POST", "/v1/vms/p/fork", &json!({ "children": children }))
}

fn remove(lab: &Lab, children: &[String]) {
    for child in children {
        api(lab, "DELETE", &format!("/v1/vms/{child}?force=true"), &Value::Null);
    }
}

fn names(count: u64) -> Vec<String> {
    (0..count).map(|i| format!("c{i}")).collect()
}

/// Memory of the children that nobody else uses, and their share of all that they use, in MiB each.
fn memory(lab: &Lab) -> (f64, f64) {
    let stats = api(lab, "GET", "/v1/stats", &Value::Null);
    let of = |key: &str| -> f64 {
        let machines = stats.as_array().expect("a list").iter().filter(|vm| vm["name"] != "p");
        let values: Vec<f64> = machines.map(|vm| vm[key].as_f64().expect("bytes")).collect();
        values.iter().sum::<f64>() / values.len() as f64 / MIB as f64
    };
    (of("private_bytes"), of("proportional_bytes"))
}

/// A parent at work, in a lab with a pool of that size.
fn parent(memory_mib: u64, pool: u64) -> Lab {
    let lab = Lab::with("vm_scale", &["--pool-size", &pool.to_string()]).expect("/dev/kvm");
    lab.disk("root");
    let mut console = lab.run_with(&format!("{memory_mib}M"), "p", &["root"]);
    let pages = (memory_mib - OWN_MIB) * MIB / 4096;
    console.number(&format!("f {HEAP} {pages} 1"));
    assert_eq!(console.ask("w"), "writing");
    lab
}

/// Forks into one child each, one after the other.
fn singles(memory_mib: u64, rounds: u64, pool: u64) {
    let what = if pool == 0 { "cold pool" } else { "warm pool" };
    let lab = parent(memory_mib, pool);
    let [mut pause, mut disks, mut run, mut durable]: [Figures; 4] = Default::default();
    let mut first = Figures::default();
    for round in 0..rounds {
        await_shells(&lab, pool);
        let child = names(1);
        let answer = fork(&lab, &child);
        if round == 0 {
            first.0.push(ms(&answer, "pause_us"));
        } else {
            pause.0.push(ms(&answer, "pause_us"));
        }
        disks.0.push(ms(&answer, "disks_us"));
        run.0.push(ms(&answer, "ready_us"));
        durable.0.push(ms(&answer, "took_us"));
        remove(&lab, &child);
    }
    first.row(&format!("pause, first cut, {what}"));
    pause.row(&format!("pause, later cuts, {what}"));
    disks.row("… of which the disk");
    run.row(&format!("child runs, {what}"));
    durable.row(&format!("durable, {what}"));
}

/// Forks into many children at once.
fn many(memory_mib: u64, count: u64) {
    let lab = parent(memory_mib, count);
    await_shells(&lab, count);
    let children = names(count);
    let answer = fork(&lab, &children);
    std::thread::sleep(Duration::from_secs(1));
    let (private, proportional) = memory(&lab);
    println!(
        "| {count} | {:.2} | {:.1} | {:.1} | {:.1} | {private:.2} | {proportional:.2} |",
        ms(&answer, "pause_us"),
        ms(&answer, "ready_us"),
        ms(&answer, "took_us"),
        ms(&answer, "took_us") / count as f64,
    );
    remove(&lab, &children);
}

/// Children a second, for a while, with the removal of each.
fn sustained(memory_mib: u64, at_once: u64) {
    let lab = parent(memory_mib, at_once * 2);
    await_shells(&lab, at_once);
    let (began, mut made) = (Instant::now(), 0);
    while began.elapsed() < SUSTAINED {
        let children: Vec<String> = (0..at_once).map(|i| format!("s{made}-{i}")).collect();
        fork(&lab, &children);
        made += at_once;
        remove(&lab, &children);
    }
    let rate = made as f64 / began.elapsed().as_secs_f64();
    println!("| {at_once} | {made} | {rate:.1} |");
}

fn main() {
    let numbers: Vec<u64> =
        std::env::args().skip(1).map(|n| n.parse().expect("a number")).collect();
    let [memory_mib, rounds, counts @ ..] = &numbers[..] else {
        eprintln!("usage: vm_scale MEMORY_MIB ROUNDS CHILDREN…");
        std::process::exit(2);
    };
    println!(
        "## Forks of a machine with a disk through the daemons: {memory_mib} MiB, all of it \
         written, 1 processor\n"
    );
    println!("| what, in ms | N | p50 | p90 | p99 |");
    println!("|---|---|---|---|---|");
    singles(*memory_mib, *rounds, 4);
    singles(*memory_mib, (*rounds).min(10), 0);
    println!("\nOne fork into many, with as many shells ready; memory a second later, at work:\n");
    println!(
        "| children | pause, ms | all run, ms | durable, ms | … for each child, ms | private MiB \
         each | proportional MiB each |"
    );
    println!("|---|---|---|---|---|---|---|");
    counts.iter().for_each(|count| many(*memory_mib, *count));
    println!(
        "\nForks in a row for {} s, each child removed after its fork:\n",
        SUSTAINED.as_secs()
    );
    println!("| children at once | made | children a second, made and removed |");
    println!("|---|---|---|");
    [1, 10].iter().for_each(|at_once| sustained(*memory_mib, *at_once));
}
