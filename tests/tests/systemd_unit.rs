//! The unit for systemd that is shipped is one that systemd understands to the last line, and what
//! it allows is enough for a daemon that confines itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use offshoot_tests::daemon::{Daemon, program};
use offshoot_tests::load::during;
use offshoot_tests::mount::{have, run};
use offshoot_tests::served::ServedDisk;
use offshoot_tests::skip;
use offshoot_tests::store::TestStore;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::{Value, json};

/// Where the host's own headers say what number a system call has.
const NUMBERS: [&str; 2] =
    ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"];

fn shipped() -> String {
    let path = "../tools/systemd/offshoot-blockd.service";
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// What systemd says of a unit: whether it takes it, and every complaint.
fn verify(unit: &str) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("offshoot-blockd.service");
    fs::write(&path, unit).unwrap();
    let mut command = Command::new("systemd-analyze");
    // What is wrong with other units of this machine is not ours.
    command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(path);
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn systemd_has_nothing_to_say_about_the_unit() {
    if !have("systemd_unit::systemd_has_nothing_to_say_about_the_unit", &["systemd-analyze"]) {
        return;
    }
    let (installed, built) = ("/usr/bin/blockd", program("blockd"));
    let unit = shipped();
    assert_eq!(unit.matches(installed).count(), 1);
    let unit = unit.replace(installed, built.to_str().unwrap());

    assert_eq!(verify(&unit), (true, String::new()));

    let (_, said) = verify(&unit.replace("NoNewPrivileges=", "NoNewPrivilege="));
    assert!(said.contains("NoNewPrivilege"), "a complaint is noticed: {said:?}");
    let (taken, said) = verify(&unit.replace("ExecStart=", "#"));
    assert!(!taken, "{said}");
}

/// The system calls that a word of a filter stands for.
fn expand(word: &str, into: &mut BTreeSet<String>) {
    if !word.starts_with('@') {
        into.insert(word.to_owned());
        return;
    }
    // Its first line is the set itself, and comments begin with #.
    let said = run("systemd-analyze", &["syscall-filter", word]);
    let lines = said.lines().skip(1).map(str::trim);
    lines.filter(|l| !l.is_empty() && !l.starts_with('#')).for_each(|l| expand(l, into));
}

/// What the filter of a unit allows, by name. As systemd has it: the first line makes it a list of
/// what is allowed, to which what every program needs belongs, and the others change that list.
fn allowed(unit: &str) -> BTreeSet<String> {
    let mut allowed = BTreeSet::new();
    expand("@default", &mut allowed);
    for line in unit.lines().filter_map(|l| l.strip_prefix("SystemCallFilter=")) {
        let mut calls = BTreeSet::new();
        let refused = line.strip_prefix('~');
        refused.unwrap_or(line).split(' ').for_each(|word| expand(word, &mut calls));
        match refused {
            None => allowed.append(&mut calls),
            Some(_) => allowed.retain(|call| !calls.contains(call)),
        }
    }
    allowed
}

/// A filter that has all but the named calls fail. A name without a number is a call of another
/// architecture.
fn filter_of(allowed: &BTreeSet<String>, header: &str) -> BpfProgram {
    let defined = header.lines().filter_map(|l| l.strip_prefix("#define __NR_")?.split_once(' '));
    let numbers: BTreeMap<&str, i64> =
        defined.filter_map(|(name, n)| Some((name, n.trim().parse().ok()?))).collect();
    let rules = allowed.iter().filter_map(|name| Some((*numbers.get(name.as_str())?, Vec::new())));
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules.collect(), refuse, SeccompAction::Allow, arch);
    filter.unwrap().try_into().unwrap()
}

/// A daemon under a filter that was there before the program began.
fn under(filter: BpfProgram, store: &TestStore) -> Daemon {
    let mut command = Command::new(program("blockd"));
    let apply = move || seccompiler::apply_filter(&filter).map_err(std::io::Error::other);
    // SAFETY: between fork and exec it makes two system calls, and allocates when one fails only.
    unsafe { command.pre_exec(apply) };
    // SAFETY: asks for a number.
    let group = unsafe { libc::getegid() }.to_string();
    Daemon::start_by(command, store.store(), &store.api(), &["--allow-group", &group])
}

/// The line of a process's status.
fn status(daemon: &Daemon, line: &str) -> u32 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let value = status.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':')).unwrap();
    value.trim().parse().unwrap()
}

/// Story: the sets of systemd 252 have neither `seccomp` nor landlock. Under the unit a daemon did
/// not start there.
#[test]
fn what_the_unit_allows_is_enough_to_serve_and_to_be_confined() {
    let test = "systemd_unit::what_the_unit_allows_is_enough_to_serve_and_to_be_confined";
    if !have(test, &["systemd-analyze"]) {
        return;
    }
    let Some(header) = NUMBERS.iter().find_map(|path| fs::read_to_string(path).ok()) else {
        return skip(test, "this machine has no numbers of system calls");
    };
    let served = ServedDisk::new(TestStore::new());
    let free = served.daemon();
    let confined = free.json("GET", "/v1/health", &Value::Null)["sandbox"].clone();
    assert!(free.terminate().success());
    let allowed = allowed(&shipped());
    for refused in ["mount", "reboot", "sched_setscheduler", "setuid", "ptrace"] {
        assert!(!allowed.contains(refused), "{refused} is allowed");
    }

    let daemon = under(filter_of(&allowed, &header), &served);
    served.attach();
    let (client, queues) = served.connect(true);
    let (mut loads, ()) = during(served.loads(queues, 1), |done| {
        offshoot_tests::until("the guest gets on", || done() > 200);
    });
    loads.iter_mut().for_each(|load| {
        load.flush();
        load.verify();
    });
    drop(client);
    served.done(&["disk", "fork", "vm", "child"]);

    // As without the unit: with landlock where the kernel has it.
    assert_eq!(daemon.json("GET", "/v1/health", &Value::Null)["sandbox"], confined);
    assert_eq!((status(&daemon, "Seccomp"), status(&daemon, "Seccomp_filters")), (2, 2));
    if confined.as_array().unwrap().contains(&json!("landlock")) {
        let outside = tempfile::tempdir_in("/var/tmp").unwrap();
        let socket = outside.path().join("a.sock");
        let export = json!({"export": {"kind": "vhost-user", "socket": socket}}).to_string();
        let reply = daemon.ask("POST", "/v1/disks/child/attach", export.as_bytes());
        assert_eq!(reply.status, 403, "{reply:?}");
    } else {
        skip(&format!("{test} (landlock)"), "this kernel has no landlock");
    }
    assert!(daemon.terminate().success());
    served.compare(&loads);
}
