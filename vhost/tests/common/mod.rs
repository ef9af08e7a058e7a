//! A small vhost-user-blk daemon for the tests: one file, a thread per connection and per queue.
//!
//! Workers take as much as they can hold and do it in an order that a seed decides, so that
//! completions overtake each other.

#![allow(dead_code)] // each test file uses its own part

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use format::Result;
use rustix::event::{PollFd, PollFlags, poll};
use vhost_blk::blk::{Capabilities, RangeLimits, RangeList, Request, Status};
use vhost_blk::client::{ClientQueue, Op, Options, Span};
use vhost_blk::queue::{Chain, F_RING_PACKED, Segment, as_iovecs};
use vhost_blk::session::{ActiveQueue, Control, Device, End, Session, SessionHandle};

pub const DISK_SIZE: u64 = 8 << 20;
pub const SERIAL: &[u8; 20] = b"offshoot-test-disk-1";

/// splitmix64: enough randomness to shuffle, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A seed from the environment (`SEED=`) or the clock; printed, so that a failure can be repeated.
pub fn seed(test: &str) -> u64 {
    let fixed = std::env::var("SEED").ok().and_then(|s| s.parse().ok());
    let seed = fixed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_secs().wrapping_mul(1_000_000_007) ^ u64::from(now.subsec_nanos())
    });
    println!("{test}: repeat with SEED={seed}");
    seed
}

pub fn capabilities(queues: u16) -> Capabilities {
    let ranges = RangeLimits { sectors_max: 1 << 16, ranges_max: 16, alignment: 8 };
    Capabilities {
        sectors: DISK_SIZE / 512,
        queues,
        discard: Some(ranges),
        write_zeroes: Some(ranges),
        write_zeroes_unmaps: true,
        packed: true,
        serial: *SERIAL,
        ..Capabilities::default()
    }
}

/// The same options with packed rings.
pub fn packed(options: Options) -> Options {
    Options { features: options.features | F_RING_PACKED, ..options }
}

/// What the disk was asked to do, for tests that want to know.
#[derive(Debug, Default)]
pub struct Counters {
    pub flushes: AtomicU64,
    pub discards: AtomicU64,
    pub write_zeroes: AtomicU64,
    pub unmaps: AtomicU64,
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub write_through_writes: AtomicU64,
}

#[derive(Debug)]
pub struct Disk {
    pub file: File,
    pub caps: Mutex<Capabilities>,
    pub counters: Counters,
    /// While set, workers take requests and do not do them.
    pub hold: AtomicBool,
    pub seed: u64,
}

impl Disk {
    pub fn new(file: File, caps: Capabilities, seed: u64) -> Arc<Disk> {
        let hold = AtomicBool::new(false);
        let caps = Mutex::new(caps);
        Arc::new(Disk { file, caps, counters: Counters::default(), hold, seed })
    }

    pub fn temporary(caps: Capabilities) -> Arc<Disk> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(caps.sectors * 512).unwrap();
        Disk::new(file, caps, 1)
    }

    fn vectored(&self, segments: &[Segment], mut offset: u64, write: bool) -> bool {
        use std::os::fd::AsRawFd;
        for part in segments.chunks(512) {
            let iov = as_iovecs(part);
            let (fd, n) = (self.file.as_raw_fd(), i32::try_from(iov.len()).unwrap());
            let at = i64::try_from(offset).unwrap();
            let len: usize = part.iter().map(Segment::len).sum();
            // SAFETY: the segments are guest memory of a request that is in work.
            let done = unsafe {
                match write {
                    true => libc::pwritev(fd, iov.as_ptr(), n, at),
                    false => libc::preadv(fd, iov.as_ptr(), n, at),
                }
            };
            if usize::try_from(done) != Ok(len) {
                return false;
            }
            offset += len as u64;
        }
        true
    }

    fn serve(&self, request: Request, slot: &mut Slot, write_back: bool) -> Status {
        let count = |c: &AtomicU64| c.fetch_add(1, Ordering::Relaxed);
        let zero = |offset: u64, len: u64| {
            self.file.write_all_at(&vec![0; usize::try_from(len).unwrap()], offset).is_ok()
        };
        let ok = match request {
            Request::Read { offset, .. } => {
                count(&self.counters.reads);
                self.vectored(slot.chain.writable(), offset, false)
            }
            Request::Write { offset, .. } => {
                count(&self.counters.writes);
                if !write_back {
                    count(&self.counters.write_through_writes);
                }
                self.vectored(slot.chain.readable(), offset, true)
            }
            Request::Flush => {
                count(&self.counters.flushes);
                true
            }
            Request::GetId => {
                slot.chain.fill(SERIAL);
                true
            }
            Request::Discard => {
                count(&self.counters.discards);
                slot.list.as_slice().iter().all(|r| zero(r.offset, r.len))
            }
            Request::WriteZeroes => {
                count(&self.counters.write_zeroes);
                let unmaps = slot.list.as_slice().iter().filter(|r| r.unmap).count();
                self.counters.unmaps.fetch_add(unmaps as u64, Ordering::Relaxed);
                slot.list.as_slice().iter().all(|r| zero(r.offset, r.len))
            }
        };
        if ok { Status::Ok } else { Status::IoError }
    }
}

