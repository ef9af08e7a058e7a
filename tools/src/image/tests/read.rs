//! Sources show what `qemu-img` shows.

use std::time::{Duration, Instant};

use super::*;

#[test]
fn qcow2_chain_with_zeroes_and_discards_reads_as_in_qemu() {
    let Some(b) = bench() else { return };
    for (compat, cluster) in [("1.1", 65536), ("1.1", 512), ("1.1", 2 << 20), ("0.10", 65536)] {
        b.raw("base.raw", 20 * MIB + 512);
        let options = format!("compat={compat},cluster_size={cluster}");
        b.img(&format!("create -q -f qcow2 -o {options} -b base.raw -F raw mid.qcow2"));
        // Longer than its backing file.
        b.img(&format!("create -q -f qcow2 -o {options} -b mid.qcow2 -F qcow2 top.qcow2 33M"));
        b.io("mid.qcow2", &["write -P 7 1M 3M", "write -P 8 4608 512", "write -P 9 19M 1M"]);
        b.io("top.qcow2", &["write -P 5 2M 1M", "write -P 6 25M 70k", "write -P 3 33553920 512"]);
        if compat == "1.1" {
            b.io("mid.qcow2", &["write -z 6M 2M", "discard 9M 1M"]);
            b.io("top.qcow2", &["write -z 2560k 2M", "write -z 30M 1M"]);
        }
        b.verify("mid.qcow2", Format::Qcow2);
        if compat == "0.10" {
            // Version 2 does not say what its backing files are; the advice is to upgrade it.
            let e = refused(&b.path("top.qcow2"));
            assert!(e.next_step().unwrap().contains("amend -o compat=1.1"), "{e}");
            b.img("amend -q -o compat=1.1 top.qcow2");
        }
        b.verify("top.qcow2", Format::Qcow2);
    }
}

#[test]
fn qcow2_status_tells_holes_from_zeroes() {
    let Some(b) = bench() else { return };
    b.img("create -q -f qcow2 a.qcow2 8M");
    b.io("a.qcow2", &["write -P 1 1M 1M", "write -z 4M 1M", "write -P 1 5M 1M"]);
    let source = b.verify("a.qcow2", Format::Qcow2);
    use RunKind::{Data, Hole, Zero};
    let want = [(MIB, Hole), (MIB, Data), (2 * MIB, Hole), (MIB, Zero), (MIB, Data)];
    assert_eq!(walk(source.as_ref())[..5], want);
    assert_eq!(source.status(MIB + 5, 9).unwrap(), Run { len: 9, kind: Data });
    assert_eq!(source.status(MIB + 5, MIB).unwrap(), Run { len: MIB - 5, kind: Data });
}

#[test]
fn qcow2_hole_in_a_raw_backing_file_is_a_hole() {
    let Some(b) = bench() else { return };
    b.raw("base.raw", 30 * MIB);
    b.img("create -q -f qcow2 -b base.raw -F raw a.qcow2");
    let source = b.verify("a.qcow2", Format::Qcow2);
    let stored: u64 =
        walk(source.as_ref()).iter().filter(|r| r.1 == RunKind::Data).map(|r| r.0).sum();
    assert!(stored < 5 * MIB, "{stored}");
}

#[test]
fn qcow2_compressed_reads_as_in_qemu() {
    let Some(b) = bench() else { return };
    b.raw("a.raw", 13 * MIB);
    // A part that compresses, beside the parts that do not.
    b.io("a.raw", &["write -P 65 7M 1M"]);
    b.img("convert -q -c -f raw -O qcow2 a.raw a.qcow2");
    b.verify("a.qcow2", Format::Qcow2);
    b.img("create -q -f qcow2 -b a.qcow2 -F qcow2 top.qcow2");
    b.io("top.qcow2", &["write -P 7 7M 9k"]);
    b.verify("top.qcow2", Format::Qcow2);
}

#[test]
fn qcow2_with_its_data_in_another_file_reads_as_in_qemu() {
    let Some(b) = bench() else { return };
    b.img("create -q -f qcow2 -o data_file=a.data,data_file_raw=off a.qcow2 8M");
    b.io("a.qcow2", &["write -P 1 1M 1M", "write -P 2 5M 1M"]);
    b.verify("a.qcow2", Format::Qcow2);
}

#[test]
fn qcow2_backing_file_without_a_recorded_format_is_told_by_its_mark() {
    let Some(b) = bench() else { return };
    b.raw("base.raw", 4 * MIB);
    b.img("convert -f raw -O qcow2 base.raw base.qcow2");
    for base in ["base.qcow2", "base.raw"] {
        let format = base.rsplit('.').next().unwrap();
        b.img(&format!("create -q -f qcow2 -b {base} -F {format} a.qcow2"));
        forget_backing_format(&b.path("a.qcow2"), format);
        b.verify("a.qcow2", Format::Qcow2);
    }
}

#[test]
fn vmdk_of_every_readable_kind_reads_as_in_qemu() {
    let Some(b) = bench() else { return };
    b.raw("a.raw", 70 * MIB);
    b.io("a.raw", &["write -P 65 7M 1M", "write -P 66 41M 3k"]);
    for kind in ["monolithicSparse", "streamOptimized", "monolithicFlat", "twoGbMaxExtentFlat"] {
        let image = format!("{kind}.vmdk");
        b.img(&format!("convert -f raw -O vmdk -o subformat={kind} a.raw {image}"));
        let source = b.verify(&image, Format::Vmdk);
        let stored: u64 =
            walk(source.as_ref()).iter().filter(|r| r.1 == RunKind::Data).map(|r| r.0).sum();
        assert!(stored < 14 * MIB, "{kind}: {stored}");
    }
}

