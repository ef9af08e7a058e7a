//! Superblock copies, and the choice between them.
//!
//! Input: two superblocks of 456 bytes each (everything before the reserved area), then bytes for
//! the reserved area of the first one. The first fills copies 0 and 1, the second 2 and 3.

use format::Kind;
use format::array::ArrayRef;
use format::limits::{PAGE, SUPERBLOCK_COPIES};
use format::node::{NodePtr, PageRef, VectorRef};
use format::superblock::{
    Attached, Features, JournalHead, MAGIC, Mode, Seal, State, Superblock, VERSION, choose,
};
use format::units::{
    Epoch, ExtentId, Generation, OwnerEpoch, PageNo, SegmentIdx, Seq, check_virtual_size, crc,
};
use uuid::Uuid;

use crate::bytes::{Input, put};

// docs/format.md §3.
const COPY_AT: usize = 12;
const RESERVED_AT: usize = 456;
const CRC_AT: usize = PAGE - 4;
/// A counter that no disk reaches.
const COUNTER: u64 = 1 << 60;

/// Decodes both superblocks as they are and with correct magic, version, place and checksum.
pub fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let mut first = [0; PAGE];
    put(&mut first, 0, input.bytes(RESERVED_AT));
    let mut second = [0; PAGE];
    put(&mut second, 0, input.bytes(RESERVED_AT));
    put(&mut first, RESERVED_AT, input.bytes(CRC_AT - RESERVED_AT));

    for copy in 0..SUPERBLOCK_COPIES {
        check_copy(&first, copy);
    }
    let pages = std::array::from_fn(|copy| seal(if copy < 2 { first } else { second }, copy));
    let accepted = pages.iter().enumerate().filter(|(copy, page)| check_copy(page, *copy)).count();
    check_choice(&pages);
    accepted > 0
}

/// The page with everything right that is checked before its fields are looked at.
pub fn seal(mut page: [u8; PAGE], copy: usize) -> [u8; PAGE] {
    let copy = u32::try_from(copy).expect("below four");
    put(&mut page, 0, &MAGIC);
    put(&mut page, MAGIC.len(), &VERSION.to_le_bytes());
    put(&mut page, COPY_AT, &copy.to_le_bytes());
    let sum = crc(&page[..CRC_AT]);
    put(&mut page, CRC_AT, &sum.to_le_bytes());
    page
}

fn check_copy(page: &[u8; PAGE], copy: usize) -> bool {
    let Ok(sb) = Superblock::decode(page, copy) else { return false };
    assert_eq!(Superblock::decode(&sb.encode(copy), copy).unwrap(), sb);
    assert!(check_virtual_size(sb.virtual_size).is_ok());
    assert!(sb.journal.position < sb.journal_pages());
    assert!(sb.journal_offset(sb.journal_pages()) == sb.data_start().file_offset());
    assert!(sb.data_start() <= sb.extents_end);
    for array in [sb.table, sb.sums] {
        assert!(array.is_empty() == (array.pages() == 0));
    }
    // What every opening and every flip does must not run over, however large the counters are.
    let counted = [sb.generation.next().0, sb.epoch.next().0, sb.journal.seq.plus(1 << 32).0];
    assert!(counted.into_iter().all(|n| n > 0));
    assert!(sb.journal.epoch <= sb.epoch);
    // Whatever the answer, it must be one.
    let _ = sb.check_writable_features();
    true
}

