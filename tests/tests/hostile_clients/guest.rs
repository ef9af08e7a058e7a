//! Guests that break the rules of virtio on a ring that a well-behaved front end has set up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use offshoot_tests::rng::Rng;
use vhost_blk::client::{Arena, Client, ClientQueue, GUEST_BASE, Op, Options, QueuePlace, Span};
use vhost_blk::queue::F_RING_PACKED;

use super::{SIZE, Target, options, until};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Writes a split ring by hand. Offsets count from the queue's data.
struct Hand {
    arena: Arc<Arena>,
    place: QueuePlace,
    data: u64,
}

impl Hand {
    fn of(queue: &ClientQueue) -> Hand {
        Hand { arena: Arc::clone(queue.arena()), place: queue.place(), data: queue.data().0 }
    }

    fn guest(&self, offset: u64) -> u64 {
        GUEST_BASE + self.data + offset
    }

    fn write_desc(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.arena.write(at, &addr.to_le_bytes());
        self.arena.write(at + 8, &len.to_le_bytes());
        self.arena.write(at + 12, &flags.to_le_bytes());
        self.arena.write(at + 14, &next.to_le_bytes());
    }

    fn desc(&self, i: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.write_desc(self.place.ring.desc + 16 * i, addr, len, flags, next);
    }

    /// Entry `i` of an indirect table.
    fn entry(&self, i: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.write_desc(self.data + 4096 + 16 * i, addr, len, flags, next);
    }

    fn table(&self, len: u32) {
        self.desc(0, self.guest(4096), len, INDIRECT, 0);
    }

    fn offer(&self, head: u16, idx: u16) {
        self.arena.write(self.place.ring.driver + 4, &head.to_le_bytes());
        self.arena.write(self.place.ring.driver + 2, &idx.to_le_bytes());
    }

    /// Empties the ring and fills it with one good request: a read of a sector.
    fn good(&self) {
        let end = self.place.ring.device + 6 + 8 * u64::from(self.place.size);
        let len = usize::try_from(end - self.place.ring.desc).unwrap();
        self.arena.write(self.place.ring.desc, &vec![0; len]);
        self.arena.write(self.data, &[0; 16]);
        self.desc(0, self.guest(0), 16, NEXT, 1);
        self.desc(1, self.guest(512), 512, NEXT | WRITE, 2);
        self.desc(2, self.guest(100), 1, WRITE, 0);
        self.offer(0, 1);
    }
}

/// What a guest may not do, each enough for its queue to be stopped.
const LIES: [fn(&Hand); 12] = [
    |h| h.offer(0, 1000),
    |h| h.offer(h.place.size, 1),
    |h| h.desc(0, h.guest(0), 16, NEXT, h.place.size),
    |h| h.desc(0, h.guest(0), 16, NEXT, 0),
    |h| h.desc(2, h.guest(100), 1, NEXT | WRITE, 1),
    |h| h.desc(1, 0, 512, NEXT | WRITE, 2),
    |h| h.desc(1, GUEST_BASE + h.arena.size() - 511, 512, NEXT | WRITE, 2),
    |h| h.desc(1, u64::MAX - 8, 512, NEXT | WRITE, 2),
    |h| h.desc(1, h.guest(0), u32::MAX, NEXT | WRITE, 2),
    |h| {
        h.entry(0, h.guest(8192), 32, INDIRECT, 0);
        h.table(32);
    },
    |h| {
        for i in 0..1100u16 {
            h.entry(i.into(), h.guest(0), 1, NEXT | WRITE, i + 1);
        }
        h.table(16 * 1101);
    },
    |h| h.table(u32::MAX - 15),
];

/// Loops, addresses outside, chains without end: each breaks the queue, which is reset and broken
/// again, as a guest can as often as it likes.
pub fn lies(target: &mut Target) {
    let (mut client, mut queues) = Client::connect(&target.vhost, options(2)).unwrap();
    let mut honest = queues.pop().unwrap();
    let hand = Hand::of(&queues[0]);
    let sector = Span { offset: honest.data().0, len: 512 };
    for round in 0..target.rounds * 600 {
        client.stop_queue(0).unwrap();
        hand.good();
        LIES[usize::try_from(round % LIES.len() as u64).unwrap()](&hand);
        client.start_queue(0, 0).unwrap();
        until("the guest is told that its queue broke", || client.queue_broke(0));
        if round % 50 == 0 {
            let read = honest.run(Op::Read, 0, &[sector], 20_000).unwrap();
            assert_eq!(read.status, 0, "the other queue of the same guest works");
        }
    }
}

