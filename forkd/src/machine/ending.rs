//! How a machine ends: once, with a name.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::kvm::vcpu::Cpu;
use crate::wires::PowerSwitch;

/// Why a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The guest turned it off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest faulted while it handled a fault while it handled a fault.
    TripleFault,
    /// KVM could not go on with the guest.
    InternalError,
    /// The machine itself failed.
    Failed,
}

impl Reason {
    /// The stable name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Reason::PowerOff => "power-off",
            Reason::Reset => "reset",
            Reason::TripleFault => "triple-fault",
            Reason::InternalError => "internal-error",
            Reason::Failed => "failed",
        }
    }
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Why.
    pub reason: Reason,
    /// What else there is to say: for faults the registers of the processor. May be empty.
    pub detail: String,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason.name())?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

/// Where the end is noted. The first one counts.
#[derive(Debug, Default)]
pub struct Ending {
    exit: Mutex<Option<Exit>>,
    ended: Condvar,
    cpus: Mutex<Vec<Weak<Cpu>>>,
}

impl Ending {
    /// Says whom to stop at the end.
    pub(crate) fn watch(&self, cpus: &[Arc<Cpu>]) {
        *self.cpus.lock() = cpus.iter().map(Arc::downgrade).collect();
    }

    /// Ends the machine: every processor is asked to park, and whoever waits is woken.
    pub fn end(&self, reason: Reason, detail: impl Into<String>) {
        {
            let mut exit = self.exit.lock();
            if exit.is_some() {
                return;
            }
            *exit = Some(Exit { reason, detail: detail.into() });
        }
        for cpu in self.cpus.lock().iter().filter_map(Weak::upgrade) {
            cpu.ask_to_park();
        }
        self.ended.notify_all();
    }

    /// How it ended, if it did.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.exit.lock().clone()
    }

    /// Waits for the end.
    #[must_use]
    pub fn wait(&self) -> Exit {
        let mut exit = self.exit.lock();
        loop {
            if let Some(exit) = &*exit {
                return exit.clone();
            }
            self.ended.wait(&mut exit);
        }
    }

    /// Waits for the end, but not longer than `time`.
    #[must_use]
    pub fn wait_for(&self, time: Duration) -> Option<Exit> {
        let mut exit = self.exit.lock();
        self.ended.wait_while_for(&mut exit, |exit| exit.is_none(), time);
        exit.clone()
    }
}

impl PowerSwitch for Ending {
    fn power_off(&self) {
        self.end(Reason::PowerOff, "");
    }

    fn reset(&self) {
        self.end(Reason::Reset, "");
    }
}
