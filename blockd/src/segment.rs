//! A segment file from outside: its superblock copies, its creation, and sealed segments as
//! parents.
//!
//! Invariants:
//! - A segment appears under its final name only when its content is durable.
//! - The pair of copies {0, 1} is written only when the pair {2, 3} is durable and whole, and the
//!   other way round: see [`flip`].

use std::sync::Arc;

use format::limits::{PAGE, SEGMENTS_MAX, SUPERBLOCK_COPIES, SUPERBLOCK_OFFSETS};
use format::superblock::{Chosen, State, Superblock, choose};
use format::table::{ROW_BYTES, SegmentTable};
use format::units::PageNo;
use format::{Context, Error, Kind, Result, array};
use uuid::Uuid;

use crate::store::buf::AlignedBuf;
use crate::store::{File, ReadOp, WriteOp};

/// Name of a segment's file.
#[must_use]
pub fn file_name(segment: Uuid) -> String {
    format!("{segment}.seg")
}

/// Name of a segment that is being made: never opened, removed when found at start.
#[must_use]
pub fn new_name(segment: Uuid) -> String {
    format!("{segment}.new")
}

/// Name of a segment that is being deleted: its removal is finished when found at start.
#[must_use]
pub fn deleted_name(segment: Uuid) -> String {
    format!("{segment}.del")
}

/// Reads the four copies and picks the newest valid one.
///
/// # Errors
/// `Corrupt` when no copy is valid or the file is too short, `Unsupported` for a newer version.
pub fn read_superblock(file: &dyn File) -> Result<Chosen> {
    choose(&read_copies(file)?)
}

/// Reads the four copies as bytes.
///
/// # Errors
/// `Corrupt` when the file is too short to hold them, or what the host reports.
pub fn read_copies(file: &dyn File) -> Result<[[u8; PAGE]; SUPERBLOCK_COPIES]> {
    let size = file.size()?;
    if size < SUPERBLOCK_OFFSETS[SUPERBLOCK_COPIES - 1] + PAGE as u64 {
        let reason = format!("it has {size} bytes, too few for a segment: truncated or foreign");
        return Err(Error::corrupt(reason));
    }
    let mut buf = AlignedBuf::zeroed(SUPERBLOCK_COPIES * PAGE);
    let mut ops: Vec<_> = SUPERBLOCK_OFFSETS
        .iter()
        .zip(buf.chunks_exact_mut(PAGE))
        .map(|(offset, buf)| ReadOp { offset: *offset, buf })
        .collect();
    file.read_many(&mut ops)?;
    Ok(std::array::from_fn(|i| page(&buf, i)))
}

/// Page `i` of a buffer.
///
/// # Panics
/// When the buffer is shorter.
#[must_use]
pub fn page(buf: &[u8], i: usize) -> [u8; PAGE] {
    buf[i * PAGE..(i + 1) * PAGE].try_into().expect("a page")
}

/// One of the two pairs of superblock copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pair {
    /// Copies 0 and 1.
    First,
    /// Copies 2 and 3.
    Second,
}

/// Writes one pair of copies; not durable until the next sync.
///
/// # Errors
/// What the host reports.
pub fn write_pair(file: &dyn File, sb: &Superblock, pair: Pair) -> Result<()> {
    let copies = if pair == Pair::First { [0, 1] } else { [2, 3] };
    let bufs = copies.map(|c| AlignedBuf::from_slice(&sb.encode(c)));
    let ops = [0, 1].map(|i| WriteOp { offset: SUPERBLOCK_OFFSETS[copies[i]], buf: &bufs[i] });
    file.write_many(&ops)
}

/// Publishes a new superblock state. On entry the second pair must be durable (the caller has
/// synced since it was written), and everything that `sb` names must be durable. On success the new
/// state is durable in the first pair and written to the second; the next sync makes that durable
/// too.
///
/// A power cut while the first pair is written finds the old state whole in the second pair; after
/// the sync, the new state is whole in the first. Syncing between the pairs is what keeps a torn
/// write from hitting both (test: `crash_points::swapped_orders_are_caught`).
///
/// # Errors
/// What the host reports; the state on disk is then unknown and the disk must fail.
pub fn flip(file: &dyn File, sb: &Superblock) -> Result<()> {
    write_pair(file, sb, Pair::First)?;
    file.sync()?;
    write_pair(file, sb, Pair::Second)
}