fn scribble(hand: &Hand, rng: &mut Rng, client: &Client, idx: &mut u16) {
    let ring = hand.place.ring;
    let known = [0, 1, 2, 16, 512, 4096, hand.guest(0), hand.guest(4096), u64::MAX];
    let value = match rng.below(12) {
        i @ 0..9 => known[usize::try_from(i).unwrap()],
        _ => rng.any(),
    };
    let at = match rng.below(3) {
        0 => ring.desc + 8 * rng.below(32),
        1 => ring.driver + 4 + 2 * rng.below(64),
        _ => hand.data + 8 * rng.below(1024),
    };
    let len = if at >= ring.driver && at < ring.device { 2 } else { 8 };
    hand.arena.write(at, &value.to_le_bytes()[..len]);
    if rng.one_in(8) {
        *idx = idx.wrapping_add(1);
        hand.arena.write(ring.driver + 2, &idx.to_le_bytes());
        client.kick(0);
    }
}

/// Rings, tables and headers change while the device reads them, in rings of both formats.
pub fn scribbles(target: &mut Target) {
    for (extra, start) in [(0, 0), (F_RING_PACKED, 0x8000_8000)] {
        let plain = options(2);
        let wanted = Options { features: plain.features | extra, ..plain };
        let (mut client, queues) = Client::connect(&target.vhost, wanted).unwrap();
        let hand = Hand::of(&queues[0]);
        for _ in 0..target.rounds * 30 {
            client.stop_queue(0).unwrap();
            hand.good();
            client.start_queue(0, start).unwrap();
            let mut idx = 1;
            for _ in 0..5000 {
                scribble(&hand, &mut target.rng, &client, &mut idx);
            }
        }
    }
}

/// Well-formed requests of unknown types, past the end, of odd lengths, of too many ranges: all are
/// answered with an error, and the queue goes on.
pub fn asks_nonsense(target: &mut Target) {
    let (mut client, mut queues) = Client::connect(&target.vhost, options(1)).unwrap();
    let queue = &mut queues[0];
    let data = queue.data().0;
    let rng = &mut target.rng;
    for _ in 0..target.rounds * 3000 {
        let span = |len| [Span { offset: data, len }];
        let far = [SIZE, SIZE - 512, 1 << 40, u64::MAX / 512 * 512];
        let offset = far[usize::try_from(rng.below(4)).unwrap()];
        let ranges: Vec<_> = (0..=rng.below(16)).map(|_| (offset, 1 << 30)).collect();
        let unknown = [2, 3, 5, 9, 10, 12, 14, 99, u32::MAX];
        let (op, offset, spans) = match rng.below(6) {
            0 => (Op::Other(unknown[usize::try_from(rng.below(9)).unwrap()]), 0, span(512)),
            1 => (Op::Read, offset, span(8192)),
            2 => (Op::Write, offset, span(8192)),
            3 => (Op::Read, 0, span(513)),
            4 => (Op::Discard(&ranges), 0, span(0)),
            _ => (Op::WriteZeroes { ranges: &ranges, unmap: true }, 0, span(0)),
        };
        let answer = queue.run(op, offset, &spans, 20_000).unwrap();
        assert_ne!(answer.status, 0, "{op:?} at {offset}");
    }
    assert!(!client.queue_broke(0));
}

/// Doorbells that ring all the time, for requests and for nothing.
pub fn kicks(target: &mut Target) {
    let (mut client, mut queues) = Client::connect(&target.vhost, options(2)).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let ringing = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                (0..100).for_each(|i| client.kick(i % 2));
            }
        });
        for queue in &mut queues {
            let sector = Span { offset: queue.data().0, len: 512 };
            for _ in 0..target.rounds * 200 {
                let read = queue.run(Op::Read, 0, &[sector], 20_000).unwrap();
                assert_eq!(read.status, 0);
            }
        }
        thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        ringing.join().unwrap();
    });
    assert!(!client.queue_broke(0) && !client.queue_broke(1));
}
