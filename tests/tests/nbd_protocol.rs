//! The NBD server against clients that ask for everything it offers, that make mistakes, that lie,
//! that wait, and that die: each gets the answer of the protocol, and only its own connection
//! suffers.

// Offsets on small disks, and bytes made from numbers.
#![allow(clippy::cast_possible_truncation)]

use std::io::Write as _;
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use blockd::disk::Disk;
use blockd::nbd::wire::{Style, chunk, command as c, option, reply, transmission as t};
use blockd::nbd::{
    Ancestors, BlockStatus, Export, ExportEntry, Exports, Extent, Listener, NbdServer, NoAncestors,
    STATE_HOLE, STATE_ZERO, ServerOptions, Visit, VolumeExport,
};
use blockd::serve::Volume;
use format::{Error, Kind, Result};
use offshoot_tests::nbd::{
    Client, Disks, Named, PATIENCE, Served, in_service, info_request, meta_request, request,
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

/// Memory that is served, with writes that can be held, and errors that can be asked for.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// Offset at which writes wait, if any.
    held: Mutex<Option<u64>>,
    released: Condvar,
    waiting: AtomicU64,
    flushes: AtomicU64,
    fail: Mutex<Option<Kind>>,
    read_only: bool,
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Memory { bytes: Mutex::new(vec![0; SIZE as usize]), ..Memory::default() })
    }

    fn hold(&self, at: Option<u64>) {
        *self.held.lock().unwrap() = at;
        self.released.notify_all();
    }

    fn wait_for_held(&self, count: u64) {
        let begun = Instant::now();
        while self.waiting.load(Ordering::SeqCst) < count {
            assert!(begun.elapsed() < PATIENCE, "fewer than {count} writes arrived");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn outcome(&self) -> Result<()> {
        let kind = *self.fail.lock().unwrap();
        kind.map_or(Ok(()), |kind| Err(Error::new(kind, "asked for by the test")))
    }
}

impl Export for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn description(&self) -> String {
        String::new()
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.outcome()?;
        let at = offset as usize;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, buf: &[u8], fua: bool) -> Result<()> {
        self.outcome()?;
        let mut held = self.held.lock().unwrap();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        while *held == Some(offset) {
            held = self.released.wait(held).unwrap();
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        drop(held);
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + buf.len()].copy_from_slice(buf);
        if fua { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.outcome()
    }

    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        self.write_zeroes(offset, len, true, fua)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool, fua: bool) -> Result<()> {
        self.write(offset, &vec![0; len as usize], fua)
    }

    fn zeroes_fast(&self, _: u64, _: u64, unmap: bool) -> bool {
        unmap
    }

    fn allocation(&self, _: u64, len: u64, visit: &mut Visit<'_>) -> Result<()> {
        let _: ControlFlow<()> = visit(Extent { len, flags: 0 });
        Ok(())
    }

    fn ancestors(&self) -> Vec<String> {
        Vec::new()
    }

    fn changed_since(&self, _: &str) -> Result<Arc<dyn BlockStatus>> {
        Err(Error::new(Kind::NotFound, "no ancestors"))
    }
}

fn serve(export: Arc<dyn Export>) -> Served {
    Served::new(vec![export], ServerOptions::default())
}

/// The server still serves: a fresh client reads.
fn assert_serves(served: &Served) {
    let mut client = served.transmitting("memory", Style::Structured);
    assert_eq!(client.errno((c::READ, 0), (0, 4096), &[]), 0);
}

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

#[test]
fn wrong_magic_and_unknown_flags_close_the_connection() {
    let served = serve(Memory::new());
    let mut client = served.client();
    client.send(b"IHAVEOPX\0\0\0\x03\0\0\0\0");
    assert_eq!(client.until_closed(), b"");

    let mut client = Client::connect(&served.socket());
    client.bytes(18);
    client.send(&7u32.to_be_bytes());
    assert_eq!(client.until_closed(), b"");

    for style in STYLES {
        let mut client = served.transmitting("memory", style);
        client.send(&[0x5a; 32]);
        assert_eq!(client.until_closed(), b"", "{style:?}");
    }
    assert_serves(&served);
}

