//! The daemon itself: what it serves, what it is doing, what happened.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::Failure;
use crate::daemon::Happened;

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Version of the daemon.
    pub version: String,
    /// Version of this interface.
    pub api: String,
}

/// How the daemon is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Version of the daemon.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// The folder of its store.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Identity of its store.
    pub store: Uuid,
    /// Seconds since 1970 at its start.
    pub started: u64,
    /// Jobs that are running.
    pub jobs: u64,
    /// Disks in service.
    pub served: u64,
    /// Front ends that are connected.
    pub connected: u64,
    /// Disks whose requests are held back until the host can do them.
    pub held: Vec<String>,
    /// Disks that could not be served again when the daemon started.
    pub failed: Vec<String>,
    /// What confines the daemon: `landlock`, `seccomp`, both or nothing.
    pub sandbox: Vec<String>,
    /// The arguments that it was started with, and a successor would be.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// Its use of the host's page cache, for all disks: `direct`, `buffered` or `auto`.
    #[serde(default)]
    pub cache: String,
}

/// Hand everything to a successor, a daemon that was started with `--take-over`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HandOver {
    /// The socket at which it waits.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// Cancel jobs and cut off NBD clients instead of refusing.
    #[serde(default)]
    pub force: bool,
}

/// What was handed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HandedOver {
    /// Version of the successor.
    pub version: String,
    /// Disks in service.
    pub disks: u64,
    /// Front ends that stayed connected.
    pub front_ends: u64,
    /// Microseconds from the first stopped ring until all of them ran again.
    pub blackout_us: u64,
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    /// Reading for a client.
    Read,
    /// Writing for a client.
    Write,
    /// Filling a new disk.
    Import,
    /// Reading a whole disk for a client.
    Export,
    /// Checking a disk.
    Check,
    /// Repairing a disk.
    Repair,
    /// Comparing data with checksums.
    Scrub,
    /// Making a disk immutable.
    Seal,
    /// Comparing two disks.
    Compare,
    /// Making the digest of a disk's content.
    Digest,
    /// Making children of disks that inherit.
    Fork,
    /// Copying what a disk stands on into it.
    Flatten,
    /// Making checksums of a segment that a fork has frozen.
    Sum,
    /// Writing a machine to files. Of forkd.
    Snapshot,
    /// Making a machine of files. Of forkd.
    Restore,
}

impl JobKind {
    /// True for work that a daemon takes up by itself where another one stopped.
    #[must_use]
    pub fn goes_on_by_itself(self) -> bool {
        matches!(self, JobKind::Flatten | JobKind::Sum)
    }

    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            JobKind::Read => "read",
            JobKind::Write => "write",
            JobKind::Import => "import",
            JobKind::Export => "export",
            JobKind::Check => "check",
            JobKind::Repair => "repair",
            JobKind::Scrub => "scrub",
            JobKind::Seal => "seal",
            JobKind::Compare => "compare",
            JobKind::Digest => "digest",
            JobKind::Fork => "fork",
            JobKind::Flatten => "flatten",
            JobKind::Sum => "sum",
            JobKind::Snapshot => "snapshot",
            JobKind::Restore => "restore",
        }
    }
}

/// What became of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// It is being done.
    Running,
    /// It is done.
    Done,
    /// It failed.
    Failed,
    /// It was cancelled.
    Cancelled,
}

impl JobState {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            JobState::Running => "running",
            JobState::Done => "done",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }
}

/// Long work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// What it does.
    pub kind: JobKind,
    /// On what.
    pub object: String,
    /// What became of it.
    pub state: JobState,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all, when that is known.
    pub total: Option<u64>,
    /// Seconds since 1970 at its start.
    pub started: u64,
    /// Seconds since 1970 at its end.
    pub ended: Option<u64>,
    /// Why it failed.
    pub error: Option<Failure>,
    /// What came of it: what the request that started it answers when it waits.
    pub result: Option<serde_json::Value>,
    /// What its user should know besides.
    pub notes: Vec<String>,
}

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The daemon started.
    Started,
    /// The daemon is going to stop.
    Stopping,
    /// A disk is served on a socket.
    Attached,
    /// It is no longer.
    Detached,
    /// A front end or an NBD client came.
    Connected,
    /// It went.
    Disconnected,
    /// Requests of a disk are held back until the host can do them.
    Held,
    /// They go on.
    Resumed,
    /// A disk, a queue of it, or its being served failed.
    Failed,
    /// Something about a disk is damaged.
    Damaged,
    /// Clients of a disk caused more events than are told.
    Skipped,
    /// A job started.
    JobStarted,
    /// It ended.
    JobFinished,
    /// The daemon took over from another one, with all that it served.
    Upgraded,
    /// A disk was forked.
    Forked,
    /// A disk got another persistence mode.
    Mode,
    /// What was written to a disk is kept.
    Committed,
    /// What was written to a disk was dropped.
    Undone,
    /// A disk was flattened.
    Flattened,
    /// Disks that were held at the instant of a fork go on.
    Released,
}

impl EventKind {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            EventKind::Started => "started",
            EventKind::Stopping => "stopping",
            EventKind::Attached => "attached",
            EventKind::Detached => "detached",
            EventKind::Connected => "connected",
            EventKind::Disconnected => "disconnected",
            EventKind::Held => "held",
            EventKind::Resumed => "resumed",
            EventKind::Failed => "failed",
            EventKind::Damaged => "damaged",
            EventKind::Skipped => "skipped",
            EventKind::JobStarted => "job-started",
            EventKind::JobFinished => "job-finished",
            EventKind::Upgraded => "upgraded",
            EventKind::Forked => "forked",
            EventKind::Mode => "mode",
            EventKind::Committed => "committed",
            EventKind::Undone => "undone",
            EventKind::Flattened => "flattened",
            EventKind::Released => "released",
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number; numbers go up by one.
    pub seq: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// What happened.
    pub kind: EventKind,
    /// To what.
    pub object: String,
    /// What else there is to say.
    pub detail: String,
}

impl Happened for Event {
    type Kind = EventKind;

    fn name(kind: EventKind) -> &'static str {
        kind.name()
    }

    fn is_alarming(kind: EventKind) -> bool {
        kind == EventKind::Damaged
    }

    fn new(seq: u64, time_ms: u64, kind: EventKind, object: String, detail: String) -> Self {
        Event { seq, time_ms, kind, object, detail }
    }

    fn seq(&self) -> u64 {
        self.seq
    }

    fn renumber(&mut self, seq: u64) {
        self.seq = seq;
    }
}
