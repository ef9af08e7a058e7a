//! Children that inherit (D-a to D-g, D-j to D-l, D-n, D-o): they hold what their parents hold, the
//! parents stay where they are, and nobody sees what another one writes.

use offshoot_tests::command::{Bench, each};
use offshoot_tests::pattern;
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::{load, until};
use serde_json::Value;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn inherit(b: &Bench, parent: &str, children: &[&str], more: &[&str]) -> Value {
    let args = [&["disk", "fork", parent], children, &["--mode", "inherit"], more].concat();
    b.json(&args)
}

fn show(b: &Bench, disk: &str) -> Value {
    b.json(&["disk", "show", disk])
}

/// The segments that a disk stands on, its own left out.
fn below(b: &Bench, disk: &str) -> Vec<String> {
    let details = show(b, disk);
    let rows = details["segments"].as_array().unwrap().iter();
    let rows = rows.filter(|row| row["own"] == false);
    rows.map(|row| row["segment"].as_str().unwrap().to_owned()).collect()
}

fn own(b: &Bench, disk: &str) -> String {
    show(b, disk)["segment"].as_str().unwrap().to_owned()
}

/// A sealed root with data, and a clone of it that has written.
fn golden_and_vm(b: &Bench) {
    b.done(&["disk", "create", "golden", "--size", "8M"]);
    b.write("golden", 0, &pattern::bytes(1, 0, 4096));
    b.done(&["disk", "seal", "golden"]);
    b.done(&["disk", "create", "vm", "--parent", "golden"]);
    b.write("vm", 100 * KIB, &pattern::bytes(2, 200, 600));
    b.write("vm", 4 * MIB + 512, &pattern::bytes(3, 8193, 5));
}

/// D-a: the parent's running point does not move, and none of its bytes changes.
#[test]
fn the_running_point_of_the_parent_stays() {
    each(|b| {
        golden_and_vm(b);
        let (before, chain) = (own(b, "vm"), below(b, "vm"));
        let file = b.store.store().join(format!("{before}.seg"));
        let bytes = std::fs::read(&file).unwrap();

        let made = inherit(b, "vm", &["one", "two"], &[]);

        assert_eq!(made["mode"], "inherit");
        assert_eq!((own(b, "vm"), below(b, "vm")), (before, chain));
        assert!(std::fs::read(&file).unwrap() == bytes, "nothing of it was written");
        b.write("vm", 6 * MIB, &pattern::bytes(4, 12288, 8));
        assert!(std::fs::read(&file).unwrap() != bytes, "it goes on in the same file");
        b.is_sound(&["vm", "one", "two"]);
    });
}

/// D-b: a root is not copied, its child stands on it, and from then on it is pinned.
#[test]
fn a_root_is_pinned() {
    each(|b| {
        b.done(&["disk", "create", "vm", "--size", "8M"]);
        b.write("vm", 0, &pattern::bytes(1, 0, 900));
        let (segment, content) = (own(b, "vm"), b.read("vm"));

        let made = inherit(b, "vm", &["one"], &[]);

        assert_eq!((&made["copied"], &made["cloned"]), (&0.into(), &0.into()));
        assert_eq!((own(b, "vm"), below(b, "one")), (segment.clone(), vec![segment.clone()]));
        assert!(b.read("one") == content && b.read("vm") == content);
        let said = b.refused(&["disk", "discard", "vm", "--offset", "0", "--length", "4k"], 9);
        assert!(said.contains("disk vm") && said.contains("sealed"), "{said}");
        let said = b.refused(&["disk", "rm", "vm"], 5);
        assert!(said.contains("disk vm") && said.contains("one"), "{said}");
        // It can have more children, and be finished as any sealed disk.
        inherit(b, "vm", &["two"], &[]);
        assert_eq!(below(b, "two"), [segment]);
        b.done(&["disk", "seal", "vm"]);
        b.done(&["disk", "create", "three", "--parent", "vm"]);
        b.write("one", 0, &pattern::bytes(2, 0, 8));
        assert!(b.read("two") == content && b.read("three") == content);
        b.is_sound(&["vm", "one", "two", "three"]);
    });
}

