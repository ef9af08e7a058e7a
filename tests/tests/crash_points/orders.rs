//! Negative controls: the check of `scenarios`, on records whose order was spoilt, must fail. Each
//! test takes a run that passes, takes out or moves one step, and asks for the violation that
//! `docs/format.md` §9 says this costs.

use std::ops::Range;
use std::sync::Arc;

use blockd::segment::file_name;
use blockd::store::Store;
use blockd::store::sim::{Bounds, CrashWalk, Op, SimStore, drop_syncs};
use format::journal::{RECORD_BYTES, Record, encode_commit};
use format::limits::{EXTENT as EXTENT_BYTES, HEADER_EXTENTS, PAGE, SUPERBLOCK_OFFSETS};
use format::superblock::{JournalHead, Superblock};
use format::units::{Epoch, Seq};
use offshoot_tests::crash::{Plan, Recording};
use offshoot_tests::inspect::{Wrong, open_and_read};
use offshoot_tests::sim::{BLOCK, EXTENT, Script, create};
use uuid::Uuid;

use super::SECTORS;

fn offset(op: &Op) -> Option<u64> {
    match op {
        Op::Write { offset, .. } => Some(*offset),
        _ => None,
    }
}

/// The copy of the superblock that an operation writes.
pub fn copy(op: &Op) -> Option<usize> {
    let offset = offset(op)?;
    SUPERBLOCK_OFFSETS.iter().position(|at| *at == offset)
}

fn is_first_pair(op: &Op) -> bool {
    copy(op).is_some_and(|c| c < 2)
}

/// The smallest journal is one extent.
fn is_journal(op: &Op) -> bool {
    offset(op).is_some_and(|at| at / EXTENT_BYTES == HEADER_EXTENTS)
}

/// A disk with data in its first extents, and a run on it that began with an opening.
fn run(during: impl FnOnce(&mut Script)) -> Recording {
    let mut script = Script::empty(SECTORS);
    script.open().unwrap();
    script.write(0, 16 * EXTENT).unwrap();
    script.close().unwrap();
    run_over(script.settled(), during)
}

fn run_over(mut script: Script, during: impl FnOnce(&mut Script)) -> Recording {
    script.open().unwrap();
    during(&mut script);
    Recording::from(&script)
}

/// The operations of the store that the last operation on the disk made.
fn last(run: &Recording) -> Range<usize> {
    nth_last(run, 0)
}

fn nth_last(run: &Recording, n: usize) -> Range<usize> {
    let records = &run.model.history().records;
    let record = &records[records.len() - 1 - n];
    record.log_start..record.log_end.expect("it ended")
}

fn find(run: &Recording, within: Range<usize>, is: impl Fn(&Op) -> bool) -> usize {
    let at = within.clone().find(|at| is(&run.log[*at]));
    at.unwrap_or_else(|| panic!("no such operation in {within:?} of {:?}", Shown(&run.log)))
}

/// A log in short.
struct Shown<'a>(&'a [Op]);

impl std::fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(ToString::to_string)).finish()
    }
}

/// The run as it was has no violation, the spoilt one has this one.
fn expect_caught(test: &str, run: &Recording, spoilt: Vec<Op>, wrong: Wrong) {
    let bounds = Bounds { exhaustive: 8, random: 16, family: 32, ..Bounds::default() };
    let plan = Plan { bounds, go_on: 0, again: 0 };
    run.visit(&plan).expect_none(&format!("{test}, in order"));
    let report = run.with_log(spoilt, |at| at).visit(&plan);
    report.print(&format!("{test}, spoilt"));
    let counts = &report.counts;
    assert!(counts.contains_key(&wrong), "{test}: nobody noticed; found only {counts:?}");
}

mod swapped_orders_are_caught {
    use super::*;

    /// A child's first writes over its parent's data: without the data, there are zeroes.
    #[test]
    fn journal_before_the_sync_of_its_data() {
        let mut parent = Script::empty(SECTORS);
        parent.open().unwrap();
        parent.write(0, 2 * EXTENT).unwrap();
        let run = run_over(parent.child(), |s| {
            s.write(0, 2 * BLOCK).unwrap();
            s.write(EXTENT + 3, 1).unwrap();
            s.flush().unwrap();
        });

        let first = find(&run, last(&run), Op::is_sync);
        let spoilt = drop_syncs(&run.log, |at, _| at == first);

        expect_caught("journal_before_the_sync_of_its_data", &run, spoilt, Wrong::Value);
    }

    #[test]
    fn flush_without_the_sync_of_its_journal() {
        let run = run(|s| {
            s.write(20 * EXTENT, 3).unwrap();
            s.flush().unwrap();
        });

        let page = find(&run, last(&run), is_journal);
        let sync = find(&run, page..run.log.len(), Op::is_sync);
        let spoilt = drop_syncs(&run.log, |at, _| at == sync);

        expect_caught("flush_without_the_sync_of_its_journal", &run, spoilt, Wrong::Value);
    }

