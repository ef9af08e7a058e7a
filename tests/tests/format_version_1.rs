//! A store that an earlier build made, in version 1 of the format, opens for ever: every byte of
//! every disk reads as it was written, and the disks go on from there.
//!
//! The fixture is described in `tests/fixtures/README.md`; it is never made again. If a test here
//! fails, the build under test cannot read disks that people have.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockd::check::{CheckOptions, Report, check};
use blockd::disk::Disk;
use blockd::segment::{file_name, read_superblock};
use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{NewDisk, OpenOptions, StoreDir};
use format::limits::{BLOCK, EXTENT, LEAF_SPAN, SUPERBLOCK_OFFSETS};
use format::node::NodePtr;
use format::superblock::{Attached, Seal, State};
use format::tree::Tree;
use format::units::LeafNo;
use offshoot_tests::flat::{Flat, text};
use tempfile::TempDir;
use uuid::Uuid;

/// BLAKE3 of the files as they were made. They do not change: see the head of this file.
const FILES: [(&str, &str); 2] = [
    ("store.tar.gz", "a560f705c10eebc5fa1cd9e41229c25e3ed4d89123314cc7f27030a6b48710e3"),
    ("content.txt", "ea02265af6a2fa9e4f6460192f93ae5a463fdaa9f270ecd370cce54ee796b065"),
];

const DISKS: [&str; 4] = ["base", "empty", "middle", "top"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/format-1").join(name)
}

/// A copy of the fixture's store.
struct Unpacked {
    dir: TempDir,
}

