//! Real NBD clients on a live disk: what they write is on the disk, what is on the disk they read,
//! and what they are told about allocation and changes is so.

// Offsets on small disks, and bytes made from numbers.
#![allow(clippy::cast_possible_truncation)]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use blockd::disk::Disk;
use blockd::nbd::{Ancestors, ServerOptions, VolumeExport};
use format::{Error, Kind, Result};
use offshoot_tests::nbd::{Disks, Served, in_service};
use offshoot_tests::rng::Rng;
use offshoot_tests::{skip, tool};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const SECTORS: u64 = 64 * MIB / 512;

/// True when the tools are there.
fn have(test: &str, tools: &[&str]) -> bool {
    let missing: Vec<_> = tools.iter().filter(|t| tool(t).is_none()).copied().collect();
    if !missing.is_empty() {
        skip(test, &format!("this machine has no {}", missing.join(", ")));
    }
    missing.is_empty()
}

/// Runs a client; it must end well, within two minutes.
fn run(name: &str, args: &[&str]) -> String {
    let (ok, text) = try_run(name, args);
    assert!(ok, "{name} {args:?}: {text}");
    text
}

fn try_run(name: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new("timeout")
        .args(["120", name])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("it starts");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// A served disk of 64 MiB, number 1, called `vm`.
struct Vm {
    disks: Disks,
    disk: Arc<Disk>,
    served: Served,
}

impl Vm {
    fn new() -> Self {
        let disks = Disks::new();
        let disk = disks.disk(1, SECTORS, None);
        let export =
            VolumeExport::new(in_service("vm", Arc::clone(&disk))).described("a test's disk");
        let served = Served::new(vec![Arc::new(export)], ServerOptions::default());
        Vm { disks, disk, served }
    }

    fn uri(&self) -> String {
        self.served.uri("vm")
    }

    /// Stops the server, closes the disk, opens it anew and returns all of its content.
    fn content(self) -> Vec<u8> {
        self.served.server.stop(Duration::from_secs(20)).expect("stopped");
        drop(self.served);
        Arc::into_inner(self.disk).expect("nobody else has it").close().expect("closed");
        let disk = self.disks.open(1);
        let mut content = vec![0; usize::try_from(disk.size()).unwrap()];
        disk.read(0, 0, &mut content).unwrap();
        content
    }
}

/// An image with stretches of data and of nothing, whole clusters and odd sectors.
fn image(path: &Path, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut content = vec![0u8; 64 << 20];
    for _ in 0..60 {
        let len = [512, 4096, 65536, 1 << 20][rng.below(4) as usize];
        let at = rng.below(SECTORS - len / 512) * 512;
        for byte in &mut content[at as usize..(at + len) as usize] {
            *byte = rng.below(255) as u8 + 1;
        }
    }
    let file = fs::File::create(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    for (i, block) in content.chunks(4096).enumerate() {
        if block.iter().any(|&b| b != 0) {
            file.write_all_at(block, i as u64 * 4096).unwrap();
        }
    }
    content
}

#[test]
fn qemu_img_copies_in_and_out() {
    if !have("nbd_clients::qemu_img_copies_in_and_out", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, back) = (dir.path().join("source.raw"), dir.path().join("back.raw"));
    let content = image(&source, 11);
    let vm = Vm::new();
    let (source, back) = (source.to_str().unwrap(), back.to_str().unwrap());

    run("qemu-img", &["convert", "-n", "-W", "-f", "raw", "-O", "raw", source, &vm.uri()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &vm.uri()]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &vm.uri(), back]);

    assert!(fs::read(back).unwrap() == content, "what came back is what went in");
    let info = run("qemu-img", &["info", "--output=json", &vm.uri()]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], 64 * MIB);
    assert!(vm.content() == content, "and so is what the disk holds afterwards");
}

