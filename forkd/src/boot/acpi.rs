//! The firmware's tables: what a kernel is told about the machine.
//!
//! ACPI in its hardware-reduced form: no PM timer, no fixed events, no legacy devices. Processors
//! and interrupt controllers are in the MADT; virtio devices, console, generation id and power
//! button in the DSDT; the two interrupt lines by which the host speaks to the guest are those of a
//! generic event device.
//!
//! Stock distribution kernels find virtio devices only here: they are built without the option that
//! takes them from the command line.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use format::{Error, Result};

use crate::devices::layout::{
    BUTTON_GSI, FIRMWARE, GENERATION_GSI, GENERATION_ID, IO_APIC, LOCAL_APIC, POWER_PORT,
    SERIAL_GSI, SERIAL_PORT, VIRTIO_LEN, virtio_gsi, virtio_mmio,
};
use crate::devices::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::memory::{Gpa, GuestRam};

const OEM: [u8; 6] = *b"OFFSHT";
const OEM_TABLE: [u8; 8] = *b"OFFSHOOT";
const OEM_REVISION: u32 = 1;

/// FADT: there is neither a VGA adapter nor a CMOS clock to look for.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// Writes the tables of a machine with `vcpus` processors and `virtio` virtio devices; returns the
/// address of the first one, which leads to the others.
///
/// # Errors
/// `Invalid` when guest memory is too small for them.
pub fn install(ram: &GuestRam, vcpus: u8, virtio: usize) -> Result<Gpa> {
    // The first table is at the start of the range, where also a kernel that is not told finds it.
    let mut at = FIRMWARE.0 + 64;
    let mut put = |table: &dyn Aml| -> Result<u64> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let here = at;
        at = (here + u64::try_from(bytes.len()).unwrap_or(u64::MAX)).next_multiple_of(64);
        if at > GENERATION_ID.0 {
            return Err(Error::invalid("the tables of the firmware do not fit"));
        }
        ram.write(Gpa(here), &bytes)?;
        Ok(here)
    };
    let dsdt = put(&dsdt(virtio))?;
    let fadt = put(&fadt(dsdt))?;
    let madt = put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt)?;
    let mut bytes = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut bytes);
    ram.write(FIRMWARE, &bytes)?;
    Ok(FIRMWARE)
}

fn fadt(dsdt: u64) -> impl Aml {
    let port =
        |port| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.sleep_control_reg = port(POWER_PORT.0);
    fadt.sleep_status_reg = port(POWER_PORT.0 + 1);
    fadt.reset_reg = port(POWER_PORT.0 + 2);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let local = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, local);
    for number in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(number, number, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

/// The bytes of one definition after the other.
struct Definitions(Vec<u8>);

impl Definitions {
    fn add(&mut self, definition: &dyn Aml) {
        definition.to_aml_bytes(&mut self.0);
    }
}

impl Aml for Definitions {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn line(gsi: u32) -> Interrupt {
    // Consumed, edge-triggered, active high, not shared.
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(virtio: usize) -> Definitions {
    let mut devices = Definitions(Vec::new());
    for i in 0..virtio {
        add_virtio(&mut devices, i);
    }
    add_serial(&mut devices);
    add_generation(&mut devices);
    devices.add(&Device::new(
        "PWRB".into(),
        vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &aml::ZERO)],
    ));
    add_events(&mut devices);

    let mut all = Definitions(Scope::raw("_SB_".into(), devices.0));
    let off = SLEEP_TYPE_OFF;
    all.add(&name("_S5_", &Package::new(vec![&off, &aml::ZERO, &aml::ZERO, &aml::ZERO])));
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&all.0);
    Definitions(table.as_slice().to_vec())
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(path), value)
}

