//! Whole segment files: checking, scrubbing, opening, using, closing and repairing them.
//!
//! Input: a byte of flags, the length of the file in extents (2 bytes), then pages: number (3
//! bytes), length (2 bytes), bytes; the rest of a page is zero. Flag 1: checksums are computed,
//! from the leaves up, so that an input gets past them; flag 2: copies 2 and 3 of the superblock
//! are page 128, not those of page 0. A sealed parent is in the store, too.
//!
//! Promises: a check and an opening agree; what a session leaves is no worse than what it found;
//! what a check calls repairable is clean after a repair with every option.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use blockd::check::{CheckOptions, RepairOptions, Report, check, repair, scrub};
use blockd::disk::create::{NewSegment, Parent};
use blockd::disk::problem::{Problem, Severity, What};
use blockd::disk::{Disk, Options};
use blockd::segment::{Sealed, Segments, file_name, new_name, read_superblock};
use blockd::store::sim::{Content, Image, SimStore};
use blockd::store::{Access, File, Store};
use format::array::{self, ArrayRef};
use format::entry::BlockState;
use format::limits::{BLOCK, EXTENT, HEADER_EXTENTS, PAGE, SUPERBLOCK_COPIES, SUPERBLOCK_OFFSETS};
use format::node::{NodePtr, PageRef, VectorRef, decode_inner, encode_inner};
use format::superblock::{Attached, Mode, Superblock};
use format::units::{ExtentId, GuestBlock, OwnerEpoch, PageNo, SegmentIdx, crc};
use format::{Error, Kind, Result};
use uuid::Uuid;

use super::superblock::seal;
use crate::bytes::{Input, put, trimmed};

const FIX: u8 = 1;
const TWO_STATES: u8 = 2;
const EXTENTS_MAX: u64 = 4096;
/// Larger disks and journals take long and show nothing new.
const SIZE_MAX: u64 = 8 << 30;
const JOURNAL_EXTENTS_MAX: u64 = 64;
const SECOND_STATE: u64 = SUPERBLOCK_OFFSETS[2] / BLOCK;

const DISK: Uuid = Uuid::from_u128(0xd15c);
const PARENT: Uuid = Uuid::from_u128(0xba5e);

type Pages = BTreeMap<u64, [u8; PAGE]>;

struct InStore(SimStore);

impl Segments for InStore {
    fn sealed(&self, segment: Uuid) -> Result<Arc<Sealed>> {
        let file = self.0.open(&file_name(segment), Access::Read).map_err(|e| match e.kind() {
            Kind::NotFound => Error::new(Kind::ParentMissing, "no such segment"),
            _ => e,
        })?;
        let superblock = read_superblock(file.as_ref())?.superblock;
        Ok(Arc::new(Sealed { superblock, file }))
    }
}

/// Builds the image, and does with it what can be done with a disk.
pub fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let flags = input.byte();
    let extents = u64::from(u16::from_le_bytes(input.array())) % (EXTENTS_MAX + 1);
    let mut pages = Pages::new();
    while !input.is_empty() {
        let [a, b, c] = input.array();
        let number = u64::from(u32::from_le_bytes([a, b, c, 0]));
        let len = usize::from(u16::from_le_bytes(input.array())).min(PAGE);
        if number < extents * EXTENT / BLOCK {
            let page = pages.entry(number).or_insert([0; PAGE]);
            put(page, 0, input.bytes(len));
        }
    }
    if flags & FIX != 0 {
        fix_states(&mut pages, flags & TWO_STATES != 0);
    }
    pages.retain(|number, _| *number < extents * EXTENT / BLOCK);
    let mut image = parent().clone();
    image.put(&file_name(DISK), Content::from_bytes(&[]));
    image.truncate(&file_name(DISK), extents * EXTENT).expect("a length");
    for (number, page) in &pages {
        image.overwrite(&file_name(DISK), number * BLOCK, page).expect("inside the file");
    }
    try_all(&image)
}

