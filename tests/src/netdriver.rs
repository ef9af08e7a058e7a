//! A driver of a network card that is no guest: a test plays its side over guest memory, as
//! `vmdriver` does for disks.

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use forkd::memory::Gpa;
use forkd::wires::Devices as _;

use crate::vmdriver::Rig;

/// Descriptors of a ring.
pub const RING: u16 = 256;
/// Bytes of the header before each frame.
pub const HEADER: usize = 12;
/// Address, status, several buffers to a frame.
pub const PLAIN: u64 = 1 << 5 | 1 << 16;
/// As [`PLAIN`], and a frame may fill several buffers.
pub const MERGE: u64 = PLAIN | 1 << 15;

/// Where the rings are: receiving, then sending; each has table, offered and used part.
pub const RINGS: [u64; 2] = [0x10_0000, 0x12_0000];
const OFFERED: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Room for received frames, by descriptor, and for the one that is sent.
pub const ROOM: u64 = 0x20_0000;
const ROOM_EACH: u64 = 0x4000;
const SENT: u64 = 0x80_0000;

/// A driver of virtio device `device`. It may move from one [`Rig`] to another as a guest does.
#[derive(Debug, Clone)]
pub struct NetDriver {
    device: usize,
    /// The features that it accepted.
    pub features: u64,
    offered: [u16; 2],
    used: [u16; 2],
}

impl NetDriver {
    /// Resets the device and sets it up, accepting `wanted` of what is offered.
    ///
    /// # Panics
    /// When it does not let itself be set up.
    #[must_use]
    pub fn new(rig: &Rig, device: usize, wanted: u64) -> NetDriver {
        let mut driver = NetDriver { device, features: 0, offered: [0; 2], used: [0; 2] };
        let set = |at, value| driver.set(rig, at, value);
        set(0x70, 0);
        assert_eq!(driver.get(rig, 8), 1, "it is a network card");
        set(0x70, 3);
        let mut features = 0;
        for half in [0, 1] {
            set(0x14, half);
            features |= u64::from(driver.get(rig, 0x10)) << (32 * half);
        }
        features &= wanted | 1 << 32;
        for half in [0, 1] {
            set(0x24, half);
            set(0x20, u32::try_from(features >> (32 * half) & 0xffff_ffff).expect("a half"));
        }
        set(0x70, 11);
        assert_eq!(driver.get(rig, 0x70), 11, "the device takes the features");
        for (number, ring) in (0..).zip(RINGS) {
            rig.ram.write(Gpa(ring), &[0; 0xc000]).expect("RAM");
            set(0x30, number);
            set(0x38, RING.into());
            for (at, place) in [(0x80, ring), (0x90, ring + OFFERED), (0xa0, ring + USED)] {
                set(at, u32::try_from(place).expect("low"));
                set(at + 4, 0);
            }
            set(0x44, 1);
        }
        set(0x70, 15);
        driver.features = features;
        driver
    }

    /// Reads a register.
    #[must_use]
    pub fn get(&self, rig: &Rig, at: u64) -> u32 {
        let mut word = [0; 4];
        rig.devices.bus().mmio_read(self.at(at), &mut word);
        u32::from_le_bytes(word)
    }

    /// Writes a register.
    pub fn set(&self, rig: &Rig, at: u64, value: u32) {
        rig.devices.bus().mmio_write(self.at(at), &value.to_le_bytes());
    }

    fn at(&self, register: u64) -> Gpa {
        Gpa(forkd::devices::layout::virtio_mmio(self.device).0 + register)
    }

    /// What the card says is its address.
    #[must_use]
    pub fn address(&self, rig: &Rig) -> [u8; 6] {
        let mut address = [0; 6];
        rig.devices.bus().mmio_read(self.at(0x100), &mut address);
        address
    }

    /// Looks at the link.
    #[must_use]
    pub fn is_up(&self, rig: &Rig) -> bool {
        let mut status = [0; 2];
        rig.devices.bus().mmio_read(self.at(0x106), &mut status);
        status[0] & 1 != 0
    }

    /// Whether the device says that this driver broke a ring.
    #[must_use]
    pub fn is_broken(&self, rig: &Rig) -> bool {
        self.get(rig, 0x70) & 64 != 0
    }

