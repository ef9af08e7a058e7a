//! What a guest's processors say about themselves.
//!
//! The only place that knows vendors. Tested on AMD; the Intel leaves are set by the rules of the
//! manual but could not be run.

use std::cmp::Ordering;

use format::{Error, Kind, Result};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// KVM's own feature leaf.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Features of KVM that tell the guest of pages which the host is still fetching. A fork between
/// "not there yet" and "there now" would leave a task of the child waiting for ever.
const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// Leaf 1 ECX: x2APIC, the deadline timer, the hypervisor bit.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;

/// What the host supports, less what forks do not survive, plus what KVM's interrupt controllers
/// give. Without the numbers of the processor that happened to be asked: a state that was saved
/// twice would differ by them.
pub(super) fn for_guests(host: &CpuId) -> Result<CpuId> {
    let mut entries = host.as_slice().to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR,
            KVM_FEATURES => entry.eax &= !ASYNC_PAGE_FAULTS,
            _ => {}
        }
    }
    for_processor(&from_entries(&entries)?, 0, 1)
}

/// The table for processor `index` of `count`: [`for_guests`] with its own numbers in it.
pub(super) fn for_processor(table: &CpuId, index: u8, count: u8) -> Result<CpuId> {
    let mut entries = table.as_slice().to_vec();
    let (id, count) = (u32::from(index), u32::from(count));
    // Bits of a processor number: the package holds them all, one thread per core.
    let bits = u32::BITS - (count - 1).leading_zeros();
    for entry in &mut entries {
        match entry.function {
            1 => {
                // EBX: initial number, and how many numbers the package has.
                entry.ebx = entry.ebx & 0xffff | id << 24 | (1 << bits) << 16;
                let threads = u32::from(count > 1) << 28;
                entry.edx = entry.edx & !(1 << 28) | threads;
            }
            // Intel: cores of the package, and threads that share a cache (one).
            4 if entry.eax & 0x1f != 0 => {
                let shared_by_all = (entry.eax >> 5 & 7) >= 3;
                let sharing = if shared_by_all { (1 << bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << bits) - 1) << 26;
            }
            0xb | 0x1f => {
                entry.edx = id;
                let (shift, number, kind) = match entry.index {
                    0 => (0, 1, 1),        // threads
                    1 => (bits, count, 2), // cores
                    _ => (0, 0, 0),
                };
                (entry.eax, entry.ebx, entry.ecx) = (shift, number, kind << 8 | entry.index);
            }
            // AMD: processors of the package, and the bits of their numbers.
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (count - 1),
            // AMD: extended number; core id; one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    from_entries(&entries)
}

/// A table from its rows.
pub(super) fn from_entries(entries: &[kvm_cpuid_entry2]) -> Result<CpuId> {
    CpuId::from_entries(entries).map_err(|_| Error::corrupt("a processor has too many features"))
}

/// Whether a guest that was told `saved` can run where `here` is on offer.
///
/// # Errors
/// `Unsupported`, naming the vendor or the first feature that is missing.
pub(super) fn check_fit(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<()> {
    let unfit = |what: String| {
        Error::new(Kind::Unsupported, what)
            .tried("continue")
            .on("the saved processors")
            .hint("restore on a host with the same processor features")
    };
    let find = |table: &[kvm_cpuid_entry2], like: &kvm_cpuid_entry2| {
        let same = |e: &&kvm_cpuid_entry2| e.function == like.function && e.index == like.index;
        table.iter().find(same).copied()
    };
    if let Some(vendor) = saved.iter().find(|e| e.function == 0) {
        let name = |e: &kvm_cpuid_entry2| (e.ebx, e.edx, e.ecx);
        if find(here, vendor).as_ref().map(name) != Some(name(vendor)) {
            return Err(unfit("the processor is of another vendor".into()));
        }
    }
    for was in saved {
        let is = find(here, was).unwrap_or_default();
        for (register, had, has) in features(was, &is) {
            let missing = had & !has;
            if missing != 0 {
                let leaf = (was.function, was.index);
                return Err(unfit(format!(
                    "the processor lacks features: leaf {:#x}.{} {register} bits {missing:#x}",
                    leaf.0, leaf.1
                )));
            }
        }
        // The layout of the extended state must agree, not just be large enough.
        let layout = |e: &kvm_cpuid_entry2| (e.eax, e.ebx);
        if was.function == 0xd && was.index >= 2 && layout(was).cmp(&layout(&is)) != Ordering::Equal
        {
            return Err(unfit("the processor lays out its extended state differently".into()));
        }
    }
    Ok(())
}

/// The registers of a leaf in which each bit is a feature: name, then both values.
fn features(
    was: &kvm_cpuid_entry2,
    is: &kvm_cpuid_entry2,
) -> impl Iterator<Item = (&'static str, u32, u32)> {
    // Which of EAX, EBX, ECX, EDX.
    let which = match (was.function, was.index) {
        (1 | 0x8000_0001, _) => [false, false, true, true],
        (7, 0) => [false, true, true, true],
        (7, _) => [true, true, true, true],
        (0xd, 0) => [true, false, false, true],
        (0xd, 1) | (KVM_FEATURES | 0x8000_0021, _) => [true, false, false, false],
        (0x8000_0008, _) => [false, true, false, false],
        _ => [false; 4],
    };
    let values = [
        ("EAX", was.eax, is.eax),
        ("EBX", was.ebx, is.ebx),
        ("ECX", was.ecx, is.ecx),
        ("EDX", was.edx, is.edx),
    ];
    values.into_iter().zip(which).filter_map(|(value, counts)| counts.then_some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn host_that_offers_more_fits_and_one_that_offers_less_does_not() {
        let saved = [leaf(0, [13, 1, 2, 3]), leaf(1, [9, 0, 0b101, 0b11])];
        let more = [leaf(0, [20, 1, 2, 3]), leaf(1, [8, 7, 0b111, 0b11])];
        check_fit(&saved, &saved).unwrap();
        check_fit(&saved, &more).unwrap();
        let less = [leaf(0, [13, 1, 2, 3]), leaf(1, [9, 0, 0b001, 0b11])];
        let e = check_fit(&saved, &less).unwrap_err();
        assert_eq!(e.kind(), Kind::Unsupported);
        assert!(e.to_string().contains("leaf 0x1.0 ECX bits 0x4"), "{e}");
        let vendor = [leaf(0, [13, 1, 2, 4]), leaf(1, [9, 0, 0b101, 0b11])];
        assert!(check_fit(&saved, &vendor).unwrap_err().to_string().contains("vendor"));
        assert!(check_fit(&saved, &saved[..1]).is_err());
    }

    #[test]
    fn every_processor_has_its_own_number() {
        let table = from_entries(&[leaf(1, [0; 4]), leaf(0xb, [0; 4])]).unwrap();
        let third = for_processor(&table, 3, 4).unwrap();
        let rows = third.as_slice();
        assert_eq!((rows[0].ebx >> 24, rows[0].ebx >> 16 & 0xff, rows[1].edx), (3, 4, 3));
        let alone = for_processor(&table, 0, 1).unwrap();
        assert_eq!(alone.as_slice()[0].edx & 1 << 28, 0);
    }
}