#[test]
fn vmdk_status_is_right_when_asked_twice_and_between_reads() {
    let Some(b) = bench() else { return };
    b.raw("a.raw", 8 * MIB);
    for kind in ["monolithicSparse", "streamOptimized"] {
        b.img(&format!("convert -f raw -O vmdk -o subformat={kind} a.raw a.vmdk"));
        let source = open_source(&b.path("a.vmdk"), None).unwrap();
        for _ in 0..3 {
            // Data is never called a hole because some cache has it already.
            assert_eq!(source.status(600, 512).unwrap(), Run { len: 512, kind: RunKind::Data });
            assert_eq!(source.status(2 * MIB, 512).unwrap().kind, RunKind::Hole);
            source.read_at(0, &mut [0; 4096]).unwrap();
        }
    }
}

#[test]
fn vhdx_reads_as_in_qemu() {
    let Some(b) = bench() else { return };
    b.raw("a.raw", 70 * MIB);
    for options in ["subformat=dynamic", "subformat=dynamic,block_size=1M", "subformat=fixed"] {
        b.img(&format!("convert -f raw -O vhdx -o {options} a.raw a.vhdx"));
        b.verify("a.vhdx", Format::Vhdx);
    }
    b.img("create -q -f vhdx -o block_size=1M b.vhdx 64M");
    b.io("b.vhdx", &["write -P 1 10M 1M", "write -P 1 40M 1M"]);
    let source = b.verify("b.vhdx", Format::Vhdx);
    use RunKind::{Data, Hole};
    let want = [(10 * MIB, Hole), (MIB, Data), (29 * MIB, Hole), (MIB, Data), (23 * MIB, Hole)];
    assert_eq!(walk(source.as_ref()), want);
}

/// Puts an entry into the log of a VHDX image that nobody has replayed.
fn leave_log_dirty(path: &Path) {
    use img_vhdx::header::{HEADER_SIZE, HEADER1_OFFSET, HEADER2_OFFSET, compute_crc};
    let (guid, file) = ([7; 16], File::options().read(true).write(true).open(path).unwrap());
    let size = file.metadata().unwrap().len();
    for slot in [HEADER1_OFFSET, HEADER2_OFFSET] {
        let mut header = vec![0; HEADER_SIZE];
        file.read_exact_at(&mut header, slot).unwrap();
        header[48..64].copy_from_slice(&guid);
        let crc = compute_crc(&header).unwrap();
        header[4..8].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&header, slot).unwrap();
        let log = u64::from_le_bytes(header[72..80].try_into().unwrap());
        // What is there already: the entry only has to be valid.
        let mut write = img_vhdx::log::PendingWrite { file_offset: 0, sector: vec![0; 4096] };
        file.read_exact_at(&mut write.sector, write.file_offset).unwrap();
        let entry = img_vhdx::log::encode_entry(1, 0, &guid, size, size, &[write]);
        file.write_all_at(&entry, log).unwrap();
    }
}

#[test]
fn vhdx_log_is_not_replayed_into_the_source() {
    let Some(b) = bench() else { return };
    b.img("create -q -f vhdx a.vhdx 64M");
    let path = b.path("a.vhdx");
    leave_log_dirty(&path);
    let before = std::fs::read(&path).unwrap();
    assert_error(&refused(&path), Kind::Corrupt, "not closed cleanly");
    assert!(before == std::fs::read(&path).unwrap());
    // The advice that goes with it helps.
    b.img("check -q -r all a.vhdx");
    b.verify("a.vhdx", Format::Vhdx);
}

#[test]
fn raw_reads_as_it_is_and_may_be_named_raw_whatever_it_looks_like() {
    let Some(b) = bench() else { return };
    b.raw("a.raw", 20 * MIB + 512);
    b.verify("a.raw", Format::Raw);
    patch(&b.path("a.raw"), 0, b"QFI\xfb");
    assert_eq!(detect(&b.path("a.raw")).unwrap(), Format::Qcow2);
    let raw = open_source(&b.path("a.raw"), Some(Format::Raw)).unwrap();
    let mut head = [0; 4];
    raw.read_at(0, &mut head).unwrap();
    assert_eq!(&head, b"QFI\xfb");
}

#[test]
fn raw_of_100_gib_with_three_extents_is_walked_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    let size = 100 << 30;
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for at in [0, 50 << 30, size - MIB] {
        file.write_all_at(&noise(at, MIB), at).unwrap();
    }
    let start = Instant::now();
    let source = open_source(&path, None).unwrap();
    let runs = walk(source.as_ref());
    let took = start.elapsed();
    let stored: u64 = runs.iter().filter(|r| r.1 == RunKind::Data).map(|r| r.0).sum();
    assert_eq!(stored, 3 * MIB);
    assert_eq!(runs.len(), 5);
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[test]
fn large_sparse_images_are_walked_by_their_extents() {
    let Some(b) = bench() else { return };
    for (format, most) in [("qcow2", 1), ("vmdk", 2), ("vhdx", 1)] {
        b.img(&format!("create -q -f {format} a.img 100G"));
        b.io("a.img", &["write -P 1 60G 1M"]);
        let start = Instant::now();
        let source = open_source(&b.path("a.img"), None).unwrap();
        let runs = walk(source.as_ref());
        let took = start.elapsed();
        assert_eq!(source.size(), 100 << 30);
        assert!(runs.iter().any(|r| r.1 == RunKind::Data));
        assert!(took < Duration::from_secs(most), "{format}: {took:?}");
    }
}

#[test]
fn formats_have_names() {
    for format in [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vhdx] {
        assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
    }
    assert_eq!("vdi".parse::<Format>().unwrap_err().kind(), Kind::Unsupported);
}
