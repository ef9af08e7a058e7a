//! A guest that breaks the rules of its ring stops that ring, and nothing else.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Daemon, Event, Rng, capabilities};
use vhost_blk::client::{Arena, Client, ClientQueue, GUEST_BASE, Op, Options, QueuePlace, Span};
use vhost_blk::queue::F_INDIRECT_DESC;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Writes rings by hand. Offsets count from the queue's data area.
struct Hand {
    arena: Arc<Arena>,
    place: QueuePlace,
    data: u64,
}

impl Hand {
    fn new(q: &ClientQueue) -> Hand {
        Hand { arena: q.arena().clone(), place: q.place(), data: q.data().0 }
    }

    fn guest(&self, offset: u64) -> u64 {
        GUEST_BASE + self.data + offset
    }

    fn desc_at(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.arena.write(at, &addr.to_le_bytes());
        self.arena.write(at + 8, &len.to_le_bytes());
        self.arena.write(at + 12, &flags.to_le_bytes());
        self.arena.write(at + 14, &next.to_le_bytes());
    }

    fn desc(&self, i: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.desc_at(self.place.ring.desc + 16 * i, addr, len, flags, next);
    }

    /// Entry `i` of an indirect table at data offset 4096.
    fn entry(&self, i: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.desc_at(self.data + 4096 + 16 * i, addr, len, flags, next);
    }

    fn table(&self, len: u32) {
        self.desc(0, self.guest(4096), len, INDIRECT, 0);
    }

    fn offer(&self, head: u16, idx: u16) {
        self.arena.write(self.place.ring.driver + 4, &head.to_le_bytes());
        self.arena.write(self.place.ring.driver + 2, &idx.to_le_bytes());
    }

    /// A read request of one sector, header at 0, data at 512, status at 100.
    fn header(&self, kind: u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        self.arena.write(self.data, &header);
    }

    fn used(&self) -> u16 {
        let mut idx = [0; 2];
        self.arena.read(self.place.ring.device + 2, &mut idx);
        u16::from_le_bytes(idx)
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.arena.read(self.data + 100, &mut status);
        status[0]
    }

    /// Empties the ring and fills it with one good request.
    fn good(&self) {
        let end = self.place.ring.device + 6 + 8 * u64::from(self.place.size);
        let len = usize::try_from(end - self.place.ring.desc).unwrap();
        self.arena.write(self.place.ring.desc, &vec![0; len]);
        self.header(0);
        self.arena.write(self.data + 100, &[0xff]);
        self.desc(0, self.guest(0), 16, NEXT, 1);
        self.desc(1, self.guest(512), 512, NEXT | WRITE, 2);
        self.desc(2, self.guest(100), 1, WRITE, 0);
        self.offer(0, 1);
    }
}

type Lie = (&'static str, &'static str, fn(&Hand));

