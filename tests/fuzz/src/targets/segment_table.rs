//! Segment tables, and the checksummed array that holds them.
//!
//! Input: a reference (first page 8, bytes 8, checksum 4 bytes), a byte of options, then content.
//! The reference is tried against the file that holds the content, as it is and corrected. Readers
//! look at the size of the file before they follow a reference; so does this target.

use format::array::{ArrayRef, encode, pages_for, read_all};
use format::limits::PAGE;
use format::table::{ROW_BYTES, Row, SegmentTable};
use format::units::{ExtentId, PageNo, index};
use format::{Error, Result};
use uuid::Uuid;

use crate::bytes::Input;

/// More content only costs time: the third level, past 4 MiB, works like the second.
const CONTENT_MAX: usize = 40 * PAGE;

/// Reads the array through the reference, and the content as a table.
pub fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let (page, bytes, crc) = (PageNo(input.u64()), input.u64(), input.u32());
    // A few bytes stand for much content: checksum pages are made for more than a page of it.
    let repeat = 1 << (input.byte() % 16);
    let unit = input.bytes(data.len());
    let content = unit.repeat(repeat.min(CONTENT_MAX / unit.len().max(1)).max(1));

    check_array(&content);
    check_reference(ArrayRef { page, bytes, crc }, &content);
    check_table(unit)
}

fn check_table(bytes: &[u8]) -> bool {
    let Ok(table) = SegmentTable::decode(bytes) else { return false };
    assert_eq!(SegmentTable::decode(&table.encode()).unwrap(), table);
    assert_eq!(table.len(), bytes.len() / ROW_BYTES);
    for (index, row) in table.iter() {
        assert_eq!(table.row(index).unwrap(), row);
    }
    true
}

/// Reads from a file whose pages from number 100 on are `run`.
fn reader(run: &[u8]) -> impl FnMut(PageNo, &mut [u8]) -> Result<()> + '_ {
    |page, buffer| {
        let from = page.0.checked_sub(100).map(|p| index(p) * PAGE);
        let bytes = from.and_then(|from| run.get(from..)?.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or_else(|| Error::corrupt("past the end"))?);
        Ok(())
    }
}

fn check_array(content: &[u8]) {
    let (run, at) = encode(content, PageNo(100));
    assert_eq!(run.len(), index(at.pages()) * PAGE);
    assert_eq!(at.pages(), pages_for(content.len() as u64));
    assert_eq!(ArrayRef::decode(&at.encode()).unwrap(), at);
    assert_eq!(read_all(at, &mut reader(&run)).unwrap(), content);
}

fn check_reference(hostile: ArrayRef, content: &[u8]) {
    let (run, at) = encode(content, PageNo(100));
    let Ok(hostile) = ArrayRef::decode(&hostile.encode()) else { return };
    assert_eq!(hostile.is_empty(), hostile.pages() == 0);
    if hostile.pages() > at.pages() {
        return;
    }
    if let Ok(read) = read_all(hostile, &mut reader(&run)) {
        assert_eq!(read.len() as u64, hostile.bytes);
    }
    let _ = read_all(ArrayRef { page: at.page, crc: at.crc, ..hostile }, &mut reader(&run));
}

fn input(at: &ArrayRef, repeat: u8, unit: &[u8]) -> Vec<u8> {
    let mut input = Vec::new();
    input.extend(at.page.0.to_le_bytes());
    input.extend(at.bytes.to_le_bytes());
    input.extend(at.crc.to_le_bytes());
    input.push(repeat);
    input.extend(unit);
    input
}

/// Tables with no, one and many rows, an array with a checksum page, and references that
/// point past everything.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let row = |n: u64| Row {
        segment: Uuid::from_u128(n.into()),
        digest: n.is_multiple_of(2).then_some([0xd1; 32]),
        base: ExtentId(n),
    };
    let table = |rows: u64| {
        let mut table = SegmentTable::default();
        for n in 1..=rows {
            table.add(row(n)).expect("few rows");
        }
        // The first of several is unused.
        table.retain(|i| rows == 1 || i.get() > 0);
        table.encode()
    };
    let seed = |repeat: u8, unit: &[u8]| {
        let (_, at) = encode(&unit.repeat(1 << repeat), PageNo(100));
        input(&at, repeat, unit)
    };
    let beyond = ArrayRef { page: PageNo((1 << 44) - 1), bytes: (1 << 56) - 1, crc: 0 };
    vec![
        ("no-rows", seed(0, &[])),
        ("one-row", seed(0, &table(1))),
        ("rows", seed(0, &table(5))),
        ("checksum-page", seed(9, &table(3))),
        ("refused-odd-length", seed(0, &table(2)[..100])),
        ("beyond-the-file", input(&beyond, 0, &table(2))),
    ]
}
