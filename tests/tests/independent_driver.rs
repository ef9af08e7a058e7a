//! A driver that is not ours, the crate `virtio-driver`, on a disk that the real daemon serves: on
//! rings of both formats, on several queues, with and without event index.
//!
//! In each round requests of all kinds are in work on all queues at once. Those of one round do not
//! overlap; those of the next touch the same sectors, on any queue, and each read is compared with
//! what was written before it. In the end so is what the daemon itself reads from the disk.

use std::collections::HashMap;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use offshoot_tests::pattern::{self, Found, SECTOR};
use offshoot_tests::rng::{Rng, seed};
use offshoot_tests::store::TestStore;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use vhost_blk::client::Arena;
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

const SIZE: u64 = 32 << 20;
const SECTORS: u64 = SIZE / 512;
const QUEUES: usize = 3;
/// Requests in work at once, of one queue.
const DEPTH: usize = 40;
const REQUEST_MAX: u64 = 64 << 10;
const ROUNDS: u32 = 60;

/// All features of a disk that the crate knows.
const DISK: u64 = VirtioBlkFeatureFlags::all().bits();
const PLAIN: VirtioFeatureFlags = VirtioFeatureFlags::VERSION_1;

/// What a request does.
#[derive(Debug, Clone, Copy)]
enum Does {
    Read,
    Write(u32),
    Discard,
    Zero(bool),
    Flush,
}

/// A request in work: what, the first sector, how many.
type InWork = (Does, u64, u64);

/// The driver, and what the disk must hold.
struct Driver<'a> {
    queues: Vec<VirtioBlkQueue<'a, usize>>,
    transport: Box<VirtioBlkTransport>,
    arena: Arena,
    rng: Rng,
    /// The tag that each sector holds; 0 for zeroes.
    tags: Vec<u32>,
    next_tag: u32,
}

/// A range of an index.
fn range(first: u64, count: u64) -> std::ops::Range<usize> {
    usize::try_from(first).unwrap()..usize::try_from(first + count).unwrap()
}

/// Where the bytes of a request are in the arena.
fn place(slot: usize) -> u64 {
    slot as u64 * REQUEST_MAX
}

