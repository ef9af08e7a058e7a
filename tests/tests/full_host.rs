//! A full host file system stops first writes, by name, and nothing else: what a disk holds can be
//! overwritten, flushed, discarded and closed, and a discard gives its space back.

#[allow(dead_code)] // Each test file uses a part of it.
mod support;

use std::collections::BTreeSet;

use blockd::check::{self, Action, RepairOptions, RepairReport};
use blockd::disk::{Disk, Options};
use blockd::segment::{file_name, read_superblock};
use blockd::store::file::{FileStore, FileStoreOptions};
use blockd::store::sim::{Faults, SimStore};
use blockd::store::{Access, Store};
use format::Kind;
use format::entry::Entry;
use format::superblock::Attached;
use offshoot_tests::inspect::contents;
use offshoot_tests::kill::{live, memory_dir};
use offshoot_tests::model::Contents;
use offshoot_tests::mount::Mount;
use offshoot_tests::pattern::{SECTOR, bytes};
use offshoot_tests::sim::{BLOCK, ByName, EXTENT, LEAF, create};
use uuid::Uuid;

use support::{Sample, closed, killed, read_back};

const SEGMENT: Uuid = Uuid::from_u128(100);
const SECTORS: u64 = 8 * LEAF;

/// A disk, and what it should hold.
struct Bench<'a> {
    store: &'a dyn Store,
    options: Options,
    disk: Option<Disk>,
    contents: Contents,
}

impl<'a> Bench<'a> {
    fn new(store: &'a dyn Store, sectors: u64, options: Options) -> Self {
        create(store, SEGMENT, sectors, None).unwrap();
        let mut bench = Bench { store, options, disk: None, contents: Contents::new() };
        bench.open();
        bench
    }

    fn open(&mut self) {
        let file = self.store.open(&file_name(SEGMENT), Access::Write).unwrap();
        let disk = Disk::open(file, &ByName(self.store), &self.options);
        self.disk = Some(disk.unwrap_or_else(|e| panic!("it does not open: {e}")));
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().unwrap()
    }

    fn write(&mut self, tag: u32, first: u64, count: u64) -> format::Result<()> {
        self.disk().write(0, first * SECTOR as u64, &bytes(tag, first, count))?;
        self.contents.extend((first..first + count).map(|sector| (sector, tag)));
        Ok(())
    }

    fn discard(&mut self, first: u64, count: u64) {
        let outcome = self.disk().discard(0, first * SECTOR as u64, count * SECTOR as u64);
        outcome.unwrap_or_else(|e| panic!("a discard fails: {e}"));
        self.contents.retain(|sector, _| !(first..first + count).contains(sector));
    }

    fn flush(&self) {
        self.disk().flush().unwrap_or_else(|e| panic!("a flush fails: {e}"));
    }

    fn close(&mut self) {
        let closed = self.disk.take().unwrap().close();
        closed.unwrap_or_else(|e| panic!("it does not close: {e}"));
    }

    fn expect_contents(&self) {
        let found = contents(self.disk()).unwrap_or_else(|v| panic!("{v}"));
        assert!(found == self.contents, "it holds something else");
    }

    fn attached(&self) -> Attached {
        let file = self.store.open(&file_name(SEGMENT), Access::Read).unwrap();
        read_superblock(file.as_ref()).unwrap().superblock.attached
    }
}

/// Lets a disk live through a full file system; `fill` takes all space there is, or gives it back.
fn lives_through(store: &dyn Store, fill: &mut dyn FnMut(bool)) {
    let dir = memory_dir();
    let mut bench = Bench::new(store, SECTORS, live(dir.path()));
    bench.write(1, 0, 64 * EXTENT).unwrap();
    // A disk that was just opened does not have the whole ring yet.
    for i in 0..12 {
        bench.write(1, (64 + i) * EXTENT, BLOCK).unwrap();
        bench.flush();
    }
    bench.write(2, LEAF, 3 * BLOCK).unwrap();
    bench.discard(60 * EXTENT + BLOCK, BLOCK);

    fill(true);
    let error = bench.write(3, 2 * LEAF, 100 * EXTENT).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace);
    assert_eq!(error.object(), Some("disk disk-100"), "{error}");
    bench.write(4, 3, 5 * EXTENT).unwrap();
    bench.write(5, LEAF + 1, 2).unwrap();
    bench.flush();

    // What a discard gives back can be written to.
    bench.discard(0, 32 * EXTENT);
    bench.flush();
    bench.write(6, 3 * LEAF, 16 * EXTENT).unwrap();
    bench.flush();

    // Records that give nothing back, more than the tail and half of the ring hold.
    fill(false);
    fill(true);
    for i in 0..1500 {
        bench.discard(5 * LEAF + i % 512 * EXTENT, BLOCK);
        if i % 100 == 0 {
            bench.flush();
        }
    }
    bench.discard(40 * EXTENT + BLOCK, BLOCK);
    bench.expect_contents();
    bench.close();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no tail is left");

    // Neither opening nor closing needs space.
    bench.open();
    bench.expect_contents();
    bench.write(7, 3 * LEAF, 8).unwrap();
    bench.discard(42 * EXTENT, 3 * BLOCK);
    bench.close();
    fill(false);
    bench.open();
    bench.expect_contents();
    bench.write(8, 2 * LEAF, 100 * EXTENT).unwrap();
    bench.close();
}

