//! Damaging disks on purpose, and reading back what is left of them.

use std::collections::BTreeSet;
use std::sync::Arc;

use blockd::check::{self, CheckOptions, RepairOptions, RepairReport, Report};
use blockd::disk::{Disk, Options};
use blockd::segment::{file_name, read_copies};
use blockd::store::sim::{Image, SimStore};
use blockd::store::{Access, File, Store};
use format::limits::{BLOCK, EXTENT, PAGE, SUPERBLOCK_OFFSETS};
use format::node::{Leaf, NodePtr, PageRef, encode_leaf};
use format::superblock::{Superblock, choose};
use format::tree::Tree;
use format::units::{ExtentId, LeafNo};
use format::{Kind, Result};
use offshoot_tests::model::Contents;
use offshoot_tests::pattern::{Found, SECTOR, bytes, look};
use offshoot_tests::sim::{ByName, Script};
use uuid::Uuid;

pub const SECTORS_PER_BLOCK: u64 = BLOCK / SECTOR as u64;

/// A store with one disk that matters, and what that disk holds.
#[derive(Clone)]
pub struct Sample {
    pub image: Image,
    pub segment: Uuid,
    pub contents: Contents,
    pub sectors: u64,
}

impl Sample {
    pub fn of(script: &Script) -> Self {
        let model = script.model();
        Sample {
            image: script.store.live_image(),
            segment: script.segment,
            contents: model.contents(),
            sectors: model.size(),
        }
    }

    pub fn name(&self) -> String {
        file_name(self.segment)
    }

    pub fn store(&self) -> SimStore {
        SimStore::from_image(self.image.clone())
    }

    pub fn file_bytes(&self) -> u64 {
        self.image.get(&self.name()).expect("the segment").len()
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        self.image.get(&self.name()).expect("the segment").read(offset, len)
    }

    pub fn page(&self, page: u64) -> [u8; PAGE] {
        self.read(page * PAGE as u64, PAGE).try_into().expect("a page")
    }

    pub fn overwrite(&mut self, offset: u64, bytes: &[u8]) {
        let name = self.name();
        self.image.overwrite(&name, offset, bytes).expect("overwritten");
    }

    pub fn flip(&mut self, offset: u64, bit: u32) {
        let name = self.name();
        self.image.flip_bit(&name, offset, bit).expect("flipped");
    }

    /// The newest superblock.
    pub fn superblock(&self) -> Superblock {
        let store = self.store();
        let file = store.open(&self.name(), Access::Read).expect("opened");
        choose(&read_copies(file.as_ref()).expect("copies")).expect("a copy").superblock
    }

    /// Writes all four superblock copies anew after a change.
    pub fn edit_superblock(&mut self, change: impl FnOnce(&mut Superblock)) {
        let mut sb = self.superblock();
        change(&mut sb);
        for (copy, offset) in SUPERBLOCK_OFFSETS.into_iter().enumerate() {
            self.overwrite(offset, &sb.encode(copy));
        }
    }

    /// The inner map pages, as far as they lie in this segment.
    pub fn tree(&self) -> Tree {
        let own = self.superblock().own_index;
        let (tree, damage) = Tree::load(self.superblock().root, &mut |at, buf| {
            assert_eq!(at.segment, own, "a page of the own segment");
            *buf = self.page(at.page.0);
            Ok(())
        });
        assert!(damage.is_empty());
        tree
    }

    /// Where a leaf of this segment is.
    pub fn leaf_at(&self, leaf: u64) -> PageRef {
        match self.tree().leaf(LeafNo(leaf)) {
            Ok(NodePtr::Page(at)) => at,
            other => panic!("leaf {leaf} has no page: {other:?}"),
        }
    }

    /// Changes a leaf, with all checksums right: new pages at the end of the file, and the same
    /// superblock but for its root.
    pub fn edit_leaf(&mut self, leaf: u64, change: impl FnOnce(&mut Leaf)) {
        self.edit_leaf_at(leaf, ExtentId(self.file_bytes() / EXTENT), change);
        let end = self.file_bytes().next_multiple_of(EXTENT);
        let name = self.name();
        self.image.truncate(&name, end).expect("grown");
        self.edit_superblock(|sb| sb.extents_end = ExtentId(end / EXTENT));
    }

