//! What a VM process makes its machine of: the program that it boots, and its devices.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use format::{Error, Result};

use super::wire::{Hardware, Program};
use crate::boot::linux::{COMMAND_LINE, LinuxBoot};
use crate::devices::{DeviceConfig, DeviceSet, NetConfig};
use crate::memory::GuestRam;
use crate::tap::Tap;
use crate::wires::{Identity, Wires};

/// What devices a machine gets. Its tap interface, if it has one, is the last of the files that
/// came with the message, and is taken out of them.
///
/// # Errors
/// `Invalid` when that is missing.
pub fn config(
    hardware: &Hardware,
    console: &Path,
    files: &mut Vec<OwnedFd>,
) -> Result<DeviceConfig> {
    let mut tap = |name: &String| -> Result<Arc<Tap>> {
        let missing = || Error::invalid("the file of its tap interface is missing");
        Ok(Arc::new(Tap::from_file(name.clone(), files.pop().ok_or_else(missing)?)))
    };
    let net = match &hardware.net {
        Some(net) => {
            let tap = net.tap.as_ref().map(&mut tap).transpose()?;
            Some(NetConfig { tap, link: net.link })
        }
        None => None,
    };
    Ok(DeviceConfig { disks: hardware.disks.clone(), net, console: Some(console.to_owned()) })
}

/// What puts the program into a machine. Its files are open already.
///
/// # Errors
/// When there is none, or it is no kernel.
pub fn loader(program: &Program, files: &[OwnedFd], devices: &DeviceConfig) -> Result<LinuxBoot> {
    let mut paths = files.iter().map(|file| format!("/proc/self/fd/{}", file.as_raw_fd()).into());
    let kernel = paths.next().ok_or_else(|| Error::invalid("there is no kernel"))?;
    Ok(LinuxBoot {
        kernel,
        initramfs: paths.next(),
        command_line: program.cmdline.clone().unwrap_or_else(|| COMMAND_LINE.into()),
        virtio_devices: devices.virtio_devices(),
    })
}

/// The devices of a machine called `identity`. One that is restored gets that with its state.
///
/// # Errors
/// What keeps a disk from being connected, or the host's error.
pub fn devices(
    config: &DeviceConfig,
    ram: &Arc<GuestRam>,
    wires: &dyn Wires,
    identity: Option<&Identity>,
) -> Result<Arc<DeviceSet>> {
    let devices = DeviceSet::new(config, ram, wires)?;
    if let Some(identity) = identity {
        devices.identify(identity)?;
    }
    Ok(Arc::new(devices))
}
