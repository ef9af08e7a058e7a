//! Checking, scrubbing and repairing a disk that nobody has open.
//!
//! Invariants:
//! - [`check`] and [`scrub`] write nothing, and report damage; they fail only when nothing can be
//!   said (no superblock, no segment table) or the host reports an error.
//! - Whatever the file holds, there is no panic, and no memory out of proportion to it: everything
//!   comes in through [`crate::disk::load`].
//! - The crash tests check what they find with the same code.
//!
//! The caller holds the store's lock: a disk that changes meanwhile looks damaged.

mod commit;
mod leaks;
mod outcome;
mod parents;
mod repair;
mod scrub;
pub(crate) mod sums;

use std::sync::Arc;

use format::entry::BlockState;
use format::limits::BLOCK;
use format::superblock::{Attached, Seal, State, Superblock};
use format::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::disk::load::{How, Loaded, OnDamage, load_state, newest, older};
use crate::disk::problem::{Problem, Problems, Remedy, What};
use crate::disk::tail::Tail;
use crate::segment::Segments;
use crate::store::File;
use leaks::Run;

pub use outcome::{Action, Loss, RepairOptions, RepairReport, Why};
pub use repair::repair;
pub use scrub::{ScrubReport, scrub};

/// What to check.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckOptions {
    /// Also read all data of sealed segments and compare it with its checksums: a [`scrub`].
    pub data: bool,
}

/// What a check found.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// Identity of the segment.
    pub segment: Uuid,
    /// Name of the disk, as the segment says.
    pub name: String,
    /// Nothing is wrong. Unused host space ([`What::Leak`]) does not count: a writer leaves some.
    pub clean: bool,
    /// Everything that is wrong can be mended by a repair with the right options.
    pub repairable: bool,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Numbers.
    pub stats: Stats,
}

/// One of a few fixed names.
pub type StateName = &'static str;

/// Numbers about a disk, as of the end of its journal. All sizes are bytes.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq, ToSchema)]
#[schema(as = CheckStats)]
pub struct Stats {
    /// `active` or `sealed`.
    #[serde(deserialize_with = "known_name")]
    #[schema(value_type = String)]
    pub state: StateName,
    /// `none`, `pending` or `done`.
    #[serde(deserialize_with = "known_name")]
    #[schema(value_type = String)]
    pub seal: StateName,
    /// `no`, `plain` or `with-tail`: whether a writer has it open, or did not close it.
    #[serde(deserialize_with = "known_name")]
    #[schema(value_type = String)]
    pub attached: StateName,
    /// Generation of the newest superblock.
    pub generation: u64,
    /// Number of the last opening for writing.
    pub epoch: u64,
    /// Size of the virtual disk.
    pub virtual_size: u64,
    /// Ancestors that the map may point into.
    pub depth: u64,
    /// Virtual bytes that hold data.
    pub mapped_bytes: u64,
    /// Virtual bytes that are explicitly zero.
    pub zero_bytes: u64,
    /// Virtual bytes that were never written.
    pub hole_bytes: u64,
    /// Virtual bytes that cannot be read because the map is damaged.
    pub damaged_bytes: u64,
    /// Mapped bytes that lie in the own segment.
    pub own_data_bytes: u64,
    /// Extents of the own segment in use.
    pub extents_used: u64,
    /// Pages of the map, inner pages and vectors included, in any segment.
    pub map_pages: u64,
    /// Journal records that wait for a checkpoint.
    pub journal_records: u64,
    /// Records that only the tail of a killed process holds.
    pub tail_records: u64,
    /// Length of the own file.
    pub file_bytes: u64,
    /// What the host has allocated to it.
    pub allocated_bytes: u64,
    /// Of that, what nothing names; `null` when damage hides what is named.
    pub leaked_bytes: Option<u64>,
    /// Mapped bytes without a checksum; `null` unless the data was checked.
    pub unsummed_bytes: Option<u64>,
}

/// Every name that a state in [`Stats`] can have.
const STATE_NAMES: [StateName; 8] =
    ["active", "sealed", "none", "pending", "done", "no", "plain", "with-tail"];

fn known_name<'de, D: Deserializer<'de>>(from: D) -> Result<StateName, D::Error> {
    let name = String::deserialize(from)?;
    let known = STATE_NAMES.into_iter().find(|known| *known == name);
    known.ok_or_else(|| serde::de::Error::unknown_variant(&name, &STATE_NAMES))
}

/// A disk as loaded for a check, and what was found.
struct Examined {
    loaded: Loaded,
    problems: Problems,
    leaks: Option<Vec<Run>>,
}

/// Checks a disk. `tail` is what a killed process left behind, if anything.
///
/// # Errors
/// `Corrupt` or `Unsupported` when no superblock or segment table can be used, or what the host
/// reports.
pub fn check(
    file: &Arc<dyn File>,
    segments: &dyn Segments,
    tail: Option<&Tail>,
    options: &CheckOptions,
) -> Result<Report> {
    check_watched(file, segments, tail, options, &mut |_, _| Ok(()))
}

