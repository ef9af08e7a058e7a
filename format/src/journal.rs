//! The journal: a ring of closed pages that holds what changed in the map since the last
//! checkpoint.
//!
//! Layout: `docs/format.md` §7. Invariants:
//! - A page that holds durable records is never rewritten before a checkpoint has moved the head
//!   past it: each commit starts a new page.
//! - Replay accepts a page only with the position, sequence number and predecessor it expects, and
//!   with an epoch not below that of its predecessor. The epoch grows at every opening for writing,
//!   so what an unfinished commit left behind is never taken for the continuation of a later page.
//! - Records are idempotent: replaying from an earlier head over a map that already holds later
//!   changes ends in the same map, as long as replay reaches the last change the map holds.

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::{BLOCK, BLOCKS_PER_EXTENT, PAGE, SEGMENT_EXTENTS_MAX, VIRTUAL_SIZE_MAX};
use crate::superblock::{JournalHead, Superblock};
use crate::units::{BlockId, Epoch, GuestBlock, crc};
use crate::{Error, Kind, Result};

const MAGIC: u32 = u32::from_le_bytes(*b"OJNL");
const HEADER_BYTES: usize = 64;
/// Bytes of a record.
pub const RECORD_BYTES: usize = 32;
/// Records in a full page.
pub const RECORDS_PER_PAGE: usize = (PAGE - HEADER_BYTES) / RECORD_BYTES;

/// One change of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// `count` blocks from `block` on now lie in the own segment from `target` on.
    Map {
        /// First block of the virtual disk.
        block: GuestBlock,
        /// Number of blocks.
        count: u64,
        /// First block in the own segment, at the same index inside its extent.
        target: BlockId,
    },
    /// `count` blocks from `block` on are explicitly zero.
    Zero {
        /// First block of the virtual disk.
        block: GuestBlock,
        /// Number of blocks.
        count: u64,
    },
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    kind: u8,
    flags: u8,
    reserved: U16,
    data_crc: U32,
    block: U64,
    count: U64,
    target: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    crc: U32,
    segment: [u8; 16],
    epoch: U64,
    first_seq: U64,
    commit_seq: U64,
    position: U64,
    prev_crc: U32,
    count: U16,
    reserved: U16,
}

const _: () = assert!(size_of::<RawRecord>() == RECORD_BYTES);
const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

impl Record {
    /// The record as it is stored.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let (kind, block, count, target) = match *self {
            Record::Map { block, count, target } => (1, block.0, count, target.0),
            Record::Zero { block, count } => (2, block.0, count, 0),
        };
        let raw = RawRecord {
            kind,
            flags: 0,
            reserved: 0.into(),
            data_crc: 0.into(),
            block: block.into(),
            count: count.into(),
            target: target.into(),
        };
        raw.as_bytes().try_into().expect("a record's size")
    }

    /// The one decode point of records.
    ///
    /// # Errors
    /// `Unsupported` for an unknown kind, `Corrupt` for impossible values.
    pub fn decode(bytes: &[u8; RECORD_BYTES]) -> Result<Self> {
        let raw = RawRecord::ref_from_bytes(bytes).expect("a record's size");
        let (block, count, target) = (raw.block.get(), raw.count.get(), raw.target.get());
        let blocks_max = VIRTUAL_SIZE_MAX / BLOCK;
        if count == 0 || block.checked_add(count).is_none_or(|end| end > blocks_max) {
            return Err(Error::corrupt("a journal record lies outside the virtual disk"));
        }
        if (raw.flags, raw.reserved.get(), raw.data_crc.get()) != (0, 0, 0) {
            return Err(Error::corrupt("a journal record has reserved bits set"));
        }
        match raw.kind {
            1 => {
                let end = target.checked_add(count);
                if end.is_none_or(|e| e > SEGMENT_EXTENTS_MAX * BLOCKS_PER_EXTENT) {
                    return Err(Error::corrupt("a journal record points outside its segment"));
                }
                if target % BLOCKS_PER_EXTENT != block % BLOCKS_PER_EXTENT {
                    return Err(Error::corrupt("a journal record breaks natural placement"));
                }
                Ok(Record::Map { block: GuestBlock(block), count, target: BlockId(target) })
            }
            2 if target == 0 => Ok(Record::Zero { block: GuestBlock(block), count }),
            2 => Err(Error::corrupt("a zero record has a target")),
            k => Err(Error::new(Kind::Unsupported, format!("journal record kind {k} is unknown"))),
        }
    }

    /// First block and number of blocks that the record is about.
    #[must_use]
    pub fn range(&self) -> (GuestBlock, u64) {
        match *self {
            Record::Map { block, count, .. } | Record::Zero { block, count } => (block, count),
        }
    }
}

/// A journal page to be written.
#[derive(Debug, Clone)]
pub struct PageWrite {
    /// Page of the ring.
    pub position: u64,
    /// Content.
    pub bytes: [u8; PAGE],
}