    /// Writes descriptor `i` of a ring: address, bytes, flags, the next one.
    ///
    /// # Panics
    /// For a ring that is not there.
    pub fn describe(&self, rig: &Rig, ring: usize, i: u16, (addr, len): (u64, u32), flags: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&(i + 1).to_le_bytes());
        rig.ram.write(Gpa(RINGS[ring] + 16 * u64::from(i)), &raw).expect("RAM");
    }

    /// Offers the chain that begins at descriptor `head`, and tells the device.
    ///
    /// # Panics
    /// For a ring that is not there.
    pub fn offer(&mut self, rig: &Rig, ring: usize, head: u16) {
        let write = |at: u64, bytes: &[u8]| rig.ram.write(Gpa(at), bytes).expect("RAM");
        let base = RINGS[ring] + OFFERED;
        write(base + 4 + 2 * u64::from(self.offered[ring] % RING), &head.to_le_bytes());
        self.offered[ring] = self.offered[ring].wrapping_add(1);
        // A store of two bytes in one piece comes after all that was stored before it.
        fence(Ordering::SeqCst);
        write(base + 2, &self.offered[ring].to_le_bytes());
        self.set(rig, 0x50, u32::try_from(ring).expect("a ring"));
    }

    /// Offers `count` buffers of `len` bytes to receive into, from descriptor `first`.
    pub fn give(&mut self, rig: &Rig, first: u16, count: u16, len: u32) {
        for i in first..first + count {
            self.describe(rig, 0, i, (ROOM + ROOM_EACH * u64::from(i), len), 2);
            self.offer(rig, 0, i);
        }
    }

    /// What came back next in a ring: its head, and bytes that were written.
    ///
    /// # Panics
    /// For a ring that is not there.
    pub fn back(&mut self, rig: &Rig, ring: usize) -> Option<(u16, u32)> {
        let base = RINGS[ring] + USED;
        let mut index = [0; 2];
        rig.ram.read(Gpa(base + 2), &mut index).expect("RAM");
        if u16::from_le_bytes(index) == self.used[ring] {
            return None;
        }
        fence(Ordering::SeqCst);
        let mut entry = [0; 8];
        let at = base + 4 + 8 * u64::from(self.used[ring] % RING);
        rig.ram.read(Gpa(at), &mut entry).expect("RAM");
        self.used[ring] = self.used[ring].wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("4 bytes"));
        Some((u16::try_from(word(0)).expect("a head"), word(4)))
    }

    /// The next frame that came: its header and the frame, and the buffers that it was in.
    pub fn receive(&mut self, rig: &Rig) -> Option<(Vec<u8>, Vec<u16>)> {
        let (head, len) = self.back(rig, 0)?;
        let mut bytes = self.buffer(rig, head, len);
        let mut heads = vec![head];
        for _ in 1..u16::from_le_bytes([bytes[10], bytes[11]]) {
            let (head, len) = self.back(rig, 0).expect("the frame goes on");
            bytes.extend(self.buffer(rig, head, len));
            heads.push(head);
        }
        Some((bytes, heads))
    }

    fn buffer(&self, rig: &Rig, head: u16, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).expect("a length")];
        let at = Gpa(ROOM + ROOM_EACH * u64::from(head));
        rig.ram.read(at, &mut bytes).expect("RAM");
        bytes
    }

    /// As [`NetDriver::receive`], for what must come soon; without the header.
    ///
    /// # Panics
    /// When it does not.
    pub fn expect(&mut self, rig: &Rig, what: &str) -> (Vec<u8>, Vec<u16>) {
        let start = Instant::now();
        loop {
            if let Some((bytes, heads)) = self.receive(rig) {
                return (bytes[HEADER..].to_vec(), heads);
            }
            assert!(start.elapsed() < Duration::from_secs(20), "{what}: {:?}", rig.devices.net());
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Puts a header and a frame into `pieces` pieces and offers them to be sent.
    ///
    /// # Panics
    /// For more pieces than bytes.
    pub fn send(&mut self, rig: &Rig, header: [u8; HEADER], frame: &[u8], pieces: u16) {
        let bytes = [&header[..], frame].concat();
        rig.ram.write(Gpa(SENT), &bytes).expect("RAM");
        let all = u32::try_from(bytes.len()).expect("a length");
        let each = all / u32::from(pieces);
        assert!(each > 0);
        for i in 0..pieces {
            let last = i + 1 == pieces;
            let at = u32::from(i) * each;
            let len = if last { all - at } else { each };
            let flags = if last { 0 } else { 1 };
            self.describe(rig, 1, i, (SENT + u64::from(at), len), flags);
        }
        self.offer(rig, 1, 0);
    }

    /// Waits until what was offered to be sent came back.
    ///
    /// # Panics
    /// When it does not.
    pub fn sent(&mut self, rig: &Rig) {
        let start = Instant::now();
        while self.back(rig, 1).is_none() {
            assert!(start.elapsed() < Duration::from_secs(20), "{:?}", rig.devices.net());
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
