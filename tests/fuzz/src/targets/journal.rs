//! Replay of a journal ring.
//!
//! Input: the head (epoch 8, sequence 8, predecessor 4 bytes, position 1), a byte with the number
//! of later epochs, then the pages of the ring in the order in which replay meets them: each a byte
//! of options, a byte with the number of records that follow, the 64-byte header and the records.

use format::journal::{RECORD_BYTES, RECORDS_PER_PAGE, Record, Replay, Step, encode_commit};
use format::limits::{BLOCK, BLOCKS_PER_EXTENT, PAGE, VIRTUAL_SIZE_MAX};
use format::superblock::{JournalHead, Superblock};
use format::units::{BlockId, Epoch, GuestBlock, Seq, crc, index};
use uuid::Uuid;

use super::superblock::sample;
use crate::bytes::{Input, put, trimmed};

const SEGMENT: Uuid = Uuid::from_u128(77);
const RING_PAGES: u64 = 16;

// docs/format.md §7.
const HEADER_BYTES: usize = 64;
const CRC_AT: usize = 4;
const SEGMENT_AT: usize = 8;
const EPOCH_AT: usize = 24;
const FIRST_SEQ_AT: usize = 32;
const POSITION_AT: usize = 48;
const PREV_CRC_AT: usize = 56;
const COUNT_AT: usize = 60;

/// Option: the page is of this segment, with the right magic number and checksum. Its epoch is that
/// of the page before it plus the upper four bits of the options.
const OWN: u8 = 1;
/// Option: the page also continues the one before it, and counts the records it was given.
const NEXT: u8 = 2;

/// Replays the ring and checks what came out.
pub fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let head = JournalHead {
        epoch: Epoch(input.u64()),
        seq: Seq(input.u64()),
        prev_crc: input.u32(),
        position: u64::from(input.byte()) % RING_PAGES,
    };
    let epochs = u64::from(input.byte());
    // Only heads that a superblock can hold: the counters in it are bounded.
    let Ok(sb) = Superblock::decode(&superblock(head, epochs).encode(0), 0) else { return false };
    let mut ring = vec![[0; PAGE]; index(RING_PAGES)];
    let mut next = head;
    for step in 0..RING_PAGES {
        if input.is_empty() {
            break;
        }
        let position = (head.position + step) % RING_PAGES;
        ring[index(position)] = page(&mut input, &mut next, position);
    }

    let Some((records, replay)) = replay(&ring, &sb) else { return false };

    for record in &records {
        let (block, count) = record.range();
        assert!(count > 0 && block.0 + count <= VIRTUAL_SIZE_MAX / BLOCK);
        assert_eq!(Record::decode(&record.encode()).unwrap(), *record);
    }
    for page in &ring {
        let _ = replay.proves_loss(page);
    }
    check_writing_again(&records, &sb);
    true
}

fn superblock(head: JournalHead, epochs: u64) -> Superblock {
    Superblock {
        segment: SEGMENT,
        journal_extents: RING_PAGES / BLOCKS_PER_EXTENT,
        journal: head,
        epoch: Epoch(head.epoch.0.saturating_add(epochs)),
        ..sample()
    }
}

/// The next page of the input; `next` is where the journal would continue before and after it.
fn page(input: &mut Input, next: &mut JournalHead, position: u64) -> [u8; PAGE] {
    let options = input.byte();
    let count = usize::from(input.byte()).min(RECORDS_PER_PAGE);
    let mut page = [0; PAGE];
    put(&mut page, 0, input.bytes(HEADER_BYTES));
    put(&mut page, HEADER_BYTES, input.bytes(count * RECORD_BYTES));
    if options & NEXT != 0 {
        put(&mut page, FIRST_SEQ_AT, &next.seq.0.to_le_bytes());
        put(&mut page, POSITION_AT, &position.to_le_bytes());
        put(&mut page, PREV_CRC_AT, &next.prev_crc.to_le_bytes());
        put(&mut page, COUNT_AT, &u16::try_from(count).expect("126 at most").to_le_bytes());
    }
    if options & (OWN | NEXT) != 0 {
        put(&mut page, 0, b"OJNL");
        put(&mut page, SEGMENT_AT, SEGMENT.as_bytes());
        next.epoch = Epoch(next.epoch.0.wrapping_add(u64::from(options >> 4)));
        put(&mut page, EPOCH_AT, &next.epoch.0.to_le_bytes());
        let sum = crc(&page[SEGMENT_AT..]);
        put(&mut page, CRC_AT, &sum.to_le_bytes());
        next.prev_crc = sum;
        next.seq = Seq(next.seq.0.wrapping_add(count as u64));
    }
    page
}

