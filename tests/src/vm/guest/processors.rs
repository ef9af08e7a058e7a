//! Further processors: they are started as kernels do, go to ring 3 as the first one did, and write
//! the log together, each when it is its turn.

use core::arch::global_asm;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use super::hardware::{LOCAL_APIC, load, print, print_number, put32, sleep, store, typed};
use super::{GENERATION, Guest, PAGE, WAKE};

/// Most processors.
const MOST: usize = 8;
/// Where a processor begins: a page that real mode reaches.
const BEGIN: u64 = 0x8000;
/// What each processor but the first has for itself: its task, then the stacks of ring 0 and 3.
const OWN: (u64, u64) = (0xe0_0000, 0x4000);
/// Segment descriptors: see the entry code.
const DESCRIPTORS: u64 = 0x20_6000;
/// What each processor writes in its spare time, and how many pages.
const SPARE: (u64, u64) = (0x100_0000, 128);
/// How often it is looked whether all processors have come.
const LOOKS: u32 = 50_000_000;

global_asm!(
    r#"
    .section .text
    // Real mode, in a copy at 0x8000.
    .code16
    .globl other_begin
other_begin:
    // Past what is loaded below, at 0x8002.
    .byte 0xeb, 6
    .word 0xff
    .long 0x206000
    cli
    cld
    xor eax, eax
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16
    .word 0x8002
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long other_protected
    .word 0x8
    .globl other_end
other_end:

    .code32
other_protected:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov edi, [0xfee00020]
    shr edi, 24
    mov esp, edi
    shl esp, 14
    add esp, 0xe02000
    mov eax, 0x200000
    mov cr3, eax
    mov eax, 0x620
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x101
    wrmsr
    mov eax, 0x80050033
    mov cr0, eax
    push 0x10
    lea eax, [other_long]
    push eax
    retf

    .code64
other_long:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    lidt [gates]
    mov eax, edi
    shl eax, 4
    add eax, 0x40
    ltr ax
    mov ebx, edi
    shl ebx, 14
    add ebx, 0xe03ff8
    push 0x2b
    push rbx
    push 0x3202
    push 0x33
    lea rax, [other_main]
    push rax
    iretq
"#
);

unsafe extern "C" {
    static other_begin: u8;
    static other_end: u8;
}

/// Processors that have come, a bit each.
static PRESENT: AtomicU32 = AtomicU32::new(1);
/// How many there are, and whose turn it is.
static COUNT: AtomicU32 = AtomicU32::new(1);
static TURN: AtomicU32 = AtomicU32::new(0);
/// What whoever has the turn may use.
static GUEST: AtomicPtr<Guest> = AtomicPtr::new(null_mut());
/// Numbers that each processor wrote to the log, and rounds over its pages after them.
static WRITTEN: [AtomicU64; MOST] = [const { AtomicU64::new(0) }; MOST];
static ROUNDS: [AtomicU64; MOST] = [const { AtomicU64::new(0) }; MOST];
/// Pages that did not hold what their processor had written.
static WRONG: AtomicU64 = AtomicU64::new(0);

/// Sends an interrupt by the local controller.
fn send(to: u32, what: u32) {
    put32(LOCAL_APIC + 0x310, to << 24);
    put32(LOCAL_APIC + 0x300, what);
}

/// Starts the processors up to so many, and gives back how many there are.
pub fn start(count: u64) -> u64 {
    /// The shorthand for all others; INIT, and the start at a page.
    const OTHERS: [u32; 2] = [0xc_4500, 0xc_4600];
    // A 32-bit code segment, to go through.
    store(DESCRIPTORS + 8, 0x00cf_9b00_0000_ffff);
    for cpu in 1..MOST as u64 {
        let task = OWN.0 + cpu * OWN.1;
        // Its stack of ring 0, in two parts, and no ports.
        store(task, (task + 0x2000) << 32);
        store(task + 0x60, 0x68 << 48);
        let at = DESCRIPTORS + 0x40 + cpu * 16;
        store(at, 0x67 | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24) << 56);
        store(at + 8, 0);
    }
    let (from, to) = (&raw const other_begin as u64, &raw const other_end as u64);
    (0..(to - from).div_ceil(8)).for_each(|i| store(BEGIN + i * 8, load(from + i * 8)));
    put32(LOCAL_APIC + 0xf0, 0x1ff);
    COUNT.store(count as u32, Ordering::SeqCst);
    send(0, OTHERS[0]);
    send(0, OTHERS[1] | (BEGIN >> 12) as u32);
    let present = || PRESENT.load(Ordering::SeqCst).count_ones();
    let mut looks = 0;
    while present() < count as u32 && looks < LOOKS {
        looks += 1;
        core::hint::spin_loop();
    }
    present().into()
}

#[unsafe(no_mangle)]
extern "C" fn other_main(cpu: u32) -> ! {
    put32(LOCAL_APIC + 0xf0, 0x1ff);
    PRESENT.fetch_or(1 << cpu, Ordering::SeqCst);
    loop {
        wait_turn(cpu);
        // SAFETY: whose turn it is has it alone, and it was set before the first turn.
        unsafe { (*GUEST.load(Ordering::SeqCst)).write_number() };
        pass_on(cpu);
    }
}

/// Sleeps until it is the turn of processor `cpu`.
fn wait_turn(cpu: u32) {
    loop {
        let turn = TURN.load(Ordering::SeqCst);
        if turn == cpu {
            return;
        }
        sleep(TURN.as_ptr(), turn);
    }
}

/// Gives the turn to the next one, and then writes pages of its own while others have theirs.
fn pass_on(cpu: u32) {
    let own = cpu as usize;
    let round = WRITTEN[own].fetch_add(1, Ordering::SeqCst);
    let next = (cpu + 1) % COUNT.load(Ordering::SeqCst);
    TURN.store(next, Ordering::SeqCst);
    if next != cpu {
        send(next, 0x4000 | WAKE);
    }
    for i in 0..SPARE.1 {
        let page = SPARE.0 + (u64::from(cpu) * SPARE.1 + i) * PAGE;
        WRONG.fetch_add(u64::from(load(page) != round), Ordering::SeqCst);
        store(page, round + 1);
    }
    ROUNDS[own].store(round + 1, Ordering::SeqCst);
}

impl Guest {
    /// As [`Guest::write_log`], with all processors in turn.
    pub fn write_log_together(&mut self) {
        GUEST.store(self, Ordering::SeqCst);
        while !typed() {
            if load(GENERATION) != self.generation {
                self.generation = load(GENERATION);
                self.tell_log("= forked");
            }
            self.write_number();
            pass_on(0);
            wait_turn(0);
        }
        let is_done = |(n, rounds): (&AtomicU64, &AtomicU64)| {
            n.load(Ordering::SeqCst) == rounds.load(Ordering::SeqCst)
        };
        while !WRITTEN.iter().zip(&ROUNDS).all(is_done) {
            core::hint::spin_loop();
        }
    }
}

/// Tells how many numbers each processor has written, and how many pages were wrong.
pub fn tell() {
    print("= wrong ");
    print_number(WRONG.load(Ordering::SeqCst));
    print(" numbers");
    for written in &WRITTEN[..COUNT.load(Ordering::SeqCst) as usize] {
        print(" ");
        print_number(written.load(Ordering::SeqCst));
    }
    print("\n");
}
