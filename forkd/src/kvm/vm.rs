//! One virtual machine of KVM: memory slots, interrupt controllers, event descriptors.
//!
//! Invariant: slots cover the reservation of [`GuestRam`] and never change. What is mapped there
//! does: KVM follows the host's page tables.

use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use format::Result;
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_MEM_LOG_DIRTY_PAGES, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use vhost_blk::event::EventFd;

use super::{Host, cpuid, failed, tsc};
use crate::memory::dirty::PageSet;
use crate::memory::ram::Bank;
use crate::memory::{Gpa, GuestRam, PAGE, index};
use crate::wires::Interrupt;

/// Three pages that Intel's virtualisation needs somewhere outside RAM, and the table after them.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// A virtual machine.
pub struct Vm {
    pub(super) fd: VmFd,
    ram: Arc<GuestRam>,
    banks: Vec<Bank>,
    /// What its processors said about themselves where they were saved, if that is not what this
    /// host says.
    pub(super) told: OnceLock<CpuId>,
    /// Frequency of its processors' counters in kHz, 0 while nobody knows. Kept, so that it need
    /// not be asked for while the machine is stopped.
    tsc_khz: AtomicU32,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vm over {} bytes", self.ram.size())
    }
}

impl Vm {
    /// A virtual machine over `ram`, without processors.
    ///
    /// # Errors
    /// The host's error.
    pub fn new(host: &Host, ram: &Arc<GuestRam>) -> Result<Vm> {
        let fd = host.kvm.create_vm().map_err(|e| failed("create", e))?;
        let vm = Vm {
            fd,
            ram: Arc::clone(ram),
            banks: ram.banks().collect(),
            told: OnceLock::new(),
            tsc_khz: AtomicU32::new(0),
        };
        vm.set_slots(0)?;
        if vm.fd.check_extension(Cap::SetTssAddr) {
            vm.fd.set_tss_address(TSS_ADDRESS).map_err(|e| failed("place the TSS of", e))?;
        }
        if vm.fd.check_extension(Cap::SetIdentityMapAddr) {
            let set = vm.fd.set_identity_map_address(IDENTITY_MAP);
            set.map_err(|e| failed("place the identity map of", e))?;
        }
        vm.fd.create_irq_chip().map_err(|e| failed("make the interrupt controllers of", e))?;
        Ok(vm)
    }

    fn set_slots(&self, flags: u32) -> Result<()> {
        for (slot, bank) in (0..).zip(&self.banks) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: bank.start.0,
                memory_size: bank.len,
                userspace_addr: self.ram.at_offset(bank.offset).as_ptr() as u64,
            };
            // SAFETY: the range is the reservation of `ram`, which this value keeps alive.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(|e| failed("give memory to", e))?;
        }
        Ok(())
    }

    /// Processor `number` of `count`, with its features set.
    ///
    /// # Errors
    /// The host's error.
    pub fn processor(&self, host: &Host, number: u8, count: u8) -> Result<VcpuFd> {
        let fd = self.fd.create_vcpu(number.into()).map_err(|e| failed("add a processor to", e))?;
        let table = cpuid::for_processor(&host.cpuid, number, count)?;
        fd.set_cpuid2(&table).map_err(|e| failed("set the processor features of", e))?;
        if number == 0 {
            self.note_tsc_khz(tsc::of(&fd).unwrap_or(0));
        }
        Ok(fd)
    }

    /// The frequency of its processors' counters in kHz, if it is known.
    pub(super) fn tsc_khz(&self) -> Option<u32> {
        // Relaxed: a number alone, set by whoever makes the machine.
        Some(self.tsc_khz.load(Ordering::Relaxed)).filter(|khz| *khz != 0)
    }

    pub(super) fn note_tsc_khz(&self, khz: u32) {
        self.tsc_khz.store(khz, Ordering::Relaxed);
    }

    /// Interrupt line `gsi`.
    ///
    /// # Errors
    /// The host's error.
    pub fn interrupt(&self, gsi: u32) -> Result<Arc<dyn Interrupt>> {
        let line = EventFd::new()?;
        let theirs = as_theirs(&line)?;
        self.fd.register_irqfd(&theirs, gsi).map_err(|e| failed("wire an interrupt of", e))?;
        Ok(Arc::new(Line(line)))
    }

    /// Whether the guest lets interrupt line `gsi` through: a program in it waits for that.
    ///
    /// # Errors
    /// The host's error.
    pub fn is_heard(&self, gsi: u32) -> Result<bool> {
        /// The bit of an entry that keeps the line from being heard.
        const MASKED: u64 = 1 << 16;
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        self.fd.get_irqchip(&mut chip).map_err(|e| failed("look at the interrupts of", e))?;
        // SAFETY: for this chip this member of the union is the valid one, and any bits are one.
        let lines = unsafe { chip.chip.ioapic }.redirtbl;
        // SAFETY: both members of the entry are plain bits.
        let entry = lines.get(index(gsi.into())).map(|line| unsafe { line.bits });
        Ok(entry.is_some_and(|entry| entry & MASKED == 0))
    }

    /// A doorbell at `at`: see [`crate::wires::Wires::doorbell`].
    ///
    /// # Errors
    /// The host's error.
    pub fn doorbell(&self, at: Gpa, value: Option<u32>) -> Result<EventFd> {
        let bell = EventFd::new()?;
        let theirs = as_theirs(&bell)?;
        let at = IoEventAddress::Mmio(at.0);
        let wired = match value {
            Some(value) => self.fd.register_ioevent(&theirs, &at, value),
            None => self.fd.register_ioevent(&theirs, &at, NoDatamatch),
        };
        wired.map_err(|e| failed("wire a doorbell of", e))?;
        Ok(bell)
    }

    /// Turns KVM's log of written pages on or off. Turning it on makes every page clean.
    ///
    /// # Errors
    /// The host's error.
    pub fn log_dirty(&self, on: bool) -> Result<()> {
        self.set_slots(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    /// Adds the pages that processors wrote since the last call to `into`, by offset in RAM.
    ///
    /// # Errors
    /// The host's error.
    pub fn take_dirty(&self, into: &mut PageSet) -> Result<()> {
        for (slot, bank) in (0..).zip(&self.banks) {
            let words = self.fd.get_dirty_log(slot, index(bank.len));
            let words = words.map_err(|e| failed("read the log of written pages of", e))?;
            into.insert_words(bank.offset / PAGE, &words);
        }
        Ok(())
    }
}

/// A second handle on an eventfd, of the type that KVM's crate wants. KVM keeps the event itself,
/// so the handle may go after the registration.
fn as_theirs(own: &EventFd) -> Result<vmm_sys_util::eventfd::EventFd> {
    let fd = own.as_fd().try_clone_to_owned()?;
    // SAFETY: the descriptor was just made and is given away.
    Ok(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(fd.into_raw_fd()) })
}

struct Line(EventFd);

impl Interrupt for Line {
    fn raise(&self) -> Result<()> {
        self.0.signal();
        Ok(())
    }

    fn bell(&self) -> Result<EventFd> {
        self.0.try_clone()
    }
}
