//! What can be wrong with a disk, in one list that opening, checking and repairing share.

use format::{Error, Kind};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    /// A superblock copy is invalid or old; the others serve.
    SuperblockCopy,
    /// Durable journal records are missing.
    JournalLoss,
    /// A map page (inner page, leaf or vector run) is damaged.
    MapPage,
    /// Two places of the map use one extent, or metadata and data share one.
    DoubleUse,
    /// The map names space that the file does not have.
    Truncated,
    /// The map names something impossible (a row, a leaf or a block outside).
    Nonsense,
    /// A parent segment is not in the store.
    ParentMissing,
    /// A parent segment is not the recorded one.
    ParentChanged,
    /// Data of a sealed segment does not match its checksum.
    DataSum,
    /// The content digest of a sealed segment is wrong, or its sums cannot be read.
    Digest,
    /// Host space that nothing names.
    Leak,
}

/// How much a problem hurts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing is lost; repaired by itself or by `repair`.
    Minor,
    /// A range of the disk cannot be read; the rest works.
    Range,
    /// Writing would make it worse: the disk opens for reading only.
    NoWrite,
}

impl What {
    /// The stable name used in JSON output and documentation.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            What::SuperblockCopy => "superblock-copy",
            What::JournalLoss => "journal-loss",
            What::MapPage => "map-page",
            What::DoubleUse => "double-use",
            What::Truncated => "truncated",
            What::Nonsense => "nonsense",
            What::ParentMissing => "parent-missing",
            What::ParentChanged => "parent-changed",
            What::DataSum => "data-sum",
            What::Digest => "digest",
            What::Leak => "leak",
        }
    }

    /// How much it hurts.
    #[must_use]
    pub fn severity(self) -> Severity {
        match self {
            What::SuperblockCopy | What::Leak => Severity::Minor,
            What::MapPage | What::DataSum => Severity::Range,
            What::JournalLoss
            | What::DoubleUse
            | What::Truncated
            | What::Nonsense
            | What::ParentMissing
            | What::ParentChanged
            | What::Digest => Severity::NoWrite,
        }
    }
}

/// A byte range of the virtual disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// One thing that is wrong.
#[derive(Debug)]
pub struct Problem {
    /// What.
    pub what: What,
    /// The segment, page or range it was found at.
    pub object: String,
    /// What was seen.
    pub detail: String,
    /// The range of the virtual disk that it costs, if it costs one.
    pub range: Option<GuestRange>,
}

impl Problem {
    /// A problem at `object`, seen as `error`.
    #[must_use]
    pub fn new(what: What, object: impl Into<String>, error: &Error) -> Self {
        Problem { what, object: object.into(), detail: error.to_string(), range: None }
    }

    /// The same, with the range that it costs.
    #[must_use]
    pub fn costing(mut self, offset: u64, len: u64) -> Self {
        self.range = Some(GuestRange { offset, len });
        self
    }

    /// The problem as an error, for callers that cannot go on.
    #[must_use]
    pub fn to_error(&self) -> Error {
        let kind = match self.what {
            What::ParentMissing => Kind::ParentMissing,
            What::ParentChanged => Kind::ParentChanged,
            _ => Kind::Corrupt,
        };
        Error::new(kind, self.detail.clone())
            .on(self.object.clone())
            .hint("run `offshoot disk check` for the whole list, `offshoot disk repair` to mend it")
    }
}
