//! The two address spaces through which a guest reaches its devices: ports and memory.
//!
//! A bus is filled before the first vCPU runs and is not changed afterwards, so vCPU threads look
//! ranges up without a lock; only the device itself is locked. What they call neither allocates nor
//! logs. Accesses to nothing are normal (a kernel probes for devices): they read as all ones, and
//! what is written is dropped, as on a machine with an empty slot. They are counted.
//!
//! Invariants: ranges of one space are sorted and do not overlap; a device sees offsets below the
//! length of its range only, and an access that goes past the end of its range reaches nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use format::{Error, Kind, Result};
use parking_lot::Mutex;

use crate::memory::Gpa;
use crate::wires::IoBus;

/// A device in port space. Offsets count from the first port of its range; accesses have 1, 2 or 4
/// bytes.
pub trait PioDevice: Send {
    /// The guest reads `data.len()` bytes.
    fn read(&mut self, offset: u16, data: &mut [u8]);
    /// The guest writes `data`.
    fn write(&mut self, offset: u16, data: &[u8]);
}

/// A device in memory space. Offsets count from the first byte of its range; accesses have up to 8
/// bytes.
pub trait MmioDevice: Send {
    /// The guest reads `data.len()` bytes.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

struct Slot<D: ?Sized> {
    start: u64,
    len: u64,
    device: Arc<Mutex<D>>,
}

/// Ranges of one space.
struct Space<D: ?Sized>(Vec<Slot<D>>);

impl<D: ?Sized> Space<D> {
    fn insert(&mut self, start: u64, len: u64, device: Arc<Mutex<D>>) -> Result<()> {
        let end = start.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or_else(|| Error::invalid("a device range is empty or wraps around"))?;
        let at = self.0.partition_point(|s| s.start < start);
        let before = at.checked_sub(1).map(|i| &self.0[i]);
        if before.is_some_and(|s| s.start + s.len > start)
            || self.0.get(at).is_some_and(|s| s.start < end)
        {
            return Err(Error::new(Kind::Exists, "two devices have the same addresses")
                .on(format!("range {start:#x}+{len:#x}")));
        }
        self.0.insert(at, Slot { start, len, device });
        Ok(())
    }

    fn find(&self, at: u64, len: usize) -> Option<(&Mutex<D>, u64)> {
        let i = self.0.partition_point(|s| s.start <= at).checked_sub(1)?;
        let slot = &self.0[i];
        let offset = at - slot.start;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= slot.len).then_some((&slot.device, offset))
    }
}

/// All devices of a machine, by address.
pub struct Bus {
    pio: Space<dyn PioDevice>,
    mmio: Space<dyn MmioDevice>,
    unclaimed: AtomicU64,
}

impl Default for Bus {
    fn default() -> Self {
        Bus { pio: Space(Vec::new()), mmio: Space(Vec::new()), unclaimed: AtomicU64::new(0) }
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bus {{ {} port ranges, {} memory ranges }}", self.pio.0.len(), self.mmio.0.len())
    }
}

impl Bus {
    /// Puts a device at the `len` ports from `port`.
    ///
    /// # Errors
    /// `Exists` when one of them is taken, `Invalid` for no ports or ports past the last.
    pub fn insert_pio(
        &mut self,
        port: u16,
        len: u16,
        device: Arc<Mutex<dyn PioDevice>>,
    ) -> Result<()> {
        if u32::from(port) + u32::from(len) > 0x1_0000 {
            return Err(Error::invalid("a device has ports past the last one"));
        }
        self.pio.insert(port.into(), len.into(), device)
    }

    /// Puts a device at the `len` bytes from `at`.
    ///
    /// # Errors
    /// `Exists` when one of them is taken, `Invalid` for an empty range or one that wraps.
    pub fn insert_mmio(
        &mut self,
        at: Gpa,
        len: u64,
        device: Arc<Mutex<dyn MmioDevice>>,
    ) -> Result<()> {
        self.mmio.insert(at.0, len, device)
    }