    /// The newest state names pages that are not there; the state before is whole still, and so the
    /// disk is refused for writing.
    #[test]
    fn flip_before_the_sync_of_the_map() {
        let run = run(|s| {
            s.write(20 * EXTENT, 3).unwrap();
            s.flush().unwrap();
            s.checkpoint().unwrap();
        });

        let flip = find(&run, last(&run), is_first_pair);
        let spoilt = drop_syncs(&run.log, |at, _| last(&run).start <= at && at < flip);

        expect_caught("flip_before_the_sync_of_the_map", &run, spoilt, Wrong::Error);
    }

    /// Copies of leaves hold records that no commit made durable, and replay from a head that was
    /// taken earlier goes back in time for some blocks of an extent and not for others: it then
    /// owns two extents of the file. (The head is moved back by hand: it takes a flush between the
    /// first two steps of a checkpoint to make it so.)
    #[test]
    fn flip_before_the_commit() {
        let run = run(|s| {
            s.write(20 * EXTENT, BLOCK).unwrap();
            s.flush().unwrap();
            s.discard(20 * EXTENT, EXTENT).unwrap();
            s.write(20 * EXTENT, BLOCK).unwrap();
            s.write(20 * EXTENT + 5 * BLOCK, BLOCK).unwrap();
            s.checkpoint().unwrap();
        });
        let range = last(&run);
        let opened = superblock(&run.log[find(&run, 0..range.start, is_first_pair)]);
        let mut log = run.log.clone();
        for op in &mut log[range.clone()] {
            if let Some(copy) = copy(op) {
                let sb = Superblock { journal: opened.journal, ..superblock(op) };
                *op = rewritten(op, &sb.encode(copy));
            }
        }
        let run = run.with_log(log, |at| at);

        let mut spoilt = run.log.clone();
        let page = find(&run, range.clone(), is_journal);
        for c in 0..2 {
            let at = find(&run, range.clone(), |op| copy(op) == Some(c));
            let op = spoilt.remove(at);
            spoilt.insert(page + c, op);
        }

        expect_caught("flip_before_the_commit", &run, spoilt, Wrong::Error);
    }

    fn flipped() -> Recording {
        run(|s| {
            s.write(20 * EXTENT, 3).unwrap();
            s.checkpoint().unwrap();
        })
    }

    /// The sync between the pairs of the last flip taken out.
    fn without_the_sync_between_the_pairs(run: &Recording) -> Vec<Op> {
        let range = last(run);
        let flip = find(run, range.clone(), |op| offset(op) == Some(SUPERBLOCK_OFFSETS[0]));
        let sync = find(run, flip..range.end, Op::is_sync);
        drop_syncs(&run.log, |at, _| at == sync)
    }

    /// All four copies torn at once, each at the same place.
    #[test]
    fn second_pair_before_the_sync_of_the_first() {
        let run = flipped();
        let spoilt = without_the_sync_between_the_pairs(&run);

        expect_caught("second_pair_before_the_sync_of_the_first", &run, spoilt, Wrong::Error);
    }

    /// The same where the halves of each copy survive independently of all others.
    #[test]
    fn second_pair_before_the_sync_of_the_first_in_halves() {
        let run = torn_superblocks(&flipped());
        let spoilt = without_the_sync_between_the_pairs(&run);

        expect_caught("second_pair_..._in_halves", &run, spoilt, Wrong::Error);
    }

    /// The page of the last commit is filled up instead of a new one begun: a torn rewrite takes
    /// the flushed records with it.
    #[test]
    fn journal_page_rewritten_in_place() {
        let run = run(|s| {
            s.write(20 * EXTENT, 3).unwrap();
            s.flush().unwrap();
            s.write(21 * EXTENT, 3).unwrap();
            // Enough records that both halves of the page change.
            for i in 0..100 {
                s.discard((30 + i) * EXTENT, BLOCK).unwrap();
            }
            s.flush().unwrap();
        });

        let first = find(&run, nth_last(&run, 102), is_journal);
        let second = find(&run, last(&run), is_journal);
        let mut spoilt = run.log.clone();
        spoilt[second] = merged(&run.log[first], &run.log[second], run.segment);

        expect_caught("journal_page_rewritten_in_place", &run, spoilt, Wrong::Value);
    }

