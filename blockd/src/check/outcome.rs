//! What a repair is asked for, and what it tells.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Report;
use crate::disk::problem::GuestRange;

/// What a repair may do. Superblock copies are always rewritten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RepairOptions {
    /// Give unused host space back. Loses nothing.
    pub leaks: bool,
    /// Go back to an older superblock generation, if the newest is damaged, a copy holds an older
    /// one, and the journal leads from there to the newest state.
    pub older_generation: bool,
    /// Turn damaged ranges into zeroes, so that they can be written again.
    pub drop_damaged: bool,
    /// Go on without the journal records from the first missing one on.
    pub accept_journal_loss: bool,
    /// Give every virtual extent whose extent of the file something else uses, too, a copy of its
    /// own. What the users read stays; at most one of them reads its own data.
    pub unshare: bool,
    /// Say what would be done, and do nothing.
    pub dry_run: bool,
}

/// Something that a repair did, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = RepairAction)]
#[serde(tag = "action", rename_all = "kebab-case")]
pub enum Action {
    /// Superblock copies that did not hold the newest state hold it now.
    RewriteSuperblocks {
        /// Number of copies.
        copies: usize,
    },
    /// The map of an older generation, with the journal replayed over it, is the newest now.
    UseOlderGeneration {
        /// The newest generation before.
        newest: u64,
        /// The older one.
        older: u64,
        /// Bytes that can be read again.
        regained_bytes: u64,
    },
    /// Damaged ranges are zeroes now.
    DropDamaged {
        /// How much of the virtual disk.
        bytes: u64,
    },
    /// The journal ends before its first missing record.
    AcceptJournalLoss {
        /// Number of that record.
        first_missing: u64,
        /// Records in the tail of a killed process that are given up with it.
        tail_records: u64,
    },
    /// Virtual extents have got extents of their own.
    Unshare {
        /// How many.
        extents: u64,
    },
    /// The journal and the tail were taken into the map.
    Checkpoint {
        /// Records.
        records: u64,
    },
    /// Host space was given back.
    PunchLeaks {
        /// How much.
        bytes: u64,
    },
}

/// Why a range does not hold what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = LossReason)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The map was damaged: it reads as zeroes now.
    Damaged,
    /// It shared its extent with something else: it may hold data that is not its own.
    Shared,
    /// The older generation says something else than the newest one did.
    Differs,
}

/// A range that a repair cost, or would cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Loss {
    /// The bytes of the virtual disk.
    pub range: GuestRange,
    /// Why.
    pub why: Why,
}

/// What a repair did.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RepairReport {
    /// Nothing was done; this is what would be.
    pub dry_run: bool,
    /// What was wrong before.
    pub before: Report,
    /// What was done.
    pub actions: Vec<Action>,
    /// What it cost.
    pub lost: Vec<Loss>,
    /// What was asked for, or needed, and not done, with the reason.
    pub refused: Vec<String>,
    /// What is wrong now; `None` for a dry run.
    pub after: Option<Report>,
}
