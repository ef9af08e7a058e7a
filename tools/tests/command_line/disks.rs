//! The life of disks, and their bytes.

use std::fs;
use std::os::unix::fs::FileExt as _;

use serde_json::{Value, json};

use super::support::{Bench, noise};
use super::{DISK, MIB, disk_and, error, has_fields};

#[test]
fn disks_are_created_listed_shown_renamed_and_removed() {
    let bench = Bench::new();

    let made = bench.json(&["disk", "create", "a", "--size", "10G", "--journal", "1M"]);

    has_fields(&made, &DISK);
    assert_eq!((&made["name"], &made["size"]), (&json!("a"), &json!(10_u64 << 30)));
    assert_eq!(
        (&made["state"], &made["parent"], &made["depth"]),
        (&json!("active"), &Value::Null, &json!(0))
    );
    let again = bench.run(&["disk", "create", "a", "--size", "1M", "--json"]);
    assert_eq!(error(&again.fails(4, &["disk a"]))["kind"], "exists");
    bench.ok(&["disk", "create", "b", "--size", "1M"]);
    assert_eq!(bench.disks(), ["a", "b"]);
    let table = bench.ok(&["disk", "ls"]);
    let head = ["NAME", "SIZE", "ALLOCATED", "STATE", "PARENT", "DEPTH"];
    let lines: Vec<&str> = table.text().lines().collect();
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), head);
    assert!(lines[1].starts_with("a     10 GiB"), "{lines:?}");

    let shown = bench.json(&["disk", "show", "a"]);
    has_fields(
        &shown,
        &disk_and(&[
            "base",
            "attached",
            "digest",
            "segments",
            "dependents",
            "own_extents",
            "generation",
            "epoch",
            "owner_epoch",
            "journal",
            "map_memory",
            "features",
            "problems",
            "exports",
        ]),
    );
    assert_eq!(shown["journal"], json!({"size": MIB, "used": 0}));
    assert_eq!((&shown["attached"], &shown["mode"]), (&json!("no"), &json!("persistent")));
    let own = json!([{"index": 0, "segment": shown["segment"], "own": true, "digest": null}]);
    assert_eq!((&shown["segments"], &shown["dependents"]), (&own, &json!([])));
    assert!(bench.ok(&["disk", "show", "a"]).text().contains("10 GiB (10737418240 bytes)"));

    assert_eq!(bench.json(&["disk", "rename", "a", "c"])["name"], "c");
    bench.run(&["disk", "rename", "a", "d"]).fails(3, &["cannot rename disk a"]);
    bench.run(&["disk", "rename", "b", "c"]).fails(4, &["disk c"]);
    assert_eq!(bench.json(&["disk", "show", "c"])["segment"], made["segment"]);
    let removed = bench.json(&["disk", "rm", "c"]);
    has_fields(&removed, &["removed", "freed"]);
    assert!(removed["freed"].as_u64().unwrap() > 0);
    bench.run(&["disk", "rm", "c"]).fails(3, &["cannot remove disk c"]);
    assert_eq!((bench.disks(), bench.files(".seg").len()), (vec!["b".to_owned()], 1));
}

#[test]
fn reads_and_writes_go_by_the_byte() {
    let bench = Bench::new();
    let size = MIB + 512;
    bench.ok(&["disk", "create", "a", "--size", &size.to_string()]);
    let mut model = vec![0; usize::try_from(size).unwrap()];

    let cases = [(0, 1), (511, 2), (4095, 8194), (512, 512), (100_000, 70_001), (1_048_575, 513)];
    for (seed, (offset, len)) in cases.into_iter().enumerate() {
        let bytes = noise(seed as u64, len);
        bench.write("a", offset as u64, &bytes);
        model[offset..offset + len].copy_from_slice(&bytes);
    }

    assert!(bench.ok(&["disk", "read", "a"]).out == model);
    for (offset, len) in [(0, 1), (4094, 3), (511, 513), (1_049_000, 88), (77, 0)] {
        let here = usize::try_from(offset).unwrap();
        let expected = &model[here..here + usize::try_from(len).unwrap()];
        assert!(bench.read("a", offset, len) == expected, "{offset} {len}");
    }
    bench.is_clean("a");
}

