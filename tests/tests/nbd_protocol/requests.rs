//! Requests that are right, wrong, many, or never read the reply of.

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use blockd::nbd::wire::{Style, chunk, command as c, option};
use blockd::nbd::{Export, Listener, NbdServer, ServerOptions, VolumeExport};
use format::Kind;
use offshoot_tests::nbd::{Client, Disks, Named, PATIENCE, in_service, request};
use offshoot_tests::until;

use super::{
    EINVAL, EIO, ENOSPC, ENOTSUP, EOVERFLOW, EPERM, ESHUTDOWN, MIB, Memory, SIZE, STYLES,
    assert_serves, serve,
};

#[test]
fn requests_out_of_range_get_their_error_and_nothing_else() {
    let served = serve(Memory::new());
    for style in STYLES {
        let mut client = served.transmitting("memory", style);
        let mut errno = |command: (u16, u16), offset: u64, len: u64| {
            let data = vec![1; if command.0 == c::WRITE { len as usize } else { 0 }];
            client.errno(command, (offset, len), &data)
        };
        for (offset, len) in [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX - 511, 512)] {
            assert_eq!(errno((c::READ, 0), offset, len), EINVAL);
            assert_eq!(errno((c::TRIM, 0), offset, len), EINVAL);
            assert_eq!(errno((c::WRITE, 0), offset, len), ENOSPC);
            assert_eq!(errno((c::WRITE_ZEROES, 0), offset, len), ENOSPC);
        }
        for command in [c::READ, c::WRITE, c::TRIM, c::WRITE_ZEROES] {
            assert_eq!(errno((command, 0), 1, 512), EINVAL, "{command}");
            assert_eq!(errno((command, 0), 0, 511), EINVAL, "{command}");
        }
        assert_eq!(errno((c::BLOCK_STATUS, 0), 0, 512), EINVAL, "no context selected");
        assert_eq!(errno((5, 0), 0, 512), EINVAL, "CACHE");
        assert_eq!(errno((4711, 0), 0, 512), EINVAL);
        assert_eq!(errno((c::READ, c::NO_HOLE), 0, 512), EINVAL);
        assert_eq!(errno((c::FLUSH, 0), 512, 0), EINVAL);
        assert_eq!(errno((c::WRITE, c::FUA), 0, 512), 0);
        assert_eq!(errno((c::READ, 0), 0, 0), 0);
        assert_eq!(errno((c::WRITE_ZEROES, c::FAST_ZERO), 0, 512), 0);
        let slow = (c::WRITE_ZEROES, c::FAST_ZERO | c::NO_HOLE);
        assert_eq!(errno(slow, 0, 512), ENOTSUP);
    }
    let status = served.server.status();
    assert_eq!(status.unfinished, 0, "{status:?}");
}

#[test]
fn too_long_a_read_is_an_error_and_too_long_a_write_ends_the_connection() {
    let disks = Disks::new();
    let disk = disks.disk(1, 128 * MIB / 512, None);
    let served = serve(Arc::new(VolumeExport::new(in_service("memory", disk))));
    for (style, errno) in STYLES.into_iter().zip([EINVAL, EOVERFLOW, EOVERFLOW]) {
        let mut client = served.transmitting("memory", style);
        let long = (0, 32 * MIB + 512);
        client.request((c::READ, 0), 1, long, &[]);
        if style == Style::Simple {
            assert_eq!(client.simple(0), (1, errno, vec![]));
        } else {
            let chunks = client.chunks();
            assert_eq!(chunks.len(), 1);
            assert_eq!(chunks[0].payload[..4], errno.to_be_bytes());
        }
        assert_eq!(client.errno((c::READ, 0), (0, 32 * MIB), &[]), 0);
        client.send(&request(style, (c::WRITE, 0), 2, long));
        assert_eq!(client.until_closed(), b"");
    }
    assert_serves(&served);
}

#[test]
fn errors_of_the_disk_reach_the_client_as_what_they_are() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    for style in STYLES {
        let mut client = served.transmitting("memory", style);
        for (kind, errno) in [
            (Kind::NoSpace, ENOSPC),
            (Kind::ReadOnly, EPERM),
            (Kind::Invalid, EINVAL),
            (Kind::Corrupt, EIO),
            (Kind::Io, EIO),
            (Kind::Failed, EIO),
            (Kind::Cancelled, ESHUTDOWN),
        ] {
            *memory.fail.lock().unwrap() = Some(kind);
            assert_eq!(client.errno((c::READ, 0), (0, 512), &[]), errno);
            assert_eq!(client.errno((c::WRITE, 0), (0, 512), &[1; 512]), errno);
            assert_eq!(client.errno((c::TRIM, 0), (0, 512), &[]), errno);
            assert_eq!(client.errno((c::FLUSH, 0), (0, 0), &[]), errno);
        }
        *memory.fail.lock().unwrap() = None;
        assert_eq!(client.errno((c::FLUSH, 0), (0, 0), &[]), 0);
    }
}

