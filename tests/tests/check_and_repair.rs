//! A check finds what is wrong and nothing else; a repair mends what can be mended, says what it
//! cost to the byte, and can be cut short at any point.

#[allow(dead_code)] // Each test file uses a part of it.
mod support;

use std::collections::BTreeSet;

use blockd::check::{self, Action, CheckOptions, RepairOptions, Why};
use blockd::disk::plan::Plan;
use blockd::disk::problem::{GuestRange, Problem, What};
use blockd::disk::tail::Tail;
use blockd::disk::{Disk, Options};
use blockd::segment::file_name;
use blockd::store::sim::{Bounds, SimStore, all_crash_states};
use blockd::store::{Access, Store};
use format::Kind;
use format::entry::{BlockState, Entry};
use format::limits::{BLOCK, EXTENT, LEAF_SPAN, PAGE, SUPERBLOCK_OFFSETS};
use format::units::{BlockId, ExtentId};
use offshoot_tests::pattern::{SECTOR, bytes};
use offshoot_tests::sim::{ByName, LEAF, Script};
use uuid::Uuid;

use support::{BUSY_SECTORS, Sample, busy, closed, discard, killed, put, repair_in};

const DROP: RepairOptions = RepairOptions {
    leaks: false,
    older_generation: false,
    drop_damaged: true,
    accept_journal_loss: false,
    unshare: false,
    dry_run: false,
};

/// What is wrong, leaks left out: every writer leaves some.
fn kinds(problems: &[Problem]) -> BTreeSet<What> {
    problems.iter().map(|p| p.what).filter(|what| *what != What::Leak).collect()
}

fn blocks_of_leaf(leaf: u64) -> std::ops::Range<u64> {
    let per_leaf = LEAF_SPAN / BLOCK;
    leaf * per_leaf..(leaf + 1) * per_leaf
}

#[test]
fn healthy_disks_are_clean_and_their_numbers_add_up() {
    let sealed = {
        let mut script = busy(Script::empty(BUSY_SECTORS));
        script.open().unwrap();
        script.seal().unwrap();
        Sample::of(&script)
    };
    let child = {
        let mut script = busy(Script::empty(BUSY_SECTORS));
        script.open().unwrap();
        let mut child = script.child();
        child.open().unwrap();
        child.write(30 * 128, 64).unwrap();
        child.close().unwrap();
        Sample::of(&child)
    };
    for sample in [killed(), closed(), sealed, child] {
        let report = sample.check_with(CheckOptions { data: true }).unwrap();

        assert!(report.clean && report.repairable, "{:?}", report.problems);
        let s = &report.stats;
        let all = s.mapped_bytes + s.zero_bytes + s.hole_bytes + s.damaged_bytes;
        assert_eq!(all, s.virtual_size);
        assert_eq!(s.virtual_size, sample.sectors * SECTOR as u64);
        assert_eq!(s.damaged_bytes, 0);
        assert!(s.own_data_bytes <= s.mapped_bytes && s.allocated_bytes <= s.file_bytes);
        assert!(s.leaked_bytes.is_some());
        let sealed_bytes = s.mapped_bytes - s.unsummed_bytes.unwrap();
        match (s.state, s.depth) {
            ("active", 0) => assert_eq!(sealed_bytes, 0),
            ("active", _) => assert_eq!(s.unsummed_bytes, Some(s.own_data_bytes)),
            _ => assert_eq!(s.unsummed_bytes, Some(0)),
        }
    }
}

#[test]
fn the_report_is_json_with_stable_names() {
    let mut sample = closed();
    let at = sample.leaf_at(0);
    sample.flip(at.page.file_offset() + 5, 1);

    let json = serde_json::to_value(sample.check().unwrap()).unwrap();

    assert_eq!(json["clean"], false);
    assert_eq!(json["repairable"], true);
    assert_eq!(json["stats"]["leaked_bytes"], serde_json::Value::Null);
    let problem = &json["problems"][0];
    assert_eq!(problem["what"], "map-page");
    assert_eq!(problem["severity"], "range");
    assert_eq!(problem["remedy"], "repair-drop-damaged");
    assert_eq!(problem["range"]["offset"], 0);
    assert_eq!(problem["range"]["len"], LEAF_SPAN);
}

