//! Whoever is killed when: a fork has all of its children or none, the parent goes on, and nothing
//! is left over that nobody knows of.
//!
//! Kills come at random moments of many forks, where a round prints when it did, and the seed
//! repeats the times, if not what the host makes of them; and at each step in turn, as `trace`
//! finds them.

use std::process::Stdio;
use std::time::{Duration, Instant};

use offshoot_tests::rng::{Rng, seed};
use offshoot_tests::trace::{Step, Tracer, steps_of};
use offshoot_tests::vm::{Console, Lab, kill, processes_in};
use rustix::process::Signal;

/// Rounds of each kind of kill.
const ROUNDS: u64 = 12;

/// A parent that writes its log to disk and memory all the time.
fn writing_parent(lab: &Lab) -> Console {
    lab.disk("root");
    let mut parent = lab.run("p", &["root"]);
    assert_eq!(parent.ask("w"), "writing");
    parent
}

/// The seed of this run, which a failure shows.
fn told_seed() -> u64 {
    let seed = seed(1);
    println!("OFFSHOOT_SEED={seed}");
    seed
}

/// Children are all there or none is, with all that belongs to them and nothing else.
fn all_or_none(lab: &Lab, names: &[String]) -> bool {
    lab.settle();
    let there: Vec<&String> =
        names.iter().filter(|name| lab.offshoot(&["vm", "show", name]).status.success()).collect();
    assert!(there.is_empty() || there.len() == names.len(), "only {there:?} of {names:?}");
    for name in &there {
        assert!(lab.console(name).hear("= forked").contains("wrong 0"));
        lab.done(&["vm", "rm", name, "--force"]);
    }
    lab.settle();
    let traces = lab.traces();
    let disks: Vec<&str> = traces.disks.iter().map(String::as_str).collect();
    assert_eq!(disks, ["root"], "disks are left");
    !there.is_empty()
}

/// Begins to fork into two children, and does something after a while.
fn fork_and(
    lab: &mut Lab,
    round: u64,
    after: Duration,
    then: impl FnOnce(&mut Lab),
) -> Vec<String> {
    let names: Vec<String> = ["a", "b"].iter().map(|n| format!("{n}{round}")).collect();
    println!("round {round}: after {after:?}");
    let mut command = lab.command(&["vm", "fork", "p", &names[0], &names[1]]);
    let mut fork = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(after);
    then(lab);
    // It may fail or not: what counts is what is there.
    fork.wait().unwrap();
    names
}

/// forkd is killed at a random moment of a fork; the next one finds all children or none, and
/// removes what there is of the others.
#[test]
fn a_fork_survives_the_death_of_the_daemon_whole_or_not_at_all() {
    let Some(mut lab) = Lab::new("a_fork_survives_the_death_of_the_daemon") else { return };
    let mut parent = writing_parent(&lab);
    let mut rng = Rng::new(told_seed());
    let pid = lab.pid("p");
    let mut made = 0;
    for round in 0..ROUNDS {
        let after = Duration::from_micros(5_000 + rng.below(120_000));
        let names = fork_and(&mut lab, round, after, Lab::kill_forkd);
        lab.start_forkd();
        made += u64::from(all_or_none(&lab, &names));
        assert_eq!(lab.pid("p"), pid);
    }
    println!("{made} of {ROUNDS} forks were done before the kill");
    parent.ends_whole();
}

/// blockd is killed at a random moment of a fork: it fails or is done, and the parent goes on when
/// blockd is back.
#[test]
fn a_fork_survives_the_death_of_blockd_whole_or_not_at_all() {
    let Some(mut lab) = Lab::new("a_fork_survives_the_death_of_blockd") else { return };
    let mut parent = writing_parent(&lab);
    let mut rng = Rng::new(told_seed());
    for round in 0..ROUNDS {
        let after = Duration::from_micros(5_000 + rng.below(100_000));
        let names = fork_and(&mut lab, round, after, Lab::kill_blockd);
        lab.start_blockd();
        all_or_none(&lab, &names);
    }
    parent.ends_whole();
}

