//! Micro-benchmarks of the engine: map lookup at growing depth, first-write publication, journal
//! append, checkpoint, and opening a large disk after a crash.

use std::hint::black_box;
use std::time::{Duration, Instant};

use blockd::disk::tail::Tail;
use blockd::store::Access;
use blockd::storedir::NewDisk;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use format::journal::{RECORDS_PER_PAGE, Record, encode_commit};
use format::superblock::JournalHead;
use format::units::{BlockId, GuestBlock, Seq};
use offshoot_benches::{Random, chain, metadata_only, new_store};
use uuid::Uuid;

fn map_lookup(c: &mut Criterion) {
    const SIZE: u64 = 256 << 20;
    let mut group = c.benchmark_group("map_lookup");
    for depth in [1, 8, 64, 256] {
        let dir = tempfile::tempdir().expect("a folder");
        let store = metadata_only(dir.path()).expect("a store");
        let disk = chain(&store, depth, SIZE).expect("a chain");
        let mut random = Random(88_172_645_463_325_252);
        group.bench_function(BenchmarkId::from_parameter(depth), |b| {
            b.iter(|| disk.map().block(GuestBlock(black_box(random.below(SIZE / 4096)))));
        });
    }
    group.finish();
}

fn first_write(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a folder");
    let store = metadata_only(dir.path()).expect("a store");
    store.create(&NewDisk::root("a", 64 << 40)).expect("a disk");
    let disk = store.open_disk("a", Access::Write, &store.disk_options()).expect("open");
    let data = vec![7; 64 << 10];
    let mut at = 0;
    c.bench_function("first_write_publish", |b| {
        // One 64 KiB first write whose data goes nowhere: claim, lease, record, map entry; every
        // 65,536th pays for a commit, as in life.
        b.iter(|| {
            disk.write(0, at, &data).expect("write");
            at += 64 << 10;
        });
    });
}

fn journal(c: &mut Criterion) {
    let record = |n: u64| Record::Map { block: GuestBlock(n), count: 1, target: BlockId(n + 320) };
    let tail = Tail::on_heap(Uuid::from_u128(1), 1 << 16, Seq(1));
    c.bench_function("tail_append", |b| {
        b.iter(|| {
            if tail.room() == 0 {
                tail.release(tail.next());
            }
            tail.append(&record(black_box(5)))
        });
    });
    let records: Vec<Record> = (0..RECORDS_PER_PAGE as u64).map(record).collect();
    let head = JournalHead::default();
    c.bench_function("journal_page_encode", |b| {
        b.iter(|| encode_commit(&head, Uuid::from_u128(1), 4096, black_box(&records)));
    });
}

fn checkpoint(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a folder");
    let store = new_store(dir.path()).expect("a store");
    store.create(&NewDisk::root("a", 1 << 40)).expect("a disk");
    let disk = store.open_disk("a", Access::Write, &store.disk_options()).expect("open");
    let mut leaf = 0;
    let mut group = c.benchmark_group("checkpoint");
    group.sample_size(20);
    for dirty in [1u64, 64] {
        group.bench_function(BenchmarkId::new("dirty_leaves", dirty), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    for _ in 0..dirty {
                        disk.write(0, leaf % (1 << 15) * (32 << 20), &[1; 4096]).expect("write");
                        disk.discard(0, leaf % (1 << 15) * (32 << 20), 4096).expect("discard");
                        leaf += 1;
                    }
                    let start = Instant::now();
                    disk.checkpoint().expect("checkpoint");
                    spent += start.elapsed();
                }
                spent
            });
        });
    }
    group.finish();
}

/// A disk of 1 TiB with 40 GiB mapped and the journal as full as it gets, left by a crash.
fn open(c: &mut Criterion) {
    const TIB: u64 = 1 << 40;
    let dir = tempfile::tempdir().expect("a folder");
    let store = metadata_only(dir.path()).expect("a store");
    store.create(&NewDisk::root("a", TIB)).expect("a disk");
    let disk = store.open_disk("a", Access::Write, &store.disk_options()).expect("open");
    let data = vec![7; 4 << 20];
    for i in 0..(40u64 << 30) / (4 << 20) {
        disk.write(0, i * (4 << 20), &data).expect("write");
    }
    disk.checkpoint().expect("checkpoint");
    // Discards of single blocks make one record each and need no data; the checkpoint comes at half
    // the ring, so a little less than that is the most that a crash can leave.
    let mut random = Random(7);
    let records = 4096 / 2 * RECORDS_PER_PAGE as u64 * 7 / 10;
    for i in 0..records {
        disk.discard(0, random.below((40 << 30) / 4096) * 4096, 4096).expect("discard");
        if i % 60_000 == 59_999 {
            disk.flush().expect("flush");
        }
    }
    disk.flush().expect("flush");
    let facts = disk.facts().expect("facts");
    let (used, all) = facts.journal_pages;
    eprintln!(
        "fact: open: {used} of {all} journal pages used, with {records} random blocks in them"
    );
    drop(disk);
    let mut group = c.benchmark_group("open");
    // So short a time makes every sample one opening.
    group.sample_size(30).measurement_time(Duration::from_secs(1));
    // The opening alone: what a process does when it ends is no part of it.
    group.bench_function("1TiB_40GiB_mapped_full_journal", |b| {
        b.iter_custom(|rounds| {
            (0..rounds).fold(Duration::ZERO, |spent, _| {
                let start = Instant::now();
                let disk = store.open_disk("a", Access::Read, &store.disk_options());
                let spent = spent + start.elapsed();
                drop(disk.expect("open"));
                spent
            })
        });
    });
    group.finish();
}

/// What the map takes in memory for a gibibyte of disk: written from front to back, and with one
/// block in every extent that lies elsewhere than its neighbours.
fn memory(_: &mut Criterion) {
    const GIB: u64 = 1 << 30;
    let dir = tempfile::tempdir().expect("a folder");
    let store = metadata_only(dir.path()).expect("a store");
    store.create(&NewDisk::root("a", 8 * GIB)).expect("a disk");
    let disk = store.open_disk("a", Access::Write, &store.disk_options()).expect("open");
    let data = vec![7; 4 << 20];
    let bytes = || disk.facts().expect("facts").map_bytes;
    // The first mapped byte pays for the upper levels of the map.
    disk.write(0, 7 * GIB, &data).expect("write");
    let before = bytes();
    for i in 0..4 * GIB / (4 << 20) {
        disk.write(0, i * (4 << 20), &data).expect("write");
    }
    let whole = bytes();
    for extent in 0..4 * GIB / (64 << 10) {
        disk.discard(0, extent * (64 << 10), 4096).expect("discard");
    }
    let per_gib = |bytes: usize| bytes.div_ceil(4 << 10);
    eprintln!(
        "fact: memory of the map per GiB mapped: {} KiB in whole extents, {} KiB all mixed",
        per_gib(whole - before),
        per_gib(bytes() - before)
    );
}

criterion_group!(benches, map_lookup, first_write, journal, checkpoint, open, memory);
criterion_main!(benches);
