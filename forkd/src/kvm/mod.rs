//! Virtual machines of the host's KVM: creation, processors, and their state as bytes.
//!
//! Relied on: the in-kernel interrupt controllers (I/O and local) and no interval timer. Memory
//! slots are registered before the interrupt controllers exist: afterwards KVM waits for a grace
//! period, 7 ms on the machine this was measured on instead of 0.1 ms.
//!
//! Nothing here assumes a vendor of processors; what differs between them is in [`cpuid`].

pub mod blob;
pub mod cpuid;
pub mod msr;
pub mod state;
pub mod vcpu;
pub mod vm;

/// The registers of processors, as KVM lays them out: what a [`crate::machine::Loader`] sets.
pub mod bindings {
    pub use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
}

use std::sync::OnceLock;

use format::{Error, Kind, Result};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

/// What must be there, and what for.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "interrupt controllers in the kernel"),
    (Cap::UserMemory, "memory of the process as guest memory"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::Irqfd, "interrupts by event descriptors"),
    (Cap::Ioeventfd, "doorbells by event descriptors"),
    (Cap::VcpuEvents, "pending events of processors"),
    (Cap::Xsave, "extended processor state"),
    (Cap::AdjustClock, "a guest clock that can be set"),
];

/// The host's KVM, opened once for the process.
pub struct Host {
    pub(crate) kvm: Kvm,
    /// What a guest's processors can do, before the parts that differ per processor.
    pub(crate) cpuid: CpuId,
    /// Model-specific registers that belong to a guest's state.
    pub(crate) msrs: Vec<u32>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Host {{ {} msrs }}", self.msrs.len())
    }
}

impl Host {
    /// Opens `/dev/kvm` and looks at what it can do.
    ///
    /// # Errors
    /// `Unsupported` when there is no KVM here or it lacks something that is needed.
    pub fn open() -> Result<Host> {
        let kvm = Kvm::new().map_err(|e| {
            let e = std::io::Error::from(e);
            Error::new(Kind::Unsupported, "this host gives no virtual machines")
                .caused_by(e)
                .tried("open")
                .on("/dev/kvm")
                .hint("load the kvm module of this processor, and give this user access to it")
        })?;
        for (cap, what) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(Error::new(Kind::Unsupported, format!("its KVM lacks {what}"))
                    .tried("use")
                    .on("this kernel"));
            }
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let cpuid = cpuid.map_err(|e| failed("ask for the features of", e))?;
        let list = kvm.get_msr_index_list().map_err(|e| failed("ask for the registers of", e))?;
        let msrs = msr::worth_keeping(list.as_slice());
        Ok(Host { cpuid: cpuid::for_guests(&cpuid)?, kvm, msrs })
    }

    /// The host of this process.
    ///
    /// # Errors
    /// As [`Host::open`]; a failure is not remembered.
    pub fn get() -> Result<&'static Host> {
        static HOST: OnceLock<Host> = OnceLock::new();
        if let Some(host) = HOST.get() {
            return Ok(host);
        }
        let host = Host::open()?;
        Ok(HOST.get_or_init(|| host))
    }
}

/// A failed call to KVM.
pub(crate) fn failed(tried: &'static str, e: kvm_ioctls::Error) -> Error {
    Error::from(std::io::Error::from(e)).tried(tried).on("the virtual machine")
}
