//! What can be wrong with a disk, in one list that opening, checking and repairing share.
//!
//! Invariant: a list of problems is bounded whatever the disk holds, and no kind of problem is ever
//! missing from it because there are too many of another.

use format::{Error, Kind};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// A superblock copy is invalid or old; the others serve.
    SuperblockCopy,
    /// Two valid superblock copies of one generation differ.
    SuperblockSplit,
    /// The newest map is damaged, and a superblock copy of an older generation, which writing would
    /// overwrite, leads to more.
    OlderGeneration,
    /// Durable journal records are missing.
    JournalLoss,
    /// Journal records are about a damaged range: they wait until it is mended.
    JournalWaits,
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
    /// A parent segment stands, by its own table, on this one.
    ParentLoop,
    /// A sealed segment has no checksums yet: its sealing was cut short.
    SealPending,
    /// Data of a sealed segment does not match its checksum.
    DataSum,
    /// The content digest of a sealed segment is wrong, or its sums cannot be read.
    Digest,
    /// Host space that nothing names.
    Leak,
}

/// Kinds of problems.
const KINDS: usize = What::Leak as usize + 1;
/// Problems of one kind that are listed; the rest are counted.
const LISTED_MAX: usize = 200;

/// How much a problem hurts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ToSchema)]
#[schema(rename_all = "kebab-case")]
pub enum Severity {
    /// Nothing is lost; repaired by itself or by `repair`.
    Minor,
    /// A range of the disk cannot be read; the rest works.
    Range,
    /// Writing would make it worse: the disk opens for reading only.
    NoWrite,
}

impl Severity {
    /// The stable name used in JSON output and documentation.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Severity::Minor => "minor",
            Severity::Range => "range",
            Severity::NoWrite => "no-write",
        }
    }
}

/// What mends a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
pub enum Remedy {
    /// A repair without options.
    #[serde(rename = "repair")]
    Plain,
    /// A repair that punches leaks.
    #[serde(rename = "repair-leaks")]
    Leaks,
    /// A repair that goes back to an older generation.
    #[serde(rename = "repair-older-generation")]
    OlderGeneration,
    /// A repair that gives damaged ranges up.
    #[serde(rename = "repair-drop-damaged")]
    DropDamaged,
    /// A repair that accepts the loss of journal records.
    #[serde(rename = "repair-accept-journal-loss")]
    AcceptJournalLoss,
    /// A repair that gives every user of a shared extent a copy.
    #[serde(rename = "repair-unshare")]
    Unshare,
    /// Sealing the disk again.
    #[serde(rename = "seal-again")]
    Seal,
    /// Bringing the recorded parent back.
    #[serde(rename = "restore-parent")]
    Parent,
    /// Nothing here: restore the segment from a copy.
    #[serde(rename = "restore-segment")]
    None,
}

impl Remedy {
    /// The stable name used in JSON output and documentation.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Remedy::Plain => "repair",
            Remedy::Leaks => "repair-leaks",
            Remedy::OlderGeneration => "repair-older-generation",
            Remedy::DropDamaged => "repair-drop-damaged",
            Remedy::AcceptJournalLoss => "repair-accept-journal-loss",
            Remedy::Unshare => "repair-unshare",
            Remedy::Seal => "seal-again",
            Remedy::Parent => "restore-parent",
            Remedy::None => "restore-segment",
        }
    }

    /// True when a repair with the right options is enough.
    #[must_use]
    pub fn is_repair(self) -> bool {
        !matches!(self, Remedy::Seal | Remedy::Parent | Remedy::None)
    }
}

