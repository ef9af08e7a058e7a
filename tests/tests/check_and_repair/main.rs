//! A check finds what is wrong and nothing else; a repair mends what can be mended, says what it
//! cost to the byte, and can be cut short at any point.
//!
//! - `map`, `journal`, `superblocks`, `space`, `sums`: what may be damaged, one after the other.
//! - `cuts`: power cuts and failures of the host during a repair.

#[path = "../support/mod.rs"]
#[allow(dead_code)] // Each test file uses a part of it.
mod support;

mod cuts;
mod journal;
mod map;
mod space;
mod sums;
mod superblocks;

use std::collections::BTreeSet;

use blockd::check::{CheckOptions, RepairOptions};
use blockd::disk::problem::{Problem, What};
use format::limits::{BLOCK, EXTENT, LEAF_SPAN, PAGE, SUPERBLOCK_OFFSETS};
use offshoot_tests::pattern::{SECTOR, bytes};
use offshoot_tests::sim::{LEAF, Script};

use support::{BUSY_SECTORS, Sample, busy, closed, killed, put};

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
    let sealed = support::sealed();
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

/// Pages of the ring that hold something, in file offsets.
fn journal_pages(sample: &Sample) -> Vec<u64> {
    let sb = sample.superblock();
    (0..sb.journal_pages())
        .map(|p| sb.journal_offset((sb.journal.position + p) % sb.journal_pages()))
        .take_while(|offset| sample.read(*offset, 4) == b"OJNL")
        .collect()
}

/// Data that was written and never flushed: after a power cut nothing names it.
fn leaking(extents: u64) -> Sample {
    let mut sample = killed();
    sample.killed_session(|disk, _| {
        disk.write(0, 100 * EXTENT, &bytes(50, 100 * 128, extents * 128)).unwrap();
    });
    sample
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

/// A disk whose copies are two of a state that was closed in order, and two of the state after it,
/// with `last` written since; and the disk as it was closed.
fn two_states(last: (u64, u64)) -> (Sample, Sample) {
    let mut sample = closed();
    let older = sample.clone();
    sample.killed_session(|disk, contents| {
        put(disk, contents, 60, (200 * 128, 300));
        disk.flush().unwrap();
        disk.checkpoint().unwrap();
        put(disk, contents, 61, last);
        disk.flush().unwrap();
    });
    for offset in &SUPERBLOCK_OFFSETS[2..] {
        sample.overwrite(*offset, &older.read(*offset, PAGE));
    }
    (sample, older)
}
