//! Children that stand by for the next fork of a machine (F-b, F-f): they are as any other
//! children, in nobody's way, and leave nothing when nobody wants them.

use std::time::{Duration, Instant};

use offshoot_tests::rng::{Rng, seed};
use offshoot_tests::until;
use offshoot_tests::vm::{Console, Lab, kill, word};
use rustix::process::Signal;
use serde_json::Value;

/// Rounds of kills.
const ROUNDS: u64 = 12;

fn lab(test: &str) -> Option<Lab> {
    Lab::with(test, &["--pool-size", "2", "--standby", "on"])
}

/// A parent that writes its log to disk and memory all the time, for which children stand by.
fn parent_with_standby(lab: &Lab, children: &[&str]) -> Console {
    lab.disk("root");
    let mut parent = lab.run("p", &["root"]);
    assert_eq!(parent.ask("w"), "writing");
    assert!(!fork(lab, children), "nothing was known of it before");
    await_standby(lab);
    parent
}

/// Forks, and tells whether the children stood by.
fn fork(lab: &Lab, children: &[&str]) -> bool {
    let forked = lab.json(&[&["vm", "fork", "p"], children].concat());
    forked["stood_by"].as_bool().unwrap()
}

fn await_standby(lab: &Lab) {
    until("children stand by", || lab.json(&["vm", "status"])["standby"] == "p");
}

/// Removes all machines, and checks that nothing of them is left.
fn leaves_nothing(lab: &Lab) {
    let machines = lab.json(&["vm", "ls"]);
    for name in machines.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap()) {
        lab.done(&["vm", "rm", name, "--force"]);
    }
    lab.settle();
    until("nothing stands by", || lab.json(&["vm", "status"])["standby"] == Value::Null);
    lab.settle();
    until("nothing is left but the pool", || {
        let traces = lab.traces();
        (traces.exports, traces.folders, traces.processes) == (0, 2, 2)
    });
    assert!(lab.traces().disks.iter().all(|disk| disk == "root"), "{:?}", lab.traces());
    let undone = std::fs::read_dir(lab.state().join("undo")).unwrap().count();
    assert_eq!(undone, 0, "records of what is to be undone");
}

/// Children that stood by have the memory and the disk of the cut, names of their own, and
/// identities that nobody has; so have those of a fork that they did not stand by for.
#[test]
fn children_that_stood_by_are_as_any_other() {
    let Some(lab) = lab("children_that_stood_by_are_as_any_other") else { return };
    let mut parent = parent_with_standby(&lab, &["a", "b"]);

    assert!(fork(&lab, &["c", "d"]), "{}", lab.log());
    assert!(!fork(&lab, &["e"]), "other than those that stand by");

    let mut generations = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        let mut console = lab.console(name);
        assert!(console.hear("= forked").contains("wrong 0"), "{name}");
        console.ends_whole();
        let identity = console.ask("i");
        assert_eq!(word(&identity, "name"), name);
        generations.push(word(&identity, "generation").to_owned());
        let vm = lab.show(name);
        assert_eq!(vm["disks"][0]["disk"], format!("{name}-disk0"));
        let disk = lab.json(&["disk", "show", &format!("{name}-disk0")]);
        assert_eq!(disk["disk"], vm["disks"][0]["id"]);
    }
    generations.sort();
    generations.dedup();
    assert_eq!(generations.len(), 5, "{generations:?}");
    parent.ends_whole();
    leaves_nothing(&lab);
}

