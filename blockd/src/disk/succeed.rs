//! A disk goes on in its successor before it is frozen: the instant of a fork costs no I/O.
//!
//! The successor is open beforehand, over nothing ([`Disk::float`]). At the instant, when nobody
//! has a request in work, it takes the map of the old disk over by sharing its leaves
//! ([`Disk::take_over`]), and requests go on there. Then the old disk is frozen, which makes
//! durable what completed before the instant, and the successor is put on the frozen map
//! ([`Disk::settle_on`]).
//!
//! Order, and the crash it defends against: no flush of the successor completes, and no checkpoint
//! of it is made, before the fork is settled in the catalogue — else a power cut in between loses
//! what a flush covered, or whoever settles the fork puts the successor on the frozen map once
//! more, over its own. So a successor that is not settled holds nothing that a power cut must keep;
//! what a killed process must keep of it is in its tail, and whoever opens the store freezes the
//! old disk for it (`storedir/cut.rs`).
//!
//! Test: `crash_points` (`cut`), `fork_under_load`.

use std::sync::atomic::{AtomicBool, Ordering};

use format::Result;
use format::superblock::Superblock;
use parking_lot::{Condvar, Mutex};

use super::Disk;

/// Whether a disk stands on what it is to stand on.
#[derive(Debug)]
pub(super) struct Ground {
    settled: AtomicBool,
    waiting: Mutex<()>,
    changed: Condvar,
}

impl Default for Ground {
    fn default() -> Self {
        Ground {
            settled: AtomicBool::new(true),
            waiting: Mutex::default(),
            changed: Condvar::default(),
        }
    }
}

impl Ground {
    /// One load.
    pub(super) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire) // pairs with the store in `set`
    }

    fn set(&self, settled: bool) {
        // Release pairs with the load in `is_settled`: the frozen map is in the checkpoint's state.
        self.settled.store(settled, Ordering::Release);
        self.wake();
    }

    /// Has those that wait look again.
    pub(super) fn wake(&self) {
        // Whoever looked before is waiting by now, and is not missed.
        drop(self.waiting.lock());
        self.changed.notify_all();
    }
}

impl Disk {
    /// Says that what the disk stands on is still to come. Nobody else has it yet.
    pub(crate) fn float(&self) {
        self.ground.set(false);
    }

    /// Shares the map of `old` ahead of [`Disk::take_over`], which then has less to do.
    pub(crate) fn share_ahead(&self, old: &Disk) {
        self.map.share(&old.map);
    }

    /// Shows what `old` shows now; nobody has a request in work on either.
    pub(crate) fn take_over(&self, old: &Disk) {
        self.map.share(&old.map);
        // Release pairs with the Acquire load in `size`.
        self.size.store(old.size(), Ordering::Release);
    }

    /// Stands on `old`, which is frozen, from now on: durably, and under another name if one is
    /// given. Flushes still wait: see [`Disk::settled`].
    ///
    /// # Errors
    /// What the host reports; the disk has failed then.
    pub(crate) fn settle_on(&self, old: &Disk, label: Option<&str>) -> Result<()> {
        let frozen = old.checkpoint.lock();
        let mut state = self.checkpoint.lock();
        let present = state.superblock.clone();
        let sb = Superblock {
            generation: present.generation.next(),
            root: frozen.superblock.root,
            virtual_size: frozen.superblock.virtual_size,
            name: label.map_or_else(|| present.name.clone(), str::to_owned),
            ..present
        };
        self.flip(&mut state, sb)?;
        self.sync()?;
        state.tree = frozen.tree.clone();
        Ok(())
    }

    /// Lets flushes go on: whoever opens the store after a crash will find the disk in the
    /// successor, and will not put that on the frozen map again.
    pub(crate) fn settled(&self) {
        self.ground.set(true);
    }

    /// Waits until the disk is settled.
    ///
    /// # Errors
    /// `Failed` when it never will be.
    pub(super) fn await_ground(&self) -> Result<()> {
        if self.ground.is_settled() {
            return Ok(());
        }
        let mut waiting = self.ground.waiting.lock();
        while !self.ground.is_settled() {
            self.check_alive()?;
            self.ground.changed.wait(&mut waiting);
        }
        Ok(())
    }
}
