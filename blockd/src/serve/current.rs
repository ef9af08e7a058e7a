//! The disk of a volume as it is now: a fork lets it go on in another segment, while it is served.
//!
//! Invariant: a disk is replaced only while nobody has a request in work on it, and by one that
//! holds the same. Whoever has an older one is sent away at its gate ([`Disk::has_left`]) before a
//! request has begun there, and makes it again on the present one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use format::{Error, Kind, Result};
use parking_lot::RwLock;

use crate::disk::Disk;

/// The disk of a volume.
///
/// Under a lock, though it hardly ever changes: requests do not come here, who serves them has the
/// disk and looks at [`Current::swaps`]. A pointer that is read without a lock would have each
/// thread of each disk enter a list for it, which all others go through.
pub(super) struct Current {
    disk: RwLock<Option<Arc<Disk>>>,
    /// Counts replacements.
    swaps: AtomicU64,
}

impl Current {
    pub(super) fn new(disk: Arc<Disk>) -> Arc<Self> {
        Arc::new(Current { disk: RwLock::new(Some(disk)), swaps: AtomicU64::new(0) })
    }

    /// The disk as it is now; `None` when it was taken out of service.
    pub(super) fn get(&self) -> Option<Arc<Disk>> {
        self.disk.read().clone()
    }

    /// Takes the disk out of service.
    pub(super) fn take(&self) -> Option<Arc<Disk>> {
        self.disk.write().take()
    }

    /// Puts another disk in its place.
    pub(super) fn replace(&self, next: Arc<Disk>) {
        // The old one ends outside of the lock.
        let _old = self.disk.write().replace(next);
        // Release pairs with the Acquire load in `swaps`: who sees the count gets the new disk.
        self.swaps.fetch_add(1, Ordering::Release);
    }

    /// How often the disk was replaced. One load.
    pub(super) fn swaps(&self) -> u64 {
        self.swaps.load(Ordering::Acquire) // pairs with `replace`
    }

    /// Does something with the disk; again if it was replaced before that began.
    pub(super) fn with(&self, work: &mut dyn FnMut(&Disk) -> Result<()>) -> Result<()> {
        loop {
            let gone = || Error::new(Kind::Failed, "the disk is closed");
            let disk = self.get().ok_or_else(gone)?;
            match work(&disk) {
                Err(_) if disk.has_left() => {}
                outcome => return outcome,
            }
        }
    }
}
