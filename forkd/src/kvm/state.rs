//! The state of processors, interrupt controllers and clock: saved, and put into a fresh machine.
//!
//! The order matters, because KVM's setters change more than what they set:
//!
//! Save, per processor: MP state first (reading it delivers pending events of the local controller
//! and so changes the rest); registers before the local controller, because a deadline timer may
//! fire between the two. Saved so, the timer is in the state as a deadline, as an interrupt, or as
//! both (one interrupt too many, which a guest shrugs off); the other way round it could be in
//! neither, and the guest would sleep for ever. Events last.
//!
//! Restore, per processor: MP state, special registers before the local controller (its base
//! address), that before the model-specific registers (a deadline sticks only in a configured
//! controller; the time stamp counter of the first processor goes far away before, or KVM may leave
//! it where it was), general registers when the mode they belong to is in place, and before events
//! (setting them drops a pending exception), events last. Then the I/O controllers (they may
//! deliver into the local ones at once), then the clock, which needs the processors.
//!
//! Not saved: nested virtual machines and system management mode, which guests are not offered;
//! state that needs a permission we never ask for (tile registers), so 4096 bytes of extended
//! state are enough.

use std::sync::Arc;

use format::{Error, Result};
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip, kvm_msr_entry,
};
use kvm_ioctls::{Cap, VcpuFd};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::blob::{Reader, Writer};
use super::vcpu::Cpu;
use super::vm::Vm;
use super::{Host, cpuid, failed, msr, tsc};
use crate::memory::wide;

/// Tags of the sections.
pub mod tag {
    /// Size of memory and number of processors.
    pub const SHAPE: [u8; 4] = *b"SHAP";
    /// What processors say about themselves, before the parts that differ per processor.
    pub const CPUID: [u8; 4] = *b"CPID";
    /// Frequency of the time stamp counter in kHz. States of before there was this lack it.
    pub const TSC_KHZ: [u8; 4] = *b"TSCK";
    /// MP state of a processor.
    pub const MP: [u8; 4] = *b"MPST";
    /// General registers.
    pub const REGS: [u8; 4] = *b"REGS";
    /// Special registers.
    pub const SREGS: [u8; 4] = *b"SREG";
    /// Extended state.
    pub const XSAVE: [u8; 4] = *b"XSAV";
    /// Extended control registers.
    pub const XCRS: [u8; 4] = *b"XCRS";
    /// Debug registers.
    pub const DEBUG: [u8; 4] = *b"DREG";
    /// Model-specific registers.
    pub const MSRS: [u8; 4] = *b"MSRS";
    /// Local interrupt controller.
    pub const LAPIC: [u8; 4] = *b"LAPC";
    /// Pending events.
    pub const EVENTS: [u8; 4] = *b"EVNT";
    /// I/O interrupt controllers: two old ones, then the new one.
    pub const IRQCHIP: [u8; 4] = *b"IRQC";
    /// The clock.
    pub const CLOCK: [u8; 4] = *b"CLCK";
    /// All devices.
    pub const DEVICES: [u8; 4] = *b"DEVS";
}

const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Size of memory and number of processors, as saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Shape {
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Number of processors.
    pub vcpus: u64,
}

/// Saves everything that KVM holds of a machine whose processors are parked.
///
/// # Errors
/// The host's error.
pub fn save(host: &Host, vm: &Vm, cpus: &[Arc<Cpu>], out: &mut Writer) -> Result<()> {
    // What the guest was told, which may be less than this host has.
    let table = vm.told.get().unwrap_or(&host.cpuid);
    out.section(tag::CPUID, 0, table.as_slice().as_bytes());
    if let Some(khz) = vm.tsc_khz() {
        out.section(tag::TSC_KHZ, 0, khz.as_bytes());
    }
    for cpu in cpus {
        save_processor(host, &cpu.fd(), cpu.index().into(), out)?;
    }
    for (number, chip_id) in (0..).zip(IRQCHIPS) {
        let mut chip = kvm_irqchip::new_zeroed();
        chip.chip_id = chip_id;
        vm.fd.get_irqchip(&mut chip).map_err(|e| failed("save an interrupt controller of", e))?;
        out.section(tag::IRQCHIP, number, chip.as_bytes());
    }
    let clock = vm.fd.get_clock().map_err(|e| failed("save the clock of", e))?;
    out.section(tag::CLOCK, 0, clock.as_bytes());
    Ok(())
}

fn save_processor(host: &Host, fd: &VcpuFd, number: u32, out: &mut Writer) -> Result<()> {
    let save = |e| failed("save a processor of", e);
    out.section(tag::MP, number, fd.get_mp_state().map_err(save)?.as_bytes());
    out.section(tag::REGS, number, fd.get_regs().map_err(save)?.as_bytes());
    out.section(tag::SREGS, number, fd.get_sregs().map_err(save)?.as_bytes());
    out.section(tag::XSAVE, number, fd.get_xsave().map_err(save)?.as_bytes());
    out.section(tag::XCRS, number, fd.get_xcrs().map_err(save)?.as_bytes());
    out.section(tag::DEBUG, number, fd.get_debug_regs().map_err(save)?.as_bytes());
    out.section(tag::MSRS, number, msr::read(fd, &host.msrs)?.as_bytes());
    out.section(tag::LAPIC, number, fd.get_lapic().map_err(save)?.as_bytes());
    out.section(tag::EVENTS, number, fd.get_vcpu_events().map_err(save)?.as_bytes());
    Ok(())
}

