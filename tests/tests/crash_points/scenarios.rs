//! One test per operation.

use blockd::disk::Options;
use blockd::segment::{file_name, new_name};
use blockd::store::Store;
use blockd::store::sim::{Bounds, SimStore, all_crash_states};
use format::limits;
use offshoot_tests::around::slow;
use offshoot_tests::crash::{Recording, Report};
use offshoot_tests::inspect::open_and_read;
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::sim::{BLOCK, EXTENT, LEAF, Script, create};
use uuid::Uuid;

use super::orders::torn_superblocks;
use super::{SECTORS, check, check_over, plan};

/// Some blocks in some extents of both leaves.
fn some_data(script: &mut Script) {
    script.write(0, EXTENT).unwrap();
    script.write(EXTENT + 2 * BLOCK, 3 * BLOCK).unwrap();
    script.write(5 * EXTENT - 4, 8).unwrap();
    script.write(LEAF - BLOCK, 2 * BLOCK).unwrap();
    script.write(SECTORS - EXTENT, EXTENT).unwrap();
}

#[test]
fn first_write() {
    check(
        "first_write",
        |_| {},
        |s| {
            s.open().unwrap();
            s.write(8, 8).unwrap();
            s.write(16, 3 * BLOCK).unwrap();
            s.flush().unwrap();
            s.write(LEAF - 2 * BLOCK, 4 * BLOCK).unwrap();
            s.write(4 * EXTENT + BLOCK, 2 * EXTENT).unwrap();
            s.write(8, 8).unwrap();
            s.flush().unwrap();
            s.write(8 * EXTENT, EXTENT).unwrap();
        },
    );
}

#[test]
fn overwrite() {
    check("overwrite", some_data, |s| {
        s.open().unwrap();
        s.write(0, 8).unwrap();
        s.write(3, 40).unwrap();
        s.flush().unwrap();
        s.write(0, EXTENT).unwrap();
        s.write(5 * EXTENT - 2, 4).unwrap();
        s.write(0, 1).unwrap();
        s.flush().unwrap();
        s.write(LEAF - 1, 2).unwrap();
    });
}

#[test]
fn sub_block_write() {
    check("sub_block_write", some_data, |s| {
        s.open().unwrap();
        // Into a hole, into two holes, into own and hole, and next to a sector just written.
        s.write(3 * EXTENT + 1, 1).unwrap();
        s.write(3 * EXTENT + 3 * BLOCK - 1, 2).unwrap();
        s.write(EXTENT + 5 * BLOCK - 3, 6).unwrap();
        s.write(3 * EXTENT + 2, 1).unwrap();
        s.flush().unwrap();
        // Into a block that was discarded, before and after the flush.
        s.discard(0, 2 * BLOCK).unwrap();
        s.write(1, 2).unwrap();
        s.flush().unwrap();
        s.write(BLOCK + 1, 1).unwrap();
        s.write(2 * EXTENT - 1, 2).unwrap();
        s.flush().unwrap();
    });
}

/// Commits of no page, one page and several pages. Discards where nothing was cost a record each
/// and no write; the first and the last record of each commit change content.
#[test]
fn flush() {
    let before = |s: &mut Script| s.write(0, 4 * EXTENT).unwrap();
    check("flush", before, |s| {
        s.open().unwrap();
        s.flush().unwrap();
        for (round, records) in (0..).zip([1, 126, 127, 300, 2, 400]) {
            s.discard(round * 5 * BLOCK, BLOCK).unwrap();
            for i in 2..records {
                s.discard((100 + i) * EXTENT, BLOCK).unwrap();
            }
            s.write((40 + round) * EXTENT, 2).unwrap();
            s.flush().unwrap();
            s.write(round * 5 * BLOCK, 3).unwrap();
            s.flush().unwrap();
        }
    });
}

#[test]
fn discard() {
    check("discard", some_data, |s| {
        s.open().unwrap();
        s.discard(BLOCK, 2 * BLOCK).unwrap();
        s.discard(EXTENT + 2 * BLOCK, 3 * BLOCK).unwrap();
        s.discard(5, 30).unwrap();
        s.flush().unwrap();
        s.discard(0, 6 * EXTENT).unwrap();
        s.write(2 * EXTENT, 8).unwrap();
        s.flush().unwrap();
        // The extents of the discarded range are used again.
        for extent in 8..14 {
            s.write(extent * EXTENT + extent, 2 * BLOCK).unwrap();
        }
        s.discard(SECTORS - EXTENT, EXTENT).unwrap();
        s.flush().unwrap();
        s.write(0, 16).unwrap();
        s.flush().unwrap();
    });
}

