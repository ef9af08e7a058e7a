//! Every verb of the command line: what it does, its exit codes and the shape of its JSON.

#[allow(dead_code)] // Each test file uses a part of it.
mod support;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use format::journal::{Record, encode_commit};
use format::limits::{PAGE, SUPERBLOCK_OFFSETS};
use format::superblock::{Attached, Superblock};
use format::units::{ExtentId, GuestExtent};
use rustix::process::Signal;
use serde_json::{Value, json};
use support::{Bench, Ran, names, noise, offshoot, run, signal, sparse, until, wait};

const MIB: u64 = 1 << 20;

/// Names of the fields of an object.
fn fields(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

/// Fails the test unless an object has these fields and no others.
fn has_fields(value: &Value, expected: &[&str]) {
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    let mut found = fields(value);
    found.sort_unstable();
    assert_eq!(found, expected, "{value:#}");
}

const DISK: [&str; 9] =
    ["name", "disk", "segment", "size", "allocated", "state", "parent", "depth", "created"];

fn disk_and(more: &[&'static str]) -> Vec<&'static str> {
    [&DISK[..], more].concat()
}

/// The `error` object of a failure with `--json`, which is told on both ends.
fn error(ran: &Ran) -> Value {
    let told = ran.json();
    has_fields(&told, &["error"]);
    has_fields(&told["error"], &["kind", "object", "reason", "next", "message"]);
    let message = told["error"]["message"].as_str().expect("text");
    assert!(ran.err.contains(&format!("offshoot: {message}\n")), "{ran:?}");
    told["error"].clone()
}

#[test]
fn init_makes_a_store_once_and_only_in_an_empty_folder() {
    let bench = Bench::new();
    let other = bench.arg("other");

    let made = run(&mut offshoot(&["init", "--json", "-s", &other, "--tail-dir", "/dev/shm/x"]));

    let made = made.ok().json();
    has_fields(&made, &["path", "version", "store", "tail_dir"]);
    assert_eq!((&made["path"], &made["tail_dir"]), (&json!(other), &json!("/dev/shm/x")));
    bench.run(&["init"]).fails(4, &["it is a store already"]);
    let busy = bench.path("busy");
    fs::create_dir(&busy).unwrap();
    fs::write(busy.join("letter"), "dear").unwrap();
    let refused = run(offshoot(&["init", "--json", "--store"]).arg(&busy)).fails(4, &["letter"]);
    assert_eq!(error(&refused)["kind"], "exists");
    assert_eq!(names(&busy), ["letter"]);
}

#[test]
fn a_store_must_be_named_and_be_one() {
    let bench = Bench::new();

    run(&mut offshoot(&["disk", "ls"])).fails(2, &["--store", "OFFSHOOT_STORE"]);
    let missing = bench.arg("missing");
    let refused = run(&mut offshoot(&["disk", "ls", "--json", "--store", &missing]));
    let told = error(&refused.fails(3, &["it is not a store", "init"]));
    assert_eq!(told["kind"], "not-found");
    assert_eq!(told["object"], format!("store {missing}"));
    let by_environment = run(offshoot(&["disk", "ls"]).env("OFFSHOOT_STORE", bench.store()));
    assert!(by_environment.ok().text().starts_with("NAME"));
}

#[test]
fn a_command_line_that_makes_no_sense_is_exit_code_2() {
    let bench = Bench::new();

    for args in [
        &["disk", "frobnicate"][..],
        &["disk", "create", "a"],
        &["disk", "create", "a", "--size", "12 apples"],
        &["disk", "export", "a", "b", "--format", "vmdk"],
        &["disk", "discard", "a"],
        &[],
    ] {
        let ran = bench.run(args);
        assert_eq!((ran.code, ran.out.len()), (2, 0), "{ran:?}");
        let ran = bench.run(&[args, &["--json"]].concat());
        assert_eq!((ran.code, &ran.json()["error"]["kind"]), (2, &json!("invalid")), "{ran:?}");
    }
    for (args, words) in [
        (&["disk", "create", ".a", "--size", "1M"][..], "letters"),
        (&["disk", "create", "a", "--size", "1023k"], "1 MiB"),
        (&["disk", "create", "a", "--size", "1048577"], "512"),
        (&["disk", "create", "a", "--size", "1M", "--journal", "100k"], "64 KiB"),
    ] {
        bench.run(args).fails(2, &[words]);
    }
    assert_eq!(bench.disks(), [""; 0]);
}

#[test]
fn every_verb_explains_itself_with_examples() {
    let disk = "import create ls show map rm resize seal rename export compare check repair scrub \
                read write discard attach export-nbd detach limits resume";
    let disk = disk.split_whitespace().map(|verb| vec!["disk", verb]);
    let others = [
        "init",
        "store rebuild",
        "store df",
        "completions",
        "daemon start",
        "daemon status",
        "daemon stop",
        "job ls",
        "job watch",
        "job cancel",
        "events",
        "top",
    ];
    let others = others.map(|verb| verb.split(' ').collect());
    for verb in disk.chain(others) {
        for help in ["--help", "-h"] {
            let ran = run(&mut offshoot(&[&verb[..], &[help]].concat())).ok();
            let text = ran.text();
            assert!(text.contains("Examples:\n  offshoot"), "{verb:?}: {text}");
            assert!(text.contains("--json"), "{verb:?}");
        }
    }
    let all = run(&mut offshoot(&["--help"])).ok();
    for word in ["Exit codes", "OFFSHOOT_STORE", "tail-lost", "Examples:"] {
        assert!(all.text().contains(word), "{word}");
    }
    assert!(run(&mut offshoot(&["--version"])).ok().text().starts_with("offshoot "));
}

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
            "mode",
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
fn a_raw_image_goes_in_and_comes_out_the_same() {
    let bench = Bench::new();
    let (image, size) = (bench.path("in.raw"), 64 * MIB + 512);
    let (one, two) = (noise(1, 3 << 20), noise(2, 512));
    sparse(&image, size, &[(5 * MIB, &one), (20 * MIB, &[0; 1 << 20]), (size - 512, &two)]);
    let (from, to) = (bench.arg("in.raw"), bench.arg("out.raw"));

    let imported = bench.json(&["disk", "import", &from, "a"]);

    has_fields(&imported, &disk_and(&["source", "data_read", "data_written", "elapsed_ms"]));
    let source = json!({"path": from, "format": "raw", "size": size});
    assert_eq!((&imported["source"], &imported["size"]), (&source, &json!(size)));
    let written = imported["data_written"].as_u64().unwrap();
    assert!((3 * MIB..=3 * MIB + 8192).contains(&written), "{written}");
    let exported = bench.json(&["disk", "export", "a", &to]);
    let expected = ["disk", "path", "format", "size", "diff_from", "data_written", "elapsed_ms"];
    has_fields(&exported, &expected);
    assert!(fs::read(&image).unwrap() == fs::read(bench.path("out.raw")).unwrap());
    let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&to).unwrap()) * 512;
    assert!(allocated < 4 * MIB, "the file is sparse: {allocated}");
    bench.run(&["disk", "export", "a", &to]).fails(4, &["out.raw"]);
    bench.ok(&["disk", "export", "a", &to, "--overwrite"]);
    bench.run(&["disk", "import", &from, "a"]).fails(4, &["disk a"]);
    bench.run(&["disk", "import", &bench.arg("none"), "b"]).fails(3, &["none"]);
    bench.is_clean("a");
}

#[test]
fn an_import_may_make_the_disk_larger_and_never_smaller() {
    let bench = Bench::new();
    sparse(&bench.path("small"), 4096, &[(0, &[7; 4096])]);
    let from = bench.arg("small");

    bench.run(&["disk", "import", &from, "a"]).fails(2, &["disk a", "--size"]);
    bench.ok(&["disk", "import", &from, "a", "--size", "1M"]);

    assert_eq!(bench.read("a", 4095, 2), [7, 0]);
    let refused = bench.run(&["disk", "import", &from, "b", "--size", "2k"]);
    refused.fails(2, &["4096 bytes"]);
    fs::write(bench.path("odd"), [1; 1000]).unwrap();
    bench.run(&["disk", "import", &bench.arg("odd"), "b"]).fails(2, &["512"]);
    assert_eq!((bench.disks(), bench.files(".new").len()), (vec!["a".to_owned()], 0));
}

#[test]
fn a_raw_difference_holds_the_changed_ranges_and_lists_them() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "base", "--size", "64M"]);
    bench.write("base", 0, &noise(1, 8 << 20));
    bench.ok(&["disk", "seal", "base"]);
    bench.ok(&["disk", "create", "child", "--parent", "base"]);
    bench.write("child", MIB + 100, &noise(2, 5000));
    bench.ok(&["disk", "discard", "child", "--offset", "4M", "--length", "1M"]);
    bench.write("child", 60 * MIB, b"behind");
    let (base, diff) = (bench.arg("base.raw"), bench.arg("diff.raw"));
    bench.ok(&["disk", "export", "base", &base]);

    let told = bench.json(&["disk", "export", "child", &diff, "--diff-from", "base"]);

    let ranges: Vec<(u64, u64)> = told["ranges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| (r["offset"].as_u64().unwrap(), r["length"].as_u64().unwrap()))
        .collect();
    let expected = [(MIB, 8192), (4 * MIB, MIB), (60 * MIB, 4096)];
    assert_eq!(ranges, expected);
    let (mut whole, part) = (fs::read(&base).unwrap(), fs::read(&diff).unwrap());
    for (offset, len) in ranges {
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        whole[range.clone()].copy_from_slice(&part[range]);
    }
    assert!(whole == bench.ok(&["disk", "read", "child"]).out);
    bench.ok(&["disk", "rm", "child"]);
    let again = ["disk", "export", "base", &diff, "--diff-from", "base", "--overwrite", "--json"];
    assert_eq!(bench.ok(&again).json()["ranges"], json!([]));
    bench.run(&["disk", "export", "base", &diff, "--diff-from", "x"]).fails(3, &["disk x"]);
}

