//! Map pages: leaves with their block vectors, and inner pages.
//!
//! Input: a byte (even: leaf, odd: inner page), a byte with the number of block vectors, the
//! vectors (128 bytes each), then the page. Checksums are computed: every input gets past them.

use format::entry::{BlockState, Entry, Vector};
use format::limits::{INNER_FANOUT, LEAF_ENTRIES, PAGE, VECTOR_BYTES};
use format::node::{Leaf, NodePtr, PageRef, VectorRef, decode_inner, encode_inner, encode_leaf};
use format::units::{ExtentId, Generation, PageNo, SegmentIdx, crc};

use crate::bytes::{Input, put, trimmed};

const LEAF: u8 = 0;
const INNER: u8 = 1;

/// Decodes the page, with correct checksums and with wrong ones.
pub fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let kind = input.byte() % 2;
    let count = usize::from(input.byte());
    let mut vectors = input.bytes(count * VECTOR_BYTES).to_vec();
    vectors.resize(vectors.len().next_multiple_of(PAGE), 0);
    let mut page = [0; PAGE];
    put(&mut page, 0, input.bytes(PAGE));

    if kind == LEAF { check_leaf(&page, &vectors) } else { check_inner(&page) }
}

fn check_inner(page: &[u8; PAGE]) -> bool {
    assert!(decode_inner(page, !crc(page)).is_err());
    let Ok(inner) = decode_inner(page, crc(page)) else { return false };
    assert_eq!(encode_inner(&inner), *page);
    true
}

fn pointer(page: &[u8; PAGE], vectors: &[u8]) -> PageRef {
    let run = (!vectors.is_empty()).then(|| VectorRef {
        page: PageNo(160),
        count: u8::try_from(vectors.len() / PAGE).expect("255 vectors are 8 pages"),
        crc: crc(vectors),
    });
    PageRef {
        segment: SegmentIdx::new(5).expect("in range"),
        page: PageNo(176),
        crc: crc(page),
        generation: Generation(9),
        vectors: run,
    }
}

fn check_leaf(page: &[u8; PAGE], vectors: &[u8]) -> bool {
    let at = pointer(page, vectors);
    let wrong = PageRef { crc: !at.crc, ..at };
    assert!(Leaf::decode(&wrong, page, vectors).is_err());
    let entries = Leaf::decode_entries(&at, page);
    let Ok(leaf) = Leaf::decode(&at, page, vectors) else { return false };
    assert_eq!(entries.expect("a good leaf has good entries").entries, leaf.entries);

    let again = encode_leaf(|i| leaf.entries[i], |i| vector(&leaf, i));
    let run = (!again.vectors.is_empty()).then_some(PageNo(160));
    let at_again = again.pointer(at.segment, at.page, run, at.generation);
    let leaf_again = Leaf::decode(&at_again, &again.page, &again.vectors)
        .expect("what was just encoded is accepted");
    for extent in 0..LEAF_ENTRIES {
        assert_eq!(vector(&leaf, extent), vector(&leaf_again, extent));
    }
    true
}

fn vector(leaf: &Leaf, extent: usize) -> Vector {
    std::array::from_fn(|block| leaf.block(extent, block))
}

fn leaf_seed(mixed: usize) -> Vec<u8> {
    let segment = SegmentIdx::new(5).expect("in range");
    let entry = |i: usize| match i {
        _ if i < mixed => Entry::Mixed { slot: 0 },
        _ if i > 2 * mixed + 8 => Entry::Hole,
        _ if i.is_multiple_of(3) => Entry::Zero,
        _ => Entry::Uniform { segment, extent: ExtentId(i as u64 + 300) },
    };
    let vector = |i: usize| {
        std::array::from_fn(|b| match b % 3 {
            0 => BlockState::Zero,
            1 => BlockState::Hole,
            _ => BlockState::Data { segment, block: ExtentId(i as u64 + 900).block(b) },
        })
    };
    let bytes = encode_leaf(entry, vector);
    let used = mixed * VECTOR_BYTES;
    let mut input = vec![LEAF, u8::try_from(mixed).expect("few vectors")];
    input.extend(&bytes.vectors[..used]);
    input.extend(trimmed(bytes.page.as_slice()));
    input
}

fn slot_used_twice() -> Vec<u8> {
    let mixed = Entry::Mixed { slot: 0 }.to_word().to_le_bytes();
    [&[LEAF, 1], [0; VECTOR_BYTES].as_slice(), &mixed, &mixed].concat()
}

/// Leaves with no, one and many mixed extents; inner pages, empty and with all kinds of pointers.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let segment = SegmentIdx::new(2).expect("in range");
    let plain =
        PageRef { segment, page: PageNo(260), crc: 1, generation: Generation(3), vectors: None };
    let vectors = Some(VectorRef { page: PageNo(272), count: 16, crc: 4 });
    let mut inner = [NodePtr::Hole; INNER_FANOUT];
    inner[0] = NodePtr::Page(plain);
    inner[1] = NodePtr::Page(PageRef { vectors, ..plain });
    inner[2] = NodePtr::Zero;
    let page = encode_inner(&inner);
    let inner = [&[INNER, 0], trimmed(&page)].concat();
    vec![
        ("refused-leaf-slot-used-twice", slot_used_twice()),
        ("leaf-of-holes", vec![LEAF, 0]),
        ("leaf-uniform", leaf_seed(0)),
        ("leaf-one-mixed", leaf_seed(1)),
        ("leaf-two-vector-pages", leaf_seed(33)),
        ("inner-empty", vec![INNER, 0]),
        ("inner", inner),
    ]
}