fn try_all(image: &Image) -> bool {
    let before = image.fingerprint();
    let store = SimStore::from_image(image.clone());
    let segments = InStore(store.clone());
    let file = store.open(&file_name(DISK), Access::Read).expect("it is there");
    let report = check(&file, &segments, None, &CheckOptions { data: true });
    let scrubbed = scrub(&file, &segments, &mut |_, _| Ok(()));
    assert_eq!(report.is_ok(), scrubbed.is_ok());
    let dry = RepairOptions { dry_run: true, ..every_option() };
    let planned = repair(&file, &segments, None, &dry);
    read_everything(Disk::open_read_only(file, &segments, &Options::default()));
    assert_eq!(store.live_image().fingerprint(), before, "a reader wrote");
    let Ok(report) = report else { return false };
    let writable = SimStore::from_image(image.clone());
    use_disk(&writable, &report);
    if planned.is_ok() {
        repair_disk(&SimStore::from_image(image.clone()), &report);
    }
    true
}

fn worst(report: &Report) -> Option<Severity> {
    report.problems.iter().map(|p| p.what.severity()).max()
}

fn read_everything(disk: Result<Disk>) {
    let Ok(disk) = disk else { return };
    let blocks = disk.size().div_ceil(BLOCK);
    let mut first = GuestBlock(0);
    let mut pieces = 0;
    while first.0 < blocks && pieces < 200 {
        let mut next = first.plus(512);
        // A damaged range ends the walk of these blocks, and reading them is an error, not a panic.
        let _ = disk.map().resolve(first, 512.min(blocks - first.0), &mut |piece| {
            pieces += 1;
            let offset = piece.block.offset().0;
            let len = (piece.count * BLOCK).min(disk.size() - offset).min(EXTENT);
            let mut buf = vec![0; usize::try_from(len).expect("an extent at most")];
            let _ = disk.read(0, offset, &mut buf);
            Ok(())
        });
        if disk.map().block(first).is_err() {
            next = first.plus(8192);
        }
        first = next;
    }
}

/// A session of writing, discarding, flushing and closing.
fn use_disk(store: &SimStore, found: &Report) {
    let segments = InStore(store.clone());
    let open = |access| store.open(&file_name(DISK), access).expect("it is there");
    let disk = match Disk::open(open(Access::Write), &segments, &Options::default()) {
        Ok(disk) => disk,
        Err(e) => {
            let allowed = [Kind::TailLost, Kind::ReadOnly, Kind::Unsupported];
            let refused = worst(found) == Some(Severity::NoWrite);
            assert!(refused || allowed.contains(&e.kind()), "{e}: {:?}", found.problems);
            return;
        }
    };
    // An opening does not look into the journal of a disk that was closed in order.
    let unseen = |p: &Problem| p.what == What::JournalLoss && found.stats.attached == "no";
    let seen = found.problems.iter().filter(|p| !unseen(p)).map(|p| p.what.severity());
    assert!(seen.max() < Some(Severity::NoWrite), "it opens: {:?}", found.problems);
    let half = disk.size() / 2 / EXTENT * EXTENT;
    for (offset, len) in [(0, 512), (half, 65536), (half + 4096, 1024), (disk.size() - 512, 512)] {
        if offset + len <= disk.size() {
            let len = usize::try_from(len).expect("small");
            let wrote = disk.write(0, offset, &vec![7; len]);
            assert!(wrote.is_ok() || found.stats.damaged_bytes > 0, "{wrote:?}");
        }
    }
    let discarded = disk.discard(0, half, EXTENT.min(disk.size() - half));
    assert!(discarded.is_ok() || found.stats.damaged_bytes > 0, "{discarded:?}");
    disk.flush().expect("a flush");
    disk.checkpoint().expect("a checkpoint");
    disk.close().expect("a clean close");
    let after = check(&open(Access::Read), &segments, None, &CheckOptions::default());
    let after = after.expect("a used disk can be checked");
    assert!(worst(&after) <= worst(found).max(Some(Severity::Minor)), "{:?}", after.problems);
    assert!(after.stats.damaged_bytes <= found.stats.damaged_bytes);
}

