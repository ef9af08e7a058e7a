//! The bounce arena: where the data of requests lies while blockd works on it.
//!
//! blockd sees this memory and no other: guest memory may be private pages of this process, which
//! nobody else could see. Data is copied between guest memory and the arena by us, so
//! copy-on-write and the account of written pages stay right.
//!
//! Invariant: a chunk belongs to at most one request. There are [`CHUNKS`] of them, which bounds
//! the memory of a disk; the last one that was freed is used first, so that a quiet guest touches
//! few.

use vhost_blk::client::{Arena, Span};
use vhost_blk::queue::Segment;

/// Bytes of a chunk.
pub(super) const CHUNK: u32 = 64 << 10;
/// Number of chunks.
pub(super) const CHUNKS: u16 = 128;
/// Most chunks of one request to blockd.
pub(super) const CHUNKS_PER_REQUEST: usize = 16;

/// The chunks that are free.
pub(super) struct Pool {
    start: u64,
    free: Vec<u16>,
}

impl Pool {
    /// All chunks; `start` is the offset of the first in the arena.
    pub(super) fn new(start: u64) -> Pool {
        Pool { start, free: (0..CHUNKS).rev().collect() }
    }

    /// Takes chunks for `len` bytes, or for fewer when not enough are free or a request has no room
    /// for more. `None` when none is free.
    pub(super) fn take(&mut self, len: u64) -> Option<Chunks> {
        let wanted = usize::try_from(len.div_ceil(CHUNK.into())).unwrap_or(usize::MAX);
        let count = wanted.min(CHUNKS_PER_REQUEST).min(self.free.len());
        if count == 0 {
            return None;
        }
        let mut chunks = Chunks { spans: [Span { offset: 0, len: 0 }; CHUNKS_PER_REQUEST], count };
        let mut left = len;
        for span in &mut chunks.spans[..count] {
            let number = self.free.pop().expect("counted above");
            let part = u32::try_from(left.min(CHUNK.into())).unwrap_or(CHUNK);
            *span = Span { offset: self.start + u64::from(number) * u64::from(CHUNK), len: part };
            left -= u64::from(part);
        }
        Some(chunks)
    }

    /// Gives chunks back.
    pub(super) fn give(&mut self, chunks: &Chunks) {
        for span in chunks.spans().iter().rev() {
            let number = (span.offset - self.start) / u64::from(CHUNK);
            self.free.push(u16::try_from(number).expect("a chunk of this pool"));
        }
    }
}

/// Chunks of one request, in the order of its data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunks {
    spans: [Span; CHUNKS_PER_REQUEST],
    count: usize,
}

impl Chunks {
    /// No chunks, for requests without data.
    pub(super) const NONE: Chunks =
        Chunks { spans: [Span { offset: 0, len: 0 }; CHUNKS_PER_REQUEST], count: 0 };

    /// The chunks as blockd is told of them.
    pub(super) fn spans(&self) -> &[Span] {
        &self.spans[..self.count]
    }

    /// Bytes in all of them.
    pub(super) fn len(&self) -> u64 {
        self.spans().iter().map(|s| u64::from(s.len)).sum()
    }

    /// Copies from guest memory, beginning `at` bytes into `segments`.
    pub(super) fn fill(&self, arena: &Arena, segments: &[Segment], at: u64) {
        self.pieces(segments, at, |offset, piece| arena.write_from(offset, &piece));
    }

    /// Copies to guest memory, beginning `at` bytes into `segments`.
    pub(super) fn drain(&self, arena: &Arena, segments: &[Segment], at: u64) {
        self.pieces(segments, at, |offset, piece| arena.read_into(offset, &piece));
    }

    /// Calls `each(offset in the arena, guest memory)` for pieces that lie in one chunk and one
    /// segment. The segments have at least `at` and all the chunks' bytes.
    fn pieces(&self, segments: &[Segment], at: u64, mut each: impl FnMut(u64, Segment)) {
        let mut skip = usize::try_from(at).unwrap_or(usize::MAX);
        let mut segments = segments.iter().filter_map(|segment| {
            let left = segment.len().saturating_sub(skip);
            let part = segment.part(segment.len() - left, left);
            skip = skip.saturating_sub(segment.len());
            (left > 0).then_some(part)
        });
        let mut here: Option<Segment> = None;
        for span in self.spans() {
            let (mut offset, mut left) = (span.offset, span.len as usize);
            while left > 0 {
                let Some(segment) = here.or_else(|| segments.next()) else { return };
                let len = segment.len().min(left);
                each(offset, segment.part(0, len));
                here = (len < segment.len()).then(|| segment.part(len, segment.len() - len));
                (offset, left) = (offset + len as u64, left - len);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_run_out_and_come_back() {
        let mut pool = Pool::new(4096);
        let small = pool.take(1).unwrap();
        assert_eq!(small.spans(), [Span { offset: 4096, len: 1 }]);
        let mut taken = Vec::new();
        while let Some(chunks) = pool.take(u64::MAX) {
            assert!(chunks.len() <= 1 << 20);
            taken.push(chunks);
        }
        let sum: u64 = taken.iter().map(Chunks::len).sum();
        assert_eq!(sum, u64::from(CHUNK) * u64::from(CHUNKS - 1));
        pool.give(&small);
        assert_eq!(pool.take(5).unwrap().spans(), [Span { offset: 4096, len: 5 }]);
        taken.iter().for_each(|c| pool.give(c));
        let mut offsets: Vec<u64> =
            std::iter::from_fn(|| pool.take(1)).map(|c| c.spans()[0].offset).collect();
        offsets.sort_unstable();
        offsets.dedup();
        assert_eq!(offsets.len(), usize::from(CHUNKS) - 1);
    }
}
