//! Forks of disks that nobody has open: after any crash the children are all there or none is, with
//! what the parents held, and the parents go on.

use blockd::check::{CheckOptions, check};
use blockd::store::Access;
use blockd::store::sim::{Op, SimStore, drop_syncs};
use blockd::storedir::{ForkOf, StoreDir};
use offshoot_tests::inspect::Wrong;
use offshoot_tests::sim::{BLOCK, EXTENT};

use super::storedir::{Recorder, SECTORS, new_disk, open, write, wrong_states};

pub(super) fn fork(dir: &StoreDir, wanted: &[(&str, &[&str])]) {
    let of = |(disk, children): &(&str, &[&str])| ForkOf {
        disk: (*disk).into(),
        children: children.iter().map(|name| (*name).into()).collect(),
    };
    dir.fork(&wanted.iter().map(of).collect::<Vec<_>>()).unwrap();
}

pub(super) fn change(dir: &StoreDir, name: &str, tag: u32, first: u64, count: u64) {
    let disk = dir.open_disk(name, Access::Write, &dir.disk_options()).unwrap();
    write(&disk, tag, first, count);
    disk.close().unwrap();
}

/// A store with two disks that have data.
fn two_disks() -> Recorder {
    let mut recorder = Recorder::start();
    for (tag, name) in [(1, "data"), (2, "log")] {
        recorder.step(|dir| _ = dir.create(&new_disk(name, None)).unwrap());
        recorder.step(|dir| change(dir, name, tag, 3, 3 * EXTENT));
    }
    Recorder::over(recorder.store.live_image())
}

/// The same with a child of the first.
fn forked() -> Recorder {
    let mut recorder = two_disks();
    recorder.step(|dir| fork(dir, &[("data", &["one"])]));
    Recorder::over(recorder.store.live_image())
}

#[test]
fn of_one_disk() {
    let mut recorder = two_disks();
    recorder.step(|dir| fork(dir, &[("data", &["one", "two"])]));
    recorder.step(|dir| change(dir, "data", 5, 0, BLOCK));
    recorder.step(|dir| change(dir, "one", 6, 2 * EXTENT, BLOCK));
    recorder.step(|dir| fork(dir, &[("one", &["grandchild"])]));
    recorder.visit("fork: of one disk, and of its child");
}

#[test]
fn of_two_disks_at_one_instant() {
    let mut recorder = two_disks();
    recorder.step(|dir| fork(dir, &[("data", &["data-1", "data-2"]), ("log", &["log-1"])]));
    recorder.visit("fork: of two disks");
}

/// Frozen segments go with the last disk that stands on them.
#[test]
fn and_deletion_in_any_order() {
    let mut recorder = forked();
    recorder.step(|dir| dir.remove("data").unwrap());
    recorder.step(|dir| fork(dir, &[("one", &["two"])]));
    recorder.step(|dir| dir.remove("one").unwrap());
    recorder.step(|dir| dir.remove("two").unwrap());
    recorder.visit("fork: deletion of parent and child");
    assert_eq!(open(&recorder.store).unwrap().frozen(), 0);
}

/// Sums of frozen segments are made at any time.
#[test]
fn and_sums_of_what_was_frozen() {
    let mut recorder = forked();
    recorder.step(|dir| assert_eq!(dir.sum_frozen(&mut |_, _| Ok(())).unwrap(), 1));
    recorder.step(|dir| assert_eq!(dir.sum_frozen(&mut |_, _| Ok(())).unwrap(), 0));
    recorder.step(|dir| change(dir, "one", 6, SECTORS - BLOCK, BLOCK));
    recorder.visit("fork: sums");
}

/// Story: a daemon was killed while it flipped a frozen segment to its sums. Two copies of the
/// superblock stayed behind for good, since nobody opens a frozen segment for writing, and every
/// check of every disk that stood on it complained.
#[test]
fn frozen_superblocks_are_settled_at_the_next_opening() {
    let mut recorder = forked();
    recorder.step(|dir| assert_eq!(dir.sum_frozen(&mut |_, _| Ok(())).unwrap(), 1));
    recorder.each(&mut |state, image| {
        let dir = open(&SimStore::from_image(image)).unwrap();
        let file = dir.segment_file(dir.disk("one").unwrap().segment, Access::Read).unwrap();
        let report = check(&file, &dir, None, &CheckOptions::default()).unwrap();
        assert!(report.problems.is_empty(), "{state}: {:?}", report.problems);
    });
}

/// Negative control: new segments whose names are not durable before a disk is frozen are lost in a
/// power cut, and the disk cannot go on.
#[test]
fn a_disk_frozen_before_its_successor_has_a_name_is_caught() {
    let mut recorder = two_disks();
    recorder.step(|dir| fork(dir, &[("data", &["one"])]));
    let log = recorder.store.log();
    let first = log.iter().position(|op| matches!(op, Op::SyncNames)).unwrap();
    let spoilt = drop_syncs(&log, |at, _| at == first);
    // The disk is there, and sealed: it does not go on.
    let stopped = wrong_states(&recorder, &spoilt, &|found| match found {
        Ok(world) => world["data"].sealed,
        Err(violation) => violation.wrong == Wrong::Garbage,
    });
    assert!(stopped > 0, "nobody noticed");
}
