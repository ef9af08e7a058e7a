//! `disk import`.
//!
//! Whole blocks of zeroes are not stored, wherever they come from: what the image says is zero, or
//! holds as stored zeroes, becomes an explicit zero of the map, a hole of the image stays a hole.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use blockd::api::types::Disk;
use blockd::content::{Content as _, RunKind};
use blockd::pump::{PIECE, Walk, Watch as _, part, pump};
use blockd::store::Access;
use format::limits::BLOCK;
use format::{Context as _, Error, Kind, Result};
use serde::Serialize;

use super::Session;
use crate::cli::Import;
use crate::image::Image;
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::size::show;
use crate::store::Store;

/// Bytes by what became of them.
#[derive(Debug, Default)]
struct Counts {
    read: AtomicU64,
    written: AtomicU64,
}

#[derive(Serialize)]
struct Imported {
    #[serde(flatten)]
    disk: Disk,
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
    let store = s.open(Access::Write)?;
    let source = Image::open(&args.source, args.format.named())?;
    let format = source.format();
    let progress = Progress::new(s.out, "importing");
    let size = args.size.unwrap_or(source.size());
    if size < source.size() {
        let reason = format!("the image has {} bytes, more than the size asked for", source.size());
        return Err(Error::invalid(reason).tried("import").on(object()).into());
    }
    let counts = Counts::default();
    let new = (args.name.as_str(), size);
    let disk = run(&*store, new, &source, &counts, &progress).context("import", object)?;
    drop(progress);
    let imported = Imported {
        disk,
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
    store: &dyn Store,
    (name, size): (&str, u64),
    source: &Image,
    counts: &Counts,
    progress: &Progress,
) -> Result<Disk> {
    // Refused before the image is looked at any further.
    format::superblock::check_name(name)?;
    let filling = store.import(name, size).map_err(|e| match e.kind() {
        Kind::Invalid if e.next_step().is_none() => e.hint("--size makes the disk larger"),
        _ => e,
    })?;
    if progress.wants_total() {
        progress.expect(Walk::all(source, BLOCK).data_bytes(progress)?);
    }
    let mut walk = Walk::all(source, BLOCK);
    pump(
        progress,
        format::units::index(PIECE),
        || walk.next_piece(),
        |lane, piece, buf| match piece.kind {
            RunKind::Hole => Ok(()),
            RunKind::Zero => filling.zero(lane, piece.offset, piece.len),
            RunKind::Data => {
                let bytes = part(buf, piece.len);
                source.read_at(lane, piece.offset, bytes)?;
                let stored = filling.store(lane, piece.offset, bytes)?;
                // Relaxed: only sums, read when the threads were joined.
                counts.read.fetch_add(piece.len, Ordering::Relaxed);
                counts.written.fetch_add(stored, Ordering::Relaxed);
                progress.add(piece.len);
                Ok(())
            }
        },
    )?;
    filling.finish()
}
