//! What a disk may hold: the promise of `docs/format.md` §10, computed from a record of what was
//! done to it.
//!
//! Every operation is recorded with two clocks. *Events* order starts and ends of operations as the
//! callers saw them, across threads. *Log positions* say how many operations of the simulated store
//! had completed. A sector's writes must not overlap in time (each sector has one owner).
//!
//! - After a power cut, a sector holds the value it had when the last completed flush began, or any
//!   value that was being written then or later.
//! - After a process kill with a living client, it holds the value of the last completed write, or
//!   one that was being written.

use std::collections::{BTreeMap, BTreeSet};

use format::superblock::Seal;

/// Sector number to tag; sectors that are not in it are zero.
pub type Contents = BTreeMap<u64, u32>;

/// What an operation does. Ranges are first sector and number of sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Puts sectors of the pattern `tag` into a range.
    Write(u64, u64, u32),
    /// Makes a range zero.
    Zero(u64, u64),
    /// Makes everything before it durable: flush, checkpoint, close.
    Flush,
    /// Makes everything before it durable and sets the size in sectors.
    Resize(u64),
    /// Makes everything before it durable and the disk immutable.
    Seal,
    /// Changes no content: an opening.
    Open,
    /// What was found after an opening replaces what was there: after a crash that was survived, or
    /// without the tail of the session before.
    Adopt(Contents),
}

impl Action {
    fn flushes(&self) -> bool {
        matches!(self, Action::Flush | Action::Resize(_) | Action::Seal)
    }
}

/// One operation and when it was.
#[derive(Debug, Clone)]
pub struct Record {
    /// What.
    pub action: Action,
    /// Event of its start.
    pub started: u64,
    /// Event of its end, if it ended.
    pub ended: Option<u64>,
    /// Length of the store's log at its start.
    pub log_start: usize,
    /// Length of the store's log after its end.
    pub log_end: Option<usize>,
    /// False when it ended in an error: a write may then be there in part, a flush promises
    /// nothing.
    pub ok: bool,
}

/// Everything that was done, from a known content on.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Content at the start, all of it durable.
    pub base: Contents,
    /// Size at the start, in sectors.
    pub sectors: u64,
    /// Operations, by start.
    pub records: Vec<Record>,
    events: u64,
}

impl History {
    /// An empty history.
    #[must_use]
    pub fn new(base: Contents, sectors: u64) -> Self {
        History { base, sectors, records: Vec::new(), events: 0 }
    }

    /// The present event.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.events
    }

    /// Notes the start of an operation and returns its place.
    pub fn start(&mut self, action: Action, log: usize) -> usize {
        self.events += 1;
        let started = self.events;
        let record =
            Record { action, started, ended: None, log_start: log, log_end: None, ok: false };
        self.records.push(record);
        self.records.len() - 1
    }

    /// The history of a process that was killed after this event: what began later was never done,
    /// and what ended later never ended.
    #[must_use]
    pub fn killed_at(&self, event: u64) -> History {
        let mut history = History { events: event, ..self.clone() };
        history.records.retain(|record| record.started <= event);
        for record in history.records.iter_mut().filter(|r| r.ended.is_some_and(|e| e > event)) {
            (record.ended, record.log_end, record.ok) = (None, None, false);
        }
        history
    }

    /// Notes the end of an operation.
    pub fn end(&mut self, at: usize, ok: bool, log: usize) {
        self.events += 1;
        let record = &mut self.records[at];
        (record.ended, record.log_end, record.ok) = (Some(self.events), Some(log), ok);
    }
}

/// What is left of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// The power went after this many operations of the store.
    PowerCut(usize),
    /// The process was killed at this event; its client lives.
    Kill(u64),
}

/// What a disk may look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// Possible sizes, in sectors.
    pub sizes: BTreeSet<u64>,
    /// Possible states of sealing, as numbers (none, pending, done).
    pub seals: BTreeSet<u8>,
    /// Possible tags (0: zeroes) of each sector of [`Model::sectors`].
    pub tags: Vec<Vec<u32>>,
}

