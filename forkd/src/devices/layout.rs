//! Where everything lies in a guest: ports, device memory, tables of the firmware, interrupt lines.
//!
//! One file, because the devices, the ACPI tables that announce them and the map of memory that a
//! kernel gets must agree. A value that changes here makes saved machines unfit to be restored.

use crate::memory::Gpa;

/// First port and number of ports of the console, as kernels expect their first serial line.
pub const SERIAL_PORT: (u16, u16) = (0x3f8, 8);
/// Interrupt line of the console.
pub const SERIAL_GSI: u32 = 4;
/// Ports of the power device: sleep control, sleep status, reset.
pub const POWER_PORT: (u16, u16) = (0x600, 3);
/// The keyboard controller's command port, by which kernels without ACPI reset a machine.
pub const KEYBOARD_PORT: (u16, u16) = (0x64, 1);

/// Interrupt line: the generation id has changed.
pub const GENERATION_GSI: u32 = 5;
/// Interrupt line: the power button was pressed.
pub const BUTTON_GSI: u32 = 6;

/// First byte of the first virtio device's registers; every device has [`VIRTIO_LEN`] bytes.
pub const VIRTIO_MMIO: u64 = 0xd800_0000;
/// Bytes of a virtio device's registers.
pub const VIRTIO_LEN: u64 = 0x1000;
/// Interrupt line of the first virtio device; each has its own.
pub const VIRTIO_GSI: u32 = 7;
/// Most virtio devices: the interrupt controller has 24 lines.
pub const VIRTIO_MAX: usize = 17;
/// The identity page.
pub const IDENTITY_MMIO: (Gpa, u64) = (Gpa(0xd810_0000), 0x1000);

/// First byte of the range in low memory that belongs to the firmware: kernels leave it alone.
pub const FIRMWARE: Gpa = Gpa(0xe_0000);
/// One past its last byte.
pub const FIRMWARE_END: Gpa = Gpa(0x10_0000);
/// The generation id: 16 bytes in a page of its own, in the firmware's memory.
pub const GENERATION_ID: Gpa = Gpa(0xf_f000);

/// The I/O interrupt controller's and the local ones' registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local interrupt controllers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Registers of virtio device `i`.
#[must_use]
pub fn virtio_mmio(i: usize) -> Gpa {
    Gpa(VIRTIO_MMIO + VIRTIO_LEN * u64::try_from(i).unwrap_or(0))
}

/// Interrupt line of virtio device `i`.
#[must_use]
pub fn virtio_gsi(i: usize) -> u32 {
    VIRTIO_GSI + u32::try_from(i).unwrap_or(0)
}
