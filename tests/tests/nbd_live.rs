//! NBD clients of the real daemon, on a disk that a guest writes to at the same time, and what
//! holds a guest back: a full host, and limits.

use std::fs;
use std::ops::Range;
use std::time::{Duration, Instant};

use blockd::nbd::wire::{Style, command};
use offshoot_tests::daemon::Daemon;
use offshoot_tests::load::{self, Load};
use offshoot_tests::mount::{Mount, have, run};
use offshoot_tests::nbd;
use offshoot_tests::pattern::{self, Found, SECTOR};
use offshoot_tests::rng::seed;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::{Value, json};
use vhost_blk::client::{Client, Options};

const MIB: u64 = 1 << 20;
/// The guest writes to the part before it. What lies behind it stays as it is.
const STILL: u64 = 32 * MIB;
const SIZE: u64 = 64 * MIB;
const SINCE: &str = "offshoot:changed-since:base";

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

/// A disk `vm` over the sealed disk `base`, with what differs behind [`STILL`].
fn bench() -> (TestStore, Daemon) {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    bench.done(&["disk", "create", "base", "--size", &SIZE.to_string()]);
    bench.write("base", 33 * MIB, &[1; 4 << 20]);
    bench.done(&["disk", "seal", "base"]);
    bench.done(&["disk", "create", "vm", "--parent", "base"]);
    bench.write("vm", 34 * MIB, &[2; 12288]);
    bench.write("vm", 50 * MIB, &[2; 4096]);
    bench.done(&["disk", "discard", "vm", "--offset", "35M", "--length", "1M"]);
    (bench, daemon)
}

/// What `vm` and its forks hold behind [`STILL`].
fn still() -> Vec<u8> {
    let mut bytes = vec![0; index(SIZE - STILL)];
    let mut put = |at: u64, len: usize, byte| {
        let at = index(at - STILL);
        bytes[at..at + len].fill(byte);
    };
    put(33 * MIB, 4 << 20, 1);
    put(34 * MIB, 12288, 2);
    put(35 * MIB, 1 << 20, 0);
    put(50 * MIB, 4096, 2);
    bytes
}

/// Serves a disk over NBD; gives back what clients call it.
fn export(bench: &TestStore, name: &str) -> String {
    let socket = bench.path(&format!("{name}.nbd"));
    let socket = socket.to_str().unwrap();
    bench.done(&["disk", "export-nbd", name, "--socket", socket, "--readonly"]);
    format!("nbd+unix:///{name}?socket={socket}")
}

/// The ranges of a map that are `wanted`; the map must be one of the whole disk, in order.
fn ranges(map: &str, keys: [&str; 2], wanted: impl Fn(&Value) -> bool) -> Vec<Range<u64>> {
    let map: Vec<Value> = serde_json::from_str(map).unwrap();
    let (mut at, mut ranges) = (0, Vec::<Range<u64>>::new());
    for extent in &map {
        let [start, len] = keys.map(|key| extent[key].as_u64().unwrap());
        assert_eq!(start, at, "{extent}");
        at += len;
        if wanted(extent) {
            match ranges.last_mut().filter(|last| last.end == start) {
                Some(last) => last.end = at,
                None => ranges.push(start..at),
            }
        }
    }
    assert_eq!(at, SIZE);
    ranges
}

/// What changed since `base` was there, as `nbdinfo` tells it.
fn changed(uri: &str) -> Vec<Range<u64>> {
    let map = run("nbdinfo", &[&format!("--map={SINCE}"), "--json", uri]);
    ranges(&map, ["offset", "length"], |extent| extent["type"] == 1)
}

/// The parts of ranges that lie behind [`STILL`].
fn behind(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let parts = ranges.iter().map(|r| r.start.max(STILL)..r.end);
    parts.filter(|r| !r.is_empty()).collect()
}

/// Asks for both maps of `vm`, each in the words of two clients. Behind [`STILL`] they are exact.
fn maps_are_exact(bench: &TestStore, uri: &str) {
    let data = [33 * MIB..35 * MIB, 36 * MIB..37 * MIB, 50 * MIB..50 * MIB + 4096];
    let map = run("nbdinfo", &["--map", "--json", uri]);
    let seen = ranges(&map, ["offset", "length"], |extent| extent["type"] == 0);
    assert_eq!(behind(&seen), data);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", uri]);
    let seen = ranges(&map, ["start", "length"], |extent| extent["zero"] == false);
    assert_eq!(behind(&seen), data);

    let differs = [34 * MIB..34 * MIB + 12288, 35 * MIB..36 * MIB, 50 * MIB..50 * MIB + 4096];
    assert_eq!(behind(&changed(uri)), differs);
    let socket = bench.path("vm.nbd");
    let place = format!("server.type=unix,server.path={}", socket.display());
    let node = format!("driver=nbd,{place},export=vm,x-dirty-bitmap={SINCE}");
    let map = run("qemu-img", &["map", "--output=json", "--image-opts", &node]);
    let seen = ranges(&map, ["start", "length"], |extent| extent["data"] == false);
    assert_eq!(behind(&seen), differs);
}

