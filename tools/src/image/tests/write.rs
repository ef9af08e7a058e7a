//! Sinks write what `qemu-img` accepts, and leave nothing half done.

use super::*;

const SIZE: u64 = 40 * MIB + 512;

/// Writes a pattern from three threads: every third MiB data, with zeroes over a part of it.
fn fill(sink: &dyn Sink) {
    std::thread::scope(|threads| {
        for first in 0..3 {
            threads.spawn(move || {
                for at in (first * MIB..SIZE).step_by(3 << 20) {
                    let len = (MIB - 700).min(SIZE - at);
                    if first == 1 {
                        sink.write_zeroes(at, len).unwrap();
                        continue;
                    }
                    sink.write_at(at, &noise(at, len)).unwrap();
                    if len > 500 * KIB {
                        sink.write_zeroes(at + 100 * KIB + 5, 300 * KIB).unwrap();
                    }
                }
            });
        }
    });
    sink.write_zeroes(SIZE, 0).unwrap();
}

/// The same pattern, in memory.
fn filled() -> Vec<u8> {
    let mut want = vec![0; usize::try_from(SIZE).unwrap()];
    for first in [0, 2] {
        for at in (first * MIB..SIZE).step_by(3 << 20) {
            let len = (MIB - 700).min(SIZE - at);
            let start = usize::try_from(at).unwrap();
            want[start..][..usize::try_from(len).unwrap()].copy_from_slice(&noise(at, len));
            if len > 500 * KIB {
                want[start + (100 << 10) + 5..][..300 << 10].fill(0);
            }
        }
    }
    want
}

fn names(b: &Bench) -> Vec<String> {
    let entries = std::fs::read_dir(&b.dir).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn sinks_write_images_that_qemu_finds_equal_and_clean() {
    let Some(b) = bench() else { return };
    std::fs::write(b.path("want.raw"), filled()).unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let name = format!("out.{format}");
        let sink = create_sink(&b.path(&name), format, SIZE, false).unwrap();
        fill(sink.as_ref());
        assert!(!b.path(&name).exists());
        sink.finish().unwrap();
        b.img(&format!("compare -q -f raw -F {format} want.raw {name}"));
        b.verify(&name, format);
    }
    b.img("check -q -f qcow2 out.qcow2");
    let info = run(Command::new("qemu-img").arg("info").arg(b.path("out.qcow2")));
    assert!(info.contains("cluster_size: 65536") && info.contains("compat: 1.1"), "{info}");
    let mut left = names(&b);
    left.retain(|name| name.contains("partial"));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn sinks_store_nothing_for_zeroes() {
    use std::os::unix::fs::MetadataExt as _;
    let Some(b) = bench() else { return };
    for format in [Format::Raw, Format::Qcow2] {
        let path = b.path("out");
        let size = 50 << 30;
        let sink = create_sink(&path, format, size, true).unwrap();
        sink.write_at(7 * MIB, &noise(0, MIB)).unwrap();
        sink.write_zeroes(0, size).unwrap();
        sink.write_at(3 * MIB, &noise(1, MIB)).unwrap();
        sink.finish().unwrap();
        let stored = path.metadata().unwrap().blocks() * 512;
        assert!(stored < 4 * MIB, "{format}: {stored}");
        let source = open_source(&path, Some(format)).unwrap();
        assert_eq!(source.size(), size);
        let data: u64 =
            walk(source.as_ref()).iter().filter(|r| r.1 == RunKind::Data).map(|r| r.0).sum();
        assert_eq!(data, MIB);
    }
}

#[test]
fn sink_that_is_dropped_leaves_nothing() {
    let Some(b) = bench() else { return };
    for format in [Format::Raw, Format::Qcow2] {
        let sink = create_sink(&b.path("out"), format, SIZE, false).unwrap();
        sink.write_at(0, &noise(0, MIB)).unwrap();
        assert_eq!(names(&b).len(), 1);
        drop(sink);
        assert!(names(&b).is_empty(), "{:?}", names(&b));
    }
}

#[test]
fn sink_does_not_replace_a_file_unless_told_so() {
    let Some(b) = bench() else { return };
    let path = b.path("out");
    for format in [Format::Raw, Format::Qcow2] {
        std::fs::write(&path, b"mine").unwrap();
        let e = create_sink(&path, format, SIZE, false).err().unwrap();
        assert_error(&e, Kind::Exists, "out");

        // The name is taken only while the image is written.
        std::fs::remove_file(&path).unwrap();
        let sink = create_sink(&path, format, SIZE, false).unwrap();
        std::fs::write(&path, b"mine").unwrap();
        assert_error(&sink.finish().unwrap_err(), Kind::Exists, "out");
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        assert_eq!(names(&b).len(), 1);

        let sink = create_sink(&path, format, SIZE, true).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        sink.finish().unwrap();
        assert_eq!(open_source(&path, Some(format)).unwrap().size(), SIZE);
    }
}

#[test]
fn sink_refuses_what_makes_no_sense() {
    let Some(b) = bench() else { return };
    let create =
        |name: &str, format, size| create_sink(&b.path(name), format, size, true).err().unwrap();
    assert_error(&create("out", Format::Raw, 0), Kind::Invalid, "size is 0");
    assert_error(&create("out", Format::Qcow2, 513), Kind::Invalid, "multiple of 512");
    assert_error(&create("out", Format::Vhdx, SIZE), Kind::Unsupported, "vhdx");
    assert_error(&create("out", Format::Vmdk, SIZE), Kind::Unsupported, "vmdk");
    assert_error(&create("none/out", Format::Raw, SIZE), Kind::NotFound, "none");
    assert_error(&create("", Format::Raw, SIZE), Kind::Invalid, "regular file");
    for format in [Format::Raw, Format::Qcow2] {
        let sink = create_sink(&b.path("out"), format, SIZE, false).unwrap();
        assert_error(&sink.write_at(SIZE - 1, &[1, 2]).unwrap_err(), Kind::Invalid, "pass its end");
        assert_error(&sink.write_zeroes(u64::MAX, 2).unwrap_err(), Kind::Invalid, "pass its end");
    }
    assert!(names(&b).is_empty());
}
