//! What every store must do, whatever it is made of. Each implementation runs [`store`] on an empty
//! store, and [`file`] on empty files where it has several kinds.

use std::sync::Arc;

use format::{Kind, Result};

use super::buf::AlignedBuf;
use super::{Access, File, ReadOp, Store, WriteOp, to_usize};

/// Everything. The store must be empty.
pub(super) fn store(store: &dyn Store) {
    names(store);
    bad_names(store);
    handles_outlive_names(store);
    read_only(store);
    file(&*store.create("content").unwrap());
    store.remove("content").unwrap();
    assert_eq!(store.names().unwrap(), [""; 0]);
    let space = store.space().unwrap();
    assert!(space.free <= space.total && space.total > 0);
    assert!(!store.describe().is_empty());
}

/// Everything about content. The file must be empty and writable.
pub(super) fn file(file: &dyn File) {
    ends(file);
    lengths(file);
    holes(file);
    ranges(file);
    batches(file);
    random_operations(file);
}

fn kind<T>(result: Result<T>) -> Option<Kind> {
    result.err().map(|e| {
        assert!(e.object().is_some_and(|object| !object.is_empty()), "{e}");
        assert!(e.to_string().starts_with("cannot "), "{e}");
        e.kind()
    })
}

fn read(file: &dyn File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    file.read_at(offset, &mut bytes).unwrap();
    bytes
}

fn names(store: &dyn Store) {
    assert_eq!(store.names().unwrap(), [""; 0]);
    for name in ["b", "a", "c"] {
        store.create(name).unwrap().write_at(0, name.as_bytes()).unwrap();
    }
    store.sync_names().unwrap();

    assert_eq!(store.names().unwrap(), ["a", "b", "c"]);
    assert_eq!(kind(store.create("a")), Some(Kind::Exists));
    assert_eq!(kind(store.open("d", Access::Read)), Some(Kind::NotFound));
    assert_eq!(kind(store.rename("d", "e")), Some(Kind::NotFound));
    assert_eq!(kind(store.remove("d")), Some(Kind::NotFound));

    store.rename("a", "c").unwrap();
    store.rename("b", "b").unwrap();

    assert_eq!(store.names().unwrap(), ["b", "c"]);
    assert_eq!(read(&*store.open("c", Access::Read).unwrap(), 0, 1), b"a");
    assert_eq!(store.open("c", Access::Read).unwrap().size().unwrap(), 1);
    store.remove("b").unwrap();
    store.remove("c").unwrap();
    store.sync_names().unwrap();
}

fn bad_names(store: &dyn Store) {
    for bad in ["", ".", "..", "a/b", "a\0b", &"x".repeat(256)] {
        assert_eq!(kind(store.create(bad)), Some(Kind::Invalid), "{bad:?}");
        assert_eq!(kind(store.open(bad, Access::Read)), Some(Kind::Invalid), "{bad:?}");
        assert_eq!(kind(store.remove(bad)), Some(Kind::Invalid), "{bad:?}");
        assert_eq!(kind(store.rename(bad, "x")), Some(Kind::Invalid), "{bad:?}");
        let good = store.create("good").unwrap();
        assert_eq!(kind(store.rename("good", bad)), Some(Kind::Invalid), "{bad:?}");
        drop(good);
        store.remove("good").unwrap();
    }
}

fn handles_outlive_names(store: &dyn Store) {
    let first = store.create("a").unwrap();
    first.write_at(0, b"first").unwrap();
    let again = store.open("a", Access::Write).unwrap();
    store.remove("a").unwrap();
    let second = store.create("a").unwrap();
    second.write_at(0, b"second").unwrap();

    again.write_at(1, b"I").unwrap();
    again.sync().unwrap();

    assert_eq!(read(&*first, 0, 5), b"fIrst");
    assert_eq!(read(&*store.open("a", Access::Read).unwrap(), 0, 6), b"second");
    store.remove("a").unwrap();
}

fn read_only(store: &dyn Store) {
    let file = store.create("a").unwrap();
    file.write_at(0, b"x").unwrap();
    let reader = store.open("a", Access::Read).unwrap();

    assert_eq!(kind(reader.write_at(0, b"y")), Some(Kind::ReadOnly));
    let op = WriteOp { offset: 0, buf: b"y" };
    assert_eq!(kind(reader.write_many(&[op, op])), Some(Kind::ReadOnly));
    assert_eq!(kind(reader.set_len(0)), Some(Kind::ReadOnly));
    assert_eq!(kind(reader.punch(0, 1)), Some(Kind::ReadOnly));
    reader.sync().unwrap();

    reader.set_read_only(true).unwrap();

    assert_eq!(kind(store.open("a", Access::Write)), Some(Kind::ReadOnly));
    assert_eq!(read(&*store.open("a", Access::Read).unwrap(), 0, 1), b"x");
    file.write_at(0, b"z").unwrap();
    assert_eq!(read(&*reader, 0, 1), b"z");

    reader.set_read_only(false).unwrap();

    store.open("a", Access::Write).unwrap().write_at(0, b"w").unwrap();
    store.remove("a").unwrap();
}

