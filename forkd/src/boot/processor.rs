//! How the first processor starts: in long mode for a `bzImage`, in flat protected mode for PVH.

use format::Result;
use kvm_bindings::{kvm_regs, kvm_segment};

use crate::machine::CpuStart;
use crate::memory::{Gpa, GuestRam};

/// Tables of long mode: they map the first GiB to itself, which holds all that a kernel looks at
/// before it makes its own.
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;
/// Descriptor table, and the selectors that the boot protocol asks for.
const GDT: u64 = 0x500;
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const PRESENT_WRITABLE: u64 = 3;
const HUGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Flags of a fresh processor: only the bit that is always one.
const FLAGS: u64 = 2;

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    let code = selector == CODE;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!(code && long)),
        s: 1,
        l: u8::from(code && long),
        g: 1,
        ..kvm_segment::default()
    }
}

/// The descriptor of a segment, as it stands in the table.
fn descriptor(s: &kvm_segment) -> u64 {
    let access = u64::from(s.type_ | s.s << 4 | s.dpl << 5 | s.present << 7);
    let flags = u64::from(s.l << 1 | s.db << 2 | s.g << 3);
    0xffff | access << 40 | 0xf << 48 | flags << 52
}

fn set_segments(ram: &GuestRam, cpu: &mut CpuStart, long: bool) -> Result<()> {
    let (code, data) = (segment(CODE, 0xb, long), segment(DATA, 3, long));
    let task = kvm_segment { selector: TASK, type_: 0xb, s: 0, limit: 0x67, g: 0, ..data };
    let task = kvm_segment { db: 0, ..task };
    for (at, segment) in [(CODE, &code), (DATA, &data), (TASK, &task)] {
        ram.write(Gpa(GDT + u64::from(at)), &descriptor(segment).to_le_bytes())?;
    }
    let s = &mut cpu.sregs;
    (s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr) = (code, data, data, data, data, data, task);
    (s.gdt.base, s.gdt.limit) = (GDT, 0x2f);
    (s.idt.base, s.idt.limit) = (0, 0);
    Ok(())
}

/// Starts in long mode at `entry` with `argument` in RSI.
pub(super) fn long_mode(
    ram: &GuestRam,
    cpu: &mut CpuStart,
    entry: u64,
    argument: u64,
) -> Result<()> {
    set_segments(ram, cpu, true)?;
    ram.write(Gpa(PML4), &(PDPT | PRESENT_WRITABLE).to_le_bytes())?;
    ram.write(Gpa(PDPT), &(PAGE_DIRECTORY | PRESENT_WRITABLE).to_le_bytes())?;
    for i in 0..512 {
        let page = i << 21 | PRESENT_WRITABLE | HUGE;
        ram.write(Gpa(PAGE_DIRECTORY + 8 * i), &page.to_le_bytes())?;
    }
    cpu.sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    (cpu.sregs.cr3, cpu.sregs.cr4) = (PML4, CR4_PAE);
    cpu.sregs.efer = EFER_LME | EFER_LMA;
    cpu.regs = kvm_regs { rip: entry, rsi: argument, rflags: FLAGS, ..kvm_regs::default() };
    Ok(())
}

/// Starts in protected mode without paging at `entry` with `argument` in EBX.
pub(super) fn protected_mode(
    ram: &GuestRam,
    cpu: &mut CpuStart,
    entry: u64,
    argument: u64,
) -> Result<()> {
    set_segments(ram, cpu, false)?;
    cpu.sregs.cr0 = CR0_PE | CR0_ET;
    (cpu.sregs.cr3, cpu.sregs.cr4, cpu.sregs.efer) = (0, 0, 0);
    cpu.regs = kvm_regs { rip: entry, rbx: argument, rflags: FLAGS, ..kvm_regs::default() };
    Ok(())
}
