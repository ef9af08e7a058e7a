//! Comparing two contents.
//!
//! What both sides know to read as zeroes is not read. Of two disks of one store, neither is what
//! both maps find in the same block of the same segment.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use format::limits::BLOCK;
use format::units::index;
use format::{Context as _, Result};

use crate::api::types::Compared;
use crate::content::{Content, RunKind, whole_status};
use crate::disk::Disk;
use crate::pump::{PIECE, Watch, pump};

/// Compares two contents; `names` is what they are called in the answer.
///
/// # Errors
/// As [`Content::read_at`], or what `watch` reports.
pub fn compare(
    names: [&str; 2],
    contents: &Contents<'_>,
    all: bool,
    watch: &dyn Watch,
) -> Result<Compared> {
    let [a, b] = names;
    let object = || format!("{a} with {b}");
    let found = run(contents, all, watch).context("compare", object)?;
    let [size_a, size_b] = contents.sides.map(|side| side.size());
    Ok(Compared {
        a: a.into(),
        b: b.into(),
        identical: size_a == size_b && found.first.is_none(),
        size_a,
        size_b,
        first_difference: found.first,
        differing_bytes: all.then_some(found.bytes),
        differing_blocks: all.then_some(found.blocks),
    })
}

/// Two contents, and the ranges in which they may differ: first byte, end.
pub struct Contents<'a> {
    /// The contents.
    pub sides: [&'a dyn Content; 2],
    /// The ranges, in order, inside both contents.
    pub ranges: Vec<(u64, u64)>,
}

/// The ranges in which two contents of any kind may differ.
#[must_use]
pub fn content_ranges(a: &dyn Content, b: &dyn Content) -> Vec<(u64, u64)> {
    vec![(0, a.size().min(b.size()))]
}

/// The ranges in which two disks of one store may differ.
///
/// # Errors
/// `Corrupt` in a damaged range, or what `watch` reports.
pub fn disk_ranges(a: &Disk, b: &Disk, watch: &dyn Watch) -> Result<Vec<(u64, u64)>> {
    let common = a.size().min(b.size());
    let mut ranges = Vec::new();
    crate::diff::changed(a, b, &mut |range| {
        let end = (range.offset + range.len).min(common);
        if range.offset < end {
            ranges.push((range.offset, end));
        }
        watch.check()
    })?;
    Ok(ranges)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    first: Option<u64>,
    bytes: u64,
    blocks: u64,
}

/// A range that has to be looked at.
#[derive(Clone, Copy)]
struct Pair {
    offset: u64,
    len: u64,
    /// Whether each side may hold data.
    data: [bool; 2],
}

/// The ranges in which two contents may differ.
struct Pairs<'a> {
    sides: [&'a dyn Content; 2],
    watch: &'a dyn Watch,
    ranges: std::vec::IntoIter<(u64, u64)>,
    at: u64,
    end: u64,
}

impl<'a> Pairs<'a> {
    fn new(contents: &Contents<'a>, watch: &'a dyn Watch) -> Self {
        let ranges = contents.ranges.clone();
        Pairs { sides: contents.sides, watch, ranges: ranges.into_iter(), at: 0, end: 0 }
    }

    fn next(&mut self) -> Result<Option<Pair>> {
        loop {
            while self.at >= self.end {
                let Some((at, end)) = self.ranges.next() else { return Ok(None) };
                (self.at, self.end) = (at, end);
            }
            let offset = self.at;
            let [a, b] = self.sides.map(|side| whole_status(side, offset, self.end, BLOCK));
            let (a, b) = (a?, b?);
            let data = [a, b].map(|run| run.kind == RunKind::Data);
            let len = a.len.min(b.len);
            if data == [false; 2] {
                self.at += len;
                // A walk over nothing but holes is looked after here: no piece comes out of it.
                self.watch.check()?;
                continue;
            }
            let len = len.min(PIECE - offset % PIECE);
            self.at += len;
            return Ok(Some(Pair { offset, len, data }));
        }
    }
}

fn run(contents: &Contents<'_>, all: bool, watch: &dyn Watch) -> Result<Found> {
    let sides = contents.sides;
    if watch.wants_total() {
        let mut pairs = Pairs::new(contents, watch);
        let mut sum = 0;
        while let Some(pair) = pairs.next()? {
            sum += pair.len;
        }
        watch.expect(sum);
    }
    let found = Mutex::new(Found::default());
    let first = AtomicU64::new(u64::MAX);
    let mut pairs = Pairs::new(contents, watch);
    // Pieces come in order, so those before the one with the first difference are under way when it
    // is found: no earlier difference is missed. Relaxed: seeing it late only costs time.
    let next = || match all || first.load(Ordering::Relaxed) == u64::MAX {
        true => pairs.next(),
        false => Ok(None),
    };
    pump(watch, 2 * index(PIECE), next, |lane, pair: Pair, buf| {
        let (left, right) = buf.split_at_mut(index(PIECE));
        let (left, right) = (&mut left[..index(pair.len)], &mut right[..index(pair.len)]);
        for (i, bytes) in [&mut *left, &mut *right].into_iter().enumerate() {
            match pair.data[i] {
                true => sides[i].read_at(lane, pair.offset, bytes)?,
                false => bytes.fill(0),
            }
        }
        watch.add(pair.len);
        if left != right {
            let here = differences(pair.offset, left, right);
            // Relaxed: see `next`.
            first.fetch_min(here.first.unwrap_or(u64::MAX), Ordering::Relaxed);
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.bytes += here.bytes;
            found.blocks += here.blocks;
            found.first = found.first.into_iter().chain(here.first).min();
        }
        Ok(())
    })?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The differences of two pieces of one length that lie at `offset`, a multiple of 4 KiB.
fn differences(offset: u64, a: &[u8], b: &[u8]) -> Found {
    let mut found = Found::default();
    let block = index(BLOCK);
    for (i, (a, b)) in a.chunks(block).zip(b.chunks(block)).enumerate() {
        if a == b {
            continue;
        }
        found.blocks += 1;
        found.bytes += a.iter().zip(b).filter(|(x, y)| x != y).count() as u64;
        let first = a.iter().zip(b).position(|(x, y)| x != y);
        let at = first.map(|p| offset + i as u64 * BLOCK + p as u64);
        found.first = found.first.or(at);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_counted_by_byte_and_by_block() {
        let a = vec![0; 3 * 4096 + 512];
        let mut b = a.clone();
        assert_eq!(differences(8192, &a, &b), Found::default());
        b[4097] = 1;
        b[4099] = 1;
        b[3 * 4096 + 511] = 1;

        let found = differences(8192, &a, &b);

        assert_eq!(found, Found { first: Some(8192 + 4097), bytes: 3, blocks: 2 });
    }
}
