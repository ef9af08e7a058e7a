//! The unit for systemd that is shipped is one that systemd understands to the last line, and one
//! under which the daemon works.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use offshoot_tests::daemon::{Daemon, program};
use offshoot_tests::mount::have;
use offshoot_tests::served::ServedDisk;
use offshoot_tests::skip;
use offshoot_tests::store::TestStore;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use serde_json::Value;
use vhost_blk::client::{Op, Span};

const UNIT: &str = "../tools/systemd/offshoot-blockd.service";
/// Where Linux on this processor numbers its calls.
const NUMBERS: &str = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h";
/// What systemd lets through besides, whatever a unit says.
const ALWAYS: [&str; 6] = ["@default", "execve", "exit", "exit_group", "getrlimit", "rt_sigreturn"];

fn shipped() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(UNIT)).unwrap()
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

/// The calls that a name stands for: one, or those of a group.
fn calls_of(name: &str) -> BTreeSet<String> {
    if !name.starts_with('@') {
        return BTreeSet::from([name.to_owned()]);
    }
    let output = Command::new("systemd-analyze").args(["syscall-filter", name]).output().unwrap();
    assert!(output.status.success(), "{name}");
    let text = String::from_utf8(output.stdout).unwrap();
    let inside = text.lines().filter(|line| line.starts_with(' ')).map(str::trim);
    inside.filter(|line| !line.starts_with('#')).flat_map(calls_of).collect()
}

/// The calls that a service of this unit may make, as systemd takes its lines: one after the other.
fn allowed(unit: &str) -> BTreeSet<String> {
    let mut calls: BTreeSet<String> = ALWAYS.iter().flat_map(|name| calls_of(name)).collect();
    for line in unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")) {
        let (taken_away, names) = line.strip_prefix('~').map_or((false, line), |rest| (true, rest));
        for call in names.split_whitespace().flat_map(calls_of) {
            if taken_away {
                calls.remove(&call)
            } else {
                calls.insert(call)
            };
        }
    }
    calls
}

/// A filter that lets these calls through, and refuses all others as the unit says.
fn filter(calls: &BTreeSet<String>, numbers: &str) -> BpfProgram {
    let number = |line: &str| {
        let mut words = line.strip_prefix("#define __NR_")?.split_whitespace();
        let name = words.next()?.to_owned();
        calls.contains(&name).then_some((words.next()?.parse().ok()?, vec![]))
    };
    let rules: BTreeMap<i64, _> = numbers.lines().filter_map(number).collect();
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64);
    filter.unwrap().try_into().unwrap()
}

/// The daemon under the filter of a unit.
fn daemon_under(unit: &str, numbers: &str) -> Command {
    let filter = filter(&allowed(unit), numbers);
    let mut command = Command::new(program("blockd"));
    let confine =
        move || seccompiler::apply_filter(&filter).map_err(|_| std::io::Error::last_os_error());
    // SAFETY: the closure makes two system calls on memory that is there already.
    unsafe { command.pre_exec(confine) };
    command
}

/// Story: the systemd of Debian 12 does not count the calls by which a program confines itself
/// among what services need. There the daemon did not start from our unit.
#[test]
fn the_daemon_works_and_confines_itself_under_the_unit() {
    let test = "systemd_unit::the_daemon_works_and_confines_itself_under_the_unit";
    if !have(test, &["systemd-analyze"]) {
        return;
    }
    let Ok(numbers) = fs::read_to_string(NUMBERS) else {
        return skip(test, "the headers of the C library are not there");
    };
    let bench = ServedDisk::new(TestStore::new());
    let unit = shipped();

    let confined = daemon_under(&unit, &numbers);
    let daemon = Daemon::start_by(confined, bench.store(), &bench.api(), &[]);

    let sandbox = daemon.json("GET", "/v1/health", &Value::Null)["sandbox"].clone();
    let usual = TestStore::new().daemon().json("GET", "/v1/health", &Value::Null);
    assert_eq!(sandbox, usual["sandbox"], "no less than without systemd");
    bench.attach();
    let (client, mut queues) = bench.connect(false);
    let block = Span { offset: queues[0].data().0, len: 4096 };
    for op in [Op::Write, Op::Flush, Op::Read] {
        let spans = if matches!(op, Op::Flush) { &[][..] } else { &[block] };
        queues[0].submit(op, 0, spans, 0).expect("room in the ring");
        queues[0].kick();
        assert!(queues[0].wait(20_000), "{op:?}");
        assert_eq!(queues[0].poll().map(|done| done.status), Some(0), "{op:?}");
    }
    drop((queues, client));
    assert!(daemon.terminate().success());

    // A call that is not let through is one that the daemon misses.
    let mut command = daemon_under(&format!("{unit}\nSystemCallFilter=~seccomp\n"), &numbers);
    command.arg("--store").arg(bench.store()).arg("--api").arg(bench.api());
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("seccomp"), "{said}");
}
