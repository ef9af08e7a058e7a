//! Data and sums that do not fit, on sealed disks.

use std::collections::BTreeSet;

use blockd::check::{self, CheckOptions, RepairOptions};
use blockd::disk::problem::What;
use blockd::disk::{Disk, Options};
use blockd::segment::file_name;
use blockd::store::{Access, Store};
use format::entry::BlockState;
use format::limits::{BLOCK, EXTENT};
use offshoot_tests::sim::{ByName, Script};

use super::support::{BUSY_SECTORS, Sample, busy, sealed};
use super::{DROP, kinds};

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
    let mut sample = sealed();
    let sums = sample.superblock().sums;
    sample.flip(sums.page.file_offset() + 10, 0);

    let report = sample.check_with(CheckOptions { data: true }).unwrap();

    assert_eq!(kinds(&report.problems), BTreeSet::from([What::Digest]));
    assert!(sample.lost_blocks().is_empty());
    let mut wrong = sealed();
    wrong.edit_superblock(|sb| sb.digest[3] ^= 1);
    let report = wrong.check_with(CheckOptions { data: true }).unwrap();
    assert_eq!(kinds(&report.problems), BTreeSet::from([What::Digest]));
}

#[test]
fn a_sealed_segment_is_mended_around_its_map_only() {
    let mut sample = sealed();
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
