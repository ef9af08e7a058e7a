//! The record of what was done to a simulated store, and transformations of it.
//!
//! Files are named by [`FileId`], which stays with a file through renames and removal, as an inode
//! number does. The files of the image that a log starts from have the numbers 0, 1, 2, … in
//! the order of their names; each [`Op::Create`] takes the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::super::to_usize;
use super::content::Content;
use super::image::Image;
use super::pages::PAGE;

/// Identity of a file. See the module head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// One completed operation. Offsets and lengths are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// An empty file came into being under a name.
    Create {
        /// The new file.
        file: FileId,
        /// Its name.
        name: Arc<str>,
    },
    /// Bytes were written.
    Write {
        /// Where.
        file: FileId,
        /// From which byte on.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// The length was set.
    SetLen {
        /// Of which file.
        file: FileId,
        /// To how many bytes.
        len: u64,
    },
    /// A range was given back.
    Punch {
        /// Of which file.
        file: FileId,
        /// From which byte on.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// The permission bits now forbid writing, or allow it again.
    SetReadOnly {
        /// For which file.
        file: FileId,
        /// Whether they forbid it.
        read_only: bool,
    },
    /// A sync succeeded: all that was done to the content before is durable.
    Sync {
        /// Of which file.
        file: FileId,
    },
    /// A sync failed: what it covered will never be durable.
    SyncFailed {
        /// Of which file.
        file: FileId,
        /// True when reads no longer show it either.
        dropped: bool,
    },
    /// A file got another name.
    Rename {
        /// Which file.
        file: FileId,
        /// Its old name.
        from: Arc<str>,
        /// Its new name; what had it before lost it.
        to: Arc<str>,
    },
    /// A file lost its name.
    Remove {
        /// Which file.
        file: FileId,
        /// The name it had.
        name: Arc<str>,
    },
    /// All creations, renames and removals before are durable.
    SyncNames,
    /// Stands in for an operation that a transformation took out, so that positions stay valid.
    Nothing,
}

impl Op {
    /// True for [`Op::Sync`] and [`Op::SyncNames`].
    #[must_use]
    pub fn is_sync(&self) -> bool {
        matches!(self, Op::Sync { .. } | Op::SyncNames)
    }

    /// The file that the operation is about.
    #[must_use]
    pub fn file(&self) -> Option<FileId> {
        match self {
            Op::Create { file, .. }
            | Op::Write { file, .. }
            | Op::SetLen { file, .. }
            | Op::Punch { file, .. }
            | Op::SetReadOnly { file, .. }
            | Op::Sync { file }
            | Op::SyncFailed { file, .. }
            | Op::Rename { file, .. }
            | Op::Remove { file, .. } => Some(*file),
            Op::SyncNames | Op::Nothing => None,
        }
    }

    /// The bytes that a write or punch covers.
    pub(super) fn range(&self) -> Option<std::ops::Range<u64>> {
        match self {
            Op::Write { offset, data, .. } => Some(*offset..offset + data.len() as u64),
            Op::Punch { offset, len, .. } => Some(*offset..offset.saturating_add(*len)),
            _ => None,
        }
    }

    /// Does to a content what the operation did to its file's.
    pub(super) fn apply_content(&self, content: &mut Content) {
        match self {
            Op::Write { offset, data, .. } => content.write(*offset, data),
            Op::SetLen { len, .. } => content.set_len(*len),
            Op::Punch { offset, len, .. } => content.punch(*offset, *len),
            Op::SetReadOnly { read_only, .. } => content.set_read_only(*read_only),
            _ => {}
        }
    }

    /// Does to a folder what the operation did. A file never has two names, whatever was lost.
    pub(super) fn apply_names(&self, names: &mut Names) {
        match self {
            Op::Create { file, name } => {
                names.insert(Arc::clone(name), *file);
            }
            Op::Rename { file, to, .. } => {
                names.retain(|_, other| other != file);
                names.insert(Arc::clone(to), *file);
            }
            Op::Remove { file, name } if names.get(name) == Some(file) => {
                names.remove(name);
            }
            _ => {}
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Create { file, name } => write!(f, "create {name} as {file}"),
            Op::Write { file, offset, data } => write!(f, "write {file} {offset}+{}", data.len()),
            Op::SetLen { file, len } => write!(f, "set length {file} {len}"),
            Op::Punch { file, offset, len } => write!(f, "punch {file} {offset}+{len}"),
            Op::SetReadOnly { file, read_only: true } => write!(f, "make read-only {file}"),
            Op::SetReadOnly { file, .. } => write!(f, "make writable {file}"),
            Op::Sync { file } => write!(f, "sync {file}"),
            Op::SyncFailed { file, .. } => write!(f, "failed sync {file}"),
            Op::Rename { file, from, to } => write!(f, "rename {file} {from} to {to}"),
            Op::Remove { file, name } => write!(f, "remove {file} {name}"),
            Op::SyncNames => f.write_str("sync names"),
            Op::Nothing => f.write_str("nothing"),
        }
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// A folder: names and the files they lead to.
pub(super) type Names = BTreeMap<Arc<str>, FileId>;

/// The folder and the numbered contents of an image.
pub(super) fn numbered(image: &Image) -> (Names, BTreeMap<FileId, Content>) {
    let ids = (0..).map(FileId);
    let (mut names, mut files) = (Names::new(), BTreeMap::new());
    for (id, (name, content)) in ids.zip(&image.files) {
        names.insert(Arc::clone(name), id);
        files.insert(id, content.clone());
    }
    (names, files)
}

/// The state of a store while its process runs.
#[derive(Debug, Clone)]
pub(super) struct Live {
    pub(super) names: Names,
    pub(super) files: BTreeMap<FileId, LiveFile>,
}

/// One file of a [`Live`].
#[derive(Debug, Clone, Default)]
pub(super) struct LiveFile {
    /// What reads show.
    pub(super) content: Content,
    /// What the last successful sync left.
    durable: Content,
    /// `content` shows changes that will never be durable.
    tainted: bool,
    /// Changes since the last sync, kept only while `tainted` (else `content` is what to keep).
    pending: Vec<Op>,
    /// Pages without content that have space. No content depends on it, so it is in no log and in
    /// no image.
    pub(super) reserved: BTreeSet<u64>,
}

impl Live {
    pub(super) fn new(image: &Image) -> Self {
        let (names, contents) = numbered(image);
        let file = |content: Content| LiveFile {
            durable: content.clone(),
            content,
            ..LiveFile::default()
        };
        let files = contents.into_iter().map(|(id, content)| (id, file(content))).collect();
        Live { names, files }
    }

    pub(super) fn image(&self) -> Image {
        let content = |id: &FileId| self.files.get(id).map(|file| file.content.clone());
        let files = self.names.iter();
        Image {
            files: files.map(|(n, id)| (Arc::clone(n), content(id).unwrap_or_default())).collect(),
        }
    }

    pub(super) fn apply(&mut self, op: &Op) {
        op.apply_names(&mut self.names);
        if let Some(id) = op.file() {
            self.files.entry(id).or_default().apply(op);
        }
    }
}

/// The pages that a byte range touches.
fn pages(range: Range<u64>) -> Range<u64> {
    range.start / PAGE as u64..range.end.div_ceil(PAGE as u64)
}

impl LiveFile {
    /// Bytes of the pages that are present or reserved.
    pub(super) fn allocated(&self) -> u64 {
        self.content.allocated() + (self.reserved.len() * PAGE) as u64
    }

    /// The pages of a byte range that are neither present nor reserved.
    pub(super) fn unallocated(&self, range: Range<u64>) -> Vec<u64> {
        let is_new = |page: &u64| !self.content.has_page(*page) && !self.reserved.contains(page);
        pages(range).filter(is_new).collect()
    }

    /// How many bytes of a write fit before more than `free` new pages would be needed.
    pub(super) fn fits(&self, offset: u64, len: usize, free: u64) -> usize {
        let new = self.unallocated(offset..offset + len as u64);
        let first_missing = usize::try_from(free).ok().and_then(|free| new.get(free));
        let fit = |page: &u64| to_usize((page * PAGE as u64).saturating_sub(offset));
        first_missing.map_or(len, fit)
    }

    fn unreserve(&mut self, pages: Range<u64>) {
        if !self.reserved.is_empty() {
            self.reserved.retain(|page| !pages.contains(page));
        }
    }

    fn apply(&mut self, op: &Op) {
        op.apply_content(&mut self.content);
        match op {
            Op::SetLen { len, .. } => self.unreserve(len.div_ceil(PAGE as u64)..u64::MAX),
            op => op.range().into_iter().for_each(|range| self.unreserve(pages(range))),
        }
        match op {
            Op::Write { .. } | Op::SetLen { .. } | Op::Punch { .. } if self.tainted => {
                self.pending.push(op.clone());
            }
            Op::SetReadOnly { .. } => op.apply_content(&mut self.durable),
            Op::Sync { .. } if self.tainted => {
                for op in self.pending.drain(..) {
                    op.apply_content(&mut self.durable);
                }
            }
            Op::Sync { .. } => self.durable = self.content.clone(),
            Op::SyncFailed { dropped, .. } => {
                self.pending.clear();
                self.tainted = !dropped;
                if *dropped {
                    self.content = self.durable.clone();
                }
            }
            _ => {}
        }
    }
}

/// What a log leaves behind when the process is killed at its end: every completed operation.
#[must_use]
pub fn replay(base: &Image, log: &[Op]) -> Image {
    let mut live = Live::new(base);
    log.iter().for_each(|op| live.apply(op));
    live.image()
}

/// The log with [`Op::Nothing`] in place of every operation for which `drop` says so. `drop` gets
/// the position and the operation.
pub fn drop_ops(log: &[Op], mut drop: impl FnMut(usize, &Op) -> bool) -> Vec<Op> {
    let keep = |(at, op): (usize, &Op)| if drop(at, op) { Op::Nothing } else { op.clone() };
    log.iter().enumerate().map(keep).collect()
}

/// [`drop_ops`] that looks at successful syncs only: the log of a program that forgot them.
pub fn drop_syncs(log: &[Op], mut drop: impl FnMut(usize, &Op) -> bool) -> Vec<Op> {
    drop_ops(log, |at, op| op.is_sync() && drop(at, op))
}

/// The log of a program that did two operations in each other's place.
///
/// # Panics
/// When a position is outside the log.
#[must_use]
pub fn swap(log: &[Op], a: usize, b: usize) -> Vec<Op> {
    let mut log = log.to_vec();
    log.swap(a, b);
    log
}
