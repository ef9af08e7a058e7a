//! Forks of running machines, through the real command line: memory and disks of one instant,
//! children that are nobody else, independence in both directions.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use offshoot_tests::trace::{Refused, Tracer};
use offshoot_tests::vm::{Console, Lab, word};

/// An address that the guest itself does not use, and pages from there.
const AT: (u64, u64) = (0x80_0000, 256);

/// How far a guest's clock may be from the host's.
const SLACK: Duration = Duration::from_millis(100);

fn sum(console: &mut Console) -> u64 {
    console.number(&format!("s {} {}", AT.0, AT.1))
}

fn fill(console: &mut Console, from: u64) {
    console.number(&format!("f {} {} {from}", AT.0, AT.1));
}

/// The numbers that a guest has in memory and on its disk, and how many are wrong.
fn log_of(line: &str) -> (u64, u64, u64) {
    let number = |key: &str| word(line, key).parse::<u64>().unwrap();
    (number("ram"), number("disk"), number("wrong"))
}

/// A guest writes numbers to its disk, and each to memory when the disk has it. In every child,
/// the disk has what memory says, and at most the next one: both are of one instant. The parent
/// misses nothing.
#[test]
fn memory_and_disk_of_a_child_are_of_one_instant() {
    let Some(lab) = Lab::new("memory_and_disk_of_a_child_are_of_one_instant") else { return };
    lab.disk("root");
    let mut parent = lab.run("p", &["root"]);
    assert_eq!(parent.ask("w"), "writing");
    let mut last = 0;
    for round in 0..8 {
        let names = [format!("a{round}"), format!("b{round}")];
        let forked = lab.json(&["vm", "fork", "p", &names[0], &names[1]]);
        assert_eq!(forked["children"].as_array().unwrap().len(), 2);
        for name in &names {
            let (ram, disk, wrong) = log_of(&lab.console(name).hear("= forked"));
            assert!(disk >= ram && disk <= ram + 1 && wrong == 0, "{ram} {disk} {wrong}");
            assert!(ram >= last, "round {round}: {ram} after {last}");
            last = ram;
            lab.done(&["vm", "rm", name, "--force"]);
        }
    }
    // What is typed ends the loop.
    parent.say("");
    let (ram, disk, wrong) = log_of(&parent.hear("= wrote"));
    assert!(ram == disk && wrong == 0 && ram >= last, "{ram} {disk} {wrong}");
    lab.settle();
    assert_eq!(lab.traces().disks, BTreeSet::from(["root".to_owned()]));
}

/// No two machines have the same name, identity, generation, address, seed or random numbers; and
/// a child says so itself, not only the daemon.
#[test]
fn children_are_nobody_else() {
    let Some(lab) = Lab::new("children_are_nobody_else") else { return };
    let mut parent = lab.run("p", &[]);
    let names: Vec<String> = (0..100).map(|i| format!("c{i}")).collect();
    let fork = ["vm", "fork", "p"].into_iter().chain(names.iter().map(String::as_str));
    lab.done(&fork.collect::<Vec<_>>());
    let mut seen: [BTreeSet<String>; 6] = Default::default();
    let mut are_its_own = |name: &str, console: &mut Console| {
        let (says, vm) = (console.ask("i"), lab.show(name));
        assert_eq!(word(&says, "name"), name);
        assert_eq!(word(&says, "mac"), vm["mac"].as_str().unwrap().replace(':', ""));
        let random = console.ask("n");
        let [generation, mac, seed] = ["generation", "mac", "seed"].map(|key| word(&says, key));
        let id = vm["id"].to_string();
        for (set, value) in seen.iter_mut().zip([name.into(), generation, mac, seed, random, id]) {
            assert!(set.insert(value.clone()), "{name}: {value} is another machine's, too");
        }
    };
    names.iter().for_each(|name| are_its_own(name, &mut lab.console(name)));
    are_its_own("p", &mut parent);
    assert!(seen.iter().all(|set| set.len() == 101));
}