/// D-c, D-e: of a clone, its own part is copied, and the child stands on the disk that the clone
/// was made from, which is another machine's; the clone can go.
#[test]
fn a_child_of_a_clone_stands_on_its_base() {
    each(|b| {
        golden_and_vm(b);
        let content = b.read("vm");

        let made = inherit(b, "vm", &["child"], &[]);

        assert_eq!(below(b, "child"), [own(b, "golden")]);
        assert_eq!(made["children"][0]["parent"], "golden");
        // 75 blocks of the first write, and one that the second wrote a part of.
        let data = made["copied"].as_u64().unwrap() + made["cloned"].as_u64().unwrap();
        assert_eq!(data, 76 * 4 * KIB);
        assert!(b.read("child") == content);
        b.done(&["disk", "rm", "vm"]);
        assert!(b.read("child") == content);
        b.is_sound(&["child", "golden"]);
    });
}

/// D-f: what is copied is what the parent has of its own, whatever the base is.
#[test]
fn the_cost_is_that_of_the_delta() {
    let b = Bench::new(false);
    let data = |base: u64, delta: u64| {
        let [root, vm, child] = ["root", "vm", "child"].map(|n| format!("{n}-{base}-{delta}"));
        b.done(&["disk", "create", &root, "--size", "32M"]);
        b.write(&root, 0, &pattern::bytes(1, 0, base * 2));
        b.done(&["disk", "seal", &root]);
        b.done(&["disk", "create", &vm, "--parent", &root]);
        b.write(&vm, 0, &pattern::bytes(2, 0, delta * 2));
        let made = inherit(&b, &vm, &[&child], &[]);
        made["copied"].as_u64().unwrap() + made["cloned"].as_u64().unwrap()
    };

    assert_eq!(data(256, 128), 128 * KIB);
    assert_eq!(data(25_600, 128), 128 * KIB);
    assert_eq!(data(256, 256), 256 * KIB);
}

/// D-g: a child of a child stands on the base as well, generation after generation.
#[test]
fn the_depth_stays_over_generations() {
    each(|b| {
        golden_and_vm(b);
        let (base, mut content) = (below(b, "vm"), b.read("vm"));
        let mut parent = "vm".to_owned();
        for n in 1..=6_u32 {
            let child = format!("g{n}");
            inherit(b, &parent, &[&child], &[]);
            assert!(b.read(&child) == content, "generation {n}");
            assert_eq!(below(b, &child), base);
            let at = u64::from(n) * 700 * KIB;
            let bytes = pattern::bytes(10 + n, at / 512, 3);
            b.write(&child, at, &bytes);
            let at = usize::try_from(at).unwrap();
            content[at..at + bytes.len()].copy_from_slice(&bytes);
            parent = child;
        }
        b.is_sound(&["g6"]);
    });
}

/// D-j: zeroes over data of the base are inherited, and so are sizes.
#[test]
fn zeroes_and_sizes_are_inherited() {
    each(|b| {
        golden_and_vm(b);
        b.done(&["disk", "discard", "vm", "--offset", "64k", "--length", "128k"]);
        inherit(b, "vm", &["zeroed"], &[]);
        // In the middle of a block of the base.
        let cut = (1 << 20) + 512;
        b.done(&["disk", "resize", "vm", &cut.to_string(), "--drop-data"]);
        inherit(b, "vm", &["small"], &[]);
        b.done(&["disk", "resize", "vm", "9M"]);
        inherit(b, "vm", &["large"], &["--base", "root-merged"]);

        let zeroed = b.read("zeroed");
        assert!(zeroed[65_536..196_608].iter().all(|byte| *byte == 0));
        assert!(zeroed[..65_536] == pattern::bytes(1, 0, 128));
        assert!(b.read("small") == zeroed[..cut]);
        let large = b.read("large");
        assert!(large.len() == 9 << 20 && large[..cut] == zeroed[..cut]);
        assert!(large[cut..].iter().all(|byte| *byte == 0), "what was cut does not return");
        b.is_sound(&["zeroed", "small", "large"]);
    });
}

