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
mod tsc;
pub mod vcpu;
pub mod vm;

/// The registers of processors, as KVM lays them out: what a [`crate::machine::Loader`] sets.
pub mod bindings {
    pub use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
}

use std::sync::OnceLock;

use format::{Error, Kind, Result};
use kvm_bindings::{
    CpuId, KVM_CAP_ADJUST_CLOCK, KVM_CAP_DEBUGREGS, KVM_CAP_EXT_CPUID, KVM_CAP_GET_TSC_KHZ,
    KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD, KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_IRQCHIP,
    KVM_CAP_IRQFD, KVM_CAP_MP_STATE, KVM_CAP_SYNC_MMU, KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_USER_MEMORY, KVM_CAP_VCPU_EVENTS, KVM_CAP_XCRS, KVM_CAP_XSAVE, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::Kvm;

/// The one version of the interface that there is. With it come the calls that no capability
/// announces: general, special and model-specific registers, and the log of written pages.
const VERSION: i32 = 12;

/// A capability that must be there, its name in the kernel's documentation, and what for.
type Need = (u32, &'static str, &'static str);

const NEEDED: [Need; 16] = [
    (KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP", "interrupt controllers in the kernel"),
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", "memory of the process as guest memory"),
    (KVM_CAP_SYNC_MMU, "KVM_CAP_SYNC_MMU", "guest memory that follows what is mapped"),
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", "immediate exit"),
    (KVM_CAP_IRQFD, "KVM_CAP_IRQFD", "interrupts by event descriptors"),
    (KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD", "doorbells by event descriptors"),
    (KVM_CAP_IOEVENTFD_ANY_LENGTH, "KVM_CAP_IOEVENTFD_ANY_LENGTH", "doorbells of any length"),
    (KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID", "features of processors that can be set"),
    (KVM_CAP_TSC_DEADLINE_TIMER, "KVM_CAP_TSC_DEADLINE_TIMER", "timers with a deadline"),
    (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE", "the state of waiting processors"),
    (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS", "pending events of processors"),
    (KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS", "debug registers"),
    (KVM_CAP_XSAVE, "KVM_CAP_XSAVE", "extended processor state"),
    (KVM_CAP_XCRS, "KVM_CAP_XCRS", "extended control registers"),
    (KVM_CAP_ADJUST_CLOCK, "KVM_CAP_ADJUST_CLOCK", "a guest clock that can be set"),
    (KVM_CAP_GET_TSC_KHZ, "KVM_CAP_GET_TSC_KHZ", "the frequency of the time stamp counter"),
];

/// Whether a KVM of this version, which has what `has` says, can run machines.
///
/// # Errors
/// `Unsupported`, naming what it lacks.
fn check(version: i32, has: impl Fn(u32) -> bool) -> Result<()> {
    let lacks = |what: String| {
        Error::new(Kind::Unsupported, what)
            .tried("use")
            .on("the KVM of this kernel")
            .hint("run a newer kernel, or one whose KVM was built with it")
    };
    if version != VERSION {
        return Err(lacks(format!("its interface has version {version}, not {VERSION}")));
    }
    match NEEDED.iter().find(|(cap, ..)| !has(*cap)) {
        Some((_, name, what)) => Err(lacks(format!("it lacks {what} ({name})"))),
        None => Ok(()),
    }
}

/// Why `/dev/kvm` cannot be opened, and what to do.
fn closed(e: std::io::Error) -> Error {
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    let hint = match e.kind() {
        NotFound => "load the kvm module of this processor: kvm_intel or kvm_amd",
        PermissionDenied => "give the user that forkd runs as access to it, as by the group kvm",
        _ => "see what the kernel's log says of kvm",
    };
    Error::new(Kind::Unsupported, "this host gives no virtual machines")
        .caused_by(e)
        .tried("open")
        .on("/dev/kvm")
        .hint(hint)
}

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
        let kvm = Kvm::new().map_err(|e| closed(e.into()))?;
        check(kvm.get_api_version(), |cap| kvm.check_extension_raw(cap.into()) > 0)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_capability_that_is_missing_is_named() {
        check(VERSION, |_| true).unwrap();
        for (missing, name, what) in NEEDED {
            let e = check(VERSION, |cap| cap != missing).unwrap_err();
            assert_eq!(e.kind(), Kind::Unsupported);
            assert!(e.to_string().contains(&format!("it lacks {what} ({name})")), "{e}");
            assert!(e.next_step().is_some_and(|next| next.contains("kernel")), "{e}");
        }
        let e = check(11, |_| true).unwrap_err();
        assert!(e.to_string().contains("version 11, not 12"), "{e}");
    }

    #[test]
    fn a_device_that_cannot_be_opened_is_told_with_what_to_do() {
        for (errno, says) in [(libc::ENOENT, "module"), (libc::EACCES, "group kvm")] {
            let e = closed(std::io::Error::from_raw_os_error(errno));
            assert_eq!((e.kind(), e.object()), (Kind::Unsupported, Some("/dev/kvm")));
            assert!(e.next_step().is_some_and(|next| next.contains(says)), "{e}");
        }
    }
}
