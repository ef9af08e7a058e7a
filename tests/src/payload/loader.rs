//! Puts the program into a machine: page tables, segments, interrupt gates, registers.
//!
//! Invariant: addresses here agree with `guest/link.ld` and `guest/main.rs`. Ports are opened for
//! ring 3 twice, by the I/O level and by an empty bitmap in the task segment: some KVMs look at
//! one of them only.

use forkd::kvm::bindings::{kvm_regs, kvm_segment};
use forkd::machine::{CpuStart, Loader};
use forkd::memory::{Gpa, GuestRam};
use format::{Error, Result};

static PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

/// First address that the program and its tables leave alone.
pub const HEAP: u64 = 0x20_0000;

/// Address and words of the interrupt table.
pub const GATES: (u64, u64) = (0x2_9000, 512);

const TABLES: u64 = 0x1000;
const FAULT_STUBS: u64 = 0x1_2000;
const SEGMENTS: u64 = 0x2_0000;
const TASKS: u64 = 0x2_1000;
const RING_0_STACKS: u64 = 0x6_0000;
const RING_3_STACKS: u64 = 0x8_0000;
const STACK: u64 = 0x4000;
const FAULT_PORT: u8 = 0x12;

/// The program, as a loader.
#[derive(Debug, Clone, Copy)]
pub struct Payload;

impl Loader for Payload {
    fn load(&self, ram: &GuestRam, cpus: &mut [CpuStart]) -> Result<()> {
        load_program(ram)?;
        write_tables(ram)?;
        write_segments(ram)?;
        write_gates(ram)?;
        for (number, cpu) in (0..).zip(cpus) {
            let task = TASKS + number * 0x1000;
            // Stack of ring 0, and the offset of an all-zero bitmap of ports.
            put(ram, task + 4, &(RING_0_STACKS + (number + 1) * STACK).to_le_bytes())?;
            put(ram, task + 0x66, &0x68u16.to_le_bytes())?;
            place(cpu, number, task);
        }
        Ok(())
    }
}

fn put(ram: &GuestRam, at: u64, bytes: &[u8]) -> Result<()> {
    ram.write(Gpa(at), bytes)
}

fn word(at: usize) -> u64 {
    u64::from_le_bytes(PROGRAM[at..at + 8].try_into().expect("8 bytes"))
}

fn half(at: usize) -> usize {
    u16::from_le_bytes(PROGRAM[at..at + 2].try_into().expect("2 bytes")).into()
}

fn small(at: usize) -> u32 {
    u32::from_le_bytes(PROGRAM[at..at + 4].try_into().expect("4 bytes"))
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("64 bits")
}

fn load_program(ram: &GuestRam) -> Result<()> {
    let (headers, count) = (index(word(32)), half(56));
    for header in (0..count).map(|i| headers + i * 56) {
        let (offset, address, len) =
            (index(word(header + 8)), word(header + 16), index(word(header + 32)));
        if small(header) == 1 {
            put(ram, address, &PROGRAM[offset..offset + len])?;
        }
    }
    Ok(())
}

/// The address of a symbol of the program.
fn symbol(name: &str) -> Result<u64> {
    let (sections, count) = (index(word(40)), half(60));
    for section in (0..count).map(|i| sections + i * 64).filter(|s| small(s + 4) == 2) {
        let (offset, len) = (index(word(section + 24)), index(word(section + 32)));
        let names = sections + usize::try_from(small(section + 40)).expect("64 bits") * 64;
        let names = index(word(names + 24));
        for entry in (offset..offset + len).step_by(24) {
            let at = names + usize::try_from(small(entry)).expect("64 bits");
            let own = PROGRAM[at..].split(|byte| *byte == 0).next().unwrap_or_default();
            if own == name.as_bytes() {
                return Ok(word(entry + 8));
            }
        }
    }
    Err(Error::corrupt("the guest program lacks a symbol").on(name.to_owned()))
}

/// 4 GiB, each address at itself, in pages of 2 MiB that ring 3 may write.
fn write_tables(ram: &GuestRam) -> Result<()> {
    put(ram, TABLES, &(0x2000u64 | 0x67).to_le_bytes())?;
    for gib in 0..4u64 {
        put(ram, 0x2000 + 8 * gib, &((0x3000 + 0x1000 * gib) | 0x67).to_le_bytes())?;
        for i in 0..512 {
            let entry = ((gib * 512 + i) << 21) | 0xe7;
            put(ram, 0x3000 + 0x1000 * gib + 8 * i, &entry.to_le_bytes())?;
        }
    }
    Ok(())
}

fn write_segments(ram: &GuestRam) -> Result<()> {
    for (slot, descriptor) in [
        (2, 0x00af_9b00_0000_ffffu64), // code of ring 0
        (3, 0x00cf_9300_0000_ffff),    // data of ring 0
        (5, 0x00cf_f300_0000_ffff),    // data of ring 3
        (6, 0x00af_fb00_0000_ffff),    // code of ring 3
    ] {
        put(ram, SEGMENTS + slot * 8, &descriptor.to_le_bytes())?;
    }
    Ok(())
}

fn write_gates(ram: &GuestRam) -> Result<()> {
    let gate = |vector: u64, to: u64, from_ring: u64| -> Result<()> {
        let low = (to & 0xffff) | 0x10 << 16 | (0x8e00 | from_ring << 13) << 32;
        put(ram, GATES.0 + 16 * vector, &(low | (to >> 16 & 0xffff) << 48).to_le_bytes())?;
        put(ram, GATES.0 + 16 * vector + 8, &(to >> 32).to_le_bytes())
    };
    for vector in 0..32u8 {
        // mov al, vector; out FAULT_PORT, al; hlt; jmp to the hlt
        let stub = [0xb0, vector, 0xe6, FAULT_PORT, 0xf4, 0xeb, 0xfd];
        let at = FAULT_STUBS + 16 * u64::from(vector);
        put(ram, at, &stub)?;
        gate(vector.into(), at, 0)?;
    }
    gate(3, symbol("sleep_entry")?, 3)?;
    gate(0x40, symbol("timer_entry")?, 0)?;
    gate(0x41, symbol("line_entry")?, 0)
}

fn place(cpu: &mut CpuStart, number: u64, task: u64) {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 0x33,
        type_: 11,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x2b, type_: 3, l: 0, db: 1, ..code };
    let s = &mut cpu.sregs;
    (s.cr0, s.cr3, s.cr4, s.efer) = (0x8005_0033, TABLES, 0x620, 0x501);
    (s.cs, s.ds, s.es, s.fs, s.gs, s.ss) = (code, data, data, data, data, data);
    s.tr = kvm_segment {
        base: task,
        limit: 0x3ff,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    (s.gdt.base, s.gdt.limit) = (SEGMENTS, 0x4f);
    (s.idt.base, s.idt.limit) = (GATES.0, 0xfff);
    let entry = word(24);
    let stack = RING_3_STACKS + (number + 1) * STACK - 8;
    cpu.regs = kvm_regs { rip: entry, rsp: stack, rdi: number, rflags: 0x3202, ..cpu.regs };
    cpu.runnable = true;
}
