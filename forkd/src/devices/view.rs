//! Guest memory as rings see it.
//!
//! The address space of guest RAM never moves (see `crate::memory::ram`), so the table is made once
//! and holds for every ring of the machine, whatever is mapped there. A driver gives addresses of
//! rings in guest-physical space; the table has the same number for both of its address spaces.

use std::sync::Arc;

use format::Result;
use vhost_blk::dirty_log::WriteLog;
use vhost_blk::memory::{GuestAddr, Memory, Region, RegionSpec, UserAddr};
use vhost_blk::queue::LogTarget;

use crate::memory::{Gpa, GuestRam};

/// One guest's memory.
#[derive(Debug)]
pub(super) struct GuestView {
    memory: Arc<Memory>,
    log: Arc<dyn WriteLog>,
}

impl GuestView {
    pub(super) fn new(ram: &Arc<GuestRam>) -> Result<GuestView> {
        let mut regions = Vec::new();
        for bank in ram.banks() {
            let data = ram.host(bank.start, bank.len)?;
            let (guest, user) = (GuestAddr(bank.start.0), UserAddr(bank.start.0));
            let spec = RegionSpec { guest, user, size: bank.len, offset: 0 };
            // SAFETY: `GuestRam` keeps its address space mapped while it lives, hands out no
            // reference to its bytes, and lies in the region until that is dropped.
            regions.push(Arc::new(unsafe { Region::over(spec, data, ram.clone()) }?));
        }
        let memory = Arc::new(Memory::new(regions)?);
        Ok(GuestView { memory, log: Arc::new(DeviceWrites(ram.clone())) })
    }

    pub(super) fn memory(&self) -> Arc<Memory> {
        self.memory.clone()
    }

    /// Where a ring whose used part is at `used` notes what it writes.
    pub(super) fn log(&self, used: u64) -> LogTarget {
        LogTarget { log: Some(self.log.clone()), ring: Some(used) }
    }
}

/// KVM does not see what devices write; the device log of guest memory does.
#[derive(Debug)]
struct DeviceWrites(Arc<GuestRam>);

impl WriteLog for DeviceWrites {
    fn mark(&self, addr: u64, len: u64) {
        self.0.mark_dirty(Gpa(addr), len);
    }
}