/// Story: an extent that was written, discarded and written again between two checkpoints is stored
/// with its second place, and its records are replayed over that. The first of them gives it
/// another place, the discard none, the last the one it has; replay remembered the first as the
/// newest, called the extent one with two places, and the disk did not open.
#[test]
fn an_extent_that_moves_before_a_checkpoint() {
    check("moves_before_checkpoint", some_data, |s| {
        s.open().unwrap();
        s.write(3 * EXTENT, 3 * BLOCK).unwrap();
        s.discard(3 * EXTENT, EXTENT).unwrap();
        s.write(3 * EXTENT + BLOCK, BLOCK).unwrap();
        // The same with an extent that the checkpoint before has seen, block by block.
        s.discard(EXTENT, EXTENT / 2).unwrap();
        s.discard(EXTENT + EXTENT / 2, EXTENT / 2).unwrap();
        s.write(2 * EXTENT - BLOCK, BLOCK).unwrap();
        s.checkpoint().unwrap();
        s.write(3 * EXTENT, 8).unwrap();
        s.flush().unwrap();
    });
}

#[test]
fn discard_of_a_whole_leaf_and_use_of_its_space() {
    let before = |s: &mut Script| {
        for extent in 0..12 {
            s.write(extent * 30 * EXTENT, 2 * BLOCK).unwrap();
        }
        s.write(LEAF, EXTENT).unwrap();
    };
    check("discard_of_a_whole_leaf", before, |s| {
        s.open().unwrap();
        s.discard(0, LEAF).unwrap();
        // Not durable yet: nothing may be used again.
        s.write(LEAF + 3 * EXTENT, EXTENT).unwrap();
        s.flush().unwrap();
        for extent in 0..20 {
            s.write(LEAF + (4 + extent) * EXTENT, BLOCK).unwrap();
        }
        s.flush().unwrap();
        s.write(40 * EXTENT, 1).unwrap();
        s.discard(0, SECTORS).unwrap();
        s.flush().unwrap();
        s.write(100 * EXTENT, 4 * EXTENT).unwrap();
        s.checkpoint().unwrap();
        s.write(200 * EXTENT, 4 * EXTENT).unwrap();
        s.flush().unwrap();
    });
}

#[test]
fn write_zeroes() {
    check("write_zeroes", some_data, |s| {
        s.open().unwrap();
        s.write_zeroes(4, 3 * BLOCK, false).unwrap();
        s.write_zeroes(EXTENT, EXTENT, true).unwrap();
        s.flush().unwrap();
        s.write_zeroes(2 * EXTENT, 2 * EXTENT, false).unwrap();
        s.write_zeroes(LEAF - EXTENT, 2 * EXTENT, true).unwrap();
        s.write(LEAF - 1, 2).unwrap();
        s.flush().unwrap();
    });
}

/// Enough checkpoints that pages which earlier ones replaced are used again, several times.
#[test]
fn checkpoint() {
    check("checkpoint", some_data, |s| {
        s.open().unwrap();
        for round in 0..6 {
            s.write((7 + round) * EXTENT + round * BLOCK, BLOCK).unwrap();
            s.write(LEAF + (2 + round) * EXTENT, 1).unwrap();
            s.discard(round * BLOCK, BLOCK).unwrap();
            if round % 2 == 0 {
                s.flush().unwrap();
                s.write(round * EXTENT, 1).unwrap();
            }
            s.checkpoint().unwrap();
        }
    });
}

/// A checkpoint that finds the whole map of a leaf mixed: a run of vector pages.
#[test]
fn checkpoint_with_vector_runs() {
    let before = |s: &mut Script| {
        for extent in 0..70 {
            s.write(extent * EXTENT, 1).unwrap();
        }
    };
    check("checkpoint_with_vector_runs", before, |s| {
        s.open().unwrap();
        for round in 0..3 {
            s.write((80 + round) * EXTENT, BLOCK).unwrap();
            s.discard(round * 20 * EXTENT, 20 * EXTENT).unwrap();
            s.checkpoint().unwrap();
        }
    });
}

#[test]
fn journal_wrap_around() {
    check("journal_wrap_around", some_data, |s| {
        s.open().unwrap();
        for round in 0..40 {
            s.write((6 + round) * EXTENT, 2).unwrap();
            s.flush().unwrap();
        }
    });
}

#[test]
fn resize_up() {
    check("resize_up", some_data, |s| {
        s.open().unwrap();
        s.write(SECTORS - 3, 3).unwrap();
        s.resize(SECTORS + EXTENT - 3).unwrap();
        s.write(SECTORS + EXTENT - 8, 5).unwrap();
        s.flush().unwrap();
        s.resize(SECTORS + LEAF + 5).unwrap();
        s.write(SECTORS + LEAF, 5).unwrap();
        s.flush().unwrap();
    });
}

