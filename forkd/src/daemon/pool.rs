//! Shells that are ready before they are asked for.
//!
//! A shell of the size of a machine that was started or forked is likely to be needed again, so as
//! many as the pool is to hold are kept of each such size. They are made again in the background,
//! one at a time, and not while a fork is under way, whose processors that would take; unless fork
//! follows fork, which would leave none for any of them. A fork that finds too few makes the
//! missing ones itself: it takes longer, and is counted. Then more are made as soon as its children
//! run, while it waits for the host's storage.
//!
//! Invariant: shells belong to this daemon. They end with it, and their folders go at its end or,
//! after a kill, at the next start.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::Result;
use parking_lot::{Condvar, Mutex};

use crate::api::types::{Event, EventKind, PoolClass};
use crate::machine::SizeClass;
use crate::process::{Process, Spawner};
use ::blockd::daemon::Events;

/// Sizes of which shells are kept: those that were used last.
const CLASSES_MAX: usize = 4;
/// Time without a fork before shells are made.
const QUIET: Duration = Duration::from_millis(20);
/// Time after which they are made although fork follows fork.
const QUIET_MAX: Duration = Duration::from_millis(500);
/// Time before another attempt after one that failed.
const AGAIN: Duration = Duration::from_secs(2);

/// The pool.
pub struct Pool {
    spawner: Spawner,
    size: usize,
    events: Arc<Events<Event>>,
    shelves: Mutex<Shelves>,
    changed: Condvar,
}

#[derive(Default)]
struct Shelves {
    /// Ready shells, by the memory and processors that they are for.
    ready: BTreeMap<(u64, u8), Vec<Arc<Process>>>,
    /// Sizes, the one that was used last at the end.
    used: Vec<(u64, u8)>,
    closed: bool,
    /// When shells were taken last, or a fork ended.
    taken: Option<Instant>,
    /// Forks under way.
    forks: usize,
    /// When one ended last.
    ended: Option<Instant>,
    /// One has found too few since the pool was full.
    short: bool,
    hits: u64,
    misses: u64,
}

/// A fork whose children do not run yet: processors are left to it until this is dropped.
pub struct Busy<'a>(&'a Pool);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut shelves = self.0.shelves.lock();
        shelves.forks -= 1;
        (shelves.taken, shelves.ended) = (Some(now), Some(now));
        drop(shelves);
        self.0.changed.notify_all();
    }
}

fn key(class: &SizeClass) -> (u64, u8) {
    (class.memory_bytes, class.vcpus)
}

/// Counts of shells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Taken from the pool.
    pub hits: u64,
    /// Made because none was ready.
    pub misses: u64,
}

impl Pool {
    /// A pool that keeps `size` shells of each size, in folders below `vms`.
    #[must_use]
    pub fn new(vms: PathBuf, size: usize, sandbox: bool, events: Arc<Events<Event>>) -> Pool {
        let (shelves, changed) = (Mutex::default(), Condvar::new());
        Pool { spawner: Spawner::new(vms, sandbox), size, events, shelves, changed }
    }

    /// Shells that are wanted ready of each size.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// What is ready.
    #[must_use]
    pub fn classes(&self) -> Vec<PoolClass> {
        let shelves = self.shelves.lock();
        let class = |key: &(u64, u8)| PoolClass {
            memory_bytes: key.0,
            vcpus: key.1,
            ready: shelves.ready.get(key).map_or(0, |ready| ready.len() as u64),
        };
        shelves.used.iter().map(class).collect()
    }

