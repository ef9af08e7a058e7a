//! Long work: how far it is, how it ended, and a flag that asks it to stop.
//!
//! Invariants:
//! - A job ends exactly once, also when its thread panics or its client goes away.
//! - Jobs that ended are kept for a while so that somebody can ask about them; their number is
//!   bounded.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

use super::events::Events;
use crate::api::types::{Event, EventKind, Failure, Job, JobKind, JobState};
use crate::clock::now;
use crate::pump::Watch;

/// Ended jobs that are kept.
const KEPT: usize = 256;
/// How long a job may take to stop when the daemon ends, and how often that is looked at.
const SUSPEND_MAX: Duration = Duration::from_secs(5);
const SUSPEND_LOOK: Duration = Duration::from_millis(2);
/// Stands for a total that is not known.
const UNKNOWN: u64 = u64::MAX;

#[derive(Debug)]
struct End {
    at: u64,
    outcome: Result<Value, (Kind, Box<Failure>)>,
}

/// A job, as seen by those who ask about it.
pub struct Entry {
    id: u64,
    kind: JobKind,
    object: String,
    started: u64,
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    /// Asked to stop by a daemon that ends: whoever comes next goes on.
    suspended: AtomicBool,
    notes: Mutex<Vec<String>>,
    end: Mutex<Option<End>>,
    ended: watch::Sender<bool>,
}

/// All jobs.
#[derive(Default)]
pub struct Jobs {
    table: Mutex<BTreeMap<u64, Arc<Entry>>>,
    last: AtomicU64,
    events: Arc<Events<Event>>,
}

/// A job, as seen by the one who does it. When this is dropped the job has ended.
pub struct Running {
    entry: Arc<Entry>,
    events: Arc<Events<Event>>,
}

impl Jobs {
    /// No jobs; what happens to them is told to `events`.
    pub fn new(events: Arc<Events<Event>>) -> Self {
        Jobs { events, ..Jobs::default() }
    }

    /// Starts a job.
    pub fn start(&self, kind: JobKind, object: &str, total: Option<u64>) -> Running {
        // Relaxed: only a number that nobody else gets.
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = Arc::new(Entry {
            id,
            kind,
            object: object.to_owned(),
            started: now(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(total.unwrap_or(UNKNOWN)),
            cancelled: AtomicBool::new(false),
            suspended: AtomicBool::new(false),
            notes: Mutex::default(),
            end: Mutex::new(None),
            ended: watch::Sender::new(false),
        });
        let mut table = self.table.lock();
        let ended: Vec<u64> =
            table.iter().filter(|(_, e)| e.end.lock().is_some()).map(|(id, _)| *id).collect();
        for id in ended.iter().take((ended.len() + 1).saturating_sub(KEPT)) {
            table.remove(id);
        }
        table.insert(id, Arc::clone(&entry));
        drop(table);
        self.events.add(EventKind::JobStarted, entry.label(), entry.object.clone());
        Running { entry, events: Arc::clone(&self.events) }
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<Job> {
        self.table.lock().values().map(|e| e.describe()).collect()
    }

    /// Jobs that are running.
    pub fn running(&self) -> u64 {
        self.table.lock().values().filter(|e| e.end.lock().is_none()).count() as u64
    }

    /// A job.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: u64) -> Result<Arc<Entry>> {
        self.table.lock().get(&id).cloned().ok_or_else(|| {
            Error::new(Kind::NotFound, "there is no such job, or it ended long ago")
                .tried("find")
                .on(format!("job {id}"))
                .hint("`offshoot job ls` lists them")
        })
    }

    /// Asks every job to stop, because the daemon ends.
    pub fn suspend_all(&self) {
        self.table.lock().values().for_each(|e| e.suspend());
    }

    /// Asks those to stop that whoever comes next does anew by itself, and waits until they have.
    pub fn suspend_resumable(&self) {
        let own = |e: &&Arc<Entry>| e.kind.goes_on_by_itself() && e.end.lock().is_none();
        let entries: Vec<_> = self.table.lock().values().filter(own).cloned().collect();
        entries.iter().for_each(|e| e.suspend());
        let since = Instant::now();
        while entries.iter().any(|e| e.end.lock().is_none()) && since.elapsed() < SUSPEND_MAX {
            std::thread::sleep(SUSPEND_LOOK);
        }
    }
}

impl Entry {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    fn label(&self) -> String {
        format!("job {} ({})", self.id, self.kind.name())
    }

    /// Asks the job to stop. It does so between two pieces of work, or is done before.
    pub fn cancel(&self) {
        // Relaxed: a flag alone; seeing it late only costs time.
        self.cancelled.store(true, Ordering::Relaxed);
    }

    fn suspend(&self) {
        // Release pairs with the Acquire in `is_suspended`: who sees the request to stop sees why.
        self.suspended.store(true, Ordering::Release);
        self.cancel();
    }

