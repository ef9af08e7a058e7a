//! Unaligned access to a file that is open for direct I/O, by way of an aligned buffer.
//!
//! Invariants:
//! - Every transfer starts and ends on a block ([`Align::offset`] bytes) and uses page-aligned
//!   memory.
//! - A write touches only the blocks that its range touches. Blocks that it covers in part are read
//!   first and written back with their other bytes unchanged. Whoever writes those other bytes at
//!   the same time may lose: the caller excludes that (within one handle the handle does it).
//! - A write leaves the length at `max(old length, end of the write)`. Between the transfer and
//!   the cut a killed process leaves a longer file whose excess is zero; nobody else may change the
//!   length meanwhile (same rule, same lock).

use rustix::fd::BorrowedFd;
use rustix::io::{Errno, pread, pwrite, retry_on_intr};

use super::super::buf::AlignedBuf;
use super::to_usize;

/// Bytes of one transfer at most; a multiple of every alignment that is accepted.
const CHUNK: usize = 1 << 20;

/// What direct I/O asks of addresses and of offsets and lengths, in bytes (powers of two).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Align {
    pub(super) memory: usize,
    pub(super) offset: usize,
}

impl Align {
    /// True when the range needs no bounce buffer.
    pub(super) fn fits(self, buf: &[u8], offset: u64) -> bool {
        buf.as_ptr().addr() & (self.memory - 1) == 0
            && (to_usize(offset) | buf.len()) & (self.offset - 1) == 0
    }

    /// True when the range begins or ends inside a block.
    pub(super) fn splits_block(self, len: usize, offset: u64) -> bool {
        (to_usize(offset) | len) & (self.offset - 1) != 0
    }
}

/// One chunk of a range: `lead` bytes of the first block come before it, `span` is whole blocks.
struct Chunk {
    start: u64,
    lead: usize,
    take: usize,
    span: usize,
}

impl Chunk {
    fn at(offset: u64, len: usize, align: Align) -> Self {
        let lead = to_usize(offset) & (align.offset - 1);
        let take = len.min(CHUNK - lead);
        Chunk {
            start: offset - lead as u64,
            lead,
            take,
            span: (lead + take).next_multiple_of(align.offset),
        }
    }
}

/// A buffer that fits every chunk of a range: a first chunk that is not the only one is full-sized.
fn buffer(offset: u64, len: usize, align: Align) -> AlignedBuf {
    AlignedBuf::zeroed(Chunk::at(offset, len, align).span)
}

/// Reads from `offset` until `buf` is full or the file ends; returns the bytes read.
fn fill(fd: BorrowedFd<'_>, align: Align, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buf.len() {
        let got = retry_on_intr(|| pread(fd, &mut buf[done..], offset + done as u64))?;
        done += got;
        if got == 0 || !done.is_multiple_of(align.offset) {
            // A direct read stops inside a block only where the file ends.
            break;
        }
    }
    Ok(done)
}

/// Fills `out` from `offset`; returns the number of bytes before the file ended.
pub(super) fn read(
    fd: BorrowedFd<'_>,
    align: Align,
    offset: u64,
    out: &mut [u8],
) -> Result<usize, Errno> {
    let mut bounce = buffer(offset, out.len(), align);
    let mut done = 0;
    while done < out.len() {
        let chunk = Chunk::at(offset + done as u64, out.len() - done, align);
        let got = fill(fd, align, chunk.start, &mut bounce[..chunk.span])?;
        let usable = got.saturating_sub(chunk.lead).min(chunk.take);
        out[done..done + usable].copy_from_slice(&bounce[chunk.lead..chunk.lead + usable]);
        done += usable;
        if usable < chunk.take {
            break;
        }
    }
    Ok(done)
}

/// Writes all of `data` at `offset`. A failure leaves the range undefined but the length right.
pub(super) fn write(
    fd: BorrowedFd<'_>,
    align: Align,
    offset: u64,
    data: &[u8],
) -> Result<(), Errno> {
    let end = offset + data.len() as u64;
    if end.is_multiple_of(align.offset as u64) {
        return write_blocks(fd, align, offset, data);
    }
    let size = || rustix::fs::fstat(fd).map(|stat| stat.st_size.cast_unsigned());
    let len = end.max(size()?);
    let written = write_blocks(fd, align, offset, data);
    let cut = match size()? > len {
        true => retry_on_intr(|| rustix::fs::ftruncate(fd, len)),
        false => Ok(()),
    };
    written.and(cut)
}

fn write_blocks(fd: BorrowedFd<'_>, align: Align, offset: u64, data: &[u8]) -> Result<(), Errno> {
    let mut bounce = buffer(offset, data.len(), align);
    let mut done = 0;
    while done < data.len() {
        let chunk = Chunk::at(offset + done as u64, data.len() - done, align);
        let buf = &mut bounce[..chunk.span];
        load_edges(fd, align, &chunk, buf)?;
        buf[chunk.lead..chunk.lead + chunk.take].copy_from_slice(&data[done..done + chunk.take]);
        write_all(fd, chunk.start, buf)?;
        done += chunk.take;
    }
    Ok(())
}

/// Plain writes until all of `data` is in the file.
pub(super) fn write_all(fd: BorrowedFd<'_>, offset: u64, data: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < data.len() {
        match retry_on_intr(|| pwrite(fd, &data[done..], offset + done as u64))? {
            0 => return Err(Errno::IO),
            sent => done += sent,
        }
    }
    Ok(())
}

/// Reads the first and the last block of a chunk where the write covers them in part.
fn load_edges(
    fd: BorrowedFd<'_>,
    align: Align,
    chunk: &Chunk,
    buf: &mut [u8],
) -> Result<(), Errno> {
    let mut load = |block: usize| {
        let part = &mut buf[block..block + align.offset];
        let got = fill(fd, align, chunk.start + block as u64, part)?;
        part[got..].fill(0);
        Ok(())
    };
    let last = chunk.span - align.offset;
    let tail_split = chunk.lead + chunk.take < chunk.span;
    if chunk.lead > 0 || (tail_split && last == 0) {
        load(0)?;
    }
    if tail_split && last > 0 {
        load(last)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// A process killed between the transfer and the cut must not leave bytes of an earlier chunk
    /// past the end.
    #[test]
    fn what_a_write_adds_past_its_end_is_zero() {
        let file = tempfile::tempfile().unwrap();
        let align = Align { memory: 1, offset: 4096 };
        let data = vec![0xff; CHUNK + 100];

        write_blocks(file.as_fd(), align, 0, &data).unwrap();

        assert_eq!(file.metadata().unwrap().len(), CHUNK as u64 + 4096);
        let mut excess = vec![1; 4096 - 100];
        file.read_exact_at(&mut excess, CHUNK as u64 + 100).unwrap();
        assert!(excess.iter().all(|byte| *byte == 0));
    }
}
