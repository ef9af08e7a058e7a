//! The content of a disk, wherever it lives: an open disk of a store, an image file, or a disk that
//! another process serves.

use format::entry::BlockState;
use format::limits::BLOCK;
use format::units::{GuestBlock, index};
use format::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::disk::Disk;

/// What a range holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunKind {
    /// Reads as zeroes, and nothing is stored for it.
    Hole,
    /// Reads as zeroes because the image (its top layer, if it has several) says so in so many
    /// words.
    Zero,
    /// Stored bytes, which may be zero.
    Data,
}

/// A range of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Bytes, more than zero.
    pub len: u64,
    /// What they are.
    pub kind: RunKind,
}

/// Blocks of the map looked at in one call: 1 GiB of disk.
const WINDOW: u64 = (1 << 30) / BLOCK;
/// Bytes of data after which a run is long enough.
const DATA_RUN: u64 = 16 << 20;

/// Something with the bytes of a disk in it. Threads share it.
pub trait Content: Sync {
    /// Bytes of the disk, a multiple of 512.
    fn size(&self) -> u64;

    /// What starts at `offset` (inside the disk), and for how many bytes, at most `limit`.
    ///
    /// # Errors
    /// `Corrupt`, or what the host reports.
    fn status(&self, offset: u64, limit: u64) -> Result<Run>;

    /// Fills `buf` from `offset`; both are multiples of 512. Calls of one `lane` come one at a
    /// time.
    ///
    /// # Errors
    /// `Corrupt`, or what the host reports.
    fn read_at(&self, lane: usize, offset: u64, buf: &mut [u8]) -> Result<()>;
}

impl Content for Disk {
    fn size(&self) -> u64 {
        Disk::size(self)
    }

    fn status(&self, offset: u64, limit: u64) -> Result<Run> {
        let first = GuestBlock(offset / BLOCK);
        let end = offset + limit.min(Disk::size(self) - offset);
        let count = (end.div_ceil(BLOCK) - first.0).min(WINDOW);
        let mut found: Option<(RunKind, u64)> = None;
        let looked = self.map().resolve(first, count, &mut |piece| {
            let kind = kind_of(piece.state);
            match &mut found {
                None => found = Some((kind, piece.count)),
                Some((same, blocks)) if *same == kind => *blocks += piece.count,
                Some(_) => return Err(enough()),
            }
            match found {
                Some((RunKind::Data, blocks)) if blocks * BLOCK < DATA_RUN => Ok(()),
                _ => Err(enough()),
            }
        });
        let Some((kind, blocks)) = found else {
            return Err(looked.err().unwrap_or_else(|| Error::corrupt("the map has a gap")));
        };
        let stop = (first.0 + blocks).saturating_mul(BLOCK).min(end);
        Ok(Run { len: stop - offset, kind })
    }

    fn read_at(&self, lane: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read(lane, offset, buf)
    }
}

/// Ends a walk over the map; whoever gets it has an answer already.
fn enough() -> Error {
    Error::new(Kind::Cancelled, "seen enough")
}

fn kind_of(state: BlockState) -> RunKind {
    match state {
        BlockState::Hole => RunKind::Hole,
        BlockState::Zero => RunKind::Zero,
        BlockState::Data { .. } => RunKind::Data,
    }
}

/// As [`Content::status`], in whole units of `unit` bytes (a power of two of at least 512) from an
/// `offset` that is one, up to `end`: a unit that is not all of one kind counts as data.
///
/// # Errors
/// As [`Content::status`].
pub fn whole_status(content: &dyn Content, offset: u64, end: u64, unit: u64) -> Result<Run> {
    let run = content.status(offset, end - offset)?;
    let stop = offset + run.len;
    if stop >= end {
        return Ok(Run { len: end - offset, ..run });
    }
    let (kind, stop) = match run.kind {
        RunKind::Data => (RunKind::Data, stop.next_multiple_of(unit)),
        kind if stop / unit * unit > offset => (kind, stop / unit * unit),
        _ => (RunKind::Data, offset + unit),
    };
    Ok(Run { len: stop.min(end) - offset, kind })
}

/// True when all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Pieces that the compiler turns into wide instructions, and an end at the first that differs.
    bytes.chunks(256).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Calls `visit` with the runs of `bytes` that are zero in whole grains, or not, in order: offset,
/// bytes, and whether they are zero. The last grain may be short.
///
/// # Errors
/// What `visit` reports.
pub fn zero_runs<'a>(
    bytes: &'a [u8],
    grain: u64,
    visit: &mut dyn FnMut(u64, &'a [u8], bool) -> Result<()>,
) -> Result<()> {
    let grain = index(grain);
    let mut at = 0;
    while at < bytes.len() {
        let of = |at: usize| is_zero(&bytes[at..bytes.len().min(at + grain)]);
        let zero = of(at);
        let mut end = at + grain;
        while end < bytes.len() && of(end) == zero {
            end += grain;
        }
        let end = end.min(bytes.len());
        visit(at as u64, &bytes[at..end], zero)?;
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs of the given lengths; the kinds are the test's.
    struct Fixed(Vec<(u64, RunKind)>);

    impl Content for Fixed {
        fn size(&self) -> u64 {
            self.0.iter().map(|(len, _)| len).sum()
        }
        fn status(&self, offset: u64, limit: u64) -> Result<Run> {
            let mut end = 0;
            for (len, kind) in &self.0 {
                end += len;
                if offset < end {
                    return Ok(Run { len: (end - offset).min(limit), kind: *kind });
                }
            }
            Err(Error::invalid("past the end"))
        }
        fn read_at(&self, _: usize, _: u64, _: &mut [u8]) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_unit_of_two_kinds_counts_as_data() {
        use RunKind::{Data, Hole};
        let content = Fixed(vec![(10_000, Hole), (100, Data), (9_900, Hole), (512, Data)]);
        let mut at = 0;
        let mut runs = Vec::new();
        while at < content.size() {
            let run = whole_status(&content, at, content.size(), 4096).unwrap();
            runs.push((run.len, run.kind));
            at += run.len;
        }

        assert_eq!(runs, [(8192, Hole), (4096, Data), (4096, Hole), (4096, Data), (32, Data)]);
        assert_eq!(at, content.size());
    }

    #[test]
    fn zero_runs_cover_everything_once() {
        let mut bytes = vec![0; 4096 * 3 + 512];
        bytes[4096 * 2 - 1] = 1;
        bytes[4096 * 3 + 511] = 1;
        let mut seen = Vec::new();

        zero_runs(&bytes, 4096, &mut |at, run, zero| {
            seen.push((at, run.len(), zero));
            Ok(())
        })
        .unwrap();

        let expected =
            [(0, 4096, true), (4096, 4096, false), (8192, 4096, true), (12288, 512, false)];
        assert_eq!(seen, expected);
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0; 5000];
        assert!(is_zero(&bytes));
        for at in [0, 255, 256, 4095, 4999] {
            bytes[at] = 0x80;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }
}
