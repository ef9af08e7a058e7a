//! What happened, as the stream of events tells it.

use blockd::daemon::Happened;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The daemon started.
    Started,
    /// The daemon is going to stop.
    Stopping,
    /// A machine was booted.
    Booted,
    /// A machine was found again after a restart of the daemon.
    Found,
    /// A machine was forked.
    Forked,
    /// A snapshot was taken of a machine.
    Snapshotted,
    /// A machine was made of a snapshot.
    Restored,
    /// A snapshot was removed.
    SnapshotRemoved,
    /// A machine was paused.
    Paused,
    /// It goes on.
    Resumed,
    /// Its disks changed from `direct` to `arena`, because it is to be forked or snapshotted.
    PathChanged,
    /// A machine ended.
    Ended,
    /// A machine was removed.
    Removed,
    /// No shell was ready when one was needed.
    PoolEmpty,
    /// Something failed.
    Failed,
    /// What was left of something that failed was removed.
    CleanedUp,
}

impl EventKind {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            EventKind::Started => "started",
            EventKind::Stopping => "stopping",
            EventKind::Booted => "booted",
            EventKind::Found => "found",
            EventKind::Forked => "forked",
            EventKind::Snapshotted => "snapshotted",
            EventKind::Restored => "restored",
            EventKind::SnapshotRemoved => "snapshot-removed",
            EventKind::Paused => "paused",
            EventKind::Resumed => "resumed",
            EventKind::PathChanged => "path-changed",
            EventKind::Ended => "ended",
            EventKind::Removed => "removed",
            EventKind::PoolEmpty => "pool-empty",
            EventKind::Failed => "failed",
            EventKind::CleanedUp => "cleaned-up",
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
        kind == EventKind::Failed
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
