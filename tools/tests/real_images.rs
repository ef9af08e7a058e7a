//! Images made by QEMU's tools go in and come out the same; time and space go with the data; a kill
//! at any moment leaves a store that opens, with everything in it that was finished.

#[allow(dead_code)] // Each test file uses a part of it.
mod support;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use offshoot_tests::mount::{have, run as tool};
use rustix::process::Signal;
use serde_json::json;
use support::{Bench, OFFSHOOT, names, noise, signal, sparse, until, wait};

const MIB: u64 = 1 << 20;

fn qemu_img(args: &[&str]) -> String {
    tool("qemu-img", args)
}

/// Fails the test unless QEMU reads the same content from both files.
fn identical(a: &str, b: &str) {
    assert_eq!(qemu_img(&["compare", a, b]).trim(), "Images are identical.");
}

/// A chain of three qcow2 images with compressed, zeroed, discarded and plain clusters, and what it
/// reads as: the paths of its top and of a raw image made by QEMU.
fn chain(bench: &Bench, size: u64) -> (String, String) {
    let [raw, base, middle, top, golden] =
        ["raw", "base.qcow2", "middle.qcow2", "top.qcow2", "golden.raw"].map(|n| bench.arg(n));
    let piece = noise(1, 5 << 20);
    let tail = noise(2, 512);
    sparse(bench.path("raw").as_path(), size, &[(MIB + 512, &piece), (size - 512, &tail)]);
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &base]);
    let over = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    qemu_img(&[&over[..], &[&base, &middle]].concat());
    let writes = ["write -P 0x5a 2M 192k", "write -P 0x11 20M 1M", "write -P 0x22 33333504 5120"];
    let writes: Vec<&str> = writes.iter().flat_map(|w| ["-c", w]).collect();
    tool("qemu-io", &[&writes[..], &[&middle]].concat());
    qemu_img(&[&over[..], &[&middle, &top]].concat());
    let zeroes = ["write -z 2M 64k", "write -z 20M 512k", "discard 4M 1M", "write -P 7 0 512"];
    let zeroes: Vec<&str> = zeroes.iter().flat_map(|w| ["-c", w]).collect();
    tool("qemu-io", &[&zeroes[..], &[&top]].concat());
    qemu_img(&["convert", "-O", "raw", &top, &golden]);
    (top, golden)
}

#[test]
fn a_qcow2_chain_goes_in_and_comes_out_as_qemu_reads_it() {
    if !have("a_qcow2_chain_goes_in_and_comes_out_as_qemu_reads_it", &["qemu-img", "qemu-io"]) {
        return;
    }
    let bench = Bench::new();
    for (disk, size) in [("a", 64 * MIB), ("odd", 64 * MIB + 512)] {
        let (top, golden) = chain(&bench, size);

        let imported = bench.json(&["disk", "import", &top, disk]);

        assert_eq!(imported["source"], json!({"path": top, "format": "qcow2", "size": size}));
        bench.ok(&["disk", "compare", disk, &golden]);
        bench.ok(&["disk", "compare", disk, &top]);
        let (raw, qcow2) = (bench.arg("out.raw"), bench.arg("out.qcow2"));
        bench.ok(&["disk", "export", disk, &raw, "--overwrite"]);
        bench.ok(&["disk", "export", disk, &qcow2, "--format", "qcow2", "--overwrite"]);
        identical(&raw, &golden);
        identical(&qcow2, &golden);
        qemu_img(&["check", &qcow2]);
        bench.is_clean(disk);
    }
    let map = bench.json(&["disk", "map", "a"]);
    let zero = map.as_array().unwrap().iter().any(|r| r["state"] == "zero");
    assert!(zero, "explicit zeroes stay explicit: {map:#}");
}

#[test]
fn vmdk_and_vhdx_go_in_as_qemu_reads_them() {
    if !have("vmdk_and_vhdx_go_in_as_qemu_reads_them", &["qemu-img", "qemu-io"]) {
        return;
    }
    let bench = Bench::new();
    let (top, golden) = chain(&bench, 64 * MIB);
    let sparse = "subformat=monolithicSparse";
    let stream = "subformat=streamOptimized";
    for (disk, format, option) in [
        ("sparse", "vmdk", sparse),
        ("stream", "vmdk", stream),
        ("dynamic", "vhdx", "subformat=dynamic"),
        ("fixed", "vhdx", "subformat=fixed"),
    ] {
        let image = bench.arg(disk);
        qemu_img(&["convert", "-O", format, "-o", option, &top, &image]);

        let imported = bench.json(&["disk", "import", &image, disk]);

        assert_eq!(imported["source"]["format"], format);
        bench.ok(&["disk", "compare", disk, &golden]);
        let written = imported["data_written"].as_u64().unwrap();
        assert!(written < 10 * MIB, "{disk}: zeroes are not stored: {written}");
    }
}

