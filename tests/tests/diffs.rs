//! Differences as files: what `disk export --diff-from` writes, `disk import --over` applies to a
//! disk of the same content in another store, without a daemon and with one. It gives the disk
//! back to the last byte, whatever was written, discarded or resized; over anything else, or from a
//! file that is not as it was exported, it gives nothing.

use std::cell::Cell;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use offshoot_tests::command::{Bench, each};
use offshoot_tests::daemon::program;
use offshoot_tests::pattern;
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::store::TestStore;
use offshoot_tests::{skip, tool, until};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const REPEAT: &str = "cargo test -p offshoot-tests --test diffs";

fn arg(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// Files of segments, finished or not.
fn segment_files(store: &TestStore) -> Vec<String> {
    let names = fs::read_dir(store.store()).unwrap().map(|f| f.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap());
    let mut names: Vec<String> =
        names.filter(|n| n.ends_with(".seg") || n.ends_with(".new")).collect();
    names.sort_unstable();
    names
}

fn put(rng: &mut Rng, store: &TestStore, disk: &str, (size, tag): (u64, u32)) {
    let first = rng.below(size / 512);
    let longest = if rng.one_in(3) { 800 } else { 40 };
    let count = (1 + rng.below(longest)).min(size / 512 - first);
    let zeroes = vec![0; usize::try_from(count * 512).unwrap()];
    match rng.below(5) {
        0 => store.write(disk, first * 512, &zeroes),
        _ => store.write(disk, first * 512, &pattern::bytes(tag, first, count)),
    }
}

fn discard(rng: &mut Rng, store: &TestStore, disk: &str, size: u64) {
    let first = rng.below(size / 512);
    let count = (1 + rng.below(1_000)).min(size / 512 - first);
    let (offset, length) = ((first * 512).to_string(), (count * 512).to_string());
    store.done(&["disk", "discard", disk, "--offset", &offset, "--length", &length]);
}

fn resize(store: &TestStore, disk: &str, size: u64) {
    store.done(&["disk", "resize", disk, &size.to_string(), "--drop-data"]);
}

/// Writes, discards and resizes.
fn change(rng: &mut Rng, store: &TestStore, (disk, tag): (&str, u32), mut size: u64) -> u64 {
    for _ in 0..1 + rng.below(7) {
        match rng.below(6) {
            0 | 1 => discard(rng, store, disk, size),
            2 => {
                size = MIB + rng.below(MIB / 512) * 512;
                resize(store, disk, size);
            }
            _ => put(rng, store, disk, (size, tag)),
        }
    }
    size
}

fn export_difference(store: &TestStore, disk: &str, from: &str, to: &Path) -> Value {
    store.json(&["disk", "export", disk, arg(to), "--format", "qcow2", "--diff-from", from])
}

/// A store with a sealed disk `g0`, and another one with the same content by another name, which
/// was brought there as a whole: its segment, and the places in it, are others.
fn replicas(rng: &mut Rng, here: &TestStore, there: &TestStore) -> u64 {
    let size = MIB + rng.below(MIB / 512) * 512;
    here.done(&["disk", "create", "g0", "--size", &size.to_string()]);
    here.write("g0", 0, &pattern::bytes(1, 0, size / 512));
    discard(rng, here, "g0", size);
    put(rng, here, "g0", (size, 2));
    here.done(&["disk", "seal", "g0"]);
    let whole = here.path("whole.raw");
    here.done(&["disk", "export", "g0", arg(&whole)]);
    there.done(&["disk", "import", arg(&whole), "r0", "--format", "raw"]);
    there.done(&["disk", "seal", "r0"]);
    size
}

fn try_generations(seed: u64, here: &TestStore, there: &TestStore) {
    let mut rng = Rng::new(seed);
    let mut size = replicas(&mut rng, here, there);
    for n in 1..=4_u32 {
        let [last, next] = [n - 1, n].map(|n| format!("g{n}"));
        let [below, made] = [n - 1, n].map(|n| format!("r{n}"));
        here.done(&["disk", "create", &next, "--parent", &last]);
        size = change(&mut rng, here, (&next, n + 2), size);
        if rng.one_in(3) {
            // Part of the content is in a segment below that is no disk of its own.
            here.done(&["disk", "fork", &next, &format!("f{n}")]);
            size = change(&mut rng, here, (&next, n + 20), size);
        }
        // Not sealed yet: only what it is made from has to be.
        let file = here.path(&format!("{n}.qcow2"));
        export_difference(here, &next, &last, &file);

        let told = there.json(&["disk", "import", arg(&file), &made, "--over", &below]);

        assert_eq!((&told["over"], &told["parent"]), (&below.clone().into(), &below.into()));
        assert!(here.read(&next) == there.read(&made), "seed {seed}, generation {n}");
        there.done(&["disk", "check", &made]);
        here.done(&["disk", "seal", &next]);
        there.done(&["disk", "seal", &made]);
    }
    // Several generations in one, and back to where it came from.
    let file = there.path("all.qcow2");
    export_difference(there, "r4", "r1", &file);
    here.done(&["disk", "import", arg(&file), "back", "--over", "g1"]);
    assert!(here.read("back") == here.read("g4"), "seed {seed}, all generations");
    // What was dropped by a smaller size must not come back.
    let read = here.read("back");
    resize(here, "back", size + MIB);
    let mut longer = read;
    longer.resize(usize::try_from(size + MIB).unwrap(), 0);
    assert!(here.read("back") == longer, "seed {seed}, past the end");
}

#[test]
fn generations_are_replicated_by_files() {
    let seed = seed(1);
    println!("repeat with OFFSHOOT_SEED={seed} {REPEAT}");
    for n in 0..if soak() { 100 } else { 3 } {
        each(|here| try_generations(seed + n, here, &Bench::new(false)));
    }
    let here = Bench::new(false);
    each(|there| try_generations(seed + 1_000, &Bench::new(false), there));
    try_generations(seed + 2_000, &here, &Bench::new(true));
}

/// A sealed disk `base` and the file of a difference over it.
fn difference(store: &TestStore) -> std::path::PathBuf {
    store.done(&["disk", "create", "base", "--size", "4M"]);
    store.write("base", 0, &pattern::bytes(1, 0, 4_096));
    store.done(&["disk", "seal", "base"]);
    store.done(&["disk", "create", "child", "--parent", "base"]);
    store.write("child", 64 << 10, &pattern::bytes(2, 128, 1_024));
    store.done(&["disk", "discard", "child", "--offset", "1M", "--length", "512k"]);
    let file = store.path("diff.qcow2");
    export_difference(store, "child", "base", &file);
    file
}

#[test]
fn another_base_is_refused_by_name() {
    each(|store| {
        let file = difference(store);
        let file = arg(&file);
        // One bit is different; the size is; nothing but the name is.
        for (name, size) in [("bit", 4 * MIB), ("size", 4 * MIB + 512), ("same", 4 * MIB)] {
            store.done(&["disk", "create", name, "--size", &size.to_string()]);
            let mut bytes = pattern::bytes(1, 0, 4_096);
            bytes[1_000_000] ^= u8::from(name == "bit");
            store.write(name, 0, &bytes);
        }
        let over = |base: &str, code| {
            store.refused(&["disk", "import", file, "new", "--over", base], code)
        };
        let before = segment_files(store);

        let said = over("same", 2);
        assert!(said.contains("only a sealed disk") && said.contains("disk seal same"), "{said}");
        for name in ["bit", "size", "same"] {
            store.done(&["disk", "seal", name]);
        }
        for wrong in ["bit", "size", "child"] {
            if wrong == "child" {
                store.done(&["disk", "seal", wrong]);
            }
            let said = over(wrong, 11);
            assert!(said.contains("disk base (") && said.contains(&format!("disk {wrong} (")));
        }
        assert!(over("none", 3).contains("disk none"));
        store.refused(&["disk", "import", file, "child", "--over", "base"], 4);
        store.refused(&["disk", "import", file, "base", "--over", "base"], 4);
        let said = store.refused(&["disk", "import", file, "new"], 2);
        assert!(said.contains("a difference over disk base"), "{said}");
        assert_eq!(segment_files(store), before);

        store.done(&["disk", "import", file, "new", "--over", "same"]);
        assert!(store.read("new") == store.read("child"));
        assert_eq!(store.json(&["disk", "show", "new"])["parent"], "same");
    });
}

#[test]
fn what_does_not_say_what_it_was_made_from_is_refused() {
    each(|store| {
        difference(store);
        let [raw, whole, unsealed] = ["d.raw", "w.qcow2", "u.qcow2"].map(|n| store.path(n));
        store.done(&["disk", "export", "child", arg(&raw), "--diff-from", "base"]);
        store.done(&["disk", "export", "child", arg(&whole), "--format", "qcow2"]);
        store.done(&["disk", "fork", "child", "twin"]);
        let args = ["--format", "qcow2", "--diff-from", "twin"];
        let args = [&["disk", "export", "child", arg(&unsealed)][..], &args].concat();
        let told = store.offshoot(&args);
        assert!(told.status.success());
        let note = String::from_utf8_lossy(&told.stderr).into_owned();
        assert!(note.contains("disk twin is not sealed"), "{note}");

        let over = |path| store.refused(&["disk", "import", arg(path), "new", "--over", "base"], 8);
        assert!(over(&raw).contains("does not tell what became zero"));
        assert!(over(&whole).contains("does not say what it was made from"));
        assert!(over(&unsealed).contains("does not say what it was made from"));
        let size = ["disk", "import", arg(&raw), "new", "--over", "base", "--size", "8M"];
        store.refused(&size, 2);
    });
}

/// Cut short anywhere, and with a bit turned over in every 512 bytes that mean something: either
/// it is refused and nothing is there, or the damage was where nothing is stored.
#[test]
fn a_file_that_is_damaged_is_refused_and_leaves_nothing() {
    each(|store| {
        let file = difference(store);
        let good = fs::read(&file).unwrap();
        let want = store.read("child");
        let before = segment_files(store);
        let refused = Cell::new(0);
        let try_bytes = |what: &str, bytes: &[u8]| {
            fs::write(&file, bytes).unwrap();
            let args = ["disk", "import", arg(&file), "new", "--over", "base"];
            let output = store.offshoot(&args);
            if output.status.success() {
                assert!(store.read("new") == want, "{what}");
                store.done(&["disk", "rm", "new"]);
            } else {
                let code = output.status.code().unwrap();
                assert!([2, 6, 8, 10, 11].contains(&code), "{what}: {output:?}");
                refused.set(refused.get() + 1);
            }
            assert_eq!(segment_files(store), before, "{what}");
            output.status.success()
        };
        for part in [0, 100, 512, 65_536, 70_000, good.len() / 2] {
            assert!(!try_bytes(&format!("{part} bytes"), &good[..part]), "{part} bytes are taken");
        }
        let mut rng = Rng::new(1);
        let stored: Vec<usize> = (0..good.len() / 512)
            .filter(|n| good[n * 512..][..512].iter().any(|byte| *byte != 0))
            .collect();
        for _ in 0..20 {
            let sector = stored[usize::try_from(rng.below(stored.len() as u64)).unwrap()];
            let at = sector * 512 + usize::try_from(rng.below(512)).unwrap();
            let mut bytes = good.clone();
            bytes[at] ^= 1 << rng.below(8);
            try_bytes(&format!("a bit of byte {at}"), &bytes);
        }
        assert!(refused.get() > 15, "{refused:?}");
        assert!(try_bytes("nothing", &good));
    });
}

/// Zeroes in the file that its file system stores nothing for are zeroes of the disk: once they
/// were taken for what the difference does not change, and the base's content came back.
#[test]
fn holes_of_the_file_are_no_holes_of_the_difference() {
    each(|store| {
        store.done(&["disk", "create", "base", "--size", "1M"]);
        store.write("base", 0, &pattern::bytes(1, 0, 2_048));
        store.done(&["disk", "seal", "base"]);
        store.done(&["disk", "create", "child", "--parent", "base"]);
        let mut cluster = vec![0; 64 << 10];
        cluster[..512].copy_from_slice(&pattern::bytes(2, 0, 1));
        store.write("child", 0, &cluster);
        let [dense, sparse] = ["dense.qcow2", "sparse.qcow2"].map(|n| store.path(n));
        export_difference(store, "child", "base", &dense);
        let bytes = fs::read(&dense).unwrap();
        let file = OpenOptions::new().write(true).create_new(true).open(&sparse).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (at, piece) in (0..).step_by(4_096).zip(bytes.chunks(4_096)) {
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, at).unwrap();
            }
        }

        store.done(&["disk", "import", arg(&sparse), "new", "--over", "base"]);

        assert!(store.read("new") == store.read("child"));
    });
}

