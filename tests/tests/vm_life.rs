//! The life of a virtual machine, through the real command line: it is run, looked at, paused,
//! stopped and removed; it ends for reasons that have names; it survives the daemon.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;
use std::time::{Duration, Instant};

use offshoot_tests::daemon::ask;
use offshoot_tests::inject::Injected;
use offshoot_tests::rng::soak;
use offshoot_tests::until;
use offshoot_tests::vm::{Console, Lab, kill, word};
use rustix::process::Signal;
use serde_json::Value;

/// A machine is what it was asked to be, does what its guest is told, and leaves nothing.
#[test]
fn a_machine_runs_pauses_ends_and_leaves_nothing() {
    let Some(lab) = Lab::new("a_machine_runs_pauses_ends_and_leaves_nothing") else { return };
    lab.disk("data");
    let before = lab.traces();
    let mut console = lab.run("web1", &["data"]);
    let vm = lab.show("web1");
    assert_eq!(
        (&vm["state"], &vm["memory_bytes"], &vm["vcpus"]),
        (&"running".into(), &(32 << 20).into(), &1.into())
    );
    assert_eq!(vm["disks"][0]["path"], "arena", "the API says how a disk is reached: {vm}");
    assert!(lab.done(&["vm", "ls"]).contains("web1"));

    // What the guest wrote is on the disk, and blockd has it.
    assert_eq!(console.number("p 5 4242"), 4242);
    assert_eq!(console.number("g 5"), 4242);
    let identity = console.ask("i");
    assert_eq!(word(&identity, "name"), "web1");
    assert_eq!(word(&identity, "mac"), vm["mac"].as_str().unwrap().replace(':', ""));
    let generation = vm["generation_id"].as_str().unwrap().replace('-', "");
    assert_eq!(word(&identity, "generation"), generation);

    // Who is paused says nothing, and says it later.
    lab.done(&["vm", "pause", "web1"]);
    assert_eq!(lab.show("web1")["state"], "paused");
    console.say("g 5");
    assert!(console.is_silent_for(Duration::from_millis(200)));
    lab.done(&["vm", "resume", "web1"]);
    assert_eq!(console.hear("= "), "= 4242");

    assert!(lab.refused(&["vm", "rm", "web1"], "in-use").contains("has not ended"));
    lab.done(&["vm", "stop", "web1"]);
    assert_eq!(lab.end_of("web1")["reason"], "stopped");
    assert!(lab.refused(&["vm", "pause", "web1"], "failed").contains("ended: stopped"));
    // Its disk is free at once, and not lost.
    lab.done(&["disk", "check", "data"]);
    lab.done(&["vm", "rm", "web1"]);
    lab.refused(&["vm", "show", "web1"], "not-found");
    lab.settle();
    let after = lab.traces();
    assert_eq!((after.exports, &after.disks), (before.exports, &before.disks));
    assert_eq!((after.folders, after.processes), (2, 2), "shells of the pool, and nothing else");
}

