//! A guest for tests that boots as a kernel does, and does what is typed on its serial console.
//!
//! It enters by PVH, in 32-bit mode, sets up long mode, and goes to ring 3 for good: so it runs the
//! same under every KVM, including those that emulate ring 0. Ring 0 uses general registers only.
//! Registers of devices are accessed by plain `mov` of general registers, in assembly: compilers
//! like to use vector registers, which emulators do not know there.
//!
//! A command is a letter, with numbers after it, and a new line. An answer is a line that begins
//! with `= `. What they mean is at `obey`.

#![no_std]
#![no_main]

mod hardware;
mod net;
mod processors;
mod virtio;
mod work;

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

use hardware::{
    LOCAL_APIC, SERIAL, flood, get32, in8, kvm_clock, listen, load, out8, print, print_byte,
    print_number, put32, sleep, store, typed,
};
use net::Card;
use virtio::{Device, EMPTY, Queue};

global_asm!(
    r#"
    .section .note.entry,"a"
    .long 4, 4, 18
    .asciz "Xen"
    .long _start

    // Page tables: 4 GiB, each address at itself, in pages of 2 MiB that ring 3 may write.
    .section .tables,"aw"
    .quad 0x201067
    .fill 511, 8, 0
    .quad 0x202067, 0x203067, 0x204067, 0x205067
    .fill 508, 8, 0
    .set i, 0
    .rept 2048
    .quad (i << 21) + 0xe7
    .set i, i + 1
    .endr
    // Segments, at 0x206000: code and data of ring 0, data and code of ring 3, the task; room for
    // those of further processors.
    .quad 0, 0
    .quad 0x00af9b000000ffff, 0x00cf93000000ffff
    .quad 0
    .quad 0x00cff3000000ffff, 0x00affb000000ffff
    .quad 0
    .quad 0x00008920700003ff, 0
    .fill 502, 8, 0
    // The task, at 0x207000: stack of ring 0, and a bitmap of ports that are all open.
    .long 0
    .quad 0x20a000
    .fill 0x5a, 1, 0
    .word 0x68
    .fill 0xf98, 1, 0
    // Interrupt gates, at 0x208000.
    .fill 512, 8, 0
    // The stack of ring 0, to 0x20a000, and that of ring 3, to 0x20c000.
    .fill 0x3000, 1, 0

    .section .text.start,"ax"
    .code32
    .globl _start
_start:
    cli
    cld
    mov esp, 0x20a000
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
    lgdt [descriptor]
    push 0x10
    lea eax, [long_mode]
    push eax
    retf

    .balign 8
descriptor:
    .word 0xff
    .long 0x206000
    .globl gates
gates:
    .word 0xfff
    .quad 0x208000

    .code64
long_mode:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov rsp, 0x20a000
    // The old interrupt controllers say nothing.
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    // Gate 3 for ring 3, gate 0x41 for all that is only to end a sleep.
    lea rax, [sleep_entry]
    mov rbx, 0x208030
    mov rcx, 0xee0000100000
    call gate
    lea rax, [wake_entry]
    mov rbx, 0x208410
    mov rcx, 0x8e0000100000
    call gate
    // Gate 0x42 for the power button.
    lea rax, [button_entry]
    mov rbx, 0x208420
    mov rcx, 0x8e0000100000
    call gate
    lidt [gates]
    mov eax, 0x40
    ltr ax
    // As after a call, which functions expect of the stack.
    push 0x2b
    push 0x20bff8
    push 0x3202
    push 0x33
    lea rax, [guest_main]
    push rax
    iretq
gate:
    mov rdx, rax
    and rdx, 0xffff
    or rdx, rcx
    shr rax, 16
    shl rax, 48
    or rdx, rax
    mov [rbx], rdx
    ret

wake_entry:
    push rax
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq

    // The power button: off.
button_entry:
    mov edx, 0x600
    mov al, 0x34
    out dx, al
    jmp button_entry

    // int3 from ring 3: sleep until an interrupt comes, unless the number at rax is not ecx any
    // more or something is typed. Looked at here, where no interrupt can come between look and
    // sleep. An odd address is no number's: it has KVM's clock begin in front of it.
sleep_entry:
    push rax
    push rdx
    test al, 1
    jnz 3f
    cmp dword ptr [rax], ecx
    jne 2f
    mov edx, 0x3fd
    in al, dx
    test al, 1
    jnz 2f
    sti
    hlt
    cli
2:
    pop rdx
    pop rax
    iretq
3:
    push rcx
    mov ecx, 0x4b564d01
    xor edx, edx
    wrmsr
    pop rcx
    jmp 2b
"#
);

/// The vector whose handler does nothing.
const WAKE: u32 = 0x41;
const POWER: u16 = 0x600;
/// The first disk: the device before it is the random number generator.
const DISK: u64 = 0xd800_1000;
const DISK_LINE: u32 = 8;
const RANDOM: u64 = 0xd800_0000;
const IDENTITY: u64 = 0xd810_0000;
const GENERATION: u64 = 0xf_f000;
const GENERATION_LINE: u32 = 5;
/// Sectors of the log on the disk, and the first one.
const LOG: (u64, u64) = (16, 8);
const PAGE: u64 = 4096;