/// A fork of `vm` is a disk of its own, which nobody writes to: what a backup tool copies from it
/// is what it holds, and no difference from `base` is kept from the tool.
fn a_fork_is_copied(bench: &TestStore, name: &str) {
    bench.done(&["disk", "fork", "vm", name]);
    let (uri, raw) = (export(bench, name), bench.path("fork.raw"));
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, raw.to_str().unwrap()]);
    let copied = fs::read(&raw).unwrap();
    assert!(copied == bench.read(name), "the copy is the disk");
    let (load, rest) = copied.split_at(index(STILL));
    assert!(rest == still());
    for (sector, bytes) in (0..).zip(load.chunks(SECTOR)) {
        let found = pattern::look(bytes, sector);
        assert!(matches!(found, Found::Zero | Found::Tag(_)), "sector {sector}: {found:?}");
    }
    let (base, changed) = (bench.read("base"), changed(&uri));
    let differ = copied.chunks(4096).zip(base.chunks(4096)).map(|(a, b)| a != b);
    for at in (0..SIZE).step_by(4096).zip(differ).filter_map(|(at, differ)| differ.then_some(at)) {
        assert!(changed.iter().any(|r| r.contains(&at)), "{at} differs, and nobody is told");
    }
    // And not just everything: the guest is far from having written to all of it.
    let told: u64 = changed.iter().map(|r| r.end - r.start).sum();
    assert!(told < SIZE / 2 + 2 * MIB, "{told}");
}

#[test]
fn backup_tools_work_beside_a_guest() {
    let test = "nbd_live::backup_tools_work_beside_a_guest";
    if !have(test, &["qemu-img", "nbdinfo", "nbdcopy"]) {
        return;
    }
    let seed = seed(31);
    println!("repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test nbd_live");
    let (bench, daemon) = bench();
    let (socket, raw) = (bench.path("vm.sock"), bench.path("vm.raw"));
    let attach = ["disk", "attach", "vm", "--queues", "2", "--socket", socket.to_str().unwrap()];
    bench.done(&attach);
    let uri = export(&bench, "vm");
    let copy = || {
        run("nbdcopy", &["--connections=2", &uri, raw.to_str().unwrap()]);
        fs::read(&raw).unwrap()
    };
    let options = Options { queues: 2, data_size: 2 << 20, ..Options::default() };
    let (client, queues) = Client::connect(&socket, options).unwrap();

    let (loads, ()) = load::during(load::loads(queues, STILL, seed), |done| {
        let progress = || {
            let before = done();
            until("the guest goes on", || done() > before + 100);
        };
        progress();
        maps_are_exact(&bench, &uri);
        assert!(copy()[index(STILL)..] == still());
        for name in ["first", "second"] {
            progress();
            a_fork_is_copied(&bench, name);
        }
        maps_are_exact(&bench, &uri);
        progress();
    });

    let copied = copy();
    loads.iter().for_each(|load: &Load| load.holds(&copied));
    assert!(copied[index(STILL)..] == still());
    drop(client);
    assert!(daemon.terminate().success());
    for disk in ["base", "vm", "first", "second"] {
        bench.done(&["disk", "check", disk]);
    }
}

/// A client past the handshake.
fn transmitting(bench: &TestStore, name: &str) -> nbd::Client {
    let socket = bench.path(&format!("{name}.nbd"));
    let mut client = nbd::Client::connect(&socket).greeted();
    client.agree(Style::Structured);
    client.go(name);
    client
}

fn writable(daemon: &Daemon, bench: &TestStore, name: &str, size: u64) -> nbd::Client {
    daemon.json("POST", "/v1/disks", &json!({"name": name, "size": size}));
    let socket = bench.path(&format!("{name}.nbd"));
    bench.done(&["disk", "export-nbd", name, "--socket", socket.to_str().unwrap()]);
    transmitting(bench, name)
}

/// Sends a write of a MiB, which its offset names.
fn write(client: &mut nbd::Client, at: u64) {
    let bytes = pattern::bytes(9, at / 512, MIB / 512);
    client.request((command::WRITE, 0), at, (at, MIB), &bytes);
}

