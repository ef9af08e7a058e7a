//! Journals that are damaged or know more than the map, and the tails of killed processes.

use std::collections::BTreeSet;

use blockd::check::{self, Action, CheckOptions, RepairOptions};
use blockd::disk::problem::{GuestRange, What};
use blockd::disk::tail::Tail;
use blockd::disk::{Disk, Options};
use blockd::store::{Access, Store};
use format::Kind;
use format::limits::LEAF_SPAN;
use offshoot_tests::pattern::SECTOR;
use offshoot_tests::sim::{ByName, LEAF};
use uuid::Uuid;

use super::support::{BUSY_SECTORS, Sample, closed, discard, killed, put};
use super::{DROP, blocks_of_leaf, journal_pages, kinds};

#[test]
fn what_the_journal_tells_of_a_damaged_leaf_is_not_lost() {
    let mut sample = killed();
    let at = sample.leaf_at(1).page.file_offset();
    sample.flip(at, 0);
    let report = sample.check().unwrap();
    assert_eq!(kinds(&report.problems), BTreeSet::from([What::MapPage, What::JournalWaits]));
    assert_eq!(sample.open().err().expect("it stays closed").kind(), Kind::Corrupt);
    let plain = sample.repair(RepairOptions::default()).unwrap();
    assert!(plain.actions.is_empty() && plain.refused.len() == 1, "{:?}", plain.refused);

    let report = sample.repair(DROP).unwrap();

    assert!(report.after.unwrap().clean);
    // Written, and discarded, after the checkpoint that the leaf is from.
    let known = [(LEAF + 50 * 128, 24), (LEAF + 6 * 128, 128)];
    let in_journal = |sector: u64| known.iter().any(|(f, n)| (*f..f + n).contains(&sector));
    for loss in &report.lost {
        let first = loss.range.offset / SECTOR as u64;
        let end = first + loss.range.len / SECTOR as u64;
        assert!(!known.iter().any(|(f, n)| *f < end && first < f + n), "{loss:?}");
    }
    sample.contents.retain(|s, _| !(LEAF..2 * LEAF).contains(s) || in_journal(*s));
    assert!(sample.lost_blocks().is_empty());
}

/// Story: replay gave a record up at the first leaf that took no change. Behind a flushed discard
/// of the whole disk, damage to the first leaf made all of it unreadable, what was written since
/// included.
#[test]
fn a_record_about_the_whole_disk_costs_the_damaged_leaf_alone() {
    for vectors_only in [false, true] {
        let mut sample = closed();
        sample.killed_session(|disk, contents| {
            discard(disk, contents, (0, BUSY_SECTORS));
            put(disk, contents, 70, (LEAF - 64, 128));
            put(disk, contents, 71, (2 * LEAF + 20 * 128, 24));
            disk.flush().unwrap();
        });
        let at = sample.leaf_at(0);
        let run = at.vectors.expect("extent 10 is mixed").page;
        let page = if vectors_only { run } else { at.page };
        sample.flip(page.file_offset() + 5, 3);

        let report = sample.check().unwrap();

        assert_eq!(kinds(&report.problems), BTreeSet::from([What::MapPage, What::JournalWaits]));
        let mut waits = report.problems.iter().filter(|p| p.what == What::JournalWaits);
        let leaf = GuestRange { offset: 0, len: LEAF_SPAN };
        assert_eq!(waits.next().map(|p| p.range), Some(Some(leaf)));
        assert_eq!(waits.next(), None, "both records wait for one leaf");
        assert_eq!(report.stats.damaged_bytes, LEAF_SPAN);
        assert!(sample.lost_blocks().iter().all(|b| blocks_of_leaf(0).contains(b)));
        assert_eq!(sample.open().err().expect("it stays closed").kind(), Kind::Corrupt);
        let repaired = sample.repair(DROP).unwrap();
        assert!(repaired.lost.is_empty(), "the journal knows it all: {:?}", repaired.lost);
        assert!(repaired.after.unwrap().clean);
        assert!(sample.lost_blocks().is_empty());
    }
}