/// FUA means durable before the reply, on everything that writes; without it nothing is flushed.
#[test]
fn fua_flushes() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    let mut client = served.transmitting("memory", Style::Structured);
    for (command, data) in [(c::WRITE, vec![1; 512]), (c::WRITE_ZEROES, vec![]), (c::TRIM, vec![])]
    {
        for (flags, flushes) in [(0, 0), (c::FUA, 1)] {
            memory.flushes.store(0, Ordering::SeqCst);
            assert_eq!(client.errno((command, flags), (0, 512), &data), 0);
            assert_eq!(memory.flushes.load(Ordering::SeqCst), flushes, "{command} {flags}");
        }
    }
}

/// A request that waits (for space on the host, say) holds back no other of its connection.
#[test]
fn a_held_request_holds_back_no_other() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    for style in STYLES {
        let mut client = served.transmitting("memory", style);
        memory.hold(Some(8192));
        client.request((c::WRITE, 0), 1, (8192, 512), &[1; 512]);
        memory.wait_for_held(1);
        for round in 0..50 {
            let at = (round % 8) * 512;
            assert_eq!(client.errno((c::WRITE, 0), (at, 512), &[2; 512]), 0);
            assert_eq!(client.errno((c::READ, 0), (at, 512), &[]), 0);
            assert_eq!(client.errno((c::FLUSH, 0), (0, 0), &[]), 0);
        }
        memory.hold(None);
        let cookie = match style {
            Style::Simple => client.simple(0).0,
            _ => client.chunk().cookie,
        };
        assert_eq!(cookie, 1);
    }
}

/// Many requests at once, each answered once, with the data of its place.
#[test]
fn many_requests_in_flight_are_each_answered_once() {
    let memory = Memory::new();
    for (i, sector) in memory.bytes.lock().unwrap().chunks_mut(512).enumerate() {
        sector.fill((i % 251) as u8 + 1);
    }
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    for style in [Style::Structured, Style::Extended] {
        let mut client = served.transmitting("memory", style);
        let mut out = client.socket.try_clone().unwrap();
        let sectors = SIZE / 512;
        let sender = thread::spawn(move || {
            for i in 0..20_000u64 {
                let at = i * 7919 % (sectors - 64);
                let len = 512 * (1 + i % 64);
                let (command, len) = if i % 100 == 99 { (c::FLUSH, 0) } else { (c::READ, len) };
                let at = if len == 0 { 0 } else { at * 512 };
                out.write_all(&request(style, (command, 0), i, (at, len))).unwrap();
            }
        });
        let mut answered = vec![0u32; 20_000];
        let mut left = answered.len();
        while left > 0 {
            let chunk = client.chunk();
            if chunk.kind == chunk::OFFSET_DATA {
                let at = u64::from_be_bytes(chunk.payload[..8].try_into().unwrap()) / 512;
                for (i, sector) in chunk.payload[8..].chunks(512).enumerate() {
                    let want = ((at as usize + i) % 251) as u8 + 1;
                    assert!(sector.iter().all(|&b| b == want), "sector {at} + {i}");
                }
            }
            assert!(chunk.kind >> 15 == 0, "{chunk:?}");
            if chunk.flags & chunk::DONE != 0 {
                answered[chunk.cookie as usize] += 1;
                left -= 1;
            }
        }
        sender.join().unwrap();
        assert!(answered.iter().all(|&n| n == 1));
    }
}

/// A client that sends without reading its replies is not read from for ever, takes no more than
/// its share, and nobody else notices.
#[test]
fn a_client_that_does_not_read_hurts_itself_only() {
    let served = serve(Memory::new());
    let mut greedy = served.transmitting("memory", Style::Structured);
    greedy.socket.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let read = request(Style::Structured, (c::READ, 0), 1, (0, MIB));
    let sent = (0..1_000_000).take_while(|_| greedy.socket.write_all(&read).is_ok()).count();
    assert!(sent < 1_000_000, "the server reads on and on");

    assert_serves(&served);
    drop(greedy);
    served.server.stop(PATIENCE).unwrap();
}

