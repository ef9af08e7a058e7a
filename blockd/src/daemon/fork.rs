//! Forks of disks in service and of others, at one instant.
//!
//! The order is that of `storedir/fork.rs`. For a disk in service, freezing goes like this:
//! 1. while its guests run: a checkpoint, so that little is left to be made durable;
//! 2. its gate is closed and what is in work ends, on all disks of the fork: the instant. No guest
//!    has an answer to a request that the children do not have, and none of a later one is in them;
//! 3. it is frozen, the fork is settled, and the volume goes on with the successor;
//! 4. the old gate sends everybody to the new one.
//!
//! A guest waits from 2 to 4, and sees a slow request. No request completes meanwhile, so a process
//! that is killed then leaves nothing that the segments do not have: whoever opens the store
//! settles the fork, and a front end that connects again finds its disk going on.
//!
//! Tests: `fork_under_load`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Context as _, Error, Kind, Result};

use super::Daemon;
use super::handover::side_by_side;
use super::holds::Hold;
use super::served::in_service;
use super::tokens::lasting;
use crate::api::types::{EventKind, ForkDisks, ForkedDisks, JobKind};
use crate::catalogue::{ForkRow, Forked};
use crate::disk::gate::Closed;
use crate::disk::{Disk, HeldDisk};
use crate::serve::Volume;
use crate::store::Access;
use crate::storedir::StoreDir;
use crate::verbs;

/// How long requests in work may take to end.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(2);

/// The volumes of the disks that are in service, by name.
pub(super) type Volumes = BTreeMap<String, Arc<Volume>>;

/// A disk in service at the instant of its fork.
struct Paused<'a> {
    volume: &'a Volume,
    disk: &'a Disk,
    gate: Closed<'a>,
}

/// How disks in service go on after their fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// At once.
    GoOn,
    /// When somebody says so.
    Hold,
}

/// What came of the cut: how long disks in service let nobody in, and those that still do not.
pub(super) struct Cut {
    pub(super) pause: Duration,
    pub(super) held: Vec<HeldDisk>,
}

impl Paused<'_> {
    /// Goes on: in the successor if the disk is frozen, else as before.
    fn go_on(self, dir: &StoreDir, then: Then) -> Option<HeldDisk> {
        let Paused { volume, disk, gate } = self;
        let outcome = dir.is_frozen(disk.segment()).and_then(|frozen| match (frozen, then) {
            (true, Then::GoOn) => volume.go_on(dir).map(|()| (true, None)),
            (true, Then::Hold) => volume.go_on_held(dir).map(|held| (true, Some(held))),
            (false, _) => Ok((false, None)),
        });
        match outcome {
            Ok((frozen, held)) => {
                if frozen {
                    gate.leave();
                }
                held
            }
            Err(e) => {
                // Its requests fail from now on, by name; attaching it again mends that.
                disk.give_up(e);
                None
            }
        }
    }
}

impl Daemon {
    /// Forks disks.
    ///
    /// # Errors
    /// As [`verbs::fork`]; `Busy` when somebody reads one of them beside its front ends, or when
    /// requests in work do not end in time; `ReadOnly` for a disk that is served for reading only;
    /// `Invalid` for a hold of disks that nobody serves.
    pub fn fork(self: &Arc<Self>, request: &ForkDisks) -> Result<ForkedDisks> {
        let began = Instant::now();
        let fork = || -> Result<ForkedDisks> {
            verbs::check_asked(request)?;
            request.disks.iter().try_for_each(|of| self.bound_depth(&of.disk))?;
            let _changing = self.service.changing.lock();
            let hold = request.hold_ms.map(lasting).transpose()?;
            let (volumes, names) = self.hold_for_fork(request)?;
            if hold.is_some() && volumes.is_empty() {
                return Err(Error::invalid(
                    "no disk of it is in service: there is nothing to hold",
                ));
            }
            let dir = self.dir()?;
            for of in request.disks.iter().filter(|of| !volumes.contains_key(&of.disk)) {
                verbs::take_tail(&dir, &of.disk, request.accept_lost_tail)?;
            }
            let row = dir.begin_fork(&verbs::forks(request))?;
            let then = if hold.is_some() { Then::Hold } else { Then::GoOn };
            let cut = fork_all(&dir, &row, &volumes, then)?;
            let pause = Some(cut.pause).filter(|_| !volumes.is_empty());
            let forked = verbs::forked(&dir, &dir.children(&row)?, (began.elapsed(), pause))?;
            let token = hold.map(|lasts| self.keep_held(cut.held, names, lasts));
            Ok(ForkedDisks { token, ..forked })
        };
        let forked = fork().context("fork", || verbs::named(request))?;
        self.tell_of_fork(request);
        self.sum_frozen();
        if forked.token.is_some() {
            // What there is to flatten is looked at when they go on.
            return Ok(forked);
        }
        self.flatten_after_fork(request);
        Ok(forked)
    }

