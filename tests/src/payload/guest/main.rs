//! A guest for tests: a program in ring 3 of long mode that does what its panel says.
//!
//! Ring 0 is a few lines of assembly that use general registers only, so that the program runs
//! the same under every KVM, including those that emulate ring 0. What it relies on of the machine
//! is set up by its loader (`offshoot_tests::payload`); addresses and numbers must agree with it.
//!
//! Memory-mapped registers are accessed by plain `mov` of general registers, in assembly: compilers
//! like to use vector registers, which emulators do not know there.

#![no_std]
#![no_main]

mod registers;

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;
use core::ptr::{read_volatile, write_volatile};

global_asm!(
    r#"
    .section .text.start,"ax"
    .globl _start
_start:
    jmp guest_main

    // Vector 0x40: the local timer.
    .globl timer_entry
timer_entry:
    push rax
    lock inc qword ptr [TICKS]
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq

    // Vector 0x41: the interrupt line.
    .globl line_entry
line_entry:
    push rax
    lock inc qword ptr [LINES]
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq

    // Vector 3, reached by int3 from ring 3: sleep until an interrupt came, unless the counter at
    // rax has reached rcx. Looked at here, where no interrupt can come between look and sleep.
    .globl sleep_entry
sleep_entry:
    cmp qword ptr [rax], rcx
    jae 2f
    sti
    hlt
    cli
2:
    iretq
"#
);

/// Ticks of the local timer so far.
#[unsafe(no_mangle)]
pub static mut TICKS: u64 = 0;
/// Interrupts of the line so far.
#[unsafe(no_mangle)]
pub static mut LINES: u64 = 0;

const PANEL: u64 = 0xd000_0000;
const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
const PAGE: u64 = 4096;

// Registers of a panel.
const OPCODE: u64 = 0x00;
const ARGUMENT: u64 = 0x08;
const RESULT: u64 = 0x20;
const SEQUENCE: u64 = 0x28;
const PANIC: u64 = 0x30;
const POWER_OFF: u64 = 0x38;
const RESET: u64 = 0x40;
const IDENTITY: u64 = 0x48;
const DOORBELL: u64 = 0x50;
const SEQUENCE_PORT: u16 = 0x120;

fn put(at: u64, value: u64) {
    // SAFETY: a register of the panel, which is no memory of this program.
    unsafe { asm!("mov [{a}], {v}", a = in(reg) at, v = in(reg) value, options(nostack)) }
}

fn put32(at: u64, value: u32) {
    // SAFETY: a register of a device, which is no memory of this program.
    unsafe { asm!("mov [{a}], {v:e}", a = in(reg) at, v = in(reg) value, options(nostack)) }
}

fn get(at: u64) -> u64 {
    let value: u64;
    // SAFETY: a register of the panel, which is no memory of this program.
    unsafe { asm!("mov {v}, [{a}]", a = in(reg) at, v = out(reg) value, options(nostack)) };
    value
}

fn port(number: u16) -> u32 {
    let value: u32;
    // SAFETY: reading a port touches no memory.
    unsafe { asm!("in eax, dx", in("dx") number, out("eax") value, options(nostack, nomem)) };
    value
}

fn put_port(number: u16, value: u8) {
    // SAFETY: writing a port touches no memory of this program.
    unsafe { asm!("out dx, al", in("dx") number, in("al") value, options(nostack, nomem)) }
}

fn load(at: u64) -> u64 {
    // SAFETY: the caller names an address of RAM that nothing else of the program lives in.
    unsafe { read_volatile(at as *const u64) }
}

fn store(at: u64, value: u64) {
    // SAFETY: as in `load`.
    unsafe { write_volatile(at as *mut u64, value) }
}

fn sleep_below(which: *const u64, count: u64) {
    // SAFETY: vector 3 reads the counter and changes no register.
    unsafe { asm!("int3", in("rax") which, in("rcx") count) }
}

