//! Bad input: whatever a segment file holds, the engine answers with a named error or with the
//! right content; never with a panic, wrong content, or memory out of proportion.
//!
//! `OFFSHOOT_SOAK=1` tries every byte where the short run takes a sample.

#[allow(dead_code)] // Each test file uses a part of it.
mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockd::check::{CheckOptions, RepairOptions};
use blockd::disk::problem::What;
use blockd::disk::{Disk, Options};
use blockd::segment::{Sealed, Segments, file_name};
use blockd::store::sim::{Content, Image, SimStore};
use blockd::store::{Access, Store};
use format::array;
use format::limits::{BLOCK, EXTENT, PAGE, SUPERBLOCK_OFFSETS};
use format::node::{NodePtr, PageRef, encode_inner};
use format::superblock::{Features, Mode, Superblock};
use format::table::{Row, SegmentTable};
use format::units::{ExtentId, Generation, PageNo, SegmentIdx, crc};
use format::{Error, Kind, Result};
use offshoot_tests::model::Contents;
use offshoot_tests::sim::{ByName, LEAF, Script};
use support::{BUSY_SECTORS, Sample, busy, closed, killed, put, read_back};
use uuid::Uuid;

fn soak() -> bool {
    std::env::var_os("OFFSHOOT_SOAK").is_some()
}

/// Opens a damaged disk in every way and compares. `older` is what a disk may hold whose last
/// commit is damaged: that looks like a commit that a power cut stopped.
fn harmless_or_named(damaged: &Sample, older: Option<&Contents>, what: &str) {
    let report = damaged.check_with(CheckOptions { data: true });
    let opened = damaged.open_read_only();
    match (&report, &opened) {
        (Err(e), Err(f)) => {
            assert!(matches!(e.kind(), Kind::Corrupt | Kind::Unsupported), "{what}: {e}");
            assert_eq!(e.kind(), f.kind(), "{what}: {e}; {f}");
            return;
        }
        (Ok(report), _) => {
            let size = report.stats.virtual_size;
            let s = &report.stats;
            let all = s.mapped_bytes + s.zero_bytes + s.hole_bytes + s.damaged_bytes;
            assert_eq!(all, size, "{what}");
        }
        (Err(e), Ok(_)) => panic!("{what}: it opens, but cannot be checked: {e}"),
    }
    let report = report.expect("looked at above");
    if let Ok((_store, disk)) = opened {
        let back = damaged.read_back(&disk);
        let old = older.map(|c| read_back(&disk, c, damaged.sectors));
        let right = back.wrong.is_empty() || old.is_some_and(|old| old.wrong.is_empty());
        assert!(right, "{what}: {:?}", &back.wrong[..back.wrong.len().min(4)]);
        assert!(!report.clean || back.lost.is_empty(), "{what}: clean, but {:?}", back.lost);
    } else {
        assert!(!report.clean, "{what}: clean, but it does not open");
    }
    if let Ok((store, disk)) = damaged.open() {
        let mut later = damaged.clone();
        if let Some(older) = older
            && !read_back(&disk, &later.contents, later.sectors).wrong.is_empty()
        {
            later.contents.clone_from(older);
        }
        let there = disk.write(0, 33 * EXTENT, &[0; 512]).is_ok();
        if there {
            put(&disk, &mut later.contents, 4000, (33 * 128, 130));
        }
        disk.close().unwrap_or_else(|e| panic!("{what}: {e}"));
        later.image = store.live_image();
        let (_store, disk) = later.open_read_only().unwrap_or_else(|e| panic!("{what}: {e}"));
        let back = later.read_back(&disk);
        assert!(back.wrong.is_empty(), "{what}: {:?}", &back.wrong[..back.wrong.len().min(4)]);
    }
}

/// File offsets of all pages that hold metadata.
fn metadata_pages(sample: &Sample) -> Vec<u64> {
    let store = sample.store();
    let file = store.open(&sample.name(), Access::Read).unwrap();
    let (_store, disk) = sample.open_read_only().unwrap();
    let mut data = BTreeSet::new();
    let blocks = disk.size().div_ceil(BLOCK);
    disk.map()
        .resolve(format::units::GuestBlock(0), blocks, &mut |piece| {
            if let format::entry::BlockState::Data { segment, block } = piece.state
                && segment == disk.map().own()
            {
                data.extend(block.0..block.0 + piece.count);
            }
            Ok(())
        })
        .unwrap();
    let mut pages = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = file.next_data(at).unwrap() {
        pages.extend((start / BLOCK..end / BLOCK).filter(|b| !data.contains(b)).map(|b| b * BLOCK));
        at = end;
    }
    pages
}

