//! A vhost-user-blk disk in a file, served to the guests of `real_guest`: what is tested there is
//! the protocol, the rings and the virtual machine, with nothing of a store behind them.
//!
//! `vhost_disk SOCKET FILE QUEUES [packed]`: serves until it is killed. A thread per
//! connection, because a virtual machine that receives another connects while that one still runs;
//! and a thread per queue, which completes requests in an order that a seed decides.
//!
//! Standard input takes one command a line, and each is answered with one line: `counters` (as
//! JSON), `hold` (requests are taken and not done any more), `release`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufRead;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use format::Result;
use offshoot_tests::rng::Rng;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, fallocate};
use vhost_blk::blk::{Capabilities, Range, RangeLimits, RangeList, Request, Status};
use vhost_blk::queue::{Chain, Segment, as_iovecs};
use vhost_blk::session::{ActiveQueue, Control, Device, Session};

/// Requests that one queue has in work at most.
const SLOTS: usize = 64;
/// What the system takes in one vectored call.
const IOVECS_MAX: usize = 1024;

#[derive(Debug)]
struct Disk {
    file: File,
    capabilities: Capabilities,
    /// The guest's choice of cache mode; as everything here, it ends with the process.
    write_back: Mutex<Option<bool>>,
    /// While set, workers take requests and do not do them.
    hold: AtomicBool,
    /// How often each thing happened, by name.
    counters: Mutex<BTreeMap<&'static str, u64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk {
    fn count(&self, what: &'static str) {
        *lock(&self.counters).entry(what).or_default() += 1;
    }

    fn serve(&self, request: Request, slot: &Slot, write_back: bool) -> Status {
        let done = match request {
            Request::Read { offset, .. } => {
                self.count("reads");
                transfer(&self.file, slot.chain.writable(), offset, false)
            }
            Request::Write { offset, .. } => {
                self.count(if write_back { "writes" } else { "write_through_writes" });
                transfer(&self.file, slot.chain.readable(), offset, true)
                    && (write_back || self.file.sync_data().is_ok())
            }
            Request::Flush => {
                self.count("flushes");
                self.file.sync_data().is_ok()
            }
            Request::Discard => {
                self.count("discards");
                self.punch(slot.list.as_slice())
            }
            Request::WriteZeroes => {
                self.count("write_zeroes");
                self.punch(slot.list.as_slice())
            }
            Request::GetId => true,
        };
        if done { Status::Ok } else { Status::IoError }
    }

    fn punch(&self, ranges: &[Range]) -> bool {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        ranges.iter().all(|r| r.len == 0 || fallocate(&self.file, flags, r.offset, r.len).is_ok())
    }
}

fn transfer(file: &File, segments: &[Segment], mut offset: u64, write: bool) -> bool {
    for part in segments.chunks(IOVECS_MAX) {
        let iovecs = as_iovecs(part);
        let (fd, count) = (file.as_raw_fd(), i32::try_from(iovecs.len()).unwrap_or(i32::MAX));
        let at = i64::try_from(offset).unwrap_or(i64::MAX);
        let bytes: usize = part.iter().map(Segment::len).sum();
        // SAFETY: the segments are guest memory of a request that is in work.
        let done = unsafe {
            match write {
                true => libc::pwritev(fd, iovecs.as_ptr(), count, at),
                false => libc::preadv(fd, iovecs.as_ptr(), count, at),
            }
        };
        if usize::try_from(done) != Ok(bytes) {
            return false;
        }
        offset += bytes as u64;
    }
    true
}

#[derive(Debug, Default)]
struct Slot {
    chain: Chain,
    list: RangeList,
}

struct Server(Arc<Disk>);

impl Device for Server {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities.clone()
    }

    fn start_queue(&mut self, queue: ActiveQueue) -> Result<()> {
        self.0.count("queues_started");
        let disk = self.0.clone();
        thread::spawn(move || work(queue, &disk));
        Ok(())
    }

    fn write_cache_changed(&mut self, write_back: bool) -> Result<()> {
        *lock(&self.0.write_back) = Some(write_back);
        self.0.count(if write_back { "became_write_back" } else { "became_write_through" });
        if !write_back {
            self.0.file.sync_data()?;
        }
        Ok(())
    }

    fn remembered_write_cache(&self) -> Option<bool> {
        *lock(&self.0.write_back)
    }

    fn queue_failed(&mut self, index: u16, error: &format::Error) {
        eprintln!("vhost_disk: queue {index} failed: {error}");
        self.0.count("queues_failed");
    }
}