    /// Accesses so far that reached no device.
    #[must_use]
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed) // a statistic: nothing is ordered by it
    }

    fn nothing_read(&self, data: &mut [u8]) {
        data.fill(0xff);
        self.nothing_there();
    }

    fn nothing_there(&self) {
        self.unclaimed.fetch_add(1, Ordering::Relaxed); // a statistic, as in `unclaimed`
    }
}

impl IoBus for Bus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        match self.pio.find(port.into(), data.len()) {
            // Cannot fail: the offset is smaller than a port number.
            Some((device, offset)) => {
                device.lock().read(u16::try_from(offset).unwrap_or(0), data);
            }
            None => self.nothing_read(data),
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        match self.pio.find(port.into(), data.len()) {
            Some((device, offset)) => {
                device.lock().write(u16::try_from(offset).unwrap_or(0), data);
            }
            None => self.nothing_there(),
        }
    }

    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        match self.mmio.find(at.0, data.len()) {
            Some((device, offset)) => device.lock().read(offset, data),
            None => self.nothing_read(data),
        }
    }

    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        match self.mmio.find(at.0, data.len()) {
            Some((device, offset)) => device.lock().write(offset, data),
            None => self.nothing_there(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the last access; reads give the offset.
    #[derive(Default)]
    struct Probe(Vec<(u64, Vec<u8>)>);

    impl MmioDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    impl PioDevice for Probe {
        fn read(&mut self, offset: u16, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, offset: u16, data: &[u8]) {
            self.0.push((offset.into(), data.to_vec()));
        }
    }

    #[test]
    fn each_device_sees_its_own_offsets_and_nothing_past_its_end() {
        let (a, b) = (Arc::new(Mutex::new(Probe::default())), Arc::default());
        let mut bus = Bus::default();
        bus.insert_mmio(Gpa(0x2000), 0x10, a.clone()).unwrap();
        bus.insert_mmio(Gpa(0x1000), 0x1000, Arc::<Mutex<Probe>>::clone(&b)).unwrap();
        bus.mmio_write(Gpa(0x2008), &[7; 8]);
        bus.mmio_write(Gpa(0x200c), &[8; 8]);
        bus.mmio_write(Gpa(0x1ffe), &[9; 2]);
        assert_eq!(a.lock().0, [(8, vec![7; 8])]);
        assert_eq!(b.lock().0, [(0xffe, vec![9; 2])]);
        let mut seen = [0; 4];
        bus.mmio_read(Gpa(0x2004), &mut seen);
        assert_eq!((seen, bus.unclaimed()), ([4; 4], 1));
    }

    #[test]
    fn nothing_reads_as_ones_and_takes_writes() {
        let mut bus = Bus::default();
        bus.insert_pio(0x3f8, 8, Arc::new(Mutex::new(Probe::default()))).unwrap();
        for port in [0, 0x3f7, 0x400, 0xffff] {
            let mut data = [0];
            bus.pio_read(port, &mut data);
            bus.pio_write(port, &[1]);
            assert_eq!(data, [0xff], "{port:#x}");
        }
        let mut data = [0; 8];
        bus.mmio_read(Gpa(u64::MAX - 3), &mut data);
        assert_eq!((data, bus.unclaimed()), ([0xff; 8], 9));
    }

    #[test]
    fn ranges_that_overlap_or_wrap_are_refused() {
        let device = || Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::default();
        bus.insert_pio(0x10, 0x10, device()).unwrap();
        for (port, len) in [(0x10, 1), (0x1f, 1), (0xf, 2), (0x8, 0x20), (0x18, 2)] {
            assert_eq!(bus.insert_pio(port, len, device()).unwrap_err().kind(), Kind::Exists);
        }
        bus.insert_pio(0xf, 1, device()).unwrap();
        bus.insert_pio(0x20, 1, device()).unwrap();
        assert!(bus.insert_pio(0xffff, 2, device()).is_err());
        assert!(bus.insert_pio(0x30, 0, device()).is_err());
        assert!(bus.insert_mmio(Gpa(u64::MAX), 2, device()).is_err());
    }
}