/// A guest that ends itself is told of by the reason; nobody has to look at a log.
#[test]
fn machines_end_for_reasons_with_names() {
    let Some(lab) = Lab::new("machines_end_for_reasons_with_names") else { return };
    for (letter, reason) in [("o", "power-off"), ("r", "reset"), ("t", "triple-fault")] {
        let mut console = lab.run(reason, &[]);
        console.say(letter);
        assert_eq!(lab.end_of(reason)["reason"], reason);
    }
    lab.run("killed", &[]);
    offshoot_tests::vm::kill(lab.pid("killed"), rustix::process::Signal::KILL);
    assert_eq!(lab.end_of("killed")["reason"], "killed");
    let detail = lab.end_of("triple-fault")["detail"].to_string();
    assert!(detail.contains("rip"), "a fault says where: {detail}");
    let listed = lab.done(&["vm", "ls"]);
    assert!(listed.contains("ended: power-off") && listed.contains("ended: killed"), "{listed}");
    let events = lab.done(&["vm", "events", "--json"]);
    let events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of_one: Vec<String> = events
        .filter(|event| event["object"].as_str().unwrap().contains("triple-fault"))
        .map(|event| event["kind"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(of_one, ["booted", "ended"]);
    let text = lab.done(&["vm", "events"]);
    assert!(text.lines().any(|line| line.contains("ended") && line.contains("killed")), "{text}");
}

/// Shells are forked from one process that the daemon started. When that is killed, machines go on,
/// and forks find another one; when the daemon is, none is left.
#[test]
fn a_zygote_that_is_killed_takes_nothing_with_it() {
    let Some(mut lab) = Lab::new("a_zygote_that_is_killed_takes_nothing_with_it") else { return };
    let mut console = lab.run("p", &[]);
    let before = started_by(lab.forkd_pid());
    assert_eq!(before.len(), 1, "one process makes all shells");
    offshoot_tests::vm::kill(before[0], rustix::process::Signal::KILL);

    // More than there are shells ready.
    lab.done(&["vm", "fork", "p", "a", "b", "c", "d", "e"]);

    assert_eq!(word(&console.ask("i"), "name"), "p");
    assert_eq!(word(&lab.console("e").ask("i"), "name"), "e");
    let after = started_by(lab.forkd_pid());
    assert!(after.len() == 1 && after != before, "{before:?} was followed by {after:?}");

    lab.kill_forkd();

    let until = Instant::now() + Duration::from_secs(10);
    while std::path::Path::new(&format!("/proc/{}", after[0])).exists() {
        assert!(Instant::now() < until, "a zygote outlives its daemon");
        std::thread::sleep(Duration::from_millis(10));
    }
    lab.start_forkd();
    assert_eq!(lab.show("e")["state"], "running");
}

/// The processes that a process has started, and has not waited for.
fn started_by(pid: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|p| p.file_name().to_str()?.parse::<u32>().ok());
    let parent = format!("PPid:\t{pid}");
    let is_child = |other: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{other}/status")).unwrap_or_default();
        status.lines().any(|line| line == parent)
    };
    pids.filter(is_child).collect()
}

/// A guest is asked to turn itself off first, if it listens; one that does not, or takes too long,
/// has its power cut, and the verb says which it was.
#[test]
fn a_stop_asks_the_guest_first() {
    let Some(lab) = Lab::new("a_stop_asks_the_guest_first") else { return };
    lab.disk("data");
    // It does not listen: there is nobody to wait for.
    lab.run("deaf", &["data"]);
    let since = Instant::now();
    assert!(lab.done(&["vm", "stop", "deaf"]).contains("its power was cut"));
    assert!(since.elapsed() < Duration::from_secs(20), "it waited for nobody");
    assert_eq!(lab.end_of("deaf")["reason"], "stopped");
    // It listens, and obeys; its disk is free at once.
    let mut console = lab.run("good", &["data"]);
    assert_eq!(console.ask("b 0"), "0");
    assert_eq!(lab.done(&["vm", "stop", "good"]), "stopped vm good\n");
    assert_eq!(lab.end_of("good")["reason"], "power-off");
    lab.done(&["disk", "check", "data"]);
    // It listens, and does nothing.
    let mut console = lab.run("bad", &["data"]);
    assert_eq!(console.ask("b 1"), "1");
    let since = Instant::now();
    assert!(lab.done(&["vm", "stop", "bad", "--timeout", "1"]).contains("its power was cut"));
    assert!(since.elapsed() >= Duration::from_secs(1), "it had its time");
    assert_eq!(lab.end_of("bad")["reason"], "stopped");
    lab.done(&["disk", "check", "data"]);
    // One that would obey is not asked when nobody wants that; one that is paused cannot be.
    let mut console = lab.run("forced", &["data"]);
    assert_eq!(console.ask("b 0"), "0");
    lab.done(&["vm", "pause", "forced"]);
    assert!(lab.refused(&["vm", "stop", "forced"], "invalid").contains("paused"));
    assert_eq!(lab.show("forced")["state"], "paused");
    lab.done(&["vm", "stop", "forced", "--force"]);
    assert_eq!(lab.end_of("forced")["reason"], "stopped");
    // One that has ended stays as it is.
    lab.done(&["vm", "stop", "good"]);
    assert_eq!(lab.end_of("good")["reason"], "power-off");
    // The button of a child is its own, also when it was forked while its parent listened.
    let mut console = lab.run("p", &["data"]);
    assert_eq!(console.ask("b 0"), "0");
    lab.done(&["vm", "fork", "p", "c"]);
    assert_eq!(word(&lab.console("c").ask("i"), "name"), "c");
    lab.done(&["vm", "stop", "c"]);
    assert_eq!(lab.end_of("c")["reason"], "power-off");
    assert_eq!(console.number("p 9 9"), 9, "its parent goes on");
}