#[test]
fn options_that_make_no_sense_are_refused_and_haggling_goes_on() {
    let served = serve(Memory::new());
    let mut client = served.client();
    for unknown in [0, 4, 12, 4711] {
        assert_eq!(client.outcome(unknown, b"whatever"), reply::ERR_UNSUP);
    }
    for bare in [option::LIST, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        assert_eq!(client.outcome(bare, b"x"), reply::ERR_INVALID);
    }
    assert_eq!(client.outcome(option::STARTTLS, &[]), reply::ERR_POLICY);
    let go = info_request("memory", &[3]);
    assert_eq!(client.outcome(option::GO, &go[..go.len() - 1]), reply::ERR_INVALID);
    assert_eq!(client.outcome(option::INFO, &info_request("other", &[])), reply::ERR_UNKNOWN);
    let meta = meta_request("memory", &["base:allocation"]);
    assert_eq!(client.outcome(option::SET_META_CONTEXT, &meta), reply::ERR_INVALID);
    client.agree(Style::Structured);
    let long = [&u32::MAX.to_be_bytes()[..], &[0; 8]].concat();
    assert_eq!(client.outcome(option::SET_META_CONTEXT, &long), reply::ERR_INVALID);
    assert_eq!(client.outcome(option::SET_META_CONTEXT, &meta), reply::ACK);
    client.agree(Style::Extended);
    let structured = client.outcome(option::STRUCTURED_REPLY, &[]);
    assert_eq!(structured, reply::ERR_EXT_HEADER_REQD);

    assert_eq!(client.go("memory").0, SIZE);
}

#[test]
fn an_oversize_option_closes_the_connection() {
    let served = serve(Memory::new());
    for len in [65_537, u32::MAX] {
        let mut client = served.client();
        client.option_header(option::GO, len);
        assert_eq!(client.until_closed(), b"");
    }
    assert_serves(&served);
}

#[test]
fn the_old_way_to_choose_an_export_works() {
    let served = serve(Memory::new());
    for (flags, padding) in [(3u32, 0), (1, 124), (0, 124)] {
        let mut client = Client::connect(&served.socket());
        client.bytes(18);
        client.send(&flags.to_be_bytes());
        client.option_header(option::EXPORT_NAME, 6);
        client.send(b"memory");
        let answer = client.bytes(10 + padding);
        assert_eq!(answer[..8], SIZE.to_be_bytes());
        assert!(answer[10..].iter().all(|&b| b == 0));
        assert_eq!(client.errno((c::READ, 0), (0, 4096), &[]), 0);
    }
    let mut client = served.client();
    client.option_header(option::EXPORT_NAME, 5);
    client.send(b"other");
    assert_eq!(client.until_closed(), b"");
}

#[test]
fn an_abort_is_acknowledged() {
    let served = serve(Memory::new());
    let mut client = served.client();
    assert_eq!(client.outcome(option::ABORT, b"bye"), reply::ACK);
    assert_eq!(client.until_closed(), b"");
}

