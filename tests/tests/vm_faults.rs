//! Whoever is killed when: a fork has all of its children or none, the parent goes on, and nothing
//! is left over that nobody knows of.
//!
//! Kills come at random moments of many forks, where a round prints when it did, and the seed
//! repeats the times, if not what the host makes of them; and at each step in turn, as `trace`
//! finds them.

use std::collections::BTreeMap;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::trace::{ANSWER, HEARD, Step, Tracer, server_steps_of, steps_of};
use offshoot_tests::vm::{Console, Held, Lab, kill, processes_in};
use rustix::process::Signal;
use serde_json::Value;

/// Rounds of each kind of kill.
const ROUNDS: u64 = 12;
/// Shells of a lab's pool.
const POOL: u8 = 2;

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

/// Children are all there or none is, whole, but for so many whose process was killed afterwards;
/// they are removed.
fn all_or_none(lab: &Lab, names: &[String], killed: usize) -> bool {
    lab.settle();
    let there: Vec<&String> =
        names.iter().filter(|name| lab.offshoot(&["vm", "show", name]).status.success()).collect();
    assert!(there.is_empty() || there.len() == names.len(), "only {there:?} of {names:?}");
    let mut ended = 0;
    for name in &there {
        if lab.show(name)["state"] == "ended" {
            assert_eq!(lab.end_of(name)["reason"], "killed");
            ended += 1;
        } else {
            assert!(lab.console(name).hear("= forked").contains("wrong 0"));
        }
        lab.done(&["vm", "rm", name, "--force"]);
    }
    assert!(ended <= killed, "{ended} of {names:?} have ended");
    lab.settle();
    let traces = lab.traces();
    let disks: Vec<&str> = traces.disks.iter().map(String::as_str).collect();
    assert_eq!(disks, ["root"], "disks are left");
    !there.is_empty()
}

/// A fork that failed says what was wrong, by kind, and of what.
fn is_named(forked: &Output) {
    let said = String::from_utf8_lossy(&forked.stderr);
    assert!(!said.contains("panicked"), "{said}");
    if forked.status.success() {
        return;
    }
    let told: Value = serde_json::from_slice(&forked.stdout)
        .unwrap_or_else(|e| panic!("no object: {e}: {forked:?}"));
    let (kind, message) = (&told["error"]["kind"], told["error"]["message"].as_str().unwrap());
    println!("{kind}: {message}");
    let whose = ["cannot fork vm p: ", "cannot ask forkd at "];
    assert!(whose.iter().any(|begin| message.starts_with(begin)), "{told}");
    assert!(told["error"]["next"].is_string(), "nothing that could be done next: {told}");
}

/// Begins to fork into two children, and does something after a while.
fn fork_and<T>(
    lab: &mut Lab,
    round: u64,
    after: Duration,
    then: impl FnOnce(&mut Lab) -> T,
) -> (Vec<String>, T) {
    let names: Vec<String> = ["a", "b"].iter().map(|n| format!("{n}{round}")).collect();
    println!("round {round}: after {after:?}");
    let mut command = lab.command(&["vm", "fork", "p", &names[0], &names[1], "--json"]);
    let fork = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(after);
    let done = then(lab);
    // It may fail or not: what counts is what is there.
    is_named(&fork.wait_with_output().unwrap());
    (names, done)
}

/// What is held when another forkd has found the machines: it has no shells before a fork. A fork
/// that nobody cuts is given up by blockd in its own time, which is not waited for each time.
fn before_the_pool(before: &Held) -> Held {
    let mut held = before.but_files_of("blockd").but_files_of("forkd");
    held.traces.folders -= usize::from(POOL);
    held.traces.processes -= usize::from(POOL);
    held
}

/// After a fork that takes all shells of the pool, and finds those that are dead, all that is held
/// is what was.
fn is_as_before(lab: &Lab, before: &Held) {
    lab.done(&["vm", "fork", "p", "last1", "last2"]);
    ["last1", "last2"].iter().for_each(|name| drop(lab.done(&["vm", "rm", name, "--force"])));
    lab.settle();
    lab.await_held(before);
}