#[derive(Debug, Default)]
pub struct Slot {
    pub chain: Chain,
    pub list: RangeList,
}

/// What happened at the daemon, in order.
#[derive(Debug, PartialEq)]
pub enum Event {
    Started(u16),
    WriteCache(bool),
    QueueFailed(u16, String),
    Ended(std::result::Result<End, String>),
}

pub struct Server {
    pub disk: Arc<Disk>,
    pub events: Sender<Event>,
    /// The guest's choice of cache mode, which a daemon must remember.
    pub cache: Arc<Mutex<Option<bool>>>,
    pub workers: Vec<JoinHandle<()>>,
}

impl Device for Server {
    fn capabilities(&self) -> Capabilities {
        self.disk.caps.lock().unwrap().clone()
    }

    fn start_queue(&mut self, queue: ActiveQueue) -> Result<()> {
        let _ = self.events.send(Event::Started(queue.index()));
        let disk = self.disk.clone();
        self.workers.push(std::thread::spawn(move || work(queue, &disk)));
        Ok(())
    }

    fn write_cache_changed(&mut self, write_back: bool) -> Result<()> {
        *self.cache.lock().unwrap() = Some(write_back);
        let _ = self.events.send(Event::WriteCache(write_back));
        Ok(())
    }

    fn remembered_write_cache(&self) -> Option<bool> {
        *self.cache.lock().unwrap()
    }

    fn queue_failed(&mut self, index: u16, error: &format::Error) {
        let _ = self.events.send(Event::QueueFailed(index, error.reason().to_owned()));
    }
}

fn work(mut queue: ActiveQueue, disk: &Disk) {
    let mut rng = Rng(disk.seed ^ u64::from(queue.index()));
    let mut free: Vec<Slot> = (0..64).map(|_| Slot::default()).collect();
    let mut pending: Vec<(Slot, Request)> = Vec::new();
    loop {
        let stop = queue.control() == Control::Stop;
        let limits = disk.caps.lock().unwrap().limits(queue.features());
        while !stop && let Some(mut slot) = free.pop() {
            match queue.take(&limits, &mut slot.chain, &mut slot.list) {
                Some(request) => pending.push((slot, request)),
                None => {
                    free.push(slot);
                    break;
                }
            }
        }
        let held = disk.hold.load(Ordering::Relaxed) && !stop;
        for _ in 0..if held { 0 } else { rng.below(8) + 1 } {
            if pending.is_empty() {
                break;
            }
            let (mut slot, request) =
                pending.swap_remove(usize::try_from(rng.below(pending.len() as u64)).unwrap());
            let status = disk.serve(request, &mut slot, queue.write_back());
            queue.finish(&mut slot.chain, status);
            free.push(slot);
        }
        queue.publish();
        if stop && pending.is_empty() {
            return;
        }
        let idle = pending.is_empty() || held;
        if idle && (free.is_empty() || !queue.enable_kicks()) {
            let control = queue.control_fd();
            let mut fds = [
                PollFd::new(queue.kick(), PollFlags::IN),
                PollFd::from_borrowed_fd(control, PollFlags::IN),
            ];
            poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 20_000_000 }))
                .unwrap();
            queue.kick().drain();
        }
    }
}

/// The daemon: listens, and serves one connection after the other until it is dropped.
pub struct Daemon {
    pub path: PathBuf,
    pub disk: Arc<Disk>,
    pub cache: Arc<Mutex<Option<bool>>>,
    events: Receiver<Event>,
    handle: Arc<Mutex<Option<SessionHandle>>>,
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Daemon {
    pub fn new(caps: Capabilities) -> Daemon {
        Daemon::with(Disk::temporary(caps))
    }

    pub fn with(disk: Arc<Disk>) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blk.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, events) = channel();
        let handle = Arc::new(Mutex::new(None));
        let (quit, cache) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let parts = (disk.clone(), cache.clone(), handle.clone(), quit.clone());
        let thread = std::thread::spawn(move || {
            let (disk, cache, handle, quit) = parts;
            for socket in listener.incoming() {
                if quit.load(Ordering::SeqCst) {
                    return;
                }
                let mut server = Server {
                    disk: disk.clone(),
                    events: sender.clone(),
                    cache: cache.clone(),
                    workers: Vec::new(),
                };
                let (mut session, h) = Session::new(socket.unwrap(), &server).unwrap();
                *handle.lock().unwrap() = Some(h);
                let result = session.run(&mut server).map_err(|e| e.to_string());
                for worker in server.workers {
                    worker.join().unwrap();
                }
                let _ = sender.send(Event::Ended(result));
            }
        });
        let thread = Some(thread);
        Daemon { path, disk, cache, events, handle, quit, thread, _dir: dir }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn handle(&self) -> SessionHandle {
        self.handle.lock().unwrap().clone().expect("a session runs")
    }