    /// As [`Sample::edit_leaf`], with the new pages from extent `to` on.
    pub fn edit_leaf_at(&mut self, leaf: u64, to: ExtentId, change: impl FnOnce(&mut Leaf)) {
        let (sb, at, mut tree) = (self.superblock(), self.leaf_at(leaf), self.tree());
        let run = at
            .vectors
            .map_or(Vec::new(), |v| self.read(v.page.file_offset(), usize::from(v.count) * PAGE));
        let mut stored = Leaf::decode(&at, &self.page(at.page.0), &run).expect("a good leaf");
        change(&mut stored);
        let bytes = encode_leaf(
            |i| stored.entries[i],
            |i| match stored.entries[i] {
                format::entry::Entry::Mixed { slot } => stored.vectors[usize::from(slot)],
                _ => unreachable!("asked for mixed extents only"),
            },
        );
        let mut next = to.first_page();
        let run = (bytes.vector_pages() > 0).then_some(next);
        if let Some(run) = run {
            self.overwrite(run.file_offset(), &bytes.vectors);
            next = next.plus(16);
        }
        self.overwrite(next.file_offset(), bytes.page.as_slice());
        let ptr = NodePtr::Page(bytes.pointer(sb.own_index, next, run, sb.generation));
        tree.set_leaf(LeafNo(leaf), ptr).expect("no damage");
        let written = tree
            .write_dirty(sb.own_index, sb.generation, &mut || {
                next = next.plus(1);
                Ok(next)
            })
            .expect("written");
        for (page, bytes) in written.pages {
            self.overwrite(page.file_offset(), &bytes);
        }
        self.edit_superblock(|sb| sb.root = tree.root());
    }

    pub fn check(&self) -> Result<Report> {
        self.check_with(CheckOptions::default())
    }

    pub fn check_with(&self, options: CheckOptions) -> Result<Report> {
        let store = self.store();
        let before = self.image.fingerprint();
        let file = store.open(&self.name(), Access::Read)?;
        let report = check::check(&file, &ByName(&store), None, &options);
        assert_eq!(store.live_image().fingerprint(), before, "a check writes nothing");
        report
    }

    /// Repairs, and takes the outcome over.
    pub fn repair(&mut self, options: RepairOptions) -> Result<RepairReport> {
        let store = self.store();
        let repaired = repair_in(&store, self.segment, options);
        self.image = store.live_image();
        repaired
    }

    pub fn open_read_only(&self) -> Result<(SimStore, Disk)> {
        let store = self.store();
        let file = store.open(&self.name(), Access::Read)?;
        let disk = Disk::open_read_only(file, &ByName(&store), &Options::default())?;
        Ok((store, disk))
    }

    pub fn open(&self) -> Result<(SimStore, Disk)> {
        let store = self.store();
        let file = store.open(&self.name(), Access::Write)?;
        let disk = Disk::open(file, &ByName(&store), &Options::default())?;
        Ok((store, disk))
    }

    /// Opens for writing, does something, closes in order, and takes the outcome over.
    pub fn session(&mut self, work: impl FnOnce(&Disk, &mut Contents)) {
        let (store, disk) = self.open().expect("it opens");
        work(&disk, &mut self.contents);
        disk.close().expect("it closes");
        self.image = store.live_image();
    }

    /// As [`Sample::session`], with the process killed at the end.
    pub fn killed_session(&mut self, work: impl FnOnce(&Disk, &mut Contents)) {
        let (store, disk) = self.open().expect("it opens");
        work(&disk, &mut self.contents);
        drop(disk);
        self.image = store.live_image();
    }

    /// Forgets what the sectors of a range hold: they are zero.
    pub fn forget(&mut self, first: u64, count: u64) {
        self.contents.retain(|sector, _| !(first..first + count).contains(sector));
    }

    /// What of the disk reads as it should.
    pub fn read_back(&self, disk: &Disk) -> ReadBack {
        read_back(disk, &self.contents, self.sectors)
    }

    /// Blocks that can be read, blocks that cannot: everything that can holds what it should.
    pub fn lost_blocks(&self) -> BTreeSet<u64> {
        let (_store, disk) = self.open_read_only().expect("it opens for reading");
        let back = self.read_back(&disk);
        assert_eq!(back.wrong, [""; 0], "wrong content");
        back.lost
    }
}

/// Writes sectors of the pattern `tag`.
pub fn put(disk: &Disk, contents: &mut Contents, tag: u32, (first, count): (u64, u64)) {
    disk.write(0, first * SECTOR as u64, &bytes(tag, first, count)).expect("written");
    contents.extend((first..first + count).map(|sector| (sector, tag)));
}

/// Discards sectors.
pub fn discard(disk: &Disk, contents: &mut Contents, (first, count): (u64, u64)) {
    disk.discard(0, first * SECTOR as u64, count * SECTOR as u64).expect("discarded");
    contents.retain(|sector, _| !(first..first + count).contains(sector));
}

