//! Disks, their content, and the requests about them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::Export;
use crate::catalogue::FlattenPolicy;
use crate::check::{RepairReport, Report, ScrubReport};
use crate::content::RunKind;

/// What can be said about a disk without opening it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub disk: Uuid,
    /// The identity of its own segment.
    pub segment: Uuid,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes that the host has allocated to its own file; null when the file is missing.
    pub allocated: Option<u64>,
    /// What can be done with it.
    pub state: DiskState,
    /// The name of the disk it was created over, or its identity when it is not in this store.
    pub parent: Option<String>,
    /// Segments below it.
    pub depth: u64,
    /// Seconds since 1970 at creation.
    pub created: u64,
    /// What becomes of what is written to it: `persistent`, `nonpersistent`, `undoable` or
    /// `append`.
    pub mode: String,
    /// Set while it is being flattened: what it is to stand on.
    #[serde(default)]
    pub flattening: Option<String>,
    /// When a daemon flattens it by itself; null for what the store says.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub flatten_policy: Option<FlattenPolicy>,
}

/// What can be done with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// It can be written to.
    Active,
    /// It is immutable, and others can stand on it.
    Sealed,
    /// Its sealing was cut short and has to be repeated.
    Sealing,
    /// Its file is not in the store.
    Missing,
    /// Its file cannot be read as a segment.
    Unreadable,
}

impl DiskState {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DiskState::Active => "active",
            DiskState::Sealed => "sealed",
            DiskState::Sealing => "sealing",
            DiskState::Missing => "missing",
            DiskState::Unreadable => "unreadable",
        }
    }
}

/// Everything about a disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskDetails {
    /// The disk.
    #[serde(flatten)]
    pub disk: Disk,
    /// The segment that an undo goes back to; null for mode `persistent`.
    pub base: Option<Uuid>,
    /// `no` when it was closed in order; `plain` or `with-tail` while a writer has it open, and
    /// after one that did not close it.
    pub attached: String,
    /// Digest of the content of a sealed disk, in hexadecimal digits.
    pub digest: Option<String>,
    /// The segments that its map may point into.
    pub segments: Vec<ChainRow>,
    /// Names of the disks that stand on it.
    pub dependents: Vec<String>,
    /// Extents of 64 KiB in use in its own segment.
    pub own_extents: u64,
    /// Number of its newest superblock.
    pub generation: u64,
    /// Number of the last opening for writing.
    pub epoch: u64,
    /// Number of the owner of the volume.
    pub owner_epoch: u64,
    /// Its journal.
    pub journal: JournalUse,
    /// Bytes of memory that its map takes while it is open.
    pub map_memory: u64,
    /// Feature bits, in hexadecimal digits.
    pub features: FeatureBits,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// Sockets where a daemon serves it.
    pub exports: Vec<Export>,
}

/// A segment below a disk, or its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChainRow {
    /// What the map calls it.
    pub index: u16,
    /// Its identity.
    pub segment: Uuid,
    /// True for the disk's own segment.
    pub own: bool,
    /// Digest of its content, in hexadecimal digits.
    pub digest: Option<String>,
}

/// How full a journal is. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JournalUse {
    /// In all.
    pub size: u64,
    /// In use.
    pub used: u64,
}

/// Feature bits of a segment, each class as hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FeatureBits {
    /// Must be understood to open the disk.
    pub incompat: String,
    /// Must be understood to write to it.
    pub read_only_compat: String,
    /// May be ignored.
    pub compat: String,
}

/// A disk to be created.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateDisk {
    /// Its name.
    pub name: String,
    /// Bytes; without it, the size of the parent.
    pub size: Option<u64>,
    /// The sealed disk to stand on.
    pub parent: Option<String>,
    /// Bytes of the journal, a multiple of 64 KiB; without it, 16 MiB.
    pub journal: Option<u64>,
}

/// Whether a disk may be opened although completed writes of a live session are missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LostTail {
    /// Open it, and lose them.
    pub accept_lost_tail: bool,
}

/// A new name.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameDisk {
    /// The name.
    pub to: String,
}

/// A size to change to. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NewSize {
    /// This size.
    To(u64),
    /// This much more.
    Grow(u64),
    /// This much less.
    Shrink(u64),
}

impl NewSize {
    /// The size that this makes of `present`; `None` when there is no such size.
    #[must_use]
    pub fn of(self, present: u64) -> Option<u64> {
        match self {
            NewSize::To(size) => Some(size),
            NewSize::Grow(by) => present.checked_add(by),
            NewSize::Shrink(by) => present.checked_sub(by),
        }
    }
}

/// A change of size.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeDisk {
    /// The size to change to.
    pub size: NewSize,
    /// Drop the data that lies past the new end.
    #[serde(default)]
    pub drop_data: bool,
    /// Go on although completed writes of a live session are missing.
    #[serde(default)]
    pub accept_lost_tail: bool,
}

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedDisk {
    /// The name of the disk.
    pub removed: String,
    /// Bytes that the host had allocated to it.
    pub freed: u64,
}

