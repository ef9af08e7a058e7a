//! A machine as files: its memory, its processors and devices, and the names of its disks, all of
//! one instant.
//!
//! ```text
//! DEST/manifest.json   whose it is, its disks, and sums of the two others
//! DEST/state           processors, devices and clock: the blob of `crate::kvm::blob`
//! DEST/memory          guest memory, as long as RAM; what was never written is a hole
//! ```
//!
//! Invariants:
//! - DEST is there whole or not at all: everything is written into a folder beside it, which takes
//!   its name as the last step (`folder.rs` has the order, and the crashes it is for).
//! - Nothing of a snapshot is used before its sum agreed, and what is used is a copy that nobody
//!   can reach: who changes a file afterwards changes no machine.
//! - The disks are in blockd's store, sealed: a snapshot has their names and identities.

mod folder;
mod manifest;
mod memory;

pub use folder::{Draft, Folder, Host, RealHost, aside, set_aside};
pub use manifest::{FileSum, LAYOUT, Manifest, MemorySums};
pub use memory::{CHUNK, Written};

/// Name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// Name of the state.
pub const STATE: &str = "state";
/// Name of the memory.
pub const MEMORY: &str = "memory";
