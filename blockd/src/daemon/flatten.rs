//! Flattening of disks, in service or not, on request or by policy.
//!
//! Invariants:
//! - A disk is flattened by one at a time.
//! - A disk in service is held for one piece after the other, and whoever waits for it comes first:
//!   a fork, a detachment or a stop never waits for a flatten, only for the piece it is at.
//! - What was begun is in the catalogue until it ends, fails or is cancelled. A daemon that stops,
//!   is replaced or killed leaves it there, and it goes on when the disk is in service again.
//!
//! After a fork the disk goes on in another segment, and the flatten goes on there: what was frozen
//! is one more segment that is to go.
//!
//! Tests: `flatten`, `flatten_under_load`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::units::GuestExtent;
use format::{Context as _, Error, Kind, Result};
use parking_lot::Mutex;
use uuid::Uuid;

use super::Daemon;
use super::holds::Hold;
use super::jobs::Running;
use super::pace::Pace;
use super::served::in_service;
use crate::api::types::{
    Disk as Summary, EventKind, FlattenDisk, FlattenWhen, Flattened, ForkDisks, JobKind,
    SetFlattenPolicy,
};
use crate::catalogue::{FlattenPolicy, Flattening};
use crate::pump::Watch as _;
use crate::serve::Volume;
use crate::store::Access;
use crate::storedir::{DEPTH_MAX, Going, TO_BASE, begins_write_behind};
use crate::verbs;

/// How often who waits for the end of a flatten looks.
const UNDERWAY_LOOK: Duration = Duration::from_millis(5);

/// Names of the disks that are being flattened.
pub(super) type Underway = Mutex<BTreeSet<String>>;

/// One disk that is being flattened, until this is dropped.
struct Alone<'a> {
    underway: &'a Underway,
    name: &'a str,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.underway.lock().remove(self.name);
    }
}

/// How a copy ended.
enum Ended {
    /// Nothing is left to copy.
    Whole,
    /// The disk goes on in another segment.
    Forked,
}

/// One copy of a disk in service: what goes, how far it is, and how fast.
struct Copy<'a> {
    name: &'a str,
    segment: Uuid,
    going: Going,
    copied: u64,
    pace: Pace,
}

impl Daemon {
    /// Flattens a disk.
    ///
    /// # Errors
    /// As [`verbs::flatten`]; `Busy` when it is being flattened already; `ReadOnly` for a disk that
    /// is served for reading only; `Cancelled`.
    pub fn flatten(&self, name: &str, request: &FlattenDisk, job: &Running) -> Result<Flattened> {
        let flatten = || {
            if !self.flattening.lock().insert(name.to_owned()) {
                return Err(Error::new(Kind::Busy, "it is being flattened already")
                    .hint("`offshoot job ls` lists what is running"));
            }
            let _alone = Alone { underway: &self.flattening, name };
            if !self.table().served.contains_key(name) {
                let _hold = self.hold(name, Access::Write)?;
                return verbs::flatten(&*self.dir()?, name, request, job);
            }
            let (began, before) = (Instant::now(), self.dir()?.disk(name)?.parents.len() as u64);
            let outcome = self.flatten_served(name, &verbs::flattening(request), job);
            let goes_on = job.entry().is_suspended() || !self.table().served.contains_key(name);
            if outcome.is_err() && !goes_on {
                // The failure that is told is the first one.
                let _ = self.dir().and_then(|dir| dir.forget_flatten(name));
            }
            verbs::flattened(&*self.dir()?, name, (before, outcome?, began.elapsed()))
        };
        let flattened = flatten().context("flatten", || format!("disk {name}"))?;
        let (before, after) = (flattened.depth_before, flattened.disk.depth);
        let detail = format!("{before} segments below it before, {after} now");
        self.events.add(EventKind::Flattened, format!("disk {name}"), detail);
        Ok(flattened)
    }

    /// A disk in service, for one piece of background work; who waits for it comes first.
    fn in_service_for_now(&self, name: &str) -> Result<(Arc<Volume>, Hold)> {
        let hold = self.holds.take_when_idle(&in_service(name))?;
        let volume = self.table().served.get(name).map(|s| Arc::clone(&s.volume));
        let gone = || Error::new(Kind::Cancelled, "it is no longer in service");
        Ok((volume.ok_or_else(gone)?, hold))
    }

    /// Copies and lets go, as often as forks come in between. Returns the bytes copied.
    fn flatten_served(&self, name: &str, how: &Flattening, job: &Running) -> Result<u64> {
        let mut copied = 0;
        loop {
            let mut copy = {
                let (volume, _hold) = self.in_service_for_now(name)?;
                let disk = volume.disk();
                let (going, bytes) = self.dir()?.begin_flatten(name, &disk, how)?;
                job.expect(copied + bytes);
                let pace = Pace::new(how.rate, &volume.stats(), Instant::now());
                Copy { name, segment: disk.segment(), going, copied, pace }
            };
            let ended = self.copy(&mut copy, job)?;
            copied = copy.copied;
            if matches!(ended, Ended::Forked) {
                continue;
            }
            let (volume, _hold) = self.in_service_for_now(name)?;
            let disk = volume.disk();
            if disk.segment() == copy.segment {
                self.dir()?.end_flatten(name, &disk, &copy.going)?;
                return Ok(copied);
            }
        }
    }

