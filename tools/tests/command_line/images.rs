//! Images that go in and come out, and what differs between them.

use std::fs;

use serde_json::{Value, json};

use super::support::{Bench, noise, offshoot, run, sparse};
use super::{MIB, disk_and, has_fields};

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
