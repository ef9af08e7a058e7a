//! Bad input and bad circumstances: each ends in a named error with its exit code, and nothing is
//! lost.

#[allow(dead_code)] // Each test file uses a part of it.
mod support;

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

use format::limits::{PAGE, SUPERBLOCK_OFFSETS};
use format::units::crc;
use offshoot_tests::mount::Mount;
use serde_json::{Value, json};
use support::{Bench, Ran, has_store, names, noise, sparse, wait};

const MIB: u64 = 1 << 20;

fn kind(ran: &Ran) -> String {
    ran.json()["error"]["kind"].as_str().expect("a kind").to_owned()
}

/// Makes a file writable, changes bytes in it, and makes it what it was.
fn change(path: &Path, at: u64, len: usize, edit: impl FnOnce(&mut [u8])) {
    let was = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).unwrap();
    edit(&mut bytes);
    file.write_all_at(&bytes, at).unwrap();
    fs::set_permissions(path, was).unwrap();
}

/// Changes superblock copies, with a right checksum.
fn edit_superblocks(path: &Path, edit: impl Fn(&mut [u8])) {
    for offset in SUPERBLOCK_OFFSETS {
        change(path, offset, PAGE, |page| {
            edit(page);
            let sum = crc(&page[..PAGE - 4]);
            page[PAGE - 4..].copy_from_slice(&sum.to_le_bytes());
        });
    }
}

/// A store with disks: `keep`, which no test touches, `base` (sealed) and `child`.
fn bench() -> Bench {
    let bench = Bench::new();
    fill(&bench);
    bench
}

fn fill(bench: &Bench) {
    for (name, seed) in [("keep", 1), ("base", 2)] {
        bench.ok(&["disk", "create", name, "--size", "8M", "--journal", "64k"]);
        bench.write(name, 4096, &noise(seed, 1 << 20));
    }
    bench.ok(&["disk", "seal", "base"]);
    bench.ok(&["disk", "create", "child", "--parent", "base", "--journal", "64k"]);
    bench.write("child", 2 * MIB, &noise(3, 100_000));
}

fn is_kept(bench: &Bench) {
    assert!(bench.read("keep", 4096, MIB) == noise(1, 1 << 20));
    bench.is_clean("keep");
}

#[test]
fn a_second_process_gets_busy_by_name() {
    let bench = bench();
    let mut writer = bench.start(&["disk", "write", "keep", "--offset", "4M"]);
    let pipe = writer.stdin.take().unwrap();
    let show = ["disk", "show", "keep", "--json"];
    has_store(&writer);
    for args in [&show[..], &["disk", "create", "x", "--size", "1M", "--json"]] {
        let busy = bench.run(args).fails(5, &["store", "another process", "fuser"]);
        assert_eq!(kind(&busy), "busy");
        let named = busy.err.contains(bench.store().to_str().unwrap());
        assert!(named, "{busy:?}");
    }
    let rebuild = bench.run(&["store", "rebuild", "--json"]).fails(5, &["cannot"]);
    assert_eq!(kind(&rebuild), "busy");
    drop(pipe);
    wait(writer).ok();
    bench.ok(&show);

    // Readers side by side; none of them lets a writer in.
    let reader = bench.start(&["disk", "read", "keep"]);
    let create = ["disk", "create", "x", "--size", "1M"];
    has_store(&reader);
    bench.run(&create).fails(5, &["another process"]);
    bench.ok(&show);
    bench.ok(&["disk", "ls"]);
    assert_eq!(wait(reader).ok().out.len() as u64, 8 * MIB);
    bench.ok(&create);
}

