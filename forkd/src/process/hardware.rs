//! What a VM process makes its machine of: the program that it boots, and its devices.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use format::{Error, Result};

use super::wire::{Hardware, Program};
use crate::boot::linux::{COMMAND_LINE, LinuxBoot};
use crate::devices::{DeviceConfig, DeviceSet};
use crate::memory::GuestRam;
use crate::wires::{Devices, Identity, Wires};

fn config(hardware: &Hardware, console: &Path) -> DeviceConfig {
    DeviceConfig { disks: hardware.disks.clone(), console: Some(console.to_owned()) }
}

/// What puts the program into a machine. Its files are open already.
///
/// # Errors
/// When there is none, or it is no kernel.
pub fn loader(
    program: &Program,
    files: &[OwnedFd],
    hardware: &Hardware,
    console: &Path,
) -> Result<LinuxBoot> {
    let mut paths = files.iter().map(|file| format!("/proc/self/fd/{}", file.as_raw_fd()).into());
    let kernel = paths.next().ok_or_else(|| Error::invalid("there is no kernel"))?;
    Ok(LinuxBoot {
        kernel,
        initramfs: paths.next(),
        command_line: program.cmdline.clone().unwrap_or_else(|| COMMAND_LINE.into()),
        virtio_devices: config(hardware, console).virtio_devices(),
    })
}

/// The devices of a machine called `identity`. One that is restored gets that with its state.
///
/// # Errors
/// What keeps a disk from being connected, or the host's error.
pub fn devices(
    hardware: &Hardware,
    console: &Path,
    ram: &Arc<GuestRam>,
    wires: &dyn Wires,
    identity: Option<&Identity>,
) -> Result<Arc<dyn Devices>> {
    let devices = DeviceSet::new(&config(hardware, console), ram, wires)?;
    if let Some(identity) = identity {
        devices.identify(identity)?;
    }
    Ok(Arc::new(devices))
}
