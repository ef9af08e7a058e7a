//! `disk export`.
//!
//! A whole export leaves out what reads as zeroes. A difference must not: over another image, what
//! is left out shows that image's content, so in an overlay zeroes are written in so many words.
//!
//! An overlay made from a sealed disk says what that disk held, for `disk import --over`. What is
//! not sealed may be another disk tomorrow: such an overlay says nothing, and cannot be imported.

use std::path::Path;
use std::time::Instant;

use blockd::api::types::{ByteRange, DiskState, SessionUse};
use blockd::content::{Content, RunKind, zero_runs};
use blockd::pump::{PIECE, Piece, Walk, Watch as _, part, pump};
use blockd::store::Access;
use blockd::verbs::verify;
use format::limits::{BLOCK, SECTOR};
use format::units::index;
use format::{Context as _, Result};
use serde::Serialize;

use super::Session;
use crate::cli::{Export, SinkFormat};
use crate::image::{Base, CLUSTER, Changes, Origin, Sink, create_sink};
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::signals;
use crate::size::show;
use crate::store::Store;

#[derive(Serialize)]
struct Exported<'a> {
    disk: &'a str,
    path: &'a Path,
    format: &'static str,
    size: u64,
    diff_from: Option<&'a str>,
    /// The changed ranges; only for a difference.
    #[serde(skip_serializing_if = "Option::is_none")]
    ranges: Option<Vec<ByteRange>>,
    /// What the disk that it was made from holds, as the file says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    base_digest: Option<String>,
    /// Bytes of data written to the file.
    data_written: u64,
    elapsed_ms: u64,
}

/// What goes into the file.
struct Plan {
    /// Ranges to look at: first byte, end.
    ranges: Vec<(u64, u64)>,
    /// Bytes that are written or left out as a whole.
    grain: u64,
    /// What reads as zeroes is written as zeroes, not left out.
    overlay: bool,
    /// The name of the disk and what the file is to say about its base.
    base: Option<(String, Base)>,
}

/// `disk export`
pub fn export(s: &Session, args: &Export) -> Outcome {
    let started = Instant::now();
    let store = s.open(Access::Read)?;
    signals::ask_to_be_told();
    let object = || format!("disk {}", args.name);
    let lost_tail = args.tail.accept_lost_tail;
    let disk = store.open(&args.name, SessionUse::Export, lost_tail)?;
    if args.verify {
        let progress = Progress::new(s.out, "verifying");
        let scrubbed = store.scrub(&args.name, &progress).context("export", object)?;
        verify(&scrubbed.report).context("export", object)?;
    }
    let changed = match &args.diff_from {
        Some(from) => Some(store.diff(&args.name, from, lost_tail).context("export", object)?),
        None => None,
    };
    let mut plan = plan(disk.size(), args.format, changed.as_deref());
    if let Some(from) = args.diff_from.as_deref().filter(|_| plan.overlay) {
        let base = base_of(s, &*store, from).context("export", object)?;
        plan.base = base.map(|base| (args.name.clone(), base));
    }
    let base_digest = plan.base.as_ref().map(|(_, base)| base.digest.clone());
    let (format, size) = (args.format.format(), disk.size());
    let sink = create_sink(&args.dest, format, size, args.overwrite)?;
    let progress = Progress::new(s.out, "exporting");
    let written = run(&*disk, plan, sink, &progress).context("export", object)?;
    drop(progress);
    let exported = Exported {
        disk: &args.name,
        path: &args.dest,
        format: format.name(),
        size,
        diff_from: args.diff_from.as_deref(),
        ranges: changed,
        base_digest,
        data_written: written,
        elapsed_ms: started.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
    };
    s.out.confirm(&exported, || render(&exported))?;
    Ok(Verdict::Done)
}

fn render(e: &Exported<'_>) -> String {
    let (name, path, data) = (e.disk, e.path.display(), show(e.data_written));
    let mut lines = vec![format!("exported disk {name} to {path}: {data} of data")];
    let ranges = e.ranges.as_deref().unwrap_or_default();
    lines.extend(ranges.iter().map(|r| format!("{} {}", r.offset, r.length)));
    lines.join("\n")
}

