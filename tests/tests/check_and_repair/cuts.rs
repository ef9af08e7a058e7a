//! Repairs that are cut short.

use std::collections::BTreeSet;

use blockd::check::RepairOptions;
use blockd::store::sim::{Bounds, SimStore, all_crash_states};
use format::Kind;
use format::limits::SUPERBLOCK_OFFSETS;
use offshoot_tests::sim::LEAF;

use super::support::{Sample, killed, repair_in};
use super::{DROP, half_flipped, journal_pages, leaking, two_states};

/// Every power cut during a repair leaves a disk that holds what it held before or what it holds
/// after, and that the same repair brings to the end.
fn every_crash_point_of(mut sample: Sample, options: RepairOptions, after: &Sample) {
    let store = sample.store();
    repair_in(&store, sample.segment, options).unwrap();
    sample.image = store.live_image();
    assert!(sample.check().unwrap().clean);
    let (base, log) = (store.base(), store.log());
    let mut seen = BTreeSet::new();
    let bounds = Bounds { exhaustive: 5, random: 4, family: 24, ..Bounds::default() };
    let stats = all_crash_states(&base, &log, &bounds, &mut |state, image| {
        if !seen.insert(image.fingerprint()) {
            return;
        }
        let mut cut = Sample { image, ..after.clone() };
        cut.repair(options).unwrap_or_else(|e| panic!("{e}: {state}"));
        let report = cut.check().unwrap_or_else(|e| panic!("{e}: {state}"));
        assert!(report.clean, "{:?}: {state}", report.problems);
        assert!(cut.lost_blocks().is_empty(), "{state}");
    });
    println!("{} states, {} distinct images", stats.states, seen.len());
    assert!(seen.len() > 10);
}

#[test]
fn every_crash_point_of_a_repair_that_drops_damage_can_be_repeated() {
    let mut sample = killed();
    let at = sample.leaf_at(1).page.file_offset();
    sample.flip(at, 0);
    let mut after = sample.clone();
    let known = [(LEAF + 50 * 128, 24), (LEAF + 6 * 128, 128)];
    let in_journal = |sector: u64| known.iter().any(|(f, n)| (*f..f + n).contains(&sector));
    after.contents.retain(|s, _| !(LEAF..2 * LEAF).contains(s) || in_journal(*s));
    every_crash_point_of(sample, RepairOptions { leaks: true, ..DROP }, &after);
}

/// The root of the newest state is damaged, so that a repair goes back to the state before.
fn every_crash_point_of_going_back(mut sample: Sample) {
    let root = sample.tree().pages().next().expect("a root").page.file_offset();
    sample.flip(root + 1, 1);
    let options = RepairOptions { older_generation: true, ..RepairOptions::default() };
    let after = sample.clone();
    every_crash_point_of(sample, options, &after);
}

#[test]
fn every_crash_point_of_a_repair_that_goes_back_can_be_repeated() {
    every_crash_point_of_going_back(half_flipped());
}

/// Story: the only copy of the newest state was overwritten first. A cut left the older one alone,
/// which was closed in order and knows nothing of the journal pages written since.
#[test]
fn a_repair_that_goes_back_keeps_the_only_copy_of_each_state_to_the_last() {
    let (mut sample, _) = two_states((2 * LEAF, 64));
    sample.flip(SUPERBLOCK_OFFSETS[1] + 9, 1);
    sample.flip(SUPERBLOCK_OFFSETS[2] + 9, 1);
    assert!(sample.lost_blocks().is_empty());
    every_crash_point_of_going_back(sample);
}

#[test]
fn every_crash_point_of_a_repair_that_accepts_loss_can_be_repeated() {
    let mut sample = killed();
    let page = journal_pages(&sample)[2];
    sample.flip(page + 900, 2);
    let options =
        RepairOptions { accept_journal_loss: true, leaks: true, ..RepairOptions::default() };
    let mut after = sample.clone();
    // The last two flushes are lost, the first one after the checkpoint is not. What was discarded
    // is mapped again, but its space was given back already.
    after.forget(20 * 128, 256);
    after.forget(2 * LEAF + 20 * 128, 24);
    every_crash_point_of(sample, options, &after);
}

#[test]
fn every_crash_point_of_a_repair_of_space_can_be_repeated() {
    let mut sample = leaking(6);
    let mut older = sample.superblock();
    older.generation = format::units::Generation(older.generation.0 - 1);
    sample.flip(SUPERBLOCK_OFFSETS[1] + 20, 0);
    sample.overwrite(SUPERBLOCK_OFFSETS[2], &older.encode(2));
    let after = sample.clone();
    every_crash_point_of(sample, RepairOptions { leaks: true, ..Default::default() }, &after);
}

#[test]
fn a_repair_that_meets_a_failing_host_loses_nothing() {
    use blockd::store::sim::{Fault, Faults, When};
    let mut damaged = killed();
    let at = damaged.leaf_at(1).page.file_offset();
    damaged.flip(at, 0);
    let before = damaged.lost_blocks();
    let options = RepairOptions { leaks: true, ..DROP };
    for fault in [Fault::WriteNoSpace, Fault::WriteIo, Fault::SyncIo, Fault::SetLenNoSpace] {
        for n in 0..3 {
            let store = SimStore::from_image(damaged.image.clone());
            store.set_faults(Faults::none().add(When::Nth(n), fault));
            let failed = repair_in(&store, damaged.segment, options);
            if store.hits().is_empty() {
                continue;
            }
            assert!(matches!(failed.unwrap_err().kind(), Kind::Io | Kind::NoSpace));
            store.set_faults(Faults::none());
            let mut left = Sample { image: store.live_image(), ..damaged.clone() };
            if left.check().unwrap().clean {
                continue;
            }
            assert_eq!(left.lost_blocks(), before, "{fault:?} {n}");
            assert!(left.repair(options).unwrap().after.unwrap().clean);
        }
    }
}
