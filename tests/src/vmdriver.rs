//! A guest that is no guest: a test plays the driver's side over guest memory, so devices of
//! `forkd` are tried without a processor.
//!
//! [`Rig`] has memory, devices, and counters where a machine would have interrupt lines;
//! [`Driver`] sets one virtio block device up as a kernel does and has requests in work.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forkd::devices::{DeviceConfig, DeviceSet, DiskConfig, DiskPath, layout};
use forkd::memory::{Gpa, GuestRam};
use forkd::wires::{Devices as _, Interrupt, PowerSwitch, Wires};
use format::Result;
use vhost_blk::event::EventFd;

/// Number of virtio block requests at once.
pub const DEPTH: u16 = 48;
/// Most bytes of one request.
pub const LEN_MAX: u64 = 192 << 10;

const MEMORY: u64 = 32 << 20;
const DESC: u64 = 0x10_0000;
const AVAIL: u64 = 0x10_4000;
const USED: u64 = 0x10_8000;
const HEADS: u64 = 0x11_0000;
/// Where the data of requests is in guest memory.
pub const DATA: u64 = 0x20_0000;
const RING: u16 = 256;

/// An interrupt line that counts, whoever raises it.
#[derive(Debug)]
pub struct Count {
    bell: EventFd,
    seen: AtomicU32,
}

impl Default for Count {
    fn default() -> Self {
        Count { bell: EventFd::new().expect("a descriptor"), seen: AtomicU32::new(0) }
    }
}

impl Count {
    /// How often it was raised.
    #[must_use]
    pub fn get(&self) -> u32 {
        let mut counter = [0; 8];
        let rung = rustix::io::read(&self.bell, &mut counter).is_ok();
        let new = if rung { u64::from_ne_bytes(counter) } else { 0 };
        let new = u32::try_from(new).expect("a count");
        self.seen.fetch_add(new, Ordering::SeqCst) + new
    }

    /// Sleeps until it is raised again, at most for so long.
    pub fn wait(&self, time: Duration) {
        let ms = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        if self.bell.wait(ms) {
            let _ = self.get();
        }
    }
}

impl Interrupt for Count {
    fn raise(&self) -> Result<()> {
        self.bell.signal();
        Ok(())
    }

    fn bell(&self) -> Result<EventFd> {
        self.bell.try_clone()
    }
}

/// How often the guest wanted what: off, reset.
#[derive(Debug, Default)]
pub struct Switch(Count, Count);

impl Switch {
    /// How often it was turned off, and reset.
    #[must_use]
    pub fn get(&self) -> (u32, u32) {
        (self.0.get(), self.1.get())
    }
}

impl PowerSwitch for Switch {
    fn power_off(&self) {
        let _ = self.0.raise();
    }
    fn reset(&self) {
        let _ = self.1.raise();
    }
}

/// Lines that count, and doorbells that only the bus rings.
#[derive(Debug, Default)]
pub struct TestWires {
    lines: Mutex<HashMap<u32, Arc<Count>>>,
    /// The power switch.
    pub switch: Arc<Switch>,
}

impl TestWires {
    /// The line `gsi`.
    ///
    /// # Panics
    /// Never, unless a test already has.
    #[must_use]
    pub fn line(&self, gsi: u32) -> Arc<Count> {
        Arc::clone(self.lines.lock().expect("no panic here").entry(gsi).or_default())
    }
}

impl Wires for TestWires {
    fn interrupt(&self, gsi: u32) -> Result<Arc<dyn Interrupt>> {
        Ok(self.line(gsi))
    }
    fn doorbell(&self, _at: Gpa, _value: Option<u32>) -> Result<EventFd> {
        EventFd::new()
    }
    fn power(&self) -> Arc<dyn PowerSwitch> {
        Arc::<Switch>::clone(&self.switch)
    }
}

/// Memory and devices of one machine without processors.
#[derive(Debug)]
pub struct Rig {
    /// Its devices.
    pub devices: DeviceSet,
    /// Its interrupt lines.
    pub wires: TestWires,
    /// Its memory.
    pub ram: Arc<GuestRam>,
}

impl Rig {
    /// Devices over new memory, ready to be used.
    ///
    /// # Panics
    /// When they cannot be made.
    #[must_use]
    pub fn new(config: &DeviceConfig) -> Rig {
        let rig = Rig::over(config, Arc::new(GuestRam::new(MEMORY).expect("memory")));
        rig.devices.resume().expect("nothing stood");
        rig
    }

