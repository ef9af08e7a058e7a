//! Flatten through the command line, with a daemon and without one (D-i, D-j, D-k, D-l): a disk
//! stands on fewer segments afterwards, holds what it held, and what nobody needs goes.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;

use offshoot_tests::command::{Bench, each};
use offshoot_tests::pattern;
use offshoot_tests::until;

/// `base`, sealed; `vm` over it, forked into `one` and `two` with writes and a discard in between.
fn chain(b: &Bench) {
    b.done(&["disk", "create", "base", "--size", "16M"]);
    b.write("base", 0, &pattern::bytes(1, 0, 4096));
    b.done(&["disk", "seal", "base"]);
    b.done(&["disk", "create", "vm", "--parent", "base"]);
    b.write("vm", 64 << 10, &pattern::bytes(2, 128, 512));
    b.done(&["disk", "fork", "vm", "one", "--flatten", "manual"]);
    b.done(&["disk", "discard", "vm", "--offset", "128k", "--length", "64k"]);
    b.write("vm", (256 << 10) - 512, &pattern::bytes(3, 511, 2));
    b.done(&["disk", "fork", "vm", "two", "--flatten", "manual"]);
    b.write("vm", 1 << 20, &pattern::bytes(4, 2048, 8));
}

fn depth(b: &Bench, disk: &str) -> u64 {
    b.json(&["disk", "show", disk])["depth"].as_u64().unwrap()
}

/// The default is the nearest ancestor with a name.
#[test]
fn a_disk_stands_on_its_base_alone() {
    each(|b| {
        chain(b);
        let held = ["vm", "one", "two"].map(|disk| b.read(disk));
        assert_eq!((depth(b, "vm"), b.segments()), (3, 6));

        let done = b.json(&["disk", "flatten", "vm", "--wait"]);

        assert_eq!(
            (done["depth_before"].as_u64(), done["disk"]["depth"].as_u64()),
            (Some(3), Some(1))
        );
        // What it had in the two frozen segments: 256 KiB, less the 64 that were discarded.
        assert_eq!(done["copied"].as_u64(), Some((256 - 64) << 10), "{done}");
        assert!(b.read("vm") == held[0]);
        assert_eq!(b.segments(), 6, "the children stand on what was frozen");
        b.done(&["disk", "rm", "two"]);
        assert_eq!(b.segments(), 4, "the second frozen segment goes with it");
        b.done(&["disk", "flatten", "one", "--wait"]);
        assert_eq!((depth(b, "one"), b.segments()), (1, 3));
        b.write("vm", 0, &pattern::bytes(5, 0, 128));
        assert!(b.read("one") == held[1]);
        b.is_sound(&["base", "vm", "one"]);
        // D-l: the base is pinned by both.
        let said = b.refused(&["disk", "rm", "base"], 5);
        assert!(said.contains("one") && said.contains("vm"), "{said}");
    });
}

#[test]
fn a_disk_can_stand_on_nothing_or_on_an_ancestor_by_name() {
    each(|b| {
        chain(b);
        let held = ["vm", "two"].map(|disk| b.read(disk));
        let said = b.refused(&["disk", "flatten", "vm", "--to", "one", "--wait"], 2);
        assert!(said.contains("does not stand on it"), "{said}");
        b.refused(&["disk", "flatten", "vm", "--to", "nobody", "--wait"], 3);
        b.refused(&["disk", "flatten", "base", "--wait"], 9);

        b.done(&["disk", "flatten", "two", "--to", "base", "--wait"]);
        let done = b.json(&["disk", "flatten", "vm", "--to", "nothing", "--wait"]);

        assert_eq!(done["disk"]["depth"].as_u64(), Some(0));
        b.done(&["disk", "flatten", "two", "--to", "nothing", "--wait"]);
        for disk in ["one", "base"] {
            b.done(&["disk", "rm", disk]);
        }
        assert_eq!(b.segments(), 2);
        assert!(b.read("vm") == held[0] && b.read("two") == held[1]);
        b.is_sound(&["vm", "two"]);
    });
}

/// A disk that was flattened often stands on no more rows than one that was not.
#[test]
fn forks_and_flattens_in_turn() {
    each(|b| {
        b.done(&["disk", "create", "vm", "--size", "16M"]);
        for n in 0..12 {
            b.write("vm", n << 16, &pattern::bytes(7, n << 7, 16));
            let child = format!("child{n}");
            b.done(&["disk", "fork", "vm", &child, "--flatten", "now"]);
            // With a daemon, the flattening goes on after the answer.
            let flat = |disk: &str| {
                let shown = b.json(&["disk", "show", disk]);
                shown["depth"] == 1 && shown["flattening"].is_null()
            };
            until("both are flat", || flat("vm") && flat(&child));
        }
        let rows = b.json(&["disk", "show", "vm"])["segments"].clone();
        let highest = rows.as_array().unwrap().iter().map(|row| row["index"].as_u64().unwrap());
        assert!(highest.max().unwrap() <= 3, "{rows}");
        for n in 0..12 {
            let child = b.read(&format!("child{n}"));
            for m in 0..12_usize {
                let at = m << 16;
                let wrote = pattern::bytes(7, (m as u64) << 7, 16);
                let holds = child[at..at + wrote.len()] == wrote;
                assert_eq!(holds, m as u64 <= n, "child{n} and write {m}");
            }
        }
        // One frozen segment is everybody's base.
        assert_eq!(b.segments(), 14);
    });
}

