//! Random reads and writes of a [`Driver`], many at once and never two at one place, next to a copy
//! of the disk.

use crate::rng::Rng;
use crate::vmdriver::{Ask, Driver, LEN_MAX, Rig, read_data};

/// Requests at once.
const FULL: usize = 40;

/// See the module's head.
#[derive(Debug)]
pub struct Load {
    rng: Rng,
    model: Vec<u8>,
    /// Request number, what it was, and where.
    out: Vec<(u16, Ask, u64, usize)>,
}

impl Load {
    /// For an empty disk of `size` bytes.
    ///
    /// # Panics
    /// For one that does not fit into memory.
    #[must_use]
    pub fn new(seed: u64, size: u64) -> Load {
        let model = vec![0; usize::try_from(size).expect("a small disk")];
        Load { rng: Rng::new(seed), model, out: Vec::new() }
    }

    /// What the disk is to hold when nothing is in work.
    #[must_use]
    pub fn model(&self) -> &[u8] {
        &self.model
    }

    fn begin(&mut self, rig: &Rig, driver: &mut Driver) {
        let size = u64::try_from(self.model.len()).expect("a size");
        let most = if self.rng.one_in(8) { LEN_MAX / 512 } else { 16 };
        let len = 512 * (1 + self.rng.below(most));
        let offset = 512 * self.rng.below((size - len) / 512);
        let apart = |(_, _, at, n): &(u16, Ask, u64, usize)| {
            at + u64::try_from(*n).expect("a length") <= offset || offset + len <= *at
        };
        if !self.out.iter().all(apart) {
            return;
        }
        let [at, len] = [offset, len].map(|n| usize::try_from(n).expect("a small disk"));
        let ask = if self.rng.one_in(2) { Ask::Write } else { Ask::Read };
        let data: Vec<u8> = if ask == Ask::Write {
            let mut bytes: Vec<u8> = Vec::with_capacity(len);
            while bytes.len() < len {
                bytes.extend(self.rng.any().to_le_bytes());
            }
            bytes.truncate(len);
            self.model[at..at + len].copy_from_slice(&bytes);
            bytes
        } else {
            vec![0; len]
        };
        let slot = driver.submit(rig, ask, offset, &data);
        self.out.push((slot, ask, offset, len));
    }

    fn end(&mut self, rig: &Rig, slot: u16, status: u8) {
        let i = self.out.iter().position(|o| o.0 == slot).expect("it was in work");
        let (_, ask, offset, len) = self.out.swap_remove(i);
        assert_eq!(status, 0, "{ask:?} at {offset}");
        if ask == Ask::Read {
            let at = usize::try_from(offset).expect("a small disk");
            let same = read_data(rig, slot, len) == self.model[at..at + len];
            assert!(same, "what was read at {offset} is not what was written");
        }
    }

    /// Has as many requests in the ring as `count` says, without announcing them.
    pub fn fill(&mut self, rig: &Rig, driver: &mut Driver, count: usize) {
        while driver.has_room() && self.out.len() < count {
            self.begin(rig, driver);
        }
    }

    /// Keeps the ring full until `count` requests were done.
    ///
    /// # Panics
    /// When one fails, or reads what was not written.
    pub fn run(&mut self, rig: &Rig, driver: &mut Driver, count: usize) {
        for _ in 0..count {
            self.fill(rig, driver, FULL);
            driver.kick(rig);
            let (slot, status) = driver.wait(rig);
            self.end(rig, slot, status);
        }
    }

    /// Waits for all requests, and flushes.
    ///
    /// # Panics
    /// As [`Load::run`].
    pub fn finish(&mut self, rig: &Rig, driver: &mut Driver) {
        while driver.in_work() > 0 {
            let (slot, status) = driver.wait(rig);
            self.end(rig, slot, status);
        }
        assert_eq!(driver.run(rig, Ask::Flush, 0, &[]).0, 0);
    }

    /// Drops what is in work, as a driver that was reset does. Writes may be done or not: what they
    /// were to write is gone from the copy, and is to be written again.
    pub fn forget(&mut self) -> Vec<(u64, usize)> {
        let places = self.out.drain(..).filter(|(_, ask, ..)| *ask == Ask::Write);
        places.map(|(_, _, offset, len)| (offset, len)).collect()
    }
}
