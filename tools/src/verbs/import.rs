//! `disk import`.
//!
//! Whole blocks of zeroes are not stored, wherever they come from: what the image says is zero, or
//! holds as stored zeroes, becomes an explicit zero of the map, a hole of the image stays a hole.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use blockd::disk::Disk;
use blockd::store::Access;
use blockd::storedir::{NewDisk, StoreDir};
use format::limits::BLOCK;
use format::{Context as _, Error, Kind, Result};
use serde::Serialize;

use super::Session;
use super::inspect::Listed;
use crate::cli::Import;
use crate::content::{Content, Image, zero_runs};
use crate::image::RunKind;
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::pump::{self, PIECE, Piece, Walk, part, pump};
use crate::size::show;

/// Bytes by what became of them.
#[derive(Debug, Default)]
struct Counts {
    read: AtomicU64,
    written: AtomicU64,
}

#[derive(Serialize)]
struct Imported {
    #[serde(flatten)]
    disk: Listed,
    source: Imaged,
    /// Bytes read from the image.
    data_read: u64,
    /// Bytes of them that were not zero, in whole blocks.
    data_written: u64,
    elapsed_ms: u64,
}

#[derive(Serialize)]
struct Imaged {
    path: String,
    format: &'static str,
    size: u64,
}

/// `disk import`
pub fn import(s: &Session, args: &Import) -> Outcome {
    let started = Instant::now();
    let object = || format!("disk {}", args.name);
    let dir = s.open(Access::Write)?;
    let source = Image::open(&args.source, args.format.named())?;
    let format = source.format();
    let progress = Progress::new(s.out, "importing");
    let size = args.size.unwrap_or(source.size());
    if size < source.size() {
        let reason = format!("the image has {} bytes, more than the size asked for", source.size());
        return Err(Error::invalid(reason).tried("import").on(object()).into());
    }
    let new = NewDisk::root(&args.name, size);
    let counts = Counts::default();
    let row = run(&dir, &new, &source, &counts, &progress).context("import", object)?;
    drop(progress);
    let imported = Imported {
        disk: Listed::new(&dir, &row)?,
        source: Imaged { path: args.source.display().to_string(), format, size: source.size() },
        // Relaxed: the threads that counted were joined.
        data_read: counts.read.load(Ordering::Relaxed),
        data_written: counts.written.load(Ordering::Relaxed),
        elapsed_ms: started.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
    };
    s.out.confirm(&imported, || {
        let (name, size, data) = (&args.name, show(size), show(imported.data_written));
        format!("imported disk {name} from a {format} image: {size}, {data} of data")
    })?;
    Ok(Verdict::Done)
}

fn run(
    dir: &StoreDir,
    new: &NewDisk,
    source: &Image,
    counts: &Counts,
    progress: &Progress,
) -> Result<blockd::catalogue::DiskRow> {
    // Refused before the image is looked at any further.
    format::superblock::check_name(&new.name)?;
    let import = dir.import(new, pump::lanes()).map_err(|e| match e.kind() {
        Kind::Invalid if e.next_step().is_none() => e.hint("--size makes the disk larger"),
        _ => e,
    })?;
    progress.expect(|| Walk::all(source, BLOCK).data_bytes())?;
    let disk = import.disk();
    let mut walk = Walk::all(source, BLOCK);
    pump(
        format::units::index(PIECE),
        || walk.next(),
        |lane, piece, buf| {
            match piece.kind {
                RunKind::Hole => Ok(()),
                RunKind::Zero => disk.write_zeroes(lane, piece.offset, piece.len, true),
                RunKind::Data => {
                    let bytes = part(buf, piece.len);
                    source.read_at(lane, piece.offset, bytes)?;
                    // Relaxed: only sums, read when the threads were joined.
                    counts.read.fetch_add(piece.len, Ordering::Relaxed);
                    counts.written.fetch_add(store(disk, lane, piece, bytes)?, Ordering::Relaxed);
                    progress.add(piece.len);
                    Ok(())
                }
            }
        },
    )?;
    import.finish()
}

/// Stores the bytes of a piece; gives back how many of them were not zero.
fn store(disk: &Disk, lane: usize, piece: Piece, bytes: &[u8]) -> Result<u64> {
    let mut data = Vec::new();
    // Zeroes first: to zero blocks of an extent that has data already would make the engine punch
    // holes where nothing was ever written.
    zero_runs(bytes, BLOCK, &mut |at, run, zero| {
        if zero {
            return disk.write_zeroes(lane, piece.offset + at, run.len() as u64, true);
        }
        data.push((at, run));
        Ok(())
    })?;
    data.iter().try_for_each(|(at, run)| disk.write(lane, piece.offset + at, run))?;
    Ok(data.iter().map(|(_, run)| run.len() as u64).sum())
}