impl Driver<'_> {
    fn new(socket: &str, features: VirtioFeatureFlags, seed: u64) -> Self {
        let transport = VhostUser::new(socket, features.bits() | DISK).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let agreed = transport.get_features();
        assert_eq!(agreed & features.bits(), features.bits(), "{agreed:#x}");
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, QUEUES, 128).unwrap();
        let arena = Arena::new((QUEUES * DEPTH) as u64 * REQUEST_MAX).unwrap();
        let (at, len) = (arena.user(0).0, arena.size());
        let [at, len] = [at, len].map(|n| usize::try_from(n).unwrap());
        transport.map_mem_region(at, len, arena.file().as_raw_fd(), 0).unwrap();
        let tags = vec![0; usize::try_from(SECTORS).unwrap()];
        Driver { queues, transport, arena, rng: Rng::new(seed), tags, next_tag: 1 }
    }

    /// A request that touches nothing that another one in work does.
    fn choose(&mut self, sent: &HashMap<usize, InWork>) -> InWork {
        let busy = |first, count| {
            sent.values().any(|(_, from, len)| first < from + len && *from < first + count)
        };
        let (first, count) = loop {
            // Whole blocks mostly; single sectors to meet the partial ones.
            let unit = if self.rng.one_in(4) { 1 } else { 8 };
            let count = unit * (self.rng.below(16) + 1);
            let first = self.rng.below(SECTORS - count + 1) / unit * unit;
            if !busy(first, count) {
                break (first, count);
            }
        };
        match self.rng.below(20) {
            0..=8 => {
                self.next_tag += 1;
                (Does::Write(self.next_tag), first, count)
            }
            9..=15 => (Does::Read, first, count),
            16 => (Does::Discard, first, count),
            17 => (Does::Zero(true), first, count),
            18 => (Does::Zero(false), first, count),
            _ => (Does::Flush, 0, 0),
        }
    }

    fn submit(&mut self, queue: usize, slot: usize, (does, first, count): InWork) {
        let (offset, bytes) = (first * 512, count * 512);
        let len = usize::try_from(bytes).unwrap();
        let data = usize::try_from(self.arena.user(place(slot)).0).unwrap() as *mut u8;
        let q = &mut self.queues[queue];
        match does {
            Does::Read => {
                self.arena.write(place(slot), &vec![0xee; len]);
                // SAFETY: the slot is mapped, and not touched until the completion.
                unsafe { q.read_raw(offset, data, len, slot) }
            }
            Does::Write(tag) => {
                self.arena.write(place(slot), &pattern::bytes(tag, first, count));
                // SAFETY: as above.
                unsafe { q.write_raw(offset, data, len, slot) }
            }
            Does::Discard => q.discard(offset, bytes, slot),
            Does::Zero(unmap) => q.write_zeroes(offset, bytes, unmap, slot),
            Does::Flush => q.flush(slot),
        }
        .unwrap();
    }

    fn completed(&mut self, slot: usize, (does, first, count): InWork) {
        match does {
            Does::Read => self.check(slot, first, count),
            Does::Write(tag) => self.tags[range(first, count)].fill(tag),
            Does::Discard | Does::Zero(_) => self.tags[range(first, count)].fill(0),
            Does::Flush => {}
        }
    }

    fn check(&self, slot: usize, first: u64, count: u64) {
        let mut bytes = vec![0; range(0, count).len() * SECTOR];
        self.arena.read(place(slot), &mut bytes);
        self.holds(first, &bytes);
    }

    /// Compares bytes from sector `first` on with what was written.
    fn holds(&self, first: u64, bytes: &[u8]) {
        let tags = self.tags[usize::try_from(first).unwrap()..].iter();
        for ((sector, tag), bytes) in (first..).zip(tags).zip(bytes.chunks(SECTOR)) {
            let want = if *tag == 0 { Found::Zero } else { Found::Tag(*tag) };
            assert_eq!(pattern::look(bytes, sector), want, "sector {sector}");
        }
    }

    /// Fills all queues, and waits until they are empty.
    fn round(&mut self) {
        let mut sent: HashMap<usize, InWork> = HashMap::new();
        for slot in 0..QUEUES * DEPTH {
            let work = self.choose(&sent);
            self.submit(slot % QUEUES, slot, work);
            sent.insert(slot, work);
        }
        for (i, queue) in self.queues.iter_mut().enumerate() {
            queue.set_used_notif_enabled(true);
            if queue.avail_notif_needed() {
                self.transport.get_submission_notifier(i).notify().unwrap();
            }
        }
        let end = Instant::now() + Duration::from_secs(20);
        while !sent.is_empty() {
            assert!(Instant::now() < end, "never completed: {sent:?}");
            let bells: Vec<_> = (0..QUEUES).map(|i| self.transport.get_completion_fd(i)).collect();
            let mut fds: Vec<_> = bells.iter().map(|b| PollFd::new(&**b, PollFlags::IN)).collect();
            // Long: a completion without its doorbell makes the test fail.
            poll(&mut fds, Some(&Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap();
            let rung: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            assert!(rung.contains(&true), "no doorbell; in work: {sent:?}");
            for queue in (0..QUEUES).filter(|i| rung[*i]) {
                bells[queue].read().unwrap();
                let done: Vec<_> = self.queues[queue].completions().collect();
                for done in done {
                    let work = sent.remove(&done.context).expect("it completes once");
                    assert_eq!(done.ret, 0, "{work:?} fails");
                    self.completed(done.context, work);
                }
            }
        }
    }
}

/// A verifying load on a disk of a daemon.
fn drives_the_daemon(features: VirtioFeatureFlags) {
    let seed = seed(606);
    println!(
        "repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test independent_driver"
    );
    let bench = TestStore::new();
    let daemon = bench.daemon();
    // Over a parent, so that first writes complete blocks from somewhere.
    daemon.json("POST", "/v1/disks", &json!({"name": "base", "size": SIZE}));
    assert_eq!(daemon.ask("PUT", "/v1/disks/base/data", &pattern::bytes(1, 0, 8192)).status, 200);
    assert_eq!(daemon.ask("POST", "/v1/disks/base/seal", b"").status, 200);
    daemon.json("POST", "/v1/disks", &json!({"name": "a", "parent": "base"}));
    let socket = bench.path("a.sock");
    let export = json!({"kind": "vhost-user", "socket": socket, "queues": QUEUES});
    daemon.json("POST", "/v1/disks/a/attach", &json!({ "export": export }));

    let mut driver = Driver::new(socket.to_str().unwrap(), features, seed);
    driver.tags[..8192].fill(1);
    let config = driver.transport.get_config().unwrap();
    assert_eq!(u64::from(config.capacity) * 512, SIZE);
    assert_eq!((usize::from(u16::from(config.num_queues)), config.writeback), (QUEUES, 1));
    (0..ROUNDS).for_each(|_| driver.round());

    let stats = daemon.json("GET", "/v1/stats", &Value::Null)[0]["stats"].clone();
    for kind in stats["kinds"].as_array().unwrap() {
        assert!(kind["requests"].as_u64().unwrap() > 0 && kind["errors"] == 0, "{stats}");
    }
    assert_eq!(stats["refused"], 0, "{stats}");
    driver.queues.clear();
    daemon.json("POST", "/v1/disks/a/detach", &json!({"force": true}));
    driver.holds(0, &daemon.ask("GET", "/v1/disks/a/data", b"").body);
    let checked = daemon.json("POST", "/v1/disks/a/check", &Value::Null);
    assert_eq!(checked["clean"], true, "{checked}");
    assert!(daemon.terminate().success());
}

#[test]
fn on_split_rings() {
    drives_the_daemon(PLAIN);
}

#[test]
fn on_split_rings_with_event_index() {
    drives_the_daemon(PLAIN | VirtioFeatureFlags::RING_EVENT_IDX);
}

#[test]
fn on_packed_rings() {
    drives_the_daemon(PLAIN | VirtioFeatureFlags::RING_PACKED);
}

#[test]
fn on_packed_rings_with_event_index() {
    let packed = VirtioFeatureFlags::RING_PACKED | VirtioFeatureFlags::RING_EVENT_IDX;
    drives_the_daemon(PLAIN | packed);
}
