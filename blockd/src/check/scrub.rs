//! Scrubbing: all data of the sealed segments that a disk stands on is read and compared with the
//! checksums and the digest made when they were sealed.
//!
//! Invariants:
//! - Whether a block is to be checked is decided by the map of its own segment, never by its sum.
//! - A bad block costs that block: the rest is read on, and the block is named by where this disk
//!   shows it.
//! - What has no checksum (data of an active segment, or of one whose seal is not finished) is
//!   counted, so that nobody takes silence for health.

use std::collections::hash_map::{Entry, HashMap};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use format::entry::BlockState;
use format::limits::BLOCK;
use format::superblock::{Seal, Superblock};
use format::units::{SegmentIdx, crc, index};
use format::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::sums::SumReader;
use crate::disk::load::{How, Loaded, OnDamage, load_state, newest};
use crate::disk::problem::{Problem, Problems, Severity, What};
use crate::disk::seal::{Digest, OwnRun, RUN_BLOCKS, own_runs};
use crate::segment::Segments;
use crate::store::File;
use crate::store::buf::AlignedBuf;

/// What a scrub found.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ScrubReport {
    /// Nothing is wrong.
    pub clean: bool,
    /// What is wrong: bad blocks by where this disk shows them, and segments that cannot be
    /// scrubbed.
    pub problems: Vec<Problem>,
    /// Bytes that were compared with their checksums.
    pub summed_bytes: u64,
    /// Mapped bytes of this disk that have no checksum.
    pub unsummed_bytes: u64,
    /// Sealed segments that were read.
    pub segments: u64,
}

/// Why a block is bad, by segment and block in its file.
type BadBlocks = BTreeMap<Uuid, BTreeMap<u64, String>>;

/// A segment to be read.
struct Part {
    segment: Uuid,
    file: Arc<dyn File>,
    superblock: Superblock,
    runs: Vec<OwnRun>,
    sums: SumReader,
}

