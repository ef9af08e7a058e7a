//! Serving reads and overwrites allocates nothing, anywhere in the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockd::serve::vhost::{VhostOptions, VhostServer};
use blockd::serve::{Volume, VolumeOptions};
use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{NewDisk, OpenOptions, StoreDir, boot_id};
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

const SIZE: u64 = 4 << 20;
const DEPTH: u64 = 64;

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
        queue.kick();
        while queue.in_work() > 0 {
            assert!(queue.wait(20_000));
            while let Some(c) = queue.poll() {
                assert_eq!(c.status, 0);
            }
        }
    }
}

#[test]
fn ten_thousand_reads_and_overwrites_allocate_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let tails = offshoot_tests::kill::memory_dir();
    StoreDir::init(&path, Some(tails.path().to_owned())).unwrap();
    let how = OpenOptions { access: Access::Write, cache: CacheMode::Auto, boot: boot_id() };
    let store = StoreDir::open(&path, &how).unwrap();
    store.create(&NewDisk::root("disk", SIZE)).unwrap();
    let volume = Volume::open(&store, "disk", &VolumeOptions::default()).unwrap();
    volume.write(0, 0, &vec![7; usize::try_from(SIZE).unwrap()], true).unwrap();
    let listener = UnixListener::bind(dir.path().join("sock")).unwrap();
    let server =
        VhostServer::start(Arc::clone(&volume), listener, VhostOptions::default()).unwrap();
    let options = Options { data_size: DEPTH * 4096, ..Options::default() };
    let (client, mut queues) = Client::connect(&dir.path().join("sock"), options).unwrap();
    round(&mut queues[0], 4, 2);

    let before = ALLOCATIONS.load(Ordering::Relaxed); // as above
    round(&mut queues[0], 160, 2);
    let after = ALLOCATIONS.load(Ordering::Relaxed); // as above

    assert_eq!(after - before, 0);
    drop(client);
    server.stop();
    let stats = volume.stats();
    let requests: u64 = stats.kinds.iter().map(|k| k.requests).sum();
    assert!(requests > 160 * DEPTH && stats.slow == 0, "{stats:?}");
    volume.close().unwrap();
}
