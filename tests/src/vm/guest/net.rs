//! A network card: frames with a number, and whoever answers them.
//!
//! The driver takes what the link is only from the configuration, as drivers do, and never looks
//! at it unless it is told to.

use core::ptr::{read_volatile, write_volatile};

use super::hardware::{get32, out8, print, print_byte, print_number, put32, put64, typed};
use super::hardware::SERIAL;
use super::{IDENTITY, told};

const RING: usize = 16;
const BUFFER: usize = 2048;
/// The header before each frame.
const HEADER: usize = 12;
/// Bytes of a frame that is sent, at most.
const SENT_MAX: usize = 16_384;
/// Addresses and type.
const ETHERNET: usize = 14;
/// The type of frames that are this program's.
const TYPE: [u8; 2] = [0x88, 0xb5];
/// Address, status, and frames in several buffers.
const FEATURES: u32 = 1 << 5 | 1 << 16 | 1 << 15;

/// One direction of a card, as the device sees it.
#[repr(C, align(4096))]
struct Ring {
    descriptors: [[u64; 2]; RING],
    available: [u16; 32],
    used: [u32; 64],
}

/// Memory that the card and this program share.
#[repr(C, align(4096))]
struct Shared {
    rings: [Ring; 2],
    received: [[u8; BUFFER]; RING],
    sent: [u8; HEADER + SENT_MAX],
}

const EMPTY: Ring = Ring { descriptors: [[0; 2]; RING], available: [0; 32], used: [0; 64] };
static mut SHARED: Shared = Shared {
    rings: [EMPTY, EMPTY],
    received: [[0; BUFFER]; RING],
    sent: [0; HEADER + SENT_MAX],
};

/// A network card.
pub struct Card {
    at: u64,
    shared: *mut Shared,
    /// Buffers that were offered, and chains that were sent; what of both came back.
    offered: [u16; 2],
    used: [u16; 2],
    address: [u8; 6],
    /// Frames that came, their bytes, and how many had another content than they should.
    got: [u64; 3],
    sent: u64,
}

impl Card {
    /// Starts the card at `at`.
    pub fn start(at: u64) -> Card {
        put32(at + 0x70, 0);
        put32(at + 0x70, 3);
        put32(at + 0x24, 0);
        put32(at + 0x20, FEATURES);
        put32(at + 0x24, 1);
        put32(at + 0x20, 1);
        put32(at + 0x70, 11);
        let shared = &raw mut SHARED;
        for (i, number) in [0usize, 1].into_iter().zip([0, 1]) {
            // SAFETY: only addresses are made.
            let ring = unsafe { &raw mut (*shared).rings[i] };
            // SAFETY: nobody else has the ring, and a device that was reset has forgotten it.
            let places = unsafe {
                write_volatile(&raw mut (*ring).available[1], 0);
                write_volatile(&raw mut (*ring).used[0], 0);
                [
                    (0x80, &raw const (*ring).descriptors as u64),
                    (0x90, &raw const (*ring).available as u64),
                    (0xa0, &raw const (*ring).used as u64),
                ]
            };
            put32(at + 0x30, number);
            put32(at + 0x38, RING as u32);
            for (register, place) in places {
                put32(at + register, place as u32);
                put32(at + register + 4, 0);
            }
            put32(at + 0x44, 1);
        }
        put32(at + 0x70, 15);
        let mut card = Card {
            at,
            shared,
            offered: [0; 2],
            used: [0; 2],
            address: [0; 6],
            got: [0; 3],
            sent: 0,
        };
        card.read_address();
        (0..RING).for_each(|i| card.offer(i));
        card
    }

    /// Where its registers are.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Takes the address from the configuration.
    pub fn read_address(&mut self) {
        let words = [get32(self.at + 0x100), get32(self.at + 0x104)];
        let mut i = 0;
        while i < 6 {
            self.address[i] = (words[i / 4] >> (8 * (i % 4))) as u8;
            i += 1;
        }
    }

    fn post(&mut self, ring: usize, index: usize) {
        let slot = usize::from(self.offered[ring]) % RING;
        self.offered[ring] = self.offered[ring].wrapping_add(1);
        // SAFETY: the ring is this card's; the device reads the index after the entry, because
        // stores are seen in their order on this machine.
        unsafe {
            let ring = &raw mut (*self.shared).rings[ring];
            write_volatile(&raw mut (*ring).available[2 + slot], index as u16);
        }
        let next = self.offered[ring];
        // SAFETY: as above.
        unsafe { write_volatile(&raw mut (*self.shared).rings[ring].available[1], next) };
        put32(self.at + 0x50, ring as u32);
    }

    /// Offers receive buffer `i`.
    fn offer(&mut self, i: usize) {
        // SAFETY: the buffer is not with the device.
        unsafe {
            let at = &raw const (*self.shared).received[i] as u64;
            let descriptor = &raw mut (*self.shared).rings[0].descriptors[i];
            write_volatile(descriptor, [at, BUFFER as u64 | 2 << 32]);
        }
        self.post(0, i);
    }