#[test]
fn compare_says_same_or_where_it_differs() {
    let bench = Bench::new();
    sparse(&bench.path("a.raw"), 32 * MIB, &[(0, &noise(1, 9 << 20)), (31 * MIB, &[1; 512])]);
    let image = bench.arg("a.raw");
    bench.ok(&["disk", "import", &image, "a"]);
    bench.ok(&["disk", "import", &image, "b"]);
    let keys = [
        "a",
        "b",
        "identical",
        "size_a",
        "size_b",
        "first_difference",
        "differing_bytes",
        "differing_blocks",
    ];

    for pair in [["a", "b"], ["a", &image], [&image, "b"], ["a", "a"]] {
        let same = bench.json(&["disk", "compare", pair[0], pair[1]]);
        has_fields(&same, &keys);
        assert_eq!((&same["identical"], &same["first_difference"]), (&json!(true), &Value::Null));
    }
    let (first, second) = (3 * MIB + 77, 20 * MIB + 5);
    bench.write("b", second, &[1]);
    let byte = bench.read("b", first, 1)[0];
    bench.write("b", first, &[!byte]);
    bench.write("b", first + 2, &[!bench.read("b", first + 2, 1)[0]]);

    for pair in [["a", "b"], ["b", &image]] {
        let different = bench.run(&["disk", "compare", pair[0], pair[1], "--json"]);
        assert_eq!(different.code, 1, "{different:?}");
        assert_eq!(different.json()["first_difference"], first);
        assert_eq!(different.json()["differing_bytes"], Value::Null);
        let all = bench.run(&["disk", "compare", pair[0], pair[1], "--all", "--json"]);
        assert_eq!((all.code, &all.json()["first_difference"]), (1, &json!(first)));
        assert_eq!(all.json()["differing_bytes"], 3);
        assert_eq!(all.json()["differing_blocks"], 2);
    }
    let text = bench.run(&["disk", "compare", "a", "b"]);
    assert!(text.text().contains(&format!("differ from byte {first} on")), "{text:?}");
    let silent = bench.run(&["disk", "compare", "a", "b", "--quiet"]);
    assert_eq!((silent.code, silent.text(), silent.err.as_str()), (1, "", ""));
    // Zeroes are the same whether they were never written, discarded or stored.
    bench.ok(&["disk", "create", "empty", "--size", "1M"]);
    bench.ok(&["disk", "create", "zero", "--size", "1M"]);
    bench.write("zero", 0, &[0; 65536]);
    bench.ok(&["disk", "discard", "zero", "--offset", "128k", "--length", "64k"]);
    bench.ok(&["disk", "compare", "empty", "zero"]);
    bench.ok(&["disk", "resize", "zero", "2M"]);
    let longer = bench.run(&["disk", "compare", "empty", "zero", "--json"]);
    assert_eq!((longer.code, &longer.json()["first_difference"]), (1, &Value::Null));
}

