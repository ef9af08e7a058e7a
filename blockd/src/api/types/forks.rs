//! Forks: disks that go on, and children that start out with what they hold at one instant.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Disk, ExportSpec, FlattenWhen, Job};
use crate::serve::Limits;
use crate::storedir::BaseRule;

/// How children come to hold what their parents hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ForkMode {
    /// Parents and children go on in new segments over one that is frozen; nothing is copied.
    #[default]
    Live,
    /// Parents stay as they are, and children get a copy of what their own segments hold.
    Inherit,
}

/// Disks to fork at one instant: all of them, or none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkDisks {
    /// The disks.
    pub disks: Vec<ForkDisk>,
    /// Go on although completed writes of a live session are missing.
    #[serde(default)]
    pub accept_lost_tail: bool,
    /// How.
    #[serde(default)]
    pub mode: ForkMode,
    /// On which segment children that inherit are to stand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseRule>,
    /// Inherit if fewer bytes than this are to be copied in all, else fork live.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_threshold: Option<u64>,
    /// Let no request of disks in service begin after the cut until the token is released, or for
    /// so many milliseconds, at most 60,000. For live forks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_ms: Option<u64>,
    /// What becomes of their depth.
    #[serde(default)]
    pub flatten: FlattenWhen,
    /// When to answer. For live forks.
    #[serde(default, rename = "return")]
    pub answer: ForkAnswer,
}

/// When a fork is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ForkAnswer {
    /// When it is durable, and its children are there.
    #[default]
    Durable,
    /// At the instant, which is before that; for disks in service.
    Cut,
    /// When all is ready for the instant, which `POST /v1/forks/{token}/cut` then says, within ten
    /// seconds; for disks in service.
    Ready,
    /// The same, but it stands by for ten minutes, and gives way: it ends when another request
    /// wants one of its disks, or changes what is served. All of its children are to be served.
    Standby,
}

/// The instant of a fork that is ready is to be now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CutFork {
    /// Other names for the children, in the order in which they were told; none to keep theirs.
    /// All of the children must be served.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<String>,
}

/// A disk to fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkDisk {
    /// Its name.
    pub disk: String,
    /// Names of its children.
    pub children: Vec<String>,
    /// Children that are served from the instant on: front ends can connect before it. For live
    /// forks of a disk in service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub serve: Vec<ServeChild>,
}

/// A child of a fork that is served from the instant on. A power cut, or a failure, before the fork
/// is durable takes the child with all that was written to it; flushes wait for that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServeChild {
    /// Its name.
    pub child: String,
    /// Where and how: over vhost-user, for writing.
    pub export: ExportSpec,
    /// What it may do at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
}

/// Disks that were forked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkedDisks {
    /// The children, in the order in which they were asked for.
    pub children: Vec<Disk>,
    /// How it was done.
    pub mode: ForkMode,
    /// Bytes of data that were copied.
    pub copied: u64,
    /// Bytes of data that the host shares between files instead of copying them.
    pub cloned: u64,
    /// Microseconds that the whole fork took.
    pub took_us: u64,
    /// Microseconds for which disks in service let no request in; null when none is in service.
    pub pause_us: Option<u64>,
    /// Names the cut, if disks are held at it or it was answered at that instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Uuid>,
}

/// The instant of a fork is past, or can be now; what is durable of it is told by
/// `GET /v1/forks/{token}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CutForks {
    /// The cut.
    pub token: Uuid,
    /// Microseconds for which disks in service let no request in; null when it is still to come.
    pub pause_us: Option<u64>,
    /// The children that there will be, in the order in which they were asked for.
    pub children: Vec<MadeChild>,
}

/// A child that a fork is making.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MadeChild {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub disk: Uuid,
}

/// What a fork that is not done is answered with: a job for one that inherits, else its cut.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(untagged)]
pub enum JobOrCut {
    /// The job that makes the children.
    Job(Box<Job>),
    /// The instant that is past.
    Cut(CutForks),
}

/// Disks that go on after they were held at the instant of a fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReleasedFork {
    /// The cut.
    pub token: Uuid,
    /// Microseconds for which they were held.
    pub held_us: u64,
}