fn fill_simulated(store: &SimStore, full: bool) {
    store.set_faults(Faults::none());
    if full {
        let space = store.space().unwrap();
        store.set_faults(Faults::none().capacity(space.total - space.free));
    }
}

#[test]
fn on_the_simulated_store() {
    let store = SimStore::new();
    lives_through(&store, &mut |full| fill_simulated(&store, full));
}

#[test]
fn on_a_real_file_system() {
    let test = "full_host::on_a_real_file_system";
    let Some(mount) = Mount::ext4(test, 96 << 20) else { return };
    let folder = mount.path().join("store");
    std::fs::create_dir(&folder).unwrap();
    let store = FileStore::open(&folder, FileStoreOptions::default()).unwrap();
    let mut filler = None;
    lives_through(&store, &mut |full| filler = full.then(|| mount.fill(0)));
}

/// Story: a map that needs more pages than are held for it could not be written on a full file
/// system, and the disk could not be closed: its tail stayed, and with it the need for a live host.
#[test]
fn a_map_that_has_no_room_leaves_the_journal() {
    const LEAVES: u64 = 300;
    let (store, dir) = (SimStore::new(), memory_dir());
    let mut bench = Bench::new(&store, LEAVES * LEAF, live(dir.path()));
    for leaf in 0..LEAVES {
        bench.write(1, leaf * LEAF + 3 * BLOCK, BLOCK).unwrap();
    }
    fill_simulated(&store, true);
    assert_eq!(bench.disk().checkpoint().unwrap_err().kind(), Kind::NoSpace);

    bench.close();

    assert_eq!(bench.attached(), Attached::Plain);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no tail is left");
    bench.open();
    bench.expect_contents();
    bench.close();
    fill_simulated(&store, false);
    bench.open();
    bench.expect_contents();
    bench.close();
    assert_eq!(bench.attached(), Attached::No);
}

/// With any number of records in the tail, at any degree of fullness.
#[test]
fn a_close_succeeds_whatever_the_tail_holds() {
    for records in (0..504).step_by(21) {
        for pages in [0, 1, 5] {
            let (store, dir) = (SimStore::new(), memory_dir());
            let mut bench = Bench::new(&store, SECTORS, live(dir.path()));
            bench.write(1, 0, 8 * EXTENT).unwrap();
            bench.flush();
            for i in 0..records {
                bench.discard((100 + i) * EXTENT, BLOCK);
            }
            let space = store.space().unwrap();
            let capacity = space.total - space.free + pages * 4096;
            store.set_faults(Faults::none().capacity(capacity));

            bench.close();

            bench.open();
            bench.expect_contents();
        }
    }
}

/// Story: a repair that was to give space back took the journal into the map first, and had no
/// space for that.
#[test]
fn a_repair_gives_space_back_on_a_full_file_system() {
    let store = SimStore::new();
    let mut bench = Bench::new(&store, SECTORS, Options::default());
    bench.write(1, 0, 64 * EXTENT).unwrap();
    bench.disk().checkpoint().unwrap();
    bench.discard(0, 32 * EXTENT);
    // Killed before the space goes back, but after the record is durable.
    store.set_faults(
        Faults::none().add(blockd::store::sim::When::From(0), blockd::store::sim::Fault::PunchIo),
    );
    bench.flush();
    bench.disk = None;
    let store = SimStore::from_image(store.live_image());
    fill_simulated(&store, true);

    let file = store.open(&file_name(SEGMENT), Access::Write).unwrap();
    let options = RepairOptions { leaks: true, ..RepairOptions::default() };
    let report = check::repair(&file, &ByName(&store), None, &options).unwrap();

    assert!(matches!(report.actions[0], Action::Checkpoint { .. }), "{:?}", report.actions);
    assert!(matches!(report.actions[1], Action::PunchLeaks { .. }), "{:?}", report.actions);
    let after = report.after.unwrap();
    assert!(after.clean && after.stats.leaked_bytes == Some(0), "{:?}", after.problems);
    bench.store = &store;
    bench.open();
    bench.expect_contents();
}

