//! Makes the store of a format fixture, and beside it what its disks hold: see
//! `tests/fixtures/README.md`. No test runs this: a fixture is made once, by the build whose format
//! it stands for.
//!
//! What is expected comes from a model that does the same operations in memory, never from reading
//! the disks back.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use blockd::disk::Disk;
use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{NewDisk, OpenOptions, StoreDir, boot_id};
use format::Result;
use format::limits::{BLOCK, EXTENT, LEAF_SPAN};
use offshoot_tests::flat::{Flat, text};

/// Ends inside a block of the second leaf.
const BASE_SIZE: u64 = 40 * MIB + 3 * 512;
const TOP_SIZE: u64 = 100 * MIB;
const MIB: u64 = 1 << 20;
/// The smallest journal: 64 KiB.
const JOURNAL_BYTES: u64 = 64 << 10;

/// A disk and the model of it.
struct Both<'a> {
    disk: &'a Disk,
    flat: &'a mut Flat,
}

impl Both<'_> {
    fn write(&mut self, tag: u32, offset: u64, len: u64) -> Result<()> {
        self.flat.write(tag, offset, len);
        self.disk.write(0, offset, &text(tag, offset, len))
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.flat.discard(offset, len);
        self.disk.discard(0, offset, len)
    }
}

fn create(dir: &StoreDir, name: &str, size: u64, parent: Option<&str>) -> Result<()> {
    let parent = parent.map(str::to_owned);
    let new =
        NewDisk { name: name.into(), virtual_size: size, parent, journal_bytes: JOURNAL_BYTES };
    dir.create(&new).map(|_| ())
}

fn open(dir: &StoreDir, name: &str) -> Result<Disk> {
    dir.open_disk(name, Access::Write, &dir.disk_options())
}

/// A root with uniform and mixed extents, zeroes of both sizes, partial blocks and two leaves.
fn base(dir: &StoreDir) -> Result<Flat> {
    create(dir, "first", BASE_SIZE, None)?;
    let mut flat = Flat::empty(BASE_SIZE);
    let disk = open(dir, "first")?;
    let mut both = Both { disk: &disk, flat: &mut flat };
    both.write(1, 0, 3 * EXTENT)?;
    both.write(2, 5 * EXTENT + 3 * BLOCK, 2 * BLOCK)?;
    both.write(3, 7 * EXTENT + 5 * 512, 9 * 512)?;
    disk.flush()?;
    both.write(4, LEAF_SPAN + 2 * EXTENT, 2 * EXTENT)?;
    both.discard(EXTENT, EXTENT)?;
    disk.checkpoint()?;
    both.discard(2 * EXTENT + 4 * BLOCK, 2 * BLOCK)?;
    both.write(5, BASE_SIZE - 2 * 512, 2 * 512)?;
    disk.close()?;
    dir.seal("first", &mut |_, _| Ok(()))?;
    // The name is the one thing of a sealed segment that may change.
    dir.rename("first", "base")?;
    Ok(flat)
}

/// A child that hides, replaces and completes parts of its parent.
fn middle(dir: &StoreDir, base: &Flat) -> Result<Flat> {
    create(dir, "middle", 0, Some("base"))?;
    let mut flat = base.clone();
    let disk = open(dir, "middle")?;
    let mut both = Both { disk: &disk, flat: &mut flat };
    both.write(6, 2 * BLOCK, 2 * BLOCK)?;
    both.discard(5 * EXTENT, EXTENT)?;
    both.write(7, EXTENT + 7 * BLOCK, BLOCK)?;
    both.write(8, 7 * EXTENT + 512, 2 * 512)?;
    both.write(9, 100 * EXTENT + BLOCK, BLOCK)?;
    disk.close()?;
    dir.seal("middle", &mut |_, _| Ok(()))?;
    Ok(flat)
}

/// A larger child, with a leaf that is zero as a whole, left as a killed command line leaves it:
/// what came after the checkpoint is in the journal alone.
fn top(dir: &StoreDir, middle: &Flat) -> Result<Flat> {
    create(dir, "top", TOP_SIZE, Some("middle"))?;
    let mut flat = middle.clone().grown(TOP_SIZE);
    let disk = open(dir, "top")?;
    let mut both = Both { disk: &disk, flat: &mut flat };
    both.discard(LEAF_SPAN, LEAF_SPAN)?;
    both.write(10, 2 * LEAF_SPAN + 3 * EXTENT, EXTENT)?;
    both.write(11, 4 * BLOCK, 3 * 512)?;
    disk.close()?;

    let disk = open(dir, "top")?;
    let mut both = Both { disk: &disk, flat: &mut flat };
    both.write(12, 200 * EXTENT, 2 * EXTENT)?;
    disk.checkpoint()?;
    both.write(13, 300 * EXTENT + 2 * BLOCK, 3 * BLOCK)?;
    both.write(14, 2 * LEAF_SPAN + 3 * EXTENT + 6 * BLOCK, BLOCK)?;
    disk.flush()?;
    both.discard(0, BLOCK)?;
    both.discard(201 * EXTENT, EXTENT)?;
    both.write(15, 400 * EXTENT, EXTENT)?;
    disk.flush()?;
    // Dropped, not closed.
    Ok(flat)
}

fn run(store: &Path, tail_dir: PathBuf) -> Result<String> {
    StoreDir::init(store, Some(tail_dir))?;
    let options =
        OpenOptions { access: Access::Write, cache: CacheMode::Buffered, boot: boot_id() };
    let dir = StoreDir::open(store, &options)?;
    let base = base(&dir)?;
    let middle = middle(&dir, &base)?;
    let top = top(&dir, &middle)?;
    create(&dir, "empty", MIB, None)?;
    let mut content = String::new();
    for (name, flat) in
        [("base", base), ("empty", Flat::empty(MIB)), ("middle", middle), ("top", top)]
    {
        write!(content, "disk {name}\n{}", flat.describe()).expect("text grows");
    }
    Ok(content)
}

fn main() {
    let mut words = std::env::args_os().skip(1);
    let (Some(store), Some(content), None) = (words.next(), words.next(), words.next()) else {
        eprintln!("usage: make_format_fixture STORE CONTENT");
        std::process::exit(2);
    };
    // Nobody opens the disks for living clients, so nothing is ever put there.
    let made = run(Path::new(&store), PathBuf::from("/dev/shm/offshoot-fixture"));
    let text = made.unwrap_or_else(|e| {
        eprintln!("{e}");
        std::process::exit(1);
    });
    std::fs::write(&content, text).unwrap_or_else(|e| {
        eprintln!("cannot write {}: {e}", Path::new(&content).display());
        std::process::exit(1);
    });
}
