//! The rows of the catalogue.

use format::superblock::Mode;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{FlattenPolicy, Flattening};

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRow {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub disk: Uuid,
    /// Its own segment.
    pub segment: Uuid,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// True when it is immutable.
    pub sealed: bool,
    /// The disk it was created over, if any.
    pub parent_disk: Option<Uuid>,
    /// Segments of others that its map may point into.
    pub parents: Vec<Uuid>,
    /// Seconds since 1970 at creation.
    pub created: u64,
    /// Its persistence mode.
    #[serde(default = "persistent", skip_serializing_if = "is_persistent", with = "mode_by_name")]
    pub mode: Mode,
    /// The segment that an undo goes back to, if its mode has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Uuid>,
    /// The label in the segment is behind: a rename is not finished.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub relabel: bool,
    /// A change of the segment is under way that this row tells of: after a crash the row may be
    /// behind.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub changing: bool,
    /// It is being flattened, or was when somebody stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flattening: Option<Flattening>,
    /// When it is flattened by itself; as the store says if nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<FlattenPolicy>,
}

impl DiskRow {
    /// This row, with what its segment says now in the place of what it said. What a segment does
    /// not know stays.
    #[must_use]
    pub fn with(&self, segment: DiskRow) -> DiskRow {
        DiskRow {
            name: self.name.clone(),
            flattening: self.flattening.clone(),
            policy: self.policy,
            ..segment
        }
    }
}

fn persistent() -> Mode {
    Mode::Persistent
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde calls it
fn is_persistent(mode: &Mode) -> bool {
    *mode == Mode::Persistent
}

/// A mode in a row, by the name that people see.
mod mode_by_name {
    use format::superblock::Mode;
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    #[allow(clippy::trivially_copy_pass_by_ref)] // as serde calls it
    pub fn serialize<S: Serializer>(mode: &Mode, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(mode.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Mode, D::Error> {
        Mode::named(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

/// A segment that a fork sealed: no disk's own, but disks stand on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenRow {
    /// The segment.
    pub segment: Uuid,
    /// The disk whose own segment it was.
    pub disk: Uuid,
    /// Its sums are being made: after a crash some copies of its superblock may be behind.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub summing: bool,
}

/// One disk that is forked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forked {
    /// Its name.
    pub name: String,
    /// Its own segment, which is frozen.
    pub segment: Uuid,
    /// The segment in which it goes on.
    pub successor: Uuid,
    /// Its children.
    pub children: Vec<Child>,
}

impl Forked {
    /// The segments that are made for it: the one in which it goes on, then those of its children.
    pub fn new_segments(&self) -> impl Iterator<Item = Uuid> + '_ {
        [self.successor].into_iter().chain(self.children.iter().map(|child| child.segment))
    }
}

/// A disk that a fork makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Child {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub disk: Uuid,
    /// Its own segment.
    pub segment: Uuid,
}

/// A fork that is under way: what is to become of it is told by the segments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkRow {
    /// Its identity.
    pub fork: Uuid,
    /// Seconds since 1970.
    pub created: u64,
    /// The disks that are forked at one instant.
    pub disks: Vec<Forked>,
}

/// A child that inherits, finished but for its name, and for the map of a root that is not sealed
/// yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heir {
    /// Its own segment.
    pub segment: Uuid,
    /// The root that it stands on, if that is to be sealed first.
    pub root: Option<Uuid>,
}

/// Children that appear together: once this row is there, all of them do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InheritRow {
    /// Its identity.
    pub inherit: Uuid,
    /// The children.
    pub heirs: Vec<Heir>,
}