#[test]
fn compare_knows_files_from_disks() {
    let bench = Bench::new();
    sparse(&bench.path("x"), MIB, &[(0, b"file")]);
    let path = bench.arg("x");
    // Without a store, both may be files.
    run(&mut offshoot(&["disk", "compare", &path, &format!("file:{path}")])).ok();
    run(&mut offshoot(&["disk", "compare", &path, "nowhere"])).fails(2, &["--store"]);
    bench.run(&["disk", "compare", &path, "nowhere"]).fails(3, &["disk nowhere"]);
    bench.run(&["disk", "compare", &path, "./nowhere"]).fails(3, &["image ./nowhere"]);
    // A disk wins over a file of its name, unless `file:` says otherwise.
    bench.ok(&["disk", "create", "x", "--size", "1M"]);
    let in_folder = |args: &[&str]| run(bench.command(args).current_dir(bench.path("")));
    assert_eq!(in_folder(&["disk", "compare", "x", "file:x"]).code, 1);
    in_folder(&["disk", "compare", "x", "x"]).ok();
}

#[test]
fn check_scrub_and_repair_tell_what_they_found() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "base", "--size", "8M"]);
    bench.write("base", 0, &noise(1, 2 << 20));
    bench.ok(&["disk", "seal", "base"]);
    bench.ok(&["disk", "create", "c", "--parent", "base"]);
    bench.write("c", 5 * MIB, &noise(2, 8192));

    let report = bench.json(&["disk", "check", "c"]);
    has_fields(&report, &["disk", "segment", "name", "clean", "repairable", "problems", "stats"]);
    assert_eq!((&report["disk"], &report["clean"]), (&json!("c"), &json!(true)));
    assert_eq!(report["stats"]["own_data_bytes"], 8192);
    let scrubbed = bench.json(&["disk", "scrub", "c"]);
    let keys = ["disk", "clean", "problems", "summed_bytes", "unsummed_bytes", "segments"];
    has_fields(&scrubbed, &keys);
    assert_eq!(scrubbed["summed_bytes"], 2 * MIB);
    assert_eq!(scrubbed["unsummed_bytes"], 8192);
    let repaired = bench.json(&["disk", "repair", "c", "--dry-run"]);
    let keys = ["disk", "dry_run", "before", "after", "actions", "lost", "refused"];
    has_fields(&repaired, &keys);
    assert_eq!((&repaired["dry_run"], &repaired["after"]), (&json!(true), &Value::Null));
    assert_eq!(bench.json(&["disk", "repair", "c"])["after"]["clean"], true);

    // One bit of the sealed data turns.
    let map = bench.json(&["disk", "map", "base"]);
    let at = map[0]["file_offset"].as_u64().unwrap() + 4096;
    flip(&bench.segment("base"), at);
    bench.ok(&["disk", "check", "base"]);
    for verb in [&["check", "c", "--data"][..], &["scrub", "c"], &["scrub", "base"]] {
        let found = bench.run(&[&["disk"], verb, &["--json"]].concat());
        assert_eq!(found.code, 1, "{found:?}");
        let problem = &found.json()["problems"][0];
        has_fields(problem, &["what", "severity", "object", "detail", "range", "remedy"]);
        assert_eq!(problem["what"], "data-sum", "{problem:#}");
        assert_eq!(problem["range"], json!({"offset": 4096, "len": 4096}));
        let text = bench.run(&[&["disk"], verb].concat());
        assert!(text.text().contains("data-sum"), "{text:?}");
    }
    let out = bench.arg("out");
    bench.run(&["disk", "export", "c", &out, "--verify"]).fails(6, &["cannot export disk c"]);
    assert!(!bench.path("out").exists());
    bench.ok(&["disk", "export", "c", &out]);
}