/// What ends children that stand by costs the next fork its head start, and nothing else.
#[test]
fn a_fork_goes_on_without_those_that_were_ended() {
    let Some(mut lab) = lab("a_fork_goes_on_without_those_that_were_ended") else { return };
    let mut parent = parent_with_standby(&lab, &["a"]);
    // Somebody wants the disk. Others may stand by before the next fork is there, but not always.
    let met_none = (0..9).any(|n| {
        await_standby(&lab);
        lab.done(&["disk", "show", "root"]);
        let child = format!("b{n}");
        let stood_by = fork(&lab, &[&child]);
        assert!(lab.console(&child).hear("= forked").contains("wrong 0"));
        lab.done(&["vm", "rm", &child, "--force"]);
        !stood_by
    });
    assert!(met_none);
    // They are killed.
    await_standby(&lab);
    let machines = ["p", "a"].map(|name| lab.pid(name));
    for pid in offshoot_tests::vm::processes_in(&lab.state()) {
        if !machines.contains(&pid) {
            kill(pid, Signal::KILL);
        }
    }
    let _ = lab.offshoot(&["vm", "fork", "p", "c"]);
    lab.settle();
    // blockd is.
    fork(&lab, &["d"]);
    await_standby(&lab);
    lab.kill_blockd();
    // The fork that they stood by for has died with it: before another one can be ready, they are
    // given up.
    until("none stands by", || lab.json(&["vm", "status"])["standby"] == Value::Null);
    let refused = lab.refused(&["vm", "fork", "p", "e"], "not-found");
    assert!(refused.contains("start blockd"), "{refused}");
    lab.start_blockd();
    fork(&lab, &["e"]);
    assert!(lab.console("e").hear("= forked").contains("wrong 0"));
    // They are made again, but not for ever.
    await_standby(&lab);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        lab.done(&["disk", "show", "root"]);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(lab.json(&["vm", "status"])["standby"], Value::Null);
    assert!(!fork(&lab, &["f"]));
    parent.ends_whole();
    leaves_nothing(&lab);
}

/// A daemon that ends takes children that stand by with it; one that is killed leaves them to the
/// next one.
#[test]
fn none_outlives_the_daemon() {
    let Some(mut lab) = lab("none_outlives_the_daemon") else { return };
    let mut parent = parent_with_standby(&lab, &["a"]);
    for killed in [false, true] {
        if killed {
            lab.kill_forkd()
        } else {
            lab.stop_forkd()
        }
        if !killed {
            let undone = std::fs::read_dir(lab.state().join("undo")).unwrap().count();
            assert_eq!(undone, 0, "a daemon that ends in order leaves nothing to be undone");
        }
        lab.start_forkd();
        lab.settle();
        assert_eq!(lab.json(&["vm", "status"])["standby"], Value::Null);
        let name = if killed { "c" } else { "b" };
        assert!(!fork(&lab, &[name]));
        assert!(lab.console(name).hear("= forked").contains("wrong 0"));
        await_standby(&lab);
    }
    parent.ends_whole();
    leaves_nothing(&lab);
}

/// forkd or blockd is killed at a random moment of a fork into children that stood by: it is done,
/// or nothing is left of it.
#[test]
fn a_fork_of_those_that_stood_by_is_whole_or_not_at_all() {
    let Some(mut lab) = lab("a_fork_of_those_that_stood_by_is_whole") else { return };
    let seed = seed(7);
    println!("OFFSHOOT_SEED={seed}");
    let mut rng = Rng::new(seed);
    let mut parent = parent_with_standby(&lab, &["a"]);
    lab.done(&["vm", "rm", "a", "--force"]);
    let mut made = 0;
    for round in 0..ROUNDS {
        let warm = format!("w{round}");
        fork(&lab, &[&warm]);
        await_standby(&lab);
        let name = format!("c{round}");
        let after = Duration::from_micros(2_000 + rng.below(25_000));
        println!("round {round}: after {after:?}");
        let mut command = lab.command(&["vm", "fork", "p", &name]);
        let mut fork = command.stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(after);
        if round % 2 == 0 {
            lab.kill_forkd();
            lab.start_forkd();
        } else {
            lab.kill_blockd();
            lab.start_blockd();
        }
        fork.wait().unwrap();
        lab.settle();
        let shown = lab.offshoot(&["vm", "show", &name]).status.success();
        if shown {
            assert!(lab.console(&name).hear("= forked").contains("wrong 0"));
            lab.done(&["vm", "rm", &name, "--force"]);
        }
        made += u64::from(shown);
        lab.done(&["vm", "rm", &warm, "--force"]);
        lab.settle();
        let disks: Vec<String> = lab.traces().disks.into_iter().collect();
        assert_eq!(disks, ["root"], "round {round}: disks are left");
    }
    println!("{made} of {ROUNDS} forks were done");
    parent.ends_whole();
    leaves_nothing(&lab);
}