    /// What was taken.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let shelves = self.shelves.lock();
        Counts { hits: shelves.hits, misses: shelves.misses }
    }

    /// Says that a fork is under way.
    pub fn leave_alone(&self) -> Busy<'_> {
        self.shelves.lock().forks += 1;
        Busy(self)
    }

    /// Takes shells; those that are not ready are made. Gives back how many were made.
    ///
    /// # Errors
    /// When one cannot be made; then none is taken.
    pub fn take(&self, class: &SizeClass, count: usize) -> Result<(Vec<Arc<Process>>, usize)> {
        let mut taken = self.take_ready(class, count);
        let missing = count - taken.len();
        if missing > 0 {
            let object = format!("{} bytes, {} processors", class.memory_bytes, class.vcpus);
            self.events.add(EventKind::PoolEmpty, object, format!("{missing} shells are made"));
            for made in self.make(class, missing) {
                match made {
                    Ok(shell) => taken.push(shell),
                    Err(e) => {
                        taken.iter().for_each(|shell| discard(shell));
                        return Err(e);
                    }
                }
            }
        }
        Ok((taken, missing))
    }

    /// Takes shells that are ready, if there are as many and it is quiet, for who is in no hurry.
    pub fn take_idle(&self, class: &SizeClass, count: usize) -> Option<Vec<Arc<Process>>> {
        let mut shelves = self.shelves.lock();
        let quiet = shelves.taken.is_none_or(|at| at.elapsed() >= QUIET);
        if shelves.closed || shelves.forks > 0 || !quiet {
            return None;
        }
        let ready = shelves.ready.get_mut(&key(class))?;
        let left = ready.len().checked_sub(count)?;
        let taken = ready.split_off(left);
        drop(shelves);
        self.changed.notify_all();
        Some(taken)
    }

    /// Notes that shells are used which were taken before.
    pub fn used(&self, count: usize) {
        let mut shelves = self.shelves.lock();
        shelves.taken = Some(Instant::now());
        shelves.hits += count as u64;
    }

    fn take_ready(&self, class: &SizeClass, count: usize) -> Vec<Arc<Process>> {
        let mut shelves = self.shelves.lock();
        let mut dead = shelves.use_class(key(class));
        shelves.taken = Some(Instant::now());
        let ready = shelves.ready.entry(key(class)).or_default();
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let Some(shell) = ready.pop() else { break };
            // One that was killed is no shell any more.
            if shell.is_alive() { taken.push(shell) } else { dead.push(shell) }
        }
        shelves.hits += taken.len() as u64;
        shelves.misses += (count - taken.len()) as u64;
        shelves.short |= taken.len() < count;
        drop(shelves);
        self.changed.notify_all();
        dead.iter().for_each(|shell| discard(shell));
        taken
    }

    /// Makes shells, two at a time: the work of the kernel in between can be done by another
    /// processor.
    fn make(&self, class: &SizeClass, count: usize) -> Vec<Result<Arc<Process>>> {
        let one = || self.spawner.spawn(class).map(Arc::new);
        std::thread::scope(|s| {
            let half = s.spawn(|| (0..count / 2).map(|_| one()).collect::<Vec<_>>());
            let mut made: Vec<_> = (count / 2..count).map(|_| one()).collect();
            // A panic in there is a bug, and is one here as well.
            made.extend(half.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
            made
        })
    }

    /// Starts to keep shells ready.
    ///
    /// # Errors
    /// What the host reports.
    pub fn start(self: &Arc<Self>) -> Result<()> {
        let pool = Arc::clone(self);
        std::thread::Builder::new().name("pool".into()).spawn(move || pool.fill())?;
        Ok(())
    }

    fn fill(&self) {
        while let Some(wanted) = self.wanted() {
            let class = SizeClass { memory_bytes: wanted.0, vcpus: wanted.1 };
            let shell = match self.spawner.spawn(&class) {
                Ok(shell) => Arc::new(shell),
                Err(e) => {
                    self.events.add(EventKind::Failed, "the pool of shells", e.to_string());
                    let mut shelves = self.shelves.lock();
                    self.changed.wait_for(&mut shelves, AGAIN);
                    continue;
                }
            };
            let mut shelves = self.shelves.lock();
            if !shelves.closed && shelves.used.contains(&wanted) {
                shelves.ready.entry(wanted).or_default().push(shell);
            } else {
                drop(shelves);
                discard(&shell);
            }
        }
    }

    /// Waits until a shell is wanted, and says of which size; `None` at the end.
    fn wanted(&self) -> Option<(u64, u8)> {
        let mut shelves = self.shelves.lock();
        let mut waiting_since = None;
        loop {
            if shelves.closed {
                return None;
            }
            let ready = |key: &(u64, u8)| shelves.ready.get(key).map_or(0, Vec::len);
            let wanted = shelves.used.iter().rev().find(|key| ready(key) < self.size).copied();
            let Some(wanted) = wanted else {
                waiting_since = None;
                shelves.short = false;
                self.changed.wait(&mut shelves);
                continue;
            };
            let since = *waiting_since.get_or_insert_with(Instant::now);
            match shelves.rest(since, Instant::now()) {
                Some(Duration::ZERO) => return Some(wanted),
                Some(rest) => drop(self.changed.wait_for(&mut shelves, rest)),
                None => self.changed.wait(&mut shelves),
            }
        }
    }

    /// Ends all shells, and makes no more.
    pub fn close(&self) {
        let ready = {
            let mut shelves = self.shelves.lock();
            shelves.closed = true;
            std::mem::take(&mut shelves.ready)
        };
        self.changed.notify_all();
        ready.values().flatten().for_each(|shell| discard(shell));
    }
}

