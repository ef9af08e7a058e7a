//! Persistence modes (D-m): a mode that is set, a commit, an undo. After any crash a disk has its
//! delta or has it not, in the mode before or after; it never holds a mixture, and it goes on.

use std::sync::Arc;

use blockd::store::Access;
use blockd::store::sim::{Image, Op, SimStore, drop_syncs};
use blockd::storedir::{ForkOf, Keep, StoreDir};
use format::superblock::Mode;
use offshoot_tests::pattern::SECTOR;
use offshoot_tests::sim::{BLOCK, EXTENT};

use super::storedir::{
    Recorder, SECTORS, World, look, new_disk, open, options, write, wrong_states,
};

fn change(dir: &StoreDir, tag: u32, first: u64, count: u64) {
    let disk = dir.open_disk("vm", Access::Write, &dir.disk_options()).unwrap();
    write(&disk, tag, first, count);
    disk.close().unwrap();
}

fn keep(dir: &StoreDir, keep: Keep) {
    dir.keep("vm", keep).unwrap();
}

fn undo(dir: &StoreDir) {
    dir.undo("vm").unwrap();
}

/// A store with a disk of this mode that holds something and has a delta over it.
fn disk_of(mode: Mode) -> Recorder {
    let mut recorder = Recorder::start();
    recorder.step(|dir| _ = dir.create(&new_disk("vm", None)).unwrap());
    recorder.step(|dir| change(dir, 1, 3, 3 * EXTENT));
    recorder.step(|dir| keep(dir, Keep::As(mode)));
    recorder.step(|dir| change(dir, 2, EXTENT, 2 * EXTENT + BLOCK));
    Recorder::over(recorder.store.live_image())
}

#[test]
fn of_a_mode() {
    let mut recorder = Recorder::start();
    recorder.step(|dir| _ = dir.create(&new_disk("vm", None)).unwrap());
    recorder.step(|dir| change(dir, 1, 3, 3 * EXTENT));
    let mut recorder = Recorder::over(recorder.store.live_image());
    recorder.step(|dir| keep(dir, Keep::As(Mode::Undoable)));
    recorder.step(|dir| change(dir, 2, 0, BLOCK));
    recorder.step(|dir| keep(dir, Keep::As(Mode::Append)));
    recorder.step(|dir| keep(dir, Keep::As(Mode::Persistent)));
    recorder.visit("modes: set");
}

#[test]
fn of_a_commit() {
    let mut recorder = disk_of(Mode::Undoable);
    recorder.step(|dir| keep(dir, Keep::Committed));
    recorder.step(|dir| change(dir, 3, 0, 4 * EXTENT));
    recorder.step(undo);
    recorder.visit("modes: commit, and undo to it");
}

#[test]
fn of_an_undo() {
    let mut recorder = disk_of(Mode::NonPersistent);
    recorder.step(undo);
    recorder.step(|dir| change(dir, 3, 2 * EXTENT, BLOCK));
    recorder.step(undo);
    // With nothing to drop.
    recorder.step(undo);
    recorder.visit("modes: undo");
    assert_eq!(open(&recorder.store).unwrap().frozen(), 1, "what was undone takes no space");
}

/// The size is undone with the rest, and a child keeps what it was forked from.
#[test]
fn of_an_undo_after_a_resize_and_a_fork() {
    let mut recorder = disk_of(Mode::Undoable);
    let larger = (SECTORS + 4 * EXTENT) * SECTOR as u64;
    recorder.step(|dir| _ = dir.resize("vm", larger, false).unwrap());
    recorder.step(|dir| {
        let wanted = ForkOf { disk: "vm".into(), children: vec!["child".into()] };
        dir.fork(&[wanted]).unwrap();
    });
    recorder.step(|dir| change(dir, 3, SECTORS, BLOCK));
    recorder.step(undo);
    recorder.step(|dir| dir.remove("child").unwrap());
    recorder.visit("modes: undo after a resize and a fork");
    assert_eq!(open(&recorder.store).unwrap().frozen(), 1);
}

/// The writer of the delta was killed: journal and superblock are as it left them.
#[test]
fn of_an_undo_of_what_a_killed_writer_left() {
    let recorder = disk_of(Mode::NonPersistent);
    let dir = open(&recorder.store).unwrap();
    let disk = dir.open_disk("vm", Access::Write, &dir.disk_options()).unwrap();
    write(&disk, 3, 0, 2 * EXTENT);
    disk.flush().unwrap();
    write(&disk, 4, 5 * EXTENT, 2 * EXTENT);
    drop((disk, dir));
    let mut recorder = Recorder::over(recorder.store.live_image());
    recorder.step(undo);
    recorder.visit("modes: undo after a kill");
}

/// The catalogue is lost in the same crash: the segments alone say whether the delta is there.
#[test]
fn of_an_undo_with_the_catalogue() {
    let mut recorder = disk_of(Mode::NonPersistent);
    let worlds = [world(recorder.store.live_image()), {
        recorder.step(undo);
        world(recorder.store.live_image())
    }];
    assert_ne!(worlds[0], worlds[1]);
    let mut found = [0; 2];
    recorder.each(&mut |state, image| {
        let store = SimStore::without_log(image);
        StoreDir::rebuild_in(Arc::new(store.clone()), &options()).unwrap();
        let there = look(&open(&store).unwrap()).unwrap();
        let which = worlds.iter().position(|world| *world == there);
        found[which.unwrap_or_else(|| panic!("{state}: {there:?}"))] += 1;
    });
    assert!(found.iter().all(|n| *n > 0), "both were met: {found:?}");
}

fn world(image: Image) -> World {
    look(&open(&SimStore::from_image(image)).unwrap()).unwrap()
}

/// Crash states of a log in which the disk is not what it was or should be.
fn other_states(recorder: &Recorder, log: &[Op]) -> usize {
    let worlds = [world(recorder.store.base()), world(recorder.store.live_image())];
    wrong_states(recorder, log, &|found| found.map_or(true, |world| !worlds.contains(&world)))
}

/// Negative control: a delta that goes before the segment that takes its place has a durable name
/// leaves a disk that cannot go on.
#[test]
fn a_delta_dropped_before_its_successor_has_a_name_is_caught() {
    let mut recorder = disk_of(Mode::NonPersistent);
    recorder.step(undo);
    let log = recorder.store.log();
    assert_eq!(other_states(&recorder, &log), 0);

    let first = log.iter().position(|op| matches!(op, Op::SyncNames)).unwrap();
    let spoilt = drop_syncs(&log, |at, _| at == first);

    assert!(other_states(&recorder, &spoilt) > 0, "nobody noticed");
}

/// Negative control: a delta whose file goes before the decision is durable takes the disk with it.
#[test]
fn a_delta_removed_before_the_decision_is_caught() {
    let recorder = disk_of(Mode::NonPersistent);
    let segment = open(&recorder.store).unwrap().disk("vm").unwrap().segment;
    let mut recorder = Recorder::over(recorder.store.live_image());
    recorder.step(undo);
    let mut log = recorder.store.log();
    let removed =
        |op: &Op| matches!(op, Op::Rename { from, .. } if from.contains(&segment.to_string()));
    let at = log.iter().position(removed).expect("it goes");
    let first = log.iter().position(|op| matches!(op, Op::SyncNames)).unwrap();

    let rename = log.remove(at);
    log.insert(first, rename);

    assert!(other_states(&recorder, &log) > 0, "nobody noticed");
}
