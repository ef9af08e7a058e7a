//! What goes over the wire, and what the command line prints as JSON: one set of types for both.
//!
//! Invariants: those of blockd's types. Sizes are bytes, times seconds since 1970, identities
//! UUIDs. Fields may be added; none is removed or changes its meaning. A request with a field that
//! is not known is refused.

mod events;
mod net;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

pub use crate::devices::{LinkState, LinkWhen, NetCounts, NetStatus};
pub use events::{Event, EventKind};
pub use net::{ForkNet, RunNet, VmNet};

/// A virtual machine to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunVm {
    /// Its name.
    pub name: String,
    /// What it boots: a Linux kernel (bzImage, or vmlinux with a PVH entry), or another ELF file
    /// with one. An absolute path.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// The first file system of a Linux kernel. An absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// The command line of the kernel; without it, what suits most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Its disks, in the order in which it sees them.
    #[serde(default)]
    pub disks: Vec<UseDisk>,
    /// Its network card, if it is to have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<RunNet>,
    /// Bytes of memory, whole MiB.
    pub memory_bytes: u64,
    /// Processors.
    pub vcpus: u8,
    /// Do not let it run yet.
    #[serde(default)]
    pub paused: bool,
}

/// A disk of blockd's for a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UseDisk {
    /// Its name.
    pub disk: String,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// How requests are to reach blockd. Nothing else is taken instead: a machine for which it
    /// cannot be is not made.
    #[serde(default)]
    pub path: DiskPath,
}

/// How a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// It runs.
    Running,
    /// It does not run, and can go on.
    Paused,
    /// It is gone; what it was is known until it is removed.
    Ended,
}

impl VmState {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            VmState::Running => "running",
            VmState::Paused => "paused",
            VmState::Ended => "ended",
        }
    }
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmEnd {
    /// The stable name of the reason: `power-off`, `reset`, `stopped`, `killed`, `triple-fault`,
    /// `internal-error`, `failed`.
    pub reason: String,
    /// What else there is to say.
    pub detail: String,
    /// Seconds since 1970.
    pub at: u64,
}

/// How the requests of a machine's disk reach blockd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskPath {
    /// Data is copied through memory that only forkd and blockd share; blockd never maps the
    /// machine's own.
    #[default]
    Arena,
    /// blockd maps the machine's memory, and serves its requests there without a copy. So it is
    /// until the first fork or snapshot of a machine that was booted; before that is made, the disk
    /// changes to `arena`, for good.
    Direct,
}

impl DiskPath {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DiskPath::Arena => "arena",
            DiskPath::Direct => "direct",
        }
    }
}

/// A disk of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDisk {
    /// Its name in blockd's store.
    pub disk: String,
    /// Its identity there.
    pub id: Uuid,
    /// Writes are refused.
    pub read_only: bool,
    /// It was made for this machine, and goes with it.
    pub own: bool,
    /// How requests reach blockd now.
    pub path: DiskPath,
}

/// The machine that another one was forked from, or that a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmParent {
    /// Its name at that time.
    pub name: String,
    /// Its identity.
    pub id: Uuid,
}

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: Uuid,
    /// How it is.
    pub state: VmState,
    /// How it ended, if it did.
    pub end: Option<VmEnd>,
    /// Its process, while there is one.
    pub pid: Option<u32>,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Its processors.
    pub vcpus: u8,
    /// Its disks, in the order in which it sees them.
    pub disks: Vec<VmDisk>,
    /// Its network card, if it has one.
    #[serde(default)]
    pub net: Option<VmNet>,
    /// The identity that tells its guest that it was forked or restored.
    pub generation_id: Uuid,
    /// The address of its network card, if it has one.
    pub mac: String,
    /// What it was forked from, or the snapshot was taken of that it was restored from.
    pub parent: Option<VmParent>,
    /// Sealed layers of memory below its own.
    pub layers: u64,
    /// Seconds since 1970 at its making.
    pub created: u64,
    /// The socket of its serial console.
    #[schema(value_type = String)]
    pub console: PathBuf,
}

/// Children to make of a machine: all of them, or none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkVm {
    /// Their names.
    pub children: Vec<String>,
    /// Do not let them run yet.
    #[serde(default)]
    pub paused: bool,
    /// What their network cards are connected to; nothing without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<ForkNet>,
}