#[test]
fn a_qcow2_difference_is_an_overlay_for_qemu() {
    if !have("a_qcow2_difference_is_an_overlay_for_qemu", &["qemu-img", "qemu-io"]) {
        return;
    }
    let bench = Bench::new();
    let (top, _) = chain(&bench, 64 * MIB + 512);
    bench.ok(&["disk", "import", &top, "base"]);
    bench.ok(&["disk", "seal", "base"]);
    bench.ok(&["disk", "create", "child", "--parent", "base"]);
    bench.write("child", 3 * MIB + 77, &noise(3, 100_000));
    bench.write("child", 50 * MIB, &noise(4, 4096));
    bench.write("child", 64 * MIB, &noise(5, 512));
    // Zeroes over data of the base, in whole clusters and in parts of them.
    bench.ok(&["disk", "discard", "child", "--offset", "1M", "--length", "1M"]);
    bench.ok(&["disk", "discard", "child", "--offset", "4098k", "--length", "8k"]);
    bench.write("child", 5 * MIB, &[0; 70_000]);
    let [base, child, diff] = ["base.raw", "child.raw", "diff.qcow2"].map(|n| bench.arg(n));
    bench.ok(&["disk", "export", "base", &base]);
    bench.ok(&["disk", "export", "child", &child]);

    let told =
        bench.json(&["disk", "export", "child", &diff, "--format", "qcow2", "--diff-from", "base"]);

    qemu_img(&["check", &diff]);
    qemu_img(&["rebase", "-u", "-F", "raw", "-b", &base, &diff]);
    identical(&diff, &child);
    let written = told["data_written"].as_u64().unwrap();
    assert!(written < 2 * MIB, "only what changed: {written}");
}

#[test]
fn a_sparse_image_of_100_gib_takes_time_and_space_by_its_data() {
    let bench = Bench::new();
    let size = 100 << 30;
    let pieces: Vec<Vec<u8>> = (0..50).map(|seed| noise(seed, 65_536)).collect();
    let places: Vec<(u64, &[u8])> =
        (0..).step_by(2 << 30).zip(pieces.iter().map(Vec::as_slice)).collect();
    sparse(&bench.path("big"), size, &places);
    let (from, to) = (bench.arg("big"), bench.arg("out"));
    let start = Instant::now();

    let imported = bench.json(&["disk", "import", &from, "a", "--format", "raw"]);

    let data = 50 * 65_536;
    assert_eq!(imported["data_read"], data);
    assert_eq!(imported["data_written"], data);
    let allocated = imported["allocated"].as_u64().unwrap();
    assert!(allocated < 2 * data, "{allocated}");
    bench.ok(&["disk", "compare", "a", &from]);
    let exported = bench.json(&["disk", "export", "a", &to]);
    assert_eq!(exported["data_written"], data);
    bench.ok(&["disk", "compare", "a", &to]);
    for (offset, bytes) in &places {
        assert!(bench.read("a", *offset, 65_536) == *bytes);
    }
    // At the speed of a fast disk, 100 GiB read four times take minutes.
    let took = start.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
}

#[test]
fn a_killed_import_leaves_nothing_after_the_next_command() {
    let bench = Bench::new();
    fs::write(bench.path("big"), vec![1; 256 << 20]).unwrap();
    let from = bench.arg("big");
    let mut killed = 0;
    for round in 0_u64..8 {
        let mut child = bench.start(&["disk", "import", &from, "a"]);
        let mut done = false;
        until("it begins", || {
            done = child.try_wait().unwrap().is_some();
            done || !bench.files(".new").is_empty()
        });
        sleep(Duration::from_millis(round * 20));
        let _ = child.kill();
        let ran = wait(child);

        if ran.code == 0 {
            bench.ok(&["disk", "rm", "a"]);
            continue;
        }
        killed += 1;
        // It may have been killed behind its point of no return: then it is there, complete.
        if bench.disks() == ["a"] {
            bench.ok(&["disk", "compare", "a", &from]);
            bench.ok(&["disk", "rm", "a"]);
        } else {
            let next = bench.ok(&["disk", "create", "b", "--size", "1M"]);
            assert!(next.err.contains("never finished"), "{next:?}");
            bench.ok(&["disk", "rm", "b"]);
        }
        assert_eq!((bench.files(".new").len(), bench.files(".seg").len()), (0, 0));
    }
    assert!(killed > 0, "no import was killed");
}

