//! What a VM process makes its machine of: the program that it boots, and its devices.

use std::path::Path;
use std::sync::Arc;

use format::Result;

use super::wire::{Hardware, Program};
use crate::boot::linux::{COMMAND_LINE, LinuxBoot, check_kernel};
use crate::devices::{DeviceConfig, DeviceSet};
use crate::memory::GuestRam;
use crate::wires::{Devices, Identity, Wires};

fn config(hardware: &Hardware, console: &Path) -> DeviceConfig {
    DeviceConfig { disks: hardware.disks.clone(), console: Some(console.to_owned()) }
}

/// What puts the program into a machine.
///
/// # Errors
/// When its file cannot be read, or is no kernel.
pub fn loader(program: &Program, hardware: &Hardware, console: &Path) -> Result<LinuxBoot> {
    check_kernel(&program.kernel)?;
    Ok(LinuxBoot {
        kernel: program.kernel.clone(),
        initramfs: program.initrd.clone(),
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
