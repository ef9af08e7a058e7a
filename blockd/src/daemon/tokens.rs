//! Tokens name the cut of a fork whose disks are held at that instant until somebody says go.
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
use parking_lot::Mutex;
use uuid::Uuid;

use super::Daemon;
use super::holds::Hold;
use crate::api::types::{EventKind, ReleasedFork};
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