fn every_option() -> RepairOptions {
    RepairOptions {
        leaks: true,
        older_generation: true,
        drop_damaged: true,
        accept_journal_loss: true,
        unshare: true,
        dry_run: false,
    }
}

fn repair_disk(store: &SimStore, found: &Report) {
    let segments = InStore(store.clone());
    let file = store.open(&file_name(DISK), Access::Write).expect("it is there");
    let report = repair(&file, &segments, None, &every_option()).expect("a repair");
    let after = report.after.expect("this was no dry run");
    if found.repairable {
        assert!(after.clean, "{:?} became {:?}", found.problems, after.problems);
    }
    for loss in &report.lost {
        assert!(loss.range.len > 0 && loss.range.offset < found.stats.virtual_size);
    }
}

fn fix_states(pages: &mut Pages, two: bool) {
    let Some(first) = pages.get(&0).copied() else { return };
    let second = pages.get(&SECOND_STATE).copied().filter(|_| two);
    fix_state(pages, first, 0..if second.is_some() { 2 } else { SUPERBLOCK_COPIES });
    if let Some(second) = second {
        fix_state(pages, second, 2..SUPERBLOCK_COPIES);
    }
}

/// Makes the checksums below one superblock right, and writes it to some copies.
fn fix_state(pages: &mut Pages, page: [u8; PAGE], copies: std::ops::Range<usize>) {
    let sealed = seal(page, copies.start);
    let Ok(mut sb) = Superblock::decode(&sealed, copies.start) else {
        for copy in copies {
            pages.insert(SUPERBLOCK_OFFSETS[copy] / BLOCK, seal(page, copy));
        }
        return;
    };
    sb.virtual_size = sb.virtual_size.min(SIZE_MAX);
    if sb.journal_extents > JOURNAL_EXTENTS_MAX {
        sb.journal_extents = JOURNAL_EXTENTS_MAX;
        sb.journal.position %= sb.journal_pages();
    }
    let mut fixed = BTreeSet::new();
    sb.root = fix_node(pages, sb.own_index, sb.root, 3, &mut fixed);
    sb.table = fix_array(pages, sb.table);
    sb.sums = fix_array(pages, sb.sums);
    fix_journal(pages, &sb);
    for copy in copies {
        pages.insert(SUPERBLOCK_OFFSETS[copy] / BLOCK, sb.encode(copy));
    }
}

/// The pointer with the right checksums for what it points at, which is fixed first.
fn fix_node(
    pages: &mut Pages,
    own: SegmentIdx,
    ptr: NodePtr,
    level: u32,
    fixed: &mut BTreeSet<u64>,
) -> NodePtr {
    let NodePtr::Page(at) = ptr else { return ptr };
    if at.segment != own {
        return ptr;
    }
    let page = pages.get(&at.page.0).copied().unwrap_or([0; PAGE]);
    if level > 0
        && fixed.insert(at.page.0)
        && let Ok(mut inner) = decode_inner(&page, crc(&page))
    {
        for child in inner.iter_mut() {
            *child = fix_node(pages, own, *child, level - 1, fixed);
        }
        pages.insert(at.page.0, encode_inner(&inner));
    }
    let page = pages.get(&at.page.0).copied().unwrap_or([0; PAGE]);
    let vectors = at.vectors.map(|run| {
        let bytes: Vec<u8> = (run.page.0..run.page.0 + u64::from(run.count))
            .flat_map(|p| pages.get(&p).copied().unwrap_or([0; PAGE]))
            .collect();
        VectorRef { crc: crc(&bytes), ..run }
    });
    NodePtr::Page(PageRef { crc: crc(&page), vectors, ..at })
}