/// Pages that a commit of `records` records takes.
#[must_use]
pub fn pages_for(records: usize) -> u64 {
    records.div_ceil(RECORDS_PER_PAGE) as u64
}

/// The pages of one commit that continues at `at`, and where the next commit continues. The first
/// record gets sequence number `at.seq`.
#[must_use]
pub fn encode_commit(
    at: &JournalHead,
    segment: Uuid,
    ring_pages: u64,
    records: &[Record],
) -> (Vec<PageWrite>, JournalHead) {
    let commit_seq = at.seq;
    let mut next = *at;
    let mut pages = Vec::with_capacity(records.len().div_ceil(RECORDS_PER_PAGE));
    for chunk in records.chunks(RECORDS_PER_PAGE) {
        let header = RawHeader {
            magic: MAGIC.into(),
            crc: 0.into(),
            segment: segment.into_bytes(),
            epoch: next.epoch.0.into(),
            first_seq: next.seq.0.into(),
            commit_seq: commit_seq.0.into(),
            position: next.position.into(),
            prev_crc: next.prev_crc.into(),
            count: u16::try_from(chunk.len()).expect("126 at most").into(),
            reserved: 0.into(),
        };
        let mut bytes = [0; PAGE];
        bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        for (slot, record) in bytes[HEADER_BYTES..].chunks_exact_mut(RECORD_BYTES).zip(chunk) {
            slot.copy_from_slice(&record.encode());
        }
        let sum = crc(&bytes[8..]);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        pages.push(PageWrite { position: next.position, bytes });
        next.position = (next.position + 1) % ring_pages;
        next.seq = next.seq.plus(chunk.len() as u64);
        next.prev_crc = sum;
    }
    (pages, next)
}

/// Walks the ring from the head; feed it page after page.
#[derive(Debug)]
pub struct Replay {
    segment: Uuid,
    ring_pages: u64,
    at: JournalHead,
    epoch_max: Epoch,
    seen: u64,
}

/// What a page of the ring turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// The next page of the journal, with its records in order.
    Records(Vec<Record>),
    /// The journal ends before this page.
    End,
}

impl Replay {
    /// Replay of the journal that a superblock names.
    #[must_use]
    pub fn new(sb: &Superblock) -> Self {
        Replay {
            segment: sb.segment,
            ring_pages: sb.journal_pages(),
            at: sb.journal,
            epoch_max: sb.epoch,
            seen: 0,
        }
    }

    /// Where replay stands: the page to feed next, and where a writer of the same epoch continues.
    #[must_use]
    pub fn at(&self) -> JournalHead {
        self.at
    }

    /// Takes the page at `self.at().position`.
    ///
    /// # Errors
    /// `Corrupt` or `Unsupported` when the page belongs to the journal (its checksum and place are
    /// right) but holds a record that no writer of this version makes.
    pub fn feed(&mut self, page: &[u8; PAGE]) -> Result<Step> {
        let Some(header) = self.own_page(page, self.epoch_max.0) else {
            return Ok(Step::End);
        };
        let expected = header.first_seq.get() == self.at.seq.0
            && header.position.get() == self.at.position
            && header.prev_crc.get() == self.at.prev_crc
            && self.seen < self.ring_pages;
        if !expected {
            return Ok(Step::End);
        }
        let count = usize::from(header.count.get());
        let records: Vec<Record> = page[HEADER_BYTES..]
            .chunks_exact(RECORD_BYTES)
            .take(count)
            .map(|b| Record::decode(b.try_into().expect("a record's size")))
            .collect::<Result<_>>()?;
        if records.len() != count || count == 0 {
            return Err(Error::corrupt("a journal page counts more records than it holds"));
        }
        self.at.prev_crc = header.crc.get();
        self.at.epoch = Epoch(header.epoch.get());
        self.at.seq = self.at.seq.plus(records.len() as u64);
        self.at.position = (self.at.position + 1) % self.ring_pages;
        self.seen += 1;
        Ok(Step::Records(records))
    }

    /// After the end: is `page` proof that durable records are missing? It is when it belongs to a
    /// commit that began later than the point where replay stopped, because a commit begins only
    /// after the one before it was durable. A page of a later epoch than the superblock knows
    /// proves that the superblock is an old one.
    #[must_use]
    pub fn proves_loss(&self, page: &[u8; PAGE]) -> bool {
        self.own_page(page, u64::MAX)
            .is_some_and(|h| h.commit_seq.get() > self.at.seq.0 || h.epoch.get() > self.epoch_max.0)
    }