fn ends(file: &dyn File) {
    file.set_len(0).unwrap();
    file.write_at(0, &[1; 5000]).unwrap();

    assert_eq!(read(file, 4999, 1), [1]);
    file.read_at(5000, &mut []).unwrap();
    file.read_at(1 << 40, &mut []).unwrap();
    file.write_at(6000, &[]).unwrap();
    assert_eq!(file.size().unwrap(), 5000);
    for (offset, len) in [(4999, 2), (5000, 1), (0, 5001), (0, 8192), (4096, 4096), (1 << 40, 7)] {
        let mut buf = AlignedBuf::zeroed(len);
        let e = file.read_at(offset, &mut buf).unwrap_err();
        assert_eq!((e.kind(), e.reason()), (Kind::Corrupt, "the file ends early"));

        let mut whole = AlignedBuf::zeroed(4096);
        let mut ops = [ReadOp { offset: 0, buf: &mut whole }, ReadOp { offset, buf: &mut buf }];
        let e = file.read_many(&mut ops).unwrap_err();
        assert_eq!((e.kind(), e.reason()), (Kind::Corrupt, "the file ends early"));
    }
}

fn lengths(file: &dyn File) {
    file.set_len(0).unwrap();
    // Every combination of an aligned and an odd start and end, growing and not.
    let mut size = 0;
    for (offset, len) in
        [(0, 1), (1, 4095), (512, 4096), (5000, 1), (5001, 3191), (8192, 512), (4000, 9000)]
    {
        file.write_at(offset, &vec![7; len]).unwrap();
        size = size.max(offset + len as u64);
        assert_eq!(file.size().unwrap(), size, "{offset}+{len}");
    }

    file.set_len(4500).unwrap();
    file.set_len(9000).unwrap();

    assert_eq!(file.size().unwrap(), 9000);
    assert_eq!(read(file, 4499, 1), [7]);
    assert_eq!(read(file, 4500, 4500), [0; 4500]);
}

fn holes(file: &dyn File) {
    const LEN: usize = 1 << 20;
    file.set_len(0).unwrap();
    file.write_at(0, &AlignedBuf::from_slice(&[9; LEN])).unwrap();
    file.sync().unwrap();
    let before = file.allocated().unwrap();

    file.punch(4096, LEN as u64 / 2).unwrap();
    file.punch(5, 0).unwrap();
    file.punch(LEN as u64 - 10, 1 << 30).unwrap();
    file.punch(100, 50).unwrap();
    file.sync().unwrap();

    let mut expected = vec![9; LEN];
    expected[4096..4096 + LEN / 2].fill(0);
    expected[LEN - 10..].fill(0);
    expected[100..150].fill(0);
    assert!(read(file, 0, LEN) == expected);
    assert_eq!(file.size().unwrap(), LEN as u64);
    let freed = before - file.allocated().unwrap();
    assert!(freed >= LEN as u64 / 2 - 8192, "{freed} bytes were freed");
    data_ranges(file);
}

/// Everything that is not zero lies in a range of data; the large hole lies in none.
fn data_ranges(file: &dyn File) {
    let size = file.size().unwrap();
    file.set_len(size + (1 << 20)).unwrap();
    let (mut at, mut outside) = (0, Vec::new());
    while let Some((start, end)) = file.next_data(at).unwrap() {
        assert!(at <= start && start < end && end <= size + (1 << 20), "{start}..{end}");
        outside.push((at, start));
        at = end;
    }
    outside.push((at, size));
    for (from, to) in &outside {
        let bytes = read(file, *from, to_usize(to.saturating_sub(*from)));
        assert!(bytes.iter().all(|b| *b == 0), "there is data between {from} and {to}");
    }
    let hole = outside.iter().map(|(from, to)| to.saturating_sub(*from)).max();
    assert!(hole >= Some((1 << 19) - 8192), "the punched range is not known: {outside:?}");
    assert_eq!(file.next_data(size + (1 << 20)).unwrap(), None);
    assert_eq!(kind(file.next_data(u64::MAX)).unwrap_or(Kind::Invalid), Kind::Invalid);
    file.set_len(size).unwrap();
}