/// After a crash the disk has its old size and everything on it, or its new size.
#[test]
fn resize_down() {
    check("resize_down", some_data, |s| {
        s.open().unwrap();
        s.write(SECTORS - 2 * EXTENT, EXTENT).unwrap();
        s.resize(SECTORS - EXTENT - 5).unwrap();
        s.write(SECTORS - EXTENT - 8, 3).unwrap();
        // A record, not in the journal yet, about what the resize drops.
        s.write(SECTORS - 20 * EXTENT, 3).unwrap();
        s.resize(LEAF + 3).unwrap();
        s.write(17 * EXTENT, 2 * EXTENT).unwrap();
        s.flush().unwrap();
        s.resize(18 * EXTENT + BLOCK - 3).unwrap();
        // What was cut off does not come back.
        s.resize(SECTORS).unwrap();
        s.write(19 * EXTENT, 3 * EXTENT).unwrap();
        s.flush().unwrap();
    });
}

#[test]
fn seal() {
    check("seal", some_data, |s| {
        s.open().unwrap();
        s.write(3 * EXTENT, 20).unwrap();
        s.discard(0, 2 * BLOCK).unwrap();
        s.seal().unwrap();
    });
}

/// A disk that is not there, or is there and whole; once it was made, it is there.
#[test]
fn create_from_nothing() {
    let (store, segment) = (SimStore::new(), Uuid::from_u128(100));
    create(&store, segment, SECTORS, None).unwrap();
    let (log, bounds) = (store.log(), Bounds { exhaustive: 10, ..plan().bounds });
    let stats = all_crash_states(&store.base(), &log, &bounds, &mut |state, image| {
        let store = SimStore::from_image(image);
        let names = store.names().unwrap();
        let there = names.contains(&file_name(segment));
        assert!(there || state.point < log.len(), "{state}: it is gone");
        let ours = [file_name(segment), new_name(segment)];
        assert!(names.iter().all(|n| ours.contains(n)), "{state}: {names:?}");
        if there {
            let (disk, content) = open_and_read(&store, segment, &Options::default())
                .unwrap_or_else(|violation| panic!("{violation}\n{state}"));
            assert_eq!((content.sectors, content.tags.len()), (SECTORS, 0), "{state}");
            disk.close().unwrap();
        }
    });
    Report { stats, images: stats.states, ..Report::default() }.print("create_from_nothing");
}

/// Superblock copies whose halves survive independently of each other: more than the model's one
/// torn write at a time, and what the two pairs with a sync between them are for.
#[test]
fn superblocks_torn_to_pieces() {
    let mut script = Script::empty(SECTORS);
    for round in 0..3 {
        script.open().unwrap();
        script.write(round * EXTENT, 3).unwrap();
        script.checkpoint().unwrap();
        script.resize(SECTORS + round).unwrap();
        script.close().unwrap();
    }
    let mut plan = plan();
    plan.bounds.exhaustive = 8;
    let recording = torn_superblocks(&Recording::from(&script));
    recording.visit(&plan).expect_none("superblocks_torn_to_pieces");
}

/// Opening a disk that has a journal to replay, and crashing while it is opened.
#[test]
fn open() {
    let mut script = Script::empty(SECTORS);
    script.open().unwrap();
    some_data(&mut script);
    script.checkpoint().unwrap();
    for round in 0..5 {
        script.write((7 + round) * EXTENT, 3).unwrap();
        script.discard(round * BLOCK, BLOCK).unwrap();
        script.flush().unwrap();
    }
    script.kill();
    check_over("open", script.settled(), |s| {
        for round in 0..3 {
            s.open().unwrap();
            s.write((20 + round) * EXTENT, 3).unwrap();
            s.flush().unwrap();
            s.kill();
        }
        s.open().unwrap();
    });
}

#[test]
fn close() {
    check("close", some_data, |s| {
        for round in 0..3 {
            s.open().unwrap();
            s.write((7 + round) * EXTENT, 3).unwrap();
            s.discard(round * BLOCK, BLOCK).unwrap();
            s.close().unwrap();
        }
    });
}

#[test]
fn child_over_a_sealed_parent() {
    let mut parent = Script::empty(SECTORS);
    parent.open().unwrap();
    some_data(&mut parent);
    check_over("child_over_a_sealed_parent", parent.child(), |s| {
        s.open().unwrap();
        // Blocks and parts of blocks of the parent, and of neither.
        s.write(3, 1).unwrap();
        s.write(2 * BLOCK, 2 * BLOCK).unwrap();
        s.write(EXTENT + 4 * BLOCK + 3, 20).unwrap();
        s.flush().unwrap();
        s.discard(4 * BLOCK, 4 * BLOCK).unwrap();
        s.discard(LEAF - BLOCK, 1).unwrap();
        s.write(LEAF - 1, 2).unwrap();
        s.flush().unwrap();
        s.discard(SECTORS - EXTENT, EXTENT).unwrap();
        s.write(SECTORS - 3, 2).unwrap();
        s.checkpoint().unwrap();
        s.write(SECTORS - EXTENT, 8).unwrap();
        s.resize(SECTORS - 2).unwrap();
        s.close().unwrap();
    });
}

