//! Several threads that work off one list: the shape of import, export and compare.
//!
//! Invariants:
//! - Pieces are handed out in order, one at a time, so when a piece is refused every piece before
//!   it is done or being done.
//! - The first error wins; no piece is handed out after it, nor after whoever watches said stop.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use format::Result;
use format::units::index;

use crate::content::{Content, RunKind, whole_status};
use crate::side_by_side::PROCESSORS;
use crate::store::buf::AlignedBuf;

/// Bytes of one piece of data, at most.
pub const PIECE: u64 = 2 << 20;

/// Whoever started long work: hears how far it is, and may stop it. Threads share it.
pub trait Watch: Sync {
    /// True when somebody wants to know how much there is to do; counting it can take a while.
    fn wants_total(&self) -> bool;

    /// There are `bytes` to do in all.
    fn expect(&self, bytes: u64);

    /// `bytes` more are done.
    fn add(&self, bytes: u64);

    /// `done` of `total` bytes are done.
    fn set(&self, done: u64, total: u64);

    /// Looked at between two pieces of work.
    ///
    /// # Errors
    /// `Cancelled` when the work is to stop.
    fn check(&self) -> Result<()>;
}

/// Nobody: nothing is told, and nothing is stopped.
#[derive(Debug, Clone, Copy)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn wants_total(&self) -> bool {
        false
    }

    fn expect(&self, _: u64) {}

    fn add(&self, _: u64) {}

    fn set(&self, _: u64, _: u64) {}

    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// Threads that one verb uses: twice as many as there are cores, because at any time about half of
/// them wait for the device.
#[must_use]
pub fn lanes() -> usize {
    (2 * *PROCESSORS).clamp(4, 8)
}

