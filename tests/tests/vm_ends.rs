//! However a machine ends, it ends once, with a name, and leaves nothing behind; and what goes
//! wrong in the middle of a fork leaves the parent as it was.

use std::fs;

use forkd::machine::{Reason, SizeClass};
use format::{Error, Kind};
use offshoot_tests::payload::checks;
use offshoot_tests::payload::{Guest, HEAP, InPause, Op, available};

const MIB: u64 = 1 << 20;

/// Each of the guest's own ways to end has its name, and the machine does nothing more.
#[test]
fn every_end_has_a_name() {
    let test = "vm_ends::every_end_has_a_name";
    if !available(test) {
        return;
    }
    checks::every_end(|exit| {
        if exit.reason == Reason::TripleFault {
            assert!(exit.detail.contains("processor 0: rip 0x1"), "{exit}");
        }
    });
}

/// A fork whose disks cannot be cut, before or after the memory was taken, is given up, and the
/// parent goes on; the next fork works.
#[test]
fn failed_cut_leaves_the_parent_running() {
    let test = "vm_ends::failed_cut_leaves_the_parent_running";
    if !available(test) {
        return;
    }
    let guest = Guest::start(8 * MIB, 1);
    let no = || Err(Error::new(Kind::NoSpace, "no space for the disks"));
    for round in 0..4 {
        guest.ask(Op::Fill, [HEAP, 50, round]);
        let e = guest
            .cut_with(&mut InPause { before: &mut || (), after: &mut || no() })
            .expect_err("no disks");
        assert_eq!(e.kind(), Kind::NoSpace);
        assert!(!guest.panel.is_quiet(), "devices still stand");
        assert_eq!(guest.ask(Op::Fill, [HEAP + 50 * 4096, 50, round]), 50);
        let child = guest.fork(1);
        assert_eq!(child.memory()[..], guest.memory()[..], "round {round}");
        child.machine.resume().expect("the child runs");
        assert_eq!(child.word(HEAP + 4096), round + 1);
    }
}

/// Open files of this process that belong to machines.
fn open_files() -> usize {
    let fds = fs::read_dir("/proc/self/fd").expect("open files");
    let names = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    names
        .filter(|name| {
            ["kvm-v", "memfd", "eventfd"].iter().any(|part| name.to_string_lossy().contains(part))
        })
        .count()
}

/// Machines, children, images, failed forks: when they are gone, so are their files, memory and
/// threads.
#[test]
fn nothing_is_left_behind() {
    let test = "vm_ends::nothing_is_left_behind";
    if !available(test) {
        return;
    }
    let threads = || fs::read_dir("/proc/self/task").expect("threads").count();
    let maps = || {
        let maps = fs::read_to_string("/proc/self/maps").expect("maps");
        maps.lines().filter(|line| line.contains("guest-memory")).count()
    };
    // Other tests of this binary run beside this one, so it looks in a process of its own.
    if std::env::var_os("OFFSHOOT_ALONE").is_none() {
        let exe = std::env::current_exe().expect("this program");
        let alone = std::process::Command::new(exe)
            .args(["--exact", "nothing_is_left_behind", "--test-threads", "1"])
            .env("OFFSHOOT_ALONE", "1")
            .status()
            .expect("the test runs alone");
        assert!(alone.success());
        return;
    }
    drop(Guest::start(8 * MIB, 1).fork(1));
    let before = (open_files(), threads(), maps());
    for round in 0..5u8 {
        let guest = Guest::start(8 * MIB, 2);
        let image = guest.cut();
        let children: Vec<Guest> = (0..3).map(|n| guest.fork(n)).collect();
        children.iter().for_each(|child| child.machine.resume().expect("the child runs"));
        let wrong = SizeClass { memory_bytes: 4 * MIB, vcpus: 1 };
        let who = offshoot_tests::payload::identity(round);
        assert!(Guest::child(&image, wrong, &who).is_err());
        children[0].tell(0, Op::PowerOff, [0; 3]);
        assert_eq!(children[0].ended().reason, Reason::PowerOff);
    }
    assert_eq!((open_files(), threads(), maps()), before);
}
