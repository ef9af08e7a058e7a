//! Damaged, hostile and mistaken input: each kind has an error that names it.

use super::*;

#[test]
fn what_is_no_image_is_refused_by_name() {
    let Some(b) = bench() else { return };
    assert_error(&refused(&b.path("none")), Kind::NotFound, "none");
    assert_error(&refused(b.dir.path()), Kind::Invalid, "directory");
    assert_error(&refused(Path::new("/dev/null")), Kind::Invalid, "neither a regular file");
    std::fs::write(b.path("empty"), b"").unwrap();
    assert_error(&refused(&b.path("empty")), Kind::Invalid, "empty");
    run(Command::new("mkfifo").arg(b.path("pipe")));
    assert_error(&refused(&b.path("pipe")), Kind::Invalid, "neither a regular file");
    std::fs::write(b.path("odd"), [1; 1000]).unwrap();
    let e = refused(&b.path("odd"));
    assert_error(&e, Kind::Invalid, "1000");
    assert!(e.next_step().unwrap().contains("truncate -s 1024"));
}

#[test]
fn formats_that_cannot_be_read_are_not_taken_for_raw() {
    let Some(b) = bench() else { return };
    b.raw("a.raw", 4 * MIB);
    for format in ["vpc", "vdi", "qed", "parallels"] {
        b.img(&format!("convert -f raw -O {format} a.raw a.img"));
        assert_error(&refused(&b.path("a.img")), Kind::Unsupported, "looks like");
    }
    b.img("convert -f raw -O vpc -o subformat=fixed a.raw a.img");
    assert_error(&refused(&b.path("a.img")), Kind::Unsupported, "fixed VHD");
    std::fs::write(b.path("a.gz"), [&b"\x1f\x8b\x08"[..], &[7; 509]].concat()).unwrap();
    assert_error(&refused(&b.path("a.gz")), Kind::Unsupported, "gzip");
    assert!(open_source(&b.path("a.gz"), Some(Format::Raw)).is_ok());
}

#[test]
fn a_header_that_is_not_of_the_named_format_is_corrupt() {
    let Some(b) = bench() else { return };
    let path = b.raw("a.raw", 4 * MIB);
    for format in [Format::Qcow2, Format::Vmdk, Format::Vhdx] {
        let e = read_all(&path, Some(format)).unwrap_err();
        assert_error(&e, Kind::Corrupt, "a.raw");
    }
    for mark in [&b"QFI\xfb"[..], b"KDMV", b"vhdxfile", b"COWD", b"# Disk DescriptorFile"] {
        std::fs::write(b.path("short"), mark).unwrap();
        let e = refused(&b.path("short"));
        assert!(matches!(e.kind(), Kind::Corrupt | Kind::Unsupported), "{e}");
        assert!(e.object().is_some());
    }
}

#[test]
fn a_panic_of_a_library_is_a_corrupt_image() {
    let e = guarded("image a", "read", || -> Result<()> { panic!("deliberate") }).unwrap_err();
    assert_error(&e, Kind::Corrupt, "cannot read image a");
}

#[test]
fn qcow2_features_that_cannot_be_read_are_named() {
    let Some(b) = bench() else { return };
    b.img("create -q -f qcow2 -o extended_l2=on a.qcow2 4M");
    assert_error(&refused(&b.path("a.qcow2")), Kind::Unsupported, "extended L2");
    b.img("create -q -f qcow2 -o compression_type=zstd a.qcow2 4M");
    assert_error(&refused(&b.path("a.qcow2")), Kind::Unsupported, "zlib");
    b.img("create -q -f qcow2 a.qcow2 4M");
    let path = b.path("a.qcow2");
    for (at, byte, kind, words) in [
        (35, 1, Kind::Unsupported, "encrypted"),
        (7, 1, Kind::Unsupported, "version 1"),
        (79, 1, Kind::Corrupt, "not closed cleanly"),
        (79, 2, Kind::Corrupt, "marked as corrupt"),
        (79, 3, Kind::Corrupt, "marked as corrupt"),
        (79, 32, Kind::Unsupported, "unknown features"),
        (23, 40, Kind::Corrupt, "2^40"),
        (39, 0, Kind::Corrupt, "first level table"),
        (24, 1, Kind::Corrupt, "first level table"),
        (31, 1, Kind::Invalid, "multiple of 512"),
    ] {
        let before = std::fs::read(&path).unwrap();
        patch(&path, at, &[byte]);
        assert_error(&refused(&path), kind, words);
        std::fs::write(&path, before).unwrap();
    }
}

