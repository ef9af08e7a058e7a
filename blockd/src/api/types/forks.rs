//! Forks: disks that go on, and children that start out with what they hold at one instant.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Disk;

/// Disks to fork at one instant: all of them, or none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkDisks {
    /// The disks.
    pub disks: Vec<ForkDisk>,
    /// Go on although completed writes of a live session are missing.
    #[serde(default)]
    pub accept_lost_tail: bool,
}

/// A disk to fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkDisk {
    /// Its name.
    pub disk: String,
    /// Names of its children.
    pub children: Vec<String>,
}

/// Disks that were forked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkedDisks {
    /// The children, in the order in which they were asked for.
    pub children: Vec<Disk>,
    /// Microseconds that the whole fork took.
    pub took_us: u64,
    /// Microseconds for which disks in service let no request in; null when none is in service.
    pub pause_us: Option<u64>,
}