/// What a machine writes after the fork, to memory or disk, no other one sees: not its parent, not
/// its children, not theirs; running or paused at the fork.
#[test]
fn nobody_sees_what_another_one_writes() {
    let Some(lab) = Lab::new("nobody_sees_what_another_one_writes") else { return };
    lab.disk("root");
    let mut parent = lab.run("p", &["root"]);
    fill(&mut parent, 1000);
    parent.number("p 9 1000");
    let at_fork = sum(&mut parent);
    lab.done(&["vm", "fork", "p", "c"]);
    // The parent rewrites everything; the child had touched nothing yet.
    fill(&mut parent, 2000);
    parent.number("p 9 2000");
    let mut child = lab.console("c");
    assert_eq!((sum(&mut child), child.number("g 9")), (at_fork, 1000));
    fill(&mut child, 3000);
    child.number("p 9 3000");
    let at_second = sum(&mut child);

    // A fork of a fork, of one that is paused.
    lab.done(&["vm", "pause", "c"]);
    lab.done(&["vm", "fork", "c", "g", "--paused"]);
    assert_eq!(
        (&lab.show("c")["state"], &lab.show("g")["state"]),
        (&"paused".into(), &"paused".into())
    );
    assert_eq!(lab.show("g")["parent"]["name"], "c");
    lab.done(&["vm", "resume", "g"]);
    let mut grandchild = lab.console("g");
    assert_eq!((sum(&mut grandchild), grandchild.number("g 9")), (at_second, 3000));
    fill(&mut grandchild, 4000);
    grandchild.number("p 9 4000");
    lab.done(&["vm", "resume", "c"]);
    assert_eq!((sum(&mut child), child.number("g 9")), (at_second, 3000));
    assert_eq!(parent.number("g 9"), 2000);
    assert_ne!(sum(&mut parent), at_fork);

    // Who is removed takes its own with it, and nothing else.
    lab.done(&["vm", "rm", "c", "--force"]);
    assert_eq!(grandchild.number("g 9"), 4000);
    let disks = lab.traces().disks;
    assert!(disks.contains("g-disk0") && disks.contains("root") && !disks.contains("c-disk0"));
    lab.done(&["vm", "rm", "g", "--force", "--keep-disks"]);
    assert!(lab.traces().disks.contains("g-disk0"));
    lab.done(&["disk", "check", "g-disk0"]);
}

/// A disk for reading only is shared by all children, and stays so.
#[test]
fn disks_for_reading_only_are_shared() {
    let Some(lab) = Lab::new("disks_for_reading_only_are_shared") else { return };
    lab.disk("base");
    lab.done(&["disk", "seal", "base"]);
    let mut parent = lab.run("p", &["base:ro"]);
    lab.done(&["vm", "fork", "p", "a", "b"]);
    for name in ["p", "a", "b"] {
        let vm = lab.show(name);
        assert_eq!(
            (&vm["disks"][0]["disk"], &vm["disks"][0]["own"]),
            (&"base".into(), &false.into())
        );
        let sector = match name {
            "p" => parent.number("g 9"),
            child => lab.console(child).number("g 9"),
        };
        assert_eq!(sector, 0);
        lab.done(&["vm", "rm", name, "--force"]);
    }
    assert!(lab.traces().disks.contains("base"));
}

/// Story: children of a machine with a disk of its own and one that is shared had the shared one
/// served to them when blockd was ready for the fork of the other one, which kept blockd from
/// serving anything else: ten seconds later the fork was given up.
#[test]
fn disks_that_are_shared_go_with_disks_that_are_forked() {
    let Some(lab) = Lab::new("disks_that_are_shared_go_with_disks_that_are_forked") else { return };
    lab.disk("base");
    lab.done(&["disk", "seal", "base"]);
    lab.disk("data");
    let mut parent = lab.run("p", &["data", "base:ro"]);
    assert_eq!(parent.number("p 5 4242"), 4242);

    lab.done(&["vm", "fork", "p", "a", "b"]);

    for name in ["a", "b"] {
        assert_eq!(lab.console(name).number("g 5"), 4242);
        let disks = &lab.show(name)["disks"];
        assert_eq!((&disks[0]["own"], &disks[1]["disk"]), (&true.into(), &"base".into()));
    }
}

/// What cannot be forked is refused by name, and changes nothing: above all no disk goes that only
/// has the name of a child's.
#[test]
fn what_cannot_be_forked_is_refused_and_changes_nothing() {
    let Some(lab) = Lab::new("what_cannot_be_forked_is_refused_and_changes_nothing") else {
        return;
    };
    lab.disk("root");
    lab.disk("mine-disk0");
    let mut parent = lab.run("p", &["root"]);
    lab.run("taken", &[]);
    lab.settle();
    let before = lab.traces();
    let long = "x".repeat(65);
    for (args, kind, says) in [
        (vec!["none", "a"], "not-found", "vm none"),
        (vec!["p", "taken"], "exists", "vm taken"),
        (vec!["p", "a", "a"], "invalid", "twice"),
        (vec!["p", &long], "invalid", "name"),
        (vec!["p", "fine", "mine"], "exists", "mine-disk0"),
    ] {
        let message = lab.refused(&[&["vm", "fork"][..], &args].concat(), kind);
        assert!(message.contains(says), "{args:?}: {message}");
        lab.settle();
        assert_eq!(lab.traces(), before, "{args:?}");
    }
    assert_eq!(parent.number("p 9 9"), 9, "the parent goes on");
    lab.done(&["vm", "stop", "p"]);
    lab.refused(&["vm", "fork", "p", "a"], "failed");
    lab.settle();
    assert!(lab.traces().disks.contains("mine-disk0"));
}