#[test]
fn transmission_flags_say_what_works() {
    let common = t::HAS_FLAGS | t::SEND_FLUSH | t::SEND_FUA | t::CAN_MULTI_CONN;
    let writes = t::SEND_TRIM | t::SEND_WRITE_ZEROES | t::SEND_FAST_ZERO;
    let read_only = Memory { read_only: true, ..Memory::default() };
    for (export, flags) in
        [(Memory::new(), common | writes), (Arc::new(read_only), common | t::READ_ONLY)]
    {
        let served = serve(export);
        assert_eq!(served.client().go("memory"), (SIZE, flags));
        let mut client = served.client();
        client.agree(Style::Structured);
        assert_eq!(client.go("memory"), (SIZE, flags | t::SEND_DF));
    }
}

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
fn a_handshake_has_a_deadline() {
    let options =
        ServerOptions { handshake_max: Duration::from_millis(300), ..ServerOptions::default() };
    let served = Served::new(vec![Memory::new()], options);
    let mut silent = Client::connect(&served.socket()).greeted();
    let mut slow = served.client();
    let mut trickle = slow.socket.try_clone().unwrap();
    let sender = thread::spawn(move || {
        let header = [&b"IHAVEOPT"[..], &[0, 0, 0, 7, 0, 0, 0x10, 0]].concat();
        for byte in header.iter().cycle() {
            if trickle.write_all(&[*byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    assert_eq!(silent.until_closed(), b"");
    assert_eq!(slow.until_closed(), b"");
    sender.join().unwrap();
    assert_eq!(served.server.status().unfinished, 2);
    // Once through, a client may be silent for as long as it likes.
    let mut idle = served.transmitting("memory", Style::Simple);
    thread::sleep(Duration::from_millis(600));
    assert_eq!(idle.errno((c::READ, 0), (0, 512), &[]), 0);
}

#[test]
fn one_client_too_many_is_told_so() {
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let served = Served::new(vec![Memory::new()], options);
    let first = served.transmitting("memory", Style::Simple);
    let mut second = served.transmitting("memory", Style::Simple);

    let mut third = served.client();
    let replies = third.option(option::GO, &info_request("memory", &[]));

    let (kind, message) = &replies[0];
    assert_eq!(*kind, reply::ERR_POLICY);
    assert_eq!(String::from_utf8_lossy(message), "2 clients are connected, the limit");
    assert_eq!(second.errno((c::READ, 0), (0, 512), &[]), 0);
    assert_eq!(served.server.status().refused, 1);
    drop((first, third));
    let begun = Instant::now();
    while served.server.status().connections.len() > 1 {
        assert!(begun.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(5));
    }
    assert_serves(&served);
}

/// What was read from a client before the stop is answered; then connections are closed.
#[test]
fn a_stop_answers_what_is_under_way() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    let mut client = served.transmitting("memory", Style::Simple);
    let mut idle = served.transmitting("memory", Style::Simple);
    let mut haggling = served.client();
    memory.hold(Some(0));
    client.request((c::WRITE, 0), 5, (0, 512), &[9; 512]);
    memory.wait_for_held(1);
    let released = Arc::clone(&memory);
    let releaser = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        released.hold(None);
    });

    served.server.stop(PATIENCE).unwrap();

    assert_eq!(client.simple(0), (5, 0, vec![]));
    for client in [&mut client, &mut idle, &mut haggling] {
        assert_eq!(client.until_closed(), b"");
    }
    releaser.join().unwrap();
    assert!(std::os::unix::net::UnixStream::connect(served.socket()).is_err());
    assert_eq!(served.server.status().connections, []);
}

#[test]
fn a_stop_says_when_a_request_does_not_end() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    let mut client = served.transmitting("memory", Style::Simple);
    memory.hold(Some(0));
    client.request((c::WRITE, 0), 5, (0, 512), &[9; 512]);
    memory.wait_for_held(1);

    let stopped = served.server.stop(Duration::from_millis(50));

    assert_eq!(stopped.unwrap_err().kind(), Kind::Busy);
    memory.hold(None);
    served.server.stop(PATIENCE).unwrap();
}

/// Something that takes its time to go, with what a disk is to its export.
struct Lingering(Arc<()>, Duration);

impl Drop for Lingering {
    fn drop(&mut self) {
        thread::sleep(self.1);
    }
}

impl Ancestors for Lingering {
    fn names(&self) -> Vec<String> {
        vec![format!("of {} users", Arc::strong_count(&self.0))]
    }

    fn open(&self, name: &str) -> Result<Arc<Disk>> {
        NoAncestors.open(name)
    }
}

/// Makes an export anew for each client, as the daemon does.
struct Making(Arc<Volume>, Lingering);

impl Exports for Making {
    fn open(&self, _: &str) -> Result<Arc<dyn Export>> {
        let ancestors = Box::new(Lingering(Arc::clone(&self.1.0), Duration::from_millis(300)));
        Ok(Arc::new(VolumeExport::new(Arc::clone(&self.0)).with_ancestors(ancestors)))
    }

    fn list(&self) -> Vec<ExportEntry> {
        Vec::new()
    }
}

/// Story: a client that went just before the server was stopped was off the list while its thread
/// still had the disk. The daemon stopped the server, could not close the disk, and left it as a
/// killed daemon would.
#[test]
fn a_stopped_server_has_let_go_of_its_exports() {
    let disks = Disks::new();
    let volume = in_service("vm", disks.disk(1, 8192, None));
    let users = Arc::new(());
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("nbd")).unwrap();
    let lingering = Lingering(Arc::clone(&users), Duration::from_millis(100));
    let exports = Arc::new(Making(Arc::clone(&volume), lingering));
    let listeners = vec![Listener::Unix(listener)];
    let server = NbdServer::start(listeners, exports, ServerOptions::default()).unwrap();
    let mut client = Client::connect(&dir.path().join("nbd")).greeted();
    client.go("vm");
    drop(client);

    server.stop(PATIENCE).unwrap();

    assert_eq!((Arc::strong_count(&users), Arc::strong_count(&volume)), (1, 1));
    volume.hand_on().unwrap();
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

/// A disk with data, explicit zeroes and holes, served as `memory`.
fn mixed() -> (Disks, Served) {
    let disks = Disks::new();
    let disk = disks.disk(1, SIZE / 512, None);
    disk.write(0, 8192, &[1; 4096]).unwrap();
    disk.write(0, MIB, &[2; 65536]).unwrap();
    disk.write_zeroes(0, MIB + 4096, 4096, true).unwrap();
    let served = serve(Arc::new(VolumeExport::new(in_service("memory", disk))));
    (disks, served)
}

#[test]
fn reads_tell_holes_from_data() {
    let (_disks, served) = mixed();
    for style in [Style::Structured, Style::Extended] {
        let mut client = served.transmitting("memory", style);
        client.request((c::READ, 0), 3, (512, MIB + 16384 - 512), &[]);
        let chunks = client.chunks();
        let seen: Vec<(u16, u64, u64, u8)> = chunks
            .iter()
            .map(|chunk| {
                let at = u64::from_be_bytes(chunk.payload[..8].try_into().unwrap());
                let rest = &chunk.payload[8..];
                if chunk.kind == chunk::OFFSET_HOLE {
                    (2, at, u32::from_be_bytes(rest.try_into().unwrap()).into(), 0)
                } else {
                    assert!(rest.iter().all(|b| *b == rest[0]));
                    (chunk.kind, at, rest.len() as u64, rest[0])
                }
            })
            .collect();
        let expected = [
            (2, 512, 7680, 0),
            (1, 8192, 4096, 1),
            (2, 12288, MIB - 12288, 0),
            (1, MIB, 4096, 2),
            (2, MIB + 4096, 4096, 0),
            (1, MIB + 8192, 8192, 2),
        ];
        assert_eq!(seen, expected, "{style:?}");

        client.request((c::READ, c::DF), 4, (0, 16384), &[]);
        let chunks = client.chunks();
        assert_eq!(chunks.len(), 1, "not in fragments");
        assert_eq!(chunks[0].kind, chunk::OFFSET_DATA);
        assert_eq!(chunks[0].payload[8..8 + 8192], [0; 8192]);
        assert_eq!(chunks[0].payload[8 + 8192..8 + 12288], [1; 4096]);
    }
    let mut client = served.transmitting("memory", Style::Simple);
    client.request((c::READ, 0), 9, (4096, 8192), &[]);
    let (cookie, error, data) = client.simple(8192);
    assert_eq!((cookie, error), (9, 0));
    assert!(data[..4096].iter().all(|&b| b == 0) && data[4096..].iter().all(|&b| b == 1));
}

/// The extents of `BLOCK_STATUS` in a chunk of either style.
fn extents(chunk: &offshoot_tests::nbd::Chunk) -> (u32, Vec<(u64, u64)>) {
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let id = number(&chunk.payload[..4]) as u32;
    let (skip, width) = if chunk.kind == chunk::BLOCK_STATUS_EXT { (8, 8) } else { (4, 4) };
    let pairs = chunk.payload[skip..].chunks(2 * width);
    let pairs: Vec<_> = pairs.map(|p| (number(&p[..width]), number(&p[width..]))).collect();
    if skip == 8 {
        assert_eq!(number(&chunk.payload[4..8]), pairs.len() as u64);
    }
    (id, pairs)
}

#[test]
fn block_status_is_the_map() {
    let (_disks, served) = mixed();
    let hole = u64::from(STATE_HOLE | STATE_ZERO);
    for style in [Style::Structured, Style::Extended] {
        let mut client = served.client();
        client.agree(style);
        let meta = meta_request("memory", &["base:allocation", "base:", "other:x", "base:y"]);
        let replies = client.option(option::SET_META_CONTEXT, &meta);
        assert_eq!(replies.len(), 2, "one context: {replies:?}");
        assert_eq!(replies[0].1, [&[0; 4], &b"base:allocation"[..]].concat());
        client.go("memory");

        client.request((c::BLOCK_STATUS, 0), 1, (0, SIZE), &[]);
        let chunks = client.chunks();
        assert_eq!(chunks.len(), 1);
        let expected = [
            (8192, hole),
            (4096, 0),
            (MIB - 12288, hole),
            (4096, 0),
            (4096, hole),
            (65536 - 8192, 0),
            (SIZE - MIB - 65536, hole),
        ];
        assert_eq!(extents(&chunks[0]), (0, expected.to_vec()));

        client.request((c::BLOCK_STATUS, c::REQ_ONE), 2, (512, 4096), &[]);
        assert_eq!(extents(&client.chunks()[0]).1, [(4096, hole)]);
        client.request((c::BLOCK_STATUS, c::REQ_ONE), 2, (8192 + 512, MIB), &[]);
        assert_eq!(extents(&client.chunks()[0]).1, [(3584, 0)]);
        assert_eq!(client.errno((c::BLOCK_STATUS, 0), (0, SIZE + 512), &[]), EINVAL);
        assert_eq!(client.errno((c::BLOCK_STATUS, 0), (0, 0), &[]), EINVAL);
    }
}

/// With extended headers a request may be longer than 4 GiB.
#[test]
fn extended_headers_reach_beyond_four_gib() {
    let disks = Disks::new();
    let size = 20 << 30;
    let disk = disks.disk(1, size / 512, None);
    disk.write(0, 10 << 30, &[1; 4096]).unwrap();
    let served = serve(Arc::new(VolumeExport::new(in_service("memory", disk))));
    let mut client = served.client();
    client.agree(Style::Extended);
    client.option(option::SET_META_CONTEXT, &meta_request("memory", &["base:allocation"]));
    client.go("memory");

    client.request((c::BLOCK_STATUS, 0), 1, (0, size), &[]);
    let seen = extents(&client.chunks()[0]).1;

    assert_eq!(seen, [(10 << 30, 3), (4096, 0), ((10 << 30) - 4096, 3)]);
    assert_eq!(client.errno((c::WRITE_ZEROES, 0), (0, size), &[]), 0);
    client.request((c::BLOCK_STATUS, 0), 1, (0, size), &[]);
    assert_eq!(extents(&client.chunks()[0]).1, [(size, 3)]);
}

/// Contexts count for the export they were selected for, and until the next selection.
#[test]
fn contexts_belong_to_their_export() {
    let disks = Disks::new();
    let exports: Vec<Arc<dyn Export>> = [1, 2]
        .map(|n| {
            Arc::new(VolumeExport::new(in_service(&format!("d{n}"), disks.disk(n, 2048, None))))
        })
        .map(|e| e as Arc<dyn Export>)
        .to_vec();
    let served = Served::new(exports, ServerOptions::default());
    let select = |client: &mut Client, name: &str, queries: &[&str]| {
        client.agree(Style::Structured);
        client.option(option::SET_META_CONTEXT, &meta_request(name, queries));
    };
    let status = |client: &mut Client| client.errno((c::BLOCK_STATUS, 0), (0, 512), &[]);

    let mut client = served.client();
    select(&mut client, "d1", &["base:allocation"]);
    client.go("d2");
    assert_eq!(status(&mut client), EINVAL);

    let mut client = served.client();
    select(&mut client, "d1", &["base:allocation"]);
    select(&mut client, "d1", &[]);
    client.go("d1");
    assert_eq!(status(&mut client), EINVAL);

    let mut client = served.client();
    select(&mut client, "d1", &["base:allocation"]);
    client.go("d1");
    assert_eq!(status(&mut client), 0);
}