#[test]
fn a_read_only_file_system_serves_all_that_reads() {
    let test = "a_read_only_file_system_serves_all_that_reads";
    let Some(mount) = Mount::ext4(test, 64 << 20) else { return };
    let bench = Bench::at(&mount.path().join("store"));
    fill(&bench);
    // Not closed in order: readers replay the journal in memory and write nothing.
    let mut writer = bench.start(&["disk", "write", "child", "--offset", "5M"]);
    std::io::Write::write_all(writer.stdin.as_mut().unwrap(), &noise(4, 3 << 20)).unwrap();
    writer.kill().unwrap();
    wait(writer);
    mount.remount("ro");

    let out = bench.arg("out.raw");
    for args in [
        &["disk", "ls"][..],
        &["disk", "show", "child"],
        &["disk", "map", "child"],
        &["disk", "read", "child"],
        &["disk", "check", "child", "--data"],
        &["disk", "scrub", "child"],
        &["disk", "compare", "keep", "keep"],
        &["disk", "export", "child", &out],
        &["store", "df"],
    ] {
        bench.ok(args);
    }
    is_kept(&bench);
    bench.ok(&["disk", "compare", "child", &out]);
    for args in [
        &["disk", "create", "x", "--size", "1M"][..],
        &["disk", "import", &out, "x"],
        &["disk", "write", "child"],
        &["disk", "discard", "child", "--offset", "0", "--length", "4k"],
        &["disk", "resize", "child", "16M"],
        &["disk", "rename", "child", "x"],
        &["disk", "seal", "child"],
        &["disk", "rm", "child"],
        &["disk", "repair", "child"],
        &["store", "rebuild"],
    ] {
        let refused = bench.run(&[args, &["--json"]].concat()).fails(9, &["read-only"]);
        assert_eq!(kind(&refused), "read-only", "{args:?}");
    }
    let elsewhere = mount.path().join("out.raw");
    let elsewhere = elsewhere.to_str().unwrap();
    bench.run(&["disk", "export", "keep", elsewhere]).fails(9, &["read-only"]);
    mount.remount("rw");
    bench.write("child", 0, b"again");
    bench.is_clean("child");
}

/// Every verb that needs space, on a full file system; then again with space. The journals
/// are so small that checkpoints come often, and with them pages that need space.
fn full_disk(mount: &Mount) {
    let bench = Bench::at(&mount.path().join("store"));
    fill(&bench);
    let noise_64 = noise(5, 64 << 20);
    sparse(&bench.path("big"), 64 * MIB, &[(0, &noise_64)]);
    let (from, out) = (bench.arg("big"), mount.path().join("out"));
    let out = out.to_str().unwrap();
    let no_space = |args: &[&str]| {
        let failed = bench.run(&[args, &["--json"]].concat()).fails(7, &["no space"]);
        assert_eq!(kind(&failed), "no-space", "{args:?}");
    };

    bench.ok(&["disk", "create", "wide", "--size", "16M", "--journal", "64k"]);
    bench.write("wide", 0, &noise(7, 16 << 20));
    let reserve = mount.path().join("reserve");
    fs::write(&reserve, vec![1; 256 << 10]).unwrap();

    // More data than there is room for.
    no_space(&["disk", "import", &from, "x"]);
    no_space(&["disk", "import", &from, "x"]);
    assert_eq!(bench.files(".new"), [""; 0]);
    bench.ok(&["disk", "resize", "keep", "128M"]);
    let args = ["disk", "write", "keep", "--offset", "8M", "--json"];
    let failed = bench.feed(&args, &noise_64).fails(7, &["no space", "disk repair keep"]);
    assert_eq!(kind(&failed), "no-space");
    is_kept(&bench);
    // What was written and could not be flushed takes space that nothing names; to give it back
    // takes a little space itself.
    fs::remove_file(&reserve).unwrap();
    bench.ok(&["disk", "repair", "keep"]);
    bench.ok(&["disk", "discard", "keep", "--offset", "8M", "--length", "120M"]);
    bench.ok(&["disk", "resize", "keep", "8M"]);
    is_kept(&bench);

    // Not a block left.
    let filler = mount.fill(0);
    no_space(&["disk", "create", "x", "--size", "1M"]);
    no_space(&["disk", "import", &from, "x"]);
    no_space(&["disk", "export", "keep", out]);
    no_space(&["disk", "export", "keep", out, "--format", "qcow2"]);
    no_space(&["disk", "seal", "wide"]);
    let failed = bench.feed(&["disk", "write", "child", "--json"], &noise_64[..8 << 20]);
    assert_eq!((failed.code, kind(&failed)), (7, "no-space".to_owned()), "{failed:?}");
    is_kept(&bench);
    bench.ok(&["disk", "ls"]);
    let left = names(&mount.path());
    assert!(!left.iter().any(|n| n.starts_with(".offshoot")), "{left:?}");
    assert_eq!(bench.files(".new"), [""; 0]);
    drop(filler);

    assert!(bench.read("child", 2 * MIB, 100_000) == noise(3, 100_000));
    for disk in ["keep", "base", "child"] {
        bench.is_clean(disk);
    }
    assert!(bench.read("wide", 0, 16 * MIB) == noise(7, 16 << 20));
    assert_eq!(bench.json(&["disk", "seal", "wide"])["state"], "sealed");
    bench.is_clean("wide");
    bench.write("child", 0, &noise(6, 1 << 20));
    assert!(bench.read("child", 0, MIB) == noise(6, 1 << 20));
    bench.ok(&["disk", "export", "child", out]);
    bench.ok(&["disk", "compare", "child", out]);
    bench.ok(&["disk", "seal", "child"]);
    bench.ok(&["disk", "create", "x", "--parent", "child"]);
    for disk in ["child", "x"] {
        bench.is_clean(disk);
    }
}