/// The process of a child, or of a shell that is to be one, is killed at a random moment of a fork.
#[test]
fn a_fork_survives_the_death_of_a_child_whole_or_not_at_all() {
    let Some(mut lab) = Lab::new("a_fork_survives_the_death_of_a_child") else { return };
    let mut parent = writing_parent(&lab);
    let mut rng = Rng::new(told_seed());
    let pid = lab.pid("p");
    for round in 0..ROUNDS {
        lab.settle();
        let after = Duration::from_micros(5_000 + rng.below(100_000));
        let nth = rng.below(2);
        let names = fork_and(&mut lab, round, after, |lab| {
            let others = processes_in(&lab.state()).into_iter().filter(|other| *other != pid);
            others.skip(usize::try_from(nth).unwrap()).take(1).for_each(|p| kill(p, Signal::KILL));
        });
        lab.settle();
        // A child that was killed after the fork was done is a machine that has ended.
        for name in &names {
            let shown = lab.offshoot(&["vm", "show", name, "--json"]);
            if shown.status.success() {
                lab.done(&["vm", "rm", name, "--force"]);
            }
        }
        lab.settle();
        assert_eq!(lab.traces().disks.len(), 1, "{:?}", lab.traces());
    }
    parent.ends_whole();
}

/// The process of the parent is killed at a random moment of a fork: children are all there or not
/// at all, and whole.
#[test]
fn a_fork_survives_the_death_of_the_parent_whole_or_not_at_all() {
    let Some(mut lab) = Lab::new("a_fork_survives_the_death_of_the_parent") else { return };
    let mut rng = Rng::new(told_seed());
    lab.disk("root");
    for round in 0..ROUNDS / 2 {
        assert_eq!(lab.run("p", &["root"]).ask("w"), "writing");
        let pid = lab.pid("p");
        let after = Duration::from_micros(5_000 + rng.below(100_000));
        let names = fork_and(&mut lab, round, after, |_| kill(pid, Signal::KILL));
        assert_eq!(lab.end_of("p")["reason"], "killed");
        all_or_none(&lab, &names);
        lab.done(&["vm", "rm", "p"]);
    }
    lab.settle();
    assert_eq!(lab.traces().exports, 0);
}

/// What is killed at a step of a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Daemon,
    Parent,
    Child,
}

/// The process that is to be killed. Of the children, one of the shells that they are made of.
fn process_of(lab: &Lab, victim: Victim) -> u32 {
    let parent = lab.pid("p");
    match victim {
        Victim::Daemon => lab.forkd_pid(),
        Victim::Parent => parent,
        Victim::Child => {
            let mut shells = processes_in(&lab.state()).into_iter().filter(|pid| *pid != parent);
            shells.next().expect("a shell of the pool")
        }
    }
}

/// Forks, and kills somebody at a step of its. Whoever it is: children are all there or not at all,
/// and nothing else is left.
fn fork_and_kill_at(lab: &mut Lab, victim: Victim, step: &Step) -> bool {
    lab.settle();
    let tracer = Tracer::kill_at(process_of(lab, victim), Some(step));
    let names = ["a1", "a2"].map(str::to_owned);
    let forked = lab.offshoot(&["vm", "fork", "p", &names[0], &names[1]]);
    let killed = tracer.end();
    println!("{victim:?} at {} {}: killed {killed}", step.0, step.1);
    assert!(killed || forked.status.success(), "{victim:?} {step:?}: {forked:?}");
    if killed && victim == Victim::Daemon {
        lab.kill_forkd();
        lab.start_forkd();
    }
    lab.settle();
    if victim == Victim::Child {
        // One that was killed when the fork was done is a machine that has ended.
        let ended = |name: &String| {
            let shown = lab.offshoot(&["vm", "show", name]);
            shown.status.success() && lab.show(name)["state"] == "ended"
        };
        // The daemon hears of the end of a machine a little later.
        let until = Instant::now() + Duration::from_secs(10);
        let is_to_end = killed && forked.status.success();
        while is_to_end && !names.iter().any(ended) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        if names.iter().any(ended) {
            names.iter().for_each(|name| drop(lab.done(&["vm", "rm", name, "--force"])));
        }
    }
    all_or_none(lab, &names);
    killed
}