#[test]
fn reads_and_writes_end_where_they_are_told_to() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "1M"]);

    let moved = bench
        .feed(&["disk", "write", "a", "--offset", "4k", "--length", "5", "--json"], b"0123456789");
    assert_eq!(moved.ok().json(), json!({"disk": "a", "offset": 4096, "length": 5}));
    assert_eq!(bench.read("a", 4095, 7), b"\x0001234\0");
    // Less input than asked for is no error; what was moved is said.
    let args = ["disk", "write", "a", "--length", "1k", "--json"];
    assert_eq!(bench.feed(&args, b"xyz").ok().json()["length"], 3);
    // More than fits is one, and what fits is there.
    let args = ["disk", "write", "a", "--offset", "1048570", "--json"];
    let long = bench.feed(&args, b"0123456789").fails(2, &["disk a", "1048576"]);
    assert_eq!(error(&long)["kind"], "invalid");
    assert_eq!(bench.read("a", 1_048_569, 7), b"\x00012345");
    for range in [["1M", "1"], ["2M", "0"], ["1k", "1M"]] {
        let args = |verb| ["disk", verb, "a", "--offset", range[0], "--length", range[1]];
        bench.run(&args("read")).fails(2, &["cannot read disk a"]);
        bench.feed(&args("write"), b"y").fails(2, &["cannot write disk a"]);
    }
    // The data is on standard output, so JSON goes to standard error.
    let read = bench.ok(&["disk", "read", "a", "--offset", "1", "--length", "2", "--json"]);
    assert_eq!(read.out, b"yz");
    let told: Value = serde_json::from_str(&read.err).unwrap();
    assert_eq!(told, json!({"disk": "a", "offset": 1, "length": 2}));
}

#[test]
fn discard_makes_zeroes_and_gives_space_back() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "16M"]);
    bench.write("a", 0, &noise(1, 8 << 20));
    let allocated = || bench.json(&["disk", "show", "a"])["allocated"].as_u64().unwrap();
    let before = allocated();

    let args = ["disk", "discard", "a", "--offset", "1M", "--length", "6M"];
    let told = bench.json(&args);

    assert_eq!(told, json!({"disk": "a", "offset": MIB, "length": 6 * MIB}));
    assert!(bench.read("a", MIB, 6 * MIB).iter().all(|b| *b == 0));
    assert!(bench.read("a", 0, MIB) == noise(1, 8 << 20)[..1 << 20]);
    let freed = before - allocated();
    assert!(freed > 5 * MIB, "{freed}");
    bench.run(&["disk", "discard", "a", "--offset", "1", "--length", "1k"]).fails(2, &["512"]);
}

#[test]
fn the_map_covers_the_disk_and_says_where_the_bytes_are() {
    let bench = Bench::new();
    let size = 100 * MIB + 512;
    bench.ok(&["disk", "create", "a", "--size", &size.to_string()]);
    bench.write("a", 40 * MIB, &noise(1, 300_000));
    bench.write("a", size - 512, &noise(2, 512));
    bench.ok(&["disk", "discard", "a", "--offset", "40M", "--length", "64k"]);

    let map = bench.json(&["disk", "map", "a"]);

    let mut at = 0;
    let segment = fs::File::open(bench.segment("a")).unwrap();
    for range in map.as_array().unwrap() {
        let number = |key: &str| range[key].as_u64().unwrap();
        assert_eq!(number("offset"), at, "{map:#}");
        at += number("length");
        if range["state"] == "data" {
            has_fields(range, &["offset", "length", "state", "segment", "file_offset"]);
            let mut stored = vec![0; usize::try_from(number("length")).unwrap()];
            segment.read_exact_at(&mut stored, number("file_offset")).unwrap();
            assert!(stored == bench.read("a", number("offset"), number("length")));
        } else {
            has_fields(range, &["offset", "length", "state"]);
        }
    }
    assert_eq!(at, size);
    let states: Vec<&str> =
        map.as_array().unwrap().iter().map(|r| r["state"].as_str().unwrap()).collect();
    assert_eq!(states.iter().filter(|s| **s == "zero").count(), 1, "{states:?}");
    assert_eq!((states[0], states[states.len() - 1]), ("hole", "data"));
    let text = bench.ok(&["disk", "map", "a"]);
    assert_eq!(text.text().lines().count(), states.len() + 1);
    bench.run(&["disk", "map", "b"]).fails(3, &["disk b"]);
}

