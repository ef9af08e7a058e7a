//! The VM generation id: 16 bytes in guest memory that are different in every child.
//!
//! The guest finds their address in the ACPI tables (device `VMGENCTR`). The bytes are written
//! while no vCPU runs; the notification is raised when the machine goes on, so that it is pending
//! before the first instruction. It is raised after the interrupt controllers have their state,
//! which would overwrite it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use format::Result;

use super::layout::GENERATION_ID;
use crate::memory::GuestRam;
use crate::wires::Interrupt;

pub(super) struct GenerationId {
    ram: Arc<GuestRam>,
    interrupt: Arc<dyn Interrupt>,
    changed: AtomicBool,
}

impl GenerationId {
    pub(super) fn new(ram: Arc<GuestRam>, interrupt: Arc<dyn Interrupt>) -> GenerationId {
        GenerationId { ram, interrupt, changed: AtomicBool::new(false) }
    }

    /// Puts an id in place. With `notify` the guest is told when the machine goes on.
    pub(super) fn set(&self, id: &[u8; 16], notify: bool) -> Result<()> {
        self.ram.write(GENERATION_ID, id)?;
        // The machine stands; whoever lets it go on is ordered after us by its own locks.
        self.changed.store(notify, Ordering::Relaxed);
        Ok(())
    }

    /// Tells the guest about a new id. Fails closed: without the notification a child would go on
    /// with its parent's random numbers.
    pub(super) fn announce(&self) -> Result<()> {
        if self.changed.swap(false, Ordering::Relaxed) {
            self.interrupt.raise()?; // as in `set`
        }
        Ok(())
    }
}