#[test]
fn a_full_disk_loses_nothing_and_goes_on_with_space_on_tmpfs() {
    let test = "a_full_disk_loses_nothing_and_goes_on_with_space_on_tmpfs";
    let Some(mount) = Mount::tmpfs(test, 48 << 20) else { return };
    full_disk(&mount);
}

#[test]
fn a_full_disk_loses_nothing_and_goes_on_with_space_on_ext4() {
    let test = "a_full_disk_loses_nothing_and_goes_on_with_space_on_ext4";
    let Some(mount) = Mount::ext4(test, 64 << 20) else { return };
    full_disk(&mount);
}

#[test]
fn removing_a_disk_makes_room_on_a_full_file_system() {
    let test = "removing_a_disk_makes_room_on_a_full_file_system";
    for mount in [Mount::tmpfs(test, 48 << 20), Mount::ext4(test, 64 << 20)] {
        let Some(mount) = mount else { return };
        let bench = Bench::at(&mount.path().join("store"));
        fill(&bench);
        let filler = mount.fill(0);
        bench.run(&["disk", "create", "x", "--size", "1M"]).fails(7, &["no space"]);

        bench.ok(&["disk", "rm", "child"]);

        assert_eq!(bench.disks(), ["base", "keep"]);
        bench.write("keep", 0, b"room");
        drop(filler);
        is_kept(&bench);
    }
}

#[test]
fn a_directory_where_a_file_should_be_is_named() {
    let bench = bench();
    let to_directory = |path: &Path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    };
    let segment = bench.segment("child");
    to_directory(&segment);
    for verb in ["show", "read", "check", "seal"] {
        bench.run(&["disk", verb, "child"]).fails(2, &["directory"]);
    }
    is_kept(&bench);
    let folder = bench.arg("folder");
    fs::create_dir(&folder).unwrap();
    bench.run(&["disk", "import", &folder, "x"]).fails(2, &["directory", "folder"]);
    bench.run(&["disk", "compare", "keep", &folder]).fails(2, &["directory"]);
    bench.run(&["disk", "export", "keep", &folder]).fails(4, &["folder"]);
    bench.run(&["disk", "export", "keep", &folder, "--overwrite"]).fails(2, &["folder"]);
    fs::write(bench.path("file"), "x").unwrap();
    let in_file = bench.arg("file/store");
    let run = |args: &[&str]| support::run(&mut support::offshoot(args));
    run(&["init", "--store", &in_file]).fails(2, &["directory"]);
    run(&["disk", "ls", "--store", &bench.arg("file")]).fails(2, &["directory"]);

    for (name, words) in [("catalogue.redb", "directory"), ("lock", "directory")] {
        let bench = self::bench();
        to_directory(&bench.store().join(name));
        bench.run(&["disk", "ls"]).fails(2, &[words, name]);
    }
    let bench = self::bench();
    to_directory(&bench.store().join("offshoot.json"));
    bench.run(&["disk", "ls"]).fails(2, &["directory", "offshoot.json"]);
}