fn plan(size: u64, format: SinkFormat, changed: Option<&[ByteRange]>) -> Plan {
    let changed = changed.map(|ranges| -> Vec<(u64, u64)> {
        ranges.iter().map(|r| (r.offset, r.offset + r.length)).collect()
    });
    let grain = match format {
        SinkFormat::Raw => BLOCK,
        SinkFormat::Qcow2 => CLUSTER,
    };
    let overlay = format == SinkFormat::Qcow2 && changed.is_some();
    let ranges = match changed {
        None => vec![(0, size)],
        // An overlay replaces whole clusters: what was not changed in them belongs to it, too.
        Some(ranges) if overlay => widen(&ranges, CLUSTER, size),
        Some(ranges) => ranges,
    };
    Plan { ranges, grain, overlay, base: None }
}

/// What a file can say about the disk that it is made from.
fn base_of(s: &Session, store: &dyn Store, from: &str) -> Result<Option<Base>> {
    let sealed = |d: &blockd::api::types::Disk| d.name == from && d.state == DiskState::Sealed;
    if !store.list()?.iter().any(sealed) {
        s.out.note(&format!(
            "disk {from} is not sealed, and may change: `disk import --over` will not take the file"
        ));
        return Ok(None);
    }
    let found = store.digest(from, &Progress::new(s.out, "looking at the base"))?;
    Ok(Some(Base { name: from.to_owned(), size: found.size, digest: found.digest }))
}

/// The ranges in whole units, up to `end`, joined where they meet.
fn widen(ranges: &[(u64, u64)], unit: u64, end: u64) -> Vec<(u64, u64)> {
    let mut wide: Vec<(u64, u64)> = Vec::new();
    for (from, to) in ranges {
        let from = from / unit * unit;
        let to = to.next_multiple_of(unit).min(end);
        match wide.last_mut() {
            Some(last) if last.1 >= from => last.1 = to,
            _ => wide.push((from, to)),
        }
    }
    wide
}

/// Fills the sink and publishes it; gives back how many bytes of data it holds.
fn run(
    disk: &dyn Content,
    plan: Plan,
    mut sink: Box<dyn Sink>,
    progress: &Progress,
) -> Result<u64> {
    use std::sync::atomic::{AtomicU64, Ordering};
    let Plan { ranges, grain, overlay, base } = plan;
    let changes = base.as_ref().map(|_| Changes::new(disk.size()));
    if progress.wants_total() {
        progress.expect(Walk::over(disk, grain, ranges.clone()).data_bytes(progress)?);
    }
    let written = AtomicU64::new(0);
    let mut walk = Walk::over(disk, grain, ranges);
    pump(
        progress,
        index(PIECE),
        || walk.next_piece(),
        |lane, piece: Piece, buf| {
            if piece.kind != RunKind::Data {
                changes.as_ref().inspect(|c| c.zero(piece.offset, piece.len));
                return if overlay { explicit(&*sink, piece.offset, piece.len) } else { Ok(()) };
            }
            let bytes = part(buf, piece.len);
            disk.read_at(lane, piece.offset, bytes)?;
            changes.as_ref().inspect(|c| c.add(piece.offset, bytes));
            zero_runs(bytes, grain, &mut |at, run, zero| match zero {
                true if overlay => explicit(&*sink, piece.offset + at, run.len() as u64),
                true => Ok(()),
                false => {
                    // Relaxed: only a sum, read when the threads were joined.
                    written.fetch_add(run.len() as u64, Ordering::Relaxed);
                    sink.write_at(piece.offset + at, run)
                }
            })?;
            progress.add(piece.len);
            Ok(())
        },
    )?;
    signals::check()?;
    if let Some(((name, base), changes)) = base.zip(changes) {
        sink.set_origin(Origin::new(&name, base, changes.digest()))?;
    }
    sink.finish()?;
    // Relaxed: the threads that counted were joined.
    Ok(written.load(Ordering::Relaxed))
}

/// Makes whole clusters zero in so many words. A sink leaves alone what reads as zeroes already, so
/// each cluster is made to exist first.
fn explicit(sink: &dyn Sink, offset: u64, len: u64) -> Result<()> {
    let end = offset + len;
    for cluster in (offset..end).step_by(index(CLUSTER)) {
        sink.write_at(cluster, &[0; index(SECTOR)])?;
        sink.write_zeroes(cluster, CLUSTER.min(end - cluster))?;
        signals::check()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widened_ranges_are_disjoint_and_cover_the_old_ones() {
        let ranges = [(4096, 8192), (60_000, 70_000), (300_000, 300_512)];

        assert_eq!(widen(&ranges, CLUSTER, 300_512), [(0, 131_072), (262_144, 300_512)]);
    }
}