/// Makes all four copies hold the present state, durably: whatever a crash left half-done is whole
/// now, and a [`flip`] may follow.
///
/// The first sync comes before anything is written: after a process kill the newest copies may be
/// in the page cache alone, and to write the other pair then would leave no durable one. Rewriting
/// a copy with the bytes it holds already cannot tear it.
///
/// # Errors
/// As [`read_superblock`], or what the host reports.
pub fn settle(file: &dyn File) -> Result<Superblock> {
    let chosen = read_superblock(file)?;
    file.sync()?;
    if chosen.complaints.iter().any(Option::is_some) {
        for pair in [Pair::Second, Pair::First] {
            write_pair(file, &chosen.superblock, pair)?;
            file.sync()?;
        }
    }
    Ok(chosen.superblock)
}

/// A sealed segment, open for reading.
pub struct Sealed {
    /// Its superblock.
    pub superblock: Superblock,
    /// Its file.
    pub file: Arc<dyn File>,
}

/// Finds segments by identity. The catalogue's side of the store: a header never names a path.
pub trait Segments: Send + Sync {
    /// A sealed segment.
    ///
    /// # Errors
    /// `ParentMissing` when it is not in the store, or what reading it reports.
    fn sealed(&self, segment: Uuid) -> Result<Arc<Sealed>>;
}

/// Checks that `file` holds the sealed segment `want`, and with that digest if one is known.
///
/// # Errors
/// `ParentChanged` when it does not.
pub fn check_sealed(sb: &Superblock, want: Uuid, digest: Option<[u8; 32]>) -> Result<()> {
    let changed = |why: String| {
        let hint = "put the recorded segment back, or restore the disk from a copy";
        Err(Error::new(Kind::ParentChanged, why).on(format!("segment {want}")).hint(hint))
    };
    if sb.segment != want {
        return changed(format!("its file holds segment {} instead", sb.segment));
    }
    if sb.state != State::Sealed {
        return changed("it is not sealed: something may be writing to it".into());
    }
    match digest {
        Some(d) if d != sb.digest => changed("its content digest is not the recorded one".into()),
        _ => Ok(()),
    }
}

/// Reads a checksummed array of a segment, refusing lengths that the file cannot hold before memory
/// is taken for them.
///
/// # Errors
/// `Corrupt` for an impossible place or a wrong checksum, or what the host reports.
pub fn read_array(file: &dyn File, at: array::ArrayRef, bytes_max: u64) -> Result<Vec<u8>> {
    check_array(file, at, bytes_max)?;
    array::read_all(at, &mut |page, buf| read_pages(file, page, buf))
}

/// The segment table of a segment, as it is there.
///
/// # Errors
/// As [`read_array`], or `Corrupt` for what is no table.
pub fn read_table(file: &dyn File, sb: &Superblock) -> Result<SegmentTable> {
    SegmentTable::decode(&read_array(file, sb.table, (SEGMENTS_MAX * ROW_BYTES) as u64)?)
}

/// The checksums of an array of a segment, with the same refusals as [`read_array`].
///
/// # Errors
/// As [`read_array`].
pub fn array_index(
    file: &dyn File,
    at: array::ArrayRef,
    bytes_max: u64,
) -> Result<array::ArrayIndex> {
    check_array(file, at, bytes_max)?;
    array::ArrayIndex::load(at, &mut |page, buf| read_pages(file, page, buf))
}

fn check_array(file: &dyn File, at: array::ArrayRef, bytes_max: u64) -> Result<()> {
    let end = at.page.plus(at.pages()).file_offset();
    if at.bytes > bytes_max || end > file.size()? {
        return Err(Error::corrupt("an array lies outside its file"));
    }
    Ok(())
}

/// Reads metadata pages from `page` on into `buf`.
///
/// # Errors
/// `Corrupt` past the end of the file, or what the host reports.
pub fn read_pages(file: &dyn File, page: PageNo, buf: &mut [u8]) -> Result<()> {
    let mut aligned = AlignedBuf::zeroed(buf.len());
    file.read_at(page.file_offset(), &mut aligned)
        .context("read", || format!("metadata page {page}"))?;
    buf.copy_from_slice(&aligned);
    Ok(())
}
