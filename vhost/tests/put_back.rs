//! A device that took more from a ring than it can use puts it back, and takes the same again.

use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_blk::memory::{GuestAddr, Memory, Region, RegionSpec, UserAddr};
use vhost_blk::queue::{
    Chain, F_RING_PACKED, F_VERSION_1, LogTarget, Queue, QueueSetup, RingAddrs,
};

const SIZE: u16 = 8;
const DESC: u64 = 0x0000;
const DRIVER: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DATA: u64 = 0x4000;
/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const AVAIL: u16 = 1 << 7;

struct Ring {
    memory: Arc<Memory>,
    features: u64,
}

impl Ring {
    fn new(features: u64) -> Ring {
        let file = memfd_create("ring", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 0x10000).unwrap();
        let spec = RegionSpec { guest: GuestAddr(0), user: UserAddr(0), size: 0x10000, offset: 0 };
        let memory = Memory::default().with(Region::map(spec, file).unwrap()).unwrap();
        Ring { memory: Arc::new(memory), features }
    }

    fn queue(&self, base: u32) -> Queue {
        Queue::new(QueueSetup {
            index: 0,
            size: SIZE,
            addrs: RingAddrs {
                desc: UserAddr(DESC),
                driver: UserAddr(DRIVER),
                device: UserAddr(DEVICE),
            },
            features: self.features | F_VERSION_1,
            base,
            memory: self.memory.clone(),
            inflight: None,
            log: LogTarget::default(),
        })
        .unwrap()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write(GuestAddr(at), bytes).unwrap();
    }

    /// Writable chains of two descriptors each, of which number `i` has `10 + i` bytes in all.
    fn offer(&self, chains: u16) {
        let packed = self.features & F_RING_PACKED != 0;
        for i in 0..chains {
            for (k, len) in [(0, 9 + u32::from(i)), (1, 1)] {
                let at = 2 * i + k;
                let mut raw = [0; 16];
                raw[..8].copy_from_slice(&(DATA + 64 * u64::from(at)).to_le_bytes());
                raw[8..12].copy_from_slice(&len.to_le_bytes());
                let flags = WRITE | if k == 0 { NEXT } else { 0 };
                let (a, b) = if packed { (i, flags | AVAIL) } else { (flags, at + 1) };
                raw[12..14].copy_from_slice(&a.to_le_bytes());
                raw[14..].copy_from_slice(&b.to_le_bytes());
                self.put(DESC + 16 * u64::from(at), &raw);
            }
            self.put(DRIVER + 4 + 2 * u64::from(i), &(2 * i).to_le_bytes());
        }
        if !packed {
            self.put(DRIVER + 2, &chains.to_le_bytes());
        }
    }
}

fn lens(queue: &mut Queue, chains: &mut [Chain; 4]) -> Vec<u64> {
    let take = |chain: &mut Chain| queue.pop(chain).unwrap().then(|| chain.writable_len());
    chains.iter_mut().map_while(take).collect()
}

/// Taken, put back and taken again, from the beginning and from the middle; who starts at the
/// position that the queue tells finds the same.
#[test]
fn what_is_put_back_is_taken_again_in_order() {
    for features in [0, F_RING_PACKED] {
        let ring = Ring::new(features);
        ring.offer(4);
        let mut queue = ring.queue(0);
        let mut chains: [Chain; 4] = Default::default();
        let first = queue.base();
        assert_eq!(lens(&mut queue, &mut chains), [10, 11, 12, 13]);
        assert!(!queue.has_work() && queue.outstanding() == 4);
        for chain in chains.iter_mut().rev() {
            queue.put_back(chain);
        }
        assert_eq!((queue.base(), queue.outstanding()), (first, 0));

        assert!(queue.pop(&mut chains[0]).unwrap());
        queue.complete(&mut chains[0], 10);
        let second = queue.base();
        assert_eq!(lens(&mut queue, &mut chains), [11, 12, 13]);
        for chain in chains[..3].iter_mut().rev() {
            queue.put_back(chain);
        }
        assert_eq!(queue.base(), second);
        let _ = queue.publish();
        drop(queue);
        assert_eq!(lens(&mut ring.queue(second), &mut chains), [11, 12, 13]);
    }
}

/// A packed ring is put back over its end.
#[test]
fn a_packed_ring_is_put_back_into_the_round_before() {
    let ring = Ring::new(F_RING_PACKED);
    ring.offer(4);
    let mut queue = ring.queue(0);
    let mut chains: [Chain; 4] = Default::default();
    assert_eq!(lens(&mut queue, &mut chains).len(), 4);
    let end = queue.base();
    queue.put_back(&mut chains[3]);
    assert_eq!(lens(&mut queue, &mut chains), [13]);
    assert_eq!(queue.base(), end);
}

/// What is left of a chain is what counts as written.
#[test]
fn a_chain_is_shortened_at_any_byte() {
    let ring = Ring::new(0);
    ring.offer(1);
    for len in 0..12 {
        let mut queue = ring.queue(0);
        let mut chain = Chain::new();
        assert!(queue.pop(&mut chain).unwrap());
        chain.shorten(len);
        let left: usize = chain.writable().iter().map(|s| s.len()).sum();
        assert_eq!((left as u64, chain.writable_len()), (len.min(10), len.min(10)));
        assert!(chain.writable().iter().all(|s| !s.is_empty()));
    }
}