    /// Devices that stand still, over memory that is there.
    ///
    /// # Panics
    /// When they cannot be made.
    #[must_use]
    pub fn over(config: &DeviceConfig, ram: Arc<GuestRam>) -> Rig {
        let wires = TestWires::default();
        let devices = DeviceSet::new(config, &ram, &wires).expect("devices");
        Rig { devices, wires, ram }
    }

    /// What the guest reads from a port.
    #[must_use]
    pub fn port(&self, port: u16) -> u8 {
        let mut byte = [0];
        self.devices.bus().pio_read(port, &mut byte);
        byte[0]
    }

    /// The guest writes a port.
    pub fn set_port(&self, port: u16, value: u8) {
        self.devices.bus().pio_write(port, &[value]);
    }
}

/// One disk at `socket`, through an arena.
#[must_use]
pub fn one_disk(socket: &std::path::Path) -> DeviceConfig {
    one_disk_by(DiskPath::Arena, socket)
}

/// One disk at `socket`.
#[must_use]
pub fn one_disk_by(path: DiskPath, socket: &std::path::Path) -> DeviceConfig {
    let (name, socket) = ("vm".to_owned(), socket.to_owned());
    let disk = DiskConfig { name, socket, read_only: false, path };
    DeviceConfig { disks: vec![disk], ..DeviceConfig::default() }
}

/// What a request asks for: the numbers of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Ask {
    /// Read.
    Read = 0,
    /// Write.
    Write = 1,
    /// Flush.
    Flush = 4,
    /// The serial number.
    Id = 8,
}

/// A driver of the first disk, which is the second virtio device. It may move from one [`Rig`] to
/// another as a guest does: all it knows is in guest memory and here.
#[derive(Debug, Clone)]
pub struct Driver {
    next_avail: u16,
    seen_used: u16,
    free: Vec<u16>,
    /// The features that it accepted.
    pub features: u64,
}

/// The virtio device that is the first disk.
const DISK: usize = 1;

