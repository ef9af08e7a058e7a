//! Registers, ports, memory, and the console as a place to print to.

use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};

/// First port of the serial line.
pub const SERIAL: u16 = 0x3f8;
pub const LOCAL_APIC: u64 = 0xfee0_0000;
pub const IO_APIC: u64 = 0xfec0_0000;

pub fn put32(at: u64, value: u32) {
    // SAFETY: a register of a device, which is no memory of this program.
    unsafe { asm!("mov [{a}], {v:e}", a = in(reg) at, v = in(reg) value, options(nostack)) }
}

pub fn put64(at: u64, value: u64) {
    // SAFETY: as in `put32`.
    unsafe { asm!("mov [{a}], {v}", a = in(reg) at, v = in(reg) value, options(nostack)) }
}

pub fn get32(at: u64) -> u32 {
    let value: u32;
    // SAFETY: as in `put32`.
    unsafe { asm!("mov {v:e}, [{a}]", a = in(reg) at, v = out(reg) value, options(nostack)) };
    value
}

pub fn out8(port: u16, value: u8) {
    // SAFETY: writing to a port touches no memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, nomem)) }
}

pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: reading a port touches no memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, nomem)) };
    value
}

pub fn load(at: u64) -> u64 {
    // SAFETY: the caller names an address of RAM that nothing else of the program lives in.
    unsafe { read_volatile(at as *const u64) }
}

pub fn store(at: u64, value: u64) {
    // SAFETY: as in `load`.
    unsafe { write_volatile(at as *mut u64, value) }
}

pub fn print(text: &str) {
    text.bytes().for_each(|byte| out8(SERIAL, byte));
}

pub fn print_number(mut value: u64) {
    let mut digits = [0; 20];
    let mut count = 0;
    loop {
        digits[count] = b'0' + (value % 10) as u8;
        count += 1;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    digits[..count].iter().rev().for_each(|digit| out8(SERIAL, *digit));
}

pub fn print_byte(value: u8) {
    for digit in [value >> 4, value & 15] {
        out8(SERIAL, if digit < 10 { b'0' + digit } else { b'a' + digit - 10 });
    }
}

pub fn typed() -> bool {
    in8(SERIAL + 5) & 1 != 0
}

/// Sleeps until an interrupt comes, unless the number at `watched` is another than `seen` or
/// something is typed and not read.
pub fn sleep(watched: *const u32, seen: u32) {
    // SAFETY: vector 3 reads the number, sleeps, and changes no register.
    unsafe { asm!("int3", in("rax") watched, in("ecx") seen) }
}

/// Has line `gsi` of the interrupt controller come as vector `vector`.
pub fn listen(gsi: u32, vector: u32) {
    put32(IO_APIC, 0x11 + gsi * 2);
    put32(IO_APIC + 0x10, 0);
    put32(IO_APIC, 0x10 + gsi * 2);
    put32(IO_APIC + 0x10, vector);
}

/// The clock of the processor, in ticks of its own.
pub fn clock() -> u64 {
    // SAFETY: every processor of this kind has it, and ring 3 may read it unless told otherwise.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Prints lines of 64 bytes, each with its number in 16 digits, in one access each.
pub fn flood(lines: u64) {
    for number in 0..lines {
        let mut line = [b'.'; 64];
        (line[0], line[1], line[63]) = (b'~', b' ', b'\n');
        (0..16).for_each(|i| line[2 + i] = b'0' + (number / 10u64.pow(15 - i as u32) % 10) as u8);
        // SAFETY: reads the line, which lives until the end.
        unsafe {
            asm!("rep outsb", in("dx") SERIAL, inout("rsi") line.as_ptr() => _,
                inout("rcx") line.len() => _, options(nostack, readonly));
        }
    }
}

/// KVM's clock in nanoseconds, which begins to be kept when it is first asked for.
pub fn kvm_clock() -> u64 {
    const AT: u64 = 0x20_7800;
    if load(AT) == 0 {
        // SAFETY: see the entry of vector 3; the clock's page is behind the task, and nobody's.
        unsafe { asm!("int3", in("rax") AT | 1) }
    }
    loop {
        let version = load(AT) as u32;
        let (stamp, time, scale) = (load(AT + 8), load(AT + 16), load(AT + 24));
        let ticks = clock().wrapping_sub(stamp);
        let (factor, shift) = (scale as u32, (scale >> 32) as i8);
        let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
        let passed = (u128::from(ticks) * u128::from(factor)) >> 32;
        if version & 1 == 0 && load(AT) as u32 == version {
            return time.wrapping_add(passed as u64);
        }
    }
}