#[test]
fn every_flipped_bit_of_metadata_is_noticed_or_harmless() {
    let sealed = support::sealed();
    let mut tried = 0;
    for (name, sample) in [("killed", killed()), ("closed", closed()), ("sealed", sealed)] {
        let mut older = sample.contents.clone();
        // The last flush of the killed disk.
        older.retain(|s, _| !(2 * LEAF + 20 * 128..2 * LEAF + 20 * 128 + 24).contains(s));
        let pages = metadata_pages(&sample);
        assert!(pages.len() > 10, "{name}: {pages:?}");
        for page in pages {
            let journal = sample.superblock().journal_offset(0)
                ..sample.superblock().data_start().file_offset();
            let older = (journal.contains(&page) && name == "killed").then_some(&older);
            let step = if soak() { 1 } else { 97 };
            for byte in (page / BLOCK % 89..PAGE as u64).step_by(step) {
                let mut damaged = sample.clone();
                damaged.flip(page + byte, u32::try_from(byte % 8).unwrap());
                harmless_or_named(&damaged, older, &format!("{name}: bit in byte {}", page + byte));
                tried += 1;
            }
        }
    }
    println!("{tried} flipped bits");
}

#[test]
fn pages_that_are_swapped_zeroed_or_from_elsewhere_are_noticed() {
    let sample = closed();
    let pages = metadata_pages(&sample);
    let data = sample.superblock().data_start().file_offset();
    for (i, page) in pages.iter().enumerate().filter(|(_, page)| **page >= data) {
        let other = pages[(i + 1) % pages.len()];
        for bytes in [vec![0; PAGE], vec![0xff; PAGE], sample.page(other / BLOCK).to_vec()] {
            let mut damaged = sample.clone();
            damaged.overwrite(*page, &bytes);
            harmless_or_named(&damaged, None, &format!("page at {page}"));
        }
    }
}

#[test]
fn a_truncated_file_is_an_error_or_reads_right() {
    for sample in [killed(), closed()] {
        let whole = sample.file_bytes();
        let used = {
            let store = sample.store();
            let file = store.open(&sample.name(), Access::Read).unwrap();
            let mut at = 0;
            while let Some((_, end)) = file.next_data(at).unwrap() {
                at = end;
            }
            at
        };
        let mut lengths: BTreeSet<u64> = [0, 1, 511, 512, 4095, 4096, 786_432, 790_527].into();
        lengths.extend((0..=used + EXTENT).step_by(if soak() { 4096 } else { 28_672 }));
        lengths.extend([790_528, used - 1, used, whole - 1, whole - EXTENT]);
        for len in lengths {
            let mut cut = sample.clone();
            let name = cut.name();
            cut.image.truncate(&name, len).unwrap();
            harmless_or_named(&cut, None, &format!("cut to {len} of {whole}"));
            if len < used / EXTENT * EXTENT {
                assert!(cut.open().is_err(), "cut to {len}: it opens for writing");
            }
        }
    }
}

#[test]
fn what_is_no_segment_is_refused_by_name() {
    let noise: Vec<u8> =
        (0..3u32 << 18).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let id = Uuid::from_u128(100);
    for bytes in [vec![], vec![7; 100], vec![0; 2 << 20], noise] {
        let mut image = Image::new();
        image.put(&file_name(id), Content::from_bytes(&bytes));
        let sample = Sample { image, segment: id, contents: Contents::new(), sectors: 2048 };

        let errors = [
            sample.check().err(),
            sample.open().err(),
            sample.open_read_only().err(),
            sample.clone().repair(RepairOptions::default()).err(),
        ];

        for error in errors {
            let error = error.expect("it is refused");
            assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        }
    }
}

/// A superblock copy with something changed that a checked structure cannot say.
fn patched(sample: &Sample, copy: usize, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut page = sample.superblock().encode(copy);
    page[at..at + bytes.len()].copy_from_slice(bytes);
    let sum = crc(&page[..PAGE - 4]);
    page[PAGE - 4..].copy_from_slice(&sum.to_le_bytes());
    page.to_vec()
}

