//! What is wrong with a store, and what is done about it.

use std::fs;
use std::os::unix::fs::FileExt as _;

use format::journal::{Record, encode_commit};
use format::limits::{PAGE, SUPERBLOCK_OFFSETS};
use format::superblock::{Attached, Superblock};
use format::units::{ExtentId, GuestExtent};
use serde_json::{Value, json};

use super::support::{Bench, noise};
use super::{MIB, has_fields};

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