/// What differs between a disk and its base is listed with its kind: data that was written, and
/// zeroes over data of the base, but not zeroes over nothing. A child that inherits shows the same.
#[test]
fn differences_are_listed_by_kind() {
    each(|b| {
        golden_and_vm(b);
        b.done(&["disk", "discard", "vm", "--offset", "64k", "--length", "36k"]);
        b.done(&["disk", "discard", "vm", "--offset", "5M", "--length", "1M"]);
        inherit(b, "vm", &["child"], &[]);
        for disk in ["vm", "child"] {
            let found = b.json(&["disk", "diff", disk, "golden"]);
            let expected = serde_json::json!([
                { "offset": 64 * KIB, "length": 36 * KIB, "kind": "zero" },
                { "offset": 100 * KIB, "length": 300 * KIB, "kind": "data" },
                { "offset": 4 * MIB, "length": 4 * KIB, "kind": "data" },
            ]);
            assert_eq!(found, expected, "{disk}");
        }
        assert_eq!(b.json(&["disk", "diff", "golden", "golden"]), serde_json::json!([]));
        assert_eq!(b.done(&["disk", "diff", "golden", "golden"]), b"");
        let lines = b.done(&["disk", "diff", "vm", "golden"]);
        assert!(lines.starts_with(b"65536 36864 zero\n102400 307200 data\n"), "{lines:?}");
    });
}

/// D-k: nobody sees what another one writes, drops or resizes afterwards.
#[test]
fn parent_and_children_are_apart() {
    each(|b| {
        golden_and_vm(b);
        inherit(b, "vm", &["one", "two"], &[]);
        let before = b.read("vm");

        b.write("vm", 0, &pattern::bytes(5, 0, 100));
        b.done(&["disk", "discard", "one", "--offset", "0", "--length", "1M"]);

        assert!(b.read("two") == before);
        let one = b.read("one");
        assert!(
            one[..1 << 20].iter().all(|byte| *byte == 0) && one[1 << 20..] == before[1 << 20..]
        );
        let vm = b.read("vm");
        assert!(vm[..51_200] == pattern::bytes(5, 0, 100) && vm[51_200..] == before[51_200..]);
        b.done(&["disk", "resize", "vm", "1M", "--drop-data"]);
        assert!(b.read("two") == before && b.read("one") == one);
    });
}

/// D-l: the base stays as long as a child stands on it, and can go after the last.
#[test]
fn a_base_is_counted() {
    each(|b| {
        golden_and_vm(b);
        inherit(b, "vm", &["one", "two"], &[]);
        for gone in ["vm", "one", "two"] {
            let said = b.refused(&["disk", "rm", "golden"], 5);
            assert!(said.contains("golden") && said.contains(gone), "{said}");
            b.done(&["disk", "rm", gone]);
        }
        b.done(&["disk", "rm", "golden"]);
        assert_eq!(b.segments(), 0);
    });
}

/// D-n: several disks, all or none.
#[test]
fn a_group_inherits_whole_or_not_at_all() {
    each(|b| {
        golden_and_vm(b);
        b.done(&["disk", "create", "log", "--size", "4M"]);
        b.write("log", 0, &pattern::bytes(6, 0, 64));
        let before = b.segments();
        b.refused(&["disk", "fork", "vm", "a", "--with", "log:golden", "--mode", "inherit"], 4);
        b.refused(&["disk", "fork", "vm", "a", "--with", "none:b", "--mode", "inherit"], 3);
        assert_eq!(b.segments(), before);
        b.write("log", 0, &pattern::bytes(7, 0, 8));

        inherit(b, "vm", &["vm-1"], &["--with", "log:log-1,log-2"]);

        assert!(b.read("vm-1") == b.read("vm"));
        assert!(b.read("log-1") == b.read("log") && b.read("log-2") == b.read("log"));
        b.refused(&["disk", "discard", "log", "--offset", "0", "--length", "4k"], 9);
    });
}