#[test]
fn a_truncated_segment_is_named_and_others_go_on() {
    let bench = bench();
    let segment = bench.segment("child");
    let whole = fs::read(&segment).unwrap();
    for len in [0, 100, 4096, 800 << 10, 900 << 10, 1 << 20, 1_150_000, whole.len() / 2] {
        fs::write(&segment, &whole[..len]).unwrap();

        let checked = bench.run(&["disk", "check", "child", "--json"]);
        let read = bench.run(&["disk", "read", "child", "--json"]);

        match checked.code {
            0 => {
                assert_eq!((checked.json()["clean"].clone(), read.code), (json!(true), 0), "{len}")
            }
            1 => assert_eq!(checked.json()["clean"], false, "{len}"),
            _ => drop(checked.fails(6, &[])),
        }
        // What a cut in the middle left is read; what it took is never made up.
        if read.code == 0 {
            assert!(len > 2 << 20, "{len}");
            assert!(read.out[2 << 20..(2 << 20) + 100_000] == noise(3, 100_000), "{len}");
        } else {
            read.fails(6, &[]);
        }
        assert!(!bench.run(&["disk", "write", "child"]).err.contains("internal"));
        assert_eq!(bench.run(&["disk", "ls"]).code, 0);
        is_kept(&bench);
    }
    fs::write(&segment, &whole).unwrap();
    assert!(bench.read("child", 2 * MIB, 100_000) == noise(3, 100_000));
}

#[test]
fn superblocks_with_turned_bits_or_foreign_marks_are_refused() {
    let bench = bench();
    let segment = bench.segment("child");
    let whole = fs::read(&segment).unwrap();
    for (what, at) in [("mark", 0), ("size", 130), ("sum", 4093)] {
        for offset in SUPERBLOCK_OFFSETS {
            change(&segment, offset + at, 1, |byte| byte[0] ^= 4);
        }
        for args in
            [&["show", "child"][..], &["read", "child"], &["check", "child"], &["seal", "child"]]
        {
            bench.run(&[&["disk"], args].concat()).fails(6, &["disk child"]);
        }
        let rows = bench.json(&["disk", "ls"]);
        let row = rows.as_array().unwrap().iter().find(|r| r["name"] == "child").unwrap();
        assert_eq!(row["state"], "unreadable", "{what}");
        is_kept(&bench);
        fs::write(&segment, &whole).unwrap();
    }
    // A disk that cannot be read can be removed.
    fs::write(&segment, vec![0; 2 << 20]).unwrap();
    bench.ok(&["disk", "rm", "child"]);
}

#[test]
fn versions_from_the_future_are_left_alone() {
    let bench = bench();
    let segment = bench.segment("child");
    let whole = fs::read(&segment).unwrap();
    // Version 2, and an unknown feature of the class that forbids opening.
    for (at, bytes) in [(8, [2, 0, 0, 0]), (24, [0, 0, 0, 1])] {
        edit_superblocks(&segment, |page| page[at..at + 4].copy_from_slice(&bytes));
        let edited = fs::read(&segment).unwrap();
        for verb in ["show", "read", "check", "write", "seal", "repair"] {
            let refused = bench.run(&["disk", verb, "child"]);
            refused.fails(8, &["disk child"]);
        }
        assert!(fs::read(&segment).unwrap() == edited, "nothing was written");
        is_kept(&bench);
        fs::write(&segment, &whole).unwrap();
    }
    // Unknown features of the second class forbid writing only.
    edit_superblocks(&segment, |page| page[32] = 0x80);
    assert!(bench.read("child", 2 * MIB, 100_000) == noise(3, 100_000));
    bench.feed(&["disk", "write", "child"], b"x").fails(8, &["disk child"]);
    fs::write(&segment, &whole).unwrap();

    let identity = bench.store().join("offshoot.json");
    let text = fs::read_to_string(&identity).unwrap();
    let mut future: Value = serde_json::from_str(&text).unwrap();
    future["version"] = json!(2);
    fs::write(&identity, future.to_string()).unwrap();
    let refused = bench.run(&["disk", "ls", "--json"]).fails(8, &["store", "version 2", "newer"]);
    assert_eq!(kind(&refused), "unsupported");
    bench.run(&["store", "rebuild"]).fails(8, &["version 2"]);
    fs::write(&identity, "{").unwrap();
    bench.run(&["disk", "ls"]).fails(6, &["identity"]);
    fs::write(&identity, text).unwrap();
    is_kept(&bench);
}

