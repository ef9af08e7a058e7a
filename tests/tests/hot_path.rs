//! Serving reads and overwrites allocates and logs nothing, anywhere in the process; first writes
//! allocate what the map grows by. That neither waits for a lock of the disk is shown where those
//! locks are (`blockd/src/disk/plan.rs`).

use std::alloc::{GlobalAlloc, Layout, System};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockd::serve::vhost::{VhostOptions, VhostServer};
use blockd::serve::{Volume, VolumeOptions};
use blockd::store::Access;
use blockd::store::buf::AlignedBuf;
use blockd::store::file::CacheMode;
use blockd::storedir::{NewDisk, OpenOptions, StoreDir, boot_id};
use offshoot_tests::log::LogCount;
use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: passes everything through to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: the caller keeps the contract of `GlobalAlloc`.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed); // a count of its own, orders nothing
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the caller keeps the contract of `GlobalAlloc`.
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Written before anything is counted.
const SIZE: u64 = 4 << 20;
/// Room for first writes behind that, with the file long enough for all of it.
const DISK: u64 = 128 << 20;
const LEAF: u64 = 32 << 20;
const EXTENT: u64 = 64 << 10;
const DEPTH: u64 = 64;
/// Block vectors in one page of them.
const VECTORS: u64 = 32;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.load(Ordering::Relaxed); // as above
    work();
    ALLOCATIONS.load(Ordering::Relaxed) - before // as above
}

fn drain(queue: &mut ClientQueue) {
    queue.kick();
    while queue.in_work() > 0 {
        assert!(queue.wait(20_000));
        while let Some(c) = queue.poll() {
            assert_eq!(c.status, 0);
        }
    }
}

/// Reads and, one in `write_in`, overwrites of 4 KiB all over the disk, at full depth.
fn round(queue: &mut ClientQueue, rounds: u64, write_in: u64) {
    let mut at = 1;
    for _ in 0..rounds {
        for i in 0..DEPTH {
            at = (at * 1_103_515_245 + 12_345) % (SIZE / 4096);
            let span = Span { offset: queue.data().0 + i * 4096, len: 4096 };
            let op = if i % write_in == 0 { Op::Write } else { Op::Read };
            queue.submit(op, (at + i) % (SIZE / 4096) * 4096, &[span], i).unwrap();
        }
        drain(queue);
    }
}

/// First writes of `len` bytes at the start of `count` extents from byte `first` on.
fn first_writes(queue: &mut ClientQueue, first: u64, count: u64, len: u32) {
    let at_once = DEPTH * 4096 / EXTENT;
    for batch in (0..count).step_by(usize::try_from(at_once).unwrap()) {
        for i in 0..at_once {
            let span = Span { offset: queue.data().0 + i * EXTENT, len };
            queue.submit(Op::Write, first + (batch + i) * EXTENT, &[span], i).unwrap();
        }
        drain(queue);
    }
}

/// The same reads and overwrites by a thread that may wait, as front doors without queues have.
fn by_a_thread(volume: &Volume, buf: &mut [u8], count: u64) {
    for i in 0..count {
        let offset = i * 7919 % (SIZE / 4096 - 4) * 4096;
        volume.read(1, offset, buf).unwrap();
        volume.write(1, offset, buf, false).unwrap();
    }
}

#[test]
fn reads_and_overwrites_cost_no_memory_and_no_log_and_first_writes_the_map_alone() {
    let log = LogCount::default();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let tails = offshoot_tests::kill::memory_dir();
    StoreDir::init(&path, Some(tails.path().to_owned())).unwrap();
    let how = OpenOptions { access: Access::Write, cache: CacheMode::Auto, boot: boot_id() };
    let store = StoreDir::open(&path, &how).unwrap();
    store.create(&NewDisk::root("disk", DISK)).unwrap();
    let volume = Volume::open(&store, "disk", &VolumeOptions::default()).unwrap();
    volume.write(0, 0, &vec![7; usize::try_from(SIZE).unwrap()], true).unwrap();
    let listener = UnixListener::bind(dir.path().join("sock")).unwrap();
    let server =
        VhostServer::start(Arc::clone(&volume), listener, VhostOptions::default()).unwrap();
    let options = Options { data_size: DEPTH * 4096, ..Options::default() };
    let (client, mut queues) = Client::connect(&dir.path().join("sock"), options).unwrap();
    let queue = &mut queues[0];
    let mut buf = AlignedBuf::zeroed(16384);
    round(queue, 4, 2);
    by_a_thread(&volume, &mut buf, 4);
    log.everywhere();

    assert_eq!(allocations(|| round(queue, 160, 2)), 0);
    assert_eq!(allocations(|| by_a_thread(&volume, &mut buf, 5000)), 0);

    // The first write under a leaf makes it; each shard of the claims keeps what it took once.
    first_writes(queue, LEAF, 128, 4096);
    first_writes(queue, 2 * LEAF, 4, 4096);
    let whole = allocations(|| first_writes(queue, LEAF + 128 * EXTENT, 384, 65536));
    let mixed = allocations(|| first_writes(queue, 2 * LEAF + 4 * EXTENT, 480, 4096));
    println!("{whole} allocations for whole extents, {mixed} for single blocks");
    // The bitmap of used space doubles now and then.
    assert!(whole <= 4, "{whole}");
    assert!(mixed <= 480 / VECTORS + 4, "{mixed}");
    assert_eq!(log.events(), 0, "somebody wrote to the log");

    drop(client);
    server.stop();
    let stats = volume.stats();
    let requests: u64 = stats.kinds.iter().map(|k| k.requests).sum();
    assert!(requests > 160 * DEPTH && stats.slow == 0, "{stats:?}");
    volume.close().unwrap();
}