/// A simple client sends all its requests before it looks at a reply. While the replies to its
/// reads fill the socket, its write must be taken all the same, or both sides wait for ever.
#[test]
fn a_client_that_reads_its_replies_late_is_served() {
    let disks = Disks::new();
    let disk = disks.disk(1, 64 * MIB / 512, None);
    disk.write(0, 0, &[1; 8 << 20]).unwrap();
    let served = serve(Arc::new(VolumeExport::new(in_service("memory", disk))));
    for style in [Style::Structured, Style::Extended] {
        let mut client = served.transmitting("memory", style);
        client.socket.set_write_timeout(Some(PATIENCE)).unwrap();
        for cookie in 0..8 {
            client.request((c::READ, 0), cookie, (cookie * MIB, MIB), &[]);
        }
        client.request((c::WRITE, 0), 8, (32 * MIB, 16 * MIB), &vec![2; 16 << 20]);
        let mut done: Vec<u64> = (0..9)
            .map(|_| client.chunk())
            .inspect(|c| assert_eq!(c.flags, 1))
            .map(|c| c.cookie)
            .collect();
        done.sort_unstable();
        assert_eq!(done, (0..9).collect::<Vec<u64>>());
    }
}

/// Story: each flush of a client that waits for its reply woke another thread to read what the
/// client had not sent, and so did the write after it: 20 µs for the two.
#[test]
fn a_client_that_waits_for_each_reply_is_served_by_one_thread() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    let mut client = served.transmitting("memory", Style::Simple);
    let mut flush = |times: usize| {
        for cookie in 0..times as u64 {
            client.request((c::FLUSH, 0), cookie, (0, 0), &[]);
            assert_eq!(client.simple(0), (cookie, 0, Vec::new()));
        }
        memory.flushed_by.lock().unwrap().split_off(0)
    };
    flush(100);

    let threads = flush(400);

    // On a busy machine a flush may take long enough for another thread to take over.
    let changes = threads.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(changes < 100, "another thread {changes} times of {}", threads.len());
}

/// A client that waited for each of its replies, and then does not: a slow flush holds nobody up.
#[test]
fn what_comes_during_a_slow_flush_is_served_meanwhile() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    let mut client = served.transmitting("memory", Style::Simple);
    for cookie in 0..100 {
        client.request((c::FLUSH, 0), cookie, (0, 0), &[]);
        assert_eq!(client.simple(0), (cookie, 0, Vec::new()));
    }
    memory.flush_us.store(2_000_000, Ordering::SeqCst);

    client.request((c::FLUSH, 0), 1000, (0, 0), &[]);
    // Not together: the server must not know of the second when it begins with the first.
    until("the flush is under way", || memory.flushes.load(Ordering::SeqCst) == 101);
    let begun = Instant::now();
    client.request((c::READ, 0), 1001, (0, 512), &[]);
    let first = client.simple(512);

    assert_eq!((first.0, first.1), (1001, 0), "the read overtakes the flush");
    assert!(begun.elapsed() < Duration::from_secs(1), "after {:?}", begun.elapsed());
    assert_eq!(client.simple(0), (1000, 0, Vec::new()));
}

/// Clients that die in the middle of a message, and of a write.
#[test]
fn clients_that_die_leave_nothing_behind() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    let whole = [request(Style::Simple, (c::WRITE, 0), 1, (0, 65536)), vec![7; 65536]].concat();
    for cut in [0, 1, 27, 28, 29, 5000, whole.len() - 1] {
        let mut client = served.transmitting("memory", Style::Simple);
        client.send(&whole[..cut]);
        drop(client);
        let mut client = served.transmitting("memory", Style::Simple);
        client.send(&whole[..cut]);
        client.socket.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.until_closed(), b"", "cut at {cut}");
    }
    assert!(memory.bytes.lock().unwrap().iter().all(|&b| b == 0), "no write was complete");
    let mut client = served.client();
    client.option_header(option::GO, 100);
    drop(client);
    assert_serves(&served);
    let begun = Instant::now();
    while !served.server.status().connections.is_empty() {
        assert!(begun.elapsed() < PATIENCE, "{:?}", served.server.status());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn several_sockets_serve_the_same_exports() {
    let dir = tempfile::tempdir().unwrap();
    let listeners = ["a", "b"].map(|n| UnixListener::bind(dir.path().join(n)).unwrap());
    let exports = Arc::new(Named(vec![Memory::new()]));
    let listeners = listeners.into_iter().map(Listener::Unix).collect();
    let server = NbdServer::start(listeners, exports, ServerOptions::default()).unwrap();
    for name in ["a", "b"] {
        let mut client = Client::connect(&dir.path().join(name)).greeted();
        assert_eq!(client.go("memory").0, SIZE);
    }
    let status = server.status();
    assert_eq!(status.accepted, 2);
    assert!(status.connections.iter().all(|c| c.peer.starts_with("process ")), "{status:?}");
}
