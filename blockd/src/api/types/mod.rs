//! What goes over the wire, and what the command line prints as JSON: one set of types for both.
//!
//! Invariants:
//! - Sizes and offsets are bytes, times seconds since 1970, identities UUIDs.
//! - Fields may be added; none is removed or changes its meaning.
//! - A request with a field that is not known is refused, so that a misspelt option is not ignored.

mod daemon;
mod disks;
mod exports;
mod failure;
mod flatten;
mod forks;
mod modes;
mod socket;

pub use daemon::{Event, EventKind, HandOver, HandedOver, Health, Job, JobKind, JobState, Version};
pub use disks::{
    ByteRange, ChainRow, CheckDisk, Checked, Compare, Compared, CreateDisk, Df, Digested, Disk,
    DiskDetails, DiskSpace, DiskState, Extent, FeatureBits, JournalUse, LostTail, MapRange,
    MapState, Moved, NewSize, OpenSession, RemovedDisk, RenameDisk, RepairDisk, Repaired,
    ResizeDisk, Scrubbed, Session, SessionUse, Stored,
};
pub use exports::{AttachDisk, DetachDisk, DiskStats, Export, ExportKind, ExportSpec, ExportState};
pub use failure::{Failure, FailureBody};
pub use flatten::{FlattenDisk, FlattenWhen, Flattened, SetFlattenPolicy};
pub use forks::{
    CutFork, CutForks, ForkAnswer, ForkDisk, ForkDisks, ForkMode, ForkedDisks, JobOrCut, MadeChild,
    ReleasedFork, ServeChild,
};
pub use modes::SetMode;
pub use socket::{Place, SocketName, TlsFiles};