    fn own_page<'a>(&self, page: &'a [u8; PAGE], epoch_max: u64) -> Option<&'a RawHeader> {
        let header = RawHeader::ref_from_bytes(&page[..HEADER_BYTES]).expect("the header's size");
        let own = header.magic.get() == MAGIC
            && header.segment == self.segment.into_bytes()
            && (self.at.epoch.0..=epoch_max).contains(&header.epoch.get())
            && header.crc.get() == crc(&page[8..]);
        own.then_some(header)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::superblock::tests::sample;
    use crate::units::Seq;

    const RING: u64 = 16;
    const SEGMENT: Uuid = Uuid::from_u128(77);

    fn head() -> JournalHead {
        JournalHead { epoch: Epoch(3), position: 14, seq: Seq(1000), prev_crc: 0 }
    }

    fn records(n: usize) -> Vec<Record> {
        (0..n as u64)
            .map(|i| match i % 2 {
                0 => Record::Map { block: GuestBlock(i), count: 1, target: BlockId(i + 320) },
                _ => Record::Zero { block: GuestBlock(i), count: 9 },
            })
            .collect()
    }

    fn replay(ring: &[[u8; PAGE]]) -> (Vec<Record>, Replay) {
        let sb = Superblock {
            segment: SEGMENT,
            journal_extents: 1,
            journal: head(),
            epoch: Epoch(4),
            ..sample()
        };
        let mut replay = Replay::new(&sb);
        let mut all = Vec::new();
        while let Step::Records(r) =
            replay.feed(&ring[crate::units::index(replay.at().position)]).unwrap()
        {
            all.extend(r);
        }
        (all, replay)
    }

    fn write(ring: &mut [[u8; PAGE]], pages: &[PageWrite]) {
        for p in pages {
            ring[crate::units::index(p.position)] = p.bytes;
        }
    }

    #[test]
    fn commits_wrap_around_and_replay_in_order() {
        let mut ring = vec![[0; PAGE]; 16];
        let (first, at) = encode_commit(&head(), SEGMENT, RING, &records(200));
        let (second, end) = encode_commit(&at, SEGMENT, RING, &records(5));
        write(&mut ring, &first);
        write(&mut ring, &second);

        let (all, replay) = replay(&ring);

        assert_eq!(all.len(), 205);
        assert_eq!(replay.at(), end);
        assert_eq!(end.position, (14 + 3) % RING);
    }

    #[test]
    fn a_torn_last_commit_is_the_end_but_a_hole_before_a_later_commit_is_loss() {
        let (first, at) = encode_commit(&head(), SEGMENT, RING, &records(200));
        let (second, _) = encode_commit(&at, SEGMENT, RING, &records(5));
        let mut torn = vec![[0; PAGE]; 16];
        torn[15] = first[1].bytes;
        let mut holed = torn.clone();
        write(&mut holed, &second);

        let (none, at_torn) = replay(&torn);
        let (also_none, at_holed) = replay(&holed);

        assert!(none.is_empty() && also_none.is_empty());
        assert!(!torn.iter().any(|p| at_torn.proves_loss(p)));
        assert!(holed.iter().any(|p| at_holed.proves_loss(p)));
    }

    #[test]
    fn pages_of_an_older_epoch_or_another_segment_are_not_replayed() {
        let old = JournalHead { epoch: Epoch(2), ..head() };
        let mut ring = vec![[0; PAGE]; 16];
        write(&mut ring, &encode_commit(&old, SEGMENT, RING, &records(3)).0);
        assert!(replay(&ring).0.is_empty());

        write(&mut ring, &encode_commit(&head(), Uuid::from_u128(1), RING, &records(3)).0);

        assert!(replay(&ring).0.is_empty());
    }

    /// Story: an unfinished commit left its second page but not its first. The next opening wrote a
    /// new first page; its successor's place held the old second page, with the right number.
    #[test]
    fn a_page_left_by_an_unfinished_commit_never_continues_a_later_epoch() {
        let mut ring = vec![[0; PAGE]; 16];
        let (unfinished, _) = encode_commit(&head(), SEGMENT, RING, &records(200));
        write(&mut ring, &unfinished[1..]);
        let again = JournalHead { epoch: Epoch(4), ..head() };
        let (first, end) = encode_commit(&again, SEGMENT, RING, &records(RECORDS_PER_PAGE));
        write(&mut ring, &first);

        let (all, replay) = replay(&ring);

        assert_eq!(all.len(), RECORDS_PER_PAGE);
        assert_eq!(replay.at(), end);
    }

    #[test]
    fn a_full_ring_is_replayed_once_around() {
        let mut ring = vec![[0; PAGE]; 16];
        let (pages, _) = encode_commit(&head(), SEGMENT, RING, &records(16 * RECORDS_PER_PAGE));
        write(&mut ring, &pages);

        assert_eq!(replay(&ring).0.len(), 16 * RECORDS_PER_PAGE);
    }

    proptest! {
        #[test]
        fn records_decode_to_themselves_or_are_refused(bytes: [u8; RECORD_BYTES]) {
            if let Ok(r) = Record::decode(&bytes) {
                prop_assert_eq!(r.encode(), bytes);
            }
        }
    }
}