#[test]
fn a_damaged_leaf_costs_its_range_and_comes_back_whole() {
    let mut sample = closed();
    let at = sample.leaf_at(1);
    let lost: BTreeSet<u64> = {
        let whole = sample.clone();
        sample.flip(at.page.file_offset() + 77, 3);
        assert!(whole.lost_blocks().is_empty());
        sample.lost_blocks()
    };
    assert!(!lost.is_empty() && lost.iter().all(|b| blocks_of_leaf(1).contains(b)));
    let report = sample.check().unwrap();
    assert_eq!(kinds(&report.problems), BTreeSet::from([What::MapPage]));

    // The rest is readable and writable, and checkpoints keep the damaged page where it is.
    sample.killed_session(|disk, contents| {
        let start = LEAF * SECTOR as u64;
        assert_eq!(disk.write(0, start + 4096, &[1; 512]).unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(disk.discard(0, start, 65536).unwrap_err().kind(), Kind::Corrupt);
        for i in 0..300 {
            put(disk, contents, 1000 + i, ((100 + u64::from(i)) * 128, 128));
            if i % 50 == 0 {
                disk.checkpoint().unwrap();
            }
        }
        discard(disk, contents, (100 * 128, 128 * 128));
        put(disk, contents, 2000, (2 * LEAF + 30 * 128, 8));
        disk.flush().unwrap();
    });
    sample.session(|_, _| ());
    assert_eq!(sample.lost_blocks(), lost);
    assert_eq!(sample.leaf_at(1), at, "the reference stays");

    // Nothing that the leaf names was used for anything else: once the page reads well again, so
    // does all that lies under it.
    sample.flip(at.page.file_offset() + 77, 3);
    assert!(sample.lost_blocks().is_empty());
    assert!(sample.check().unwrap().clean);
}

#[test]
fn a_damaged_inner_page_costs_what_lies_under_it() {
    let mut sample = closed();
    let pages: Vec<_> = sample.tree().pages().collect();
    for at in pages {
        sample.flip(at.page.file_offset() + 9, 0);
        let report = sample.check().unwrap();
        assert_eq!(kinds(&report.problems), BTreeSet::from([What::MapPage]));
        assert_eq!(report.stats.damaged_bytes, report.stats.virtual_size);
        let lost = sample.lost_blocks();
        assert!(lost.contains(&0) && lost.contains(&blocks_of_leaf(2).start));
        let (_store, disk) = sample.open().unwrap();
        assert_eq!(disk.write(0, 0, &[1; 512]).unwrap_err().kind(), Kind::Corrupt);

        sample.flip(at.page.file_offset() + 9, 0);
        assert!(sample.check().unwrap().clean);
    }
}

#[test]
fn damaged_vectors_cost_the_mixed_extents() {
    let mut sample = {
        let mut script = busy(Script::empty(BUSY_SECTORS));
        script.open().unwrap();
        script.seal().unwrap();
        Sample::of(&script)
    };
    let run = sample.leaf_at(0).vectors.expect("leaf 0 has mixed extents");
    sample.flip(run.page.file_offset() + 200, 5);

    let lost = sample.lost_blocks();

    let extents: BTreeSet<u64> = lost.iter().map(|b| b / 16).collect();
    assert_eq!(extents, BTreeSet::from([5, 10, 12]));
}

/// Story: writes to sound extents of a leaf without vectors were accepted and journaled, and the
/// next checkpoint, which cannot write such a leaf, moved the journal's head past them: flushed and
/// gone. Later the whole leaf was given up, sound extents included.
#[test]
fn a_leaf_without_its_vectors_serves_its_sound_extents_and_takes_no_change() {
    let mut sample = closed();
    let at = sample.leaf_at(0);
    let run = at.vectors.expect("leaf 0 has mixed extents");
    sample.flip(run.page.file_offset() + 200, 5);
    let byte = |extent: u64| extent * EXTENT;
    sample.session(|disk, contents| {
        // In place, in an extent of its own: no map changes.
        put(disk, contents, 77, (128, 8));
        let refused = [
            ("first write", disk.write(0, byte(300), &bytes(78, 300 * 128, 8))),
            ("a plan", disk.plan_write(0, byte(300), BLOCK, &mut Plan::default()).map(|_| ())),
            ("part of a block", disk.write(0, byte(300) + 512, &bytes(78, 300 * 128 + 1, 1))),
            ("write to a damaged extent", disk.write(0, byte(10), &bytes(78, 10 * 128, 8))),
            ("write over both", disk.write(0, byte(9), &bytes(78, 9 * 128, 256))),
            ("discard of a sound extent", disk.discard(0, byte(1), EXTENT)),
            ("discard of a damaged extent", disk.discard(0, byte(10), EXTENT)),
            ("discard of the leaf", disk.discard(0, 0, LEAF_SPAN)),
            ("discard of two leaves", disk.discard(0, LEAF_SPAN - EXTENT, 2 * EXTENT)),
            ("zeroes", disk.write_zeroes(0, byte(1), EXTENT, true)),
            ("a smaller disk", disk.resize(LEAF_SPAN / 2, true)),
        ];
        for (what, outcome) in refused {
            assert_eq!(outcome.expect_err(what).kind(), Kind::Corrupt, "{what}");
        }
        put(disk, contents, 79, (LEAF + 30 * 128, 256));
        disk.flush().unwrap();
        disk.checkpoint().unwrap();
    });
    assert_eq!(sample.leaf_at(0), at, "the reference stays");
    let mixed = BTreeSet::from([5, 10, 12]);
    let lost = |sample: &Sample| -> BTreeSet<u64> {
        sample.lost_blocks().iter().map(|block| block / 16).collect()
    };
    assert_eq!(lost(&sample), mixed);

    sample.flip(run.page.file_offset() + 200, 5);

    assert_eq!(lost(&sample), BTreeSet::new());
    assert!(sample.check().unwrap().clean);
}

/// Story: the flip to sealed came before anything looked at the whole map. The disk was left sealed
/// for ever, with sums that nobody could make.
#[test]
fn a_disk_with_a_damaged_map_is_not_sealed() {
    for vectors in [false, true] {
        let mut sample = closed();
        let at = sample.leaf_at(0);
        let run = at.vectors.expect("leaf 0 has mixed extents");
        sample.flip(if vectors { run.page } else { at.page }.file_offset() + 200, 5);
        let (store, disk) = sample.open().unwrap();
        put(&disk, &mut sample.contents, 80, (LEAF + 30 * 128, 8));

        let error = disk.seal(&mut |_, _| Ok(())).unwrap_err();

        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        sample.image = store.live_image();
        let report = sample.check().unwrap();
        assert_eq!((report.stats.state, report.stats.attached), ("active", "no"));
        let (_store, disk) = sample.open_read_only().unwrap();
        assert_eq!(sample.read_back(&disk).wrong, [""; 0]);
    }
}

#[test]
fn dropping_damage_lists_what_is_lost_and_makes_it_writable() {
    let whole = closed();
    let leaf = whole.leaf_at(1).page.file_offset();
    let vectors = whole.leaf_at(0).vectors.expect("leaf 0 has mixed extents");
    let inner = whole.tree().pages().last().expect("an inner page").page.file_offset();
    let run = vectors.page.file_offset();
    let all = vec![(0, BUSY_SECTORS * SECTOR as u64)];
    let mixed = vec![(5 * EXTENT, EXTENT), (10 * EXTENT, EXTENT), (12 * EXTENT, EXTENT)];
    for (at, want) in [(leaf, vec![(LEAF_SPAN, LEAF_SPAN)]), (run, mixed), (inner, all)] {
        let mut sample = whole.clone();
        sample.flip(at, 0);
        let kept = sample.lost_blocks();

        let dry = sample.repair(RepairOptions { dry_run: true, ..DROP }).unwrap();
        assert_eq!(sample.lost_blocks(), kept, "a dry run changes nothing");
        let report = sample.repair(DROP).unwrap();

        assert_eq!(dry.actions, report.actions);
        assert_eq!(dry.lost, report.lost);
        let lost: Vec<_> = report.lost.iter().map(|l| (l.range.offset, l.range.len)).collect();
        assert_eq!(lost, want);
        assert!(report.lost.iter().all(|l| l.why == Why::Damaged));
        assert!(report.after.unwrap().clean);
        let lost = |sector: u64| {
            let byte = sector * SECTOR as u64;
            want.iter().any(|(offset, len)| (*offset..offset + len).contains(&byte))
        };
        sample.contents.retain(|sector, _| !lost(*sector));
        assert!(sample.lost_blocks().is_empty());
        sample.session(|disk, _| disk.write(0, want[0].0, &[0; 4096]).unwrap());
        assert!(sample.check().unwrap().clean);
    }
}

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

/// Pages of the ring that hold something, in file offsets.
fn journal_pages(sample: &Sample) -> Vec<u64> {
    let sb = sample.superblock();
    (0..sb.journal_pages())
        .map(|p| sb.journal_offset((sb.journal.position + p) % sb.journal_pages()))
        .take_while(|offset| sample.read(*offset, 4) == b"OJNL")
        .collect()
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

/// Data that was written and never flushed: after a power cut nothing names it.
fn leaking(extents: u64) -> Sample {
    let mut sample = killed();
    sample.killed_session(|disk, _| {
        disk.write(0, 100 * EXTENT, &bytes(50, 100 * 128, extents * 128)).unwrap();
    });
    sample
}

#[test]
fn leaks_are_found_and_given_back() {
    let mut sample = leaking(20);
    let leaked = sample.check().unwrap();
    assert!(leaked.clean, "space alone is no damage");
    let bytes = leaked.stats.leaked_bytes.unwrap();
    // Besides the data, map pages that a checkpoint replaced.
    assert!((20 * EXTENT..=20 * EXTENT + 16 * PAGE as u64).contains(&bytes), "{bytes}");
    assert!(leaked.problems.iter().all(|p| p.what == What::Leak) && leaked.problems.len() == 1);

    let allocated = leaked.stats.allocated_bytes;
    let plain = sample.repair(RepairOptions::default()).unwrap();
    assert!(plain.actions.is_empty());
    let report = sample.repair(RepairOptions { leaks: true, ..Default::default() }).unwrap();

    let after = report.after.unwrap();
    assert_eq!(after.stats.leaked_bytes, Some(0));
    let most = allocated - 20 * EXTENT + 16 * PAGE as u64;
    assert!(after.stats.allocated_bytes <= most, "{} > {most}", after.stats.allocated_bytes);
    assert!(matches!(report.actions[..], [.., Action::PunchLeaks { .. }]), "{:?}", report.actions);
    assert!(sample.lost_blocks().is_empty());
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

#[test]
fn stale_and_damaged_superblock_copies_are_rewritten() {
    let whole = closed();
    let older = {
        let mut sb = whole.superblock();
        sb.generation = format::units::Generation(sb.generation.0 - 1);
        sb
    };
    for bad in [vec![0], vec![0, 1], vec![2, 3], vec![0, 2, 3], vec![1, 2]] {
        let mut sample = whole.clone();
        for copy in &bad {
            if copy % 2 == 0 {
                sample.flip(SUPERBLOCK_OFFSETS[*copy] + 300, 1);
            } else {
                sample.overwrite(SUPERBLOCK_OFFSETS[*copy], &older.encode(*copy));
            }
        }
        let report = sample.check().unwrap();
        assert!(!report.clean && report.repairable);
        assert_eq!(kinds(&report.problems), BTreeSet::from([What::SuperblockCopy]));
        let listed = report.problems.iter().filter(|p| p.what == What::SuperblockCopy);
        assert_eq!(listed.count(), bad.len());

        let report = sample.repair(RepairOptions::default()).unwrap();

        assert_eq!(report.actions, [Action::RewriteSuperblocks { copies: bad.len() }]);
        assert!(report.after.unwrap().clean);
        assert_eq!(sample.superblock(), whole.superblock());
        assert!(sample.lost_blocks().is_empty());
    }
}

#[test]
fn two_copies_of_one_generation_that_differ_are_not_guessed_about() {
    let mut sample = closed();
    let mut other = sample.superblock();
    other.virtual_size += 512;
    sample.overwrite(SUPERBLOCK_OFFSETS[3], &other.encode(3));

    let report = sample.check().unwrap();

    assert_eq!(kinds(&report.problems), BTreeSet::from([What::SuperblockSplit]));
    assert!(!report.repairable);
    assert_eq!(sample.open().err().expect("it stays closed").kind(), Kind::Corrupt);
    let repaired = sample.repair(DROP).unwrap();
    assert!(repaired.actions.is_empty() && !repaired.refused.is_empty());
}

/// A disk whose last checkpoint reached only the first pair of copies.
fn half_flipped() -> Sample {
    let mut script = busy(Script::empty(BUSY_SECTORS));
    script.open().unwrap();
    script.checkpoint().unwrap();
    script.write(200 * 128, 300).unwrap();
    script.write(LEAF + 5 * 128 + 8, 32).unwrap();
    script.discard(128, 128).unwrap();
    script.flush().unwrap();
    let before = Sample::of(&script);
    script.checkpoint().unwrap();
    script.write(2 * LEAF, 64).unwrap();
    script.flush().unwrap();
    script.kill();
    let mut sample = Sample::of(&script);
    for offset in &SUPERBLOCK_OFFSETS[2..] {
        sample.overwrite(*offset, &before.read(*offset, PAGE));
    }
    sample
}

#[test]
fn an_older_generation_is_used_on_request_when_the_journal_leads_on_from_it() {
    let mut sample = half_flipped();
    assert!(sample.lost_blocks().is_empty());
    let newest = sample.superblock().generation.0;
    let root = sample.tree().pages().next().expect("a root").page.file_offset();
    sample.flip(root + 1, 1);
    assert!(!sample.lost_blocks().is_empty());
    let kept = sample.repair(RepairOptions::default()).unwrap();
    assert!(kept.actions.is_empty() && kept.refused.len() == 1, "{:?}", kept.refused);

    let options = RepairOptions { older_generation: true, ..RepairOptions::default() };
    let before = sample.clone();
    let report = sample.repair(options).unwrap();

    let pages = (0..before.file_bytes() / BLOCK)
        .filter(|page| !SUPERBLOCK_OFFSETS.contains(&(page * BLOCK)))
        .filter(|page| before.page(*page) != sample.page(*page));
    assert_eq!(pages.count(), 0, "nothing that was there is overwritten");
    let regained_bytes = BUSY_SECTORS * SECTOR as u64;
    let action = Action::UseOlderGeneration { newest, older: newest - 1, regained_bytes };
    assert_eq!(report.actions, [action]);
    assert!(report.lost.is_empty() && report.after.unwrap().clean);
    assert!(sample.lost_blocks().is_empty());
    sample.session(|disk, _| disk.write(0, 0, &[0; 512]).unwrap());
    assert!(sample.check().unwrap().clean);
}

#[test]
fn an_older_generation_is_refused_when_nothing_is_gained_or_too_much_was_overwritten() {
    let options = RepairOptions { older_generation: true, ..RepairOptions::default() };
    let report = closed().repair(options).unwrap();
    assert!(report.refused[0].contains("nothing to gain"), "{:?}", report.refused);

    let mut overwritten = half_flipped();
    let root = overwritten.tree().pages().next().expect("a root").page.file_offset();
    overwritten.flip(root + 1, 1);
    let older = choose_older(&overwritten);
    let page = older.journal_offset(older.journal.position);
    overwritten.overwrite(page, &[0; PAGE]);
    let report = overwritten.repair(options).unwrap();
    assert!(report.actions.is_empty());
    assert!(report.refused[0].contains("no longer leads"), "{:?}", report.refused);

    let mut alone = closed();
    let root = alone.tree().pages().next().expect("a root").page.file_offset();
    alone.flip(root + 1, 1);
    let report = alone.repair(options).unwrap();
    assert!(report.refused[0].contains("no superblock copy holds one"), "{:?}", report.refused);
}

/// Story: an opening for writing brings all superblock copies to the newest state before it writes
/// anything. Where the newest map was damaged, that overwrote the copy from which a repair could
/// have brought everything back. Later, fuzzing found that the check did not tell of it: it called
/// the range damaged and the rest usable, and then the disk did not open.
#[test]
fn a_better_older_generation_is_not_overwritten_by_an_opening() {
    let mut sample = half_flipped();
    let leaf = sample.leaf_at(0).page.file_offset();
    sample.flip(leaf + 77, 3);
    let before = sample.image.fingerprint();

    let report = sample.check().unwrap();
    let told = report.problems.iter().find(|p| p.what == What::OlderGeneration).expect("it tells");
    assert_eq!((told.remedy.name(), report.repairable), ("repair-older-generation", true));
    let store = sample.store();
    let file = store.open(&sample.name(), Access::Write).unwrap();
    let refused = Disk::open(file, &ByName(&store), &Options::default());

    let e = refused.err().expect("it is refused");
    assert_eq!(e.kind(), Kind::Corrupt);
    let text = e.to_string();
    let generation = format!("generation {}", choose_older(&sample).generation);
    for said in ["map is damaged", generation.as_str(), "--older-generation", "--drop-damaged"] {
        assert!(text.contains(said), "{text}");
    }
    assert_eq!(store.live_image().fingerprint(), before);
    sample.open_read_only().expect("it can be read");
    for exit in [RepairOptions { older_generation: true, ..RepairOptions::default() }, DROP] {
        let mut mended = sample.clone();
        assert!(mended.repair(exit).unwrap().after.unwrap().clean);
        mended.session(|disk, _| disk.write(0, 0, &[0; 512]).unwrap());
    }
}

/// The same copy is no reason to refuse when the older state lacks what the newest one lacks.
#[test]
fn an_older_generation_that_is_no_better_does_not_keep_a_disk_closed() {
    let mut sample = closed();
    let older = sample.clone();
    sample.killed_session(|disk, contents| {
        put(disk, contents, 60, (200 * 128, 300));
        disk.flush().unwrap();
        disk.checkpoint().unwrap();
        put(disk, contents, 61, (100 * 128, 64));
        disk.flush().unwrap();
    });
    for offset in &SUPERBLOCK_OFFSETS[2..] {
        sample.overwrite(*offset, &older.read(*offset, PAGE));
    }
    let at = sample.leaf_at(1);
    assert_eq!(at.page, older.leaf_at(1).page, "both have it");
    sample.flip(at.page.file_offset() + 77, 3);

    let kinds = kinds(&sample.check().unwrap().problems);
    assert_eq!(kinds, BTreeSet::from([What::SuperblockCopy, What::MapPage]));

    sample.session(|disk, contents| put(disk, contents, 62, (101 * 128, 64)));

    assert!(sample.lost_blocks().iter().all(|b| blocks_of_leaf(1).contains(b)));
}

fn choose_older(sample: &Sample) -> format::superblock::Superblock {
    let page = sample.read(SUPERBLOCK_OFFSETS[3], PAGE).try_into().expect("a page");
    format::superblock::Superblock::decode(&page, 3).expect("an older copy")
}

#[test]
fn extents_used_twice_are_found_and_unshared_on_request() {
    let mut sample = closed();
    let mut pair = None;
    sample.edit_leaf(0, |leaf| {
        let Entry::Uniform { segment, extent } = leaf.entries[3] else {
            panic!("extent 3 is whole")
        };
        leaf.entries[400] = Entry::Uniform { segment, extent };
        pair = Some(extent);
    });
    let report = sample.check().unwrap();
    assert_eq!(kinds(&report.problems), BTreeSet::from([What::DoubleUse]));
    let twice = report.problems.iter().filter(|p| p.what == What::DoubleUse);
    let ranges = [3, 400].map(|extent: u64| GuestRange { offset: extent * EXTENT, len: EXTENT });
    assert!(
        twice.clone().map(|p| p.range).eq(ranges.map(Some)),
        "either may show the other's data"
    );
    let said = format!("extent {} is used twice", pair.unwrap());
    assert!(twice.clone().all(|p| p.detail.contains(&said)), "{:?}", report.problems);
    assert_eq!(sample.open().err().expect("it stays closed").kind(), Kind::Corrupt);
    let plain = sample.repair(RepairOptions { leaks: true, ..DROP }).unwrap();
    assert!(plain.actions.is_empty(), "{:?}", plain.actions);

    let unshare = RepairOptions { unshare: true, ..RepairOptions::default() };
    let report = sample.repair(unshare).unwrap();

    assert_eq!(report.actions, [Action::Unshare { extents: 1 }]);
    let lost: Vec<_> = report.lost.iter().map(|l| (l.range.offset, l.range.len, l.why)).collect();
    let want = [(3 * EXTENT, EXTENT, Why::Shared), (400 * EXTENT, EXTENT, Why::Shared)];
    assert_eq!(lost, want);
    assert!(report.after.unwrap().clean);
    let (_store, disk) = sample.open().unwrap();
    let (mut a, mut b) = (vec![0; 65536], vec![0; 65536]);
    disk.read(0, 3 * EXTENT, &mut a).unwrap();
    disk.read(0, 400 * EXTENT, &mut b).unwrap();
    assert_eq!(a, b, "both read what they read before");
    disk.write(0, 400 * EXTENT, &[0; 65536]).unwrap();
    disk.read(0, 3 * EXTENT, &mut b).unwrap();
    assert_eq!(a, b, "and no longer change each other");
}

#[test]
fn entries_that_name_what_is_not_there_fail_alone() {
    let mut sample = closed();
    sample.edit_leaf(0, |leaf| {
        let Entry::Uniform { segment, .. } = leaf.entries[3] else { panic!("extent 3 is whole") };
        leaf.entries[3] = Entry::Uniform { segment, extent: ExtentId(1 << 30) };
        let nowhere = format::units::SegmentIdx::new(9).expect("in range");
        leaf.entries[4] = Entry::Uniform { segment: nowhere, extent: ExtentId(40) };
        let Entry::Mixed { slot } = leaf.entries[10] else { panic!("extent 10 is mixed") };
        let vector = &mut leaf.vectors[usize::from(slot)];
        vector[9] = BlockState::Data { segment, block: BlockId(9) };
    });
    let report = sample.check().unwrap();
    assert_eq!(kinds(&report.problems), BTreeSet::from([What::Truncated, What::Nonsense]));
    let costs: BTreeSet<_> =
        report.problems.iter().filter_map(|p| p.range).map(|r| (r.offset, r.len)).collect();
    let block = 10 * EXTENT + 9 * BLOCK;
    let want = BTreeSet::from([(3 * EXTENT, EXTENT), (4 * EXTENT, EXTENT), (block, BLOCK)]);
    assert_eq!(costs, want);
    assert_eq!(sample.open().err().expect("it stays closed").kind(), Kind::Corrupt);

    let repaired = sample.repair(DROP).unwrap();

    let lost: BTreeSet<_> = repaired.lost.iter().map(|l| (l.range.offset, l.range.len)).collect();
    let joined = BTreeSet::from([(3 * EXTENT, 2 * EXTENT), (block, BLOCK)]);
    assert_eq!(lost, joined);
    assert!(repaired.after.unwrap().clean);
    sample.contents.retain(|s, _| {
        let byte = s * SECTOR as u64;
        !(3 * EXTENT..5 * EXTENT).contains(&byte) && !(block..block + BLOCK).contains(&byte)
    });
    assert!(sample.lost_blocks().is_empty());
}

/// Story: fuzzing found a disk that a repair with every option left closed. A journal record gave a
/// part of an extent its second place, which replay saw only after everything to drop was dropped;
/// under a leaf with damaged vectors not even the check before had said so.
#[test]
fn an_extent_to_which_the_journal_gives_a_second_place_keeps_the_newest() {
    for damaged_vectors in [false, true] {
        let mut sample = killed();
        assert!(sample.file_bytes() / EXTENT > 200);
        sample.edit_leaf(1, |leaf| {
            let Entry::Uniform { segment, .. } = leaf.entries[7] else { panic!("7 is whole") };
            leaf.entries[50] = Entry::Uniform { segment, extent: ExtentId(200) };
        });
        let mut want = BTreeSet::from([What::Nonsense]);
        if damaged_vectors {
            let run = sample.leaf_at(1).vectors.expect("extent 40 is mixed");
            sample.flip(run.page.file_offset() + 7, 6);
            want = BTreeSet::from([What::MapPage, What::JournalWaits]);
        }
        assert_eq!(kinds(&sample.check().unwrap().problems), want);
        assert_eq!(sample.open().err().expect("it stays closed").kind(), Kind::Corrupt);

        let report = sample.repair(DROP).unwrap();

        // The record maps three blocks of extent 50.
        let second = LEAF_SPAN + 50 * EXTENT + 3 * BLOCK;
        let mut lost = vec![(second, 13 * BLOCK)];
        if damaged_vectors {
            // Two blocks of extent 40 are in the journal, too.
            let mixed = LEAF_SPAN + 40 * EXTENT;
            lost.splice(..0, [(mixed, 8 * BLOCK), (mixed + 10 * BLOCK, 6 * BLOCK)]);
        }
        let told: Vec<_> = report.lost.iter().map(|l| (l.range.offset, l.range.len)).collect();
        assert_eq!(told, lost);
        let after = report.after.unwrap();
        assert!(after.clean, "{:?}", after.problems);
        assert!(sample.lost_blocks().is_empty(), "what was flushed is there");
        sample.session(|disk, _| disk.write(0, second, &[0; 512]).unwrap());
        assert!(sample.check().unwrap().clean);
    }
}

#[test]
fn scrub_names_bad_blocks_by_where_the_disk_shows_them() {
    let mut script = busy(Script::empty(BUSY_SECTORS));
    script.open().unwrap();
    let parent = script.segment;
    let mut script = script.child();
    script.open().unwrap();
    script.write(128, 8).unwrap();
    script.close().unwrap();
    let sample = Sample::of(&script);
    let scrub = |sample: &Sample| {
        let store = sample.store();
        let file = store.open(&sample.name(), Access::Read).unwrap();
        let mut last = (0, 0);
        let report = check::scrub(&file, &ByName(&store), &mut |done, total| {
            assert!(last.0 <= done && done <= total);
            last = (done, total);
            Ok(())
        });
        assert_eq!(last.0, last.1);
        report.unwrap()
    };
    let healthy = scrub(&sample);
    assert!(healthy.clean, "{:?}", healthy.problems);
    assert_eq!((healthy.segments, healthy.unsummed_bytes), (1, BLOCK));
    assert!(healthy.summed_bytes > 12 * EXTENT, "{}", healthy.summed_bytes);

    // Where the parent keeps what the disk shows at the start of extent 7, and at the block that
    // the child has overwritten.
    let place = |guest: u64| {
        let store = sample.store();
        let file = store.open(&file_name(parent), Access::Read).unwrap();
        let disk = Disk::open_read_only(file, &ByName(&store), &Options::default()).unwrap();
        match disk.map().block(format::units::GuestBlock(guest)).unwrap() {
            BlockState::Data { block, .. } => block.file_offset(),
            other => panic!("no data: {other:?}"),
        }
    };
    let mut bad = sample.clone();
    for guest in [7 * 16, 7 * 16 + 1, 16] {
        bad.image.flip_bit(&file_name(parent), place(guest) + 1000, 4).unwrap();
    }
    let report = scrub(&bad);
    assert!(!report.clean);
    let ranges: Vec<_> = report.problems.iter().map(|p| (p.what, p.range)).collect();
    assert_eq!(ranges.len(), 2, "{:?}", report.problems);
    let shown = ranges[0].1.unwrap();
    assert_eq!((ranges[0].0, shown.offset, shown.len), (What::DataSum, 7 * EXTENT, 2 * BLOCK));
    assert_eq!(ranges[1], (What::DataSum, None));
    assert!(report.problems[1].detail.contains("1 more blocks are bad"));
    let checked = bad.check_with(CheckOptions { data: true }).unwrap();
    assert_eq!(kinds(&checked.problems), BTreeSet::from([What::DataSum]));
    assert!(!checked.repairable);
    assert!(bad.check().unwrap().clean, "without the data there is nothing to see");
}

#[test]
fn damaged_sums_are_a_problem_of_the_sums() {
    let mut script = busy(Script::empty(BUSY_SECTORS));
    script.open().unwrap();
    script.seal().unwrap();
    let mut sample = Sample::of(&script);
    let sums = sample.superblock().sums;
    sample.flip(sums.page.file_offset() + 10, 0);

    let report = sample.check_with(CheckOptions { data: true }).unwrap();

    assert_eq!(kinds(&report.problems), BTreeSet::from([What::Digest]));
    assert!(sample.lost_blocks().is_empty());
    let mut wrong = Sample::of(&script);
    wrong.edit_superblock(|sb| sb.digest[3] ^= 1);
    let report = wrong.check_with(CheckOptions { data: true }).unwrap();
    assert_eq!(kinds(&report.problems), BTreeSet::from([What::Digest]));
}

#[test]
fn a_sealed_segment_is_mended_around_its_map_only() {
    let mut script = busy(Script::empty(BUSY_SECTORS));
    script.open().unwrap();
    script.seal().unwrap();
    let mut sample = Sample::of(&script);
    let leaf = sample.leaf_at(1).page.file_offset();
    sample.flip(leaf, 0);

    let report = sample.check().unwrap();

    assert!(!report.repairable);
    let store = sample.store();
    let file = store.open(&sample.name(), Access::Read).unwrap();
    let dry = RepairOptions { dry_run: true, ..DROP };
    let repaired = check::repair(&file, &ByName(&store), None, &dry).unwrap();
    assert!(repaired.actions.is_empty());
    assert!(repaired.refused[0].contains("sealed"), "{:?}", repaired.refused);
}

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
    let mut sample = closed();
    let older = sample.clone();
    sample.killed_session(|disk, contents| {
        put(disk, contents, 60, (200 * 128, 300));
        disk.flush().unwrap();
        disk.checkpoint().unwrap();
        put(disk, contents, 61, (2 * LEAF, 64));
        disk.flush().unwrap();
    });
    for offset in &SUPERBLOCK_OFFSETS[2..] {
        sample.overwrite(*offset, &older.read(*offset, PAGE));
    }
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