impl Unpacked {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let unpacked = Command::new("tar")
            .arg("-xzf")
            .arg(fixture("store.tar.gz"))
            .arg("-C")
            .arg(dir.path())
            .status()
            .expect("every Linux has tar");
        assert!(unpacked.success(), "tar ends with {unpacked}");
        Unpacked { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn open(&self, access: Access) -> StoreDir {
        let dir = StoreDir::open(&self.path(), &options(access)).unwrap();
        assert_eq!(dir.notes, [""; 0], "nothing has to be mended");
        dir
    }

    /// The bytes of a disk's own file.
    fn file(&self, segment: Uuid) -> Vec<u8> {
        fs::read(self.path().join(file_name(segment))).unwrap()
    }
}

fn options(access: Access) -> OpenOptions {
    // Another boot than that of the maker, as on any machine that gets such a disk.
    OpenOptions { access, cache: CacheMode::Buffered, boot: Uuid::from_u128(1) }
}

/// What each disk has to hold, as [`Flat::describe`] tells it.
fn expected() -> BTreeMap<String, String> {
    let content = fs::read_to_string(fixture("content.txt")).unwrap();
    let disks = content.split("disk ").skip(1);
    disks
        .map(|disk| {
            let (name, ranges) = disk.split_once('\n').expect("a name, then ranges");
            (name.to_owned(), ranges.to_owned())
        })
        .collect()
}

fn read(dir: &StoreDir, name: &str) -> Disk {
    let disk = dir.open_disk(name, Access::Read, &dir.disk_options()).unwrap();
    assert!(disk.problems.is_empty(), "{name}: {:?}", disk.problems);
    disk
}

fn write(dir: &StoreDir, name: &str) -> Disk {
    let disk = dir.open_disk(name, Access::Write, &dir.disk_options()).unwrap();
    assert!(disk.problems.is_empty(), "{name}: {:?}", disk.problems);
    disk
}

fn checked(dir: &StoreDir, name: &str) -> Report {
    let file = dir.segment_file(dir.disk(name).unwrap().segment, Access::Read).unwrap();
    let report = check(&file, dir, None, &CheckOptions { data: true }).unwrap();
    assert!(report.clean, "{name}: {:?}", report.problems);
    report
}

fn all_as_expected(dir: &StoreDir) {
    let expected = expected();
    assert!(expected.keys().eq(DISKS), "{:?}", expected.keys());
    for (name, ranges) in expected {
        assert_eq!(Flat::of(&read(dir, &name)).unwrap().describe(), ranges, "disk {name}");
    }
}

#[test]
fn the_fixture_is_the_one_that_was_made_then() {
    for (name, digest) in FILES {
        let found = blake3::hash(&fs::read(fixture(name)).unwrap()).to_string();
        assert_eq!(found, digest, "{name}: fixtures are never made again");
    }
}

/// What the fixture is for: without these the tests below would prove less than they say.
#[test]
fn the_fixture_has_what_it_is_there_for() {
    let store = Unpacked::new();
    let dir = store.open(Access::Read);
    let rows = dir.disks();
    assert!(rows.iter().map(|r| r.name.as_str()).eq(DISKS));
    for row in &rows {
        let bytes = store.file(row.segment);
        for at in SUPERBLOCK_OFFSETS.map(|o| usize::try_from(o).unwrap()) {
            assert_eq!(bytes[at..at + 8], *b"OFFSHOOT");
            assert_eq!(bytes[at + 8..at + 12], 1_u32.to_le_bytes(), "version 1");
        }
    }
    let superblock = |name: &str| {
        let file = dir.segment_file(dir.disk(name).unwrap().segment, Access::Read).unwrap();
        read_superblock(file.as_ref()).unwrap().superblock
    };
    for name in ["base", "middle"] {
        let sb = superblock(name);
        assert_eq!((sb.state, sb.seal), (State::Sealed, Seal::Done));
        assert!(sb.sums.bytes > 0 && sb.digest != [0; 32]);
    }
    let top = superblock("top");
    assert_eq!((top.state, top.attached), (State::Active, Attached::Plain));
    let stats = checked(&dir, "top").stats;
    assert!(stats.journal_records > 0, "{stats:?}");
    assert_eq!(stats.depth, 2);

    let disk = read(&dir, "top");
    let segments = disk.table().iter().count();
    assert_eq!(segments, 3);
    let file = |at| dir.segment_file(disk.table().row(at).unwrap().segment, Access::Read).unwrap();
    let (tree, damage) =
        Tree::load(top.root, &mut |at, buf| file(at.segment).read_at(at.page.file_offset(), buf));
    assert!(damage.is_empty());
    assert_eq!(tree.leaf(LeafNo(1)).unwrap(), NodePtr::Zero);
    let NodePtr::Page(leaf) = tree.leaf(LeafNo(0)).unwrap() else { panic!("leaf 0 has a page") };
    assert!(leaf.vectors.is_some(), "leaf 0 has mixed extents");
}

#[test]
fn every_byte_reads_as_it_was_written() {
    let store = Unpacked::new();
    let dir = store.open(Access::Read);

    all_as_expected(&dir);
    let reports = DISKS.map(|name| checked(&dir, name));

    assert!(reports.iter().all(|r| r.stats.damaged_bytes == 0));
    assert_eq!(reports[0].stats.unsummed_bytes, Some(0), "base is sealed");
}

#[test]
fn its_catalogue_can_be_made_anew() {
    let store = Unpacked::new();
    let before = store.open(Access::Read).disks();

    fs::remove_file(store.path().join("catalogue.redb")).unwrap();
    let rebuilt = StoreDir::rebuild(&store.path(), &options(Access::Write)).unwrap();

    assert!(rebuilt.unreadable.is_empty() && rebuilt.missing.is_empty(), "{rebuilt:?}");
    let rows = |rows: &[blockd::catalogue::DiskRow]| {
        let mut rows: Vec<_> = rows.iter().map(|row| format!("{row:?}")).collect();
        rows.sort();
        rows
    };
    assert_eq!(rows(&rebuilt.disks), rows(&before));
    all_as_expected(&store.open(Access::Read));
}

/// Written to, closed, opened, sealed, and stood on: as if the build of today had made it.
#[test]
fn its_disks_go_on() {
    let store = Unpacked::new();
    let dir = store.open(Access::Write);
    let parents = ["base", "middle"].map(|name| dir.disk(name).unwrap().segment);
    let before = parents.map(|segment| store.file(segment));
    let disk = write(&dir, "top");
    let mut flat = Flat::of(&disk).unwrap();
    assert_eq!(flat.describe(), expected()["top"], "opening for writing changes nothing");

    // Over data of each ancestor, over a zero, into holes, and into what only the journal knew.
    let places = [
        (101, 0, 3 * 512),
        (102, EXTENT + 7 * BLOCK, BLOCK),
        (103, 5 * EXTENT, EXTENT),
        (104, LEAF_SPAN + 512, 512),
        (105, 300 * EXTENT, 3 * BLOCK),
        (106, disk.size() - 512, 512),
    ];
    for (tag, offset, len) in places {
        disk.write(0, offset, &text(tag, offset, len)).unwrap();
        flat.write(tag, offset, len);
    }
    for (offset, len) in [(2 * EXTENT, EXTENT), (400 * EXTENT + BLOCK, 2 * BLOCK)] {
        disk.discard(0, offset, len).unwrap();
        flat.discard(offset, len);
    }
    assert_eq!(Flat::of(&disk).unwrap().describe(), flat.describe());
    disk.flush().unwrap();
    drop(disk); // as killed: the journal has two builds' records in it now
    assert_eq!(Flat::of(&write(&dir, "top")).unwrap().describe(), flat.describe());
    write(&dir, "top").close().unwrap();
    drop(dir);

    let dir = store.open(Access::Write);
    assert_eq!(Flat::of(&read(&dir, "top")).unwrap().describe(), flat.describe());
    dir.seal("top", &mut |_, _| Ok(())).unwrap();
    let child = NewDisk { parent: Some("top".into()), ..NewDisk::root("child", 0) };
    dir.create(&child).unwrap();
    assert_eq!(Flat::of(&write(&dir, "child")).unwrap().describe(), flat.describe());
    for name in ["base", "middle", "top", "child"] {
        checked(&dir, name);
    }
    assert!(parents.map(|segment| store.file(segment)) == before, "a parent's file changed");
}

/// A disk that was made then, and never opened, works.
#[test]
fn a_disk_that_was_never_opened_can_be_used() {
    let store = Unpacked::new();
    let dir = store.open(Access::Write);
    let disk = write(&dir, "empty");
    let mut flat = Flat::empty(disk.size());
    disk.write(0, 0, &text(1, 0, EXTENT)).unwrap();
    flat.write(1, 0, EXTENT);
    disk.close().unwrap();

    assert_eq!(Flat::of(&read(&dir, "empty")).unwrap(), flat);
}
