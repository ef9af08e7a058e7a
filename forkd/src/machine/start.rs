//! Where processors of a machine that boots start.

use format::Result;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_sregs};

use crate::kvm::failed;
use crate::kvm::vcpu::Cpu;

/// Where a processor starts.
#[derive(Debug, Clone, Copy)]
pub struct CpuStart {
    /// General registers.
    pub regs: kvm_regs,
    /// Special registers, as after a reset unless changed.
    pub sregs: kvm_sregs,
    /// Whether it runs at once; others wait for the first one to start them. The first always runs.
    pub runnable: bool,
}

/// Where a processor of a fresh machine stands.
pub(super) fn start_of(cpu: &Cpu) -> Result<CpuStart> {
    let fd = cpu.fd();
    let regs = fd.get_regs().map_err(|e| failed("look at a processor of", e))?;
    let sregs = fd.get_sregs().map_err(|e| failed("look at a processor of", e))?;
    Ok(CpuStart { regs, sregs, runnable: cpu.index() == 0 })
}

/// Puts a processor there.
pub(super) fn place(cpu: &Cpu, start: &CpuStart) -> Result<()> {
    let fd = cpu.fd();
    fd.set_sregs(&start.sregs).map_err(|e| failed("place a processor of", e))?;
    fd.set_regs(&start.regs).map_err(|e| failed("place a processor of", e))?;
    if start.runnable {
        let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        fd.set_mp_state(runnable).map_err(|e| failed("start a processor of", e))?;
    }
    Ok(())
}