#[test]
fn qcow2_backing_file_that_is_missing_is_named() {
    let Some(b) = bench() else { return };
    b.img("create -q -f qcow2 base.qcow2 4M");
    b.img("create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2");
    b.img("create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2");
    std::fs::remove_file(b.path("base.qcow2")).unwrap();
    let e = refused(&b.path("top.qcow2"));
    assert_error(&e, Kind::NotFound, "base.qcow2");
    assert!(e.object().unwrap().contains("mid.qcow2"), "{e}");
    std::fs::create_dir(b.path("base.qcow2")).unwrap();
    assert_error(&refused(&b.path("top.qcow2")), Kind::Invalid, "directory");
}

#[test]
fn qcow2_chain_that_is_a_loop_or_endless_is_refused() {
    let Some(b) = bench() else { return };
    b.img("create -q -f qcow2 a.qcow2 4M");
    b.img("create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2");
    b.img("rebase -q -u -b b.qcow2 -F qcow2 a.qcow2");
    assert_error(&refused(&b.path("b.qcow2")), Kind::Corrupt, "loop");
    b.img("rebase -q -u -b a.qcow2 -F qcow2 a.qcow2");
    assert_error(&refused(&b.path("a.qcow2")), Kind::Corrupt, "loop");

    b.img("create -q -f qcow2 l00 4M");
    b.img("create -q -f qcow2 -b l00 -F qcow2 l01");
    let one = std::fs::read(b.path("l01")).unwrap();
    let name_at = one.windows(3).position(|w| w == b"l00").unwrap() as u64;
    for i in 2..=64 {
        let path = b.path(&format!("l{i:02}"));
        std::fs::write(&path, &one).unwrap();
        patch(&path, name_at, format!("l{:02}", i - 1).as_bytes());
    }
    // l63 is a chain of 64 files.
    assert_eq!(read_all(&b.path("l63"), None).unwrap().len() as u64, 4 * MIB);
    assert_error(&refused(&b.path("l64")), Kind::Unsupported, "longer than 64");
}

#[test]
fn qcow2_reference_to_something_other_than_a_file_is_refused() {
    let Some(b) = bench() else { return };
    b.img("create -q -u -f qcow2 -b nbd://127.0.0.1:9/x -F raw a.qcow2 4M");
    assert_error(&refused(&b.path("a.qcow2")), Kind::Unsupported, "nbd://");
    b.img("create -q -f vmdk base.vmdk 4M");
    b.img("create -q -f qcow2 -b base.vmdk -F vmdk a.qcow2");
    assert_error(&refused(&b.path("a.qcow2")), Kind::Unsupported, "vmdk");
    std::fs::write(b.path("secret"), noise(0, 4 * MIB)).unwrap();
    // A guest wrote a header into its raw disk; the image above does not say that it is raw.
    b.img("create -q -f qcow2 -b secret -F raw disk 4M");
    b.img("create -q -f qcow2 -b disk -F qcow2 a.qcow2");
    b.verify("a.qcow2", Format::Qcow2);
    forget_backing_format(&b.path("a.qcow2"), "qcow2");
    assert_error(&refused(&b.path("a.qcow2")), Kind::Invalid, "guess");
}

