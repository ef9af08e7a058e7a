//! One machine over the library, without a daemon: boots Linux, for the nested lab.
//!
//! `lab_machine KERNEL INITRAMFS MEMORY_MIB CONSOLE [SOCKET...]` runs it until it ends, says how,
//! and exits with 0 if the guest turned it off.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use forkd::boot::linux::{COMMAND_LINE, LinuxBoot};
use forkd::devices::{DeviceConfig, DeviceSet, DiskConfig};
use forkd::machine::{Machine, Reason, SizeClass};
use forkd::wires::{Devices, Identity};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, memory, console, sockets @ ..] = &words[..] else {
        eprintln!("KERNEL INITRAMFS MEMORY_MIB CONSOLE [SOCKET...]");
        return ExitCode::from(2);
    };
    let disk = |(i, socket): (usize, &String)| DiskConfig {
        name: format!("disk{i}"),
        socket: socket.into(),
        read_only: false,
    };
    let config = DeviceConfig {
        disks: sockets.iter().enumerate().map(disk).collect(),
        console: Some(PathBuf::from(console)),
    };
    let boot = LinuxBoot {
        kernel: kernel.into(),
        initramfs: Some(initramfs.into()),
        command_line: format!("{COMMAND_LINE} quiet mitigations=off nokaslr"),
        virtio_devices: config.virtio_devices(),
    };
    match run(&config, &boot, memory.parse().expect("MiB of memory")) {
        Ok(Reason::PowerOff) => ExitCode::SUCCESS,
        Ok(reason) => {
            println!("ended: {}", reason.name());
            ExitCode::from(3)
        }
        Err(e) => {
            println!("{e}");
            ExitCode::from(1)
        }
    }
}

fn run(config: &DeviceConfig, boot: &LinuxBoot, memory_mib: u64) -> format::Result<Reason> {
    let mut machine = Machine::shell(&SizeClass { memory_bytes: memory_mib << 20, vcpus: 1 })?;
    let identity = Identity {
        name: "lab".to_owned(),
        id: uuid::Uuid::from_bytes([1; 16]),
        generation_id: [2; 16],
        seed: [3; 32],
        mac: [2, 0, 0, 0, 0, 1],
    };
    machine.boot_with(boot, &mut |ram, wires| {
        let devices = DeviceSet::new(config, ram, wires)?;
        devices.identify(&identity)?;
        Ok(Arc::new(devices) as Arc<dyn Devices>)
    })?;
    machine.resume()?;
    let exit = machine.wait();
    println!("exit: {exit}");
    Ok(exit.reason)
}
