//! The frequency of the time stamp counter, which a guest has measured or was told, and counts by.
//!
//! It is a section of its own in a saved state. A state without it is from before there was one,
//! and is restored as then: on the word of its features alone.

use format::{Error, Kind, Result};
use kvm_ioctls::{Cap, VcpuFd};

use super::vm::Vm;
use super::{blob::Reader, failed, state};

/// What KVM itself takes for the same frequency, in millionths: a kernel measures it at each boot,
/// and not to the last digit.
const SAME_PPM: u64 = 250;

/// What is to be done for a guest that counts by another frequency.
#[derive(Debug, PartialEq, Eq)]
enum Fit {
    Same,
    /// The processor is told to scale its counter.
    Scale,
}

/// Whether a guest that counts in `saved` kHz can go on where the counter has `here`.
fn fit(saved: u32, here: u32, scales: bool) -> Result<Fit> {
    let (a, b) = (u64::from(saved), u64::from(here));
    if a.abs_diff(b) * 1_000_000 <= SAME_PPM * b {
        return Ok(Fit::Same);
    }
    if saved != 0 && scales {
        return Ok(Fit::Scale);
    }
    let what = format!("its time stamp counter has {saved} kHz, and this host's {here}");
    Err(Error::new(Kind::Unsupported, what)
        .tried("continue")
        .on("the saved processors")
        .hint("restore on a host of that frequency, or one whose KVM scales the counter"))
}

/// The frequency of a processor, if the host knows it.
pub(super) fn of(cpu: &VcpuFd) -> Option<u32> {
    cpu.get_tsc_khz().ok().filter(|khz| *khz != 0)
}

/// The frequency that a processor of `vm` is to be set to, so that it has the saved one; `None`
/// when it has it.
///
/// # Errors
/// `Unsupported` when it can have it in no way; `Corrupt` when the state says it wrongly.
pub(super) fn to_be_set(vm: &Vm, state: &Reader<'_>) -> Result<Option<u32>> {
    if state.find(state::tag::TSC_KHZ, 0).is_none() {
        return Ok(None);
    }
    let saved: u32 = state::one(state, state::tag::TSC_KHZ, 0)?;
    let Some(here) = vm.tsc_khz() else { return Ok(None) };
    let fit = fit(saved, here, vm.fd.check_extension(Cap::TscControl))?;
    Ok((fit == Fit::Scale).then_some(saved))
}

/// Has a processor count by `khz`.
pub(super) fn set(cpu: &VcpuFd, khz: u32) -> Result<()> {
    cpu.set_tsc_khz(khz).map_err(|e| failed("set the frequency of the counter of", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_frequency_is_scaled_or_refused_by_name() {
        assert_eq!(fit(2_400_000, 2_400_000, false).unwrap(), Fit::Same);
        // As the same host measures it at two boots.
        assert_eq!(fit(2_400_000, 2_400_500, false).unwrap(), Fit::Same);
        assert_eq!(fit(2_600_000, 2_400_000, true).unwrap(), Fit::Scale);
        for (saved, scales) in [(2_600_000, false), (2_398_000, false), (0, true)] {
            let e = fit(saved, 2_400_000, scales).unwrap_err();
            assert_eq!(e.kind(), Kind::Unsupported);
            assert!(e.to_string().contains(&format!("has {saved} kHz, and this host's 2400000")));
        }
    }
}