    /// What came back next in a ring: number and bytes.
    fn next_used(&mut self, ring: usize) -> Option<(usize, usize)> {
        // SAFETY: the device writes it.
        let index = unsafe { read_volatile(&raw const (*self.shared).rings[ring].used[0]) } >> 16;
        if index == u32::from(self.used[ring]) {
            return None;
        }
        let slot = usize::from(self.used[ring]) % RING;
        self.used[ring] = self.used[ring].wrapping_add(1);
        // SAFETY: as above.
        let entry = unsafe {
            let ring = &raw const (*self.shared).rings[ring];
            [
                read_volatile(&raw const (*ring).used[1 + 2 * slot]),
                read_volatile(&raw const (*ring).used[2 + 2 * slot]),
            ]
        };
        Some((entry[0] as usize % RING, entry[1] as usize))
    }

    fn put(&mut self, at: usize, byte: u8) {
        // SAFETY: the buffer is not with the device.
        unsafe { write_volatile(&raw mut (*self.shared).sent[at], byte) };
    }

    fn received(&self, buffer: usize, at: usize) -> u8 {
        // SAFETY: the buffer came back from the device.
        unsafe { read_volatile(&raw const (*self.shared).received[buffer][at]) }
    }

    /// Sends what is in the buffer, and waits until it is gone.
    fn send(&mut self, bytes: usize) {
        (0..HEADER).for_each(|i| self.put(i, 0));
        // SAFETY: as in `put`.
        unsafe {
            let at = &raw const (*self.shared).sent as u64;
            let descriptor = &raw mut (*self.shared).rings[1].descriptors[0];
            write_volatile(descriptor, [at, (HEADER + bytes) as u64]);
        }
        self.post(1, 0);
        while self.next_used(1).is_none() {
            core::hint::spin_loop();
        }
        self.sent += 1;
    }

    /// Sends `count` frames of `bytes` bytes: to everybody, from the address, with a number of 8
    /// bytes, and after it bytes that follow from the number.
    pub fn send_numbers(&mut self, count: u64, bytes: u64) {
        for _ in 0..count {
            let number = self.sent;
            let address = self.address;
            (0..6).for_each(|i| self.put(HEADER + i, 0xff));
            (0..6).for_each(|i| self.put(HEADER + 6 + i, address[i]));
            (0..2).for_each(|i| self.put(HEADER + 12 + i, TYPE[i]));
            let mut i = 0;
            while i < bytes as usize - ETHERNET {
                let byte = if i < 8 { (number >> (8 * i)) as u8 } else { number as u8 ^ i as u8 };
                self.put(HEADER + ETHERNET + i, byte);
                i += 1;
            }
            self.send(bytes as usize);
        }
    }

    /// Takes the next frame into the buffer for sending, with the addresses exchanged; gives back
    /// its bytes. Frames of another type are dropped.
    fn take(&mut self) -> Option<usize> {
        let (mut buffer, mut here) = self.next_used(0)?;
        let buffers = self.received(buffer, 10);
        let (mut bytes, mut from) = (0, HEADER);
        for i in 0..buffers {
            if i > 0 {
                loop {
                    if let Some(next) = self.next_used(0) {
                        (buffer, here) = next;
                        break;
                    }
                }
            }
            while from < here {
                // The sender's address is where the answer goes to.
                let at = if bytes < 12 { (bytes + 6) % 12 } else { bytes };
                let byte = self.received(buffer, from);
                self.put(HEADER + at, byte);
                (bytes, from) = (bytes + 1, from + 1);
            }
            from = 0;
            self.offer(buffer);
        }
        let ours = (0..2).all(|i| self.sent_byte(12 + i) == TYPE[i]);
        ours.then_some(bytes)
    }

    fn sent_byte(&self, at: usize) -> u8 {
        // SAFETY: the buffer is not with the device.
        unsafe { read_volatile(&raw const (*self.shared).sent[HEADER + at]) }
    }

    /// Answers frames until something is typed: sends each back.
    pub fn echo(&mut self) {
        print("= echoing\n");
        while !typed() {
            let Some(bytes) = self.take() else { continue };
            let number = self.sent_byte(ETHERNET);
            let right = |i: &usize| self.sent_byte(ETHERNET + i) == number ^ *i as u8;
            let wrong = (8..bytes - ETHERNET).filter(|i| !right(i)).count();
            self.got[0] += 1;
            self.got[1] += bytes as u64;
            self.got[2] += u64::from(wrong > 0);
            let address = self.address;
            (0..6).for_each(|i| self.put(HEADER + 6 + i, address[i]));
            self.send(bytes);
        }
        self.tell();
    }

    /// Looks at the link, and says how it is and what passed.
    pub fn tell(&mut self) {
        print("= link ");
        print_number(u64::from(get32(self.at + 0x104) >> 16 & 1));
        print(" address ");
        self.address.iter().for_each(|byte| print_byte(*byte));
        let words = [(" got ", self.got[0]), (" bytes ", self.got[1]), (" wrong ", self.got[2])];
        for (word, value) in words.into_iter().chain([(" sent ", self.sent)]) {
            print(word);
            print_number(value);
        }
        print(" cause ");
        print_number(u64::from(get32(self.at + 0x60)));
        out8(SERIAL, b'\n');
    }
}

/// Says to the host that this machine has taken its identity.
pub fn acknowledge() {
    let half = [get32(IDENTITY + 0x10), get32(IDENTITY + 0x14)];
    put64(IDENTITY + 8, u64::from(half[0]) | u64::from(half[1]) << 32);
    told(u64::from(half[0]));
}