/// forkd is killed at a random moment of a fork; the next one finds all children or none, and
/// removes what there is of the others.
#[test]
fn a_fork_survives_the_death_of_the_daemon_whole_or_not_at_all() {
    let Some(mut lab) = Lab::new("a_fork_survives_the_death_of_the_daemon") else { return };
    let mut parent = writing_parent(&lab);
    let mut rng = Rng::new(told_seed());
    let pid = lab.pid("p");
    let before = lab.settled();
    let mut made = 0;
    for round in 0..ROUNDS {
        let after = Duration::from_micros(5_000 + rng.below(120_000));
        let (names, ()) = fork_and(&mut lab, round, after, Lab::kill_forkd);
        lab.start_forkd();
        made += u64::from(all_or_none(&lab, &names, 0));
        lab.await_held(&before_the_pool(&before));
        assert_eq!(lab.pid("p"), pid);
    }
    println!("{made} of {ROUNDS} forks were done before the kill");
    is_as_before(&lab, &before);
    parent.ends_whole();
}

/// blockd is killed at a random moment of a fork: it fails or is done, and the parent goes on when
/// blockd is back.
#[test]
fn a_fork_survives_the_death_of_blockd_whole_or_not_at_all() {
    let Some(mut lab) = Lab::new("a_fork_survives_the_death_of_blockd") else { return };
    let mut parent = writing_parent(&lab);
    let mut rng = Rng::new(told_seed());
    let before = lab.settled();
    for round in 0..ROUNDS {
        let after = Duration::from_micros(5_000 + rng.below(100_000));
        let (names, ()) = fork_and(&mut lab, round, after, Lab::kill_blockd);
        lab.start_blockd();
        all_or_none(&lab, &names, 0);
        lab.await_held(&before);
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
    let before = lab.settled();
    for round in 0..ROUNDS {
        lab.settle();
        let after = Duration::from_micros(5_000 + rng.below(100_000));
        let nth = usize::try_from(rng.below(2)).unwrap();
        let (names, killed) = fork_and(&mut lab, round, after, |lab| {
            let others = processes_in(&lab.state()).into_iter().filter(|other| *other != pid);
            let killed: Vec<u32> = others.skip(nth).take(1).collect();
            killed.iter().for_each(|p| kill(*p, Signal::KILL));
            killed
        });
        lab.settle();
        // A child that was killed after the fork was done is a machine that has ended.
        let was_killed = |name: &&String| {
            let shown = lab.offshoot(&["vm", "show", name, "--json"]);
            let shown: Value = serde_json::from_slice(&shown.stdout).unwrap_or_default();
            killed.iter().any(|pid| shown["pid"] == *pid)
        };
        let ended = names.iter().find(was_killed).map(|name| lab.end_of(name));
        all_or_none(&lab, &names, 1);
        println!("killed {killed:?}, which was a machine by then: {}", ended.is_some());
        is_as_before(&lab, &before);
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
    let mut before = None;
    for round in 0..ROUNDS / 2 {
        assert_eq!(lab.run("p", &["root"]).ask("w"), "writing");
        let pid = lab.pid("p");
        let after = Duration::from_micros(5_000 + rng.below(100_000));
        let (names, ()) = fork_and(&mut lab, round, after, |_| kill(pid, Signal::KILL));
        assert_eq!(lab.end_of("p")["reason"], "killed");
        all_or_none(&lab, &names, 0);
        lab.done(&["vm", "rm", "p"]);
        // There are shells of that size from the first round on.
        lab.await_held(before.get_or_insert_with(|| lab.settled()));
    }
    assert_eq!(lab.traces().exports, 0);
}

/// What is killed at a step of a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Daemon,
    Blockd,
    Parent,
    Child,
}

/// The process that is to be killed. Of the children, one of the shells that they are made of.
fn process_of(lab: &Lab, victim: Victim) -> u32 {
    let parent = lab.pid("p");
    match victim {
        Victim::Daemon => lab.forkd_pid(),
        Victim::Blockd => lab.blockd.as_ref().expect("it runs").pid(),
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
    let forked = lab.offshoot(&["vm", "fork", "p", &names[0], &names[1], "--json"]);
    let killed = tracer.end();
    println!("{victim:?} at {} {}: killed {killed}", step.0, step.1);
    assert!(killed || forked.status.success(), "{victim:?} {step:?}: {forked:?}");
    is_named(&forked);
    match victim {
        Victim::Daemon if killed => {
            lab.kill_forkd();
            lab.start_forkd();
        }
        Victim::Blockd if killed => {
            lab.kill_blockd();
            lab.start_blockd();
        }
        _ => {}
    }
    lab.settle();
    let is_to_end = victim == Victim::Child && killed && forked.status.success();
    if is_to_end {
        // One that was killed when the fork was done is a machine that has ended, of which the
        // daemon hears a little later; or it was a shell that was not used.
        let until = Instant::now() + Duration::from_secs(10);
        while !names.iter().any(|name| lab.show(name)["state"] == "ended") && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    all_or_none(lab, &names, is_to_end.into());
    killed
}

/// Steps of each name that are tried, first and in the middle, where they are many.
const OF_A_NAME: usize = 2;

/// The steps of blockd that are tried, or some of each name, in a short run.
fn some_of(steps: Vec<Step>) -> Vec<Step> {
    let mut count: BTreeMap<String, usize> = BTreeMap::new();
    steps.iter().for_each(|step| *count.entry(step.0.clone()).or_default() += 1);
    let chosen = |step: &Step| {
        let all = count[&step.0];
        soak() || (0..OF_A_NAME).any(|k| step.1 == 1 + k * all / OF_A_NAME)
    };
    steps.into_iter().filter(chosen).collect()
}

/// Kills somebody at each of its steps of a fork, one after the other; `own` are among them, or
/// nothing was tried.
fn dies_at_each_step(test: &str, victim: Victim, own: &[&str]) {
    let Some(mut lab) = Lab::new(test) else { return };
    let mut parent = writing_parent(&lab);
    let before = lab.settled();
    let pid = process_of(&lab, victim);
    let fork = || drop(lab.done(&["vm", "fork", "p", "a1", "a2"]));
    let steps = match victim {
        Victim::Blockd => some_of(server_steps_of(pid, fork)),
        _ => steps_of(pid, fork),
    };
    all_or_none(&lab, &["a1", "a2"].map(str::to_owned), 0);
    lab.await_held(&before);
    for step in own {
        assert!(steps.iter().any(|s| s.0 == *step), "no {step:?} among {steps:#?}");
    }
    let mut killed = 0;
    for step in &steps {
        let was_killed = fork_and_kill_at(&mut lab, victim, step);
        killed += usize::from(was_killed);
        if was_killed && victim == Victim::Parent {
            assert_eq!(lab.end_of("p")["reason"], "killed");
            lab.done(&["vm", "rm", "p"]);
            parent = lab.run("p", &["root"]);
            assert_eq!(parent.ask("w"), "writing");
        }
        let next_daemon = victim == Victim::Daemon && was_killed;
        lab.await_held(&if next_daemon { before_the_pool(&before) } else { before.clone() });
    }
    if victim == Victim::Daemon {
        is_as_before(&lab, &before);
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

/// blockd is killed at its steps of a fork, the two of the pause among them: it has read the word
/// that cuts the disks, and it is about to say that they are cut.
#[test]
fn blockd_may_die_at_any_step_of_a_fork() {
    let own = [
        HEARD,
        ANSWER,
        "rename ID.new",
        "fdatasync store/ID.new",
        "fdatasync store/catalogue.redb",
        "rename store/attachments.json.new",
        "bind",
    ];
    dies_at_each_step("blockd_may_die_at_any_step_of_a_fork", Victim::Blockd, &own);
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