/// What the guest does, what the daemon is to say, and how.
const LIES: &[Lie] = &[
    ("index jump", "the available index moved by more", |h| h.offer(0, 1000)),
    ("head outside", "a descriptor number is outside", |h| h.offer(h.place.size, 1)),
    ("next outside", "a descriptor number is outside", |h| {
        h.desc(0, h.guest(0), 16, NEXT, h.place.size);
    }),
    ("loop of one", "a descriptor chain loops", |h| h.desc(0, h.guest(0), 16, NEXT, 0)),
    ("loop of three", "a descriptor chain loops", |h| h.desc(2, h.guest(100), 1, NEXT | WRITE, 1)),
    ("address 0", "not in guest memory", |h| h.desc(1, 0, 512, NEXT | WRITE, 2)),
    ("address past the end", "not in guest memory", |h| {
        h.desc(1, GUEST_BASE + h.arena.size() - 511, 512, NEXT | WRITE, 2);
    }),
    ("address that wraps", "not in guest memory", |h| {
        h.desc(1, u64::MAX - 8, 512, NEXT | WRITE, 2)
    }),
    ("length of 4 GiB", "a descriptor chain is too long", |h| {
        h.desc(1, h.guest(0), u32::MAX, NEXT | WRITE, 2)
    }),
    ("header not in memory", "not in guest memory", |h| h.desc(0, 77, 16, NEXT, 1)),
    ("status not in memory", "not in guest memory", |h| h.desc(2, 77, 1, WRITE, 0)),
    ("readable after writable", "a readable buffer follows", |h| {
        h.desc(2, h.guest(100), 1, 0, 0);
    }),
    ("nothing writable", "no room for its status", |h| {
        h.desc(1, h.guest(512), 512, 0, 0);
    }),
    ("all buffers empty", "no room for its status", |h| h.desc(0, h.guest(0), 0, 0, 0)),
    ("empty table", "no whole number of descriptors", |h| h.table(0)),
    ("table of one and a half", "no whole number of descriptors", |h| h.table(24)),
    ("table outside memory", "not in guest memory", |h| h.desc(0, 4096, 32, INDIRECT, 0)),
    ("table that wraps", "not in guest memory", |h| h.desc(0, u64::MAX - 15, 32, INDIRECT, 0)),
    ("table with a successor", "nested or has a successor", |h| {
        h.desc(0, h.guest(4096), 32, INDIRECT | NEXT, 1);
    }),
    ("table in a table", "nested or has a successor", |h| {
        h.entry(0, h.guest(8192), 32, INDIRECT, 0);
        h.table(32);
    }),
    ("table that loops", "a descriptor chain loops", |h| {
        h.entry(0, h.guest(0), 16, NEXT, 1);
        h.entry(1, h.guest(512), 1, NEXT | WRITE, 1);
        h.table(32);
    }),
    ("table whose next is outside", "a descriptor number is outside", |h| {
        h.entry(0, h.guest(0), 16, NEXT, 2);
        h.table(32);
    }),
    ("more segments than anybody needs", "a descriptor chain is too long", |h| {
        for i in 0..1100u16 {
            h.entry(i.into(), h.guest(0), 1, NEXT | WRITE, i + 1);
        }
        h.table(16 * 1101);
    }),
    ("more than 4 GiB in all", "a descriptor chain is too long", |h| {
        let len = u32::try_from(h.arena.size()).unwrap();
        for i in 0..1000u16 {
            h.entry(i.into(), GUEST_BASE, len, NEXT | WRITE, i + 1);
        }
        h.table(16 * 1001);
    }),
];

fn two_queues() -> Options {
    Options { queues: 2, data_size: 8 << 20, ..Options::default() }
}

#[test]
fn each_lie_is_named_and_stops_only_its_own_ring() {
    let daemon = Daemon::new(capabilities(2));
    let (mut client, mut queues) = Client::connect(daemon.path(), two_queues()).unwrap();
    let mut honest = queues.pop().unwrap();
    let hand = Hand::new(&queues[0]);
    let sector = Span { offset: honest.data().0, len: 512 };
    for (name, reason, lie) in LIES {
        client.stop_queue(0).unwrap();
        hand.good();
        lie(&hand);
        client.start_queue(0, 0).unwrap();
        let event = daemon.wait_for(|e| matches!(e, Event::QueueFailed(..)));
        let Event::QueueFailed(0, said) = event else { panic!("{name}: {event:?}") };
        assert!(said.contains(reason), "{name}: the daemon said {said:?}");
        assert!(client.queue_broke(0), "{name}: the error doorbell rings");
        assert_eq!((hand.used(), hand.status()), (0, 0xff), "{name}: nothing is answered");
        assert_eq!(honest.run(Op::Read, 0, &[sector], 10_000).unwrap().status, 0, "{name}");

        client.stop_queue(0).unwrap();
        hand.good();
        client.start_queue(0, 0).unwrap();
        common_wait(|| hand.used() == 1);
        assert_eq!(hand.status(), 0, "{name}: after a reset the ring works again");
    }
    assert!(!client.queue_broke(1));
}

