//! Pages of the map that are damaged: what lies under them, and nothing else.

use std::collections::BTreeSet;

use blockd::check::{RepairOptions, Why};
use blockd::disk::plan::Plan;
use blockd::disk::problem::What;
use format::Kind;
use format::limits::{BLOCK, EXTENT, LEAF_SPAN};
use offshoot_tests::pattern::{SECTOR, bytes};
use offshoot_tests::sim::LEAF;

use super::support::{BUSY_SECTORS, Sample, closed, discard, put, sealed};
use super::{DROP, blocks_of_leaf, kinds};

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
    let mut sample = sealed();
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