/// Two damaged disks, and the repair that mends each.
fn damaged() -> [(Sample, RepairOptions); 2] {
    let mut leaf = killed();
    let at = leaf.leaf_at(1).page.file_offset();
    leaf.flip(at, 0);
    let drop_damaged = RepairOptions { drop_damaged: true, ..RepairOptions::default() };
    let mut shared = closed();
    shared.edit_leaf(0, |leaf| leaf.entries[400] = leaf.entries[3]);
    shared.edit_leaf(0, |leaf| {
        assert!(matches!(leaf.entries[400], Entry::Uniform { .. }), "extent 3 is whole");
    });
    let unshare = RepairOptions { unshare: true, ..RepairOptions::default() };
    [(leaf, drop_damaged), (shared, unshare)]
}

/// A damaged disk in a store that has little space.
struct Tight<'a> {
    store: &'a dyn Store,
    sample: Sample,
    options: RepairOptions,
}

impl Tight<'_> {
    fn repair(&self) -> format::Result<RepairReport> {
        let file = self.store.open(&self.sample.name(), Access::Write).unwrap();
        check::repair(&file, &ByName(self.store), None, &self.options)
    }

    /// Length and space of the file, what is wrong, and which blocks cannot be read.
    fn state(&self) -> (u64, u64, Vec<String>, BTreeSet<u64>) {
        let open = || self.store.open(&self.sample.name(), Access::Read).unwrap();
        let segments = ByName(self.store);
        let report = check::check(&open(), &segments, None, &check::CheckOptions::default());
        let problems = report.unwrap().problems.into_iter().map(|p| p.detail).collect();
        let disk = Disk::open_read_only(open(), &segments, &Options::default()).unwrap();
        let back = read_back(&disk, &self.sample.contents, self.sample.sectors);
        (open().size().unwrap(), open().allocated().unwrap(), problems, back.lost)
    }

    /// Repairs where there is not enough space; the disk stays as it is.
    fn expect_refused(&self) {
        let before = self.state();
        let error = self.repair().unwrap_err();
        assert_eq!(error.kind(), Kind::NoSpace);
        assert!(error.to_string().contains("free space on the host"), "{error}");
        assert!(error.object().is_some(), "{error}");
        assert_eq!(self.state(), before);
    }

    fn expect_repaired(&self) {
        let after = self.repair().unwrap().after.unwrap();
        assert!(after.clean, "{:?}", after.problems);
    }
}

/// Story: a repair that ran out of space kept what it had taken. Each further try began behind
/// that, and needed as much again.
#[test]
fn a_repair_without_space_leaves_the_disk_as_it_was() {
    for (sample, options) in damaged() {
        let mut refused = 0;
        for pages in 0.. {
            let store = sample.store();
            let used = store.space().unwrap();
            store.set_faults(Faults::none().capacity(used.total - used.free + pages * 4096));
            let tight = Tight { store: &store, sample: sample.clone(), options };
            if tight.repair().is_ok() {
                break;
            }
            refused += 1;
            assert_eq!(store.live_image().fingerprint(), sample.image.fingerprint(), "{pages}");
            tight.expect_refused();
            fill_simulated(&store, false);
            tight.expect_repaired();
        }
        // Pages of a leaf and of three levels above it; unshared data as well.
        assert!(refused >= 4, "{refused}");
    }
}

#[test]
fn a_repair_without_space_on_a_real_file_system() {
    let test = "full_host::a_repair_without_space_on_a_real_file_system";
    for (sample, options) in damaged() {
        let Some(mount) = Mount::ext4(test, 96 << 20) else { return };
        let folder = mount.path().join("store");
        std::fs::create_dir(&folder).unwrap();
        let store = FileStore::open(&folder, FileStoreOptions::default()).unwrap();
        let content = sample.image.get(&sample.name()).unwrap();
        let file = store.create(&sample.name()).unwrap();
        file.set_len(content.len()).unwrap();
        let mut at = 0;
        while let Some((start, end)) = content.next_data(at) {
            let len = usize::try_from(end - start).unwrap();
            file.write_at(start, &content.read(start, len)).unwrap();
            at = end;
        }
        drop(file);
        let tight = Tight { store: &store, sample, options };
        let filler = mount.fill(0);
        tight.expect_refused();
        tight.expect_refused();
        drop(filler);
        tight.expect_repaired();
    }
}
