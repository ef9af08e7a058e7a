//! The segment table: what the segment indices of one map mean.
//!
//! Layout: `docs/format.md` §5. Invariants:
//! - Row numbers are stable along a chain: a child's table is its parent's plus rows of its own, so
//!   map pages of the parent mean the same in the child. A row that no map page names any more may
//!   mean another segment later.
//! - A row names a segment by identity, and by content digest once its seal is done; never by path.

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::{SEGMENT_EXTENTS_MAX, SEGMENTS_MAX};
use crate::units::{ExtentId, SegmentIdx};
use crate::{Error, Kind, Result};

/// Bytes of a row.
pub const ROW_BYTES: usize = 64;

/// One segment that a map may point into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Identity of the segment; nil for a row that is no longer used.
    pub segment: Uuid,
    /// Content digest; `None` while the segment is active or its seal is pending.
    pub digest: Option<[u8; 32]>,
    /// Added to every extent number of an entry that uses this row.
    pub base: ExtentId,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRow {
    segment: [u8; 16],
    digest: [u8; 32],
    base: U64,
    flags: U32,
    reserved: U32,
}

const HAS_DIGEST: u32 = 1;
const _: () = assert!(size_of::<RawRow>() == ROW_BYTES);

/// The rows of one map, by segment index.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SegmentTable {
    rows: Vec<Row>,
}

impl SegmentTable {
    /// The row of `index`.
    ///
    /// # Errors
    /// `Corrupt` when the table has no such row, or the row is unused.
    pub fn row(&self, index: SegmentIdx) -> Result<&Row> {
        let row = self.rows.get(usize::from(index.get())).filter(|r| !r.segment.is_nil());
        row.ok_or_else(|| Error::corrupt(format!("the segment table has no row {index}")))
    }

    /// All rows with their index, unused ones left out.
    pub fn iter(&self) -> impl Iterator<Item = (SegmentIdx, &Row)> {
        let used = self.rows.iter().enumerate().filter(|(_, row)| !row.segment.is_nil());
        used.map(|(i, row)| (SegmentIdx::new(i as u64).expect("rows are counted"), row))
    }

    /// Number of rows, unused ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True when there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Adds a row: in the place of the first unused one, else at the end.
    ///
    /// # Errors
    /// `Invalid` when the table is full.
    pub fn add(&mut self, row: Row) -> Result<SegmentIdx> {
        if let Some(unused) = self.rows.iter().position(|r| r.segment.is_nil()) {
            self.rows[unused] = row;
            return SegmentIdx::new(unused as u64);
        }
        if self.rows.len() >= SEGMENTS_MAX {
            let reason = format!("a disk can stand on at most {SEGMENTS_MAX} segments");
            return Err(Error::new(Kind::Invalid, reason).hint("flatten it first"));
        }
        self.rows.push(row);
        SegmentIdx::new(self.rows.len() as u64 - 1)
    }

    /// Empties the rows that `keep` says no to: no map page may name them.
    pub fn retain(&mut self, keep: impl Fn(SegmentIdx) -> bool) {
        let dropped: Vec<SegmentIdx> = self.iter().map(|(i, _)| i).filter(|i| !keep(*i)).collect();
        for i in dropped {
            self.rows[usize::from(i.get())] =
                Row { segment: Uuid::nil(), digest: None, base: ExtentId(0) };
        }
        while self.rows.last().is_some_and(|row| row.segment.is_nil()) {
            self.rows.pop();
        }
    }

    /// Records the digest of a segment whose seal is done.
    pub fn set_digest(&mut self, segment: Uuid, digest: [u8; 32]) {
        for row in self.rows.iter_mut().filter(|r| r.segment == segment) {
            row.digest = Some(digest);
        }
    }

    /// The table as bytes: the content of a checksummed array.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.rows.len() * ROW_BYTES);
        for row in &self.rows {
            let raw = RawRow {
                segment: row.segment.into_bytes(),
                digest: row.digest.unwrap_or_default(),
                base: row.base.0.into(),
                flags: if row.digest.is_some() { HAS_DIGEST } else { 0 }.into(),
                reserved: 0.into(),
            };
            bytes.extend_from_slice(raw.as_bytes());
        }
        bytes
    }

    /// The one decode point of segment tables.
    ///
    /// # Errors
    /// `Corrupt` for a wrong length, too many rows or impossible values.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if !bytes.len().is_multiple_of(ROW_BYTES) || bytes.len() / ROW_BYTES > SEGMENTS_MAX {
            return Err(Error::corrupt("the segment table has an impossible length"));
        }
        let rows = bytes.chunks_exact(ROW_BYTES).map(|chunk| {
            let raw = RawRow::ref_from_bytes(chunk).expect("a row's size");
            let flags = raw.flags.get();
            if flags & !HAS_DIGEST != 0 || raw.reserved.get() != 0 {
                return Err(Error::corrupt("a segment table row has reserved bits set"));
            }
            if raw.base.get() >= SEGMENT_EXTENTS_MAX {
                return Err(Error::corrupt("a segment table row starts outside its segment"));
            }
            Ok(Row {
                segment: Uuid::from_bytes(raw.segment),
                digest: (flags & HAS_DIGEST != 0).then_some(raw.digest),
                base: ExtentId(raw.base.get()),
            })
        });
        Ok(SegmentTable { rows: rows.collect::<Result<_>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: u128) -> Row {
        Row { segment: Uuid::from_u128(n), digest: None, base: ExtentId(0) }
    }

    #[test]
    fn rows_survive_a_round_trip_and_unused_ones_are_not_served() {
        let mut table = SegmentTable::default();
        let a = table.add(row(1)).unwrap();
        let b = table.add(row(0)).unwrap();
        table.set_digest(Uuid::from_u128(1), [9; 32]);

        let again = SegmentTable::decode(&table.encode()).unwrap();

        assert_eq!(again, table);
        assert_eq!(again.row(a).unwrap().digest, Some([9; 32]));
        assert!(again.row(b).is_err());
        assert_eq!(again.iter().count(), 1);
        // The unused row is there for the next segment; rows in use stay where they are.
        let mut more = again;
        assert_eq!(more.add(row(7)).unwrap(), b);
        assert_eq!(more.add(row(8)).unwrap().get(), 2);
        more.retain(|i| i == b);
        assert_eq!((more.len(), more.iter().count()), (2, 1));
        assert_eq!(more.row(b).unwrap().segment, Uuid::from_u128(7));
    }

    #[test]
    fn a_full_table_refuses_by_name() {
        let mut table = SegmentTable { rows: vec![row(1); SEGMENTS_MAX] };

        let err = table.add(row(2)).unwrap_err();

        assert!(err.to_string().contains("16000 segments"), "{err}");
    }

    #[test]
    fn impossible_rows_are_corrupt() {
        let mut bytes = SegmentTable { rows: vec![row(1)] }.encode();
        assert!(SegmentTable::decode(&bytes[..63]).is_err());
        bytes[56] = 2;
        assert!(SegmentTable::decode(&bytes).is_err());
    }
}