fn fix_array(pages: &mut Pages, at: ArrayRef) -> ArrayRef {
    if at.bytes > 4 * PAGE as u64 {
        return at;
    }
    let mut content: Vec<u8> = (at.page.0..at.page.0 + at.pages())
        .flat_map(|p| pages.get(&p).copied().unwrap_or([0; PAGE]))
        .collect();
    content.truncate(usize::try_from(at.bytes).expect("small"));
    let (run, fixed) = array::encode(&content, at.page);
    for (number, bytes) in (at.page.0..).zip(run.as_chunks::<PAGE>().0) {
        pages.insert(number, *bytes);
    }
    fixed
}

/// Chains the pages of the journal from the head on, as far as there are any.
fn fix_journal(pages: &mut Pages, sb: &Superblock) {
    let first = ExtentId(HEADER_EXTENTS).first_page().0;
    let mut previous = sb.journal.prev_crc;
    for i in 0..sb.journal_pages() {
        let position = (sb.journal.position + i) % sb.journal_pages();
        let Some(page) = pages.get_mut(&(first + position)) else { return };
        // docs/format.md §7.
        put(page, 0, b"OJNL");
        put(page, 8, sb.segment.as_bytes());
        put(page, 56, &previous.to_le_bytes());
        previous = crc(&page[8..]);
        put(page, 4, &previous.to_le_bytes());
    }
}

fn new_segment(segment: Uuid) -> NewSegment {
    NewSegment {
        store: Uuid::from_u128(1),
        segment,
        disk: segment,
        name: "fuzzed".into(),
        virtual_size: (40 << 20) + 512,
        journal_extents: 1,
        created: 0,
        owner_epoch: OwnerEpoch(1),
        mode: Mode::Persistent,
        base: Uuid::nil(),
    }
}

fn create(store: &SimStore, segment: Uuid, parent: Option<&Parent<'_>>) {
    new_segment(segment).write(store, parent).expect("a segment");
    store.rename(&new_name(segment), &file_name(segment)).expect("renamed");
}

fn open(store: &SimStore, segment: Uuid) -> Disk {
    let file = store.open(&file_name(segment), Access::Write).expect("it is there");
    Disk::open(file, &InStore(store.clone()), &Options::default()).expect("it opens")
}

/// A store with the sealed parent alone.
fn parent() -> &'static Image {
    static PARENT_IMAGE: OnceLock<Image> = OnceLock::new();
    PARENT_IMAGE.get_or_init(|| {
        let store = SimStore::new();
        create(&store, PARENT, None);
        let disk = open(&store, PARENT);
        disk.write(0, 0, &[5; 3 * 65536]).expect("written");
        disk.write(0, 33 << 20, &[6; 8192]).expect("written");
        disk.seal(&mut |_, _| Ok(())).expect("sealed");
        store.live_image()
    })
}

/// A disk in all states of its blocks, with a checkpoint behind it and records in its journal.
fn busy(store: &SimStore) -> Disk {
    let disk = open(store, DISK);
    disk.write(0, 0, &[1; 2 * 65536]).expect("written");
    disk.write(0, 5 * 65536 + 8192, &[2; 4096]).expect("written");
    disk.write(0, 34 << 20, &[3; 512]).expect("written");
    disk.discard(0, 65536, 20480).expect("discarded");
    disk.flush().expect("flushed");
    disk.checkpoint().expect("a checkpoint");
    disk.write(0, 9 * 65536, &[4; 8192]).expect("written");
    disk.flush().expect("flushed");
    disk.discard(0, 0, 65536).expect("discarded");
    disk.flush().expect("flushed");
    disk
}