fn common_wait(done: impl Fn() -> bool) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !done() {
        assert!(std::time::Instant::now() < end, "it takes too long");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// One hand-made ring that is not a lie: does it work?
fn accepted(what: &str, make: fn(&Hand), status: u8) {
    let daemon = Daemon::new(capabilities(1));
    let (mut client, queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let hand = Hand::new(&queues[0]);
    client.stop_queue(0).unwrap();
    hand.good();
    make(&hand);
    client.start_queue(0, 0).unwrap();
    common_wait(|| hand.used() == 1);
    assert_eq!(hand.status(), status, "{what}");
    assert!(!client.queue_broke(0), "{what}");
}

#[test]
fn odd_but_legal_requests_work() {
    accepted(
        "header in pieces, one of them empty",
        |h| {
            h.desc(0, h.guest(0), 3, NEXT, 5);
            h.desc(5, h.guest(3), 0, NEXT, 6);
            h.desc(6, h.guest(3), 13, NEXT, 1);
        },
        0,
    );
    accepted(
        "status at the end of the data buffer",
        |h| {
            // 512 bytes that end at the status byte.
            h.desc(1, h.guest(100) - 512, 513, WRITE, 0);
        },
        0,
    );
    accepted(
        "direct descriptor, then a table",
        |h| {
            h.entry(0, h.guest(512), 512, NEXT | WRITE, 1);
            h.entry(1, h.guest(100), 1, WRITE, 0);
            h.desc(1, h.guest(4096), 32, INDIRECT | WRITE, 0);
        },
        0,
    );
    accepted("header cut short", |h| h.desc(0, h.guest(0), 15, NEXT, 1), 1);
    accepted("no header at all", |h| h.desc(0, h.guest(100), 1, WRITE, 0), 1);
    accepted("unknown type", |h| h.header(99), 2);
    accepted("data of half a sector", |h| h.desc(1, h.guest(512), 256, NEXT | WRITE, 2), 1);
}

#[test]
fn table_without_negotiation_is_a_lie() {
    let daemon = Daemon::new(capabilities(1));
    let features = Options::default().features & !F_INDIRECT_DESC;
    let options = Options { features, ..Options::default() };
    let (mut client, queues) = Client::connect(daemon.path(), options).unwrap();
    let hand = Hand::new(&queues[0]);
    client.stop_queue(0).unwrap();
    hand.good();
    hand.table(32);
    client.start_queue(0, 0).unwrap();
    let event = daemon.wait_for(|e| matches!(e, Event::QueueFailed(..)));
    let Event::QueueFailed(0, said) = event else { panic!("{event:?}") };
    assert!(said.contains("not negotiated"), "{said}");
}

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

impl Hand {
    /// Descriptor `i` of a packed ring.
    fn packed(&self, i: u64, addr: u64, len: u32, id: u16, flags: u16) {
        self.desc_at(self.place.ring.desc + 16 * i, addr, len, id, flags);
    }

    /// Empties a packed ring and puts one good request into it.
    fn good_packed(&self) {
        self.good();
        self.arena.write(self.place.ring.desc, &vec![0; 16 * usize::from(self.place.size)]);
        self.packed(0, self.guest(0), 16, 0, NEXT | AVAIL);
        self.packed(1, self.guest(512), 512, 0, NEXT | WRITE | AVAIL);
        self.packed(2, self.guest(100), 1, 7, WRITE | AVAIL);
    }

    fn packed_table(&self, len: u32) {
        self.packed(0, self.guest(4096), len, 7, INDIRECT | AVAIL);
    }

    /// Flags and id of the first descriptor.
    fn answer(&self) -> (u16, u16) {
        let mut raw = [0; 4];
        self.arena.read(self.place.ring.desc + 12, &mut raw);
        (u16::from_le_bytes([raw[0], raw[1]]), u16::from_le_bytes([raw[2], raw[3]]))
    }
}

const PACKED_LIES: &[Lie] = &[
    ("loop", "a descriptor chain loops", |h| {
        (0..128).for_each(|i| h.packed(i, h.guest(0), 1, 0, NEXT | AVAIL));
    }),
    ("address outside", "not in guest memory", |h| {
        h.packed(1, 0, 512, 0, NEXT | WRITE | AVAIL);
    }),
    ("address that wraps", "not in guest memory", |h| {
        h.packed(1, u64::MAX, 512, 0, NEXT | WRITE | AVAIL);
    }),
    ("readable after writable", "a readable buffer follows", |h| {
        h.packed(2, h.guest(100), 1, 7, AVAIL);
    }),
    ("nothing writable", "no room for its status", |h| h.packed(0, h.guest(0), 16, 7, AVAIL)),
    ("table in a chain", "nested or has a successor", |h| {
        h.packed(1, h.guest(4096), 32, 0, INDIRECT | AVAIL);
    }),
    ("table with a successor", "nested or has a successor", |h| {
        h.packed(0, h.guest(4096), 32, 0, INDIRECT | NEXT | AVAIL);
    }),
    ("table in a table", "nested or has a successor", |h| {
        h.desc_at(h.data + 4096, h.guest(0), 16, 0, INDIRECT);
        h.packed_table(32);
    }),
    ("empty table", "no whole number of descriptors", |h| h.packed_table(0)),
    ("half a descriptor", "no whole number of descriptors", |h| h.packed_table(8)),
    ("table outside", "not in guest memory", |h| h.packed(0, 0, 32, 7, INDIRECT | AVAIL)),
    ("table of a million", "a descriptor chain is too long", |h| h.packed_table(16 << 20)),
];

#[test]
fn each_lie_in_a_packed_ring_is_named_and_stops_only_its_own_ring() {
    const START: u32 = 0x8000_8000;
    let daemon = Daemon::new(capabilities(2));
    let options = common::packed(two_queues());
    let (mut client, mut queues) = Client::connect(daemon.path(), options).unwrap();
    let mut honest = queues.pop().unwrap();
    let hand = Hand::new(&queues[0]);
    let sector = Span { offset: honest.data().0, len: 512 };
    for (name, reason, lie) in PACKED_LIES {
        client.stop_queue(0).unwrap();
        hand.good_packed();
        lie(&hand);
        let before = hand.answer();
        client.start_queue(0, START).unwrap();
        let event = daemon.wait_for(|e| matches!(e, Event::QueueFailed(..)));
        let Event::QueueFailed(0, said) = event else { panic!("{name}: {event:?}") };
        assert!(said.contains(reason), "{name}: the daemon said {said:?}");
        assert!(client.queue_broke(0), "{name}: the error doorbell rings");
        assert_eq!((hand.answer(), hand.status()), (before, 0xff), "{name}: nothing is answered");
        assert_eq!(honest.run(Op::Read, 0, &[sector], 10_000).unwrap().status, 0, "{name}");

        client.stop_queue(0).unwrap();
        hand.good_packed();
        client.start_queue(0, START).unwrap();
        common_wait(|| hand.answer() == (7, AVAIL | USED | WRITE));
        assert_eq!(hand.status(), 0, "{name}: after a reset the ring works again");
    }
}

#[test]
fn kick_storm_costs_nothing_but_time() {
    let daemon = Daemon::new(capabilities(1));
    let (mut client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let q = &mut queues[0];
    let sector = Span { offset: q.data().0, len: 512 };
    for _ in 0..20_000 {
        client.kick(0);
    }
    assert_eq!(q.run(Op::Read, 0, &[sector], 10_000).unwrap().status, 0);
    assert!(!client.queue_broke(0));
}

/// The guest scribbles over ring, tables and headers while the device reads them.
#[test]
fn memory_that_changes_while_it_is_read_hurts_nobody_else() {
    scribble(two_queues(), 0, Hand::good, |h| h.used() == 1);
    let done = |h: &Hand| h.answer().1 & USED != 0;
    scribble(common::packed(two_queues()), 0x8000_8000, Hand::good_packed, done);
}

fn scribble(options: Options, start: u32, good: fn(&Hand), done: impl Fn(&Hand) -> bool) {
    let mut rng = Rng(common::seed("scribbling guest"));
    let daemon = Daemon::new(capabilities(2));
    let (mut client, mut queues) = Client::connect(daemon.path(), options).unwrap();
    let mut honest = queues.pop().unwrap();
    let sector = Span { offset: honest.data().0, len: 512 };
    let hand = Hand::new(&queues[0]);
    for _ in 0..20 {
        client.stop_queue(0).unwrap();
        good(&hand);
        client.start_queue(0, start).unwrap();
        let quit = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let mut scribbler = rng.clone();
            let (quit, hand, client) = (&quit, &hand, &client);
            scope.spawn(move || {
                let ring = hand.place.ring;
                let interesting =
                    [0u64, 1, 2, 16, 512, 4096, hand.guest(0), hand.guest(4096), u64::MAX];
                let mut idx = 1u16;
                while !quit.load(Ordering::Relaxed) {
                    let value = interesting[usize::try_from(scribbler.below(9)).unwrap()];
                    let value = if scribbler.below(4) == 0 { scribbler.next() } else { value };
                    let at = match scribbler.below(3) {
                        0 => ring.desc + 8 * scribbler.below(32),
                        1 => ring.driver + 4 + 2 * scribbler.below(64),
                        _ => hand.data + 8 * scribbler.below(1024),
                    };
                    let bytes = if at >= ring.driver && at < ring.device { 2 } else { 8 };
                    hand.arena.write(at, &value.to_le_bytes()[..bytes]);
                    if scribbler.below(8) == 0 {
                        idx = idx.wrapping_add(1);
                        hand.arena.write(ring.driver + 2, &idx.to_le_bytes());
                        client.kick(0);
                    }
                }
            });
            for _ in 0..50 {
                assert_eq!(honest.run(Op::Read, 0, &[sector], 10_000).unwrap().status, 0);
            }
            quit.store(true, Ordering::Relaxed);
        });
        rng.next();
    }
    client.stop_queue(0).unwrap();
    good(&hand);
    client.start_queue(0, start).unwrap();
    common_wait(|| done(&hand));
}