/// Four threads on four queues, each with sectors of its own in the same blocks and extents, and
/// flushes by all of them. The disk is a child over a parent full of data, so that a block whose
/// data is missing shows as zeroes that nobody wrote.
#[test]
fn several_queues() {
    let first = seed(3);
    for seed in first..first + if soak() { 30 } else { 3 } {
        let mut parent = Script::empty(SECTORS);
        parent.open().unwrap();
        parent.write(0, 16 * EXTENT).unwrap();
        let mut script = parent.child();
        script.open().unwrap();
        script.fragment(super::FRAGMENTS, 24).unwrap();
        script.close().unwrap();
        let mut script = script.settled();
        script.wrap = Some(slow(seed));
        check_over(&format!("several_queues, OFFSHOOT_SEED={seed}"), script, |s| {
            s.open().unwrap();
            let script = &*s;
            std::thread::scope(|scope| {
                (0..4).for_each(|lane| _ = scope.spawn(move || one_queue(script, lane, seed)));
            });
            s.flush().unwrap();
        });
    }
}

fn one_queue(script: &Script, lane: usize, seed: u64) {
    let mut rng = Rng::new(seed + lane as u64);
    for _ in 0..14 {
        // Every fourth sector, and now and then a block of its own.
        let sector = rng.below(16 * EXTENT / 4) * 4 + lane as u64;
        let block = (20 * EXTENT / BLOCK + rng.below(40) * 4 + lane as u64) * BLOCK;
        match rng.below(9) {
            0..=1 => script.flush().unwrap(),
            2 => script.discard_on(lane, sector, 1).unwrap(),
            3 => script.discard_on(lane, block, BLOCK).unwrap(),
            4 => _ = script.write_on(lane, block, BLOCK).unwrap(),
            _ => _ = script.write_on(lane, sector, 1).unwrap(),
        }
    }
}

/// A script that a seed makes up. The seed is in the name of the report.
fn random(seed: u64, steps: u64) {
    let mut rng = Rng::new(seed);
    let mut script = Script::empty(SECTORS);
    script.open().unwrap();
    if rng.one_in(3) {
        some_data(&mut script);
        script = script.child();
        script.open().unwrap();
    }
    script.fragment(super::FRAGMENTS, 16).unwrap();
    script.close().unwrap();
    let mut script = script.settled();
    script.open().unwrap();
    for _ in 0..steps {
        step(&mut script, &mut rng);
    }
    script.close().unwrap();
    let recording = Recording::from(&script);
    recording.visit(&plan()).expect_none(&format!("random_scripts, OFFSHOOT_SEED={seed}"));
}

fn step(script: &mut Script, rng: &mut Rng) {
    let sectors = script.disk().size() / limits::SECTOR;
    // Few extents, so that they meet again.
    let extent = rng.below(12).min(sectors / EXTENT - 1);
    let near = if rng.one_in(4) { LEAF - 6 * EXTENT } else { 0 };
    let at = (near + extent * EXTENT + rng.below(EXTENT)).min(sectors - 1);
    let count = match rng.below(4) {
        0 => 1,
        1 => 1 + rng.below(BLOCK * 2),
        2 => 1 + rng.below(EXTENT),
        _ => 1 + rng.below(3 * EXTENT),
    };
    let count = count.min(sectors - at);
    match rng.below(24) {
        0..=9 => script.write(at, count.min(EXTENT)).unwrap(),
        10..=12 => script.discard(at, count).unwrap(),
        13 => script.discard(at / EXTENT * EXTENT, EXTENT.min(sectors - at)).unwrap(),
        14 => script.write_zeroes(at, count.min(EXTENT), rng.one_in(2)).unwrap(),
        15..=19 => script.flush().unwrap(),
        20 => script.checkpoint().unwrap(),
        21 => script.resize(LEAF + rng.below(32 * EXTENT)).unwrap(),
        22 => {
            script.close().unwrap();
            script.open().unwrap();
        }
        _ => {
            script.flush().unwrap();
            script.kill();
            script.open().unwrap();
        }
    }
}

#[test]
fn random_scripts() {
    let first = seed(1000);
    for i in 0..if soak() { 60 } else { 6 } {
        random(first + i, if soak() { 60 } else { 24 });
    }
}