#[test]
fn a_killed_export_has_no_name_yet() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "256M"]);
    bench.write("a", 0, &noise(1, 200 << 20));
    let out = bench.arg("out");
    for round in 0..4 {
        let mut child = bench.start(&["disk", "export", "a", &out]);
        sleep(Duration::from_millis(10 + round * 30));
        let _ = child.kill();
        if wait(child).code == 0 || bench.path("out").exists() {
            bench.ok(&["disk", "compare", "a", &out]);
            fs::remove_file(&out).unwrap();
        }
        let left = names(&bench.path(""));
        let ours = |n: &String| n == "store" || (n.starts_with(".offshoot-") && n.ends_with("l"));
        assert!(left.iter().all(ours), "{left:?}");
    }
    bench.is_clean("a");
}

/// Writes slot after slot until it is killed; slot `i` holds noise `i`. Each line of its output is
/// a slot whose write was acknowledged.
fn writer(bench: &Bench) -> Child {
    let script = r#"
        i=$1
        while :; do
            "$OFFSHOOT" disk write a --quiet --offset $((i * 65536)) < "$DIR/$i" || exit 1
            echo $i
            i=$((i + 1))
        done"#;
    Command::new("sh")
        .args(["-c", script, "writer", "0"])
        .env("OFFSHOOT", OFFSHOOT)
        .env("OFFSHOOT_STORE", bench.store())
        .env("DIR", bench.path("slots"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("a shell")
}

#[test]
fn a_killed_write_loop_keeps_every_acknowledged_write() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "base", "--size", "64M"]);
    bench.write("base", 0, &noise(77, 64 << 20));
    bench.ok(&["disk", "seal", "base"]);
    fs::create_dir(bench.path("slots")).unwrap();
    let slot = |i: u64| noise(1000 + i, 65_536);
    for i in 0..1024 {
        fs::write(bench.path("slots").join(i.to_string()), slot(i)).unwrap();
    }
    for round in 0_u64..6 {
        bench.ok(&["disk", "create", "a", "--parent", "base"]);
        let mut child = writer(&bench);
        let mut output = BufReader::new(child.stdout.take().unwrap());
        // However slow the machine is, something was acknowledged before the kill.
        let mut lines = String::new();
        output.read_line(&mut lines).unwrap();
        sleep(Duration::from_millis(round * 37));
        child.kill().unwrap();
        child.wait().unwrap();
        // The pipe ends with the last writer that the shell started: one may still be at it.
        output.read_to_string(&mut lines).unwrap();

        let done = lines.lines().count() as u64;
        assert!(done > 0, "the loop ended by itself");
        bench.is_clean("a");
        for i in 0..done {
            assert!(bench.read("a", i * 65_536, 65_536) == slot(i), "slot {i} of {done}");
        }
        let rest = (done + 1) * 65_536;
        let base = noise(77, 64 << 20);
        let from = usize::try_from(rest).unwrap();
        assert!(bench.read("a", rest, MIB) == base[from..from + (1 << 20)]);
        bench.ok(&["disk", "rm", "a"]);
    }
    bench.is_clean("base");
}

#[test]
fn a_write_killed_in_the_middle_leaves_a_clean_disk() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "64M"]);
    bench.write("a", 0, &noise(1, 1 << 20));
    for round in 0_u64..10 {
        let mut child = bench.start(&["disk", "write", "a", "--offset", "1M"]);
        let mut pipe = child.stdin.take().unwrap();
        pipe.write_all(&noise(round, 8 << 20)).unwrap();
        sleep(Duration::from_millis(round * 5));
        signal(&child, Signal::KILL);
        drop(pipe);
        assert_eq!(wait(child).code, 137);

        bench.is_clean("a");
        assert!(bench.read("a", 0, MIB) == noise(1, 1 << 20), "what was flushed stays");
    }
    bench.write("a", MIB, &noise(9, 8 << 20));
    assert!(bench.read("a", MIB, 8 * MIB) == noise(9, 8 << 20));
}