#[test]
fn vmdk_extents_elsewhere_and_parents_are_refused() {
    let Some(b) = bench() else { return };
    b.img("create -q -f vmdk -o subformat=monolithicFlat a.vmdk 4M");
    let text = std::fs::read_to_string(b.path("a.vmdk")).unwrap();
    assert!(text.contains("\"a-flat.vmdk\""));
    for elsewhere in ["/etc/passwd", "../a-flat.vmdk", "x/../a-flat.vmdk"] {
        std::fs::write(b.path("b.vmdk"), text.replace("a-flat.vmdk", elsewhere)).unwrap();
        assert_error(&refused(&b.path("b.vmdk")), Kind::Invalid, "folder of the image");
    }
    std::fs::write(b.path("b.vmdk"), text.replace("CID=", "encoding=\"UTF-8\"\nCID=")).unwrap();
    assert_error(&refused(&b.path("b.vmdk")), Kind::Unsupported, "encoding");
    std::fs::write(b.path("b.vmdk"), text.replace("a-flat.vmdk", "c-flat.vmdk")).unwrap();
    assert_error(&refused(&b.path("b.vmdk")), Kind::NotFound, "c-flat.vmdk");
    truncate(&b.path("a-flat.vmdk"), MIB);
    assert_error(&read_all(&b.path("a.vmdk"), None).unwrap_err(), Kind::Corrupt, "ends early");

    b.img("create -q -f vmdk base.vmdk 4M");
    b.img("create -q -f vmdk -b base.vmdk -F vmdk child.vmdk");
    assert_error(&refused(&b.path("child.vmdk")), Kind::Unsupported, "parent");
    b.img("create -q -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 4M");
    assert_error(&refused(&b.path("split.vmdk")), Kind::Unsupported, "SPARSE");
}

/// A cut image must not read as a whole one with zeroes in it.
#[test]
fn truncated_images_are_refused() {
    let Some(b) = bench() else { return };
    b.raw("a.raw", 8 * MIB);
    let kinds = [
        "qcow2",
        "qcow2 -c",
        "vmdk -o subformat=monolithicSparse",
        "vmdk -o subformat=streamOptimized",
        "vhdx -o block_size=1M",
    ];
    for kind in kinds {
        b.img(&format!("convert -f raw -O {kind} a.raw a.img"));
        let path = b.path("a.img");
        let whole = path.metadata().unwrap().len();
        let want = read_all(&path, None).unwrap();
        let mut refused = 0;
        for len in [whole - KIB, whole - 70 * KIB, whole / 4 * 3, whole / 2, 70 * KIB, 900] {
            truncate(&path, len);
            match read_all(&path, None) {
                // What was cut off is an end mark, say.
                Ok(got) => assert!(got == want, "{kind} reads differently with {len} of {whole}"),
                Err(e) => {
                    assert_error(&e, Kind::Corrupt, "a.img");
                    refused += 1;
                }
            }
        }
        assert!(refused >= 5, "{kind}: {refused}");
    }
}

/// Bytes overwritten at random, mostly in the tables: an error or other data, never a panic that
/// gets out, and never an endless walk. `IMAGE_ROUNDS` asks for more images of each kind.
#[test]
fn overwritten_images_do_no_harm() {
    let Some(b) = bench() else { return };
    b.raw("a.raw", 4 * MIB);
    let kinds = [
        "qcow2",
        "qcow2 -c",
        "vmdk -o subformat=monolithicSparse",
        "vmdk -o subformat=streamOptimized",
        "vmdk -o subformat=monolithicFlat",
        "vhdx -o block_size=1M",
    ];
    let rounds = std::env::var("IMAGE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    for (salt, kind) in (0_u64..).zip(kinds) {
        b.img(&format!("convert -f raw -O {kind} a.raw a.img"));
        let path = b.path("a.img");
        let whole = std::fs::read(&path).unwrap();
        for round in 0..rounds {
            let seed = salt << 32 | round;
            let dice = noise(seed, 64);
            let mut image = whole.clone();
            for i in 0..usize::from(dice[0] % 4) + 1 {
                let draw = u32::from_le_bytes(dice[4 * i + 4..][..4].try_into().unwrap());
                let reach = [128, 1 << 12, 1 << 18, 3 << 20][usize::from(dice[i + 40] >> 1) % 4];
                let at = usize::try_from(draw).unwrap() % reach.min(image.len());
                image[at] =
                    [0, 0xff, dice[i + 50], image[at] ^ 0x80][usize::from(dice[i] >> 2) % 4];
            }
            std::fs::write(&path, image).unwrap();
            if let Err(e) = read_all(&path, None) {
                assert!(e.object().is_some(), "{kind}, round {round}: {e}");
            }
        }
    }
}