/// All records up to the end; `None` when a page was refused.
fn replay(ring: &[[u8; PAGE]], sb: &Superblock) -> Option<(Vec<Record>, Replay)> {
    let mut replay = Replay::new(sb);
    let mut records = Vec::new();
    for _ in 0..=RING_PAGES {
        match replay.feed(&ring[index(replay.at().position)]) {
            Ok(Step::Records(more)) => records.extend(more),
            Ok(Step::End) => return Some((records, replay)),
            Err(_) => return None,
        }
    }
    panic!("replay went around the ring more than once");
}

/// What was replayed, written again in one commit, must replay as the same.
fn check_writing_again(records: &[Record], sb: &Superblock) {
    let (pages, end) = encode_commit(&sb.journal, SEGMENT, RING_PAGES, records);
    let mut ring = vec![[0; PAGE]; index(RING_PAGES)];
    for page in &pages {
        ring[index(page.position)] = page.bytes;
    }
    let (again, replay) = replay(&ring, sb).expect("what was just encoded is accepted");
    assert_eq!(again, records);
    assert_eq!(replay.at(), end);
}

/// An input that holds `pages` as they are, with `options` for each.
fn input(head: &JournalHead, epochs: u8, pages: &[[u8; PAGE]], options: u8) -> Vec<u8> {
    let mut input = Vec::new();
    input.extend(head.epoch.0.to_le_bytes());
    input.extend(head.seq.0.to_le_bytes());
    input.extend(head.prev_crc.to_le_bytes());
    input.push(u8::try_from(head.position).expect("a small ring"));
    input.push(epochs);
    for page in pages {
        let records = trimmed(&page[HEADER_BYTES..]).len().div_ceil(RECORD_BYTES);
        input.push(options);
        input.push(u8::try_from(records).expect("126 at most"));
        input.extend(&page[..HEADER_BYTES + records * RECORD_BYTES]);
    }
    input
}

/// An empty ring, a commit, a wrapped run of commits, a torn commit, and one at the last number.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let head = JournalHead { epoch: Epoch(3), position: 14, seq: Seq(1000), prev_crc: 0 };
    let records: Vec<Record> = (0..200)
        .map(|i| match i % 3 {
            0 => Record::Map { block: GuestBlock(i), count: 1, target: BlockId(i + 320) },
            1 => Record::Zero { block: GuestBlock(i * 1000), count: 4096 },
            _ => Record::Map { block: GuestBlock(16 * i), count: 16, target: BlockId(16 * i) },
        })
        .collect();
    let commit = |at: &JournalHead, records: &[Record]| {
        let (pages, next) = encode_commit(at, SEGMENT, RING_PAGES, records);
        (pages.into_iter().map(|p| p.bytes).collect::<Vec<_>>(), next)
    };
    let (small, after_small) = commit(&head, &records[..3]);
    let (large, _) = commit(&after_small, &records);
    let later = JournalHead { epoch: Epoch(5), ..after_small };
    let (reopened, _) = commit(&later, &records[3..7]);
    let wrapped = [small.clone(), large.clone()].concat();
    let torn = [small.clone(), vec![[0; PAGE], large[1]]].concat();
    let two_epochs = [small.clone(), reopened].concat();
    let last = JournalHead { seq: Seq(u64::MAX - 2), epoch: Epoch(u64::MAX), ..head };
    vec![
        ("empty", input(&head, 0, &[], 0)),
        ("one-commit", input(&head, 0, &small, 0)),
        ("commits-that-wrap", input(&head, 0, &wrapped, 0)),
        ("torn-commit", input(&head, 0, &torn, 0)),
        ("two-epochs", input(&head, 9, &two_epochs, 0)),
        ("corrected", input(&head, 9, &wrapped, 0x10 | OWN | NEXT)),
        ("own-but-not-next", input(&head, 0, &small, OWN)),
        ("refused-last-numbers", input(&last, 0, &small, OWN | NEXT)),
    ]
}