#[test]
fn one_copy_of_a_newer_version_makes_the_segment_newer() {
    let whole = closed();
    let before = whole.image.fingerprint();
    for copies in [vec![0, 1, 2, 3], vec![0], vec![3]] {
        // Byte 8 is the version, byte 24 the features that must be understood.
        for (at, bytes, want) in [(8, [2], "version 2"), (24, [4], "features 0x4")] {
            let mut sample = whole.clone();
            for copy in &copies {
                sample.overwrite(SUPERBLOCK_OFFSETS[*copy], &patched(&whole, *copy, at, &bytes));
            }
            let damaged = sample.image.fingerprint();
            let errors = [
                sample.check().err(),
                sample.open().err(),
                sample.open_read_only().err(),
                sample.repair(RepairOptions::default()).err(),
            ];
            for error in errors {
                let error = error.expect("it is refused");
                assert_eq!(error.kind(), Kind::Unsupported, "{error}");
                assert!(error.to_string().contains(want), "{error}");
            }
            assert_eq!(sample.image.fingerprint(), damaged, "nothing was written");
        }
    }
    assert_eq!(whole.image.fingerprint(), before);
}

/// Story: a disk whose changes were to be dropped at power-off was opened by a version that did not
/// look at its mode, and kept them.
#[test]
fn a_disk_of_a_mode_to_come_is_read_and_never_written() {
    for mode in [Mode::NonPersistent, Mode::Undoable, Mode::Append] {
        let mut sample = closed();
        sample.edit_superblock(|sb| sb.mode = mode);
        assert!(sample.open_read_only().is_ok());
        let error = sample.open().err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    }
}