impl Driver {
    /// Resets the device and sets it up, accepting `wanted` of what is offered.
    ///
    /// # Panics
    /// When the device does not let itself be set up.
    #[must_use]
    pub fn new(rig: &Rig, wanted: u64) -> Driver {
        for at in [AVAIL, USED] {
            rig.ram.write(Gpa(at), &[0; 0x4000]).expect("RAM");
        }
        let set = |at, value| set_register(rig, at, value);
        set(0x70, 0);
        assert_eq!(register(rig, 0), 0x7472_6976);
        assert_eq!((register(rig, 4), register(rig, 8)), (2, 2));
        set(0x70, 1 | 2);
        let mut features = 0;
        for half in [0, 1] {
            set(0x14, half);
            features |= u64::from(register(rig, 0x10)) << (32 * half);
        }
        features &= wanted | 1 << 32;
        for half in [0, 1] {
            set(0x24, half);
            set(0x20, u32::try_from(features >> (32 * half) & 0xffff_ffff).expect("a half"));
        }
        set(0x70, 1 | 2 | 8);
        assert_eq!(register(rig, 0x70), 1 | 2 | 8, "the device takes the features");
        set(0x30, 0);
        assert_eq!(register(rig, 0x34), u32::from(RING));
        set(0x38, RING.into());
        for (at, address) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
            set(at, u32::try_from(address).expect("low"));
            set(at + 4, 0);
        }
        set(0x44, 1);
        set(0x70, 1 | 2 | 8 | 4);
        Driver { next_avail: 0, seen_used: 0, free: (0..DEPTH).rev().collect(), features }
    }

    /// Whether another request has room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Requests in work.
    #[must_use]
    pub fn in_work(&self) -> usize {
        usize::from(DEPTH) - self.free.len()
    }

    /// Puts a request into the ring; returns its number. The data of a write is `data`; a read has
    /// room for as many bytes.
    ///
    /// # Panics
    /// When there is no room, or too much data.
    pub fn submit(&mut self, rig: &Rig, ask: Ask, offset: u64, data: &[u8]) -> u16 {
        let slot = self.free.pop().expect("room");
        let (head, at) = (HEADS + 32 * u64::from(slot), data_of(slot));
        let mut header = [0; 17];
        header[..4].copy_from_slice(&(ask as u32).to_le_bytes());
        header[8..16].copy_from_slice(&(offset / 512).to_le_bytes());
        header[16] = 0xee;
        let write = |at: u64, bytes: &[u8]| rig.ram.write(Gpa(at), bytes).expect("RAM");
        write(head, &header);
        let len = u64::try_from(data.len()).expect("a length");
        assert!(len <= LEN_MAX);
        if ask == Ask::Write {
            write(at, data);
        }
        // The data in two pieces that meet at an odd place.
        let first = len.min((len / 3) | 1);
        let into = if ask == Ask::Write { 0 } else { 2 };
        let pieces = [(head, 16, 0), (at, first, into), (at + first, len - first, into)];
        let mut index = u64::from(slot) * 4;
        for (addr, len, flags) in pieces.into_iter().filter(|p| p.1 > 0) {
            write(DESC + 16 * index, &descriptor(addr, len, flags | 1, index + 1));
            index += 1;
        }
        write(DESC + 16 * index, &descriptor(head + 16, 1, 2, 0));
        let entry = AVAIL + 4 + 2 * u64::from(self.next_avail % RING);
        write(entry, &(slot * 4).to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
        // A store of two bytes in one piece comes after all that was stored before it.
        std::sync::atomic::fence(Ordering::SeqCst);
        write(AVAIL + 2, &self.next_avail.to_le_bytes());
        slot
    }

    /// Announces requests.
    pub fn kick(&self, rig: &Rig) {
        set_register(rig, 0x50, 0);
    }

    /// Announces requests if the device wants that. Not with the event index.
    ///
    /// # Panics
    /// Never, unless the ring is not in memory.
    pub fn kick_if_wanted(&self, rig: &Rig) {
        let mut flags = [0; 2];
        std::sync::atomic::fence(Ordering::SeqCst);
        rig.ram.read(Gpa(USED), &mut flags).expect("RAM");
        if u16::from_le_bytes(flags) & 1 == 0 {
            self.kick(rig);
        }
    }

    /// The next completed request: number and status.
    ///
    /// # Panics
    /// When the device gives back what it does not have.
    pub fn poll(&mut self, rig: &Rig) -> Option<(u16, u8)> {
        let mut index = [0; 2];
        rig.ram.read(Gpa(USED + 2), &mut index).expect("RAM");
        if u16::from_le_bytes(index) == self.seen_used {
            return None;
        }
        std::sync::atomic::fence(Ordering::SeqCst);
        let mut id = [0; 4];
        let entry = USED + 4 + 8 * u64::from(self.seen_used % RING);
        rig.ram.read(Gpa(entry), &mut id).expect("RAM");
        self.seen_used = self.seen_used.wrapping_add(1);
        let slot = u16::try_from(u32::from_le_bytes(id) / 4).expect("a slot");
        assert!(slot < DEPTH && !self.free.contains(&slot), "{slot} was given back twice");
        self.free.push(slot);
        let mut status = [0];
        rig.ram.read(Gpa(HEADS + 32 * u64::from(slot) + 16), &mut status).expect("RAM");
        Some((slot, status[0]))
    }

    /// Waits for the next completed request.
    ///
    /// # Panics
    /// When none comes within a minute.
    pub fn wait(&mut self, rig: &Rig) -> (u16, u8) {
        let start = Instant::now();
        loop {
            if let Some(done) = self.poll(rig) {
                return done;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{:?}", rig.devices.disks());
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Runs one request and returns its status and what was read.
    pub fn run(&mut self, rig: &Rig, ask: Ask, offset: u64, data: &[u8]) -> (u8, Vec<u8>) {
        let slot = self.submit(rig, ask, offset, data);
        self.kick(rig);
        loop {
            let (done, status) = self.wait(rig);
            if done == slot {
                return (status, read_data(rig, slot, data.len()));
            }
        }
    }
}

/// What a read request put into guest memory.
///
/// # Panics
/// For more bytes than a request has.
#[must_use]
pub fn read_data(rig: &Rig, slot: u16, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rig.ram.read(Gpa(data_of(slot)), &mut bytes).expect("RAM");
    bytes
}

fn data_of(slot: u16) -> u64 {
    DATA + LEN_MAX * u64::from(slot)
}

fn descriptor(addr: u64, len: u64, flags: u16, next: u64) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&addr.to_le_bytes());
    raw[8..12].copy_from_slice(&u32::try_from(len).expect("a length").to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&u16::try_from(next).expect("an index").to_le_bytes());
    raw
}

/// What the guest reads from a register of the disk.
#[must_use]
pub fn register(rig: &Rig, at: u64) -> u32 {
    let mut word = [0; 4];
    rig.devices.bus().mmio_read(Gpa(layout::virtio_mmio(DISK).0 + at), &mut word);
    u32::from_le_bytes(word)
}

/// The guest writes a register of the disk.
pub fn set_register(rig: &Rig, at: u64, value: u32) {
    let at = Gpa(layout::virtio_mmio(DISK).0 + at);
    rig.devices.bus().mmio_write(at, &value.to_le_bytes());
}

/// The interrupt line of the disk.
#[must_use]
pub fn line(rig: &Rig) -> Arc<Count> {
    rig.wires.line(layout::virtio_gsi(DISK))
}