fn check_choice(pages: &[[u8; PAGE]; SUPERBLOCK_COPIES]) {
    let valid = (0..SUPERBLOCK_COPIES).filter_map(|c| Superblock::decode(&pages[c], c).ok());
    let newest = valid.map(|sb| sb.generation).max();
    let newer = |c| Superblock::decode(&pages[c], c).is_err_and(|e| e.kind() == Kind::Unsupported);
    if (0..SUPERBLOCK_COPIES).any(newer) {
        // A state that this build cannot read is newer than any that it can.
        assert_eq!(choose(pages).err().map(|e| e.kind()), Some(Kind::Unsupported));
        return;
    }
    match (choose(pages), newest) {
        (Ok(chosen), Some(generation)) => {
            assert_eq!(chosen.superblock.generation, generation);
            assert!(chosen.complaints.iter().any(Option::is_none));
        }
        (Err(_), None) => {}
        (outcome, newest) => panic!("chose {outcome:?}, the newest is {newest:?}"),
    }
}

/// An open disk without data.
pub fn sample() -> Superblock {
    Superblock {
        features: Features::default(),
        generation: Generation(7),
        store: Uuid::from_u128(1),
        segment: Uuid::from_u128(2),
        disk: Uuid::from_u128(3),
        parent_disk: Uuid::nil(),
        owner_epoch: OwnerEpoch(1),
        virtual_size: 10 << 30,
        state: State::Active,
        mode: Mode::Persistent,
        seal: Seal::None,
        own_index: SegmentIdx::new(0).expect("in range"),
        journal_extents: 4,
        journal: JournalHead { epoch: Epoch(1), position: 3, seq: Seq(900), prev_crc: 5 },
        epoch: Epoch(1),
        attached: Attached::WithTail,
        boot: Uuid::from_u128(4),
        root: NodePtr::Hole,
        table: ArrayRef::default(),
        sums: ArrayRef::default(),
        extents_end: ExtentId(40),
        digest: [0; 32],
        created: 1_700_000_000,
        name: "vm1".into(),
        successor: Uuid::nil(),
        base: Uuid::nil(),
    }
}

fn sealed_child() -> Superblock {
    let segment = SegmentIdx::new(1).expect("in range");
    let vectors = Some(VectorRef { page: PageNo(352), count: 3, crc: 8 });
    Superblock {
        generation: Generation(8),
        parent_disk: Uuid::from_u128(9),
        state: State::Sealed,
        successor: Uuid::from_u128(10),
        seal: Seal::Done,
        own_index: segment,
        attached: Attached::No,
        root: NodePtr::Page(PageRef {
            segment,
            page: PageNo(340),
            crc: 77,
            generation: Generation(6),
            vectors,
        }),
        table: ArrayRef { page: PageNo(400), bytes: 128, crc: 1 },
        sums: ArrayRef { page: PageNo(416), bytes: 9000, crc: 2 },
        digest: [0xd1; 32],
        name: "vm1.child-2@x".into(),
        ..sample()
    }
}

/// A fresh disk, a sealed child, both in one file, and sizes at the limits.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let pair = |a: &Superblock, b: &Superblock| {
        [a, b].map(|sb| sb.encode(0)[..RESERVED_AT].to_vec()).concat()
    };
    let smallest = Superblock { virtual_size: 1 << 20, name: String::new(), ..sample() };
    let largest = Superblock {
        virtual_size: 64 << 40,
        generation: Generation(COUNTER),
        journal_extents: 16384,
        journal: JournalHead {
            epoch: Epoch(COUNTER),
            position: 16384 * 16 - 1,
            seq: Seq(COUNTER),
            prev_crc: u32::MAX,
        },
        epoch: Epoch(COUNTER),
        extents_end: ExtentId(1 << 40),
        name: "n".repeat(128),
        ..sealed_child()
    };
    let overflowing = Superblock { generation: Generation(u64::MAX), ..sample() };
    let read_only = Superblock {
        features: Features { read_only_compat: 1, compat: 6, ..Features::default() },
        seal: Seal::Pending,
        ..sealed_child()
    };
    vec![
        ("fresh-then-sealed", pair(&sample(), &sealed_child())),
        ("smallest-then-largest", pair(&smallest, &largest)),
        ("refused-overflowing", pair(&overflowing, &overflowing)),
        ("read-only-twice", pair(&read_only, &read_only)),
    ]
}