impl Shelves {
    /// How long no shell is to be made yet that is wanted since `since`; `None` for until the fork
    /// that is under way has ended.
    fn rest(&self, since: Instant, now: Instant) -> Option<Duration> {
        let forks_go_on = self.ended.is_some_and(|at| at > since);
        let at_last = QUIET_MAX.saturating_sub(now - since);
        if self.forks > 0 {
            return forks_go_on.then_some(at_last);
        }
        if self.short {
            return Some(Duration::ZERO);
        }
        let quiet = self.taken.map_or(Duration::ZERO, |at| QUIET.saturating_sub(now - at));
        Some(if forks_go_on { quiet.min(at_last) } else { quiet })
    }

    /// Notes that a size is used.
    /// Gives back the shells of a size that is not kept any more.
    fn use_class(&mut self, class: (u64, u8)) -> Vec<Arc<Process>> {
        self.used.retain(|other| *other != class);
        self.used.push(class);
        if self.used.len() <= CLASSES_MAX {
            return Vec::new();
        }
        let oldest = self.used.remove(0);
        self.ready.remove(&oldest).unwrap_or_default()
    }
}

/// Ends a shell that nobody wants, and removes its folder.
fn discard(shell: &Process) {
    // What stays has no name, and goes at the next start.
    let _ = shell.kill();
    let _ = fs::remove_dir_all(&shell.folder().0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fork into hundreds takes seconds. Shells were made again after half a second of it, and
    /// took half of the host's processors from it.
    #[test]
    fn shells_are_made_when_no_fork_is_under_way() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let rest = |shelves: &Shelves, ms| shelves.rest(began, at(ms));
        let mut shelves = Shelves { forks: 1, taken: Some(began), ..Shelves::default() };
        assert_eq!(rest(&shelves, 10_000), None, "one long fork");
        shelves.forks = 0;
        (shelves.taken, shelves.ended) = (Some(at(10_000)), Some(at(10_000)));
        assert_eq!(rest(&shelves, 10_000), Some(Duration::ZERO), "it was long enough");

        (shelves.taken, shelves.ended) = (Some(at(5)), Some(at(5)));
        assert_eq!(rest(&shelves, 15), Some(QUIET - Duration::from_millis(10)), "quiet for a bit");
        assert_eq!(rest(&shelves, 5 + 20), Some(Duration::ZERO), "quiet");
        shelves.forks = 1;
        assert_eq!(rest(&shelves, 100), Some(QUIET_MAX - Duration::from_millis(100)), "the next");
        assert_eq!(rest(&shelves, 500), Some(Duration::ZERO), "fork follows fork");
        shelves.short = true;
        assert_eq!(rest(&shelves, 100), Some(QUIET_MAX - Duration::from_millis(100)), "the next");
        (shelves.forks, shelves.taken) = (0, Some(at(100)));
        assert_eq!(rest(&shelves, 100), Some(Duration::ZERO), "it has found too few");
    }
}
