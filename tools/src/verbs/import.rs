//! `disk import`.
//!
//! Whole blocks of zeroes are not stored, wherever they come from: what the image says is zero, or
//! holds as stored zeroes, becomes an explicit zero of the map, a hole of the image stays a hole.
//! In a difference a hole is what was not changed: there the content of the base shows.

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
use crate::image::{CLUSTER, Changes, Image, Origin, without_base};
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::size::show;
use crate::store::{Filling, Store};

/// Bytes by what became of them.
#[derive(Debug, Default)]
struct Counts {
    read: AtomicU64,
    written: AtomicU64,
}

#[derive(Serialize)]
struct Imported<'a> {
    #[serde(flatten)]
    disk: Disk,
    source: Imaged,
    /// The disk that the image was applied to; only for a difference.
    #[serde(skip_serializing_if = "Option::is_none")]
    over: Option<&'a str>,
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
    let counts = Counts::default();
    let (disk, source) = match &args.over {
        None => whole(s, &*store, args, &counts)?,
        Some(base) => {
            let (source, origin) = Image::open_difference(&args.source, args.format.named())?;
            let disk = over(s, &*store, (args, base), (&source, &origin), &counts);
            (disk.context("import", object)?, source)
        }
    };
    let (path, format, size) = (args.source.display().to_string(), source.format(), source.size());
    let imported = Imported {
        disk,
        source: Imaged { path, format, size },
        over: args.over.as_deref(),
        // Relaxed: the threads that counted were joined.
        data_read: counts.read.load(Ordering::Relaxed),
        data_written: counts.written.load(Ordering::Relaxed),
        elapsed_ms: started.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
    };
    s.out.confirm(&imported, || {
        let (name, size, data) = (&args.name, show(imported.disk.size), imported.data_written);
        let data = show(data);
        match &args.over {
            None => format!("imported disk {name} from a {format} image: {size}, {data} of data"),
            Some(base) => format!(
                "imported disk {name} from a difference over disk {base}: {size}, {data} of data"
            ),
        }
    })?;
    Ok(Verdict::Done)
}

/// Imports an image that is all of the disk.
fn whole(s: &Session, store: &dyn Store, args: &Import, counts: &Counts) -> Result<(Disk, Image)> {
    let object = || format!("disk {}", args.name);
    if let Some(origin) = without_base(&args.source)? {
        let reason =
            format!("it is a difference over disk {}, and no whole disk", origin.base.name);
        return Err(Error::invalid(reason)
            .tried("import")
            .on(format!("image {}", args.source.display()))
            .hint("`--over` names a disk that holds what that disk held"));
    }
    let source = Image::open(&args.source, args.format.named())?;
    let size = args.size.unwrap_or(source.size());
    if size < source.size() {
        let reason = format!("the image has {} bytes, more than the size asked for", source.size());
        return Err(Error::invalid(reason).tried("import").on(object()));
    }
    let run = || -> Result<Disk> {
        // Refused before the image is looked at any further.
        format::superblock::check_name(&args.name)?;
        let filling = store.import(&args.name, size, None).map_err(|e| match e.kind() {
            Kind::Invalid if e.next_step().is_none() => e.hint("--size makes the disk larger"),
            _ => e,
        })?;
        fill(s, &*filling, (&source, None), counts)?;
        filling.finish()
    };
    let disk = run().context("import", object)?;
    Ok((disk, source))
}

/// Imports an image that is a difference.
fn over(
    s: &Session,
    store: &dyn Store,
    (args, base): (&Import, &str),
    (source, origin): (&Image, &Origin),
    counts: &Counts,
) -> Result<Disk> {
    format::superblock::check_name(&args.name)?;
    // Before the base is looked at: from now on it stays as it is until the disk is there.
    let filling = store.import(&args.name, source.size(), Some(base))?;
    let progress = Progress::new(s.out, "looking at the base");
    let found = store.digest(base, &progress)?;
    drop(progress);
    let made_over = &origin.base;
    if (found.size, &found.digest) != (made_over.size, &made_over.digest) {
        let reason = format!(
            "it was made over disk {} ({} bytes), and disk {base} ({} bytes) holds something else",
            made_over.name, made_over.size, found.size
        );
        return Err(Error::new(Kind::ParentChanged, reason)
            .tried("import")
            .on(format!("image {}", args.source.display()))
            .hint("name a disk with the content that the other one had"));
    }
    let changes = Changes::new(source.size());
    fill(s, &*filling, (source, Some(&changes)), counts)?;
    if changes.digest() != origin.changes {
        return Err(Error::corrupt("it is not as it was exported: damaged, or written to")
            .tried("import")
            .on(format!("image {}", args.source.display()))
            .hint("export it again"));
    }
    filling.finish()
}

/// Moves what the image holds; for a difference, with the digest of what it changes.
fn fill(
    s: &Session,
    filling: &dyn Filling,
    (source, changes): (&Image, Option<&Changes>),
    counts: &Counts,
) -> Result<()> {
    let progress = Progress::new(s.out, "importing");
    let unit = if changes.is_some() { CLUSTER } else { BLOCK };
    if progress.wants_total() {
        progress.expect(Walk::all(source, unit).data_bytes(&progress)?);
    }
    let mut walk = Walk::all(source, unit);
    pump(
        &progress,
        format::units::index(PIECE),
        || walk.next_piece(),
        |lane, piece, buf| match piece.kind {
            RunKind::Hole => Ok(()),
            RunKind::Zero => {
                changes.inspect(|c| c.zero(piece.offset, piece.len));
                filling.zero(lane, piece.offset, piece.len)
            }
            RunKind::Data => {
                let bytes = part(buf, piece.len);
                source.read_at(lane, piece.offset, bytes)?;
                changes.inspect(|c| c.add(piece.offset, bytes));
                let stored = filling.store(lane, piece.offset, bytes)?;
                // Relaxed: only sums, read when the threads were joined.
                counts.read.fetch_add(piece.len, Ordering::Relaxed);
                counts.written.fetch_add(stored, Ordering::Relaxed);
                progress.add(piece.len);
                Ok(())
            }
        },
    )
}
