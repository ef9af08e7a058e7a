//! A disk changes hands while its clients live: the successor goes on in the opening of its
//! predecessor, and nothing is synced for that. A power cut may take what no flush covered, whoever
//! of the two wrote it, and nothing else.

use blockd::disk::Vouched;
use blockd::store::sim::{Bounds, Op, drop_syncs};
use offshoot_tests::crash::{Plan, Recording, no_panic};
use offshoot_tests::inspect::Wrong;
use offshoot_tests::kill::{Watch, live, memory_dir};
use offshoot_tests::sim::{BLOCK, EXTENT, LEAF, Script};

use super::{SECTORS, plan, prepared};

fn some_data(script: &mut Script) {
    script.write(0, 3 * EXTENT).unwrap();
    script.write(LEAF - BLOCK, 2 * BLOCK).unwrap();
}

/// Changes hands three times with unflushed changes of all kinds.
fn three_hands(s: &mut Script, look: &mut dyn FnMut()) {
    s.open().unwrap();
    for round in 0..3 {
        s.write((5 + round) * EXTENT + 3, 12).unwrap();
        s.prepare_hand_on().unwrap();
        // Guests still run: not durable, in the tail or in the cache only.
        s.write((8 + round) * EXTENT, 2 * BLOCK).unwrap();
        s.write(round * 5, 7).unwrap();
        s.discard(round * EXTENT + 2 * BLOCK, EXTENT / 2).unwrap();
        if round == 1 {
            s.flush().unwrap();
            s.write(LEAF - 1, 2).unwrap();
        }
        look();
        assert!(matches!(s.hand_on().unwrap(), Vouched::Opening(_)), "round {round}");
        look();
        // Into space that was given back and may not be used yet.
        s.write(LEAF + (2 + round) * EXTENT, EXTENT).unwrap();
        s.write((8 + round) * EXTENT + 1, 3).unwrap();
        look();
        if round != 1 {
            s.flush().unwrap();
        }
        s.discard((5 + round) * EXTENT, EXTENT).unwrap();
        look();
    }
    s.checkpoint().unwrap();
    s.write(20 * EXTENT, EXTENT).unwrap();
    s.close().unwrap();
}

#[test]
fn power_cuts_around_a_change_of_hands() {
    let (mut script, dir) = (prepared(some_data), memory_dir());
    script.options = live(dir.path());

    three_hands(&mut script, &mut || ());

    Recording::from(&script).visit(&plan()).expect_none("power_cuts_around_a_change_of_hands");
}

#[test]
fn kills_around_a_change_of_hands() {
    let (mut script, dir) = (prepared(some_data), memory_dir());
    let watch = Watch::over(&mut script, dir.path());

    three_hands(&mut script, &mut || watch.look());

    let model = script.model();
    let moments = no_panic(|| watch.verify(&model, script.segment)).unwrap();
    eprintln!("kills_around_a_change_of_hands: moments of a kill visited: {moments}");
}

/// Negative control: a successor that takes what it found for durable, and does not sync before its
/// first journal page. Where the child's data should be there are zeroes, not what the parent has.
#[test]
fn a_first_flush_without_a_sync_is_caught() {
    let mut parent = Script::empty(SECTORS);
    parent.open().unwrap();
    parent.write(0, 10 * EXTENT).unwrap();
    let (mut script, dir) = (parent.child(), memory_dir());
    script.options = live(dir.path());
    script.open().unwrap();
    script.prepare_hand_on().unwrap();
    script.write(8 * EXTENT, 2 * BLOCK).unwrap();
    script.hand_on().unwrap();
    let handed = script.store.log_len();
    script.flush().unwrap();
    script.write(9 * EXTENT, 1).unwrap();
    let run = Recording::from(&script);
    let plan = Plan { bounds: Bounds::default(), go_on: 0, again: 0 };
    run.visit_from(handed, &plan).expect_none("a_first_flush, with its syncs");

    let first = (handed..run.log.len()).find(|at| matches!(run.log[*at], Op::Sync { .. })).unwrap();
    let spoilt = drop_syncs(&run.log, |at, _| at == first);
    let report = run.with_log(spoilt, |at| at).visit_from(handed, &plan);

    let counts = &report.counts;
    assert!(counts.contains_key(&Wrong::Value), "nobody noticed; found only {counts:?}");
}

/// Nothing is written, so a successor that ends before it serves leaves no trace.
#[test]
fn going_on_writes_nothing() {
    let (mut script, dir) = (prepared(some_data), memory_dir());
    script.options = live(dir.path());
    script.open().unwrap();
    script.prepare_hand_on().unwrap();
    script.write(8 * EXTENT, 2 * BLOCK).unwrap();
    let before = script.store.log_len();

    script.hand_on().unwrap();

    let log = script.store.log();
    let changes = |op: &&Op| matches!(op, Op::Write { .. } | Op::Sync { .. });
    assert_eq!(log[before..].iter().filter(changes).count(), 0, "{:?}", &log[before..]);
}

/// What a checkpoint replaced stays until all copies of the superblock know its successor.
#[test]
fn an_opening_is_not_vouched_for_after_another_checkpoint() {
    let (mut script, dir) = (prepared(some_data), memory_dir());
    script.options = live(dir.path());
    script.open().unwrap();
    script.write(8 * EXTENT, 2 * BLOCK).unwrap();
    script.prepare_hand_on().unwrap();
    script.write(9 * EXTENT, 2 * BLOCK).unwrap();
    script.checkpoint().unwrap();

    assert_eq!(script.hand_on().unwrap(), Vouched::Cache);

    script.prepare_hand_on().unwrap();
    assert!(matches!(script.hand_on().unwrap(), Vouched::Opening(_)));
    script.close().unwrap();
}

/// Somebody else had the disk in between: the opening that was vouched for is over.
#[test]
fn an_opening_that_is_over_is_not_gone_on_with() {
    let (mut script, dir) = (prepared(some_data), memory_dir());
    script.options = live(dir.path());
    script.open().unwrap();
    script.prepare_hand_on().unwrap();
    let Vouched::Opening(epoch) = script.hand_on().unwrap() else { panic!("not vouched for") };
    script.kill();
    script.open().unwrap();
    let now = script.disk().facts().unwrap().superblock.epoch;
    assert_eq!(now, epoch.next());
    script.kill();

    script.options.vouched = Vouched::Opening(epoch);
    script.open().unwrap();

    assert_eq!(script.disk().facts().unwrap().superblock.epoch, now.next());
    script.close().unwrap();
}
