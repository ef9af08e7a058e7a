//! What joins processors, memory and devices, so that none of them needs to know the others.

use std::sync::Arc;

use format::Result;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vhost_blk::event::EventFd;

use crate::memory::{Gpa, GuestRam};

/// An edge-triggered interrupt of a guest.
pub trait Interrupt: Send + Sync {
    /// Raises it once. KVM delivers it from a worker of its own, soon: what is raised right before
    /// a machine is cut may not be in the image, so devices raise theirs again in
    /// [`Devices::resume`].
    ///
    /// # Errors
    /// The host's error; the guest may then have missed the interrupt.
    fn raise(&self) -> Result<()>;

    /// The same line for somebody else, who raises it by ringing.
    ///
    /// # Errors
    /// The host's error when no descriptor is free.
    fn bell(&self) -> Result<EventFd>;
}

/// How a device asks for the end of its machine.
pub trait PowerSwitch: Send + Sync {
    /// The guest turned the machine off.
    fn power_off(&self);
    /// The guest asked for a reset.
    fn reset(&self);
}

/// What a machine offers to devices while they are made.
pub trait Wires {
    /// The interrupt line `gsi`.
    ///
    /// # Errors
    /// The host's error.
    fn interrupt(&self, gsi: u32) -> Result<Arc<dyn Interrupt>>;

    /// A doorbell: rung when the guest writes 4 bytes at `at`, and only when it writes `value` if
    /// there is one. Such writes never reach the bus.
    ///
    /// # Errors
    /// The host's error.
    fn doorbell(&self, at: Gpa, value: Option<u32>) -> Result<EventFd>;

    /// The power switch.
    fn power(&self) -> Arc<dyn PowerSwitch>;
}

/// Where port and memory-mapped accesses go. Called by processor threads: no allocation, no log,
/// no waiting for anything slower than a lock. What nobody answers reads as all ones.
pub trait IoBus: Send + Sync {
    /// Reads 1, 2 or 4 bytes from a port.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// Writes 1, 2 or 4 bytes to a port.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// Reads 1 to 8 bytes.
    fn mmio_read(&self, at: Gpa, data: &mut [u8]);
    /// Writes 1 to 8 bytes.
    fn mmio_write(&self, at: Gpa, data: &[u8]);
}

/// All devices of one machine.
pub trait Devices: Send + Sync {
    /// Where accesses go.
    fn bus(&self) -> &dyn IoBus;

    /// Stops taking requests from the guest and waits, for a bounded time, for those in flight.
    /// Processors stand still already.
    ///
    /// # Errors
    /// When a request does not come back in time; [`Devices::resume`] is then called.
    fn quiesce(&self) -> Result<()>;

    /// Whether a device lends guest memory to another process.
    fn lends_memory(&self) -> bool;

    /// Has every device that lent guest memory to another process take it back, and go on without:
    /// from then on nobody but this process writes there. The machine may run. Gives back the names
    /// of the disks that changed.
    ///
    /// # Errors
    /// When it cannot be had back in time; the devices are then as they were.
    fn take_memory_back(&self) -> Result<Vec<String>>;

    /// The state of the devices while they are quiet, versioned.
    ///
    /// # Errors
    /// When a device cannot say.
    fn save(&self) -> Result<Vec<u8>>;

    /// Takes over a saved state, before the first instruction, as the guest called `identity`.
    ///
    /// # Errors
    /// When the state does not fit these devices.
    fn restore(&self, state: &[u8], identity: &Identity) -> Result<()>;

    /// Goes on: raises each queue's interrupt again and looks at each queue again, so that nothing
    /// is lost that happened around the stop.
    ///
    /// # Errors
    /// The host's error.
    fn resume(&self) -> Result<()>;

    /// Presses the power button: a guest that listens turns itself off.
    ///
    /// # Errors
    /// The host's error.
    fn press_power_button(&self) -> Result<()>;
}

/// Makes the devices of a machine over its memory.
pub type MakeDevices<'a> =
    &'a mut dyn FnMut(&Arc<GuestRam>, &dyn Wires) -> Result<Arc<dyn Devices>>;

/// The part of a fork that happens on disks.
pub trait DiskCut {
    /// Asks for the cut; called when no request is in flight. Does not wait for the answer.
    ///
    /// # Errors
    /// When the request cannot be sent; the fork is then given up.
    fn begin(&mut self) -> Result<()>;

    /// Waits for the answer; called while the machine still stands.
    ///
    /// # Errors
    /// When the disks were not cut; the fork is then given up.
    fn finish(&mut self) -> Result<()>;
}

/// For a machine without disks.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoDisks;

impl DiskCut for NoDisks {
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// What makes a child another machine than its parent. In place before its first instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name of the machine.
    pub name: String,
    /// Id of the machine.
    pub id: Uuid,
    /// What the guest sees as VM generation id.
    pub generation_id: [u8; 16],
    /// Fresh random bytes for the guest's generator.
    pub seed: [u8; 32],
    /// Address of the network device.
    pub mac: [u8; 6],
}