#[test]
fn a_journal_damaged_in_the_middle_is_noticed_and_accepted_on_request_only() {
    let whole = killed();
    let pages = journal_pages(&whole);
    // One page for the commit of the checkpoint, and one for each of three flushes.
    assert_eq!(pages.len(), 4);
    for (i, page) in pages.iter().enumerate().take(3) {
        let mut sample = whole.clone();
        sample.flip(page + 900, 2);
        let report = sample.check().unwrap();
        assert_eq!(kinds(&report.problems), BTreeSet::from([What::JournalLoss]));
        assert!(report.repairable);
        for opened in [sample.open(), sample.open_read_only()] {
            let error = opened.err().expect("it stays closed");
            assert_eq!(error.kind(), Kind::Corrupt);
            assert!(error.to_string().contains("records from number"), "{error}");
        }
        let refused = sample.repair(RepairOptions { leaks: true, ..DROP }).unwrap();
        assert!(refused.actions.is_empty() && refused.lost.is_empty());
        assert_eq!(refused.refused.len(), 2, "{:?}", refused.refused);

        let accept = RepairOptions { accept_journal_loss: true, ..RepairOptions::default() };
        let report = sample.repair(accept).unwrap();

        let first_missing = sample.superblock().journal.seq.0;
        let action = Action::AcceptJournalLoss { first_missing, tail_records: 0 };
        assert_eq!(report.actions, [action]);
        assert!(report.after.unwrap().clean);
        let (_store, disk) = sample.open().unwrap();
        let back = sample.read_back(&disk);
        assert!(back.lost.is_empty() && !back.wrong.is_empty());
        // Commits before the damaged one are there.
        let first_flush = LEAF + 50 * 128;
        let lost = back.wrong.iter().any(|w| w.starts_with(&format!("sector {first_flush}:")));
        assert_eq!(lost, i < 2, "{:?}", back.wrong);
    }
}

/// A disk with a live client whose process was killed, and the tail that it left.
fn killed_with_a_tail(flush: bool) -> (Sample, Tail, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        tail_dir: Some(dir.path().to_owned()),
        live: true,
        boot: Uuid::from_u128(5),
        ..Options::default()
    };
    let mut sample = closed();
    let store = sample.store();
    let file = store.open(&sample.name(), Access::Write).unwrap();
    let disk = Disk::open(file, &ByName(&store), &options).unwrap();
    put(&disk, &mut sample.contents, 70, (300 * 128, 40));
    disk.flush().unwrap();
    put(&disk, &mut sample.contents, 71, (310 * 128, 40));
    discard(&disk, &mut sample.contents, (0, 128));
    if flush {
        disk.flush().unwrap();
    }
    drop(disk);
    sample.image = store.live_image();
    let tail = Tail::open(dir.path(), sample.segment).unwrap().expect("a tail");
    (sample, tail, dir)
}

#[test]
fn a_repair_takes_what_a_tail_holds_into_the_map() {
    let (mut sample, tail, _dir) = killed_with_a_tail(false);
    let store = sample.store();
    let file = store.open(&sample.name(), Access::Write).unwrap();
    let report =
        check::check(&file, &ByName(&store), Some(&tail), &CheckOptions::default()).unwrap();
    assert!(report.clean, "{:?}", report.problems);
    assert_eq!((report.stats.attached, report.stats.tail_records), ("with-tail", 2));

    let options = RepairOptions { leaks: true, ..RepairOptions::default() };
    let report = check::repair(&file, &ByName(&store), Some(&tail), &options).unwrap();

    assert!(matches!(report.actions[..], [Action::Checkpoint { .. }, Action::PunchLeaks { .. }]));
    let after = report.after.unwrap();
    assert_eq!((after.stats.attached, after.stats.leaked_bytes), ("no", Some(0)));
    sample.image = store.live_image();
    assert!(sample.lost_blocks().is_empty(), "every completed write is there");
}

#[test]
fn a_tail_notices_that_the_last_commit_is_damaged() {
    let (mut sample, tail, _dir) = killed_with_a_tail(true);
    let last = *journal_pages(&sample).last().expect("a page");
    sample.flip(last + 100, 0);
    let store = sample.store();
    let file = store.open(&sample.name(), Access::Write).unwrap();

    let report =
        check::check(&file, &ByName(&store), Some(&tail), &CheckOptions::default()).unwrap();
    assert_eq!(kinds(&report.problems), BTreeSet::from([What::JournalLoss]));
    let accept = RepairOptions { accept_journal_loss: true, ..RepairOptions::default() };
    let report = check::repair(&file, &ByName(&store), Some(&tail), &accept).unwrap();

    assert!(matches!(report.actions[..], [Action::AcceptJournalLoss { .. }]));
    assert!(report.after.unwrap().clean);
    sample.image = store.live_image();
    sample.forget(310 * 128, 40);
    assert!(sample.lost_blocks().is_empty(), "the commit before is there");
}

#[test]
fn a_tail_that_is_gone_stays_missed() {
    let (mut sample, _tail, _dir) = killed_with_a_tail(false);
    let at = sample.leaf_at(1).page.file_offset();
    sample.flip(at, 0);

    let report = sample.repair(DROP).unwrap();

    assert_eq!(report.after.unwrap().stats.attached, "with-tail");
    let store = sample.store();
    let file = store.open(&sample.name(), Access::Write).unwrap();
    let options = Options { boot: Uuid::from_u128(5), ..Options::default() };
    let opened = Disk::open(file, &ByName(&store), &options);
    assert_eq!(opened.err().expect("it is refused").kind(), Kind::TailLost);
}
