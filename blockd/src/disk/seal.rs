//! Sealing: the segment becomes immutable, gets a checksum for every data block and a content
//! digest.
//!
//! Order, and the crash it defends against: the flip to `Sealed, Pending` comes after a checkpoint
//! with an empty journal (a sealed segment is never replayed); sums are durable before the flip to
//! `Done` names them. A crash in between leaves a sealed segment whose sums are made again.
//!
//! Test: `crash_points` (operation `seal`).

use std::sync::Arc;

use blake3::Hasher;
use format::Result;
use format::entry::BlockState;
use format::limits::{BLOCK, BLOCKS_PER_EXTENT, EXTENT, HEADER_EXTENTS, LEAF_ENTRIES};
use format::superblock::{Attached, Seal, State};
use format::units::{BlockId, ExtentId, GuestBlock, LeafNo, crc, index};
use uuid::Uuid;

use super::map::Map;
use super::{Disk, Options};
use crate::segment::Segments;
use crate::store::File;
use crate::store::buf::AlignedBuf;

const DIGEST_CONTEXT: &[u8] = b"offshoot-segment-v1";
/// Blocks of an [`OwnRun`] at most, read at once: 1 MiB.
pub const RUN_BLOCKS: u64 = 256;

/// Checksums and digest of a segment's data.
pub struct Sums {
    /// CRC32C per block from the start of the data area on; zero for blocks the map does not name.
    pub crcs: Vec<u32>,
    /// BLAKE3 of the named blocks in file order, each with its place on the virtual disk.
    pub digest: [u8; 32],
}

impl Sums {
    /// The content of the checksummed array.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.crcs.iter().flat_map(|c| c.to_le_bytes()).collect()
    }
}

/// The content digest of a segment in the making.
pub struct Digest(Hasher);

impl Digest {
    /// The digest of a segment without data.
    #[must_use]
    pub fn new(segment: Uuid) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(DIGEST_CONTEXT).update(segment.as_bytes());
        Digest(hasher)
    }

    /// Adds an own block; blocks come in file order.
    pub fn add(&mut self, guest: GuestBlock, block: &[u8]) {
        self.0.update(&guest.0.to_le_bytes()).update(block);
    }

    /// The digest.
    #[must_use]
    pub fn finish(&self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// Own data blocks that follow each other in the file and on the virtual disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnRun {
    /// First block in the file.
    pub block: BlockId,
    /// First block of the virtual disk.
    pub guest: GuestBlock,
    /// Number of blocks, 256 at most: 1 MiB.
    pub count: u64,
}

impl OwnRun {
    fn continued_by(&self, next: &OwnRun) -> bool {
        self.block.plus(self.count) == next.block
            && self.guest.plus(self.count) == next.guest
            && self.count + next.count <= RUN_BLOCKS
    }
}

/// All own data blocks of a map, in file order.
///
/// # Errors
/// `Corrupt` in a damaged range.
pub fn own_runs(map: &Map, size: u64) -> Result<Vec<OwnRun>> {
    let mut pieces: Vec<OwnRun> = Vec::new();
    for leaf in (0..LeafNo::count_for(size)).map(LeafNo) {
        let first = leaf.first_extent().first_block();
        map.resolve(first, LEAF_ENTRIES as u64 * BLOCKS_PER_EXTENT, &mut |piece| {
            if let BlockState::Data { segment, block } = piece.state
                && segment == map.own()
            {
                for at in (0..piece.count).step_by(index(RUN_BLOCKS)) {
                    let count = RUN_BLOCKS.min(piece.count - at);
                    let (block, guest) = (block.plus(at), piece.block.plus(at));
                    pieces.push(OwnRun { block, guest, count });
                }
            }
            Ok(())
        })?;
    }
    pieces.sort_unstable_by_key(|run| run.block);
    let mut runs: Vec<OwnRun> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match runs.last_mut() {
            Some(run) if run.continued_by(&piece) => run.count += piece.count,
            _ => runs.push(piece),
        }
    }
    Ok(runs)
}