/// What to check.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CheckDisk {
    /// Verify the checksums of sealed data, too.
    pub data: bool,
    /// Go on although completed writes of a live session are missing.
    pub accept_lost_tail: bool,
}

/// What a check found.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Checked {
    /// The name of the disk.
    pub disk: String,
    /// The report.
    #[serde(flatten)]
    pub report: Report,
}

/// What a repair may do.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RepairDisk {
    /// Make damaged ranges readable again, as zeroes.
    pub drop_damaged: bool,
    /// Go back to an older state of the map.
    pub older_generation: bool,
    /// Forget flushed changes that the journal no longer has.
    pub accept_journal_loss: bool,
    /// Give ranges that use one extent twice a copy each.
    pub unshare: bool,
    /// Say what would be done, and change nothing.
    pub dry_run: bool,
    /// Go on although completed writes of a live session are missing.
    pub accept_lost_tail: bool,
}

/// What a repair did.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Repaired {
    /// The name of the disk.
    pub disk: String,
    /// The report.
    #[serde(flatten)]
    pub report: RepairReport,
}

/// What a scrub found.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Scrubbed {
    /// The name of the disk.
    pub disk: String,
    /// The report.
    #[serde(flatten)]
    pub report: ScrubReport,
}

/// Identity of the content of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Digested {
    /// The name of the disk.
    pub disk: String,
    /// Bytes of the disk.
    pub size: u64,
    /// Equal for equal content, wherever and however it is stored: 64 hexadecimal digits.
    pub digest: String,
}

/// What a range of a map says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MapState {
    /// Never written: reads as zeroes.
    Hole,
    /// Written as zeroes, or discarded.
    Zero,
    /// Data.
    Data,
    /// Cannot be read.
    Damaged,
}

impl MapState {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            MapState::Hole => "hole",
            MapState::Zero => "zero",
            MapState::Data => "data",
            MapState::Damaged => "damaged",
        }
    }
}

/// A range of a disk in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MapRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// What it is.
    pub state: MapState,
    /// The segment that holds the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment: Option<Uuid>,
    /// Byte offset in the file of that segment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_offset: Option<u64>,
}

/// Two disks to be compared.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Compare {
    /// Name of one disk.
    pub a: String,
    /// Name of the other.
    pub b: String,
    /// Count all differences instead of stopping at the first.
    #[serde(default)]
    pub all: bool,
    /// Go on although completed writes of a live session are missing.
    #[serde(default)]
    pub accept_lost_tail: bool,
}

/// How two contents differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Compared {
    /// One side, as it was named.
    pub a: String,
    /// The other.
    pub b: String,
    /// Same size, same bytes.
    pub identical: bool,
    /// Bytes of one side.
    pub size_a: u64,
    /// Bytes of the other.
    pub size_b: u64,
    /// Byte offset of the first difference of the part that both have.
    pub first_difference: Option<u64>,
    /// Bytes that differ in the part that both have; only when all were counted.
    pub differing_bytes: Option<u64>,
    /// The same in blocks of 4 KiB.
    pub differing_blocks: Option<u64>,
}

/// A range of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

/// Bytes of a disk that were read, written or discarded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// The name of the disk.
    pub disk: String,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

/// The space that a store takes and has left. Bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Df {
    /// The folder of the store.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Of the file system that the store is on.
    pub total: u64,
    /// Of it, what is left.
    pub free: u64,
    /// What the host has allocated to the files of the store.
    pub used: u64,
    /// Of all virtual disks.
    pub virtual_size: u64,
    /// By disk.
    pub disks: Vec<DiskSpace>,
}

/// The space that a disk takes. Bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskSpace {
    /// Its name.
    pub name: String,
    /// Of the virtual disk.
    pub size: u64,
    /// What the host has allocated to its own file; null when the file is missing.
    pub allocated: Option<u64>,
}

/// What a session is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SessionUse {
    /// Reading a part.
    Read,
    /// Reading all of it, to make an image or to compare.
    Export,
    /// Writing to a disk.
    Write,
    /// Filling a new disk, which appears when the session is finished, or not at all.
    Import,
}

/// A session to be opened. It ends when it is finished or dropped, or with its connection.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenSession {
    /// Name of the disk.
    pub disk: String,
    /// What it is for.
    #[serde(rename = "use")]
    pub purpose: SessionUse,
    /// Bytes of the disk to be made; for an import only.
    pub size: Option<u64>,
    /// The sealed disk that the one to be made stands on; for an import only.
    pub parent: Option<String>,
    /// Bytes that will be moved, if that is known: for whoever looks at the job.
    pub total: Option<u64>,
    /// Go on although completed writes of a live session are missing.
    #[serde(default)]
    pub accept_lost_tail: bool,
}

/// A disk that is held open for one client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Names it in further requests. It is the number of its job, too.
    pub id: u64,
    /// Name of the disk.
    pub disk: String,
    /// Bytes of the disk.
    pub size: u64,
}

/// A range of a disk of one kind, for whoever is going to read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// What it holds.
    pub kind: RunKind,
}

/// What became of bytes that were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stored {
    /// Bytes of them that were stored; an import does not store blocks of zeroes.
    pub stored: u64,
}