/// What cannot be a machine is refused by name, and nothing of it is there.
#[test]
fn what_cannot_be_a_machine_is_refused_and_leaves_nothing() {
    let Some(lab) = Lab::with("what_cannot_be_a_machine_is_refused", &["--pool-size", "0"]) else {
        return;
    };
    lab.disk("data");
    lab.run("taken", &[]);
    let before = lab.traces();
    let kernel = lab.store.path("kernel").display().to_string();
    let text = lab.store.path("text").display().to_string();
    std::fs::write(&text, "no kernel").unwrap();
    let run = ["vm", "run"];
    for (args, kind, says) in [
        (vec!["taken", "--kernel", &kernel], "exists", "vm taken"),
        (vec!["-x", "--kernel", &kernel], "invalid", ""),
        (vec!["a/b", "--kernel", &kernel], "invalid", "letters"),
        (vec!["a", "--kernel", "/nowhere"], "not-found", "/nowhere"),
        (vec!["a", "--kernel", &text], "invalid", "neither a bzImage nor"),
        (vec!["a", "--kernel", &kernel, "--disk", "none"], "not-found", "disk none"),
        (vec!["a", "--kernel", &kernel, "--disk", "data", "--disk", "data"], "invalid", "twice"),
        (vec!["a", "--kernel", &kernel, "--mem", "1000000"], "invalid", "MiB"),
        (vec!["a", "--kernel", &kernel, "--cpus", "9"], "invalid", "processors"),
        (vec!["a", "--kernel", &kernel, "--disk", "data", "--initrd", "/no"], "not-found", "/no"),
    ] {
        if args[0] == "-x" {
            assert_eq!(lab.offshoot(&[&run[..], &args].concat()).status.code(), Some(2));
            continue;
        }
        let message = lab.refused(&[&run[..], &args].concat(), kind);
        assert!(message.contains(says), "{args:?}: {message}");
        assert_eq!(lab.traces(), before, "{args:?}");
    }
    lab.done(&["disk", "check", "data"]);
}

/// Lines of 64 bytes of a flood, which is more than is kept, and for somebody who does not read
/// more than a socket takes besides. An access takes its time: the long variant has megabytes.
fn flood(reads_slowly: bool) -> u64 {
    let lines = if reads_slowly { 4_000 } else { 2_000 };
    if soak() { 20 * lines } else { lines }
}

/// Reads a flood to its end, which is there without a gap; gives back how many lines came in one.
fn end_of_flood(console: &mut Console, lines: u64) -> u64 {
    let (mut run, mut next) = (0, None);
    loop {
        let line = console.hear("");
        if line == format!("= {lines}") {
            assert_eq!(next, Some(lines), "the last line is there");
            return run;
        }
        let number = line.strip_prefix("~ ").and_then(|rest| rest.get(..16)?.parse::<u64>().ok());
        match number {
            Some(number) if Some(number) == next => run += 1,
            // The first line may be cut, and then some be missing, of which it is told.
            _ => run = 1,
        }
        next = number.map(|number| number + 1);
    }
}

