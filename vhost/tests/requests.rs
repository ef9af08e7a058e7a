//! Every request type does what it says, over real sockets and shared memory, in every dialect
//! that front ends speak.

mod common;

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use common::{DISK_SIZE, Daemon, Event, SERIAL, capabilities, load, packed, pattern};
use vhost_blk::blk::{Capabilities, Status};
use vhost_blk::client::{Client, ClientQueue, FrontEnd, Op, Options, Span};
use vhost_blk::proto::{feature, request};
use vhost_blk::queue::{F_EVENT_IDX, F_INDIRECT_DESC};
use vhost_blk::session::End;
use zerocopy::IntoBytes;

const OK: u8 = Status::Ok as u8;
const IOERR: u8 = Status::IoError as u8;
const UNSUPP: u8 = Status::Unsupported as u8;

fn run(q: &mut ClientQueue, op: Op<'_>, offset: u64, spans: &[Span]) -> (u8, u32) {
    let c = q.run(op, offset, spans, 10_000).unwrap();
    (c.status, c.written)
}

fn span(q: &ClientQueue, at: u64, len: u32) -> Span {
    Span { offset: q.data().0 + at, len }
}

/// Writes, reads back through other spans, zeroes, discards.
fn conversation(daemon: &Daemon, q: &mut ClientQueue) {
    let mut data = vec![0; 12288];
    pattern(1, 1, &mut data);
    q.arena().write(q.data().0, &data);
    let whole = span(q, 0, 12288);
    assert_eq!(run(q, Op::Write, 8192, &[whole]), (OK, 1));
    let mut stored = vec![0; 12288];
    daemon.disk.file.read_exact_at(&mut stored, 8192).unwrap();
    assert!(stored == data, "the disk has what was written");

    // Read into three pieces, in another place, the middle one not aligned to anything.
    let pieces = [span(q, 65536, 1000), span(q, 70001, 3096), span(q, 80000, 8192)];
    assert_eq!(run(q, Op::Read, 8192, &pieces), (OK, 12289));
    let mut seen = Vec::new();
    for piece in pieces {
        let mut part = vec![0; piece.len as usize];
        q.arena().read(piece.offset, &mut part);
        seen.extend(part);
    }
    assert!(seen == data, "the pieces add up");

    assert_eq!(run(q, Op::Flush, 0, &[]), (OK, 1));
    assert_eq!(run(q, Op::WriteZeroes { ranges: &[(8192, 512)], unmap: true }, 0, &[]), (OK, 1));
    assert_eq!(run(q, Op::Discard(&[(9216, 512), (10240, 1024)]), 0, &[]), (OK, 1));
    for range in [0..512, 1024..1536, 2048..3072] {
        data[range].fill(0);
    }
    assert_eq!(run(q, Op::Read, 8192, &[whole]), (OK, 12289));
    let mut seen = vec![0; 12288];
    q.arena().read(q.data().0, &mut seen);
    assert!(seen == data, "zeroes where they were asked for and nowhere else");
}