    /// The next event that `wanted` accepts; others are dropped.
    pub fn wait_for(&self, wanted: impl Fn(&Event) -> bool) -> Event {
        let time = std::time::Duration::from_secs(20);
        loop {
            let event = self.events.recv_timeout(time).expect("the event comes");
            if wanted(&event) {
                return event;
            }
        }
    }

    /// How the present session ends.
    pub fn end(&self) -> std::result::Result<End, String> {
        match self.wait_for(|e| matches!(e, Event::Ended(_))) {
            Event::Ended(end) => end,
            _ => unreachable!(),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::SeqCst);
        if let Some(handle) = &*self.handle.lock().unwrap() {
            handle.stop();
        }
        let _ = std::os::unix::net::UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The pattern that sector `sector` holds after its `version`th write.
pub fn pattern(sector: u64, version: u64, bytes: &mut [u8]) {
    let mut rng = Rng(sector.wrapping_mul(0x1_0001) ^ version.wrapping_mul(0x5851_f42d_4c95_7f2d));
    for chunk in bytes.chunks_mut(8) {
        let word = rng.next().to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

pub fn readable(fd: impl AsFd, ms: i64) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let time = rustix::event::Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    poll(&mut fds, Some(&time)).is_ok_and(|n| n > 0)
}

/// Random reads and writes of single sectors at full depth, in the part of the disk that belongs
/// to thread `me` of `of`, while `more(requests done)` says so; then everything is read back. Every
/// read is verified: it returns the last write that was completed before it was submitted.
pub fn load(q: &mut ClientQueue, me: u64, of: u64, more: impl Fn(u64) -> bool) {
    let mut rng = Rng(seed("load") + me);
    let sectors = DISK_SIZE / 512 / of;
    let mut versions = vec![0u64; usize::try_from(sectors).unwrap()];
    let mut busy: HashMap<u64, (u64, bool)> = HashMap::new();
    let mut free: Vec<u64> = (0..(q.data().1 / 512).min(64)).collect();
    let mut done = 0;
    let mut check = 0..sectors;
    loop {
        let running = more(done);
        while let Some(slot) = free.pop() {
            let (sector, write) = match running {
                true => (rng.below(sectors), rng.below(2) == 0),
                false => match check.next() {
                    Some(sector) => (sector, false),
                    None => {
                        free.push(slot);
                        break;
                    }
                },
            };
            let i = usize::try_from(sector).unwrap();
            let at = Span { offset: q.data().0 + slot * 512, len: 512 };
            let name = me * sectors + sector;
            if write {
                let mut bytes = [0; 512];
                pattern(name, versions[i] + 1, &mut bytes);
                q.arena().write(at.offset, &bytes);
            }
            // One request per sector at a time: their order would be nobody's promise.
            let clash = busy.values().any(|(s, _)| *s == sector);
            let op = if write { Op::Write } else { Op::Read };
            if clash || q.submit(op, name * 512, &[at], slot).is_err() {
                free.push(slot);
                if !running {
                    check.start -= 1;
                }
                break;
            }
            versions[i] += u64::from(write);
            busy.insert(slot, (sector, write));
        }
        if busy.is_empty() {
            return;
        }
        q.kick();
        assert!(q.wait(20_000), "completions come, {done} so far");
        while let Some(c) = q.poll() {
            assert_eq!(c.status, 0);
            let (sector, write) = busy.remove(&c.token).expect("each request completes once");
            let version = versions[usize::try_from(sector).unwrap()];
            if !write && version > 0 {
                let (mut want, mut seen) = ([0; 512], [0; 512]);
                pattern(me * sectors + sector, version, &mut want);
                q.arena().read(q.data().0 + c.token * 512, &mut seen);
                assert!(want == seen, "sector {sector} of {me} has version {version}");
            }
            free.push(c.token);
            done += 1;
        }
    }
}