#[test]
fn resize_takes_absolute_and_relative_sizes_and_guards_data() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "8M"]);
    bench.write("a", 6 * MIB, b"precious");

    assert_eq!(bench.json(&["disk", "resize", "a", "+8M"])["size"], 16 * MIB);
    assert_eq!(bench.json(&["disk", "resize", "a", "-4M"])["size"], 12 * MIB);
    assert_eq!(bench.json(&["disk", "resize", "a", "8M"])["size"], 8 * MIB);
    let refused = bench.run(&["disk", "resize", "a", "-4M", "--json"]);
    let told = error(&refused.fails(5, &["cannot resize disk a", "--drop-data"]));
    assert_eq!(told["kind"], "in-use");
    assert_eq!(bench.read("a", 6 * MIB, 8), b"precious");
    bench.run(&["disk", "resize", "a", "-9M"]).fails(2, &["8388608"]);
    assert_eq!(bench.json(&["disk", "resize", "a", "-4M", "--drop-data"])["size"], 4 * MIB);
    bench.ok(&["disk", "resize", "a", "8M"]);
    assert_eq!(bench.read("a", 6 * MIB, 8), [0; 8]);
    bench.is_clean("a");
}

#[test]
fn children_stand_on_sealed_disks_and_keep_them() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "base", "--size", "4M"]);
    bench.write("base", 0, &noise(1, 1 << 20));
    let early = bench.run(&["disk", "create", "c1", "--parent", "base"]);
    early.fails(2, &["disk base", "sealed", "disk seal base"]);

    let sealed = bench.json(&["disk", "seal", "base"]);

    assert_eq!(sealed["state"], "sealed");
    bench.run(&["disk", "seal", "base"]).fails(2, &["cannot seal disk base", "already"]);
    let child = bench.json(&["disk", "create", "c1", "--parent", "base"]);
    assert_eq!((&child["parent"], &child["depth"]), (&json!("base"), &json!(1)));
    assert_eq!(child["size"], 4 * MIB);
    bench.ok(&["disk", "create", "c2", "--parent", "base", "--size", "8M"]);
    bench.write("c1", 4097, b"child");
    let mut expected = noise(1, 1 << 20);
    assert!(bench.read("c2", 0, MIB) == expected);
    expected[4097..4102].copy_from_slice(b"child");
    assert!(bench.read("c1", 0, MIB) == expected);
    for verb in [&["write", "base"][..], &["discard", "base", "--offset", "0", "--length", "4k"]] {
        bench.run(&[&["disk"], verb].concat()).fails(9, &["disk base", "sealed"]);
    }
    let shown = bench.json(&["disk", "show", "base"]);
    assert_eq!(shown["dependents"], json!(["c1", "c2"]));
    let digest = shown["digest"].as_str().unwrap();
    assert!(digest.len() == 64 && digest != "0".repeat(64), "{digest}");
    let chain = bench.json(&["disk", "show", "c1"])["segments"].clone();
    assert_eq!((&chain[0]["digest"], &chain[1]["own"]), (&json!(digest), &json!(true)));

    let refused = bench.run(&["disk", "rm", "base", "--json"]).fails(5, &["c1, c2"]);
    assert_eq!(error(&refused)["kind"], "in-use");
    bench.ok(&["disk", "rm", "c1"]);
    bench.run(&["disk", "rm", "base"]).fails(5, &["c2"]);
    bench.ok(&["disk", "rm", "c2"]);
    bench.ok(&["disk", "rm", "base"]);
    assert_eq!(bench.files(".seg"), [""; 0]);
}

#[test]
fn a_sealed_disk_can_be_renamed_and_its_children_follow() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "base", "--size", "1M"]);
    bench.ok(&["disk", "seal", "base"]);
    bench.ok(&["disk", "create", "child", "--parent", "base"]);

    bench.ok(&["disk", "rename", "base", "ground"]);

    assert_eq!(bench.json(&["disk", "show", "child"])["parent"], "ground");
    assert!(fs::metadata(bench.segment("ground")).unwrap().permissions().readonly());
    bench.is_clean("ground");
    bench.is_clean("child");
}

#[test]
fn the_page_cache_can_be_bypassed() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "8M"]);
    let bytes = noise(1, 1_000_003);

    let args = ["--cache", "auto", "disk", "write", "a", "--offset", "4099"];
    bench.feed(&args, &bytes).ok();

    let length = bytes.len().to_string();
    let args = ["disk", "read", "a", "--offset", "4099", "--length", &length];
    for cache in ["auto", "buffered"] {
        assert!(bench.ok(&[&["--cache", cache][..], &args].concat()).out == bytes, "{cache}");
    }
    assert_eq!(bench.run(&["--cache", "none", "disk", "ls"]).code, 2);
}