/// The extents that a client sees are those of the disk's map, and no others.
#[test]
fn maps_are_exact() {
    if !have("nbd_clients::maps_are_exact", &["qemu-img", "nbdinfo"]) {
        return;
    }
    let vm = Vm::new();
    vm.disk.write(0, MIB, &[1; 65536]).unwrap();
    vm.disk.write(0, 2 * MIB + 4096, &[2; 8192]).unwrap();
    vm.disk.write(0, 32 * MIB, &[3; 1 << 20]).unwrap();
    vm.disk.discard(0, 32 * MIB + 65536, 65536).unwrap();
    let data = [
        (MIB, 65536),
        (2 * MIB + 4096, 8192),
        (32 * MIB, 65536),
        (32 * MIB + 131_072, MIB - 131_072),
    ];
    let mut expected = Vec::new();
    let mut at = 0;
    for (offset, len) in data {
        expected.push((at, offset - at, true));
        expected.push((offset, len, false));
        at = offset + len;
    }
    expected.push((at, 64 * MIB - at, true));

    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &vm.uri()]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let seen: Vec<(u64, u64, bool)> = map
        .iter()
        .map(|e| {
            let number = |key: &str| e[key].as_u64().unwrap();
            assert_eq!(e["data"].as_bool().unwrap(), !e["zero"].as_bool().unwrap());
            (number("start"), number("length"), e["zero"].as_bool().unwrap())
        })
        .collect();
    assert_eq!(seen, expected);

    let map = run("nbdinfo", &["--map", "--json", &vm.uri()]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let seen: Vec<(u64, u64, bool)> = map
        .iter()
        .map(|e| {
            let number = |key: &str| e[key].as_u64().unwrap();
            (number("offset"), number("length"), number("type") == 3)
        })
        .collect();
    assert_eq!(seen, expected);
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    if !have("nbd_clients::qemu_io_reads_what_it_wrote", &["qemu-io"]) {
        return;
    }
    let vm = Vm::new();
    let commands = [
        "write -P 0x5a 1M 64k",
        "read -P 0x5a 1M 64k",
        "read -P 0 0 1M",
        "write -f -P 0x6b 3584 1024",
        "read -P 0x6b 3584 1024",
        "write -P 0x11 8M 4M",
        "write -z -u 9M 1M",
        "write -z 10M 512k",
        "discard 11M 1M",
        "read -P 0x11 8M 1M",
        "read -P 0 9M 1536k",
        "read -P 0x11 11008k 256k",
        "read -P 0 11M 1M",
        "aio_write -P 0x21 20M 1M",
        "aio_write -P 0x22 21M 1M",
        "aio_write -P 0x23 22M 1M",
        "aio_flush",
        "flush",
        "read -P 0x22 21M 1M",
    ];
    let uri = vm.uri();
    let mut args = vec!["-f", "raw", "-d", "unmap", "-t", "none"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    args.push(&uri);

    let said = run("qemu-io", &args);

    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    let content = vm.content();
    assert!(content[3584..4608].iter().all(|&b| b == 0x6b));
    assert!(content[22 << 20..23 << 20].iter().all(|&b| b == 0x23));
    assert!(content[9 << 20..(10 << 20) + (512 << 10)].iter().all(|&b| b == 0));
}

#[test]
fn nbdinfo_tells_what_is_so() {
    if !have("nbd_clients::nbdinfo_tells_what_is_so", &["nbdinfo"]) {
        return;
    }
    let vm = Vm::new();
    let info: Value = serde_json::from_str(&run("nbdinfo", &["--json", &vm.uri()])).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], "vm");
    assert_eq!(export["description"], "a test's disk");
    assert_eq!(export["export-size"], 64 * MIB);
    assert_eq!(export["is_read_only"], false);
    for able in ["can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn"] {
        assert_eq!(export[able], true, "{able}");
    }
    for able in ["can_trim", "can_zero"] {
        assert_eq!(export[able], true, "{able}");
    }
    assert_eq!(export["can_cache"], false);
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 32 * MIB);

    let listed = run("nbdinfo", &["--list", "--json", &vm.served.uri("")]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["exports"][0]["export-name"], "vm");
    let (ok, said) = try_run("nbdinfo", &[&vm.served.uri("other")]);
    assert!(!ok && said.contains("No such file"), "{said}");
}

