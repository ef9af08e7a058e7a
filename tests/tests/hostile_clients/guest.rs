//! Guests that break the rules of virtio on a ring that a well-behaved front end has set up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};
use vhost_blk::queue::F_RING_PACKED;

use super::hand::{Hand, LIES, PACKED_LIES};
use super::{SIZE, Target, options, until};

/// A format of rings: its feature bit, how a good request is written by hand, where a ring begins.
type Format = (u64, fn(&Hand), u32);

const SPLIT: Format = (0, Hand::good, 0);
const PACKED: Format = (F_RING_PACKED, Hand::good_packed, 0x8000_8000);

fn connect(target: &Target, format: Format) -> (Client, Vec<ClientQueue>) {
    let plain = options(2);
    let wanted = Options { features: plain.features | format.0, ..plain };
    let (client, queues) = Client::connect(&target.vhost, wanted).unwrap();
    assert_eq!(client.features() & F_RING_PACKED, format.0);
    (client, queues)
}

/// Loops, addresses outside, chains without end: each breaks the queue, which is reset and broken
/// again, as a guest can as often as it likes.
pub fn lies(target: &mut Target) {
    for (format, lies) in [(SPLIT, LIES), (PACKED, PACKED_LIES)] {
        let (mut client, mut queues) = connect(target, format);
        let mut honest = queues.pop().unwrap();
        let hand = Hand::new(&queues[0]);
        let sector = Span { offset: honest.data().0, len: 512 };
        for (round, (name, _, lie)) in (0..target.rounds * 300).zip(lies.iter().cycle()) {
            client.stop_queue(0).unwrap();
            format.1(&hand);
            lie(&hand);
            client.start_queue(0, format.2).unwrap();
            until(&format!("{name}: its queue broke"), || client.queue_broke(0));
            if round % 50 == 0 {
                let read = honest.run(Op::Read, 0, &[sector], 20_000).unwrap();
                assert_eq!(read.status, 0, "the other queue of the same guest works");
            }
        }
    }
}

/// Rings, tables and headers change while the device reads them, in rings of both formats.
pub fn scribbles(target: &mut Target) {
    for format in [SPLIT, PACKED] {
        let (mut client, queues) = connect(target, format);
        let (_, good, start) = format;
        let hand = Hand::new(&queues[0]);
        for _ in 0..target.rounds * 30 {
            client.stop_queue(0).unwrap();
            good(&hand);
            client.start_queue(0, start).unwrap();
            let mut idx = 1;
            for _ in 0..5000 {
                if hand.scribble(&mut idx, &mut || target.rng.any()) {
                    client.kick(0);
                }
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