#[test]
fn a_missing_or_changed_parent_is_named() {
    let bench = bench();
    let parent = bench.segment("base");
    let aside = bench.path("aside");
    fs::rename(&parent, &aside).unwrap();
    for args in [&["show", "child"][..], &["read", "child"], &["map", "child"]] {
        let refused = bench.run(&[&["disk"], args, &["--json"]].concat());
        let told = if args[0] == "read" {
            serde_json::from_str::<Value>(&refused.err[refused.err.find('{').unwrap()..]).unwrap()
        } else {
            refused.json()
        };
        assert_eq!(told["error"]["kind"], "parent-missing");
        refused.fails(11, &["not in the store"]);
    }
    bench.feed(&["disk", "write", "child"], b"x").fails(11, &["not in the store"]);
    let checked = bench.run(&["disk", "check", "child", "--json"]);
    assert_eq!(
        (checked.code, &checked.json()["problems"][0]["what"]),
        (1, &json!("parent-missing"))
    );
    bench.run(&["disk", "create", "x", "--parent", "base"]).fails(11, &["not in the store"]);
    is_kept(&bench);
    let listed = bench.json(&["disk", "ls"]);
    assert_eq!(listed[0]["state"], "missing", "{listed:#}");

    // Another sealed segment under its name.
    bench.ok(&["disk", "create", "other", "--size", "8M"]);
    bench.ok(&["disk", "seal", "other"]);
    fs::copy(bench.segment("other"), &parent).unwrap();
    bench.run(&["disk", "read", "child"]).fails(11, &["instead"]);
    bench.feed(&["disk", "write", "child"], b"x").fails(11, &["instead"]);
    fs::remove_file(&parent).unwrap();
    fs::rename(&aside, &parent).unwrap();
    assert!(bench.read("child", 4096, MIB) == noise(2, 1 << 20));
    bench.is_clean("child");
}

#[test]
fn a_lost_or_damaged_catalogue_is_made_anew() {
    let bench = bench();
    bench.ok(&["disk", "rename", "keep", "kept"]);
    bench.ok(&["disk", "rename", "kept", "keep"]);
    let before = bench.json(&["disk", "ls"]);
    let catalogue = bench.store().join("catalogue.redb");
    let size = usize::try_from(fs::metadata(&catalogue).unwrap().len()).unwrap();
    let damages: [&dyn Fn(); 5] = [
        &|| fs::remove_file(&catalogue).unwrap(),
        &|| fs::write(&catalogue, "").unwrap(),
        &|| fs::write(&catalogue, vec![0xff; size]).unwrap(),
        &|| fs::write(&catalogue, noise(1, size)).unwrap(),
        &|| fs::write(&catalogue, &fs::read(&catalogue).unwrap()[..5000]).unwrap(),
    ];
    for (i, damage) in damages.iter().enumerate() {
        damage();
        for args in [&["disk", "ls"][..], &["disk", "create", "x", "--size", "1M"]] {
            let refused = bench.run(args).fails(6, &["catalogue", "offshoot store rebuild"]);
            assert!(!refused.err.contains("panic"), "{refused:?}");
        }

        let rebuilt = bench.json(&["store", "rebuild"]);

        assert_eq!(rebuilt["disks"], json!(["base", "child", "keep"]), "{i}");
        assert_eq!(bench.json(&["disk", "ls"]), before, "{i}");
        is_kept(&bench);
        bench.run(&["disk", "rm", "base"]).fails(5, &["child"]);
        assert!(bench.read("child", 4096, MIB) == noise(2, 1 << 20));
    }
}