/// A guest may print as much as it likes: with nobody there, or somebody who does not read, nothing
/// grows and the guest goes on; who reads gets what came last.
#[test]
fn a_guest_that_floods_its_console_fills_nothing() {
    let Some(lab) = Lab::new("a_guest_that_floods_its_console_fills_nothing") else { return };
    lab.disk("data");
    drop(lab.run("loud", &["data"]));
    let vm = lab.show("loud");
    let (id, pid) = (vm["id"].as_str().unwrap().replace('-', ""), lab.pid("loud"));
    let log = lab.state().join("vms").join(id).join("log");
    let bytes = |path: &std::path::Path| path.metadata().map_or(0, |m| m.len());
    let daemon_log = lab.store.path("forkd.log");
    let (memory, logged) = (memory_of(pid), bytes(&daemon_log));
    for reads_slowly in [false, true] {
        let mut typing = lab.console("loud");
        let printed = flood(reads_slowly);
        typing.say(&format!("x {printed}"));
        // The flood is over when what was typed after it is done.
        typing.say("p 9 1");
        let kept = reads_slowly.then_some(typing);
        until("the flood is over", || idles(pid));
        let grown = memory_of(pid).saturating_sub(memory);
        assert!(grown < 2 << 20, "{grown} bytes more");
        let mut reader = kept.unwrap_or_else(|| lab.console("loud"));
        let lines = end_of_flood(&mut reader, printed);
        assert!(lines > 900, "{lines} of the newest lines");
        assert_eq!(reader.hear("= "), "= 1");
        assert_eq!(reader.number("g 9"), 1, "the guest goes on");
    }
    assert!(bytes(&log) < 4096, "a guest's output is in no log");
    assert!(bytes(&daemon_log) < logged + 4096, "nor in that of the daemon");
    lab.done(&["vm", "rm", "loud", "--force"]);
}

/// Bytes of its own that a process has in memory.
fn memory_of(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Whether a process uses no processor for a while.
fn idles(pid: u32) -> bool {
    let used = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        (fields[11].to_owned(), fields[12].to_owned())
    };
    let before = used();
    std::thread::sleep(Duration::from_millis(100));
    before == used()
}

/// The daemon is stopped, killed and started again, and machines neither notice nor are lost.
#[test]
fn machines_survive_the_daemon() {
    let Some(mut lab) = Lab::new("machines_survive_the_daemon") else { return };
    lab.disk("data");
    let mut console = lab.run("web1", &["data"]);
    lab.run("gone", &[]);
    console.number("p 5 7");
    for round in 0..3 {
        let (pid, gone) = (lab.pid("web1"), round == 1);
        match round {
            0 => lab.stop_forkd(),
            _ => lab.kill_forkd(),
        }
        assert_eq!(console.number("g 5"), 7, "the guest goes on without");
        if gone {
            console.say("g 5");
            let folder = processes_but(&lab, pid);
            folder.iter().for_each(|pid| {
                offshoot_tests::vm::kill(*pid, rustix::process::Signal::KILL);
            });
        }
        lab.start_forkd();
        assert_eq!(lab.pid("web1"), pid, "it is the same machine");
        assert_eq!(lab.show("web1")["state"], "running");
    }
    // One that was killed while nobody looked has ended, and its name is known.
    assert_eq!(lab.end_of("gone")["reason"], "killed");
    lab.done(&["vm", "fork", "web1", "web2"]);
    assert_eq!(lab.console("web2").number("g 5"), 7);
    for name in ["web1", "web2", "gone"] {
        lab.done(&["vm", "rm", name, "--force"]);
    }
    lab.settle();
    assert_eq!(lab.traces().exports, 0);
}

/// Story: the host killed a process just when the next daemon had connected to it. The daemon took
/// the silence for a failure of its own and did not start, and all other machines were without one.
#[test]
fn a_machine_that_dies_while_it_is_found_keeps_no_daemon_from_starting() {
    let test = "a_machine_that_dies_while_it_is_found_keeps_no_daemon_from_starting";
    let Some(mut lab) = Lab::new(test) else { return };
    lab.disk("data");
    let mut console = lab.run("web1", &["data"]);
    lab.run("dies", &[]);
    console.number("p 5 7");
    let dies = lab.pid("dies");
    lab.kill_forkd();
    // It can be connected to, and says nothing.
    offshoot_tests::vm::stop(dies);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            offshoot_tests::vm::kill(dies, rustix::process::Signal::KILL);
        });
        lab.start_forkd();
    });
    assert_eq!(lab.end_of("dies")["reason"], "killed");
    assert_eq!(console.number("g 5"), 7);
    for name in ["web1", "dies"] {
        lab.done(&["vm", "rm", name, "--force"]);
    }
}

fn processes_but(lab: &Lab, keep: u32) -> Vec<u32> {
    let all = offshoot_tests::vm::processes_in(&lab.state());
    all.into_iter().filter(|pid| *pid != keep).collect()
}