#[test]
fn features_allow_what_their_class_says() {
    let mut sample = closed();
    sample.edit_superblock(|sb| {
        sb.features = Features { read_only_compat: 2, ..Features::default() }
    });
    assert!(sample.lost_blocks().is_empty(), "it can be read");
    assert!(sample.check().unwrap().clean);
    assert_eq!(sample.open().err().expect("it is refused").kind(), Kind::Unsupported);
    let damaged = sample.image.fingerprint();
    let error = sample.repair(RepairOptions::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    assert_eq!(sample.image.fingerprint(), damaged);

    let mut sample = closed();
    sample.edit_superblock(|sb| sb.features = Features { compat: 9, ..Features::default() });
    sample.session(|disk, contents| put(disk, contents, 60, (0, 8)));
    assert_eq!(sample.superblock().features.compat, 9, "kept though unknown");
    assert!(sample.lost_blocks().is_empty());
}

/// A child over a sealed parent, in one store.
fn child() -> (Sample, Uuid) {
    let mut script = busy(Script::empty(BUSY_SECTORS));
    script.open().unwrap();
    let parent = script.segment;
    let mut script = script.child();
    script.open().unwrap();
    script.write(30 * 128, 64).unwrap();
    script.close().unwrap();
    (Sample::of(&script), parent)
}

/// What a disk says in every way of opening it.
fn every_error(sample: &Sample) -> Vec<Error> {
    let opened = [sample.open().err(), sample.open_read_only().err()];
    opened.into_iter().map(|e| e.expect("it is refused")).collect()
}

#[test]
fn a_missing_parent_is_named_and_nothing_is_mended_meanwhile() {
    let (mut sample, parent) = child();
    let content = sample.image.remove(&file_name(parent)).unwrap();

    let report = sample.check().unwrap();
    let missing = &report.problems[0];
    assert_eq!(missing.what, What::ParentMissing);
    assert!(missing.object.contains(&parent.to_string()) && !report.repairable);
    for error in every_error(&sample) {
        assert_eq!(error.kind(), Kind::ParentMissing);
        assert!(error.to_string().contains(&parent.to_string()), "{error}");
    }
    let before = sample.image.fingerprint();
    let options = RepairOptions {
        leaks: true,
        older_generation: true,
        drop_damaged: true,
        accept_journal_loss: true,
        unshare: true,
        dry_run: false,
    };
    let repaired = sample.repair(options).unwrap();
    assert!(repaired.actions.is_empty() && !repaired.refused.is_empty());
    assert_eq!(sample.image.fingerprint(), before, "nothing was written");

    sample.image.put(&file_name(parent), content);
    assert!(sample.check().unwrap().clean);
    assert!(sample.lost_blocks().is_empty());
}

#[test]
fn a_parent_that_changed_is_noticed() {
    let (whole, parent) = child();
    let as_parent = Sample { segment: parent, ..whole.clone() };
    let change = |change: &dyn Fn(&mut Superblock)| {
        let mut changed = as_parent.clone();
        changed.edit_superblock(change);
        Sample { image: changed.image, ..whole.clone() }
    };
    let digest = change(&|sb| sb.digest[0] ^= 1);
    let unsealed = change(&|sb| {
        sb.state = format::superblock::State::Active;
        sb.seal = format::superblock::Seal::None;
    });
    let other = change(&|sb| sb.segment = Uuid::from_u128(77));
    let mut short = whole.clone();
    let end = as_parent.superblock().extents_end.0 - 1;
    short.image.truncate(&file_name(parent), end * EXTENT).unwrap();
    for (name, sample) in [("digest", digest), ("state", unsealed), ("id", other), ("end", short)] {
        let report = sample.check().unwrap();
        let changed = report.problems.iter().any(|p| p.what == What::ParentChanged);
        assert!(changed, "{name}: {:?}", report.problems);
        assert!(!report.repairable);
        for error in every_error(&sample) {
            assert_eq!(error.kind(), Kind::ParentChanged, "{error}");
        }
    }
}

#[test]
fn a_parent_with_a_damaged_superblock_copy_is_reported_and_serves() {
    let (mut sample, parent) = child();
    sample.image.flip_bit(&file_name(parent), SUPERBLOCK_OFFSETS[2] + 40, 1).unwrap();

    let report = sample.check().unwrap();

    let problem = report.problems.iter().find(|p| p.what == What::SuperblockCopy).unwrap();
    assert!(problem.object.contains(&parent.to_string()), "{}", problem.object);
    assert!(sample.lost_blocks().is_empty());
}

/// Gives a segment another segment table, behind the end of its file.
fn with_table(sample: &mut Sample, rows: &[Uuid], own: usize) {
    let mut table = SegmentTable::default();
    for segment in rows {
        table.add(Row { segment: *segment, digest: None, base: ExtentId(0) }).unwrap();
    }
    let at = ExtentId(sample.file_bytes() / EXTENT);
    let (bytes, array) = array::encode(&table.encode(), at.first_page());
    sample.overwrite(at.file_offset(), &bytes);
    let (name, end) = (sample.name(), at.next().file_offset());
    sample.image.truncate(&name, end).unwrap();
    sample.edit_superblock(|sb| {
        sb.table = array;
        sb.own_index = SegmentIdx::new(own as u64).unwrap();
        sb.extents_end = at.next();
        sb.root = NodePtr::Hole;
    });
}

#[test]
fn loops_of_parents_are_found() {
    let (whole, parent) = child();
    let child = whole.segment;
    let mut looped = Sample { segment: parent, ..whole.clone() };
    with_table(&mut looped, &[parent, child], 0);
    let looped = Sample { image: looped.image, ..whole.clone() };
    let report = looped.check().unwrap();
    let problem = report.problems.iter().find(|p| p.what == What::ParentLoop).expect("a loop");
    assert!(problem.detail.contains(&child.to_string()), "{}", problem.detail);

    let mut own = whole.clone();
    with_table(&mut own, &[child, child], 1);
    for error in every_error(&own) {
        assert!(error.to_string().contains("loop"), "{error}");
    }
    assert!(own.check().unwrap_err().to_string().contains("loop"));
}

#[test]
fn parents_that_disagree_about_their_parents_are_found() {
    let (whole, parent) = child();
    let mut other = Sample { segment: parent, ..whole.clone() };
    with_table(&mut other, &[Uuid::from_u128(9), parent], 1);
    let other = Sample { image: other.image, ..whole };

    let report = other.check().unwrap();

    assert!(report.problems.iter().any(|p| p.what == What::ParentChanged), "{:?}", report.problems);
}

/// A disk of the largest size in a small file, with this root.
fn largest(pages: &[(u64, [u8; PAGE])], root: NodePtr) -> Sample {
    let mut sample = closed();
    for (page, bytes) in pages {
        sample.overwrite(page * PAGE as u64, bytes);
    }
    let (name, end) = (sample.name(), sample.file_bytes().next_multiple_of(EXTENT));
    sample.image.truncate(&name, end).unwrap();
    sample.edit_superblock(|sb| {
        sb.virtual_size = 64 << 40;
        sb.root = root;
        sb.extents_end = ExtentId(end / EXTENT);
        sb.generation = Generation(900);
    });
    sample.contents.clear();
    sample
}

fn pointer(page: u64, bytes: &[u8; PAGE]) -> NodePtr {
    NodePtr::Page(PageRef {
        segment: SegmentIdx::new(0).unwrap(),
        page: PageNo(page),
        crc: crc(bytes),
        generation: Generation(1),
        vectors: None,
    })
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_few_pages_that_name_each_other_do_not_take_memory_out_of_proportion() {
    // Each page names the next 128 times: 128 ^ 3 leaves of 4 KiB from four pages.
    let leaf: [u8; PAGE] = {
        let mut page = [0; PAGE];
        page[..8].copy_from_slice(&(2u64 | 300 << 16).to_le_bytes());
        page
    };
    let level1 = encode_inner(&[pointer(8000, &leaf); 128]);
    let level2 = encode_inner(&[pointer(8001, &level1); 128]);
    let level3 = encode_inner(&[pointer(8002, &level2); 128]);
    let pages = [(8000, leaf), (8001, level1), (8002, level2), (8003, level3)];
    let bomb = largest(&pages, pointer(8003, &level3));
    let zeroes = largest(&[], NodePtr::Zero);
    let damaged = largest(&[], pointer(8003, &[1; PAGE]));
    for (name, sample) in [("bomb", bomb), ("zeroes", zeroes), ("damaged", damaged)] {
        let (start, before) = (Instant::now(), resident());

        let report = sample.check().unwrap();
        let opened = sample.open();

        assert!(report.problems.len() < 2000);
        if name == "bomb" {
            assert!(report.problems.iter().any(|p| p.what == What::DoubleUse));
            assert!(opened.is_err());
        } else {
            let (_store, disk) = opened.unwrap();
            let written = disk.write(0, 0, &[1; 512]);
            assert_eq!(written.is_ok(), name == "zeroes");
        }
        let grown = resident().saturating_sub(before);
        assert!(grown < 400 << 20, "{name}: {grown} bytes more");
        assert!(start.elapsed() < Duration::from_secs(60), "{name}: {:?}", start.elapsed());
    }
}

#[test]
fn a_file_that_claims_to_be_huge_is_handled() {
    for len in [1 << 50, (1 << 62) + EXTENT, i64::MAX.cast_unsigned()] {
        let mut sample = closed();
        let name = sample.name();
        sample.image.truncate(&name, len).unwrap();
        let report = sample.check().unwrap();
        assert!(!report.clean && !report.repairable, "{len}");
        assert!(sample.lost_blocks().is_empty(), "{len}");
        assert_eq!(sample.open().err().expect("it is refused").kind(), Kind::Corrupt);
        // Extents at the far end of it are not believed in.
        sample.edit_leaf_at(0, ExtentId(2000), |leaf| {
            let format::entry::Entry::Uniform { segment, .. } = leaf.entries[3] else { panic!() };
            let extent = ExtentId((1 << 40) - 1);
            leaf.entries[3] = format::entry::Entry::Uniform { segment, extent };
        });
        let before = resident();
        let report = sample.check().unwrap();
        let grown = resident().saturating_sub(before);
        assert!(grown < 400 << 20, "{len}: {grown} bytes more");
        assert!(!report.clean, "{len}");
        assert!(sample.open().is_err(), "{len}");
    }
}

struct Failing(Kind);

impl Segments for Failing {
    fn sealed(&self, _: Uuid) -> Result<Arc<Sealed>> {
        Err(Error::new(self.0, "the host says so"))
    }
}

/// Story: a host that could not read a map page for a moment made it damaged for the whole session,
/// and what it names free.
#[test]
fn a_host_error_is_not_damage() {
    use blockd::store::sim::{Fault, Faults, When};
    let sample = closed();
    for n in 0..40 {
        let store = SimStore::from_image(sample.image.clone());
        let file = store.open(&sample.name(), Access::Write).unwrap();
        store.set_faults(Faults::none().add(When::Nth(n), Fault::ReadIo));
        let opened = Disk::open(file, &ByName(&store), &Options::default());
        if store.hits().is_empty() {
            assert!(opened.is_ok() && n > 8, "read {n}");
            break;
        }
        assert_eq!(opened.err().expect("it is refused").kind(), Kind::Io, "read {n}");
    }
    let (sample, _) = child();
    let store = sample.store();
    let file = store.open(&sample.name(), Access::Read).unwrap();
    let opened = Disk::open_read_only(file, &Failing(Kind::Io), &Options::default());
    assert_eq!(opened.err().expect("it is refused").kind(), Kind::Io);
}