/// The number that stands for a state of sealing.
#[must_use]
pub fn seal_number(seal: Seal) -> u8 {
    match seal {
        Seal::None => 0,
        Seal::Pending => 1,
        Seal::Done => 2,
    }
}

/// A history, arranged by sector.
#[derive(Debug)]
pub struct Model {
    history: History,
    sectors: Vec<u64>,
    /// For each sector, the records that touch it.
    touching: Vec<Vec<u32>>,
}

impl Model {
    /// Arranges a history.
    ///
    /// # Panics
    /// When it has more than 2^32 records.
    #[must_use]
    pub fn new(history: History) -> Self {
        let mut sectors: BTreeSet<u64> = history.base.keys().copied().collect();
        for record in &history.records {
            match &record.action {
                Action::Write(first, count, _) => sectors.extend(*first..first + count),
                Action::Adopt(contents) => sectors.extend(contents.keys()),
                _ => {}
            }
        }
        let sectors: Vec<u64> = sectors.into_iter().collect();
        let mut touching = vec![Vec::new(); sectors.len()];
        for (i, record) in history.records.iter().enumerate() {
            let i = u32::try_from(i).expect("fewer records");
            let range = match &record.action {
                Action::Write(first, count, _) | Action::Zero(first, count) => {
                    *first..first + count
                }
                Action::Resize(to) => *to..u64::MAX,
                Action::Adopt(_) => 0..u64::MAX,
                Action::Flush | Action::Seal | Action::Open => continue,
            };
            let from = sectors.partition_point(|s| *s < range.start);
            let to = sectors.partition_point(|s| *s < range.end);
            touching[from..to].iter_mut().for_each(|list| list.push(i));
        }
        Model { history, sectors, touching }
    }

    /// The sectors that ever held anything but zeroes, ascending.
    #[must_use]
    pub fn sectors(&self) -> &[u64] {
        &self.sectors
    }

    /// The history.
    #[must_use]
    pub fn history(&self) -> &History {
        &self.history
    }

    /// What the disk may look like.
    #[must_use]
    pub fn allowed(&self, view: View) -> Allowed {
        let moment = Moment::new(&self.history, view);
        let mut sizes = BTreeSet::from([self.history.sectors]);
        let mut seals = BTreeSet::from([0]);
        for record in &self.history.records {
            match record.action {
                Action::Resize(to) if moment.completed(record) => sizes = BTreeSet::from([to]),
                Action::Resize(to) if moment.reached(record) => _ = sizes.insert(to),
                Action::Seal if moment.completed(record) => seals = BTreeSet::from([2]),
                Action::Seal if moment.reached(record) => seals.extend([1, 2]),
                _ => {}
            }
        }
        let tags = |i: usize| self.tags(i, &moment);
        Allowed { sizes, seals, tags: (0..self.sectors.len()).map(tags).collect() }
    }

    fn tags(&self, i: usize, moment: &Moment) -> Vec<u32> {
        let sector = self.sectors[i];
        let mut tags = vec![self.history.base.get(&sector).copied().unwrap_or(0)];
        let mut add = |tag: u32, replaces: bool| {
            if replaces {
                tags.clear();
            }
            if !tags.contains(&tag) {
                tags.push(tag);
            }
        };
        for record in &self.touching[i] {
            let record = &self.history.records[*record as usize];
            let tag = match &record.action {
                Action::Write(_, _, tag) => *tag,
                Action::Adopt(contents) => contents.get(&sector).copied().unwrap_or(0),
                Action::Resize(_) if moment.completed(record) => {
                    add(0, true);
                    continue;
                }
                // Until then the disk has its old size and what lay there.
                Action::Resize(_) => continue,
                _ => 0,
            };
            if moment.settled(record) {
                add(tag, record.ok);
            } else if moment.reached(record) {
                add(tag, false);
            }
        }
        tags
    }