/// Children that were made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkedVms {
    /// The children, in the order in which they were asked for.
    pub children: Vec<Vm>,
    /// Microseconds for which the parent did not run.
    pub pause_us: u64,
    /// Microseconds of that which its disks took.
    pub disks_us: u64,
    /// Microseconds from the request until all children ran.
    pub ready_us: u64,
    /// Microseconds that the whole fork took, until everything was durable.
    pub took_us: u64,
    /// Children for which no shell was ready.
    pub cold: u64,
    /// Whether the children stood by: they were connected to their disks before.
    #[serde(default)]
    pub stood_by: bool,
}

/// A snapshot to take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// The folder to make. An absolute path at which nothing is.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

/// A disk of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotDisk {
    /// Its name in blockd's store at that time.
    pub disk: String,
    /// Its identity there.
    pub id: Uuid,
    /// It is the very disk of the machine, which reads it only; else it was made for the snapshot.
    pub read_only: bool,
}

/// A snapshot that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotTaken {
    /// The folder.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Its identity.
    pub id: Uuid,
    /// The machine.
    pub vm: VmParent,
    /// Its disks, in the order in which the machine sees them.
    pub disks: Vec<SnapshotDisk>,
    /// Bytes of memory that are not in holes.
    pub memory_bytes: u64,
    /// Microseconds for which the machine did not run.
    pub pause_us: u64,
    /// Microseconds of that which its disks took.
    pub disks_us: u64,
    /// Microseconds that all of it took, until everything was durable.
    pub took_us: u64,
}

/// A machine to make of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreVm {
    /// The folder of the snapshot. An absolute path.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Name of the machine.
    pub name: String,
    /// Disks to stand on instead of those of the snapshot, as many: after it came to another store.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// Do not let it run yet.
    #[serde(default)]
    pub paused: bool,
    /// What its network card is connected to; nothing without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<ForkNet>,
}

/// A snapshot to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoveSnapshot {
    /// Its folder. An absolute path.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

/// A snapshot that was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedSnapshot {
    /// Where it was.
    #[schema(value_type = String)]
    pub removed: PathBuf,
    /// Disks that went with it.
    pub disks: Vec<String>,
}

/// Whether what belongs to a machine goes with it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct RemoveVm {
    /// End it first, if it has not ended.
    pub force: bool,
    /// Keep the disks that were made for it.
    pub keep_disks: bool,
}

/// How a machine is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct StopVm {
    /// Cut its power without asking its guest to turn itself off.
    pub force: bool,
    /// Milliseconds that the guest has for turning itself off, 3,600,000 at most.
    pub timeout_ms: u64,
}

impl Default for StopVm {
    fn default() -> Self {
        StopVm { force: false, timeout_ms: 30_000 }
    }
}

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedVm {
    /// The name of the machine.
    pub removed: String,
    /// Disks that went with it.
    pub disks: Vec<String>,
}

/// What a machine uses of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmStats {
    /// The machine.
    pub name: String,
    /// How it is.
    pub state: VmState,
    /// Bytes of the host's memory that only its process uses.
    pub private_bytes: u64,
    /// Bytes that it shares with others.
    pub shared_bytes: u64,
    /// Its share of all of that: what it shares counts by the number of those who do.
    pub proportional_bytes: u64,
    /// Page faults of its process that needed no I/O.
    pub faults: u64,
    /// Times that its processors came out of the guest to have something done: accesses to devices,
    /// stops.
    #[serde(default)]
    pub exits: u64,
    /// Nanoseconds of processor time of its process.
    pub cpu_ns: u64,
    /// Its network card, if it has one and its process says.
    #[serde(default)]
    pub net: Option<NetStatus>,
}

/// Shells that wait for a fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolClass {
    /// Bytes of memory of a machine that one is for.
    pub memory_bytes: u64,
    /// Its processors.
    pub vcpus: u8,
    /// How many are ready.
    pub ready: u64,
}

/// How the daemon is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Version of the daemon.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Its folder.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// The socket of the blockd that has the disks.
    #[schema(value_type = String)]
    pub blockd: PathBuf,
    /// Seconds since 1970 at its start.
    pub started: u64,
    /// Machines that have not ended.
    pub vms: u64,
    /// Shells that wait, by the machines that they are for.
    pub pool: Vec<PoolClass>,
    /// Machines that are wanted ready of each kind.
    pub pool_size: u64,
    /// The machine for whose next fork children stand by, if any do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<String>,
    /// Things that are to be removed and could not be yet.
    pub unfinished: u64,
    /// What confines the daemon: `landlock`, `seccomp`, both or nothing.
    pub sandbox: Vec<String>,
}