fn add_virtio(devices: &mut Definitions, i: usize) {
    let at = u32::try_from(virtio_mmio(i).0).unwrap_or(0);
    let registers = Memory32Fixed::new(true, at, u32::try_from(VIRTIO_LEN).unwrap_or(0));
    devices.add(&Device::new(
        Path::new(&format!("V{i:03}")),
        vec![
            &name("_HID", &"LNRO0005"),
            &name("_UID", &u32::try_from(i).unwrap_or(0)),
            &name("_CCA", &aml::ONE),
            &name("_CRS", &ResourceTemplate::new(vec![&registers, &line(virtio_gsi(i))])),
        ],
    ));
}

fn add_serial(devices: &mut Definitions) {
    let (port, len) = SERIAL_PORT;
    let ports = IO::new(port, port, 0, u8::try_from(len).unwrap_or(0));
    devices.add(&Device::new(
        "COM1".into(),
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &aml::ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&line(SERIAL_GSI), &ports])),
        ],
    ));
}

/// The generation id: `ADDR` gives its address in two halves.
fn add_generation(devices: &mut Definitions) {
    let low = u32::try_from(GENERATION_ID.0 & 0xffff_ffff).unwrap_or(0);
    let high = u32::try_from(GENERATION_ID.0 >> 32).unwrap_or(0);
    devices.add(&Device::new(
        "VGEN".into(),
        vec![
            &name("_HID", &"VMGENCTR"),
            &name("_CID", &"VM_Gen_Counter"),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("ADDR", &Package::new(vec![&low, &high])),
        ],
    ));
}

/// The generic event device: what an interrupt line of the host means.
fn add_events(devices: &mut Definitions) {
    let (generation, button) = (GENERATION_GSI, BUTTON_GSI);
    let lines = (line(generation), line(button));
    let resources = ResourceTemplate::new(vec![&lines.0, &lines.1]);
    // "Something about you changed", and for a button: "you were pressed".
    let changed: u8 = 0x80;
    let (of_generation, of_button) = (Path::new("VGEN"), Path::new("PWRB"));
    let notify_generation = Notify::new(&of_generation, &changed);
    let notify_button = Notify::new(&of_button, &changed);
    let is_generation = Equal::new(&Arg(0), &generation);
    let is_button = Equal::new(&Arg(0), &button);
    devices.add(&Device::new(
        "GED_".into(),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &aml::ZERO),
            &name("_CRS", &resources),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &If::new(&is_generation, vec![&notify_generation]),
                    &If::new(&is_button, vec![&notify_button]),
                ],
            ),
        ],
    ));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PAGE;

    fn word(ram: &GuestRam, at: u64) -> u64 {
        let mut bytes = [0; 8];
        ram.read(Gpa(at), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn table(ram: &GuestRam, at: u64, name: &[u8; 4]) -> Vec<u8> {
        let len = word(ram, at) >> 32;
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        ram.read(Gpa(at), &mut bytes).unwrap();
        assert_eq!(bytes[..4], *name);
        assert_eq!(bytes.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0, "checksum of {name:?}");
        bytes
    }

    #[test]
    fn every_table_is_reached_from_the_first_and_has_its_checksum() {
        let ram = GuestRam::new(0x10_0000 + PAGE).unwrap();
        let at = install(&ram, 8, 17).unwrap();
        let mut root = [0; 36];
        ram.read(at, &mut root).unwrap();
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!(root[..20].iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
        let xsdt = table(&ram, word(&ram, at.0 + 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 16);
        let entry = |i: usize| u64::from_le_bytes(xsdt[36 + 8 * i..44 + 8 * i].try_into().unwrap());
        let fadt = table(&ram, entry(0), b"FACP");
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
        let madt = table(&ram, entry(1), b"APIC");
        assert_eq!(madt.len(), 44 + 8 * 8 + 12);
        let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
        let dsdt = table(&ram, dsdt, b"DSDT");
        for device in [&b"V016"[..], b"COM1", b"VGEN", b"GED_", b"PWRB", b"LNRO0005"] {
            assert!(dsdt.windows(device.len()).any(|w| w == device), "{device:?}");
        }
    }
}