impl What {
    /// The stable name used in JSON output and documentation.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            What::SuperblockCopy => "superblock-copy",
            What::SuperblockSplit => "superblock-split",
            What::OlderGeneration => "older-generation",
            What::JournalLoss => "journal-loss",
            What::JournalWaits => "journal-waits",
            What::MapPage => "map-page",
            What::DoubleUse => "double-use",
            What::Truncated => "truncated",
            What::Nonsense => "nonsense",
            What::ParentMissing => "parent-missing",
            What::ParentChanged => "parent-changed",
            What::ParentLoop => "parent-loop",
            What::SealPending => "seal-pending",
            What::DataSum => "data-sum",
            What::Digest => "digest",
            What::Leak => "leak",
        }
    }

    /// How much it hurts.
    #[must_use]
    pub fn severity(self) -> Severity {
        match self {
            What::SuperblockCopy | What::SealPending | What::Leak => Severity::Minor,
            What::MapPage | What::DataSum => Severity::Range,
            What::SuperblockSplit
            | What::OlderGeneration
            | What::JournalLoss
            | What::JournalWaits
            | What::DoubleUse
            | What::Truncated
            | What::Nonsense
            | What::ParentMissing
            | What::ParentChanged
            | What::ParentLoop
            | What::Digest => Severity::NoWrite,
        }
    }

    /// What mends it on an active disk.
    #[must_use]
    pub fn remedy(self) -> Remedy {
        match self {
            What::SuperblockCopy => Remedy::Plain,
            What::Leak => Remedy::Leaks,
            What::OlderGeneration => Remedy::OlderGeneration,
            What::MapPage | What::Truncated | What::Nonsense | What::JournalWaits => {
                Remedy::DropDamaged
            }
            What::JournalLoss => Remedy::AcceptJournalLoss,
            What::DoubleUse => Remedy::Unshare,
            What::SealPending => Remedy::Seal,
            What::ParentMissing | What::ParentChanged | What::ParentLoop => Remedy::Parent,
            What::SuperblockSplit | What::DataSum | What::Digest => Remedy::None,
        }
    }
}

/// A byte range of the virtual disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// One thing that is wrong. On the wire it has its `severity`, too, which follows from `what`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
pub struct Problem {
    /// What.
    pub what: What,
    /// The segment, page or range it was found at.
    pub object: String,
    /// What was seen, the object left out where it is the same.
    pub detail: String,
    /// What to do, where more can be said than the remedy does.
    pub hint: Option<String>,
    /// The range of the virtual disk that it costs, if it costs one.
    pub range: Option<GuestRange>,
    /// What mends it.
    pub remedy: Remedy,
}

impl Problem {
    /// A problem at `object`, seen as `error`.
    #[must_use]
    pub fn new(what: What, object: impl Into<String>, error: &Error) -> Self {
        let object = object.into();
        let (seen, hint) = error.split_hint();
        let told = format!("{object}: ");
        let detail = seen.strip_prefix(&told).map_or(seen.clone(), ToOwned::to_owned);
        Problem { what, object, detail, hint, range: None, remedy: what.remedy() }
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
        let usual =
            "run `offshoot disk check` for the whole list, `offshoot disk repair` to mend it";
        let hint = self.hint.clone().unwrap_or_else(|| usual.into());
        Error::new(kind, self.detail.clone()).on(self.object.clone()).hint(hint)
    }

    /// True when `next` tells of the same damage, right behind this one.
    fn continued_by(&self, next: &Problem) -> bool {
        match (self.range, next.range) {
            (Some(a), Some(b)) => self.what == next.what && a.offset + a.len == b.offset,
            _ => false,
        }
    }
}

impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut s = serializer.serialize_struct("Problem", 6)?;
        s.serialize_field("what", self.what.name())?;
        s.serialize_field("severity", self.what.severity().name())?;
        s.serialize_field("object", &self.object)?;
        s.serialize_field("detail", &self.detail)?;
        s.serialize_field("range", &self.range)?;
        s.serialize_field("remedy", self.remedy.name())?;
        s.end()
    }
}

/// Collects problems: neighbours are joined, and of each kind only the first ones are kept.
#[derive(Debug, Default)]
pub struct Problems {
    list: Vec<Problem>,
    listed: [usize; KINDS],
    dropped: [u64; KINDS],
}