/// Repairs the disk of a store.
pub fn repair_in(store: &SimStore, segment: Uuid, options: RepairOptions) -> Result<RepairReport> {
    let access = if options.dry_run { Access::Read } else { Access::Write };
    let file: Arc<dyn File> = store.open(&file_name(segment), access)?;
    check::repair(&file, &ByName(store), None, &options)
}

/// What was read of a disk.
#[derive(Debug, Default)]
pub struct ReadBack {
    /// Blocks that cannot be read.
    pub lost: BTreeSet<u64>,
    /// What holds something else than it should.
    pub wrong: Vec<String>,
}

/// Reads every extent that holds something, its neighbours, and some of each leaf.
pub fn read_back(disk: &Disk, contents: &Contents, sectors: u64) -> ReadBack {
    let per_extent = EXTENT / SECTOR as u64;
    let last = (sectors - 1) / per_extent;
    let mut extents: BTreeSet<u64> = (0..=last).step_by(128).collect();
    for sector in contents.keys() {
        let extent = sector / per_extent;
        extents.extend([extent.saturating_sub(1), extent, (extent + 1).min(last)]);
    }
    extents.insert(last);
    let mut back = ReadBack::default();
    for extent in extents {
        let first = extent * per_extent;
        let count = per_extent.min(sectors - first);
        if !read_range(disk, contents, first, count, &mut back) {
            for at in (first..first + count).step_by(8) {
                let count = SECTORS_PER_BLOCK.min(first + count - at);
                if !read_range(disk, contents, at, count, &mut back) {
                    back.lost.insert(at / SECTORS_PER_BLOCK);
                }
            }
        }
    }
    back
}

fn read_range(
    disk: &Disk,
    contents: &Contents,
    first: u64,
    count: u64,
    back: &mut ReadBack,
) -> bool {
    let mut bytes = vec![0xee; usize::try_from(count).expect("a count") * SECTOR];
    if let Err(e) = disk.read(0, first * SECTOR as u64, &mut bytes) {
        assert_eq!(e.kind(), Kind::Corrupt, "{e}");
        return false;
    }
    for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
        let want = contents.get(&sector).map_or(Found::Zero, |tag| Found::Tag(*tag));
        let found = look(bytes, sector);
        if found != want {
            back.wrong.push(format!("sector {sector}: {found:?} instead of {want:?}"));
        }
    }
    true
}

/// A disk of three leaves and an odd end that has everything: uniform and mixed extents, zeroes,
/// holes, blocks written in part, records in the journal. It was killed after its last flush.
pub fn busy(mut script: Script) -> Script {
    const LEAF: u64 = offshoot_tests::sim::LEAF;
    script.open().expect("it opens");
    script.write(0, 8 * 128).expect("written");
    script.write(10 * 128 + 24, 8).expect("written");
    script.write(12 * 128 + 3, 70).expect("written");
    script.write(LEAF + 5 * 128, 3 * 128).expect("written");
    script.write(LEAF + 40 * 128 + 64, 16).expect("written");
    script.write(2 * LEAF + 9 * 128, 128).expect("written");
    script.discard(2 * 128, 128).expect("discarded");
    script.discard(5 * 128 + 16, 32).expect("discarded");
    script.checkpoint().expect("a checkpoint");
    script.write(LEAF + 50 * 128, 20).expect("written");
    script.flush().expect("flushed");
    script.write(20 * 128, 256).expect("written");
    script.discard(LEAF + 6 * 128, 128).expect("discarded");
    script.flush().expect("flushed");
    script.write(2 * LEAF + 20 * 128, 24).expect("written");
    script.flush().expect("flushed");
    script.kill();
    script
}

/// Sectors of the disk that [`busy`] fills.
pub const BUSY_SECTORS: u64 = 2 * offshoot_tests::sim::LEAF + 40 * 128 + 3;

/// [`busy`], killed.
pub fn killed() -> Sample {
    Sample::of(&busy(Script::empty(BUSY_SECTORS)))
}

/// [`busy`], sealed.
pub fn sealed() -> Sample {
    let mut script = busy(Script::empty(BUSY_SECTORS));
    script.open().expect("it opens");
    script.seal().expect("it is sealed");
    Sample::of(&script)
}

/// [`busy`], closed in order.
pub fn closed() -> Sample {
    let mut script = busy(Script::empty(BUSY_SECTORS));
    script.open().expect("it opens");
    script.close().expect("it closes");
    Sample::of(&script)
}