/// Scrubs a disk. `progress` gets the bytes read and in all; an error from it stops the scrub.
///
/// # Errors
/// As [`super::check`], or what `progress` reports.
pub fn scrub(
    file: &Arc<dyn File>,
    segments: &dyn Segments,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<ScrubReport> {
    let (sb, problems) = newest(file.as_ref())?;
    let how = How { on_damage: OnDamage::Keep, search_ring: false };
    let loaded = load_state(file, sb, segments, None, (how, problems))?;
    let mut report = scrub_loaded(&loaded, segments, progress)?;
    // What cannot be reached through a damaged map was not read.
    report.clean &= loaded.problems.is_empty();
    report.problems.splice(0..0, loaded.problems);
    Ok(report)
}

/// As [`scrub`], of a disk that is loaded already.
pub(super) fn scrub_loaded(
    loaded: &Loaded,
    segments: &dyn Segments,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<ScrubReport> {
    let mut problems = Problems::default();
    let mapped = mapped_bytes(loaded)?;
    let mut parts: Vec<Part> = Vec::new();
    let (mut tried, mut unsummed) = (HashMap::new(), 0);
    for (&row, bytes) in &mapped {
        let segment = loaded.table.row(row).map_or(Uuid::nil(), |row| row.segment);
        if let Entry::Vacant(first) = tried.entry(segment) {
            let part = part(loaded, row, segments, &mut problems)?;
            first.insert(part.is_some());
            parts.extend(part);
        }
        unsummed += if tried[&segment] { 0 } else { *bytes };
    }
    let total: u64 = parts.iter().flat_map(|p| &p.runs).map(|run| run.count * BLOCK).sum();
    let mut bad = BadBlocks::new();
    let mut done = 0;
    for part in &mut parts {
        let found = part.read(&mut |bytes| {
            done += bytes;
            progress(done, total)
        })?;
        if found.unsummed > 0 {
            let reason = format!("the checksums of {} blocks are damaged", found.unsummed);
            problems.note(Problem::new(What::Digest, part.object(), &Error::corrupt(reason)));
        }
        if found.blocks.is_empty() && found.digest != part.superblock.digest {
            let error = Error::corrupt("its data does not match its content digest");
            problems.note(Problem::new(What::Digest, part.object(), &error));
        }
        bad.insert(part.segment, found.blocks);
    }
    bad.retain(|_, blocks| !blocks.is_empty());
    name_bad_blocks(loaded, &bad, &mut problems)?;
    let problems = problems.into_vec();
    Ok(ScrubReport {
        clean: problems.is_empty(),
        problems,
        summed_bytes: total,
        unsummed_bytes: unsummed,
        segments: parts.len() as u64,
    })
}

/// Mapped bytes of the disk by row of its segment table.
fn mapped_bytes(loaded: &Loaded) -> Result<BTreeMap<SegmentIdx, u64>> {
    let mut mapped = BTreeMap::new();
    loaded.pieces(&mut |piece| {
        if let BlockState::Data { segment, .. } = piece.state {
            *mapped.entry(segment).or_default() += piece.count * BLOCK;
        }
        Ok(())
    })?;
    Ok(mapped)
}

/// What is to be read behind a row; `None` when there are no checksums to compare it with.
fn part(
    loaded: &Loaded,
    row: SegmentIdx,
    segments: &dyn Segments,
    problems: &mut Problems,
) -> Result<Option<Part>> {
    // Missing rows and parents were noticed when the disk was loaded.
    let Some(file) = loaded.rows.get(usize::from(row.get())).and_then(Option::as_ref) else {
        return Ok(None);
    };
    let segment = loaded.table.row(row)?.segment;
    let own = row == loaded.superblock.own_index;
    let superblock = match own {
        true => loaded.superblock.clone(),
        false => segments.sealed(segment)?.superblock.clone(),
    };
    if superblock.seal != Seal::Done {
        return Ok(None);
    }
    let object = || format!("segment {segment}");
    let how = How { on_damage: OnDamage::Keep, search_ring: false };
    let state =
        load_state(&file.file, superblock.clone(), segments, None, (how, Problems::default()));
    let runs = state.and_then(|state| {
        match state.problems.iter().find(|p| p.what.severity() > Severity::Minor) {
            Some(problem) => Err(problem.to_error()),
            None => own_runs(&state.map, superblock.virtual_size),
        }
    });
    let start = superblock.data_start();
    let ready = runs.and_then(|runs| {
        let sums = SumReader::open(&file.file, &superblock)?;
        let covered = start.first_page().0 + superblock.sums.bytes / 4;
        match runs.last() {
            Some(run) if run.block.0 + run.count > covered => {
                Err(Error::corrupt("its checksums do not cover all of its data"))
            }
            _ => Ok((runs, sums)),
        }
    });
    match ready {
        Ok((runs, sums)) => {
            let file = Arc::clone(&file.file);
            Ok(Some(Part { segment, file, superblock, runs, sums }))
        }
        Err(e) if e.kind().is_of_host() => Err(e),
        Err(e) => {
            problems.note(Problem::new(What::Digest, object(), &e));
            Ok(None)
        }
    }
}

/// What reading a segment found.
struct Found {
    blocks: BTreeMap<u64, String>,
    /// Blocks whose checksums cannot be read.
    unsummed: u64,
    digest: [u8; 32],
}

impl Part {
    fn object(&self) -> String {
        format!("segment {}", self.segment)
    }

    /// Reads all of it; `progress` gets the bytes of each read.
    fn read(&mut self, progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<Found> {
        let mut digest = Digest::new(self.segment);
        let (mut blocks, mut unsummed) = (BTreeMap::new(), 0);
        let mut buf = AlignedBuf::zeroed(index(RUN_BLOCKS * BLOCK));
        for run in &self.runs {
            let bytes = &mut buf[..index(run.count * BLOCK)];
            let whole = self.file.read_at(run.block.file_offset(), bytes).is_ok();
            for (i, bytes) in (0..).zip(bytes.chunks_exact_mut(index(BLOCK))) {
                let block = run.block.plus(i);
                if !whole && let Err(e) = self.file.read_at(block.file_offset(), bytes) {
                    blocks.insert(block.0, format!("it cannot be read: {e}"));
                    continue;
                }
                match self.sums.get(block) {
                    Ok(sum) if sum == crc(bytes) => {}
                    Ok(_) => _ = blocks.insert(block.0, "it does not match its checksum".into()),
                    Err(e) if e.kind() == Kind::Corrupt => unsummed += 1,
                    Err(e) => return Err(e),
                }
                digest.add(run.guest.plus(i), bytes);
            }
            progress(run.count * BLOCK)?;
        }
        Ok(Found { blocks, unsummed, digest: digest.finish() })
    }
}

/// Turns bad blocks into ranges of this disk.
fn name_bad_blocks(loaded: &Loaded, bad: &BadBlocks, problems: &mut Problems) -> Result<()> {
    let mut shown: HashMap<Uuid, BTreeSet<u64>> = HashMap::new();
    loaded.pieces(&mut |piece| {
        let BlockState::Data { segment, block } = piece.state else { return Ok(()) };
        let Ok(row) = loaded.table.row(segment) else { return Ok(()) };
        let Some(blocks) = bad.get(&row.segment) else { return Ok(()) };
        let first = block.0 + row.base.block(0).0;
        for (at, why) in blocks.range(first..first + piece.count) {
            shown.entry(row.segment).or_default().insert(*at);
            let guest = piece.block.plus(at - first);
            let object = format!("block {at} of segment {}", row.segment);
            let problem = Problem::new(What::DataSum, object, &Error::corrupt(why.clone()));
            problems.note(problem.costing(guest.offset().0, BLOCK));
        }
        Ok(())
    })?;
    for (segment, blocks) in bad {
        let here = shown.get(segment).map_or(0, BTreeSet::len);
        if here < blocks.len() {
            let hidden = blocks.len() - here;
            let reason = format!("{hidden} more blocks are bad, but this disk does not show them");
            let object = format!("segment {segment}");
            problems.note(Problem::new(What::DataSum, object, &Error::corrupt(reason)));
        }
    }
    Ok(())
}
