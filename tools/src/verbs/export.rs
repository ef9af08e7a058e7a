//! `disk export`.
//!
//! A whole export leaves out what reads as zeroes. A difference must not: over another image, what
//! is left out shows that image's content, so in an overlay zeroes are written in so many words.

use std::path::Path;
use std::time::Instant;

use blockd::disk::Disk;
use blockd::store::Access;
use format::limits::{BLOCK, SECTOR};
use format::units::index;
use format::{Context as _, Result};
use serde::Serialize;

use super::{Session, check};
use crate::cli::{Export, SinkFormat};
use crate::content::{Content, zero_runs};
use crate::image::{RunKind, Sink, create_sink};
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::pump::{PIECE, Piece, Walk, part, pump};
use crate::signals;
use crate::size::show;

/// Bytes of a qcow2 cluster as this program makes them.
const CLUSTER: u64 = 64 << 10;

/// A range that an export holds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Held {
    offset: u64,
    length: u64,
}

#[derive(Serialize)]
struct Exported<'a> {
    disk: &'a str,
    path: &'a Path,
    format: &'static str,
    size: u64,
    diff_from: Option<&'a str>,
    /// The changed ranges; only for a difference.
    #[serde(skip_serializing_if = "Option::is_none")]
    ranges: Option<Vec<Held>>,
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
}

/// `disk export`
pub fn export(s: &Session, args: &Export) -> Outcome {
    let started = Instant::now();
    let dir = s.open(Access::Read)?;
    signals::ask_to_be_told();
    let object = || format!("disk {}", args.name);
    let disk = s.disk(&dir, &args.name, args.tail)?;
    if args.verify {
        check::verify(s, &dir, &args.name).context("export", object)?;
    }
    let changed = match &args.diff_from {
        Some(from) => {
            let from = s.disk(&dir, from, args.tail)?;
            Some(changed(&disk, &from).context("export", object)?)
        }
        None => None,
    };
    let plan = plan(&disk, args.format, changed.as_deref());
    let (format, size) = (args.format.format(), disk.size());
    let sink = create_sink(&args.dest, format, size, args.overwrite)?;
    let progress = Progress::new(s.out, "exporting");
    let written = run(&disk, plan, sink, &progress).context("export", object)?;
    drop(progress);
    let ranges = changed.map(|ranges| {
        let held = ranges.into_iter().map(|(offset, end)| Held { offset, length: end - offset });
        held.collect::<Vec<_>>()
    });
    let exported = Exported {
        disk: &args.name,
        path: &args.dest,
        format: format.name(),
        size,
        diff_from: args.diff_from.as_deref(),
        ranges,
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

/// The ranges of `disk` that may differ from `from`: first byte, end.
fn changed(disk: &Disk, from: &Disk) -> Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    let size = disk.size();
    blockd::diff::changed(disk, from, &mut |range| {
        // What only the other disk has lies past the end of this one.
        let end = (range.offset + range.len).min(size);
        if range.offset < end {
            ranges.push((range.offset, end));
        }
        signals::check()
    })?;
    Ok(ranges)
}

fn plan(disk: &Disk, format: SinkFormat, changed: Option<&[(u64, u64)]>) -> Plan {
    let grain = match format {
        SinkFormat::Raw => BLOCK,
        SinkFormat::Qcow2 => CLUSTER,
    };
    let overlay = format == SinkFormat::Qcow2 && changed.is_some();
    let ranges = match changed {
        None => vec![(0, disk.size())],
        // An overlay replaces whole clusters: what was not changed in them belongs to it, too.
        Some(ranges) if overlay => widen(ranges, CLUSTER, disk.size()),
        Some(ranges) => ranges.to_vec(),
    };
    Plan { ranges, grain, overlay }
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
fn run(disk: &Disk, plan: Plan, sink: Box<dyn Sink>, progress: &Progress) -> Result<u64> {
    use std::sync::atomic::{AtomicU64, Ordering};
    let Plan { ranges, grain, overlay } = plan;
    progress.expect(|| Walk::over(disk, grain, ranges.clone()).data_bytes())?;
    let written = AtomicU64::new(0);
    let mut walk = Walk::over(disk, grain, ranges);
    pump(
        index(PIECE),
        || walk.next(),
        |lane, piece: Piece, buf| {
            if piece.kind != RunKind::Data {
                return if overlay { explicit(&*sink, piece.offset, piece.len) } else { Ok(()) };
            }
            let bytes = part(buf, piece.len);
            Content::read_at(disk, lane, piece.offset, bytes)?;
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