fn pick(rng: &mut Rng, count: usize) -> usize {
    usize::try_from(rng.below(count as u64)).unwrap_or(0)
}

fn work(mut queue: ActiveQueue, disk: &Disk) {
    let mut rng = Rng::new(u64::from(std::process::id()) << 16 | u64::from(queue.index()));
    let mut free: Vec<Slot> = (0..SLOTS).map(|_| Slot::default()).collect();
    let mut pending: Vec<(Slot, Request)> = Vec::new();
    loop {
        let stop = queue.control() == Control::Stop;
        let limits = disk.capabilities.limits(queue.features());
        while !stop && let Some(mut slot) = free.pop() {
            match queue.take(&limits, &mut slot.chain, &mut slot.list) {
                Some(request) => {
                    disk.count("taken");
                    pending.push((slot, request));
                }
                None => {
                    free.push(slot);
                    break;
                }
            }
        }
        // Relaxed: a switch of the test's, which waits for its effect by other means.
        let held = disk.hold.load(Ordering::Relaxed);
        if !held && !pending.is_empty() {
            let (mut slot, request) = pending.swap_remove(pick(&mut rng, pending.len()));
            if request == Request::GetId {
                slot.chain.fill(b"offshoot-test-disk");
            }
            let status = disk.serve(request, &slot, queue.write_back());
            queue.finish(&mut slot.chain, status);
            free.push(slot);
            queue.publish();
        }
        if stop && pending.is_empty() {
            return;
        }
        let idle = held || pending.is_empty();
        if idle && (free.is_empty() || !queue.enable_kicks()) {
            let mut fds = [
                PollFd::new(queue.kick(), PollFlags::IN),
                PollFd::from_borrowed_fd(queue.control_fd(), PollFlags::IN),
            ];
            // Not for ever: nothing announces the end of a hold.
            let nap = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            let _ = poll(&mut fds, Some(&nap));
            queue.kick().drain();
        }
    }
}

fn command(disk: &Disk, line: &str) -> String {
    match line.split_once(' ').unwrap_or((line, "")) {
        ("counters", "") => serde_json::to_string(&*lock(&disk.counters)).unwrap_or_default(),
        ("hold", "") => {
            disk.hold.store(true, Ordering::Relaxed); // see `work`
            "held".to_owned()
        }
        ("release", "") => {
            disk.hold.store(false, Ordering::Relaxed); // see `work`
            "released".to_owned()
        }
        _ => "unknown command".to_owned(),
    }
}

fn serve_commands(disk: &Disk) {
    for line in std::io::stdin().lock().lines().map_while(|line| line.ok()) {
        println!("{}", command(disk, &line));
    }
    // The test is gone.
    std::process::exit(0);
}

fn main() {
    let mut words = std::env::args().skip(1);
    let (Some(socket), Some(path), Some(queues)) = (words.next(), words.next(), words.next())
    else {
        eprintln!("usage: vhost_disk SOCKET FILE QUEUES [packed]");
        std::process::exit(2);
    };
    let packed = words.any(|word| word == "packed");
    let file = File::options().read(true).write(true).open(path).expect("the file opens");
    let ranges = RangeLimits { sectors_max: 1 << 16, ranges_max: 16, alignment: 8 };
    let capabilities = Capabilities {
        sectors: file.metadata().expect("the file has a size").len() / 512,
        queues: queues.parse().expect("a number of queues"),
        discard: Some(ranges),
        write_zeroes: Some(ranges),
        write_zeroes_unmaps: true,
        packed,
        ..Capabilities::default()
    };
    let disk = Arc::new(Disk {
        file,
        capabilities,
        write_back: Mutex::default(),
        hold: AtomicBool::new(false),
        counters: Mutex::default(),
    });
    // Under another name first: a name that can be seen can be connected to.
    let socket = PathBuf::from(socket);
    let hidden = socket.with_extension("new");
    let listener = UnixListener::bind(&hidden).expect("the socket is made");
    std::fs::rename(&hidden, &socket).expect("the socket gets its name");
    let commanded = disk.clone();
    thread::spawn(move || serve_commands(&commanded));
    for connection in listener.incoming() {
        let mut server = Server(disk.clone());
        let connection = connection.expect("a connection");
        let (mut session, _handle) = Session::new(connection, &server).expect("a session");
        disk.count("sessions");
        thread::spawn(move || match session.run(&mut server) {
            Ok(end) => eprintln!("vhost_disk: a session ended: {end:?}"),
            Err(e) => {
                eprintln!("vhost_disk: a session failed: {e}");
                server.0.count("sessions_failed");
            }
        });
    }
}
