//! Disks that blockd serves in the memory of a machine, and the end of that.
//!
//! What is forked or snapshotted has its memory copied on write, which blockd could not see. So
//! before the first cut of a machine, and before anything is made for it, such disks change to an
//! arena while the machine runs. It is the process that changes them, all or none; that it did is
//! told of, written down, and asked for again after a restart of the daemon.

use format::{Error, Result};

use super::Daemon;
use super::state::Description;
use super::table::Machine;
use crate::api::types::{DiskPath, EventKind, VmDisk};
use crate::devices;
use crate::process::wire::Ask;

impl From<DiskPath> for devices::DiskPath {
    fn from(path: DiskPath) -> Self {
        match path {
            DiskPath::Arena => devices::DiskPath::Arena,
            DiskPath::Direct => devices::DiskPath::Direct,
        }
    }
}

fn is_direct(disk: &VmDisk) -> bool {
    disk.path == DiskPath::Direct
}

impl Daemon {
    /// Has the disks of a machine change to arenas, if blockd has its memory. The caller changes
    /// the machine.
    ///
    /// # Errors
    /// What its process says; the disks are then as they were.
    pub(super) fn take_memory_back(&self, machine: &Machine) -> Result<()> {
        if !machine.disks().iter().any(is_direct) {
            return Ok(());
        }
        let changed = machine.living_process()?.ask::<Vec<String>>(&Ask::TakeMemoryBack);
        let changed = changed.map_err(|e: Error| {
            e.hint("it goes on as before, with disks that blockd serves in its memory")
        })?;
        machine.note_memory_is_back();
        let detail = format!("from direct to arena: disks {}", changed.join(", "));
        self.events.add(EventKind::PathChanged, machine.object(), detail);
        // For a daemon that finds the machine when it has ended; one that runs is asked.
        self.state.describe(&Description { disks: machine.disks(), ..machine.is.clone() }, true)
    }

    /// Finds out, for a machine that was found again, whether blockd still has its memory.
    pub(super) fn ask_for_paths(&self, machine: &Machine) {
        if !machine.is.disks.iter().any(is_direct) {
            return;
        }
        match machine.living_process().and_then(|process| process.ask(&Ask::LendsMemory)) {
            Ok(true) => {}
            Ok(false) => machine.note_memory_is_back(),
            Err(e) => self.events.add(EventKind::Failed, machine.object(), e.to_string()),
        }
    }
}