/// Reads the named blocks of a segment and sums them. `progress` gets the bytes done and in all.
///
/// # Errors
/// What the host reports, `Corrupt` in a damaged range, or what `progress` reports.
pub fn sum_segment(
    file: &dyn File,
    map: &Map,
    (size, data_start, segment): (u64, ExtentId, Uuid),
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Sums> {
    let runs = own_runs(map, size)?;
    let total: u64 = runs.iter().map(|run| run.count * BLOCK).sum();
    let base = data_start.0 * BLOCKS_PER_EXTENT;
    let end = runs.last().map_or(base, |run| run.block.0 + run.count);
    let mut crcs = vec![0; index(end - base).next_multiple_of(index(BLOCKS_PER_EXTENT))];
    let mut digest = Digest::new(segment);
    let mut buf = AlignedBuf::zeroed(index(RUN_BLOCKS * BLOCK));
    let mut done = 0;
    for run in runs {
        let bytes = &mut buf[..index(run.count * BLOCK)];
        file.read_at(run.block.file_offset(), bytes)?;
        for (i, block) in (0..).zip(bytes.chunks_exact(index(BLOCK))) {
            crcs[index(run.block.0 + i - base)] = crc(block);
            digest.add(run.guest.plus(i), block);
        }
        done += run.count * BLOCK;
        progress(done, total)?;
    }
    Ok(Sums { crcs, digest: digest.finish() })
}

impl Disk {
    /// Makes the disk immutable and sums its data. `progress` gets the bytes done and in all; an
    /// error from it leaves the disk sealed, with its sums to be made by sealing again.
    ///
    /// # Errors
    /// As [`Disk::checkpoint`], or what `progress` reports; `Corrupt` when a part of the map is
    /// damaged: the disk is then closed and not sealed.
    pub fn seal(self, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<[u8; 32]> {
        self.check_writable()?;
        // Before the flip: a sealed map is never mended, and one with a gap cannot be summed.
        let blocks = self.size().div_ceil(BLOCK);
        let whole = self.map.resolve(GuestBlock(0), blocks, &mut |_| Ok(()));
        if let Err(e) = whole.map_err(|e| e.within("seal", self.object())) {
            // The error that counts is the first one: what does not close now is as after a crash.
            let _ = self.close();
            return Err(e);
        }
        let sealed = self.seal_inner(progress).map_err(|e| e.within("seal", self.object()))?;
        self.tail.remove()?;
        Ok(sealed)
    }

    /// Makes the disk immutable for a fork: it goes on in the segment `successor`. Nobody may have
    /// a request in work ([`Disk::pause`]). Sums are made later ([`Disk::finish_seal`]): they cost
    /// as much as the disk has data, and a fork does not.
    ///
    /// # Errors
    /// As [`Disk::checkpoint`]; whether the disk is frozen is then what its superblock says.
    pub fn freeze(&self, successor: Uuid) -> Result<()> {
        self.check_writable()?;
        // A sealed map is never mended. Damage that nobody has met is met by who makes the sums.
        self.check_undamaged().map_err(|e| e.within("freeze", self.object()))?;
        // Nobody else syncs meanwhile: the host tells of a failure once, and it must come here.
        let sealed = self.alone_in_turn(|| {
            self.flush_once()?;
            self.finish_flushed(|sb| {
                sb.state = State::Sealed;
                sb.seal = Seal::Pending;
                sb.successor = successor;
            })
        });
        sealed.map_err(|e| e.within("freeze", self.object()))?;
        self.tail.remove()
    }

    /// Makes the disk immutable where it is, because others are to stand on it. As
    /// [`Disk::freeze`], without a successor: it does not go on.
    ///
    /// # Errors
    /// As [`Disk::freeze`].
    pub fn pin(&self) -> Result<()> {
        self.freeze(Uuid::nil())
    }

    fn seal_inner(&self, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<[u8; 32]> {
        self.finish(|sb| {
            sb.state = State::Sealed;
            sb.seal = Seal::Pending;
        })?;
        self.make_sums(progress)
    }

    /// Makes the sums of a segment whose sealing was cut short: it is immutable already.
    ///
    /// # Errors
    /// As [`Disk::seal`].
    pub fn finish_seal(
        file: Arc<dyn File>,
        segments: &dyn Segments,
        options: &Options,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<[u8; 32]> {
        let disk = Disk::open_pending(file, segments, options)?;
        disk.make_sums(progress).map_err(|e| e.within("seal", disk.object()))
    }

    fn make_sums(&self, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<[u8; 32]> {
        let facts = (self.size(), self.data_start, self.segment);
        let sums = sum_segment(self.file.as_ref(), &self.map, facts, progress)?;
        let array = self.write_array(&sums.encode())?;
        self.sync()?;
        let mut state = self.checkpoint.lock();
        let mut sb = state.superblock.clone();
        sb.generation = sb.generation.next();
        sb.seal = Seal::Done;
        sb.attached = Attached::No;
        sb.sums = array;
        sb.digest = sums.digest;
        sb.extents_end = self.core.lock().space.end();
        self.flip(&mut state, sb)?;
        self.sync()?;
        // Nobody replays it any more.
        let ring = HEADER_EXTENTS * EXTENT;
        self.punch(ring, self.data_start.file_offset() - ring);
        self.file.set_read_only(true)?;
        Ok(sums.digest)
    }
}

/// Bytes of the sums array of a segment that ends at `extents_end`, at most.
#[must_use]
pub fn sums_bytes_max(data_start: ExtentId, extents_end: ExtentId) -> u64 {
    extents_end.0.saturating_sub(data_start.0) * (EXTENT / BLOCK) * 4
}
