//! Flatten: what is asked for, what came of it, and when a daemon does it by itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Disk;
use crate::catalogue::FlattenPolicy;

/// Flatten a disk in place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FlattenDisk {
    /// What the disk is to stand on: `base` (the default: the nearest ancestor that is a disk by
    /// itself, or the lowest segment), `nothing`, or the name of a disk that it stands on.
    pub to: Option<String>,
    /// Bytes in a second that are copied at most.
    pub rate: Option<u64>,
    /// Go on although completed writes of a live session are missing.
    pub accept_lost_tail: bool,
}

/// A disk that was flattened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Flattened {
    /// The disk.
    pub disk: Disk,
    /// Segments below it before.
    pub depth_before: u64,
    /// Bytes that were copied.
    pub copied: u64,
    /// Milliseconds that it took.
    pub took_ms: u64,
}

/// What becomes of the depth of disks after a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FlattenWhen {
    /// What their policies say, for disks in service.
    #[default]
    Auto,
    /// Nothing.
    Manual,
    /// They and their children are flattened now.
    Now,
}

/// When a daemon flattens a disk by itself; null for what the store says, and for the store for
/// what holds when nobody has said anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetFlattenPolicy {
    /// `manual`, `after-fork`, `depth>N` or `bytes<N`.
    #[schema(value_type = Option<String>)]
    #[serde(default)]
    pub policy: Option<FlattenPolicy>,
}