    pub(super) fn tell_of_fork(&self, request: &ForkDisks) {
        for of in &request.disks {
            let detail = format!("into {}", of.children.join(", "));
            self.events.add(EventKind::Forked, format!("disk {}", of.disk), detail);
        }
    }

    /// As [`Daemon::hold_all`], for what changes the disks.
    pub(super) fn hold_for_fork(&self, request: &ForkDisks) -> Result<(Volumes, Vec<Hold>)> {
        let held = self.hold_all(request)?;
        match held.0.iter().find(|(_, volume)| !volume.disk().is_writable()) {
            None => Ok(held),
            Some((name, _)) => Err(Error::new(Kind::ReadOnly, "it is served for reading only")
                .on(format!("disk {name}"))),
        }
    }

    /// Holds all names; nobody reads a disk in service besides, or changes its size.
    pub(super) fn hold_all(&self, request: &ForkDisks) -> Result<(Volumes, Vec<Hold>)> {
        let mut names: Vec<(&String, bool)> = request
            .disks
            .iter()
            .flat_map(|of| of.children.iter().map(|c| (c, false)).chain([(&of.disk, true)]))
            .collect();
        // What is named twice is refused by the store.
        names.sort_unstable();
        names.dedup_by_key(|(name, _)| *name);
        let (mut volumes, mut holds) = (Volumes::new(), Vec::new());
        for (name, is_parent) in names {
            let served = self.table().served.get(name).map(|s| Arc::clone(&s.volume));
            match served.filter(|_| is_parent) {
                Some(volume) => {
                    holds.push(self.holds.take(&in_service(name), Access::Write)?);
                    volumes.insert(name.clone(), volume);
                }
                None => holds.push(self.hold(name, Access::Write)?),
            }
        }
        Ok((volumes, holds))
    }

    /// Takes up what goes on by itself: sums that are missing, disks that are to be flattened.
    pub fn go_on_in_background(self: &Arc<Self>) {
        self.sum_frozen();
        let names: Vec<String> = self.table().served.keys().cloned().collect();
        names.iter().for_each(|name| self.flatten_by_policy(name));
    }

    /// Has the sums of frozen segments made that have none yet, as a job that nobody waits for.
    pub(super) fn sum_frozen(self: &Arc<Self>) {
        use crate::pump::Watch as _;
        let daemon = Arc::clone(self);
        let work = move || {
            let _one = daemon.summing.lock();
            let Ok(dir) = daemon.dir() else { return };
            let Some(object) = dir.next_to_sum() else { return };
            let job = daemon.jobs.start(JobKind::Sum, &object, None);
            let summed = dir.sum_frozen(&mut |done, total| {
                job.set(done, total);
                job.check()
            });
            job.finish(&summed.map(serde_json::Value::from));
        };
        let thread = std::thread::Builder::new().name("sums".into()).spawn(work);
        if let Err(error) = thread {
            // The next fork, or the next start, tries again.
            tracing::warn!(%error, "no thread for the sums of frozen segments");
        }
    }
}

/// Freezes all disks and lets them go on.
pub(super) fn fork_all(
    dir: &StoreDir,
    fork: &ForkRow,
    volumes: &Volumes,
    then: Then,
) -> Result<Cut> {
    let disks: Vec<(&Arc<Volume>, Arc<Disk>)> =
        volumes.values().map(|volume| (volume, volume.disk())).collect();
    let prepared = side_by_side(disks.iter().collect(), |(_, disk)| disk.prepare_hand_on());
    let began = Instant::now();
    let mut paused = Vec::new();
    let frozen = prepared.into_iter().collect::<Result<()>>().and_then(|()| {
        for (volume, disk) in &disks {
            paused.push(Paused { volume, disk, gate: disk.pause(DRAIN_MAX)? });
        }
        let freeze = |forked: &Forked| match paused.iter().find(|p| p.volume.name() == forked.name)
        {
            Some(paused) => paused.disk.freeze(forked.successor),
            None => dir.freeze(forked),
        };
        side_by_side(fork.disks.iter().collect(), freeze).into_iter().collect::<Result<()>>()
    });
    // Also when a disk could not be frozen: those that were must go on.
    let settled = dir.settle_fork(fork);
    let held = paused.into_iter().filter_map(|paused| paused.go_on(dir, then)).collect();
    let pause = began.elapsed();
    // What is durable counts: there are children when all disks are frozen.
    if !settled? {
        frozen?;
        return Err(Error::new(Kind::Failed, "not all of the disks were frozen"));
    }
    Ok(Cut { pause, held })
}
