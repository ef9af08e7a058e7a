//! Digest of a sealed disk's whole content: what tells whether two disks, of whatever stores, hold
//! the same.
//!
//! It is made of the size and of the CRC32C of every block that is not zero, with its place. So it
//! depends on neither segments, nor places in files, nor on how zeroes are stored. Sums that were
//! made by sealing are taken as they are: of most disks, four bytes are read for a block of 4 KiB.
//! It tells disks apart that were mistaken for each other, and is no proof against a forger.

use std::collections::HashMap;

use format::entry::BlockState;
use format::limits::BLOCK;
use format::units::{BlockId, GuestBlock, crc, index};
use format::{Context as _, Error, Result};
use uuid::Uuid;

use super::{disk_options, hex};
use crate::api::types::Digested;
use crate::check::sums::SumReader;
use crate::disk::Disk;
use crate::disk::map::Piece;
use crate::pump::Watch;
use crate::store::Access;
use crate::store::buf::AlignedBuf;
use crate::storedir::StoreDir;

const CONTEXT: &[u8] = b"offshoot-content-v1";
/// Blocks of the map looked at in one call: 512 MiB of disk.
const WINDOW: u64 = (512 << 20) / BLOCK;
/// Blocks whose sums are hashed at a time.
const BATCH: u64 = 16 << 10;

/// The digest of a sealed disk's content.
///
/// # Errors
/// `Invalid` when the disk is not sealed, `NotFound`, `Corrupt`, or what `watch` reports.
pub fn digest(dir: &StoreDir, name: &str, watch: &dyn Watch) -> Result<Digested> {
    let run = || {
        if !dir.disk(name)?.sealed {
            return Err(Error::invalid("it is not sealed, and may change")
                .hint(format!("seal it first: `offshoot disk seal {name}`")));
        }
        let disk = dir.open_disk(name, Access::Read, &disk_options(dir, false))?;
        let digest = Digester::new(dir, &disk).run(watch)?;
        Ok(Digested { disk: name.into(), size: disk.size(), digest: hex(&digest) })
    };
    run().context("digest", || format!("disk {name}"))
}

struct Digester<'a> {
    dir: &'a StoreDir,
    disk: &'a Disk,
    hasher: blake3::Hasher,
    /// Sums by segment; `None` where a segment has none.
    sums: HashMap<Uuid, Option<SumReader>>,
    /// Sum of a block of zeroes.
    zero: u32,
    block: AlignedBuf,
}

impl<'a> Digester<'a> {
    fn new(dir: &'a StoreDir, disk: &'a Disk) -> Self {
        let block = AlignedBuf::zeroed(index(BLOCK));
        let mut hasher = blake3::Hasher::new();
        hasher.update(CONTEXT).update(&disk.size().to_le_bytes());
        Digester { dir, disk, hasher, sums: HashMap::new(), zero: crc(&block), block }
    }

    fn run(mut self, watch: &dyn Watch) -> Result<[u8; 32]> {
        let size = self.disk.size();
        let blocks = size.div_ceil(BLOCK);
        let mut pieces = Vec::new();
        for first in (0..blocks).step_by(index(WINDOW)) {
            let count = WINDOW.min(blocks - first);
            pieces.clear();
            self.disk.map().resolve(GuestBlock(first), count, &mut |piece| {
                pieces.push(piece);
                Ok(())
            })?;
            pieces.iter().try_for_each(|piece| self.add(piece, watch))?;
            watch.set(((first + count) * BLOCK).min(size), size);
            watch.check()?;
        }
        Ok(self.hasher.finalize().into())
    }

    fn add(&mut self, piece: &Piece, watch: &dyn Watch) -> Result<()> {
        let BlockState::Data { segment, block } = piece.state else { return Ok(()) };
        let table = self.disk.table();
        let row = table.row(segment)?;
        let (segment, place) = (row.segment, BlockId(block.0 + row.base.block(0).0));
        drop(table);
        for from in (0..piece.count).step_by(index(BATCH)) {
            let mut batch = Vec::new();
            for i in from..piece.count.min(from + BATCH) {
                let guest = piece.block.plus(i);
                let sum = self.sum(guest, (segment, place.plus(i)))?;
                if sum != self.zero {
                    batch.extend_from_slice(&guest.0.to_le_bytes());
                    batch.extend_from_slice(&sum.to_le_bytes());
                }
            }
            self.hasher.update(&batch);
            watch.check()?;
        }
        Ok(())
    }

    fn sum(&mut self, guest: GuestBlock, (segment, place): (Uuid, BlockId)) -> Result<u32> {
        let sums = match self.sums.get_mut(&segment) {
            Some(sums) => sums,
            None => {
                let sums = self.dir.sums(segment)?;
                self.sums.entry(segment).or_insert(sums)
            }
        };
        let at = guest.offset().0;
        let len = BLOCK.min(self.disk.size() - at);
        match sums {
            Some(sums) if len == BLOCK => {
                sums.get(place).context("read", || format!("segment {segment}"))
            }
            // Of a last block that is partial, the rest is no content.
            _ => {
                self.block.fill(0);
                self.disk.read(0, at, &mut self.block[..index(len)])?;
                Ok(crc(&self.block))
            }
        }
    }
}