    /// The exact content after everything ended, when there is only one.
    ///
    /// # Panics
    /// When a write failed or did not end: there is more than one then.
    #[must_use]
    pub fn contents(&self) -> Contents {
        let allowed = self.allowed(View::Kill(u64::MAX));
        let sectors = self.sectors.iter().zip(&allowed.tags);
        sectors
            .filter_map(|(sector, tags)| {
                assert_eq!(tags.len(), 1, "sector {sector} may hold any of {tags:?}");
                (tags[0] != 0).then_some((*sector, tags[0]))
            })
            .collect()
    }

    /// The size after everything ended, in sectors.
    #[must_use]
    pub fn size(&self) -> u64 {
        let sizes = self.allowed(View::Kill(u64::MAX)).sizes;
        *sizes.last().expect("there is a size")
    }
}

/// Which records count, and how, for one view.
struct Moment {
    view: View,
    /// Records that ended before this event are what a sector held when the last flush began.
    settled: u64,
}

impl Moment {
    fn new(history: &History, view: View) -> Self {
        let settled = match view {
            View::Kill(event) => event,
            View::PowerCut(point) => {
                let done = |r: &&Record| {
                    r.ok && r.action.flushes() && r.log_end.is_some_and(|end| end <= point)
                };
                history.records.iter().filter(done).map(|r| r.started).max().unwrap_or(0)
            }
        };
        Moment { view, settled }
    }

    fn completed(&self, r: &Record) -> bool {
        r.ok && match self.view {
            View::Kill(event) => r.ended.is_some_and(|end| end < event),
            View::PowerCut(point) => r.log_end.is_some_and(|end| end <= point),
        }
    }

    fn settled(&self, r: &Record) -> bool {
        r.ended.is_some_and(|end| end < self.settled)
    }

    fn reached(&self, r: &Record) -> bool {
        match self.view {
            View::Kill(event) => r.started < event,
            View::PowerCut(point) => r.log_start < point,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(history: &mut History, action: Action, from: usize, to: usize) {
        let at = history.start(action, from);
        history.end(at, true, to);
    }

    #[test]
    fn a_flush_settles_what_ended_before_it_began() {
        let mut h = History::new(Contents::from([(8, 1)]), 100);
        run(&mut h, Action::Write(8, 1, 2), 0, 1);
        run(&mut h, Action::Flush, 1, 4);
        run(&mut h, Action::Write(8, 1, 3), 4, 5);
        let model = Model::new(h);
        let tags = |point| model.allowed(View::PowerCut(point)).tags[0].clone();

        assert_eq!(tags(0), [1]);
        assert_eq!(tags(1), [1, 2]);
        assert_eq!(tags(3), [1, 2]);
        assert_eq!(tags(4), [2]);
        assert_eq!(tags(5), [2, 3]);
        assert_eq!(model.contents(), Contents::from([(8, 3)]));
    }

    #[test]
    fn a_kill_keeps_what_completed_and_a_failed_write_may_be_there() {
        let mut h = History::new(Contents::new(), 100);
        run(&mut h, Action::Write(8, 1, 2), 0, 1);
        let failed = h.start(Action::Write(8, 1, 3), 1);
        h.end(failed, false, 2);
        let model = Model::new(h);
        let tags = |event| model.allowed(View::Kill(event)).tags[0].clone();

        assert_eq!((tags(1), tags(2), tags(3)), (vec![0], vec![0, 2], vec![2]));
        assert_eq!(tags(9), [2, 3]);
    }

    #[test]
    fn a_resize_cuts_and_leaves_zeroes() {
        let mut h = History::new(Contents::from([(8, 1), (60, 1)]), 100);
        run(&mut h, Action::Resize(50), 0, 5);
        run(&mut h, Action::Resize(100), 5, 9);
        let model = Model::new(h);
        let at = |point| model.allowed(View::PowerCut(point));

        assert_eq!(at(3).sizes, BTreeSet::from([50, 100]));
        assert_eq!(at(3).tags, [[1], [1]]);
        assert_eq!(at(5).sizes, BTreeSet::from([50]));
        assert_eq!(at(9).sizes, BTreeSet::from([100]));
        assert_eq!(at(9).tags, [[1], [0]]);
    }
}