/// Writes `from`, `from + 1`, ... as a number into every page, over and over, until the word at
/// `stop` is not zero. Each page has it in its first word, and mixed with the page in its last.
fn write_pages(first: u64, pages: u64, stop: u64) -> u64 {
    let mut number = 1;
    loop {
        for page in 0..pages {
            let at = first + page * PAGE;
            store(at, number);
            store(at + PAGE - 8, number ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            if load(stop) != 0 {
                return number;
            }
        }
        number += 1;
    }
}

/// A sum over the first word of every page that depends on their order.
fn sum_pages(first: u64, pages: u64) -> u64 {
    (0..pages).fold(0xcbf2_9ce4_8422_2325, |sum: u64, page| {
        (sum ^ load(first + page * PAGE)).wrapping_mul(0x100_0000_01b3)
    })
}

fn fill_pages(first: u64, pages: u64, value: u64) -> u64 {
    (0..pages).for_each(|page| store(first + page * PAGE, value.wrapping_add(page)));
    pages
}

/// Reads a sequence whose every reading is one more than the last, by memory or by port.
fn follow(panel: u64, count: u64, by_port: bool) -> u64 {
    let next = || if by_port { u64::from(port(SEQUENCE_PORT)) } else { get(panel + SEQUENCE) };
    let mut last = next();
    for _ in 0..count {
        let now = next();
        if now != last + 1 {
            put(panel + PANIC, now << 32 | last);
        }
        last = now;
    }
    last
}

/// Arithmetic in general and vector registers.
fn spin(rounds: u64) -> u64 {
    let (mut x, mut sum) = (1u64, 0f64);
    for _ in 0..rounds {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        sum += (x >> 40) as f64 * 0.5;
    }
    x ^ sum.to_bits()
}

/// Changes words of memory that the words before decided, over and over; a sum of what it saw.
fn churn_pages(first: u64, pages: u64, rounds: u64) -> u64 {
    let (mut x, mut sum) = (pages, 0u64);
    for round in 0..rounds {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = first + (x >> 33) % pages * PAGE + (x >> 20) % 512 * 8;
        let old = load(at);
        sum = sum.rotate_left(5) ^ old;
        store(at, (old ^ sum).wrapping_add(round));
        x ^= old;
    }
    sum
}

/// Does what a program in ring 3 must not, and how the processor says so.
fn fault(kind: u64) {
    match kind {
        // Vector 0: division by zero.
        // SAFETY: meant to fault, here and below; nothing comes after it.
        0 => unsafe { asm!("div {z:e}", z = in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _) },
        // Vector 6: no instruction.
        // SAFETY: as above.
        6 => unsafe { asm!("ud2") },
        // Vector 13: for ring 0 only.
        // SAFETY: as above.
        13 => unsafe { asm!("hlt") },
        // Vector 14: an address that is nowhere.
        _ => store(1 << 40, kind),
    }
}

/// What the processor says about itself: EAX, EBX, ECX or EDX.
fn told_by_processor(leaf: u64, part: u64, register: u64) -> u64 {
    let told = core::arch::x86_64::__cpuid_count(leaf as u32, part as u32);
    [told.eax, told.ebx, told.ecx, told.edx][register as usize & 3].into()
}

fn time_stamp() -> u64 {
    // SAFETY: this machine has the counter, and lets ring 3 read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Has the local timer tick every `count` counts, on vector 0x40.
fn start_timer(count: u64) {
    put32(LOCAL_APIC + 0xf0, 0x1ff);
    put32(LOCAL_APIC + 0x3e0, 0xb);
    put32(LOCAL_APIC + 0x320, 0x20040);
    put32(LOCAL_APIC + 0x380, count as u32);
}

/// Has interrupt line `gsi` come as vector 0x41, and from the I/O controller only.
fn open_line(gsi: u64) {
    put_port(0x21, 0xff);
    put_port(0xa1, 0xff);
    put32(LOCAL_APIC + 0xf0, 0x1ff);
    put32(IO_APIC, 0x11 + gsi as u32 * 2);
    put32(IO_APIC + 0x10, 0);
    put32(IO_APIC, 0x10 + gsi as u32 * 2);
    put32(IO_APIC + 0x10, 0x41);
}

fn counter(which: *const u64) -> u64 {
    // SAFETY: a static of this program that only the handlers change.
    unsafe { read_volatile(which) }
}

fn wait_for(which: *const u64, count: u64) -> u64 {
    while counter(which) < count {
        sleep_below(which, count);
    }
    counter(which)
}

/// Does what the panel says, and returns the answer.
fn obey(panel: u64, opcode: u64, [a, b, c]: [u64; 3]) -> u64 {
    match opcode {
        1 => return fill_pages(a, b, c),
        2 => return sum_pages(a, b),
        3 => return write_pages(a, b, c),
        4 => return follow(panel, a, b != 0),
        5 => return spin(a),
        6 => start_timer(a),
        7 => return wait_for(&raw const TICKS, a),
        8 => open_line(a),
        9 => return wait_for(&raw const LINES, a),
        10 => return counter(&raw const LINES),
        11 => return get(panel + IDENTITY),
        12 => {
            // Zeroes over all gates: the next fault finds none, nor does that fault.
            (0..b).for_each(|i| store(a + i * 8, 0));
            // SAFETY: not safe at all, and meant so.
            unsafe { asm!("ud2") }
        }
        13 => put(panel + POWER_OFF, 0),
        14 => put(panel + RESET, 0),
        15 => put32(panel + DOORBELL, a as u32),
        16 => return registers::live(a, b),
        17 => return churn_pages(a, b, c),
        18 => fault(a),
        19 => return told_by_processor(a, b, c),
        20 => return time_stamp(),
        other => put(panel + PANIC, other),
    }
    0
}

#[unsafe(no_mangle)]
extern "C" fn guest_main(cpu: u64) -> ! {
    let panel = PANEL + cpu * PAGE;
    loop {
        let opcode = get(panel + OPCODE);
        if opcode == 0 {
            core::hint::spin_loop();
            continue;
        }
        let arguments = [0, 8, 16].map(|i| get(panel + ARGUMENT + i));
        put(panel + RESULT, obey(panel, opcode, arguments));
    }
}

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    loop {
        put(PANEL + PANIC, u64::MAX);
    }
}
