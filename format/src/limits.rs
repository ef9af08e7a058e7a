//! Every fixed number of the format in one place, with the arithmetic that ties them together.
//!
//! The assertions at the end are the invariants; the document is `docs/format.md`, section 2.

/// Bytes of a sector: the granularity of virtual sizes and of guest requests.
pub const SECTOR: u64 = 512;
/// Bytes of a block: the granularity of the map and of copy-on-write.
pub const BLOCK: u64 = 4096;
/// Bytes of an extent: the granularity of space in a segment file.
pub const EXTENT: u64 = 64 * 1024;
/// Bytes of a metadata page.
pub const PAGE: usize = 4096;
/// Blocks per extent, and pages per extent.
pub const BLOCKS_PER_EXTENT: u64 = EXTENT / BLOCK;
/// The same as a length in memory.
pub const EXTENT_BLOCKS: usize = 16;

/// Entries of a leaf page; each entry maps one extent of the virtual disk.
pub const LEAF_ENTRIES: usize = 512;
/// Bytes of virtual disk under one leaf: 32 MiB.
pub const LEAF_SPAN: u64 = LEAF_ENTRIES as u64 * EXTENT;
/// Pointers in an inner page.
pub const INNER_FANOUT: usize = 128;
/// Inner levels above the leaves: 4 GiB, 512 GiB and 64 TiB per page.
pub const INNER_LEVELS: usize = 3;
/// Bytes of a block vector: one 8-byte entry for each block of a mixed extent.
pub const VECTOR_BYTES: usize = EXTENT_BLOCKS * 8;
/// Block vectors in a vector page.
pub const VECTORS_PER_PAGE: usize = PAGE / VECTOR_BYTES;
/// Pages of the longest vector run of a leaf (every extent mixed).
pub const VECTOR_PAGES_MAX: usize = LEAF_ENTRIES / VECTORS_PER_PAGE;

/// Smallest virtual disk: 1 MiB.
pub const VIRTUAL_SIZE_MIN: u64 = 1 << 20;
/// Largest virtual disk: 64 TiB.
pub const VIRTUAL_SIZE_MAX: u64 = 64 << 40;
/// Leaves of the largest disk.
pub const LEAVES_MAX: u64 = VIRTUAL_SIZE_MAX / LEAF_SPAN;

/// Superblock copies.
pub const SUPERBLOCK_COPIES: usize = 4;
/// Byte offsets of the superblock copies: spread, so that one bad region costs one copy.
pub const SUPERBLOCK_OFFSETS: [u64; SUPERBLOCK_COPIES] = [0, 256 << 10, 512 << 10, 768 << 10];
/// Extents before the journal; they hold the superblock copies and nothing else.
pub const HEADER_EXTENTS: u64 = 16;
/// Smallest journal: one extent, 16 pages (used by tests; flushes wait often).
pub const JOURNAL_EXTENTS_MIN: u64 = 1;
/// Default journal: 16 MiB.
pub const JOURNAL_EXTENTS_DEFAULT: u64 = 256;
/// Largest journal: 1 GiB.
pub const JOURNAL_EXTENTS_MAX: u64 = 16384;

/// Rows of a segment table: what fourteen bits can name, less room for growth.
pub const SEGMENTS_MAX: usize = 16_000;
/// Extents of one segment file: forty bits.
pub const SEGMENT_EXTENTS_MAX: u64 = 1 << 40;
/// Longest disk name, in bytes.
pub const NAME_MAX: usize = 128;

const _: () = {
    assert!(usize::BITS == 64);
    assert!(PAGE as u64 == BLOCK);
    assert!(EXTENT_BLOCKS as u64 == BLOCKS_PER_EXTENT && INNER_LEVELS == 3);
    assert!(LEAF_ENTRIES * 8 == PAGE);
    assert!(VECTOR_PAGES_MAX as u64 <= BLOCKS_PER_EXTENT, "a vector run fits in one extent");
    assert!((INNER_FANOUT as u64).pow(3) == LEAVES_MAX);
    assert!(SEGMENTS_MAX < 1 << 14);
    assert!(SUPERBLOCK_OFFSETS[3] + BLOCK <= HEADER_EXTENTS * EXTENT);
};
