//! Model-specific registers: which ones are state, how they are read and set.
//!
//! KVM reads and sets a list up to the first register that it refuses. Both loops here go on past
//! a refusal. A register that is refused on the way in was not in the state; one that is refused
//! on the way out must be on the list of those a guest does not miss, or have the saved value
//! already.

use format::{Error, Kind, Result};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::failed;

/// The time stamp counter.
const TSC: u32 = 0x10;
/// The deadline of the local timer.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// Registers that are counters or mailboxes of the host's KVM: nothing a guest would miss.
fn not_missed(index: u32) -> bool {
    // The count of system management interrupts; the interface of another hypervisor, which our
    // guests are not offered; feature control and prediction commands, which take no reading back.
    matches!(index, 0x34 | 0x3a | 0x49 | 0x4000_0000..=0x4000_01ff)
}

/// What of KVM's list is worth keeping.
pub(super) fn worth_keeping(list: &[u32]) -> Vec<u32> {
    list.iter().copied().filter(|index| !matches!(index, 0x4000_0000..=0x4000_01ff)).collect()
}

fn list_of(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| Error::corrupt("too many model-specific registers"))
}

/// Reads the registers `wanted`; those that KVM refuses are left out.
pub(super) fn read(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let entries: Vec<kvm_msr_entry> =
        wanted.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut got = Vec::with_capacity(entries.len());
    let mut left = &entries[..];
    while !left.is_empty() {
        let mut msrs = list_of(left)?;
        let n = vcpu.get_msrs(&mut msrs).map_err(|e| failed("read the registers of", e))?;
        got.extend_from_slice(&msrs.as_slice()[..n]);
        left = left.get(n + 1..).unwrap_or(&[]);
    }
    Ok(got)
}

/// Sets registers. Returns how many KVM refused and nobody misses.
///
/// # Errors
/// `Unsupported` when KVM refuses one that matters, naming it.
pub(super) fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<usize> {
    let mut refused = 0;
    let mut left = entries;
    while !left.is_empty() {
        let n = vcpu.set_msrs(&list_of(left)?).map_err(|e| failed("set the registers of", e))?;
        if let Some(entry) = left.get(n) {
            refused += 1;
            if !not_missed(entry.index) && !has(vcpu, entry)? {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("its KVM refuses register {:#x} = {:#x}", entry.index, entry.data),
                )
                .tried("restore on")
                .on("this host"));
            }
        }
        left = left.get(n + 1..).unwrap_or(&[]);
    }
    Ok(refused)
}

/// Takes the time stamp counter out of step with the one that the processor was made with: sets it
/// far from the value in `entries`, and so from any that it has. To be called for the first
/// processor of a machine, before its registers are set.
///
/// KVM takes a counter that is set to within a second of where the last one would be by now for an
/// attempt to have processors in step, and sets it there instead. That is right for the other
/// processors of a machine, and wrong for the first one of a child, whose shell may be just that
/// much younger than its parent: its time would go back. (Kernels from 6.7 on know the difference.)
pub(super) fn part_time(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<()> {
    let Some(tsc) = entries.iter().find(|entry| entry.index == TSC) else { return Ok(()) };
    let far = kvm_msr_entry { data: tsc.data.wrapping_add(1 << 62), ..*tsc };
    // One that refuses it has no say in the guest's time at all.
    vcpu.set_msrs(&list_of(&[far])?).map(drop).map_err(|e| failed("set the time of", e))
}

fn has(vcpu: &VcpuFd, entry: &kvm_msr_entry) -> Result<bool> {
    Ok(read(vcpu, &[entry.index])?.first().is_some_and(|here| here.data == entry.data))
}