fn flip(path: &std::path::Path, at: u64) {
    let was = fs::metadata(path).unwrap().permissions();
    let mut open = was.clone();
    std::os::unix::fs::PermissionsExt::set_mode(&mut open, 0o644);
    fs::set_permissions(path, open).unwrap();
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    fs::set_permissions(path, was).unwrap();
}

#[test]
fn a_damaged_superblock_copy_is_noted_and_repaired_on_active_and_sealed_disks() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "1M"]);
    bench.ok(&["disk", "create", "s", "--size", "1M"]);
    bench.ok(&["disk", "seal", "s"]);
    for disk in ["a", "s"] {
        flip(&bench.segment(disk), (256 << 10) + 100);

        let shown = bench.ok(&["disk", "show", disk]);
        assert!(shown.err.contains("warning: disk"), "{shown:?}");
        assert!(shown.err.contains("superblock copy 1"), "{shown:?}");
        let quiet = bench.ok(&["disk", "show", disk, "--quiet"]);
        assert_eq!(quiet.err, "");
        let checked = bench.run(&["disk", "check", disk, "--json"]);
        assert_eq!((checked.code, &checked.json()["repairable"]), (1, &json!(true)));
        let planned = bench.run(&["disk", "repair", disk, "--dry-run", "--json"]);
        assert_eq!(
            (planned.code, &planned.json()["actions"][0]["action"]),
            (1, &json!("rewrite-superblocks"))
        );
        bench.ok(&["disk", "repair", disk]);
        bench.is_clean(disk);
    }
    assert!(fs::metadata(bench.segment("s")).unwrap().permissions().readonly());
}

