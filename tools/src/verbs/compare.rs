//! `disk compare`.
//!
//! What both sides know to read as zeroes is not read. Of two disks of one store, neither is what
//! both maps find in the same block of the same segment.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use blockd::disk::Disk;
use blockd::store::Access;
use blockd::storedir::StoreDir;
use format::limits::BLOCK;
use format::units::index;
use format::{Context as _, Error, Result};
use serde::Serialize;

use super::Session;
use crate::cli::Compare;
use crate::content::{Content, Image, whole_status};
use crate::image::RunKind;
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::pump::{PIECE, pump};
use crate::signals;

enum Side {
    Disk(Box<Disk>),
    Image(Image),
}

impl Side {
    fn content(&self) -> &dyn Content {
        match self {
            Side::Disk(disk) => disk.as_ref(),
            Side::Image(image) => image,
        }
    }
}

#[derive(Serialize)]
struct Compared<'a> {
    a: &'a str,
    b: &'a str,
    identical: bool,
    size_a: u64,
    size_b: u64,
    /// Byte offset of the first difference of the part that both have.
    first_difference: Option<u64>,
    /// Bytes and blocks of 4 KiB that differ in the part that both have; only when all were
    /// counted.
    differing_bytes: Option<u64>,
    differing_blocks: Option<u64>,
}

/// Where an argument points, before anything is opened.
enum Named {
    Disk,
    File(PathBuf),
}

/// True for what cannot be the name of a disk.
fn is_path(arg: &str) -> bool {
    arg.starts_with("file:") || arg.contains('/')
}

fn named(arg: &str, dir: Option<&StoreDir>) -> Named {
    let is_disk = dir.is_some_and(|d| d.disk(arg).is_ok());
    if is_path(arg) || (!is_disk && Path::new(arg).exists()) {
        return Named::File(arg.strip_prefix("file:").unwrap_or(arg).into());
    }
    Named::Disk
}

/// `disk compare`
pub fn compare(s: &Session, args: &Compare) -> Outcome {
    let sides = [&args.a, &args.b];
    // Without a store, both may still be files.
    let may_be_disk = sides.iter().any(|arg| !is_path(arg));
    let dir = match s.store_path() {
        Ok(_) if may_be_disk => Some(s.open(Access::Read)?),
        _ => None,
    };
    let open = |arg: &String| -> Result<Side> {
        match (named(arg, dir.as_ref()), &dir) {
            (Named::File(path), _) => Ok(Side::Image(Image::open(&path, args.format.named())?)),
            (Named::Disk, Some(dir)) => Ok(Side::Disk(Box::new(s.disk(dir, arg, args.tail)?))),
            (Named::Disk, None) => Err(s.store_path().expect_err("it was looked for")),
        }
    };
    let [a, b] = sides.map(open);
    let (a, b) = (a?, b?);
    let (size_a, size_b) = (a.content().size(), b.content().size());
    let progress = Progress::new(s.out, "comparing");
    let object = || format!("{} with {}", args.a, args.b);
    let found = run(&a, &b, args.all, &progress).context("compare", object)?;
    drop(progress);
    let compared = Compared {
        a: &args.a,
        b: &args.b,
        identical: size_a == size_b && found.first.is_none(),
        size_a,
        size_b,
        first_difference: found.first,
        differing_bytes: args.all.then_some(found.bytes),
        differing_blocks: args.all.then_some(found.blocks),
    };
    s.out.confirm(&compared, || render(&compared))?;
    Ok(if compared.identical { Verdict::Done } else { Verdict::Found })
}

fn render(c: &Compared<'_>) -> String {
    let mut parts = Vec::new();
    if c.size_a != c.size_b {
        parts.push(format!("{} has {} bytes, {} has {}", c.a, c.size_a, c.b, c.size_b));
    }
    match c.first_difference {
        Some(offset) => parts.push(format!("the contents differ from byte {offset} on")),
        None if c.identical => parts.push("the contents are the same".into()),
        None => parts.push("the part that both have is the same".into()),
    }
    if let (Some(bytes), Some(blocks)) = (c.differing_bytes, c.differing_blocks) {
        parts.push(format!("{bytes} bytes in {blocks} blocks of 4 KiB differ"));
    }
    parts.join("\n")
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
    ranges: std::vec::IntoIter<(u64, u64)>,
    at: u64,
    end: u64,
}

impl<'a> Pairs<'a> {
    fn new(sides: [&'a dyn Content; 2], ranges: Vec<(u64, u64)>) -> Self {
        Pairs { sides, ranges: ranges.into_iter(), at: 0, end: 0 }
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
                signals::check()?;
                continue;
            }
            let len = len.min(PIECE - offset % PIECE);
            self.at += len;
            return Ok(Some(Pair { offset, len, data }));
        }
    }
}

fn run(a: &Side, b: &Side, all: bool, progress: &Progress) -> Result<Found> {
    let sides = [a.content(), b.content()];
    let common = sides[0].size().min(sides[1].size());
    let ranges = match (a, b) {
        (Side::Disk(a), Side::Disk(b)) => {
            let mut ranges = Vec::new();
            blockd::diff::changed(a, b, &mut |range| {
                let end = (range.offset + range.len).min(common);
                if range.offset < end {
                    ranges.push((range.offset, end));
                }
                signals::check()
            })?;
            ranges
        }
        _ => vec![(0, common)],
    };
    progress.expect(|| {
        let mut pairs = Pairs::new(sides, ranges.clone());
        let mut sum = 0;
        while let Some(pair) = pairs.next()? {
            sum += pair.len;
        }
        Ok::<u64, Error>(sum)
    })?;
    let found = Mutex::new(Found::default());
    let first = AtomicU64::new(u64::MAX);
    let mut pairs = Pairs::new(sides, ranges);
    // Pieces come in order, so those before the one with the first difference are under way when it
    // is found: no earlier difference is missed. Relaxed: seeing it late only costs time.
    let next = || match all || first.load(Ordering::Relaxed) == u64::MAX {
        true => pairs.next(),
        false => Ok(None),
    };
    pump(2 * index(PIECE), next, |lane, pair: Pair, buf| {
        let (left, right) = buf.split_at_mut(index(PIECE));
        let (left, right) = (&mut left[..index(pair.len)], &mut right[..index(pair.len)]);
        for (i, bytes) in [&mut *left, &mut *right].into_iter().enumerate() {
            match pair.data[i] {
                true => sides[i].read_at(lane, pair.offset, bytes)?,
                false => bytes.fill(0),
            }
        }
        progress.add(pair.len);
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