    fn copy(&self, copy: &mut Copy<'_>, job: &Running) -> Result<Ended> {
        let mut at = GuestExtent(0);
        loop {
            job.check()?;
            let (volume, hold) = self.in_service_for_now(copy.name)?;
            let disk = volume.disk();
            if disk.segment() != copy.segment {
                return Ok(Ended::Forked);
            }
            // Lanes may be shared: this one is not busier than its queue.
            let Some(pulled) = disk.pull(0, at, &mut copy.going)? else { return Ok(Ended::Whole) };
            at = pulled.next;
            let before = copy.copied;
            copy.copied += pulled.bytes;
            job.add(pulled.bytes);
            if begins_write_behind(before, pulled.bytes) {
                disk.write_out();
            }
            let wait = copy.pace.copied(pulled.bytes, || volume.stats(), Instant::now());
            drop((disk, volume, hold));
            nap(wait, job)?;
        }
    }

    /// Sets when a disk is flattened by itself.
    ///
    /// # Errors
    /// `NotFound`, or what the host reports.
    pub fn set_disk_policy(
        self: &Arc<Self>,
        name: &str,
        request: &SetFlattenPolicy,
    ) -> Result<Summary> {
        let dir = self.dir()?;
        let summary = verbs::set_disk_policy(&dir, name, request)?;
        self.flatten_by_policy(name);
        Ok(summary)
    }

    /// When disks are flattened by themselves that say nothing of their own.
    ///
    /// # Errors
    /// `Busy` while a successor has the store.
    pub fn store_policy(&self) -> Result<SetFlattenPolicy> {
        Ok(verbs::store_policy(&*self.dir()?))
    }

    /// Sets that.
    ///
    /// # Errors
    /// What the host reports.
    pub fn set_store_policy(
        self: &Arc<Self>,
        request: &SetFlattenPolicy,
    ) -> Result<SetFlattenPolicy> {
        let set = verbs::set_store_policy(&*self.dir()?, request)?;
        self.go_on_in_background();
        Ok(set)
    }

    /// Flattens a disk in service if its policy says so, or if that was begun and not ended.
    pub(super) fn flatten_by_policy(self: &Arc<Self>, name: &str) {
        match self.is_due(name) {
            Ok(Some(how)) => self.flatten_in_background(name, &how),
            Ok(None) => {}
            // Whoever has it looks at this when it is done, or the next one does.
            Err(error) if error.kind() == Kind::Busy => {}
            Err(error) => tracing::warn!(disk = name, %error, "not flattened"),
        }
    }

    fn is_due(&self, name: &str) -> Result<Option<FlattenDisk>> {
        let Some((volume, _hold)) = self.served_volume(name)? else { return Ok(None) };
        let (dir, disk) = (self.dir()?, volume.disk());
        if !disk.is_writable() {
            return Ok(None);
        }
        let row = dir.disk(name)?;
        if let Some(Flattening { to, rate }) = row.flattening {
            return Ok(Some(FlattenDisk { to: Some(to), rate, accept_lost_tail: false }));
        }
        let going = || dir.going(&disk, TO_BASE);
        let due = match row.policy.unwrap_or(dir.flatten_policy()) {
            FlattenPolicy::Manual => false,
            FlattenPolicy::AfterFork => !going()?.is_empty(),
            FlattenPolicy::Depth(most) => row.parents.len() as u64 > most && !going()?.is_empty(),
            FlattenPolicy::Bytes(below) => {
                let going = going()?;
                !going.is_empty() && disk.bytes_below(&going)? < below
            }
        };
        Ok(due.then(FlattenDisk::default))
    }

    fn flatten_as_job(&self, name: &str, how: &FlattenDisk) -> Result<serde_json::Value> {
        let job = self.jobs.start(JobKind::Flatten, &format!("disk {name}"), None);
        job.run(|job| self.flatten(name, how, job))
    }

    /// Flattens a disk as a job that nobody waits for.
    pub(super) fn flatten_in_background(self: &Arc<Self>, name: &str, how: &FlattenDisk) {
        let (daemon, owned, how) = (Arc::clone(self), name.to_owned(), how.clone());
        let work = move || {
            if daemon.flattening.lock().contains(&owned) {
                // It goes on by itself.
                return;
            }
            // What came of it is told by the job.
            let _ = daemon.flatten_as_job(&owned, &how);
        };
        if let Err(error) = std::thread::Builder::new().name("flatten".into()).spawn(work) {
            // The next fork, or the next start, tries again.
            tracing::warn!(disk = name, %error, "no thread to flatten it");
        }
    }

    /// Waits until a disk that stands on very many segments is flattened.
    pub(super) fn bound_depth(&self, name: &str) -> Result<()> {
        let deep = || {
            let row = self.dir()?.disk(name)?;
            Ok::<_, Error>(row.parents.len() >= DEPTH_MAX)
        };
        while deep()? {
            if self.flattening.lock().contains(name) {
                std::thread::sleep(UNDERWAY_LOOK);
                continue;
            }
            match self.flatten_as_job(name, &FlattenDisk::default()) {
                Err(e) if e.kind() == Kind::Busy => std::thread::sleep(UNDERWAY_LOOK),
                flattened => _ = flattened?,
            }
        }
        Ok(())
    }

    /// What is to be done about depth after a fork.
    pub(super) fn flatten_after_fork(self: &Arc<Self>, request: &ForkDisks) {
        for of in &request.disks {
            match request.flatten {
                FlattenWhen::Manual => {}
                FlattenWhen::Auto => self.flatten_by_policy(&of.disk),
                FlattenWhen::Now => {
                    let (names, how) = ([&of.disk], FlattenDisk::default());
                    names
                        .into_iter()
                        .chain(&of.children)
                        .for_each(|name| self.flatten_in_background(name, &how));
                }
            }
        }
    }
}

/// Sleeps, but not for long after somebody asked the job to stop.
fn nap(wait: Duration, job: &Running) -> Result<()> {
    const LOOK: Duration = Duration::from_millis(50);
    let until = Instant::now() + wait;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(LOOK));
        job.check()?;
    }
}