impl Problems {
    /// Adds a problem.
    pub fn note(&mut self, problem: Problem) {
        if let Some(last) = self.list.last_mut()
            && last.continued_by(&problem)
            && let (Some(range), Some(more)) = (&mut last.range, problem.range)
        {
            range.len += more.len;
            return;
        }
        let kind = problem.what as usize;
        if self.listed[kind] == LISTED_MAX {
            self.dropped[kind] += 1;
            return;
        }
        self.listed[kind] += 1;
        self.list.push(problem);
    }

    /// What is listed.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.list.iter()
    }

    /// True when there is one of this kind.
    #[must_use]
    pub fn any(&self, what: What) -> bool {
        self.listed[what as usize] > 0
    }

    /// The list; the last of each kind says how many more there were.
    #[must_use]
    pub fn into_vec(mut self) -> Vec<Problem> {
        for (kind, more) in self.dropped.into_iter().enumerate().filter(|(_, n)| *n > 0) {
            let last = self.list.iter_mut().rev().find(|p| p.what as usize == kind);
            if let Some(last) = last {
                last.detail = format!("{} (and {more} more like it)", last.detail);
            }
        }
        self.list
    }
}

impl Extend<Problem> for Problems {
    fn extend<T: IntoIterator<Item = Problem>>(&mut self, problems: T) {
        problems.into_iter().for_each(|p| self.note(p));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(what: What, offset: u64) -> Problem {
        Problem::new(what, "x", &Error::corrupt("y")).costing(offset, 10)
    }

    #[test]
    fn an_error_says_each_thing_once() {
        let error = Error::corrupt("bad sum").on("page 7").hint("look");
        let problem = Problem::new(What::MapPage, "page 7", &error);
        assert_eq!(problem.to_error().to_string(), "page 7: bad sum; look");
        let problem =
            Problem::new(What::MapPage, "leaf 3", &Error::corrupt("bad sum").on("page 7"));
        let text = problem.to_error().to_string();
        assert!(text.starts_with("leaf 3: page 7: bad sum; run `offshoot disk check`"), "{text}");
    }

    #[test]
    fn a_problem_that_was_written_is_read_back() {
        for remedy in [Remedy::Plain, Remedy::Leaks, Remedy::DropDamaged, Remedy::Seal] {
            let written = Problem { remedy, ..problem(What::MapPage, 4096) };
            let wire = serde_json::to_value(&written).unwrap();
            assert_eq!((&wire["severity"], &wire["what"]), (&"range".into(), &"map-page".into()));
            assert_eq!(serde_json::from_value::<Problem>(wire).unwrap(), written);
        }
        let others = [Remedy::Unshare, Remedy::Parent, Remedy::None, Remedy::OlderGeneration];
        for remedy in others.into_iter().chain([Remedy::AcceptJournalLoss]) {
            let written = Problem { remedy, ..problem(What::JournalLoss, 0) };
            let wire = serde_json::to_value(&written).unwrap();
            assert_eq!(serde_json::from_value::<Problem>(wire).unwrap(), written);
        }
    }

    #[test]
    fn neighbours_join_and_a_flood_of_one_kind_hides_no_other() {
        let mut all = Problems::default();
        all.extend([problem(What::MapPage, 0), problem(What::MapPage, 10)]);
        for i in 0..10_000 {
            all.note(problem(What::Truncated, i * 20));
        }
        all.note(problem(What::JournalLoss, 5));
        assert!(all.any(What::JournalLoss) && !all.any(What::Leak));

        let list = all.into_vec();

        assert_eq!(list[0].range, Some(GuestRange { offset: 0, len: 20 }));
        assert_eq!(list.len(), 1 + LISTED_MAX + 1);
        assert!(list[LISTED_MAX].detail.contains("and 9800 more"), "{}", list[LISTED_MAX].detail);
        assert_eq!(list[LISTED_MAX + 1].what, What::JournalLoss);
    }
}