/// The file of the disk as an input, without its data.
fn encode(store: &SimStore, flags: u8, change: impl Fn(u64, &mut [u8; PAGE])) -> Vec<u8> {
    let file = store.open(&file_name(DISK), Access::Read).expect("it is there");
    let data = data_blocks(store, &file);
    let extents = file.size().expect("a size") / EXTENT;
    let mut bytes = vec![flags];
    bytes.extend(u16::try_from(extents).expect("a small file").to_le_bytes());
    let mut at = 0;
    while let Some((start, end)) = file.next_data(at).expect("known") {
        for number in (start / BLOCK..end.div_ceil(BLOCK)).filter(|n| !data.contains(n)) {
            let copy = SUPERBLOCK_OFFSETS.iter().position(|o| o / BLOCK == number);
            if copy.is_some_and(|c| c != 0 && !(c == 2 && flags & TWO_STATES != 0)) {
                continue;
            }
            let mut page = [0; PAGE];
            file.read_at(number * BLOCK, &mut page).expect("read");
            change(number, &mut page);
            if copy.is_some() && flags & FIX != 0 {
                // The checksum is computed anyway; without it the page is short.
                put(&mut page, PAGE - 4, &[0; 4]);
            }
            let used = trimmed(&page);
            bytes.extend(&u32::try_from(number).expect("a small file").to_le_bytes()[..3]);
            bytes.extend(u16::try_from(used.len()).expect("a page").to_le_bytes());
            bytes.extend(used);
        }
        at = end;
    }
    bytes
}

fn data_blocks(store: &SimStore, file: &Arc<dyn File>) -> BTreeSet<u64> {
    let segments = InStore(store.clone());
    let disk = Disk::open_read_only(Arc::clone(file), &segments, &Options::default());
    let disk = disk.expect("it opens");
    let mut data = BTreeSet::new();
    let note = &mut |piece: blockd::disk::map::Piece| {
        if let BlockState::Data { segment, block } = piece.state
            && segment == disk.map().own()
        {
            data.extend(block.0..block.0 + piece.count);
        }
        Ok(())
    };
    disk.map().resolve(GuestBlock(0), disk.size().div_ceil(BLOCK), note).expect("no damage");
    data
}

fn fresh() -> SimStore {
    let store = SimStore::from_image(parent().clone());
    create(&store, DISK, None);
    store
}

fn child() -> SimStore {
    let store = SimStore::from_image(parent().clone());
    let sealed = InStore(store.clone()).sealed(PARENT).expect("the parent");
    create(&store, DISK, Some(&Parent { disk: PARENT, sealed: &sealed }));
    store
}

/// Disks made by the engine: closed, killed, sealed, over a parent, and some that are damaged.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let as_is = |_: u64, _: &mut [u8; PAGE]| ();
    let killed = fresh();
    drop(busy(&killed));
    let closed = fresh();
    busy(&closed).close().expect("closed");
    let sealed = fresh();
    busy(&sealed).seal(&mut |_, _| Ok(())).expect("sealed");
    let over = child();
    busy(&over).close().expect("closed");
    let first_journal_page = ExtentId(HEADER_EXTENTS).first_page().0;
    let no_journal = move |number: u64, page: &mut [u8; PAGE]| {
        if number == first_journal_page {
            page.fill(0);
        }
    };
    let two = |number: u64, page: &mut [u8; PAGE]| {
        if number == SECOND_STATE {
            // An older generation: offset 16.
            page[16] -= 1;
        }
    };
    let with_tail = |number: u64, page: &mut [u8; PAGE]| {
        if number == 0 {
            let mut sb = Superblock::decode(page, 0).expect("a superblock");
            (sb.attached, sb.boot) = (Attached::WithTail, Uuid::from_u128(4));
            *page = sb.encode(0);
        }
    };
    let broken = |number: u64, page: &mut [u8; PAGE]| {
        if number > PageNo(17 * 16 + 16).0 {
            page[9] ^= 0x40;
        }
    };
    vec![
        ("fresh", encode(&fresh(), FIX, as_is)),
        ("closed", encode(&closed, FIX, as_is)),
        ("killed", encode(&killed, FIX, as_is)),
        ("sealed", encode(&sealed, FIX, as_is)),
        ("over-a-parent", encode(&over, FIX, as_is)),
        ("two-states", encode(&killed, FIX | TWO_STATES, two)),
        ("journal-with-a-hole", encode(&killed, FIX, no_journal)),
        ("without-its-tail", encode(&killed, FIX, with_tail)),
        ("broken-entries", encode(&closed, FIX, broken)),
        ("refused-as-it-is", encode(&closed, 0, |_, page| page[17] ^= 1)),
    ]
}