#[test]
fn every_turned_byte_of_the_catalogue_is_harmless_or_named() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "1M"]);
    let before = bench.json(&["disk", "ls"]);
    let catalogue = bench.store().join("catalogue.redb");
    let whole = fs::read(&catalogue).unwrap();
    let step = if std::env::var_os("OFFSHOOT_SOAK").is_some() { 37 } else { 4001 };
    let used = whole.iter().rposition(|b| *b != 0).unwrap() + 1;
    for at in (0..512.min(used)).step_by(29).chain((512..used).step_by(step)) {
        let mut turned = whole.clone();
        turned[at] ^= 0xff;
        fs::write(&catalogue, &turned).unwrap();
        let ran = bench.run(&["disk", "ls", "--json"]);
        match ran.code {
            0 => assert_eq!(ran.json(), before, "byte {at}"),
            _ => drop(ran.fails(6, &["store rebuild"])),
        }
    }
    fs::write(&catalogue, &whole).unwrap();
    assert_eq!(bench.json(&["disk", "ls"]), before);
}

#[test]
fn rebuild_keeps_both_of_two_disks_with_one_name() {
    let bench = bench();
    let other = self::bench();
    other.write("keep", 0, b"other");
    let foreign = other.segment("keep");
    fs::copy(&foreign, bench.segments().join(foreign.file_name().unwrap())).unwrap();
    let listed = bench.ok(&["disk", "ls"]);
    assert!(listed.err.contains("store rebuild"), "{listed:?}");

    let rebuilt = bench.json(&["store", "rebuild"]);

    let renamed = &rebuilt["renamed"];
    assert_eq!((renamed.as_array().unwrap().len(), &renamed[0]["from"]), (1, &json!("keep")));
    let new = renamed[0]["to"].as_str().unwrap();
    assert!(new.starts_with("keep-"), "{new}");
    assert_eq!(bench.disks().len(), 4);
    let heads = [bench.read("keep", 0, 5), bench.read(new, 0, 5)];
    assert!(heads.contains(&b"other".to_vec()) && heads.contains(&vec![0; 5]), "{heads:?}");
    assert_eq!(bench.json(&["store", "rebuild"])["renamed"], json!([]));
    bench.is_clean("keep");
    bench.is_clean(new);
}

#[test]
fn rebuild_says_what_it_left_out() {
    let bench = bench();
    let segment = bench.segment("child");
    fs::write(&segment, vec![7; 2 << 20]).unwrap();
    fs::remove_file(bench.segment("base")).unwrap();
    let id = segment.file_stem().unwrap().to_str().unwrap().to_owned();

    let rebuilt = bench.ok(&["store", "rebuild", "--json", "--quiet"]);

    assert!(rebuilt.err.contains(&id), "{rebuilt:?}");
    let told = rebuilt.json();
    assert_eq!((&told["disks"], &told["unreadable"][0]["segment"]), (&json!(["keep"]), &json!(id)));
    is_kept(&bench);
}

#[test]
fn a_deletion_that_was_cut_short_is_finished() {
    let bench = bench();
    let segment = bench.segment("child");
    fs::rename(&segment, segment.with_extension("del")).unwrap();

    // A reader does not see the disk, and changes nothing.
    assert_eq!(bench.disks(), ["base", "keep"]);
    assert_eq!(bench.files(".del").len(), 1);
    let next = bench.ok(&["disk", "rename", "keep", "kept"]);
    assert!(next.err.contains("deletion"), "{next:?}");
    assert_eq!((bench.files(".del").len(), bench.disks()), (0, vec!["base".into(), "kept".into()]));
    bench.ok(&["disk", "rm", "base"]);
}