/// Kills somebody at each of its steps of a fork, one after the other; `own` are among them, or
/// nothing was tried.
fn dies_at_each_step(test: &str, victim: Victim, own: &[&str]) {
    let Some(mut lab) = Lab::new(test) else { return };
    let mut parent = writing_parent(&lab);
    lab.settle();
    let steps = steps_of(process_of(&lab, victim), || {
        drop(lab.done(&["vm", "fork", "p", "a1", "a2"]));
    });
    all_or_none(&lab, &["a1", "a2"].map(str::to_owned));
    for step in own {
        assert!(steps.iter().any(|s| s.0 == *step), "no {step:?} among {steps:#?}");
    }
    let mut killed = 0;
    for step in &steps {
        if !fork_and_kill_at(&mut lab, victim, step) {
            continue;
        }
        killed += 1;
        if victim == Victim::Parent {
            assert_eq!(lab.end_of("p")["reason"], "killed");
            lab.done(&["vm", "rm", "p"]);
            parent = lab.run("p", &["root"]);
            assert_eq!(parent.ask("w"), "writing");
        }
    }
    if victim != Victim::Parent {
        // One that has just begun finds the log of the one before it on the disk.
        parent.ends_whole();
    }
    // What other threads do may not come again; nearly all of it does.
    println!("killed at {killed} of {} steps", steps.len());
    assert!(killed * 10 > steps.len() * 8, "{killed} of {steps:#?}");
}

/// forkd is killed at every one of its steps of a fork.
#[test]
fn the_daemon_may_die_at_any_step_of_a_fork() {
    let own = [
        "fsync undo/ID.json.new",
        "rename undo/ID.json.new",
        "rename ID/vm.json.new",
        "fsync vms/ID",
        "unlink undo/ID.json",
        "connect",
        "send",
        "wait for an answer",
    ];
    dies_at_each_step("the_daemon_may_die_at_any_step_of_a_fork", Victim::Daemon, &own);
}

/// The process of the parent is killed at every one of its steps of a fork.
#[test]
fn the_parent_may_die_at_any_step_of_a_fork() {
    let own = ["memfd_create guest-memory-delta", "memfd_create state", "send"];
    dies_at_each_step("the_parent_may_die_at_any_step_of_a_fork", Victim::Parent, &own);
}

/// The process of a child is killed at every one of its steps of a fork.
#[test]
fn a_child_may_die_at_any_step_of_a_fork() {
    let own = ["connect", "memfd_create vhost-arena", "send", "wait for an answer"];
    dies_at_each_step("a_child_may_die_at_any_step_of_a_fork", Victim::Child, &own);
}

/// Twenty machines run, the daemon is killed, and all of them are there and answer.
#[test]
fn twenty_machines_survive_the_death_of_the_daemon() {
    let Some(mut lab) = Lab::new("twenty_machines_survive_the_death_of_the_daemon") else { return };
    lab.disk("root");
    let mut parent = lab.run("p", &["root"]);
    parent.number("p 9 77");
    let names: Vec<String> = (0..20).map(|i| format!("c{i}")).collect();
    let fork = ["vm", "fork", "p"].into_iter().chain(names.iter().map(String::as_str));
    lab.done(&fork.collect::<Vec<_>>());
    let pids: Vec<u32> = names.iter().map(|name| lab.pid(name)).collect();
    lab.kill_forkd();
    lab.start_forkd();
    for (name, pid) in names.iter().zip(pids) {
        assert_eq!(lab.pid(name), pid);
        assert_eq!(lab.console(name).number("g 9"), 77);
    }
    lab.settle();
    // Shells of the dead daemon went with it; those of the new one are there.
    assert_eq!(lab.traces().processes, 21);
    for name in &names {
        lab.done(&["vm", "rm", name, "--force"]);
    }
    lab.settle();
    assert_eq!((lab.traces().exports, lab.traces().disks.len()), (1, 1));
}
