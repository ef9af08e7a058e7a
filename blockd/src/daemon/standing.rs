//! Giving way: a fork that stands by holds what others may want, and lets go of it for them.
//!
//! A fork that is ready for its instant holds the names of its disks and the right to change what
//! is served. One that is to be cut soon keeps others waiting; one that stands by, for a word that
//! may never come, must not.
//!
//! Invariant: while somebody waits for such a thing, no fork stands by. Who begins to wait ends the
//! one that does, and a fork that is ready while somebody waits does not begin to. Both look under
//! one lock, so none misses the other.
//!
//! Lock order: `state`, then the stage of a fork.

use std::fmt;
use std::sync::Arc;

use format::{Error, Kind, Result};
use parking_lot::{Mutex, MutexGuard};

use super::going::Going;

/// Who stands by, and who waits.
#[derive(Default)]
pub struct Standing {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    fork: Option<Arc<Going>>,
    waiting: usize,
}

/// Somebody waits: no fork stands by until this is dropped.
pub(super) struct Waiting<'a>(&'a Standing);

/// A fork stands by until this is dropped.
pub(super) struct Stands<'a>(&'a Standing);

impl Standing {
    /// Says that somebody is going to wait; a fork that stands by ends.
    pub(super) fn wait(&self) -> Waiting<'_> {
        let mut state = self.state.lock();
        state.waiting += 1;
        if let Some(fork) = &state.fork {
            fork.give_way();
        }
        Waiting(self)
    }

    /// Has a fork stand by.
    ///
    /// # Errors
    /// `Cancelled` when somebody waits.
    pub(super) fn stand_by(&self, fork: &Arc<Going>) -> Result<Stands<'_>> {
        let mut state = self.state.lock();
        if state.waiting > 0 {
            return Err(gave_way());
        }
        state.fork = Some(Arc::clone(fork));
        Ok(Stands(self))
    }
}

impl fmt::Debug for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Standing").finish_non_exhaustive()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state.lock().waiting -= 1;
    }
}

impl Drop for Stands<'_> {
    fn drop(&mut self) {
        self.0.state.lock().fork = None;
    }
}

/// Why a fork that stood by is none any more.
pub(super) fn gave_way() -> Error {
    Error::new(Kind::Cancelled, "it stood by, and gave way to another request")
}

/// The right to change what is served: one has it at a time.
pub(super) struct Changing {
    one: Mutex<()>,
    standing: Arc<Standing>,
}

impl Changing {
    pub(super) fn new(standing: Arc<Standing>) -> Self {
        Changing { one: Mutex::default(), standing }
    }

    /// Waits for it.
    pub(super) fn lock(&self) -> MutexGuard<'_, ()> {
        if let Some(alone) = self.one.try_lock() {
            return alone;
        }
        let _waiting = self.standing.wait();
        self.one.lock()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::cut::{Steps as _, Upcoming};
    use super::super::going::{Going, Waits};
    use super::*;

    #[test]
    fn a_fork_stands_by_until_somebody_waits() {
        let standing = Arc::new(Standing::default());
        let changing = Arc::new(Changing::new(Arc::clone(&standing)));
        let going = Going::new(Waits::StandsBy(Arc::clone(&standing)));
        let fork = std::thread::spawn({
            let (changing, going) = (Arc::clone(&changing), Arc::clone(&going));
            move || {
                let _alone = changing.lock();
                going.instant(Upcoming::of_nothing()).1.map_err(|e| e.kind())
            }
        });
        while standing.state.lock().fork.is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }

        drop(changing.lock());

        assert_eq!(fork.join().unwrap(), Err(Kind::Cancelled));
        let state = standing.state.lock();
        assert!(state.fork.is_none() && state.waiting == 0);
    }

    #[test]
    fn none_begins_to_stand_by_while_somebody_waits() {
        let standing = Arc::new(Standing::default());
        let going = Going::new(Waits::StandsBy(Arc::clone(&standing)));
        let waiting = standing.wait();
        let (_, came) = going.instant(Upcoming::of_nothing());
        assert_eq!(came.map_err(|e| e.kind()), Err(Kind::Cancelled));
        drop(waiting);
        assert!(standing.stand_by(&going).is_ok());
    }
}
