//! The two ways that requests of a disk can take, as the disk's thread and its registers see them.
//!
//! A disk goes from [`Way::Direct`] to [`Way::Arena`] at most once, and never back.

use std::sync::Arc;
use std::time::Instant;

use format::{Error, Result};
use vhost_blk::event::EventFd;
use vhost_blk::queue::{Queue, QueueSetup};

use super::direct::Direct;
use super::engine::Engine;
use super::link::Sources;

/// How requests get to blockd.
pub(super) enum Way {
    /// Through a private arena.
    Arena(Box<Engine>),
    /// blockd takes them from guest memory.
    Direct(Box<Direct>),
}

/// The same call for either way.
macro_rules! either {
    ($way:expr, $it:ident => $call:expr) => {
        match $way {
            Way::Arena($it) => $call,
            Way::Direct($it) => $call,
        }
    };
}

impl Way {
    /// A driver set up its ring.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn start(&mut self, setup: QueueSetup) -> Result<()> {
        match self {
            Way::Arena(engine) => {
                let features = setup.features;
                engine.start(Queue::new(setup)?, features);
                Ok(())
            }
            Way::Direct(direct) => direct.start(setup),
        }
    }

    /// The driver is gone.
    pub(super) fn stop(&mut self) {
        either!(self, way => way.stop());
    }

    /// Whether requests stay in the guest's ring because the machine stands.
    pub(super) fn set_paused(&mut self, paused: bool) {
        either!(self, way => way.set_paused(paused));
    }

    /// Looks after the connection.
    pub(super) fn tend(&mut self) {
        either!(self, way => way.tend());
    }

    /// Does whatever can be done without waiting; `true` when there is more to do at once.
    pub(super) fn run(&mut self) -> bool {
        match self {
            Way::Arena(engine) => engine.run(),
            Way::Direct(direct) => {
                direct.run();
                false
            }
        }
    }

    /// Arranges to be woken; `false` when there is something to do already.
    pub(super) fn arm(&mut self) -> bool {
        match self {
            Way::Arena(engine) => engine.arm(),
            Way::Direct(_) => true,
        }
    }

    /// Whether blockd has no request.
    pub(super) fn is_quiet(&self) -> bool {
        match self {
            Way::Arena(engine) => engine.in_work() == 0,
            Way::Direct(direct) => direct.is_quiet(),
        }
    }

    /// Waits for blockd, but not for long.
    pub(super) fn wait_a_little(&mut self) {
        match self {
            Way::Arena(engine) => {
                if !engine.link.queue.wait(5) {
                    engine.tend();
                }
            }
            Way::Direct(direct) => direct.wait_a_little(),
        }
    }

    /// Requests that are taken and not given back.
    pub(super) fn in_work(&self) -> usize {
        either!(self, way => way.in_work())
    }

    /// The position in the driver's ring. The disk is quiet.
    pub(super) fn base(&self) -> Option<u32> {
        either!(self, way => way.base())
    }

    /// Whether blockd is there.
    pub(super) fn is_up(&self) -> bool {
        match self {
            Way::Arena(engine) => engine.link.is_up(),
            Way::Direct(direct) => direct.is_up(),
        }
    }

    /// Why it is not.
    pub(super) fn problem(&self) -> Option<&Error> {
        match self {
            Way::Arena(engine) => engine.link.problem(),
            Way::Direct(direct) => direct.problem(),
        }
    }

    /// What to sleep on, if connected; else, until when.
    pub(super) fn sleep_on(&self) -> (Option<Arc<Sources>>, Option<Instant>) {
        match self {
            Way::Arena(engine) => engine.link.sleep_on(),
            Way::Direct(direct) => direct.sleep_on(),
        }
    }

    /// What blockd rings.
    pub(super) fn bell(&self) -> Arc<EventFd> {
        match self {
            Way::Arena(engine) => engine.link.queue.calls(),
            Way::Direct(direct) => direct.bell(),
        }
    }
}