    /// True when it was asked to stop because the daemon ends.
    pub fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::Acquire) // pairs with `suspend`
    }

    /// Whether the job may go on.
    ///
    /// # Errors
    /// `Cancelled`.
    pub fn check(&self) -> Result<()> {
        // Relaxed: as in `cancel`.
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Cancelled, "it was cancelled"));
        }
        Ok(())
    }

    /// `bytes` more are done.
    pub fn add(&self, bytes: u64) {
        // Relaxed: a number for people.
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Tells when the job has ended.
    pub fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// What came of an ended job; `None` while it is running.
    pub fn outcome(&self) -> Option<Result<Value, Box<Failure>>> {
        match &self.end.lock().as_ref()?.outcome {
            Ok(value) => Some(Ok(value.clone())),
            Err((_, failure)) => Some(Err(failure.clone())),
        }
    }

    /// What its user should know besides.
    pub fn notes(&self) -> Vec<String> {
        self.notes.lock().clone()
    }

    /// How it is.
    pub fn describe(&self) -> Job {
        let end = self.end.lock();
        let (state, error, result) = match end.as_ref().map(|end| &end.outcome) {
            None => (JobState::Running, None, None),
            Some(Ok(value)) => (JobState::Done, None, Some(value.clone())),
            Some(Err((Kind::Cancelled, f))) => (JobState::Cancelled, Some((**f).clone()), None),
            Some(Err((_, f))) => (JobState::Failed, Some((**f).clone()), None),
        };
        // Relaxed: numbers for people.
        let total = self.total.load(Ordering::Relaxed);
        Job {
            id: self.id,
            kind: self.kind,
            object: self.object.clone(),
            state,
            done: self.done.load(Ordering::Relaxed),
            total: (total != UNKNOWN).then_some(total),
            started: self.started,
            ended: end.as_ref().map(|end| end.at),
            error,
            result,
            notes: self.notes(),
        }
    }
}

impl Running {
    /// The job.
    pub fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// Adds something that the user should know.
    pub fn note(&self, notes: Vec<String>) {
        self.entry.notes.lock().extend(notes);
    }

    /// Does the work of the job, and ends it with what came of that, which is given back as well.
    ///
    /// # Errors
    /// What `work` reports.
    pub fn run<T: Serialize>(self, work: impl FnOnce(&Running) -> Result<T>) -> Result<Value> {
        let outcome = work(&self).and_then(|value| {
            serde_json::to_value(value)
                .map_err(|e| Error::new(Kind::Failed, "the answer cannot be written").caused_by(e))
        });
        self.end(&outcome);
        outcome
    }

    /// Ends the job.
    pub fn finish(self, outcome: &Result<Value>) {
        self.end(outcome);
    }

    fn end(&self, outcome: &Result<Value>) {
        let outcome = match outcome {
            Ok(value) => Ok(value.clone()),
            Err(e) => Err((e.kind(), Box::new(Failure::from(e)))),
        };
        let mut end = self.entry.end.lock();
        if end.is_some() {
            return;
        }
        let detail = match &outcome {
            Ok(_) => format!("{}: done", self.entry.object),
            Err((_, failure)) => failure.message.clone(),
        };
        *end = Some(End { at: now(), outcome });
        drop(end);
        // Told before anybody who waits for the end goes on.
        self.events.add(EventKind::JobFinished, self.entry.label(), detail);
        self.entry.ended.send_replace(true);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end(&Err(Error::new(Kind::Failed, "it was given up before its end")
            .on(self.entry.object.clone())));
    }
}

impl Watch for Running {
    fn wants_total(&self) -> bool {
        true
    }

    fn expect(&self, bytes: u64) {
        // Relaxed: as in `describe`.
        self.entry.total.store(bytes, Ordering::Relaxed);
    }

    fn add(&self, bytes: u64) {
        self.entry.add(bytes);
    }

    fn set(&self, done: u64, total: u64) {
        // Relaxed: as in `describe`.
        self.entry.total.store(total, Ordering::Relaxed);
        self.entry.done.store(done, Ordering::Relaxed);
    }

    fn check(&self) -> Result<()> {
        self.entry.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_ends_once_whatever_its_owner_does() {
        let jobs = Jobs::default();
        let done = jobs.start(JobKind::Scrub, "disk a", None);
        done.set(1, 2);
        let entry = Arc::clone(done.entry());
        assert_eq!((entry.describe().state, entry.describe().total), (JobState::Running, Some(2)));
        done.finish(&Ok(Value::from(7)));
        assert_eq!(entry.describe().state, JobState::Done);
        assert_eq!(entry.outcome(), Some(Ok(Value::from(7))));

        let lost = Arc::clone(jobs.start(JobKind::Seal, "disk b", None).entry());

        assert_eq!(lost.describe().state, JobState::Failed);
        assert!(*lost.ended().borrow());
        let stopped = jobs.start(JobKind::Seal, "disk c", None);
        stopped.entry().cancel();
        let error = stopped.check().unwrap_err();
        let entry = Arc::clone(stopped.entry());
        stopped.finish(&Err(error));
        assert_eq!(entry.describe().state, JobState::Cancelled);
        assert_eq!(jobs.running(), 0);
    }

    #[test]
    fn a_bounded_number_of_ended_jobs_is_kept() {
        let jobs = Jobs::default();
        let running = jobs.start(JobKind::Scrub, "disk a", None);
        for _ in 0..KEPT * 2 {
            drop(jobs.start(JobKind::Check, "disk b", None));
        }

        assert!(jobs.list().len() <= KEPT + 1);
        assert!(jobs.get(running.entry().id()).is_ok());
        assert_eq!(jobs.get(2).map(|_| ()).unwrap_err().kind(), Kind::NotFound);
    }
}
