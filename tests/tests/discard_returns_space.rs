//! What is discarded takes no space on the host once a flush has made the discard durable, and is
//! used again for later writes.

use blockd::disk::{Disk, Options};
use blockd::segment::file_name;
use blockd::store::file::{FileStore, FileStoreOptions};
use blockd::store::sim::{Fault, Faults, SimStore, When};
use blockd::store::{Access, Store};
use format::Kind;
use offshoot_tests::kill::{live, memory_dir};
use offshoot_tests::log::LogCount;
use offshoot_tests::pattern::{SECTOR, bytes};
use offshoot_tests::sim::{BLOCK, ByName, EXTENT, LEAF, create};
use offshoot_tests::skip;
use uuid::Uuid;

const SECTORS: u64 = 2 * LEAF;
const SEGMENT: Uuid = Uuid::from_u128(7);

/// Metadata may come and go with any flush, and 1 MiB is held for it: this many bytes.
const SLACK: u64 = 1536 << 10;

fn open(store: &dyn Store, options: &Options) -> Disk {
    let file = store.open(&file_name(SEGMENT), Access::Write).unwrap();
    Disk::open(file, &ByName(store), options).unwrap()
}

fn write(disk: &Disk, first: u64, count: u64) {
    disk.write(0, first * SECTOR as u64, &bytes(1, first, count)).unwrap();
}

fn discard(disk: &Disk, first: u64, count: u64) {
    disk.discard(0, first * SECTOR as u64, count * SECTOR as u64).unwrap();
}

fn allocated(disk: &Disk) -> u64 {
    disk.facts().unwrap().allocated
}

fn expect_about(disk: &Disk, sectors: u64, what: &str) {
    let (bytes, want) = (allocated(disk), sectors * SECTOR as u64);
    assert!(bytes <= want + SLACK, "{what}: {bytes} bytes allocated for {want} bytes of data");
}

/// Extents, single blocks, a whole leaf, and everything.
fn gives_back(store: &dyn Store) {
    create(store, SEGMENT, SECTORS, None).unwrap();
    let disk = open(store, &Options::default());
    write(&disk, 0, 256 * EXTENT);
    write(&disk, LEAF, 64 * EXTENT);
    disk.flush().unwrap();
    assert!(allocated(&disk) >= 320 * EXTENT * SECTOR as u64);

    discard(&disk, 0, 128 * EXTENT);
    disk.flush().unwrap();
    expect_about(&disk, 192 * EXTENT, "extents");

    // Every second block of what is left of the first leaf.
    for block in (0..128 * 16).step_by(2) {
        discard(&disk, 128 * EXTENT + block * BLOCK, BLOCK);
    }
    disk.flush().unwrap();
    expect_about(&disk, 128 * EXTENT, "blocks");

    discard(&disk, LEAF, LEAF);
    disk.flush().unwrap();
    expect_about(&disk, 64 * EXTENT, "a leaf");

    disk.write_zeroes(0, 0, disk.size(), true).unwrap();
    disk.flush().unwrap();
    expect_about(&disk, 0, "everything");

    write(&disk, 300 * EXTENT, 50 * EXTENT);
    disk.resize(LEAF / 2 * SECTOR as u64, true).unwrap();
    expect_about(&disk, 0, "what a resize cut off");
    disk.close().unwrap();
    expect_about(&open(store, &Options::default()), 0, "after a close");
}

#[test]
fn on_the_simulated_store() {
    gives_back(&SimStore::new());
}

#[test]
fn on_a_real_folder() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = FileStore::open(dir.path(), FileStoreOptions::default()).unwrap();
    let probe = store.create("probe").unwrap();
    probe.write_at(0, &[1; 65536]).unwrap();
    if probe.punch(0, 65536).is_err_and(|e| e.kind() == Kind::Unsupported) {
        return skip("discard_returns_space::on_a_real_folder", "no holes on this file system");
    }
    gives_back(&store);
}

/// Writing and discarding for ever does not make the file grow for ever.
#[test]
fn space_is_used_again() {
    let store = SimStore::new();
    create(&store, SEGMENT, SECTORS, None).unwrap();
    let disk = open(&store, &Options::default());
    for round in 0..60 {
        let at = round % 7 * 64 * EXTENT;
        write(&disk, at, 64 * EXTENT);
        disk.flush().unwrap();
        discard(&disk, at, 64 * EXTENT);
        disk.flush().unwrap();
    }
    let size = store.live_image().get(&file_name(SEGMENT)).unwrap().len();
    assert!(size <= 33 << 20, "the file has grown to {size} bytes");
    expect_about(&disk, 0, "after all");
}

/// What was discarded before a kill comes back with the first flush of the next opening.
#[test]
fn also_when_the_discard_was_replayed_from_the_tail() {
    let (store, dir) = (SimStore::new(), memory_dir());
    create(&store, SEGMENT, SECTORS, None).unwrap();
    let disk = open(&store, &live(dir.path()));
    write(&disk, 0, 256 * EXTENT);
    disk.flush().unwrap();
    discard(&disk, 0, 256 * EXTENT);
    drop(disk);

    let disk = open(&store, &live(dir.path()));
    disk.flush().unwrap();

    expect_about(&disk, 0, "after a kill");
}

/// Story: each punch that failed was logged. A guest that discards could fill the log of a host
/// whose file system had gone bad.
#[test]
fn a_host_that_takes_nothing_back_is_told_of_once() {
    let store = SimStore::new();
    create(&store, SEGMENT, SECTORS, None).unwrap();
    let disk = open(&store, &Options::default());
    let log = LogCount::default();
    store.set_faults(Faults::none().add(When::From(0), Fault::PunchIo));

    log.during(|| {
        for round in 0..50 {
            write(&disk, round * EXTENT, EXTENT);
            disk.flush().unwrap();
            discard(&disk, round * EXTENT, EXTENT);
            disk.flush().unwrap();
        }
    });

    assert!(store.hits().len() > 40, "{} punches failed", store.hits().len());
    assert_eq!(log.events(), 1);
}
