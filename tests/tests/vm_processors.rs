//! Machines with several processors, through the real command line: all of them run, write to disk
//! and memory, and go on in every child and in what a snapshot is restored to.

use std::time::Duration;

use offshoot_tests::until;
use offshoot_tests::vm::{Console, Lab, word};

/// How many numbers each processor of a guest has written; no page was ever wrong.
fn written(console: &mut Console, cpus: usize) -> Vec<u64> {
    let told = console.ask("N");
    assert!(told.starts_with("wrong 0 "), "{told}");
    let numbers = told.split_whitespace().skip(3).map(|n| n.parse().unwrap());
    let numbers: Vec<u64> = numbers.collect();
    assert_eq!(numbers.len(), cpus, "{told}");
    numbers
}

/// Begins to write with all processors.
fn begin(console: &mut Console) {
    assert_eq!(console.ask("W"), "writing");
}

/// Each processor of a guest that does nothing writes, and all that was written is whole.
fn all_write(console: &mut Console, cpus: usize) {
    let before = written(console, cpus);
    until("every processor has written", || {
        begin(console);
        std::thread::sleep(Duration::from_millis(10));
        console.ends_whole();
        let after = written(console, cpus);
        before.iter().zip(&after).all(|(before, after)| after > before)
    });
}

/// A machine that was cut while it wrote, found itself another one: it goes on, with all of its
/// processors.
fn goes_on_whole(lab: &Lab, name: &str, cpus: usize) {
    let mut console = lab.console(name);
    assert_eq!(word(&console.hear("= forked"), "wrong"), "0", "{name}");
    console.ends_whole();
    all_write(&mut console, cpus);
}

/// Threads of a machine that are its processors.
fn processor_threads(pid: u32) -> usize {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let names = threads.filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok());
    names.filter(|name| name.starts_with("vcpu")).count()
}

fn runs_forks_and_is_restored(lab: &Lab, cpus: usize) {
    lab.disk("root");
    let mut p = lab.boot("p", &["root"], &["--mem", "32M", "--cpus", &cpus.to_string()]);
    assert_eq!(lab.show("p")["vcpus"], cpus);
    assert_eq!(processor_threads(lab.pid("p")), cpus);
    assert_eq!(p.number(&format!("P {cpus}")), cpus as u64, "all processors come");
    all_write(&mut p, cpus);

    // While they write: forks, one of a fork, and a snapshot.
    begin(&mut p);
    lab.done(&["vm", "fork", "p", "a", "b"]);
    lab.done(&["vm", "fork", "p", "c"]);
    lab.done(&["vm", "fork", "c", "d"]);
    let snap = lab.store.path("snap").display().to_string();
    lab.done(&["vm", "snapshot", "p", &snap]);
    lab.done(&["vm", "restore", &snap, "r"]);
    for name in ["a", "b", "c", "d", "r"] {
        assert_eq!(lab.show(name)["vcpus"], cpus, "{name}");
        assert_eq!(processor_threads(lab.pid(name)), cpus, "{name}");
        goes_on_whole(lab, name, cpus);
    }

    // Who is paused does not write, on any processor, and goes on.
    lab.done(&["vm", "pause", "p"]);
    lab.done(&["vm", "resume", "p"]);
    p.ends_whole();
    all_write(&mut p, cpus);
    for name in ["a", "b", "c", "d", "r", "p"] {
        lab.done(&["vm", "rm", name, "--force"]);
    }
    lab.done(&["vm", "snapshot-rm", &snap]);
    lab.settle();
    assert_eq!((lab.traces().exports, lab.traces().disks.len()), (0, 1));
}

/// Four processors.
#[test]
fn four_processors_run_are_forked_and_restored() {
    let Some(lab) = Lab::new("four_processors_run_are_forked_and_restored") else { return };
    runs_forks_and_is_restored(&lab, 4);
}

/// Eight, the most that a machine can have.
#[test]
fn eight_processors_run_are_forked_and_restored() {
    let Some(lab) = Lab::new("eight_processors_run_are_forked_and_restored") else { return };
    runs_forks_and_is_restored(&lab, 8);
}