fn ranges(file: &dyn File) {
    let size = file.size().unwrap();
    for offset in [u64::MAX, u64::MAX - 4095, i64::MAX as u64, (i64::MAX as u64) - 3] {
        let mut buf = AlignedBuf::zeroed(4096);
        assert_eq!(kind(file.read_at(offset, &mut buf)), Some(Kind::Invalid));
        assert_eq!(kind(file.write_at(offset, &buf)), Some(Kind::Invalid));
        assert_eq!(kind(file.punch(offset, 4096)), Some(Kind::Invalid));
        let op = WriteOp { offset, buf: &buf };
        assert_eq!(kind(file.write_many(&[op, op])), Some(Kind::Invalid));
        let mut two = [ReadOp { offset, buf: &mut buf }, ReadOp { offset: 0, buf: &mut [] }];
        assert_eq!(kind(file.read_many(&mut two)), Some(Kind::Invalid));
    }
    assert_eq!(kind(file.set_len(u64::MAX)), Some(Kind::Invalid));
    assert_eq!(file.size().unwrap(), size);
}

/// More operations than a queue is deep, of all sizes, from aligned and other memory.
fn batches(file: &dyn File) {
    const COUNT: usize = 300;
    const STEP: usize = 12288;
    let len = |i: usize| match i % 5 {
        0 => 4096,
        1 => 0,
        2 => 8192,
        3 => 700 + i,
        _ => STEP,
    };
    file.set_len(0).unwrap();
    file.set_len((COUNT * STEP) as u64).unwrap();
    let mut bytes = AlignedBuf::zeroed(COUNT * STEP);
    for (i, chunk) in bytes.chunks_mut(STEP).enumerate() {
        let fill = u8::try_from(i % 251).unwrap() + 1;
        chunk[..len(i)].fill(fill);
    }

    let ops: Vec<_> = bytes
        .chunks(STEP)
        .enumerate()
        .map(|(i, chunk)| WriteOp { offset: (i * STEP) as u64, buf: &chunk[..len(i)] })
        .collect();
    file.write_many(&ops).unwrap();
    file.write_many(&[]).unwrap();

    assert!(read(file, 0, COUNT * STEP) == bytes[..]);
    let mut back = AlignedBuf::zeroed(COUNT * STEP);
    let mut ops: Vec<_> = back
        .chunks_mut(STEP)
        .enumerate()
        .map(|(i, chunk)| ReadOp { offset: (i * STEP) as u64, buf: &mut chunk[..len(i)] })
        .collect();
    file.read_many(&mut ops).unwrap();
    file.read_many(&mut []).unwrap();
    assert!(back[..] == bytes[..]);
}

fn random_operations(file: &dyn File) {
    const MAX: u64 = 100_000;
    let mut state = 12345_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % below
    };
    file.set_len(0).unwrap();
    let mut model: Vec<u8> = Vec::new();
    for step in 0..400 {
        let align = [1, 1, 512, 4096][to_usize(random(4))];
        let offset = random(MAX) / align * align;
        let len = to_usize(random(20_000) / align * align);
        let range = to_usize(offset)..to_usize(offset) + len;
        match random(8) {
            0 => {
                model.resize(to_usize(offset), 0);
                file.set_len(offset).unwrap();
            }
            1 => {
                let inside = range.start.min(model.len())..range.end.min(model.len());
                model[inside].fill(0);
                file.punch(offset, len as u64).unwrap();
            }
            2 if range.end <= model.len() => {
                let start = to_usize(random(2));
                let mut buf = AlignedBuf::zeroed(len + start);
                file.read_at(offset, &mut buf[start..]).unwrap();
                assert!(buf[start..] == model[range], "step {step}");
            }
            _ => {
                let mut buf = AlignedBuf::zeroed(len);
                buf.fill(u8::try_from(step % 255).unwrap() + 1);
                if len > 0 {
                    model.resize(model.len().max(range.end), 0);
                    model[range].copy_from_slice(&buf);
                }
                file.write_at(offset, &buf).unwrap();
            }
        }
        assert_eq!(file.size().unwrap(), model.len() as u64, "step {step}");
    }
    assert!(read(file, 0, model.len()) == model);
}

/// A batch from several threads at once, each on its own part of one file.
pub(super) fn concurrent(file: &Arc<dyn File>) {
    const PART: usize = 1 << 20;
    file.set_len(0).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..6_u8 {
            scope.spawn(move || {
                let base = u64::from(thread) * PART as u64;
                let mut bytes = AlignedBuf::zeroed(PART);
                for round in 0..4_u8 {
                    bytes.fill(thread * 16 + round + 1);
                    let at = |i: usize| base + (i * 4096) as u64;
                    let pieces = bytes.chunks(4096).enumerate();
                    let ops: Vec<_> =
                        pieces.map(|(i, buf)| WriteOp { offset: at(i), buf }).collect();
                    file.write_many(&ops).unwrap();
                    let mut back = AlignedBuf::zeroed(PART);
                    let pieces = back.chunks_mut(4096).enumerate();
                    let mut ops: Vec<_> =
                        pieces.map(|(i, buf)| ReadOp { offset: at(i), buf }).collect();
                    file.read_many(&mut ops).unwrap();
                    assert!(back[..] == bytes[..], "thread {thread}, round {round}");
                }
            });
        }
    });
}