/// What came of a restore.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restored {
    /// Model-specific registers that KVM refused and nobody misses.
    pub msrs_refused: usize,
}

/// Puts a saved state into a machine whose processors never ran. Its memory is mapped already.
///
/// # Errors
/// `Unsupported` when this host cannot go on with it, before anything was changed; `Corrupt` when
/// a part is missing or of a wrong size; the host's error.
pub fn restore(host: &Host, vm: &Vm, cpus: &[Arc<Cpu>], state: &Reader<'_>) -> Result<Restored> {
    let rows: Vec<kvm_cpuid_entry2> = many(state, tag::CPUID, 0)?;
    let own = host.cpuid.as_slice();
    let differs = rows.as_bytes() != own.as_bytes();
    if differs {
        cpuid::check_fit(&rows, own)?;
        // Nobody restores into a machine twice.
        let _ = vm.told.set(cpuid::from_entries(&rows)?);
    }
    let khz = tsc::to_be_set(vm, state)?;
    let mut done = Restored::default();
    for cpu in cpus {
        let fd = cpu.fd();
        if let Some(khz) = khz {
            tsc::set(&fd, khz)?;
        }
        if differs {
            let count = u8::try_from(cpus.len()).unwrap_or(u8::MAX);
            let table = cpuid::from_entries(&rows)?;
            let table = cpuid::for_processor(&table, cpu.index(), count)?;
            fd.set_cpuid2(&table).map_err(|e| failed("set the processor features of", e))?;
        }
        done.msrs_refused += restore_processor(&fd, cpu.index().into(), state)?;
    }
    for number in 0..3 {
        let chip: kvm_irqchip = one(state, tag::IRQCHIP, number)?;
        vm.fd.set_irqchip(&chip).map_err(|e| failed("restore an interrupt controller of", e))?;
    }
    if let Some(khz) = khz {
        vm.note_tsc_khz(khz);
    }
    restore_clock(vm, one(state, tag::CLOCK, 0)?)?;
    for cpu in cpus {
        // Tells the guest that it stood still, so that its watchdogs do not bite. A guest that
        // does not use KVM's clock cannot be told, which is no error.
        let _ = cpu.fd().kvmclock_ctrl();
    }
    Ok(done)
}

/// With the time of day in the state, KVM moves the guest's clock on by what has passed since.
fn restore_clock(vm: &Vm, saved: kvm_clock_data) -> Result<()> {
    let known = u32::try_from(vm.fd.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
    let mut clock = saved;
    clock.flags &= known & KVM_CLOCK_REALTIME;
    vm.fd.set_clock(&clock).map_err(|e| failed("restore the clock of", e))
}

fn restore_processor(fd: &VcpuFd, number: u32, state: &Reader<'_>) -> Result<usize> {
    let set = |e| failed("restore a processor of", e);
    fd.set_mp_state(one(state, tag::MP, number)?).map_err(set)?;
    fd.set_sregs(&one(state, tag::SREGS, number)?).map_err(set)?;
    fd.set_xcrs(&one(state, tag::XCRS, number)?).map_err(set)?;
    // SAFETY: a `kvm_xsave` of 4096 bytes is what KVM reads from guests that have no permission
    // for more; see the file head.
    unsafe { fd.set_xsave(&one(state, tag::XSAVE, number)?) }.map_err(set)?;
    fd.set_debug_regs(&one(state, tag::DEBUG, number)?).map_err(set)?;
    fd.set_lapic(&one(state, tag::LAPIC, number)?).map_err(set)?;
    let msrs: Vec<kvm_msr_entry> = many(state, tag::MSRS, number)?;
    if number == 0 {
        msr::part_time(fd, &msrs)?;
    }
    let refused = msr::write(fd, &deadline_last(msrs))?;
    fd.set_regs(&one(state, tag::REGS, number)?).map_err(set)?;
    fd.set_vcpu_events(&one(state, tag::EVENTS, number)?).map_err(set)?;
    Ok(refused)
}

/// A deadline is a time on the counter, so the counter comes first.
fn deadline_last(mut msrs: Vec<kvm_msr_entry>) -> Vec<kvm_msr_entry> {
    msrs.sort_by_key(|entry| entry.index == msr::TSC_DEADLINE);
    msrs
}

/// A section that is one value.
pub(crate) fn one<T: FromBytes>(state: &Reader<'_>, tag: [u8; 4], number: u32) -> Result<T> {
    T::read_from_bytes(state.section(tag, number)?).map_err(|_| wrong_size(tag))
}

/// A section that is a row of values.
fn many<T: FromBytes>(state: &Reader<'_>, tag: [u8; 4], number: u32) -> Result<Vec<T>> {
    let bytes = state.section(tag, number)?;
    let rows = bytes.chunks(size_of::<T>()).map(T::read_from_bytes).collect::<Result<Vec<T>, _>>();
    rows.map_err(|_| wrong_size(tag))
}

fn wrong_size(tag: [u8; 4]) -> Error {
    let name = String::from_utf8_lossy(&tag).into_owned();
    Error::corrupt(format!("section {name} has a wrong size")).tried("restore").on("saved state")
}

/// The head of every state: what it was saved from.
pub(crate) fn shape_of(vm_bytes: u64, vcpus: usize) -> Shape {
    Shape { memory_bytes: vm_bytes, vcpus: wide(vcpus) }
}