fn next_byte() -> u8 {
    static NOTHING: u32 = 0;
    while !typed() {
        sleep(&raw const NOTHING, 0);
    }
    in8(SERIAL)
}

/// The feature with which a write may be done before it is durable.
const FLUSH: u32 = 1 << 9;
static mut DISK_QUEUE: Queue = EMPTY;
static mut RANDOM_QUEUE: Queue = EMPTY;

/// What this program knows.
struct Guest {
    disk: Option<Device>,
    card: Option<Card>,
    random: Device,
    /// The last number that is on the disk.
    number: u64,
    generation: u64,
    /// When it last found itself another machine, and when that one's first number was on the disk.
    forked: [u64; 2],
}

/// Whether the log on the disk has what it should: the last number in each sector of the log.
/// Gives back the newest number on the disk, and how many sectors are wrong.
fn check_log(disk: &mut Device, number: u64) -> (u64, u64) {
    let (mut newest, mut wrong) = (0, 0);
    for i in 0..LOG.0 {
        let found = disk.sector(LOG.1 + i, None);
        newest = if found > newest { found } else { newest };
        // The last number up to `number` that goes there.
        let back = (number + LOG.0 - i) % LOG.0;
        let expected = number.saturating_sub(back);
        // Nothing was written there yet: there may be what another machine wrote.
        let older = number <= back;
        // One more may have been on its way.
        let next = found == number + 1 && (number + 1) % LOG.0 == i;
        wrong += u64::from(!(found == expected || older || next));
    }
    (newest, wrong)
}

impl Guest {
    fn tell_log(&mut self, word: &str) {
        let number = self.number;
        let Some(disk) = &mut self.disk else { return print("= no disk\n") };
        let (newest, wrong) = check_log(disk, number);
        print(word);
        print(" ram ");
        print_number(number);
        print(" disk ");
        print_number(newest);
        print(" wrong ");
        print_number(wrong);
        print("\n");
    }

    /// Writes numbers, to the disk and then to memory, until something is typed. Who finds itself
    /// another machine looks at once whether disk and memory are of one instant.
    fn write_log(&mut self) {
        while !typed() {
            for _ in 0..16 {
                if load(GENERATION) != self.generation {
                    self.generation = load(GENERATION);
                    self.tell_log("= forked");
                }
                self.write_number();
            }
        }
    }

    /// Writes the next number of the log.
    fn write_number(&mut self) {
        let number = self.number + 1;
        let Some(disk) = &mut self.disk else { return };
        disk.sector(LOG.1 + number % LOG.0, Some(number));
        self.number = number;
    }

    fn tell_identity(&self) {
        print("= name ");
        let mut i = 0x80;
        while i < 0x100 {
            let word = get32(IDENTITY + i).to_le_bytes();
            word.iter().filter(|byte| **byte != 0).for_each(|byte| out8(SERIAL, *byte));
            i += 4;
        }
        let parts = [(" generation ", 0x10, 16), (" mac ", 0x30, 6), (" seed ", 0x40, 32)];
        for (word, at, bytes) in parts {
            print(word);
            for i in 0..bytes {
                let four = get32(IDENTITY + ((at + i) & !3));
                print_byte((four >> (8 * ((at + i) & 3))) as u8);
            }
        }
        print("\n");
    }
}

/// A number of a command.
fn number(line: &[u8], nth: usize) -> u64 {
    let mut words = line.split(|byte| *byte == b' ').skip(nth + 1);
    let digits = words.next().unwrap_or(&[]);
    digits.iter().fold(0, |value, digit| value * 10 + u64::from(digit.wrapping_sub(b'0')))
}

fn told(value: u64) {
    print("= ");
    print_number(value);
    print("\n");
}

/// What has to do with the network card.
fn obey_card(guest: &mut Guest, line: &[u8]) {
    let Some(card) = &mut guest.card else { return print("= no card\n") };
    match line[0] {
        // Frames, bytes: sends so many of that size.
        b'h' => {
            card.send_numbers(number(line, 0), number(line, 1));
            card.tell();
        }
        // Sends back what comes, until something is typed.
        b'j' => card.echo(),
        // Takes the address from the card, as a driver that starts does.
        b'z' => {
            card.read_address();
            card.tell();
        }
        // Starts the card anew.
        b'u' => {
            *card = Card::start(card.at());
            card.tell();
        }
        _ => card.tell(),
    }
}

