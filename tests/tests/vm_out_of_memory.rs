//! The host has no memory for a guest, a layer or a child: whoever asked is told so, by name; the
//! parent goes on, and nothing is left.
//!
//! Some of it for real, by a limit on the processes that ask for memory; some by calls that the
//! kernel is made to refuse.

use offshoot_tests::trace::{Refused, Tracer};
use offshoot_tests::vm::{Console, Held, Lab, processes_in};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;

/// A parent, and what is held after a first fork of it.
fn parent(lab: &Lab) -> (Console, Held) {
    lab.disk("root");
    let mut parent = lab.run("p", &["root"]);
    lab.done(&["vm", "fork", "p", "a", "b"]);
    ["a", "b"].iter().for_each(|name| drop(lab.done(&["vm", "rm", name, "--force"])));
    assert_eq!(parent.number("p 9 77"), 77);
    (parent, lab.settled())
}

/// The host has no memory, says whoever asked.
fn is_refused(lab: &Lab, args: &[&str]) {
    let output = lab.offshoot(&[args, &["--json"]].concat());
    assert!(!output.status.success(), "{args:?}: {output:?}");
    let told: Value = serde_json::from_slice(&output.stdout).expect("an object");
    let message = told["error"]["message"].as_str().expect("a line");
    println!("{message}");
    let says = ["Cannot allocate memory", "no memory"];
    assert!(says.iter().any(|says| message.contains(says)), "{message}");
}

/// The parent goes on, and is forked when there is memory again; nothing of before is left.
fn goes_on(lab: &Lab, mut parent: Console, before: &Held) {
    lab.settle();
    lab.await_held(before);
    assert_eq!(parent.number("g 9"), 77);
    assert_eq!(parent.number("p 10 78"), 78);
    lab.done(&["vm", "fork", "p", "c", "d"]);
    assert_eq!((lab.console("c").number("g 9"), lab.console("d").number("g 10")), (77, 78));
}

/// Gives a process, and those that it forks, no more memory than this beyond what it has.
fn limit(pid: u32, more: Option<u64>) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let has = status.lines().find_map(|line| line.strip_prefix("VmSize:")).expect("a size");
    let has = has.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10;
    let most = more.map(|more| has + more);
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    prlimit(pid, Resource::As, Rlimit { current: most, maximum: None }).expect("a limit");
}

/// The only process that forkd has started: shells are forked from it.
fn zygote(lab: &Lab) -> u32 {
    let parent = format!("PPid:\t{}", lab.forkd_pid());
    let is_child = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line == parent)
    };
    let processes = std::fs::read_dir("/proc").expect("processes").flatten();
    let mut pids = processes.filter_map(|p| p.file_name().to_str()?.parse::<u32>().ok());
    pids.find(is_child).expect("a zygote")
}

/// There is no memory for a guest that boots.
#[test]
fn a_boot_without_memory_is_refused_by_name() {
    let Some(lab) = Lab::new("a_boot_without_memory_is_refused_by_name") else { return };
    let (parent, before) = parent(&lab);
    lab.disk("other");
    let kernel = lab.store.path("kernel").display().to_string();
    let run = ["vm", "run", "q", "--kernel", &kernel, "--disk", "other", "--mem", "1G"];
    limit(zygote(&lab), Some(256 << 20));
    is_refused(&lab, &run);
    limit(zygote(&lab), None);
    lab.refused(&["vm", "show", "q"], "not-found");
    lab.done(&["disk", "check", "other"]);
    lab.done(&["disk", "rm", "other"]);
    // What was refused is of a size that there are shells of from now on.
    let more = before.traces.processes - 1;
    let mut before = before.but_files_of("forkd");
    before.traces.processes += more;
    before.traces.folders += more;
    goes_on(&lab, parent, &before);
}

/// There is no memory for a child: not for the process that it is to be, not for the arena of its
/// disk.
#[test]
fn a_fork_without_memory_for_children_is_refused_by_name() {
    let Some(lab) = Lab::new("a_fork_without_memory_for_children_is_refused_by_name") else {
        return;
    };
    let (parent, before) = parent(&lab);
    let pid = lab.pid("p");
    for shell in processes_in(&lab.state()).into_iter().filter(|shell| *shell != pid) {
        limit(shell, Some(0));
    }
    is_refused(&lab, &["vm", "fork", "p", "c", "d"]);
    let calls = |call, _: &[u64; 6]| {
        matches!(call, libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork)
    };
    let tracer = Tracer::refuse(zygote(&lab), Refused { calls, errno: libc::ENOMEM, after: 0 });
    is_refused(&lab, &["vm", "fork", "p", "c", "d", "e"]);
    assert!(tracer.refusals() > 0);
    goes_on(&lab, parent, &before);
}

/// There is no memory for the layer that a cut makes, at whichever of its calls.
#[test]
fn a_fork_without_memory_for_a_layer_is_refused_by_name() {
    let Some(lab) = Lab::new("a_fork_without_memory_for_a_layer_is_refused_by_name") else {
        return;
    };
    let (parent, before) = parent(&lab);
    let each: [fn(i64, &[u64; 6]) -> bool; 3] = [
        |call, _| call == libc::SYS_memfd_create,
        |call, _| call == libc::SYS_fallocate,
        |call, _| call == libc::SYS_ftruncate,
    ];
    for calls in each {
        let refused = Refused { calls, errno: libc::ENOMEM, after: 0 };
        let tracer = Tracer::refuse(lab.pid("p"), refused);
        is_refused(&lab, &["vm", "fork", "p", "c", "d"]);
        assert!(tracer.refusals() > 0);
    }
    goes_on(&lab, parent, &before);
}