/// More children than there are shells: the missing ones are made, it is told, and they are as
/// good.
#[test]
fn an_empty_pool_is_slower_and_told_of() {
    let Some(lab) = Lab::with("an_empty_pool_is_slower_and_told_of", &["--pool-size", "0"]) else {
        return;
    };
    lab.disk("root");
    let mut parent = lab.run("p", &["root"]);
    parent.number("p 9 9");
    let forked = lab.json(&["vm", "fork", "p", "a", "b", "c"]);
    assert_eq!(forked["cold"], 3);
    for name in ["a", "b", "c"] {
        assert_eq!(lab.console(name).number("g 9"), 9);
    }
    let metrics = offshoot_tests::daemon::ask(&lab.forkd_api(), "GET", "/metrics", b"").unwrap();
    let metrics = String::from_utf8(metrics.body).unwrap();
    assert!(metrics.contains("forkd_pool_taken_total{from=\"made\"} 4"), "{metrics}");
    assert!(metrics.contains("forkd_children_total 3"), "{metrics}");
}

/// Without random numbers of the host there is no new machine, rather than one that shares its
/// secrets with another: not by a fork, not by a boot. What was begun is undone.
#[test]
fn without_new_random_numbers_there_is_no_machine() {
    let Some(lab) = Lab::new("without_new_random_numbers_there_is_no_machine") else { return };
    lab.disk("root");
    lab.disk("other");
    let mut parent = lab.run("p", &["root"]);
    lab.done(&["vm", "fork", "p", "a"]);
    lab.done(&["vm", "rm", "a", "--force"]);
    let before = lab.settled();
    let kernel = lab.store.path("kernel").display().to_string();
    for what in [
        &["vm", "fork", "p", "a", "b"][..],
        &["vm", "run", "q", "--kernel", &kernel, "--mem", "32M", "--disk", "other"],
    ] {
        // What the language's own library asks for has flags, and a way without.
        let calls = |call, args: &[u64; 6]| call == libc::SYS_getrandom && args[1] == 53;
        let refused = Refused { calls, errno: libc::EIO, after: 0 };
        let tracer = Tracer::refuse(lab.forkd_pid(), refused);
        let told = lab.refused(what, "io");
        assert!(tracer.refusals() > 0);
        assert!(told.contains("cannot make the identity of vm"), "{told}");
        lab.settle();
        lab.await_held(&before);
    }
    assert_eq!(parent.number("p 9 9"), 9, "the parent goes on");
    lab.done(&["vm", "fork", "p", "a"]);
    assert_eq!(lab.console("a").number("g 9"), 9);
}

/// Time goes on for a guest, in a child from where its parent's was, in a machine that was restored
/// from where it would be by now: never back, and not faster than the host's.
#[test]
fn time_goes_on_in_children_and_restored_machines() {
    let Some(lab) = Lab::new("time_goes_on_in_children_and_restored_machines") else { return };
    let mut parent = lab.run("p", &[]);
    let first = (Instant::now(), parent.number("K"));
    let snap = lab.store.path("snap").display().to_string();
    lab.done(&["vm", "snapshot", "p", &snap]);
    lab.done(&["vm", "fork", "p", "c"]);
    lab.done(&["vm", "fork", "c", "g"]);
    std::thread::sleep(Duration::from_millis(300));
    lab.done(&["vm", "restore", &snap, "r"]);
    for name in ["p", "c", "g", "r"] {
        let mut attached = None;
        let console = match name {
            "p" => &mut parent,
            _ => attached.insert(lab.console(name)),
        };
        let least = first.0.elapsed();
        let now = console.number("K");
        let most = first.0.elapsed() + SLACK;
        let passed = Duration::from_nanos(now.checked_sub(first.1).expect("time goes on"));
        assert!(least <= passed + SLACK && passed <= most, "{name}: {least:?} {passed:?} {most:?}");
        assert!(console.number("K") > now);
    }
}
