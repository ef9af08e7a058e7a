//! What the guest is told about a disk: features and configuration space, as blockd has them.
//!
//! Read by vCPU threads at any time; changed by whoever runs the engine. The cache mode is the
//! guest's choice and is kept here, not at blockd (see `engine`).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use vhost_blk::blk::{
    F_BLK_SIZE, F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_SIZE_MAX, F_TOPOLOGY,
    F_WRITE_ZEROES, Limits, RangeLimits,
};

use super::link::SPACE;

/// Features that are the disk's and are passed on as they are.
const DISK_FEATURES: u64 = F_SIZE_MAX
    | F_SEG_MAX
    | F_RO
    | F_BLK_SIZE
    | F_FLUSH
    | F_TOPOLOGY
    | F_CONFIG_WCE
    | F_DISCARD
    | F_WRITE_ZEROES;

/// Offsets in configuration space: the cache mode, and the number of queues, of which a guest has
/// one whatever blockd could do.
const WRITE_BACK: usize = 32;
const QUEUES: usize = 34;

pub(super) struct Shape {
    features: u64,
    space: Mutex<[u8; SPACE]>,
    generation: AtomicU32,
    write_back: AtomicBool,
}

impl Shape {
    /// What blockd says, made read-only on request.
    pub(super) fn new(features: u64, space: [u8; SPACE], read_only: bool) -> Shape {
        let mut features = features & DISK_FEATURES;
        if read_only {
            features = features & !(F_DISCARD | F_WRITE_ZEROES) | F_RO;
        }
        Shape {
            features,
            space: Mutex::new(own(space)),
            generation: AtomicU32::new(0),
            write_back: AtomicBool::new(true),
        }
    }

    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Size in bytes.
    pub(super) fn size(&self) -> u64 {
        u64::from_le_bytes(field(&self.space.lock(), 0)).saturating_mul(512)
    }

    pub(super) fn generation(&self) -> u32 {
        // Pairs with the update in `update`: a driver that sees the old number twice has read
        // nothing new in between.
        self.generation.load(Ordering::Acquire)
    }

    /// Takes over what blockd says now; whether that is something else.
    pub(super) fn update(&self, space: &[u8; SPACE]) -> bool {
        let new = own(*space);
        let mut here = self.space.lock();
        if *here == new {
            return false;
        }
        *here = new;
        self.generation.fetch_add(1, Ordering::AcqRel); // pairs with the load in `generation`
        true
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut space = *self.space.lock();
        space[WRITE_BACK] = u8::from(self.is_write_back());
        let rest = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    /// The driver writes configuration space; only the cache mode can be written.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        if usize::try_from(offset) == Ok(WRITE_BACK)
            && self.features & F_CONFIG_WCE != 0
            && let [mode @ (0 | 1)] = data
        {
            self.set_write_back(*mode == 1);
        }
    }

    pub(super) fn is_write_back(&self) -> bool {
        // Pairs with the store in `set_write_back`.
        self.write_back.load(Ordering::Acquire)
    }

    pub(super) fn set_write_back(&self, write_back: bool) {
        // Pairs with the load in `is_write_back`: who takes a request that the driver made after
        // its switch sees the switch.
        self.write_back.store(write_back, Ordering::Release);
    }

    /// The cache mode that accepted features imply: a driver that took neither flush nor the switch
    /// cannot flush, so every write must be durable when it completes.
    pub(super) fn initial_write_back(features: u64) -> bool {
        features & (F_FLUSH | F_CONFIG_WCE) != 0
    }

    /// Whether a write has to be flushed before it completes.
    pub(super) fn flushes_writes(&self) -> bool {
        !self.is_write_back()
    }

    /// What requests of a driver that accepted `features` are checked against.
    pub(super) fn limits(&self, features: u64) -> Limits {
        let space = self.space.lock();
        let word = |at| u32::from_le_bytes(field(&space, at));
        let ranges = |feature: u64, at| {
            (self.features & features & feature != 0).then(|| RangeLimits {
                sectors_max: word(at),
                ranges_max: word(at + 4),
                alignment: 1,
            })
        };
        Limits {
            sectors: u64::from_le_bytes(field(&space, 0)),
            read_only: self.features & F_RO != 0,
            discard: ranges(F_DISCARD, 36),
            write_zeroes: ranges(F_WRITE_ZEROES, 48),
            write_zeroes_unmaps: space[56] != 0,
        }
    }
}

/// The configuration space as this device has it: one queue.
fn own(mut space: [u8; SPACE]) -> [u8; SPACE] {
    space[QUEUES..QUEUES + 2].copy_from_slice(&1u16.to_le_bytes());
    space
}

fn field<const N: usize>(space: &[u8; SPACE], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&space[at..at + N]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_passed_on_that_this_device_does_not_do() {
        let shape = Shape::new(u64::MAX, [0xff; SPACE], false);
        assert_eq!(shape.features() & !DISK_FEATURES, 0);
        let mut queues = [0; 2];
        shape.read(34, &mut queues);
        assert_eq!(queues, [1, 0]);
        let read_only = Shape::new(u64::MAX, [0; SPACE], true);
        assert_eq!(read_only.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    }

    #[test]
    fn only_the_cache_mode_can_be_written_and_only_with_the_feature() {
        let shape = Shape::new(F_CONFIG_WCE, [7; SPACE], false);
        for (offset, data) in [(31, &[0, 0][..]), (32, &[2]), (32, &[0, 0]), (u64::MAX, &[0])] {
            shape.write(offset, data);
            assert!(shape.is_write_back());
        }
        shape.write(32, &[0]);
        assert!(shape.flushes_writes());
        let fixed = Shape::new(F_FLUSH, [7; SPACE], false);
        fixed.write(32, &[0]);
        assert!(fixed.is_write_back());
    }

    #[test]
    fn a_change_is_told_once() {
        let shape = Shape::new(0, [1; SPACE], false);
        assert!(!shape.update(&[1; SPACE]) && shape.generation() == 0);
        assert!(shape.update(&[2; SPACE]) && shape.generation() == 1);
        assert!(!shape.update(&[2; SPACE]) && shape.generation() == 1);
        let mut past = [9; 4];
        shape.read(58, &mut past);
        assert_eq!(past, [2, 2, 9, 9]);
    }
}