#[test]
fn nbdcopy_copies_over_several_connections() {
    if !have("nbd_clients::nbdcopy_copies_over_several_connections", &["nbdcopy"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, back) = (dir.path().join("source.raw"), dir.path().join("back.raw"));
    let content = image(&source, 12);
    let vm = Vm::new();
    let several = ["--connections=4", "--threads=4", "--requests=64", "--flush"];

    run("nbdcopy", &[&several[..], &[source.to_str().unwrap(), &vm.uri()]].concat());
    run("nbdcopy", &[&several[..], &[&vm.uri(), back.to_str().unwrap()]].concat());

    assert!(fs::read(back).unwrap() == content, "what came back is what went in");
    let status = vm.served.server.status();
    assert!(status.accepted >= 8, "four connections each way: {status:?}");
    assert!(vm.content() == content);
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !have("nbd_clients::fio_verifies_what_it_wrote", &["fio"]) {
        return;
    }
    if !run("fio", &["--enghelp"]).lines().any(|l| l.trim() == "nbd") {
        return skip("nbd_clients::fio_verifies_what_it_wrote", "this fio has no NBD engine");
    }
    let vm = Vm::new();
    let job = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/fio/nbd-verify.fio");

    let uri = format!("URI={}", vm.uri());
    let said = run("env", &[&uri, "fio", job.to_str().unwrap()]);

    assert!(!said.contains("verify:") && !said.contains("err= 1"), "{said}");
    assert!(vm.content().chunks(4096).filter(|b| b.iter().any(|&x| x != 0)).count() > 8000);
}

#[test]
fn qemu_img_bench_keeps_many_requests_in_flight() {
    if !have("nbd_clients::qemu_img_bench_keeps_many_requests_in_flight", &["qemu-img"]) {
        return;
    }
    let vm = Vm::new();
    for more in [&[][..], &["-w"], &["-w", "--flush-interval=100"]] {
        let uri = vm.uri();
        let fixed = ["bench", "-f", "raw", "-t", "none", "-c", "4000", "-d", "32", "-s", "4096"];
        run("qemu-img", &[&fixed[..], &["-S", "20480"], more, &[uri.as_str()]].concat());
    }
    let status = vm.served.server.status();
    assert_eq!((status.unfinished, status.refused), (0, 0), "{status:?}");
}

/// One ancestor, disk 1, called `base`.
struct Base(Arc<Disks>);

impl Ancestors for Base {
    fn names(&self) -> Vec<String> {
        vec!["base".to_owned()]
    }

    fn open(&self, name: &str) -> Result<Arc<Disk>> {
        match name {
            "base" => Ok(self.0.open_read_only(1)),
            _ => Err(Error::new(Kind::NotFound, "no such ancestor")),
        }
    }
}

/// A backup tool copies what changed since the last backup: it must see every change and should see
/// nothing else.
#[test]
fn changes_against_an_ancestor_are_exact() {
    if !have("nbd_clients::changes_against_an_ancestor_are_exact", &["nbdinfo", "qemu-img"]) {
        return;
    }
    let disks = Arc::new(Disks::new());
    let base = disks.disk(1, SECTORS, None);
    base.write(0, MIB, &[1; 4 << 20]).unwrap();
    disks.seal(base);
    let child = disks.disk(2, SECTORS, Some(1));
    child.write(0, 2 * MIB, &[2; 12288]).unwrap();
    child.write(0, 40 * MIB, &[2; 4096]).unwrap();
    child.discard(0, 3 * MIB, MIB).unwrap();
    // Nothing was there: it reads the same as before.
    child.discard(0, 50 * MIB, MIB).unwrap();
    let export = VolumeExport::new(in_service("vm", child)).with_ancestors(Box::new(Base(disks)));
    let served = Served::new(vec![Arc::new(export)], ServerOptions::default());

    let context = "offshoot:changed-since:base";
    let map = run("nbdinfo", &[&format!("--map={context}"), "--json", &served.uri("vm")]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let number = |e: &Value, key: &str| e[key].as_u64().unwrap();
    let changed: Vec<(u64, u64)> = map
        .iter()
        .filter(|e| number(e, "type") == 1)
        .map(|e| (number(e, "offset"), number(e, "length")))
        .collect();
    assert_eq!(changed, [(2 * MIB, 12288), (3 * MIB, MIB), (40 * MIB, 4096)]);
    assert_eq!(map.iter().map(|e| number(e, "length")).sum::<u64>(), 64 * MIB);

    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=vm,x-dirty-bitmap={context}",
        served.socket().display()
    );
    let map = run("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let changed: Vec<(u64, u64)> = map
        .iter()
        .filter(|e| e["data"] == false)
        .map(|e| (number(e, "start"), number(e, "length")))
        .collect();
    assert_eq!(changed, [(2 * MIB, 12288), (3 * MIB, MIB), (40 * MIB, 4096)]);

    let info = run("nbdinfo", &["--json", &served.uri("vm")]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["exports"][0]["contexts"], serde_json::json!(["base:allocation", context]));
}