/// A client that was killed while the daemon began its import left a session that nobody could end:
/// the daemon looked for the sessions of the connection before this one was among them.
#[test]
fn a_killed_import_leaves_nothing() {
    each(|store| {
        let size = 96 * MIB;
        store.done(&["disk", "create", "base", "--size", &size.to_string()]);
        store.write("base", 0, &pattern::bytes(1, 0, 4_096));
        store.done(&["disk", "seal", "base"]);
        store.done(&["disk", "create", "child", "--parent", "base"]);
        store.write("child", 0, &pattern::bytes(2, 0, size / 512));
        let file = store.path("diff.qcow2");
        export_difference(store, "child", "base", &file);
        let before = segment_files(store);
        let mut killed = 0;
        for round in 0..6 {
            let mut command = Command::new(program("offshoot"));
            command.env_remove("OFFSHOOT_API").arg("--store").arg(store.store());
            command.args(["disk", "import", arg(&file), "new", "--over", "base"]);
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            until("it begins", || {
                segment_files(store).len() > before.len() || child.try_wait().unwrap().is_some()
            });
            std::thread::sleep(Duration::from_millis(15 * round));
            let _ = child.kill();
            child.wait().unwrap();
            // Without a daemon, whoever comes next clears up; a daemon does when its client goes.
            store.done(&["disk", "resize", "child", &size.to_string()]);
            let is_there = || {
                let disks = store.json(&["disk", "ls"]);
                disks.as_array().unwrap().iter().any(|disk| disk["name"] == "new")
            };
            until("it is there or gone", || is_there() || segment_files(store) == before);
            if is_there() {
                assert!(store.read("new") == store.read("child"));
                store.done(&["disk", "rm", "new"]);
            } else {
                killed += 1;
            }
            assert_eq!(segment_files(store), before);
        }
        assert!(killed > 0, "no import was killed");
        store.done(&["disk", "import", arg(&file), "new", "--over", "base"]);
        assert!(store.read("new") == store.read("child"));
    });
}

/// For QEMU it is an overlay like any other, and stays a difference when QEMU has named its
/// backing file, which an import does not look at.
#[test]
fn qemu_reads_it_over_its_backing_file() {
    let test = "qemu_reads_it_over_its_backing_file";
    let Some(qemu_img) = tool("qemu-img") else { return skip(test, "there is no qemu-img") };
    each(|store| {
        let file = difference(store);
        let [base, child] = ["base.raw", "child.raw"].map(|name| store.path(name));
        store.done(&["disk", "export", "base", arg(&base)]);
        store.done(&["disk", "export", "child", arg(&child)]);
        let qemu = |args: &[&str]| {
            let output = Command::new(&qemu_img).args(args).output().unwrap();
            assert!(output.status.success(), "{args:?}: {output:?}");
        };
        qemu(&["check", arg(&file)]);
        qemu(&["rebase", "-u", "-F", "raw", "-b", arg(&base), arg(&file)]);
        qemu(&["compare", "-f", "qcow2", "-F", "raw", arg(&file), arg(&child)]);

        fs::remove_file(&base).unwrap();
        store.done(&["disk", "import", arg(&file), "new", "--over", "base"]);

        assert!(store.read("new") == store.read("child"));
    });
}