struct Queue<N> {
    next: N,
    outcome: Result<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A worker that panics takes the process with it when the others are done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` on [`lanes`] threads until `next` has no more pieces. Each thread has a number below
/// `lanes()` and a buffer of its own of `bytes` bytes.
///
/// # Errors
/// The first error of `next` or `work`, or what `watch` reports.
pub fn pump<T>(
    watch: &dyn Watch,
    bytes: usize,
    next: impl FnMut() -> Result<Option<T>> + Send,
    work: impl Fn(usize, T, &mut AlignedBuf) -> Result<()> + Sync,
) -> Result<()> {
    let queue = Mutex::new(Queue { next, outcome: Ok(()) });
    let take = || {
        let mut queue = lock(&queue);
        if queue.outcome.is_err() {
            return None;
        }
        match watch.check().and_then(|()| (queue.next)()) {
            Ok(piece) => piece,
            Err(e) => {
                queue.outcome = Err(e);
                None
            }
        }
    };
    let run = |lane: usize| {
        let mut buf = AlignedBuf::zeroed(bytes);
        while let Some(piece) = take() {
            if let Err(e) = work(lane, piece, &mut buf) {
                let mut queue = lock(&queue);
                if queue.outcome.is_ok() {
                    queue.outcome = Err(e);
                }
                return;
            }
        }
    };
    thread::scope(|scope| {
        let run = &run;
        (0..lanes()).for_each(|lane| {
            scope.spawn(move || run(lane));
        });
    });
    queue.into_inner().unwrap_or_else(PoisonError::into_inner).outcome
}

/// A range of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub offset: u64,
    /// Bytes; at most [`PIECE`] if it is data.
    pub len: u64,
    /// What they are.
    pub kind: RunKind,
}

/// The pieces of some ranges of a content, in whole units but for the end of the disk.
pub struct Walk<'a> {
    content: &'a dyn Content,
    unit: u64,
    ranges: std::vec::IntoIter<(u64, u64)>,
    at: u64,
    end: u64,
    /// Where the run of data that `at` lies in ends; at or before `at` when that is not known.
    data_end: u64,
}

impl<'a> Walk<'a> {
    /// All of `content`.
    #[must_use]
    pub fn all(content: &'a dyn Content, unit: u64) -> Self {
        Self::over(content, unit, vec![(0, content.size())])
    }

    /// The ranges (first byte, end), which are in order, disjoint and start at whole units.
    #[must_use]
    pub fn over(content: &'a dyn Content, unit: u64, ranges: Vec<(u64, u64)>) -> Self {
        Walk { content, unit, ranges: ranges.into_iter(), at: 0, end: 0, data_end: 0 }
    }

    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// As [`Content::status`].
    pub fn next_piece(&mut self) -> Result<Option<Piece>> {
        while self.at >= self.end {
            let Some((at, end)) = self.ranges.next() else { return Ok(None) };
            (self.at, self.end) = (at, end);
        }
        let offset = self.at;
        if self.data_end <= offset {
            let run = whole_status(self.content, offset, self.end, self.unit)?;
            if run.kind != RunKind::Data {
                self.at += run.len;
                return Ok(Some(Piece { offset, len: run.len, kind: run.kind }));
            }
            self.data_end = offset + run.len;
        }
        let len = (self.data_end - offset).min(PIECE - offset % PIECE);
        self.at += len;
        Ok(Some(Piece { offset, len, kind: RunKind::Data }))
    }

    /// Bytes of data in all.
    ///
    /// # Errors
    /// As [`Content::status`], or what `watch` reports.
    pub fn data_bytes(mut self, watch: &dyn Watch) -> Result<u64> {
        let mut sum = 0;
        while let Some(piece) = self.next_piece()? {
            if piece.kind == RunKind::Data {
                sum += piece.len;
            }
            watch.check()?;
        }
        Ok(sum)
    }
}

/// The first `len` bytes of a worker's buffer.
pub fn part(buf: &mut AlignedBuf, len: u64) -> &mut [u8] {
    &mut buf[..index(len)]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use format::Error;

    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        let mut left = 0..1000;
        let done = Mutex::new(BTreeSet::new());

        pump(
            &Unwatched,
            1,
            || Ok(left.next()),
            |_, n, _| {
                assert!(lock(&done).insert(n));
                Ok(())
            },
        )
        .unwrap();

        assert_eq!(lock(&done).len(), 1000);
    }

    /// Data and then a hole; counts how often it is asked.
    struct Counted(std::sync::atomic::AtomicUsize);

    impl Counted {
        const DATA: u64 = 3 * PIECE + 512;
    }

    impl Content for Counted {
        fn size(&self) -> u64 {
            5 * PIECE
        }
        fn status(&self, offset: u64, limit: u64) -> Result<crate::content::Run> {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed); // one thread only
            let (kind, end) = match offset {
                0..Self::DATA => (RunKind::Data, Self::DATA),
                _ => (RunKind::Hole, self.size()),
            };
            Ok(crate::content::Run { len: (end - offset).min(limit), kind })
        }
        fn read_at(&self, _: usize, _: u64, _: &mut [u8]) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_run_of_data_is_looked_up_once_and_cut_at_pieces() {
        let content = Counted(std::sync::atomic::AtomicUsize::new(0));
        let mut walk = Walk::over(&content, 4096, vec![(4096, PIECE), (PIECE, 5 * PIECE)]);
        let mut pieces = Vec::new();
        while let Some(piece) = walk.next_piece().unwrap() {
            pieces.push((piece.offset, piece.len, piece.kind));
        }

        let hole = 3 * PIECE + 4096;
        let expected = [
            (4096, PIECE - 4096, RunKind::Data),
            (PIECE, PIECE, RunKind::Data),
            (2 * PIECE, PIECE, RunKind::Data),
            (3 * PIECE, 4096, RunKind::Data),
            (hole, 5 * PIECE - hole, RunKind::Hole),
        ];
        assert_eq!(pieces, expected);
        assert_eq!(content.0.into_inner(), 3);
    }

    #[test]
    fn the_first_error_ends_it() {
        let mut left = 0..;
        let failing = |_, n, _: &mut AlignedBuf| match n {
            17 => Err(Error::invalid("seventeen")),
            _ => Ok(()),
        };

        let e = pump(&Unwatched, 1, || Ok(left.next()), failing).unwrap_err();

        assert_eq!(e.reason(), "seventeen");
        assert!(left.start < 1000);
    }
}
