//! Holding: requests that the host cannot do now, for want of space or memory or because it does
//! not reach its storage, wait instead of failing, because a guest's file system does not survive
//! the failure and does survive the wait.
//!
//! A request is held from its first failure until it succeeds, fails for another reason or is
//! dropped. Held requests are tried again once a second, and at once when somebody says that the
//! host can do them ([`Hold::resume`]).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use format::Error;
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::clock;

/// Time between two tries.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// Since when, and why, requests are held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeldInfo {
    /// Requests held.
    pub requests: u64,
    /// When the first was held, in seconds since 1970.
    pub since_s: u64,
    /// What the host said.
    pub reason: String,
}

/// The held requests of a volume.
#[derive(Debug, Default)]
pub(super) struct Hold {
    state: Mutex<Option<HeldInfo>>,
    /// Counts calls of [`Hold::resume`]: who sees a new value tries again.
    resumes: AtomicU64,
    /// Nobody may wait any longer: the volume is about to close.
    closing: AtomicBool,
    tried: Condvar,
}

/// What changed for the volume as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    None,
    First,
    Last,
}

/// Whether a request that failed so is held.
pub(super) fn is_held(error: &Error) -> bool {
    error.kind().may_pass()
}

impl Hold {
    /// A request is held from now on.
    pub(super) fn begin(&self, error: &Error) -> Change {
        let mut state = self.state.lock();
        if let Some(info) = &mut *state {
            info.requests += 1;
            return Change::None;
        }
        let info = HeldInfo { requests: 1, since_s: clock::now(), reason: error.to_string() };
        *state = Some(info);
        Change::First
    }

    /// A held request is not held any more.
    pub(super) fn end(&self) -> Change {
        let mut state = self.state.lock();
        match &mut *state {
            Some(info) if info.requests > 1 => {
                info.requests -= 1;
                Change::None
            }
            _ => {
                *state = None;
                Change::Last
            }
        }
    }

    pub(super) fn info(&self) -> Option<HeldInfo> {
        self.state.lock().clone()
    }

    /// The number of calls of [`Hold::resume`] so far.
    pub(super) fn resumes(&self) -> u64 {
        self.resumes.load(Ordering::Acquire) // pairs with `resume`
    }

    /// Has every held request tried again.
    pub(super) fn resume(&self) {
        let _state = self.state.lock();
        // Release pairs with the load in `resumes`: what made space came before.
        self.resumes.fetch_add(1, Ordering::Release);
        self.tried.notify_all();
    }

    /// Ends every wait, now and later: who waits gives its error to the client.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release); // pairs with the load in `wait`
        self.resume();
    }

    /// Waits on a thread that may wait: until somebody resumes, or for the time between two tries.
    /// False when nobody may wait any longer.
    pub(super) fn wait(&self, seen: u64) -> bool {
        let mut state = self.state.lock();
        let until = Instant::now() + RETRY;
        while self.resumes() == seen {
            if self.tried.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        !self.closing.load(Ordering::Acquire) // pairs with the store in `close`
    }
}

#[cfg(test)]
mod tests {
    use format::Kind;

    use super::*;

    #[test]
    fn first_and_last_are_told_and_resume_ends_a_wait() {
        let hold = Hold::default();
        let full = Error::new(Kind::NoSpace, "full");
        let of_host = |errno| Error::from(std::io::Error::from_raw_os_error(errno));
        let held = [libc::ENOSPC, libc::EDQUOT, libc::ENOMEM, libc::ETIMEDOUT, libc::ENETDOWN];
        assert!(held.into_iter().all(|errno| is_held(&of_host(errno))));
        // A medium that fails stays so: its guest has to know.
        assert!(!is_held(&of_host(libc::EIO)) && !is_held(&Error::corrupt("x")));
        assert_eq!((hold.begin(&full), hold.begin(&full)), (Change::First, Change::None));
        assert_eq!(hold.info().unwrap().requests, 2);
        let seen = hold.resumes();
        let start = Instant::now();
        std::thread::scope(|s| {
            s.spawn(|| assert!(hold.wait(seen)));
            std::thread::sleep(Duration::from_millis(20));
            hold.resume();
        });
        assert!(start.elapsed() < RETRY);
        assert_eq!((hold.end(), hold.end()), (Change::None, Change::Last));
        assert_eq!(hold.info(), None);
        hold.close();
        assert!(!hold.wait(seen), "a closing volume keeps nobody waiting");
    }
}