#[test]
fn conversation_works_in_every_dialect() {
    let all = Options::default();
    let no = |bits: u64| Options { features: all.features & !bits, ..all };
    let dialects = [
        ("everything", all),
        ("no event index", no(F_EVENT_IDX)),
        ("no indirect tables", no(F_INDIRECT_DESC)),
        ("neither", no(F_EVENT_IDX | F_INDIRECT_DESC)),
        ("configuration space only", Options { protocol: feature::CONFIG, ..all }),
        ("no protocol features at all", Options { protocol: 0, ..all }),
        ("memory table", Options { protocol: all.protocol & !feature::CONFIGURE_MEM_SLOTS, ..all }),
        ("no acknowledgements", Options { protocol: all.protocol & !feature::REPLY_ACK, ..all }),
        ("tiny ring", Options { queue_size: 8, ..all }),
        ("packed", packed(all)),
        ("packed, no event index", packed(no(F_EVENT_IDX))),
        ("packed, no indirect tables", packed(no(F_INDIRECT_DESC))),
        ("packed, neither", packed(no(F_EVENT_IDX | F_INDIRECT_DESC))),
        ("packed, tiny ring of an odd size", Options { queue_size: 7, ..packed(all) }),
        ("packed, tiny, direct", Options { queue_size: 7, ..packed(no(F_INDIRECT_DESC)) }),
    ];
    for (name, options) in dialects {
        println!("dialect: {name}");
        let daemon = Daemon::new(capabilities(1));
        let (client, mut queues) = Client::connect(daemon.path(), options).unwrap();
        conversation(&daemon, &mut queues[0]);
        drop(client);
        assert_eq!(daemon.end(), Ok(End::Disconnected));
        assert_eq!(
            daemon.disk.counters.flushes.load(Ordering::Relaxed),
            u64::from(options.features & vhost_blk::blk::F_FLUSH != 0)
        );
        assert_eq!(daemon.disk.counters.unmaps.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn identity_fits_the_buffer_it_is_given() {
    let daemon = Daemon::new(capabilities(1));
    let (_client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let q = &mut queues[0];
    for len in [20, 7, 64] {
        let buffer = span(q, 0, len);
        q.arena().write(buffer.offset, &[0xee; 64]);
        assert_eq!(run(q, Op::GetId, 0, &[buffer]), (OK, len + 1));
        let mut seen = [0; 64];
        q.arena().read(buffer.offset, &mut seen);
        let n = (len as usize).min(20);
        assert_eq!(seen[..n], SERIAL[..n]);
        assert!(seen[n..].iter().all(|b| *b == 0xee), "not a byte past the serial or the buffer");
    }
}

#[test]
fn requests_that_break_a_rule_are_answered_and_not_done() {
    let daemon = Daemon::new(capabilities(1));
    let (_client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let q = &mut queues[0];
    let sector = span(q, 0, 512);
    let past = DISK_SIZE - 512;
    assert_eq!(run(q, Op::Read, past, &[sector]).0, OK);
    assert_eq!(run(q, Op::Read, DISK_SIZE, &[sector]).0, IOERR);
    assert_eq!(run(q, Op::Write, past, &[sector, sector]).0, IOERR);
    assert_eq!(run(q, Op::Write, u64::MAX - 511, &[sector]).0, IOERR);
    assert_eq!(run(q, Op::Read, 0, &[span(q, 0, 511)]).0, IOERR);
    assert_eq!(run(q, Op::Read, 0, &[span(q, 0, 513)]).0, IOERR);
    assert_eq!(run(q, Op::Discard(&[(past, 1024)]), 0, &[]).0, IOERR);
    assert_eq!(run(q, Op::Discard(&[(0, 512 << 17)]), 0, &[]).0, IOERR);
    assert_eq!(run(q, Op::Discard(&[]), 0, &[]).0, IOERR);
    assert_eq!(run(q, Op::Other(2), 0, &[sector]).0, UNSUPP);
    assert_eq!(run(q, Op::Other(14), 0, &[sector]).0, UNSUPP, "secure erase");
    assert_eq!(run(q, Op::Other(u32::MAX), 0, &[]).0, UNSUPP);
    assert_eq!(daemon.disk.counters.writes.load(Ordering::Relaxed), 0);
    assert_eq!(daemon.disk.counters.discards.load(Ordering::Relaxed), 0);
    assert_eq!(run(q, Op::Read, 0, &[]), (OK, 1), "reading nothing is legal");
}

#[test]
fn discard_with_the_unmap_flag_is_refused_as_the_specification_wants() {
    let daemon = Daemon::new(capabilities(1));
    let (_client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let q = &mut queues[0];
    // A discard request is a write-zeroes request with another number; sent by hand, as data.
    let mut range = [0u8; 16];
    range[8] = 1;
    range[12] = 1;
    q.arena().write(q.data().0, &range);
    let spans = [span(q, 0, 16)];
    q.submit(Op::Write, 0, &spans, 1).unwrap();
    let slot = q.place();
    // Requests are built from the ring's first descriptor; its header is the table's first entry.
    let mut table = [0; 8];
    q.arena().read(slot.ring.desc, &mut table);
    let header = u64::from_le_bytes(table) - vhost_blk::client::GUEST_BASE;
    let mut first = [0; 8];
    q.arena().read(header, &mut first);
    q.arena().write(u64::from_le_bytes(first) - vhost_blk::client::GUEST_BASE, &[11]);
    q.kick();
    while !q.wait(1000) {}
    assert_eq!(q.poll().unwrap().status, UNSUPP);
}

#[test]
fn read_only_disk_refuses_writes_and_offers_none() {
    let caps = Capabilities { read_only: true, ..capabilities(1) };
    let daemon = Daemon::new(caps);
    let (client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let q = &mut queues[0];
    let sector = span(q, 0, 512);
    assert_eq!(run(q, Op::Read, 0, &[sector]).0, OK);
    assert_eq!(run(q, Op::Write, 0, &[sector]).0, IOERR);
    assert_eq!(run(q, Op::Discard(&[(0, 512)]), 0, &[]).0, UNSUPP);
    assert_ne!(client.features() & vhost_blk::blk::F_RO, 0);
    assert_eq!(daemon.disk.counters.writes.load(Ordering::Relaxed), 0);
}

#[test]
fn four_queues_serve_four_threads() {
    let four = Options { queues: 4, queue_size: 64, ..Options::default() };
    let direct = Options { features: four.features & !F_INDIRECT_DESC, queue_size: 128, ..four };
    let silent = Options { features: four.features & !F_EVENT_IDX, ..four };
    let odd = Options { queue_size: 99, ..packed(direct) };
    for options in [four, direct, silent, packed(four), odd, packed(silent)] {
        let daemon = Daemon::new(capabilities(4));
        let (_client, queues) = Client::connect(daemon.path(), options).unwrap();
        std::thread::scope(|scope| {
            for (i, mut q) in queues.into_iter().enumerate() {
                scope.spawn(move || load(&mut q, i as u64, 4, |done| done < 2000));
            }
        });
        assert!(daemon.disk.counters.writes.load(Ordering::Relaxed) > 1000);
    }
}

#[test]
fn cache_mode_is_told_honestly_and_followed() {
    let daemon = Daemon::new(capabilities(1));
    let (mut client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let through = || daemon.disk.counters.write_through_writes.load(Ordering::Relaxed);
    let sector = span(&queues[0], 0, 512);
    assert!(client.write_cache().unwrap());
    run(&mut queues[0], Op::Write, 0, &[sector]);
    assert_eq!(through(), 0);
    client.set_write_cache(false).unwrap();
    assert!(!client.write_cache().unwrap());
    run(&mut queues[0], Op::Write, 0, &[sector]);
    assert_eq!(through(), 1);
    daemon.wait_for(|e| *e == Event::WriteCache(false));

    // The guest lives on over a reconnect and believes in write-through.
    client.reconnect(daemon.path()).unwrap();
    assert!(!client.write_cache().unwrap());
    run(&mut queues[0], Op::Write, 0, &[sector]);
    assert_eq!(through(), 2);
    client.set_write_cache(true).unwrap();
    run(&mut queues[0], Op::Write, 0, &[sector]);
    assert_eq!(through(), 2);
}

#[test]
fn driver_that_cannot_flush_gets_write_through() {
    use vhost_blk::blk::{F_CONFIG_WCE, F_FLUSH};
    let daemon = Daemon::new(capabilities(1));
    let features = Options::default().features & !(F_FLUSH | F_CONFIG_WCE);
    let options = Options { features, ..Options::default() };
    let (mut client, mut queues) = Client::connect(daemon.path(), options).unwrap();
    assert!(!client.write_cache().unwrap());
    assert!(client.set_write_cache(true).is_err(), "the switch was not negotiated");
    let sector = span(&queues[0], 0, 512);
    run(&mut queues[0], Op::Write, 0, &[sector]);
    assert_eq!(daemon.disk.counters.write_through_writes.load(Ordering::Relaxed), 1);
}

/// A front end (QEMU) read the configuration once, before it had negotiated anything, and showed
/// that copy to its guest for ever. It got the cache mode of a driver that cannot flush, so the
/// guest saw "write through" on a volatile cache, never sent a flush, and would have lost what it
/// had synced.
#[test]
fn cache_mode_read_before_negotiation_is_the_one_that_negotiation_leads_to() {
    let cached_at = |capabilities: Capabilities, remembered: Option<bool>| {
        let daemon = Daemon::new(capabilities);
        *daemon.cache.lock().unwrap() = remembered;
        let mut front = FrontEnd::connect(daemon.path()).unwrap();
        front.tell(request::SET_PROTOCOL_FEATURES, &feature::CONFIG, &[]).unwrap();
        let mut question = [32u32, 1, 0].as_bytes().to_vec();
        question.push(0xff);
        front.ask_bytes(request::GET_CONFIG, &question).unwrap()[12]
    };
    assert_eq!(cached_at(capabilities(1), None), 1);
    assert_eq!(cached_at(capabilities(1), Some(false)), 0);
    let durable = Capabilities { volatile_cache: false, ..capabilities(1) };
    assert_eq!(cached_at(durable, None), 0);
}