    /// The punch of a freed extent, done after the extent was written again.
    #[test]
    fn punch_after_the_reuse() {
        let run = run(|s| {
            s.discard(0, 4 * EXTENT).unwrap();
            s.flush().unwrap();
            s.write(20 * EXTENT, EXTENT).unwrap();
            s.flush().unwrap();
        });

        let punch = find(&run, nth_last(&run, 2), |op| matches!(op, Op::Punch { .. }));
        let data = find(&run, nth_last(&run, 1), |op| matches!(op, Op::Write { .. }));
        let mut spoilt = run.log.clone();
        let op = std::mem::replace(&mut spoilt[punch], Op::Nothing);
        let at = spoilt.remove(data);
        assert!(matches!(at, Op::Write { .. }));
        spoilt.insert(punch + 1, at);
        spoilt[data + 1] = match &spoilt[data + 1] {
            Op::Sync { .. } => op,
            other => panic!("{other} where the flush begins"),
        };

        expect_caught("punch_after_the_reuse", &run, spoilt, Wrong::Value);
    }

    /// A disk that gets its name before its content is durable.
    #[test]
    fn name_before_the_content() {
        let (store, segment) = (SimStore::new(), Uuid::from_u128(100));
        create(&store, segment, SECTORS, None).unwrap();
        let broken = |log: &[Op]| {
            let (mut walk, mut broken) = (CrashWalk::new(&store.base(), log), 0);
            loop {
                walk.visit(&Bounds::default(), &mut |_, image| {
                    let store = SimStore::without_log(image);
                    let there = store.names().unwrap().contains(&file_name(segment));
                    let opens = open_and_read(&store, segment, &Default::default()).is_ok();
                    broken += usize::from(there && !opens);
                });
                if !walk.advance() {
                    return broken;
                }
            }
        };
        let log = store.log();
        assert_eq!(broken(&log), 0);

        let spoilt = drop_syncs(&log, |_, op| matches!(op, Op::Sync { .. }));

        assert!(broken(&spoilt) > 0, "nobody noticed");
    }
}

/// A freed extent is written again although the record that freed it is not durable.
#[test]
fn reuse_before_durable_is_caught() {
    let run = run(|s| {
        s.discard(0, 4 * EXTENT).unwrap();
        s.flush().unwrap();
        s.write(20 * EXTENT, 2 * EXTENT).unwrap();
    });
    let spoilt = drop_syncs(&run.log, |at, _| nth_last(&run, 1).contains(&at));

    expect_caught("reuse_before_durable_is_caught", &run, spoilt, Wrong::Foreign);
}

/// The run with each write of a superblock copy as two writes, which survive independently.
pub fn torn_superblocks(run: &Recording) -> Recording {
    let (mut log, mut places) = (Vec::new(), Vec::new());
    for op in &run.log {
        places.push(log.len());
        match op {
            Op::Write { file, offset, data } if copy(op).is_some() => {
                let (head, tail) = data.split_at(data.len() / 2);
                let half = head.len() as u64;
                log.push(Op::Write { file: *file, offset: *offset, data: head.into() });
                log.push(Op::Write { file: *file, offset: offset + half, data: tail.into() });
            }
            _ => log.push(op.clone()),
        }
    }
    places.push(log.len());
    run.with_log(log, |at| places[at])
}

fn superblock(op: &Op) -> Superblock {
    let (Op::Write { data, .. }, Some(copy)) = (op, copy(op)) else { panic!("not a superblock") };
    Superblock::decode(data[..].try_into().unwrap(), copy).unwrap()
}

/// The same write with other bytes.
fn rewritten(op: &Op, bytes: &[u8]) -> Op {
    let Op::Write { file, offset, .. } = op else { panic!("not a write") };
    Op::Write { file: *file, offset: *offset, data: Arc::from(bytes) }
}

/// One page in the place of the first with the records of both.
fn merged(first: &Op, second: &Op, segment: Uuid) -> Op {
    let Op::Write { data, .. } = first else { panic!("not a page") };
    let Op::Write { data: more, .. } = second else { panic!("not a page") };
    let word = |at: usize| u64::from_le_bytes(data[at..at + 8].try_into().unwrap());
    let at = JournalHead {
        epoch: Epoch(word(24)),
        seq: Seq(word(32)),
        position: word(48),
        prev_crc: u32::from_le_bytes(data[56..60].try_into().unwrap()),
    };
    let mut records = records(data);
    records.extend(self::records(more));
    let ring = EXTENT_BYTES / PAGE as u64;
    let (pages, _) = encode_commit(&at, segment, ring, &records);
    assert_eq!(pages.len(), 1);
    rewritten(first, &pages[0].bytes)
}

fn records(page: &[u8]) -> Vec<Record> {
    let count = usize::from(u16::from_le_bytes(page[60..62].try_into().unwrap()));
    let records = page[64..].chunks_exact(RECORD_BYTES).take(count);
    records.map(|bytes| Record::decode(bytes.try_into().unwrap()).unwrap()).collect()
}