/// Puts records into the journal of a closed disk, which no writer would make.
fn forge(path: &std::path::Path, records: impl FnOnce(&Superblock) -> Vec<Record>) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, 0).unwrap();
    let sb = Superblock { attached: Attached::Plain, ..Superblock::decode(&page, 0).unwrap() };
    let (pages, _) = encode_commit(&sb.journal, sb.segment, sb.journal_pages(), &records(&sb));
    for page in pages {
        file.write_all_at(&page.bytes, sb.journal_offset(page.position)).unwrap();
    }
    for (copy, offset) in SUPERBLOCK_OFFSETS.into_iter().enumerate() {
        file.write_all_at(&sb.encode(copy), offset).unwrap();
    }
}

/// Whoever only reads such a disk must be told which ranges may show the data of others.
#[test]
fn space_that_is_used_twice_is_warned_about_and_unshared_on_request() {
    const EXTENT: u64 = 64 << 10;
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "1M"]);
    bench.write("a", 0, &noise(1, 4096));
    forge(&bench.segment("a"), |sb| {
        // An extent of the file that is in no use.
        let target = ExtentId(sb.data_start().0 + 9).block(0);
        let map =
            |extent| Record::Map { block: GuestExtent(extent).first_block(), count: 16, target };
        vec![map(3), map(8)]
    });

    for verb in [&["disk", "show", "a"][..], &["disk", "read", "a", "--length", "4096"]] {
        let ran = bench.ok(verb);
        for offset in [3 * EXTENT, 8 * EXTENT] {
            let line = format!("warning: disk a: byte offset {offset}: extent ");
            let line = ran.err.lines().find(|l| l.contains(&line)).expect("a warning");
            assert!(
                line.contains("is used twice: what is read here may belong elsewhere"),
                "{line}"
            );
        }
        assert!(ran.err.contains("`offshoot disk check`"), "{ran:?}");
    }
    let write = ["disk", "write", "a", "--offset", "0"];
    let refused = bench.feed(&write, &noise(2, 4096));
    refused.fails(6, &["used twice", "disk check", "disk repair"]);
    let checked = bench.run(&["disk", "check", "a", "--json"]).json();
    assert_eq!(checked["problems"][0]["remedy"], "repair-unshare");
    bench.ok(&["disk", "repair", "a", "--unshare"]);
    bench.is_clean("a");
    bench.write("a", 0, &noise(2, 4096));
}

#[test]
fn the_store_is_measured_and_rebuilt() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "10G"]);
    bench.write("a", 0, &noise(1, 4 << 20));
    bench.ok(&["disk", "create", "b", "--size", "1M"]);

    let df = bench.json(&["store", "df"]);

    has_fields(&df, &["path", "total", "free", "used", "virtual_size", "disks"]);
    let number = |key: &str| df[key].as_u64().unwrap();
    assert!(number("total") > number("free"));
    assert!(number("used") > 4 * MIB && number("used") < 8 * MIB, "{df:#}");
    assert_eq!(number("virtual_size"), (10 << 30) + MIB);
    has_fields(&df["disks"][0], &["name", "size", "allocated"]);
    assert!(bench.ok(&["store", "df"]).text().contains("left on the file system"));
    let rebuilt = bench.json(&["store", "rebuild"]);
    has_fields(&rebuilt, &["disks", "renamed", "unreadable", "missing"]);
    assert_eq!(rebuilt["disks"], json!(["a", "b"]));
    assert_eq!(bench.ok(&["store", "rebuild"]).text(), "found 2 disks\n");
}

#[test]
fn completions_are_scripts() {
    for (shell, word) in [("bash", "complete"), ("zsh", "#compdef"), ("fish", "complete -c")] {
        let script = run(&mut offshoot(&["completions", shell])).ok();
        assert!(script.text().contains(word), "{shell}");
        let told = run(&mut offshoot(&["completions", shell, "--json"])).ok().json();
        assert_eq!(told, json!({"shell": shell, "script": script.text()}));
    }
    assert_eq!(run(&mut offshoot(&["completions", "ed"])).code, 2);
}

