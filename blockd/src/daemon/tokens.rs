//! Tokens name the cut of a fork: whose disks are held at that instant until somebody says go, or
//! which is made durable while who asked for it goes on.
//!
//! Who forks a machine takes its memory at the same instant as its disks. It asks for a fork that
//! holds, takes the memory while no request of the machine is begun, and releases the token; a
//! token that nobody releases runs out, so that a machine never waits for one that died.
//!
//! Invariant: while disks are held their names are kept, so nobody forks, resizes or detaches them,
//! or hands the daemon over.
//!
//! Test: `fork_under_load` (`a_token_…`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::Daemon;
use super::holds::Hold;
use crate::api::types::{EventKind, Failure, ForkedDisks, ReleasedFork};
use crate::disk::HeldDisk;

/// How long a token lasts at most.
const TOKEN_MAX: Duration = Duration::from_secs(60);

/// Disks that are held at the instant of a fork.
pub(super) struct Token {
    // Before the names: the disks go on when others may have them.
    _disks: Vec<HeldDisk>,
    since: Instant,
    _names: Arc<Vec<Hold>>,
}

/// All tokens that are out.
pub(super) type Tokens = Mutex<BTreeMap<Uuid, Token>>;

/// How long the outcome of a fork is kept at least for who asks.
const OUTCOME_KEPT: Duration = Duration::from_secs(600);

/// What came of a fork that was answered at its cut.
#[derive(Default)]
pub(super) struct Outcome {
    known: Mutex<Option<(Instant, Result<ForkedDisks, Failure>)>>,
    changed: Condvar,
}

impl Outcome {
    /// It is known from now on.
    pub(super) fn set(&self, outcome: Result<ForkedDisks>) {
        let outcome = outcome.map_err(|e| Failure::from(&e));
        *self.known.lock() = Some((Instant::now(), outcome));
        self.changed.notify_all();
    }

    /// Waits until it is known.
    fn wait(&self) -> Result<ForkedDisks> {
        let mut known = self.known.lock();
        loop {
            match &*known {
                Some((_, Ok(forked))) => return Ok(forked.clone()),
                Some((_, Err(failure))) => return Err(failure.clone().into()),
                None => self.changed.wait(&mut known),
            }
        }
    }

    fn is_old(&self) -> bool {
        self.known.lock().as_ref().is_some_and(|(since, _)| since.elapsed() > OUTCOME_KEPT)
    }
}

/// All outcomes that are kept.
pub(super) type Outcomes = Mutex<BTreeMap<Uuid, Arc<Outcome>>>;

/// How long to hold, from milliseconds that were asked for.
///
/// # Errors
/// `Invalid` when it is too long, or nothing.
pub(super) fn lasting(ms: u64) -> Result<Duration> {
    let asked = Duration::from_millis(ms);
    if asked.is_zero() || asked > TOKEN_MAX {
        let reason = format!("a fork is held for 1 ms to {} s", TOKEN_MAX.as_secs());
        return Err(Error::invalid(reason));
    }
    Ok(asked)
}

impl Daemon {
    /// Keeps what is to come of a fork, and forgets what is old.
    pub(super) fn keep_outcome(&self, token: Uuid, outcome: &Arc<Outcome>) {
        let mut outcomes = self.outcomes.lock();
        outcomes.retain(|_, outcome| !outcome.is_old());
        outcomes.insert(token, Arc::clone(outcome));
    }

    pub(super) fn has_outcome(&self, token: Uuid) -> bool {
        self.outcomes.lock().contains_key(&token)
    }

    /// Waits until a fork that was answered at its cut is durable.
    ///
    /// # Errors
    /// `NotFound` when there is no such token, or it is long past; as [`Daemon::fork`].
    pub fn forked(&self, token: Uuid) -> Result<ForkedDisks> {
        let outcome = self.outcomes.lock().get(&token).map(Arc::clone);
        let outcome = outcome.ok_or_else(|| {
            Error::new(Kind::NotFound, "there is no such token, or it is long past")
                .tried("wait for")
                .on(format!("token {token}"))
        })?;
        outcome.wait()
    }

    /// Whether disks are held under a token.
    pub(super) fn is_held(&self, token: Uuid) -> bool {
        self.tokens.lock().contains_key(&token)
    }

    /// Keeps disks held under a token for as long as that at most.
    pub(super) fn keep_held(
        self: &Arc<Self>,
        id: Uuid,
        disks: Vec<HeldDisk>,
        names: Arc<Vec<Hold>>,
        lasts: Duration,
    ) {
        let token = Token { _disks: disks, since: Instant::now(), _names: names };
        self.tokens.lock().insert(id, token);
        let daemon = Arc::clone(self);
        let ends = move || {
            std::thread::sleep(lasts);
            let ran_out = daemon.tokens.lock().remove(&id);
            if let Some(ran_out) = ran_out {
                let detail = format!("token {id} ran out after {} ms", lasts.as_millis());
                daemon.events.add(EventKind::Released, "fork", detail);
                drop(ran_out);
                daemon.go_on_in_background();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("token".into()).spawn(ends) {
            // Without a thread nobody would end it.
            tracing::warn!(%error, "a fork is not held");
            self.tokens.lock().remove(&id);
        }
    }

    /// Lets the disks of a token go on.
    ///
    /// # Errors
    /// `NotFound` when there is no such token, or it has run out.
    pub fn release(self: &Arc<Self>, id: Uuid) -> Result<ReleasedFork> {
        let token = self.tokens.lock().remove(&id).ok_or_else(|| {
            Error::new(Kind::NotFound, "there is no such token: it was released, or ran out")
                .tried("release")
                .on(format!("token {id}"))
                .hint("the children are there; take the memory of the machine anew")
        })?;
        let held_us = u64::try_from(token.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        drop(token);
        self.events.add(EventKind::Released, "fork", format!("token {id} after {held_us} µs"));
        self.go_on_in_background();
        Ok(ReleasedFork { token: id, held_us })
    }

    /// Lets all held disks go on.
    pub(super) fn release_all(&self) {
        self.tokens.lock().clear();
    }
}