/// A write that finds no space on the host waits, as one of a guest does; requests beside it are
/// answered, and the write is when there is space again.
#[test]
fn a_write_waits_for_space() {
    let test = "nbd_live::a_write_waits_for_space";
    let Some(mount) = Mount::ext4(test, 96 << 20) else { return };
    let bench = TestStore::at(mount.path().join("store"));
    let daemon = bench.daemon();
    let mut client = writable(&daemon, &bench, "a", 256 * MIB);
    write(&mut client, 0);
    assert_eq!(client.chunks()[0].kind >> 15, 0);
    let held = || daemon.json("GET", "/v1/health", &Value::Null)["held"] == json!(["a"]);

    let full = mount.fill(2 * MIB);
    let sent = 8;
    (1..=sent).for_each(|i| write(&mut client, i * MIB));

    until("it is held", held);
    let mut other = transmitting(&bench, "a");
    assert_eq!(other.errno((command::READ, 0), (0, 512), &[]), 0);
    drop(full);
    bench.done(&["disk", "resume", "a"]);
    let mut answered: Vec<u64> = (0..sent)
        .map(|_| {
            let reply = client.chunks();
            assert_eq!(reply[0].kind >> 15, 0, "{reply:?}");
            reply[0].cookie / MIB
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, (1..=sent).collect::<Vec<_>>());
    assert!(!held());
    drop((client, other));
    let bytes = daemon.ask("GET", "/v1/disks/a/data", b"").body;
    assert!(bytes[..index((sent + 1) * MIB)] == pattern::bytes(9, 0, (sent + 1) * MIB / 512));
}

/// How long so many reads of `len` bytes take, one after the other.
fn reads(client: &mut nbd::Client, count: u64, len: u64) -> Duration {
    let start = Instant::now();
    for _ in 0..count {
        assert_eq!(client.errno((command::READ, 0), (0, len), &[]), 0);
    }
    start.elapsed()
}

#[test]
fn limits_hold_for_clients() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    let mut client = writable(&daemon, &bench, "a", 8 * MIB);
    let limits = |args: &[&str]| bench.done(&[&["disk", "limits", "a"], args].concat());

    // What was never written is told from the map, without a read that a limit would count.
    assert_eq!(client.errno((command::WRITE, 0), (0, MIB), &[5; 1 << 20]), 0);
    // Not more than the burst before the rate holds.
    limits(&["--iops", "100"]);
    let slow = reads(&mut client, 60, 512);
    assert!(slow > Duration::from_millis(450), "60 of 100 a second, 10 at once, in {slow:?}");
    limits(&["--bps", "4M"]);
    let slow = reads(&mut client, 48, 64 << 10);
    assert!(slow > Duration::from_millis(600), "3 MiB of 4 a second, 0.4 at once, in {slow:?}");

    // What waits sees that they are lifted.
    limits(&["--bps", "1K"]);
    (0..2).for_each(|i| write(&mut client, i * MIB));
    // Either of them goes at once.
    let first = client.chunks()[0].cookie;
    limits(&["--bps", "0"]);
    assert_eq!(first + client.chunks()[0].cookie, MIB);
    let free = reads(&mut client, 60, 64 << 10);
    assert!(free < slow / 2, "{free:?} without a limit, {slow:?} with one");
}

/// Whoever asks for an end of the service gets it, whatever requests wait for.
fn ends_in_order(bench: &TestStore, daemon: Daemon, detach: bool) {
    if detach {
        bench.done(&["disk", "detach", "a", "--force"]);
    }
    assert!(daemon.terminate().success());
    assert!(!bench.log().contains("not closed in order"), "{}", bench.log());
    let checked = bench.json(&["disk", "check", "a"]);
    assert_eq!((&checked["clean"], &checked["stats"]["attached"]), (&json!(true), &json!("no")));
}

/// Story: the disk could not be closed, because a request still waited for space on the host, and
/// was left as a killed daemon would have left it. One that waited for the limits went on to do so
/// for as long as they said, also when they had been lifted.
#[test]
fn a_request_that_waits_keeps_no_disk_in_service() {
    let test = "nbd_live::a_request_that_waits_keeps_no_disk_in_service";
    let Some(mount) = Mount::ext4(test, 96 << 20) else { return };
    std::thread::scope(|scope| {
        let mount = &mount;
        for detach in [false, true] {
            scope.spawn(move || {
                let bench = TestStore::new();
                let daemon = bench.daemon();
                let mut client = writable(&daemon, &bench, "a", 8 * MIB);
                bench.done(&["disk", "limits", "a", "--bps", "1K"]);
                (0..3).for_each(|i| write(&mut client, i * MIB));
                // One goes, and is paid for in the next quarter of an hour.
                client.chunks();
                ends_in_order(&bench, daemon, detach);
            });
        }
        scope.spawn(move || {
            let bench = TestStore::at(mount.path().join("store"));
            let daemon = bench.daemon();
            let mut client = writable(&daemon, &bench, "a", 256 * MIB);
            let _full = mount.fill(2 * MIB);
            (0..8).for_each(|i| write(&mut client, i * MIB));
            let health = || daemon.json("GET", "/v1/health", &Value::Null);
            until("it is held", || health()["held"] == json!(["a"]));
            ends_in_order(&bench, daemon, true);
        });
    });
}
