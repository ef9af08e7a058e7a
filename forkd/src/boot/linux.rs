//! Starts a Linux kernel: a `bzImage` by the 64-bit boot protocol, or a `vmlinux` by PVH.
//!
//! Which of the two a file is decides the file. A `vmlinux` starts faster: nothing has to be
//! unpacked. Low memory, below what the kernel gets:
//!
//! | address | |
//! |---|---|
//! | 0x500 | segment descriptors |
//! | 0x6000 | PVH: start info, map of memory, module list |
//! | 0x7000 | `bzImage`: the "zero page" |
//! | 0x9000 | page tables |
//! | 0x20000 | command line |
//! | 0xe0000 | tables of the firmware, generation id |
//!
//! The kernel is its owner's choice and runs in the guest; here its file is bytes that must not
//! lead outside guest memory, whatever its headers say.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use format::{Context, Error, Kind, Result};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegion;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::{acpi, processor};
use crate::devices::layout::{FIRMWARE, FIRMWARE_END};
use crate::machine::{CpuStart, Loader};
use crate::memory::{Gpa, GuestRam, PAGE, index, wide};

/// What guests without a command line of their own get: the console, no look for buses that are not
/// there, and a reset instead of a halt when the kernel gives up.
pub const COMMAND_LINE: &str = "console=ttyS0 pci=off panic=-1";

const START_INFO: Gpa = Gpa(0x6000);
const MEMORY_MAP: Gpa = Gpa(0x6100);
const MODULES: Gpa = Gpa(0x6800);
const ZERO_PAGE: Gpa = Gpa(0x7000);
const COMMAND_LINE_AT: Gpa = Gpa(0x2_0000);
/// Most bytes of a command line, with the zero byte at its end; the kernels' own limit.
const COMMAND_LINE_MAX: usize = 2048;
/// Where low memory that kernels may use ends.
const LOW_END: u64 = 0x9_fc00;
/// No part of a kernel lies below.
const HIGH: GuestAddress = GuestAddress(0x10_0000);
/// Most bytes of an initramfs that are looked at below the kernel's own limit.
const INITRAMFS_END_MAX: u64 = 0x7fff_ffff;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const PVH_MAGIC: u32 = 0x336e_c578;
/// The boot protocol's "loader that has no number of its own".
const LOADER_UNDEFINED: u8 = 0xff;
/// Bit of `xloadflags`: the kernel has a 64-bit entry, 512 bytes after its start.
const ENTRY_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
/// First version of the boot protocol with that bit.
const PROTOCOL_64: u16 = 0x20c;

/// A Linux guest that is to be started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinuxBoot {
    /// The kernel: a `bzImage` or a `vmlinux` with a PVH entry.
    pub kernel: PathBuf,
    /// The first file system.
    pub initramfs: Option<PathBuf>,
    /// The command line; [`COMMAND_LINE`] is what an ordinary guest needs.
    pub command_line: String,
    /// How many virtio devices the machine has: `DeviceConfig::virtio_devices`.
    pub virtio_devices: usize,
}

impl Loader for LinuxBoot {
    fn load(&self, ram: &GuestRam, cpus: &mut [CpuStart]) -> Result<()> {
        let vcpus = u8::try_from(cpus.len()).unwrap_or(u8::MAX);
        let first = cpus.first_mut().ok_or_else(|| Error::invalid("no processor"))?;
        let firmware = acpi::install(ram, vcpus, self.virtio_devices)?;
        self.write_command_line(ram)?;
        let object = || format!("kernel {}", self.kernel.display());
        let mut file = File::open(&self.kernel).context("open", object)?;
        let mut magic = [0; 4];
        file.read_exact(&mut magic).context("read", object)?;
        file.rewind().context("read", object)?;
        if magic == ELF_MAGIC {
            self.load_vmlinux(&mut file, ram, first, firmware).context("load", object)
        } else {
            self.load_bzimage(&mut file, ram, first, firmware).context("load", object)
        }
    }
}

impl LinuxBoot {
    fn write_command_line(&self, ram: &GuestRam) -> Result<()> {
        let line = self.command_line.as_bytes();
        if line.len() >= COMMAND_LINE_MAX || line.contains(&0) {
            return Err(Error::invalid(format!(
                "a command line has at most {} bytes and no zero byte",
                COMMAND_LINE_MAX - 1
            )));
        }
        ram.write(COMMAND_LINE_AT, line)?;
        ram.write(Gpa(COMMAND_LINE_AT.0 + wide(line.len())), &[0])
    }

    fn load_bzimage(
        &self,
        file: &mut File,
        ram: &GuestRam,
        cpu: &mut CpuStart,
        firmware: Gpa,
    ) -> Result<()> {
        let memory = loader_view(ram)?;
        let loaded = BzImage::load(&memory, None, file, Some(HIGH)).map_err(unfit)?;
        let header =
            loaded.setup_header.ok_or_else(|| Error::invalid("a kernel without header"))?;
        // Copies: the header's fields are not aligned.
        let (version, flags) = (header.version, header.xloadflags);
        if version < PROTOCOL_64 || flags & ENTRY_64 == 0 {
            return Err(Error::new(Kind::Unsupported, "the kernel has no 64-bit entry"));
        }
        let start = loaded.kernel_load.0;
        // The kernel unpacks itself over this much memory from here.
        let needed = start.max(header.pref_address).saturating_add(header.init_size.into());
        let most = u64::from(header.initrd_addr_max).min(INITRAMFS_END_MAX);
        let initramfs = self.load_initramfs(ram, needed.max(loaded.kernel_end), most)?;
        let params = zero_page(header, ram, initramfs, firmware)?;
        ram.write(ZERO_PAGE, params.as_slice())?;
        processor::long_mode(ram, cpu, start + ENTRY_64_OFFSET, ZERO_PAGE.0)
    }