/// What has to do with the disk alone.
fn obey_disk(guest: &mut Guest, line: &[u8]) {
    let [a, b, c] = [0, 1, 2].map(|nth| number(line, nth));
    match line[0] {
        // Sector, value: writes it. Sector: reads it.
        b'p' => {
            if let Some(disk) = &mut guest.disk {
                disk.sector(a, Some(b));
            }
            told(b);
        }
        b'g' => told(guest.disk.as_mut().map_or(0, |disk| disk.sector(a, None))),
        // Address, pages: reads pages of the disk into memory until something is typed.
        b'l' => {
            print("= reading\n");
            guest.read_into_memory(a, b);
        }
        // Address, groups, blocks: reads blocks of the disk to memory until something is typed.
        _ => told(guest.read_disk(a, b, c)),
    }
}

/// What has to do with further processors.
fn obey_together(guest: &mut Guest, line: &[u8]) {
    match line[0] {
        // Processors: starts them; gives back how many there are.
        b'P' => told(processors::start(number(line, 0))),
        // Writes the log with all of them, until something is typed.
        b'W' => {
            print("= writing\n");
            guest.write_log_together();
            guest.tell_log("= wrote");
        }
        // How much each has written.
        _ => processors::tell(),
    }
}

fn obey(guest: &mut Guest, line: &[u8]) {
    let [a, b, c] = [0, 1, 2].map(|nth| number(line, nth));
    match line.first() {
        // Write the log until something is typed.
        Some(b'w') => {
            print("= writing\n");
            guest.write_log();
            guest.tell_log("= wrote");
        }
        Some(b'N' | b'P' | b'W') => obey_together(guest, line),
        // Compare the log on the disk with memory.
        Some(b'c') => guest.tell_log("= log"),
        // Who am I.
        Some(b'i') => guest.tell_identity(),
        // A random number.
        Some(b'n') => told(guest.random.random()),
        // Address, pages, value: writes `value + i` into page i.
        Some(b'f') => {
            (0..b).for_each(|i| store(a + i * PAGE, c.wrapping_add(i)));
            told(b);
        }
        // Address, pages: a sum of the pages' numbers, each with its place.
        Some(b's') => told(
            (0..b).fold(0, |sum: u64, i| sum.wrapping_add(load(a + i * PAGE).wrapping_mul(i + 1))),
        ),
        // Microseconds: writes the log, a number in each such time, until something is typed.
        Some(b'e') => {
            print("= writing\n");
            guest.write_log_slowly(a);
            guest.tell_log("= wrote");
        }
        // Numbers: writes that many to the log.
        Some(b'd') => told(guest.write_numbers(a)),
        // The clock of now, and those of the last fork. KVM's clock, in nanoseconds.
        Some(b'k') => guest.tell_clock(),
        Some(b'K') => told(kvm_clock()),
        // Address, pages, ticks: writes pages until something is typed, and notes how many every
        // so many ticks. Ticks, ticks: how many in between, as far as it is noted.
        Some(b'm') => {
            print("= writing\n");
            told(work::write_memory(a, b, c));
        }
        Some(b'y') => told(work::pages_written(a, b)),
        // Lines: floods the console with so many, each with its number.
        Some(b'x') => {
            flood(a);
            told(a);
        }
        // Takes the identity: says so to the host.
        Some(b'a') => net::acknowledge(),
        Some(b'g' | b'l' | b'p' | b'q') => obey_disk(guest, line),
        Some(b'h' | b'j' | b'u' | b'v' | b'z') => obey_card(guest, line),
        // Listens to the power button, and obeys it, or with another number than 0 does not.
        Some(b'b') => {
            listen(6, if a == 0 { 0x42 } else { WAKE });
            told(a);
        }
        // Powers off, resets, faults.
        Some(b'o') => out8(POWER, 5 << 2 | 1 << 5),
        Some(b'r') => out8(POWER + 2, 1),
        Some(b't') => {
            (0..512).for_each(|i| store(0x20_8000 + i * 8, 0));
            // SAFETY: not safe at all, and meant so.
            unsafe { asm!("ud2") }
        }
        _ => print("= what\n"),
    }
}

fn is_card(at: &u64) -> bool {
    get32(*at) == 0x7472_6976 && get32(*at + 8) == 1
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    // What is typed comes as vector 0x41.
    put32(LOCAL_APIC + 0xf0, 0x1ff);
    listen(4, WAKE);
    out8(SERIAL + 1, 1);
    let has_disk = get32(DISK + 8) == 2;
    let mut guest = Guest {
        disk: has_disk.then(|| Device::start(DISK, &raw mut DISK_QUEUE, 0)),
        card: [DISK, DISK + 0x1000].into_iter().find(is_card).map(Card::start),
        random: Device::start(RANDOM, &raw mut RANDOM_QUEUE, 0),
        number: 0,
        generation: load(GENERATION),
        forked: [0; 2],
    };
    print("= ready\n");
    let mut line = [0; 64];
    let mut length = 0;
    loop {
        match next_byte() {
            b'\n' if length > 0 => {
                obey(&mut guest, &line[..length]);
                length = 0;
            }
            b'\n' => {}
            byte => {
                line[length] = byte;
                length = (length + 1) % line.len();
            }
        }
    }
}

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    print("= panic\n");
    loop {}
}
