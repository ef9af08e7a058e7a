//! Virtio devices: a disk, and a source of random numbers.

use core::ptr::{read_volatile, write_volatile};

use super::hardware::{listen, load, print, put32, sleep};

/// Memory that a virtio device and this program share.
#[repr(C, align(4096))]
pub struct Queue {
    descriptors: [[u64; 2]; 8],
    available: [u16; 16],
    used: [u32; 32],
    head: [u64; 2],
    data: [u64; 64],
    status: u64,
}

pub const EMPTY: Queue = Queue {
    descriptors: [[0; 2]; 8],
    available: [0; 16],
    used: [0; 32],
    head: [0; 2],
    data: [0; 64],
    status: 0,
};

/// A virtio device with one queue, which is looked at until it is done.
pub struct Device {
    at: u64,
    queue: *mut Queue,
    sent: u16,
    /// Whether its interrupt is waited for in between.
    sleeps: bool,
}

impl Device {
    /// Starts a device that begins anew, with version 1 and these features.
    pub fn start(at: u64, queue: *mut Queue, features: u32) -> Device {
        put32(at + 0x70, 0);
        // SAFETY: nobody else has the queue, and a device that was reset has forgotten it.
        unsafe {
            write_volatile(&raw mut (*queue).available[1], 0);
            write_volatile(&raw mut (*queue).used[0], 0);
        }
        put32(at + 0x70, 3);
        put32(at + 0x24, 0);
        put32(at + 0x20, features);
        put32(at + 0x24, 1);
        put32(at + 0x20, 1);
        put32(at + 0x70, 11);
        put32(at + 0x30, 0);
        put32(at + 0x38, 8);
        // SAFETY: only addresses are made.
        let places = unsafe {
            [
                (0x80, &raw const (*queue).descriptors as u64),
                (0x90, &raw const (*queue).available as u64),
                (0xa0, &raw const (*queue).used as u64),
            ]
        };
        for (register, place) in places {
            put32(at + register, place as u32);
            put32(at + register + 4, 0);
        }
        put32(at + 0x44, 1);
        put32(at + 0x70, 15);
        Device { at, queue, sent: 0, sleeps: false }
    }

    /// Makes descriptor `i` of a buffer; flag 1 for one more after it, 2 for one to be written.
    fn describe(&mut self, i: usize, address: u64, bytes: u64, flags: u64) {
        let next = (i as u64 + 1) << 48;
        // SAFETY: the queue is this device's, and nothing is in flight.
        unsafe {
            write_volatile(
                &raw mut (*self.queue).descriptors[i],
                [address, bytes | flags << 32 | next],
            );
        }
    }

    /// Sends the chain that begins with descriptor 0.
    fn send(&mut self) {
        let slot = usize::from(self.sent % 8);
        self.sent = self.sent.wrapping_add(1);
        // SAFETY: as in `describe`; the device reads the index after the entry, because stores are
        // seen in their order on this machine.
        unsafe {
            write_volatile(&raw mut (*self.queue).available[2 + slot], 0);
            write_volatile(&raw mut (*self.queue).available[1], self.sent);
        }
        put32(self.at + 0x50, 0);
    }

    /// Where the device says how far it is, and what it says there now.
    fn used(&self) -> (*const u32, u32) {
        // SAFETY: the device writes it.
        unsafe {
            let at = &raw const (*self.queue).used[0];
            (at, read_volatile(at))
        }
    }

    /// Whether the device has used everything that was sent.
    pub fn is_done(&self) -> bool {
        self.used().1 >> 16 == u32::from(self.sent)
    }

    /// Sends the chain that begins with descriptor 0, and waits until it is used.
    fn request(&mut self) {
        self.send();
        loop {
            let (at, used) = self.used();
            if used >> 16 == u32::from(self.sent) {
                return;
            }
            match self.sleeps {
                true => sleep(at, used),
                false => core::hint::spin_loop(),
            }
        }
    }

    /// Sleeps from now on while the device works; its interrupt is line `gsi`.
    pub fn sleep_on(&mut self, gsi: u32, vector: u32) {
        listen(gsi, vector);
        self.sleeps = true;
    }

    /// Describes a request of a disk from sector `number` on: kind 0 reads, 1 writes.
    fn describe_disk(&mut self, kind: u64, number: u64, data: u64, bytes: u64) {
        let queue = self.queue;
        // SAFETY: nothing is in flight.
        unsafe {
            write_volatile(&raw mut (*queue).head, [kind, number]);
            write_volatile(&raw mut (*queue).status, 0xff);
            self.describe(0, &raw const (*queue).head as u64, 16, 1);
            let to_disk = if kind == 1 { 1 } else { 3 };
            self.describe(1, data, bytes, to_disk);
            self.describe(2, &raw const (*queue).status as u64, 1, 2);
        }
    }

    /// Begins to read `bytes` from sector `number` on to `address`.
    pub fn begin_read(&mut self, number: u64, address: u64, bytes: u64) {
        self.describe_disk(0, number, address, bytes);
        self.send();
    }

    /// Says so when the last request, which is done, has failed.
    pub fn check_disk(&self) {
        // SAFETY: the device is done.
        if unsafe { read_volatile(&raw const (*self.queue).status) } & 0xff != 0 {
            print("= the disk fails\n");
        }
    }

    /// Reads or writes a sector that begins with a number; gives back the number that it has.
    pub fn sector(&mut self, number: u64, value: Option<u64>) -> u64 {
        let queue = self.queue;
        // SAFETY: nothing is in flight.
        let data = unsafe {
            write_volatile(&raw mut (*queue).data[0], value.unwrap_or(0));
            &raw const (*queue).data as u64
        };
        self.describe_disk(value.is_some().into(), number, data, 512);
        self.request();
        self.check_disk();
        load(data)
    }

    /// Reads the eight sectors from `number` on into the page at `address`.
    pub fn page(&mut self, number: u64, address: u64) {
        self.describe_disk(0, number, address, 4096);
        self.request();
        self.check_disk();
    }

    /// Eight random bytes.
    pub fn random(&mut self) -> u64 {
        let queue = self.queue;
        // SAFETY: nothing is in flight.
        let data = unsafe { &raw const (*queue).data as u64 };
        self.describe(0, data, 8, 2);
        self.request();
        load(data)
    }
}
