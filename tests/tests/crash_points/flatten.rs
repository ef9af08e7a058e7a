//! Flattening disks that nobody has open: after any crash the content is what it was, segments go
//! only when nobody needs them, and what was begun can be ended.

use blockd::catalogue::Flattening;
use blockd::pump::Unwatched;
use blockd::store::Access;
use blockd::store::sim::{Op, SimStore, drop_syncs};
use blockd::storedir::{StoreDir, TO_BASE, TO_NOTHING};
use offshoot_tests::pattern::SECTOR;
use offshoot_tests::sim::{BLOCK, EXTENT};

use super::fork::{change, fork};
use super::storedir::{Recorder, SECTORS, new_disk, open, wrong_states};

fn flatten(dir: &StoreDir, name: &str, to: &str) -> u64 {
    let how = Flattening { to: to.into(), rate: None };
    dir.flatten(name, &how, &Unwatched).unwrap()
}

fn discard(dir: &StoreDir, name: &str, first: u64, count: u64) {
    let disk = dir.open_disk(name, Access::Write, &dir.disk_options()).unwrap();
    disk.discard(0, first * SECTOR as u64, count * SECTOR as u64).unwrap();
    disk.close().unwrap();
}

/// A disk over two frozen segments and a child over the first, with extents whose blocks lie in all
/// three, and with zeroes over data.
fn chain() -> Recorder {
    let mut recorder = Recorder::start();
    recorder.step(|dir| _ = dir.create(&new_disk("data", None)).unwrap());
    recorder.step(|dir| change(dir, "data", 1, 3, 4 * EXTENT));
    recorder.step(|dir| fork(dir, &[("data", &["one"])]));
    recorder.step(|dir| change(dir, "data", 2, EXTENT + BLOCK, EXTENT));
    recorder.step(|dir| change(dir, "data", 3, SECTORS - EXTENT, BLOCK));
    recorder.step(|dir| discard(dir, "data", 2 * EXTENT - 2 * BLOCK, 2 * BLOCK));
    recorder.step(|dir| fork(dir, &[("data", &["two"])]));
    recorder.step(|dir| change(dir, "data", 4, EXTENT + 3 * BLOCK, BLOCK));
    Recorder::over(recorder.store.live_image())
}

fn depth(dir: &StoreDir, name: &str) -> usize {
    dir.disk(name).unwrap().parents.len()
}

#[test]
fn to_the_base() {
    let mut recorder = chain();
    recorder.step(|dir| {
        // What the second segment has, less a block written and two discarded since.
        let copied = flatten(dir, "data", TO_BASE) / (BLOCK * SECTOR as u64);
        assert_eq!(copied, EXTENT / BLOCK + 1 - 3);
        assert_eq!(depth(dir, "data"), 1);
    });
    recorder.step(|dir| assert_eq!(flatten(dir, "data", TO_BASE), 0));
    recorder.step(|dir| change(dir, "data", 5, 8 * EXTENT, 2 * EXTENT));
    recorder.visit("flatten: to the base");
}

#[test]
fn to_nothing() {
    let mut recorder = chain();
    recorder.step(|dir| _ = flatten(dir, "data", TO_NOTHING));
    recorder.step(|dir| assert_eq!(depth(dir, "data"), 0));
    recorder.visit("flatten: to nothing");
}

/// The frozen segments go one by one, with the last disk that stands on them.
#[test]
fn and_what_nobody_needs_goes() {
    let mut recorder = chain();
    recorder.step(|dir| dir.remove("one").unwrap());
    recorder.step(|dir| _ = flatten(dir, "data", TO_BASE));
    recorder.step(|dir| assert_eq!((dir.frozen(), depth(dir, "two")), (2, 2)));
    recorder.step(|dir| _ = flatten(dir, "two", TO_BASE));
    recorder.step(|dir| assert_eq!(dir.frozen(), 1));
    recorder.step(|dir| _ = flatten(dir, "two", TO_NOTHING));
    recorder.step(|dir| _ = flatten(dir, "data", TO_NOTHING));
    recorder.step(|dir| assert_eq!(dir.frozen(), 0));
    recorder.visit("flatten: of all disks");
}

/// Rows of the segment table are used again; what stands on a flattened disk finds its data.
#[test]
fn and_forks_of_what_was_flattened() {
    let mut recorder = chain();
    for (tag, child) in [(5, "three"), (6, "four")] {
        recorder.step(|dir| _ = flatten(dir, "data", TO_BASE));
        recorder.step(|dir| fork(dir, &[("data", &[child])]));
        recorder.step(|dir| change(dir, "data", tag, 2 * EXTENT, BLOCK));
    }
    recorder.step(|dir| assert_eq!(depth(dir, "data"), 2));
    recorder.step(|dir| _ = flatten(dir, "four", TO_NOTHING));
    recorder.visit("flatten: and forks");
}

/// After a crash in the middle, flattening again ends what was begun.
#[test]
fn goes_on_after_a_crash() {
    let mut recorder = chain();
    recorder.step(|dir| _ = flatten(dir, "data", TO_BASE));
    let mut unfinished = 0;
    recorder.each(&mut |state, image| {
        let dir = open(&SimStore::from_image(image)).unwrap();
        unfinished += usize::from(dir.disk("data").unwrap().flattening.is_some());
        flatten(&dir, "data", TO_BASE);
        let row = dir.disk("data").unwrap();
        assert_eq!((row.parents.len(), row.flattening), (1, None), "{state}");
    });
    assert!(unfinished > 0, "no crash came in the middle");
}

/// Negative control: a segment that goes before the flip that lets go of it is durable takes data
/// of the disk with it.
#[test]
fn a_segment_removed_before_it_is_let_go_is_caught() {
    let mut recorder = chain();
    recorder.step(|dir| dir.remove("two").unwrap());
    let mut recorder = Recorder::over(recorder.store.live_image());
    recorder.step(|dir| _ = flatten(dir, "data", TO_BASE));
    let log = recorder.store.log();
    let is_removal = |op: &Op| matches!(op, Op::Rename { to, .. } if to.ends_with(".del"));
    let removal = log.iter().position(is_removal).expect("the second frozen segment goes");
    let own = log.iter().find_map(|op| match op {
        Op::Write { file, offset: 0, data } if data.starts_with(b"OFFSHOOT") => Some(*file),
        _ => None,
    });
    let own = own.expect("the disk's superblock is written");
    let of_own = |op: &Op| matches!(op, Op::Sync { file } if *file == own);
    // The last two: those of the flip that lets go, and of the copies behind it.
    let syncs = log[..removal].iter().enumerate().filter(|(_, op)| of_own(op));
    let first = syncs.map(|(at, _)| at).rev().nth(1).expect("two syncs");
    let spoilt = drop_syncs(&log, |at, op| (first..removal).contains(&at) && of_own(op));
    let lost = wrong_states(&recorder, &spoilt, &|found| found.is_err());
    assert!(lost > 0, "nobody noticed");
}
