//! A guest that breaks the rules of its ring stops that ring, and nothing else.

mod common;
#[path = "common/guest.rs"]
mod guest;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Daemon, Event, Rng, capabilities};
use guest::{AVAIL, Hand, INDIRECT, LIES, NEXT, PACKED_LIES, USED, WRITE};
use vhost_blk::client::{Client, Op, Options, Span};
use vhost_blk::queue::F_INDIRECT_DESC;

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
                let mut idx = 1;
                while !quit.load(Ordering::Relaxed) {
                    if hand.scribble(&mut idx, &mut || scribbler.next()) {
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
