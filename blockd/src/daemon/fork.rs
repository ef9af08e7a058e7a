//! Forks of disks in service and of others, at one instant.
//!
//! How they go on is in `cut.rs`.
//!
//! Who takes something else at the same instant, a machine's memory say, has the machine stopped
//! for it, and cannot wait for what is made durable. [`Daemon::fork_soon`] answers when all is
//! ready for the instant, which [`Daemon::cut_now`] then says, or when the instant is past; in
//! either case [`Daemon::forked`] waits for the rest.
//!
//! Tests: `fork_under_load`.

use std::sync::Arc;
use std::time::Instant;

use format::{Context as _, Error, Kind, Result};
use parking_lot::Mutex;
use uuid::Uuid;

use super::Daemon;
use super::ahead::AskedFor;
use super::cut::{Done, Steps, Then, Volumes, cut};
use super::going::{Going, Waits};
use super::holds::Hold;
use super::served::in_service;
use super::tokens::lasting;
use crate::api::types::{
    CutForks, EventKind, ForkAnswer, ForkDisk, ForkDisks, ForkedDisks, JobKind,
};
use crate::store::Access;
use crate::verbs;

impl Daemon {
    /// Forks disks.
    ///
    /// # Errors
    /// As [`verbs::fork`]; `Busy` when somebody reads one of them beside its front ends, or when
    /// requests in work do not end in time; `ReadOnly` for a disk that is served for reading only;
    /// `Invalid` for a hold of disks that nobody serves.
    pub fn fork(self: &Arc<Self>, request: &ForkDisks) -> Result<ForkedDisks> {
        self.fork_as(request, request.hold_ms.map(|_| Uuid::new_v4()), &())
    }

    /// The same. `token` names the cut.
    fn fork_as(
        self: &Arc<Self>,
        request: &ForkDisks,
        token: Option<Uuid>,
        steps: &dyn Steps,
    ) -> Result<ForkedDisks> {
        let forked = self.fork_now(request, token, steps);
        let forked = forked.context("fork", || verbs::named(request))?;
        let request = &with_names(request, &forked);
        self.tell_of_fork(request);
        self.sum_frozen();
        if token.is_none_or(|token| !self.is_held(token)) {
            // Else what there is to flatten is looked at when they go on.
            self.flatten_after_fork(request);
        }
        Ok(forked)
    }

    fn fork_now(
        self: &Arc<Self>,
        request: &ForkDisks,
        token: Option<Uuid>,
        steps: &dyn Steps,
    ) -> Result<ForkedDisks> {
        let began = Instant::now();
        verbs::check_asked(request)?;
        request.disks.iter().try_for_each(|of| self.bound_depth(&of.disk))?;
        let _changing = self.service.changing.lock();
        let hold = request.hold_ms.map(lasting).transpose()?;
        let (volumes, names) = self.hold_for_fork(request)?;
        self.check_ahead(request, &volumes)?;
        if volumes.is_empty() && (hold.is_some() || token.is_some()) {
            let reason = "no disk of it is in service: there is no instant to wait for";
            return Err(Error::invalid(reason));
        }
        let dir = self.dir()?;
        for of in request.disks.iter().filter(|of| !volumes.contains_key(&of.disk)) {
            verbs::take_tail(&dir, &of.disk, request.accept_lost_tail)?;
        }
        let row = dir.begin_fork(&verbs::forks(request))?;
        steps.begun(&row);
        let is_ahead = |hold: &Hold| {
            let serve = request.disks.iter().flat_map(|of| &of.serve);
            serve.map(|serve| &serve.child).any(|child| child == hold.name())
        };
        let (of_ahead, names): (Vec<Hold>, Vec<Hold>) = names.into_iter().partition(is_ahead);
        let any_ahead = !of_ahead.is_empty();
        let of_ahead = of_ahead.into_iter().map(|hold| (hold.name().to_owned(), hold)).collect();
        let children = Arc::new(AskedFor {
            daemon: Arc::clone(self),
            dir: Arc::clone(&dir),
            request: request.clone(),
            holds: Mutex::new(of_ahead),
        });
        let names = Arc::new(names);
        let then = match (token, hold) {
            (Some(token), Some(lasts)) => {
                let (daemon, names) = (Arc::clone(self), Arc::clone(&names));
                Then::Hold(Box::new(move |held| daemon.keep_held(token, held, names, lasts)))
            }
            _ => Then::GoOn,
        };
        let cut = cut((&dir, &row), &volumes, then, steps, Arc::clone(&children) as _);
        let Done { fork: row, ahead, pause } = cut.inspect_err(|_| {
            if any_ahead {
                self.remember();
            }
        })?;
        self.serve_children(ahead, std::mem::take(&mut *children.holds.lock()));
        let forked = verbs::forked(&dir, &dir.children(&row)?, (began.elapsed(), pause))?;
        Ok(ForkedDisks { token, ..forked })
    }

    /// Forks disks in service, and comes back when that is ready, or when its instant is past:
    /// [`Daemon::forked`] tells of the rest.
    ///
    /// # Errors
    /// As [`Daemon::fork`], for what fails before.
    pub async fn fork_soon(self: &Arc<Self>, request: ForkDisks) -> Result<CutForks> {
        let all_served = |of: &ForkDisk| of.serve.len() == of.children.len();
        if request.answer == ForkAnswer::Standby && !request.disks.iter().all(all_served) {
            let reason = "a fork stands by only if all of its children are to be served";
            return Err(Error::invalid(reason)).context("fork", || verbs::named(&request));
        }
        let waits = match request.answer {
            ForkAnswer::Ready => Waits::Shortly,
            ForkAnswer::Standby => Waits::StandsBy(Arc::clone(self.holds.standing())),
            ForkAnswer::Durable | ForkAnswer::Cut => Waits::No,
        };
        let ready = !matches!(waits, Waits::No);
        let (token, going) = (Uuid::new_v4(), Going::new(waits));
        self.keep_going(token, &going);
        let (daemon, shared) = (Arc::clone(self), Arc::clone(&going));
        let work = move || shared.end(daemon.fork_as(&request, Some(token), &shared));
        // It goes on when this is answered, also when who asked goes away.
        drop(tokio::task::spawn_blocking(work));
        if ready {
            going.wait_ready().await?;
            return Ok(going.describe(token, None));
        }
        let pause = going.wait_cut().await?;
        Ok(going.describe(token, Some(pause)))
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

/// The request, with the names that its children have got.
fn with_names(request: &ForkDisks, forked: &ForkedDisks) -> ForkDisks {
    let mut named = request.clone();
    let names = forked.children.iter().map(|child| &child.name);
    for (name, is) in named.disks.iter_mut().flat_map(|of| &mut of.children).zip(names) {
        name.clone_from(is);
    }
    named
}