/// D-o: below the threshold it is copied, from it on shared.
#[test]
fn the_threshold_decides() {
    each(|b| {
        golden_and_vm(b);
        let bytes = 76 * 4 * KIB;
        let segment = own(b, "vm");
        let copied = inherit(b, "vm", &["one"], &["--copy-threshold", &(bytes + 1).to_string()]);
        assert_eq!((&copied["mode"], own(b, "vm")), (&"inherit".into(), segment.clone()));
        // Two children cost twice as much.
        let two = (2 * bytes).to_string();
        let shared = inherit(b, "vm", &["two", "three"], &["--copy-threshold", &two]);
        assert_eq!((&shared["mode"], &shared["copied"]), (&"live".into(), &0.into()));
        assert_ne!(own(b, "vm"), segment, "a live fork lets it go on elsewhere");
        for child in ["one", "two", "three"] {
            assert!(b.read(child) == b.read("vm"), "{child}");
        }
        let said = b.refused(&["disk", "fork", "vm", "x", "--copy-threshold", "1M"], 2);
        assert!(said.contains("inherit"), "{said}");
    });
}

/// The disk of a running guest stands still while it is inherited from, and goes on. One that would
/// have to be sealed, or has too much to copy, is refused by name.
#[test]
fn a_disk_in_service_waits_for_a_small_copy() {
    const SEED: u64 = 71;
    let bench = ServedDisk::new(TestStore::new());
    let daemon = bench.daemon();
    bench.attach();
    let said = |args: &[&str], code: i32| {
        let output = bench.offshoot(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let refused = said(&["disk", "fork", "vm", "child", "--mode", "inherit"], 5);
    assert!(refused.contains("disk vm") && refused.contains("in service"), "{refused}");
    // From here on it stands on something.
    bench.done(&["disk", "fork", "vm", "base"]);
    let (client, queues) = bench.connect(false);
    let inherit = |child: &str| -> Value {
        let args = ["disk", "fork", "vm", child, "--mode", "inherit", "--json"];
        serde_json::from_slice(&bench.done(&args)).unwrap()
    };
    let show = || -> Value {
        serde_json::from_slice(&bench.done(&["disk", "show", "vm", "--json"])).unwrap()
    };
    let (loads, children) = load::during(bench.loads(queues, SEED), |done| {
        let segment = show()["segment"].clone();
        let children = ["one", "two", "three"];
        for child in children {
            let before = done();
            until("progress", || done() >= before + 50);
            let made = inherit(child);
            assert!(made["pause_us"].as_u64().is_some_and(|us| us > 0), "{made}");
            println!("{} copied, pause {} us", made["copied"], made["pause_us"]);
            assert_eq!(show()["segment"], segment, "the running point stays");
        }
        let before = done();
        until("progress", || done() >= before + 100);
        children
    });
    drop(client);
    let read = |name: &str| bench.done(&["disk", "read", name, "--offset", "0", "--length", "64M"]);
    let [one, two, three] = children.map(read);
    assert!(one != two && two != three, "the guest went on");
    // Nobody writes any more: what is inherited now is what the disk holds, to the last byte.
    inherit("last");
    assert!(read("last") == read("vm"));
    let too_much = ["disk", "fork", "vm", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    let many: Vec<&str> = too_much.iter().copied().chain(["--mode", "inherit"]).collect();
    let refused = said(&many, 5);
    assert!(refused.contains("--copy-threshold"), "{refused}");
    let live = ["disk", "fork", "vm", "k", "--mode", "inherit", "--copy-threshold", "4k", "--json"];
    let live: Value = serde_json::from_slice(&bench.done(&live)).unwrap();
    assert_eq!(live["mode"], "live");
    assert!(daemon.terminate().success());
    bench.compare(&loads);
    for name in ["one", "two", "three", "last", "k"] {
        bench.done(&["disk", "check", name]);
    }
}