#[test]
fn quiet_verbs_say_nothing_but_what_was_asked_for() {
    let bench = Bench::new();
    sparse(&bench.path("in"), MIB, &[(0, b"x")]);
    let (from, to) = (bench.arg("in"), bench.arg("out"));
    for args in [
        &["disk", "import", &from, "a"][..],
        &["disk", "export", "a", &to],
        &["disk", "compare", "a", &to],
        &["disk", "check", "a"],
        &["disk", "resize", "a", "2M"],
        &["disk", "rename", "a", "b"],
        &["disk", "seal", "b"],
        &["disk", "scrub", "b"],
        &["disk", "rm", "b"],
    ] {
        let ran = bench.ok(&[args, &["--quiet"]].concat());
        assert_eq!((ran.text(), ran.err.as_str()), ("", ""), "{args:?}");
    }
    assert!(bench.ok(&["disk", "ls", "--quiet"]).text().starts_with("NAME"));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "64M"]);
    bench.write("a", MIB, b"data");
    for args in [
        &["disk", "read", "a"][..],
        &["disk", "map", "a"],
        &["disk", "map", "a", "--json"],
        &["disk", "show", "a", "--json"],
        &["completions", "bash"],
        &["--help"],
    ] {
        let mut child = bench.start(args);
        drop(child.stdout.take());
        drop(child.stdin.take());
        let ran = wait(child);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{args:?}");
    }
}

#[test]
fn a_signal_ends_a_waiting_write_and_keeps_what_came_before() {
    use std::io::Write as _;
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "16M"]);
    let bytes = noise(1, 3 << 20);
    for (which, name) in [(Signal::INT, "int"), (Signal::TERM, "term"), (Signal::HUP, "hup")] {
        let mut child = bench.start(&["disk", "write", "a", "--json"]);
        let mut pipe = child.stdin.take().unwrap();
        pipe.write_all(&bytes).unwrap();
        // All but the last pipeful was taken by the verb; give it the time to write that.
        std::thread::sleep(Duration::from_millis(300));

        signal(&child, which);
        let ran = wait(child).fails(130, &["cannot write disk a", "signal"]);

        assert_eq!(error(&ran)["kind"], "cancelled", "{name}");
        assert!(bench.read("a", 0, 2 * MIB) == bytes[..2 << 20], "{name}");
        assert_eq!(bench.json(&["disk", "show", "a"])["attached"], "no", "closed in order");
        bench.is_clean("a");
    }
}

/// Runs a verb until a signal, sent as soon as `begun` holds, ends it; it may be done before.
fn interrupted(bench: &Bench, args: &[&str], begun: impl Fn() -> bool, undo: impl Fn()) {
    for _ in 0..20 {
        let mut child = bench.start(args);
        drop(child.stdin.take());
        let mut early = false;
        until("it begins", || {
            early = child.try_wait().unwrap().is_some();
            early || begun()
        });
        if !early {
            signal(&child, Signal::INT);
        }
        let ran = wait(child);
        if ran.code == 0 {
            undo();
            continue;
        }
        ran.fails(130, &["cannot", "signal"]);
        return;
    }
    panic!("{args:?} was always faster than the signal");
}

#[test]
fn a_signal_leaves_nothing_of_an_import_or_an_export() {
    let bench = Bench::new();
    // Stored zeroes take the time that it takes to read them, and no space in the store.
    fs::write(bench.path("big"), vec![0; 400 << 20]).unwrap();
    let (from, to) = (bench.arg("big"), bench.arg("out"));

    let import = ["disk", "import", &from, "a"];
    let begun = || !bench.files(".new").is_empty();
    interrupted(&bench, &import, begun, || drop(bench.ok(&["disk", "rm", "a"])));
    assert_eq!(bench.disks(), [""; 0]);
    assert_eq!((bench.files(".new").len(), bench.files(".seg").len()), (0, 0));

    bench.ok(&["disk", "create", "b", "--size", "256M"]);
    bench.write("b", 0, &noise(1, 128 << 20));
    let before = names(&bench.path("")).len();
    let export = ["disk", "export", "b", &to];
    let begun = || names(&bench.path("")).len() > before;
    interrupted(&bench, &export, begun, || fs::remove_file(&to).unwrap());
    assert_eq!(names(&bench.path("")).len(), before);
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