/// The console through the command line, in a pipe: what is typed reaches the guest, and what it
/// says comes back; when the machine ends, so does the verb.
#[test]
fn the_console_is_attached_to_by_the_command_line() {
    let Some(lab) = Lab::new("the_console_is_attached_to_by_the_command_line") else { return };
    drop(lab.run("web1", &[]));
    let mut command = lab.command(&["vm", "console", "web1"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut attached = command.spawn().unwrap();
    let mut stdin = attached.stdin.take().unwrap();
    let mut lines = BufReader::new(attached.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "= ready", "what was printed before comes first");
    stdin.write_all(b"i\n").unwrap();
    assert_eq!(word(&lines.next().unwrap().unwrap(), "name"), "web1");
    stdin.write_all(b"o\n").unwrap();
    assert!(lines.next().is_none());
    assert!(attached.wait().unwrap().success());
    assert_eq!(lab.end_of("web1")["reason"], "power-off");
    assert!(lab.refused(&["vm", "console", "web1"], "failed").contains("has ended"));
}

/// Before a guest runs, every thread of its process has given up what it does not need; so has the
/// daemon.
#[test]
fn daemon_and_machines_are_confined() {
    let Some(lab) = Lab::new("daemon_and_machines_are_confined") else { return };
    lab.run("web1", &[]);
    lab.done(&["vm", "fork", "web1", "web2"]);
    for pid in [lab.forkd_pid(), lab.pid("web1"), lab.pid("web2")] {
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let status = std::fs::read_to_string(thread.path().join("status")).unwrap();
            assert!(status.contains("Seccomp:\t2"), "{pid}: {status}");
        }
    }
    assert_eq!(lab.json(&["vm", "status"])["sandbox"][0], "seccomp");
    // What is given up fails; another process may, and fails for its arguments at most.
    let calls = [libc::SYS_bpf, libc::SYS_keyctl, libc::SYS_perf_event_open, libc::SYS_ptrace];
    let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let outcomes = |pid: u32, calls: &[libc::c_long]| -> Vec<i64> {
        let process = Injected::into(pid);
        calls.iter().map(|call| process.call(*call, [0; 4])).collect()
    };
    let may = outcomes(other.id(), &calls[..3]);
    other.kill().unwrap();
    other.wait().unwrap();
    let refused = -i64::from(libc::EPERM);
    assert!(!may.contains(&refused), "{may:?}");
    for pid in [lab.forkd_pid(), lab.pid("web1"), lab.pid("web2")] {
        assert_eq!(outcomes(pid, &calls), [refused; 4], "{pid}");
    }
    // None of them has noticed.
    lab.done(&["vm", "fork", "web2", "web3"]);
    assert_eq!(word(&lab.console("web3").ask("i"), "name"), "web3");
}

/// What happens to machines is told as events: a pool that was too small, and how machines end.
#[test]
fn an_empty_pool_and_ends_are_events() {
    let Some(lab) = Lab::new("an_empty_pool_and_ends_are_events") else { return };
    let events = || -> Vec<serde_json::Value> {
        let reply = ask(&lab.forkd_api(), "GET", "/v1/events?since=0", b"").unwrap();
        let text = String::from_utf8(reply.body).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let has = |kind: &str, object: &str, detail: &str| {
        let is = |e: &serde_json::Value| {
            let text = |key: &str| e[key].as_str().unwrap_or_default().to_owned();
            e["kind"] == kind && text("object").contains(object) && text("detail").contains(detail)
        };
        events().iter().any(is)
    };
    drop(lab.run("p", &[]));
    assert!(has("pool-empty", "33554432 bytes, 1 processors", "1 shells are made"));
    lab.settle();
    lab.done(&["vm", "fork", "p", "a", "b", "c"]);
    let told = events().into_iter().filter(|e| e["kind"] == "pool-empty").count();
    assert_eq!(told, 2, "three children of two shells: {:?}", events());
    lab.console("a").say("o");
    lab.done(&["vm", "stop", "b"]);
    kill(lab.pid("c"), Signal::KILL);
    for (name, reason) in [("a", "power-off"), ("b", "stopped"), ("c", "killed")] {
        assert_eq!(lab.end_of(name)["reason"], reason);
        until("it is told", || has("ended", &format!("vm {name}"), reason));
    }
    assert!(!has("ended", "vm p", ""));
}
