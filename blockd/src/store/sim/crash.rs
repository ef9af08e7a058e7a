//! Every image that a power cut may leave, for a recorded log. The fault model is in the head of
//! [`super`].
//!
//! How it is kept fast: one walk over the log carries the durable part along, so a crash point
//! costs what its un-synced operations cost; a state is a cheap clone of the durable part plus the
//! surviving operations; whole pages of a write are made once and shared by all states; equal
//! states are found by fingerprints that are kept inside shared pages. Operations on files that no
//! surviving name can lead to have no effect on any state and are left out.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::ops::AddAssign;
use std::sync::Arc;

use super::content::{Content, whole_pages};
use super::image::Image;
use super::log::{FileId, Names, Op, numbered};
use super::pages::Page;
use super::survivors::{self, Bounds, Part, Survivor, Unsynced, middle};

/// One way in which a power cut may turn out. Prints as a sentence that names the operations.
pub struct CrashState<'a> {
    /// Operations of the log that had completed.
    pub point: usize,
    /// Positions in the log of the completed operations that were not durable and matter.
    pub unsynced: &'a [usize],
    /// Those that survived nevertheless, in the order in which they reached the disk.
    pub survivors: &'a [Survivor],
    log: &'a [Op],
    labels: &'a BTreeMap<FileId, Arc<str>>,
}

impl fmt::Display for CrashState<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "power cut after {} of {} operations", self.point, self.log.len())?;
        if let Some(last) = self.point.checked_sub(1) {
            write!(f, " (the last was: {})", self.log[last])?;
        }
        f.write_str("; not durable:")?;
        let mut files = BTreeSet::new();
        for &at in self.unsynced {
            write!(f, " [{at}: {}]", self.log[at])?;
            files.extend(self.log[at].file());
        }
        f.write_str("; survived, in this order:")?;
        for survivor in self.survivors {
            let part = match survivor.part {
                Part::Whole => "",
                Part::FirstHalf => " first half",
                Part::LastHalf => " last half",
                Part::Length => " length only",
            };
            write!(f, " {}{part}", survivor.op)?;
        }
        f.write_str("; files:")?;
        for id in files {
            write!(f, " {id}={}", self.labels.get(&id).map_or("?", |name| name))?;
        }
        Ok(())
    }
}

/// How much was visited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CrashStats {
    /// Crash points.
    pub points: usize,
    /// States handed out; per point no two are equal.
    pub states: usize,
    /// States left out because an equal one was handed out for the same point.
    pub duplicates: usize,
    /// Crash points at which some family was sampled only (see [`Bounds::family`]).
    pub sampled: usize,
}

impl AddAssign for CrashStats {
    fn add_assign(&mut self, more: Self) {
        self.points += more.points;
        self.states += more.states;
        self.duplicates += more.duplicates;
        self.sampled += more.sampled;
    }
}