/// As [`check`]; `progress` gets the bytes of data read and in all.
///
/// # Errors
/// As [`check`], or what `progress` reports.
pub fn check_watched(
    file: &Arc<dyn File>,
    segments: &dyn Segments,
    tail: Option<&Tail>,
    options: &CheckOptions,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Report> {
    let examined = examine(file, segments, tail)?;
    if !options.data {
        return report(examined, None);
    }
    let scrubbed = scrub::scrub_loaded(&examined.loaded, segments, progress)?;
    report(examined, Some(scrubbed))
}

fn examine(file: &Arc<dyn File>, segments: &dyn Segments, tail: Option<&Tail>) -> Result<Examined> {
    let (sb, problems) = newest(file.as_ref())?;
    let how = How { on_damage: OnDamage::Keep, search_ring: true };
    let mut loaded = load_state(file, sb, segments, tail, (how, problems))?;
    let mut problems = Problems::default();
    problems.extend(std::mem::take(&mut loaded.problems));
    problems.extend(older::better(file, segments, tail, &loaded)?);
    parents::check(&loaded, segments, &mut problems)?;
    if loaded.superblock.seal == Seal::Pending {
        problems.note(pending("the segment"));
    }
    let leaks = if loaded.hidden { None } else { Some(leaks::find(&loaded)?) };
    if let Some(bytes) = leaks.as_deref().map(leaks::bytes).filter(|b| *b > 0) {
        let reason = format!("nothing names {bytes} bytes that the host has allocated");
        let error = Error::corrupt(reason).hint("a repair gives them back");
        problems.note(Problem::new(What::Leak, "the segment file", &error));
    }
    Ok(Examined { loaded, problems, leaks })
}

fn pending(object: impl Into<String>) -> Problem {
    let error = Error::corrupt("its sealing was cut short: it has no checksums and no digest")
        .hint("seal it again");
    Problem::new(What::SealPending, object, &error)
}

fn report(examined: Examined, scrubbed: Option<ScrubReport>) -> Result<Report> {
    let Examined { loaded, mut problems, leaks } = examined;
    let mut stats = stats(&loaded)?;
    stats.leaked_bytes = leaks.as_deref().map(leaks::bytes);
    if let Some(scrubbed) = scrubbed {
        stats.unsummed_bytes = Some(scrubbed.unsummed_bytes);
        problems.extend(scrubbed.problems);
    }
    Ok(Report::new(&loaded.superblock, problems.into_vec(), stats))
}

impl Report {
    fn new(sb: &Superblock, mut problems: Vec<Problem>, stats: Stats) -> Self {
        if sb.state == State::Sealed {
            // Nobody changes the map of a sealed segment, a repair included.
            let kept = [Remedy::Plain, Remedy::Leaks, Remedy::Seal, Remedy::Parent];
            for p in problems.iter_mut().filter(|p| !kept.contains(&p.remedy)) {
                p.remedy = Remedy::None;
            }
        }
        Report {
            segment: sb.segment,
            name: sb.name.clone(),
            clean: problems.iter().all(|p| p.what == What::Leak),
            repairable: problems.iter().all(|p| p.remedy.is_repair()),
            problems,
            stats,
        }
    }
}

fn stats(loaded: &Loaded) -> Result<Stats> {
    let sb = &loaded.superblock;
    let file = loaded.own_file();
    let (mut mapped, mut zero, mut hole, mut own) = (0, 0, 0, 0);
    loaded.pieces(&mut |piece| {
        let offset = piece.block.offset().0;
        let bytes = (piece.count * BLOCK).min(sb.virtual_size - offset);
        match piece.state {
            BlockState::Hole => hole += bytes,
            BlockState::Zero => zero += bytes,
            BlockState::Data { segment, .. } => {
                mapped += bytes;
                own += if segment == sb.own_index { bytes } else { 0 };
            }
        }
        Ok(())
    })?;
    let vectors = |at: &format::node::PageRef| at.vectors.map_or(0, |v| u64::from(v.count));
    let leaf_pages: u64 = loaded.tree.leaves().map(|(_, at)| 1 + vectors(&at)).sum();
    Ok(Stats {
        state: if sb.state == State::Active { "active" } else { "sealed" },
        seal: match sb.seal {
            Seal::None => "none",
            Seal::Pending => "pending",
            Seal::Done => "done",
        },
        attached: match sb.attached {
            Attached::No => "no",
            Attached::Plain => "plain",
            Attached::WithTail => "with-tail",
        },
        generation: sb.generation.0,
        epoch: sb.epoch.0,
        virtual_size: sb.virtual_size,
        depth: loaded.table.iter().filter(|(i, _)| *i != sb.own_index).count() as u64,
        mapped_bytes: mapped,
        zero_bytes: zero,
        hole_bytes: hole,
        damaged_bytes: loaded.damaged.in_bytes(sb.virtual_size).iter().map(|r| r.len).sum(),
        own_data_bytes: own,
        extents_used: loaded.space.used_count(),
        map_pages: loaded.tree.pages().count() as u64 + leaf_pages,
        journal_records: loaded.replayed.0,
        tail_records: loaded.replayed.1,
        file_bytes: file.file.size()?,
        allocated_bytes: file.file.allocated()?,
        leaked_bytes: None,
        unsummed_bytes: None,
    })
}