    fn load_vmlinux(
        &self,
        file: &mut File,
        ram: &GuestRam,
        cpu: &mut CpuStart,
        firmware: Gpa,
    ) -> Result<()> {
        let memory = loader_view(ram)?;
        let loaded: KernelLoaderResult =
            Elf::load(&memory, None, file, Some(HIGH)).map_err(unfit)?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            let e = Error::new(Kind::Unsupported, "the kernel has no PVH entry");
            return Err(e.hint("use a kernel with CONFIG_PVH, or its bzImage"));
        };
        let initramfs = self.load_initramfs(ram, loaded.kernel_end, INITRAMFS_END_MAX)?;
        write_start_info(ram, initramfs, firmware)?;
        processor::protected_mode(ram, cpu, entry.0, START_INFO.0)
    }

    /// Puts the initramfs at the end of memory, below `most` and not below `from`; returns its
    /// address and length.
    fn load_initramfs(&self, ram: &GuestRam, from: u64, most: u64) -> Result<Option<(u64, u64)>> {
        let Some(path) = &self.initramfs else { return Ok(None) };
        let place = || -> Result<(u64, u64)> {
            let mut file = File::open(path)?;
            let len = file.metadata()?.len();
            let end = ram.banks().next().map_or(0, |low| low.len).min(most + 1);
            let start = end.checked_sub(len).map(|at| at / PAGE * PAGE).filter(|at| *at >= from);
            let start = start.ok_or_else(|| {
                Error::invalid("guest memory is too small for it").hint("give the machine more")
            })?;
            copy_file(&mut file, ram, start, len)?;
            Ok((start, len))
        };
        place().context("load", || format!("initramfs {}", path.display())).map(Some)
    }
}

/// Copies `len` bytes of `file` to guest memory.
fn copy_file(file: &mut File, ram: &GuestRam, mut at: u64, len: u64) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let end = at + len;
    while at < end {
        let part = index((end - at).min(wide(buffer.len())));
        file.read_exact(&mut buffer[..part])?;
        ram.write(Gpa(at), &buffer[..part])?;
        at += wide(part);
    }
    Ok(())
}

fn unfit(e: linux_loader::loader::Error) -> Error {
    Error::invalid("it is no kernel for this machine, or does not fit").caused_by(e)
}

/// Guest memory as the loader library wants it.
fn loader_view(ram: &GuestRam) -> Result<GuestMemoryMmap<()>> {
    let wrong = || Error::invalid("guest memory cannot be used to load a kernel");
    let mut regions = Vec::new();
    for bank in ram.banks() {
        let data = ram.host(bank.start, bank.len)?.as_ptr();
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: the range is mapped while `ram` lives, which outlives this view, and the library
        // copies by volatile accesses and does not unmap what it did not map.
        let region = unsafe { MmapRegion::build_raw(data, index(bank.len), prot, flags) };
        let region = region.map_err(|e| wrong().caused_by(e))?;
        let start = GuestAddress(bank.start.0);
        regions.push(GuestRegionMmap::new(region, start).ok_or_else(wrong)?);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|e| wrong().caused_by(e))
}

/// Ranges of guest-physical memory: first address, length, kind.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map =
        vec![(0, LOW_END, E820_RAM), (FIRMWARE.0, FIRMWARE_END.0 - FIRMWARE.0, E820_RESERVED)];
    for bank in ram.banks() {
        let start = bank.start.0.max(FIRMWARE_END.0);
        let end = bank.start.0 + bank.len;
        if end > start {
            map.push((start, end - start, E820_RAM));
        }
    }
    map
}

fn zero_page(
    mut header: setup_header,
    ram: &GuestRam,
    initramfs: Option<(u64, u64)>,
    firmware: Gpa,
) -> Result<boot_params> {
    let word =
        |value: u64| u32::try_from(value).map_err(|_| Error::invalid("an address above 4 GiB"));
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = word(COMMAND_LINE_AT.0)?;
    if let Some((at, len)) = initramfs {
        (header.ramdisk_image, header.ramdisk_size) = (word(at)?, word(len)?);
    }
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: firmware.0, ..Default::default() };
    let map = memory_map(ram);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    for (entry, (addr, size, r#type)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type };
    }
    Ok(params)
}

/// What the kernel is told by PVH.
fn write_start_info(ram: &GuestRam, initramfs: Option<(u64, u64)>, firmware: Gpa) -> Result<()> {
    let map = memory_map(ram);
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE_AT.0,
        rsdp_paddr: firmware.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    let mut at = MEMORY_MAP;
    for (addr, size, type_) in map {
        let entry = hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
        ram.write(at, entry.as_slice())?;
        at.0 += wide(size_of::<hvm_memmap_table_entry>());
    }
    if let Some((paddr, size)) = initramfs {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        ram.write(MODULES, module.as_slice())?;
        (info.nr_modules, info.modlist_paddr) = (1, MODULES.0);
    }
    ram.write(START_INFO, info.as_slice())
}

/// Whether `file` could be a kernel for [`LinuxBoot`]: for a clear answer before a machine is made.
///
/// # Errors
/// `Invalid` when it is neither a `bzImage` nor an ELF file; the host's error.
pub fn check_kernel(file: &Path) -> Result<()> {
    let object = || format!("kernel {}", file.display());
    let mut start = Vec::new();
    let opened = File::open(file).context("open", object)?;
    opened.take(0x206).read_to_end(&mut start).context("read", object)?;
    if start.starts_with(&ELF_MAGIC) || start.get(0x202..0x206) == Some(b"HdrS") {
        return Ok(());
    }
    Err(Error::invalid("it is neither a bzImage nor a vmlinux").tried("start").on(object()))
}