/// A block that does not match its checksum is not taken over: it would look sound from then on.
#[test]
fn damage_is_not_copied() {
    each(|b| {
        b.done(&["disk", "create", "base", "--size", "16M"]);
        b.write("base", 0, &pattern::bytes(1, 0, 4096));
        b.done(&["disk", "seal", "base"]);
        b.done(&["disk", "create", "vm", "--parent", "base"]);
        let ranges = b.json(&["disk", "map", "base"]);
        let data = ranges.as_array().unwrap().iter().find(|r| r["state"] == "data").unwrap();
        let at = data["file_offset"].as_u64().unwrap();
        let segment = b.json(&["disk", "show", "base"])["segment"].as_str().unwrap().to_owned();
        let file = b.store.store().join(format!("{segment}.seg"));
        let mut mode = std::fs::metadata(&file).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o600);
        std::fs::set_permissions(&file, mode).unwrap();
        let file = OpenOptions::new().write(true).open(file).unwrap();
        file.write_at(b"damaged", at + (1 << 20) + 4096).unwrap();

        let said = b.refused(&["disk", "flatten", "vm", "--to", "nothing", "--wait"], 6);

        assert!(said.contains("does not match its checksum") && said.contains("scrub"), "{said}");
        assert_eq!(depth(b, "vm"), 1);
        b.is_sound(&["vm"]);
    });
}

/// What an undo goes back to is not flattened away.
#[test]
fn an_undo_after_a_flatten_finds_its_base() {
    each(|b| {
        chain(b);
        let before = b.read("vm");
        b.done(&["disk", "mode", "vm", "undoable"]);
        b.write("vm", 0, &pattern::bytes(8, 0, 64));
        b.done(&["disk", "fork", "vm", "three", "--flatten", "manual"]);
        b.write("vm", 4 << 20, &pattern::bytes(8, 8192, 64));
        let changed = b.read("vm");

        b.done(&["disk", "flatten", "vm", "--to", "nothing", "--wait"]);

        assert!(b.read("vm") == changed);
        b.done(&["disk", "rm", "three"]);
        b.done(&["disk", "undo", "vm"]);
        assert!(b.read("vm") == before);
        b.done(&["disk", "mode", "vm", "persistent"]);
        b.done(&["disk", "flatten", "vm", "--to", "nothing", "--wait"]);
        assert!(b.read("vm") == before && depth(b, "vm") == 0);
        b.is_sound(&["vm"]);
    });
}

#[test]
fn policies_are_kept_by_disk_and_by_store() {
    each(|b| {
        b.done(&["disk", "create", "vm", "--size", "16M"]);
        let policy = |args: &[&str]| String::from_utf8(b.done(args)).unwrap();
        assert_eq!(policy(&["disk", "flatten-policy", "vm"]), "default\n");
        assert_eq!(policy(&["store", "flatten-policy"]), "depth>32\n");
        b.done(&["disk", "flatten-policy", "vm", "bytes<1M"]);
        b.done(&["store", "flatten-policy", "after-fork"]);
        assert_eq!(policy(&["disk", "flatten-policy", "vm"]), "bytes<1048576\n");
        // A fork, and what else changes the disk's segment, leaves them as they are.
        b.done(&["disk", "fork", "vm", "one"]);
        b.done(&["disk", "resize", "vm", "32M"]);
        b.done(&["disk", "rename", "vm", "vm2"]);
        assert_eq!(policy(&["disk", "flatten-policy", "vm2"]), "bytes<1048576\n");
        assert_eq!(policy(&["disk", "flatten-policy", "one"]), "default\n");
        b.done(&["disk", "flatten-policy", "vm2", "default"]);
        assert_eq!(policy(&["disk", "flatten-policy", "vm2"]), "default\n");
        assert_eq!(policy(&["store", "flatten-policy"]), "after-fork\n");
        let said = b.refused(&["disk", "flatten-policy", "vm2", "often"], 2);
        assert!(said.contains("depth>N"), "{said}");
        b.refused(&["disk", "flatten-policy", "nobody", "manual"], 3);
    });
}
