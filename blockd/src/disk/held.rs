//! A disk that lets nobody in for a while: between the instant of a fork and the word of who asked
//! for it, who takes something else at the same instant (a machine's memory, say).
//!
//! Invariant: whoever holds a disk this way keeps everybody else from closing its gate, who would
//! open it again (`daemon/tokens.rs` holds the disk's name).

use std::sync::Arc;

use super::Disk;

/// Requests of the disk wait until this is dropped.
pub struct HeldDisk(Arc<Disk>);

impl HeldDisk {
    /// Holds a disk that nobody has made a request of yet.
    #[must_use]
    pub fn of(disk: &Arc<Disk>) -> Self {
        disk.gate.shut();
        HeldDisk(Arc::clone(disk))
    }
}

impl Drop for HeldDisk {
    fn drop(&mut self) {
        self.0.gate.open();
    }
}