/// Hands out the states after the first `point` operations of `log`, which started from `base`.
///
/// # Panics
/// When `point` is past the end of the log.
pub fn crash_states(
    base: &Image,
    log: &[Op],
    point: usize,
    bounds: &Bounds,
    visit: &mut dyn FnMut(&CrashState<'_>, Image),
) -> CrashStats {
    let mut walk = CrashWalk::new(base, log);
    while walk.point() < point {
        assert!(walk.advance(), "the crash point is past the end of the log");
    }
    walk.visit(bounds, visit)
}

/// [`crash_states`] for every point, from "nothing done" to "all done".
pub fn all_crash_states(
    base: &Image,
    log: &[Op],
    bounds: &Bounds,
    visit: &mut dyn FnMut(&CrashState<'_>, Image),
) -> CrashStats {
    let mut walk = CrashWalk::new(base, log);
    let mut stats = walk.visit(bounds, visit);
    while walk.advance() {
        stats += walk.visit(bounds, visit);
    }
    stats
}

#[derive(Default)]
struct Tracked {
    durable: Content,
    unsynced: Vec<usize>,
}

/// A walk over the crash points of a log, for callers that choose the points themselves.
pub struct CrashWalk<'a> {
    log: &'a [Op],
    point: usize,
    /// The durable names.
    names: Names,
    unsynced_names: Vec<usize>,
    files: BTreeMap<FileId, Tracked>,
    /// The whole pages of un-synced writes, by position in the log.
    whole: BTreeMap<usize, Vec<Arc<Page>>>,
    /// The latest name of every file that ever had one.
    labels: BTreeMap<FileId, Arc<str>>,
}

impl<'a> CrashWalk<'a> {
    /// Starts before the first operation of `log`, which started from `base`.
    #[must_use]
    pub fn new(base: &Image, log: &'a [Op]) -> Self {
        let (names, contents) = numbered(base);
        let track = |durable| Tracked { durable, unsynced: Vec::new() };
        CrashWalk {
            log,
            point: 0,
            labels: names.iter().map(|(name, id)| (*id, Arc::clone(name))).collect(),
            names,
            unsynced_names: Vec::new(),
            files: contents.into_iter().map(|(id, content)| (id, track(content))).collect(),
            whole: BTreeMap::new(),
        }
    }

    /// Number of operations completed at this point.
    #[must_use]
    pub fn point(&self) -> usize {
        self.point
    }

    /// Goes one operation further; false at the end.
    pub fn advance(&mut self) -> bool {
        let at = self.point;
        let Some(op) = self.log.get(at) else { return false };
        self.point += 1;
        let tracked = op.file().map(|id| self.files.entry(id).or_default());
        match (op, tracked) {
            (Op::Write { offset, data, .. }, Some(file)) => {
                file.unsynced.push(at);
                self.whole.insert(at, whole_pages(*offset, data));
            }
            (Op::SetLen { .. } | Op::Punch { .. }, Some(file)) => file.unsynced.push(at),
            (Op::SetReadOnly { .. }, Some(file)) => op.apply_content(&mut file.durable),
            (Op::Sync { .. }, Some(file)) => {
                for at in file.unsynced.drain(..) {
                    let whole = self.whole.remove(&at).unwrap_or_default();
                    apply(&self.log[at], Part::Whole, &whole, &mut file.durable);
                }
            }
            (Op::SyncFailed { .. }, Some(file)) => {
                for at in file.unsynced.drain(..) {
                    self.whole.remove(&at);
                }
            }
            (Op::Create { file, name } | Op::Rename { file, to: name, .. }, _) => {
                self.labels.insert(*file, Arc::clone(name));
                self.unsynced_names.push(at);
            }
            (Op::Remove { .. }, _) => self.unsynced_names.push(at),
            (Op::SyncNames, _) => {
                for at in self.unsynced_names.drain(..) {
                    self.log[at].apply_names(&mut self.names);
                }
            }
            _ => {}
        }
        true
    }

    /// Hands out the states at this point.
    pub fn visit(
        &self,
        bounds: &Bounds,
        visit: &mut dyn FnMut(&CrashState<'_>, Image),
    ) -> CrashStats {
        let files = self.reachable();
        let unsynced = self.unsynced(&files);
        let mut seen = HashSet::new();
        let mut stats = CrashStats { points: 1, ..CrashStats::default() };
        let mut offer = |survivors: &[Survivor]| {
            let image = self.image(&files, survivors);
            if !seen.insert(image.fingerprint()) {
                stats.duplicates += 1;
                return;
            }
            stats.states += 1;
            let (log, labels) = (self.log, &self.labels);
            let unsynced = &unsynced.ops;
            visit(&CrashState { point: self.point, unsynced, survivors, log, labels }, image);
        };
        let sampled = survivors::each(&unsynced, bounds, self.point, &mut offer);
        stats.sampled = usize::from(sampled);
        stats
    }

    /// The durable content of the files that some surviving name can lead to.
    fn reachable(&self) -> BTreeMap<FileId, Content> {
        let pending = self.unsynced_names.iter().filter_map(|at| self.log[*at].file());
        let ids: BTreeSet<_> = self.names.values().copied().chain(pending).collect();
        let durable = |id| self.files.get(&id).map(|file| file.durable.clone());
        ids.into_iter().map(|id| (id, durable(id).unwrap_or_default())).collect()
    }

    fn unsynced(&self, files: &BTreeMap<FileId, Content>) -> Unsynced {
        let mut unsynced = Unsynced {
            ops: self.unsynced_names.clone(),
            tearable: Vec::new(),
            growing: Vec::new(),
            overlapping: Vec::new(),
        };
        for (id, durable) in files {
            let Some(file) = self.files.get(id) else { continue };
            unsynced.ops.extend(&file.unsynced);
            for (index, &at) in file.unsynced.iter().enumerate() {
                let Some(range) = self.log[at].range() else { continue };
                if matches!(self.log[at], Op::Write { .. }) {
                    if middle(&range).is_some() {
                        unsynced.tearable.push(at);
                    }
                    if range.end > durable.len() {
                        unsynced.growing.push(at);
                    }
                }
                let earlier = file.unsynced[..index].iter().filter(|&&earlier| {
                    let earlier = self.log[earlier].range();
                    earlier.is_some_and(|r| r.start < range.end && range.start < r.end)
                });
                unsynced.overlapping.extend(earlier.map(|&earlier| (earlier, at)));
            }
        }
        unsynced.ops.sort_unstable();
        unsynced
    }

    fn image(&self, durable: &BTreeMap<FileId, Content>, survivors: &[Survivor]) -> Image {
        let (mut names, mut files) = (self.names.clone(), durable.clone());
        for Survivor { op: at, part } in survivors {
            let op = &self.log[*at];
            op.apply_names(&mut names);
            if let Some(content) = op.file().and_then(|id| files.get_mut(&id)) {
                let whole = self.whole.get(at).map_or(&[][..], Vec::as_slice);
                apply(op, *part, whole, content);
            }
        }
        let named = |(name, id)| (name, files.remove(&id).unwrap_or_default());
        Image { files: names.into_iter().map(named).collect() }
    }
}

/// Does a part of a content operation.
fn apply(op: &Op, part: Part, whole: &[Arc<Page>], content: &mut Content) {
    let Op::Write { offset, data, .. } = op else { return op.apply_content(content) };
    let end = offset + data.len() as u64;
    let middle = middle(&(*offset..end)).unwrap_or(end);
    let half = super::super::to_usize(middle - offset);
    match part {
        Part::Whole => content.write_shared(*offset, data, whole),
        Part::FirstHalf => content.write(*offset, &data[..half]),
        Part::LastHalf => content.write(middle, &data[half..]),
        Part::Length => content.set_len(content.len().max(end)),
    }
}
