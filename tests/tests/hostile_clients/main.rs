//! Hostile clients of one disk, while a guest that behaves works on another disk of the daemon.
//!
//! Each test is one kind of attack on the sockets of disk `a`. Throughout, a verifying load runs on
//! disk `b`: it must make progress and see nothing. Afterwards the daemon is the same process and
//! holds no more than before, it has said little about it all, it serves a front end of `a` that
//! behaves, and both disks are sound.

mod front_end;
mod guest;
#[path = "../../../vhost/tests/common/guest.rs"]
#[allow(dead_code)] // Its own tests use more of it.
mod hand;
#[path = "../../../vhost/tests/common/front_end.rs"]
mod liar;

use std::fs;
use std::path::{Path, PathBuf};

use offshoot_tests::daemon::Daemon;
use offshoot_tests::load::{self, Load};
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::{Value, json};
use vhost_blk::client::{Client, Op, Options};

const SIZE: u64 = 32 << 20;
/// Lines of the log that an attack may cost, whatever it does.
const LINES_MAX: usize = 300;
/// What an attacker has.
struct Target {
    /// The vhost-user socket.
    vhost: PathBuf,
    /// The NBD socket.
    nbd: PathBuf,
    rng: Rng,
    /// How often to try.
    rounds: u64,
}

/// What the daemon has open.
struct Footprint {
    descriptors: usize,
    threads: usize,
}

impl Footprint {
    fn of(daemon: &Daemon) -> Footprint {
        let count = |what: &str| {
            let entries = fs::read_dir(format!("/proc/{}/{what}", daemon.pid())).unwrap();
            entries.count()
        };
        Footprint { descriptors: count("fd"), threads: count("task") }
    }

    /// A few are kept: of the last sessions until the next one comes, and threads that idle.
    fn is_near(&self, other: &Footprint) -> bool {
        self.descriptors <= other.descriptors + 12 && self.threads <= other.threads + 8
    }
}

fn serve(daemon: &Daemon, name: &str, kind: &str, socket: &Path) {
    let export = json!({"kind": kind, "socket": socket, "queues": 2});
    daemon.json("POST", &format!("/v1/disks/{name}/attach"), &json!({ "export": export }));
}

fn options(queues: u16) -> Options {
    Options { queues, data_size: 2 << 20, ..Options::default() }
}

/// Counters of a disk: requests refused, and requests answered with an error.
fn mistakes(daemon: &Daemon, name: &str) -> (u64, u64) {
    let all = daemon.json("GET", "/v1/stats", &Value::Null);
    let disk = all.as_array().unwrap().iter().find(|d| d["disk"] == name).unwrap();
    let kinds = disk["stats"]["kinds"].as_array().unwrap();
    let errors = kinds.iter().map(|k| k["errors"].as_u64().unwrap()).sum();
    (disk["stats"]["refused"].as_u64().unwrap(), errors)
}

/// A front end that behaves finds a disk that works.
fn behaves(socket: &Path, seed: u64) {
    let (_client, mut queues) = Client::connect(socket, options(2)).unwrap();
    // Whatever the attackers have written.
    let ranges = [(0, SIZE)];
    let zero = Op::WriteZeroes { ranges: &ranges, unmap: true };
    assert_eq!(queues[0].run(zero, 0, &[], 20_000).unwrap().status, 0);
    for (i, queue) in (0..).zip(queues) {
        let half = SIZE / 512 / 2;
        let mut load = Load::new(queue, i * half, half, seed + i);
        load.run(&mut |done| done < 200);
        load.verify();
    }
}

/// Runs an attack on disk `a` beside a load on disk `b`.
fn survives(test: &str, attack: impl FnOnce(&mut Target)) {
    let seed = seed(4242);
    println!(
        "repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test hostile_clients"
    );
    let bench = TestStore::new();
    let daemon = bench.daemon();
    for name in ["a", "b"] {
        daemon.json("POST", "/v1/disks", &json!({"name": name, "size": SIZE}));
        serve(&daemon, name, "vhost-user", &bench.path(name));
    }
    serve(&daemon, "a", "nbd", &bench.path("a.nbd"));
    let (_guest, mut queues) = Client::connect(&bench.path("b"), options(1)).unwrap();
    let mut load = Load::new(queues.remove(0), 0, SIZE / 512, seed);
    load.run(&mut |done| done < 50);
    let before = Footprint::of(&daemon);
    let lines_before = daemon.log().lines().count();

    let rounds = if soak() { 20 } else { 1 };
    let mut target =
        Target { vhost: bench.path("a"), nbd: bench.path("a.nbd"), rng: Rng::new(seed), rounds };
    load::during(vec![load], |done| {
        let at_first = done();
        attack(&mut target);
        // Also when the attack was over in no time.
        until("the load goes on", || done() > at_first + 100);
    });

    until("the daemon lets go of what attackers made it hold", || {
        Footprint::of(&daemon).is_near(&before)
    });
    behaves(&target.vhost, seed);
    assert_eq!(mistakes(&daemon, "b"), (0, 0), "{test}: of disk b");
    let log = daemon.log();
    let said: Vec<&str> = log.lines().skip(lines_before).collect();
    assert!(said.len() < LINES_MAX, "{test}: {} lines, the last: {:?}", said.len(), said.last());
    assert!(!log.contains("panicked"), "{test}: {log}");
    let of_b = |line: &&str| line.contains("disk b") && !line.contains("attached");
    let of_b: Vec<_> = said.iter().filter(|line| of_b(line)).collect();
    assert!(of_b.is_empty(), "{test}: the other disk is not concerned: {of_b:?}");
    for name in ["a", "b"] {
        daemon.json("POST", &format!("/v1/disks/{name}/detach"), &json!({"force": true}));
        let checked = daemon.json("POST", &format!("/v1/disks/{name}/check"), &json!({}));
        assert_eq!(checked["clean"], true, "{test}: {checked}");
    }
    assert!(daemon.terminate().success());
}

#[test]
fn guest_lies_in_its_rings() {
    survives("guest_lies_in_its_rings", guest::lies);
}

#[test]
fn guest_scribbles_over_its_rings() {
    survives("guest_scribbles_over_its_rings", guest::scribbles);
}

#[test]
fn guest_asks_for_what_makes_no_sense() {
    survives("guest_asks_for_what_makes_no_sense", guest::asks_nonsense);
}

#[test]
fn guest_kicks_without_end() {
    survives("guest_kicks_without_end", guest::kicks);
}

#[test]
fn front_end_sends_random_messages() {
    survives("front_end_sends_random_messages", front_end::random_messages);
}

#[test]
fn front_end_sends_torn_messages() {
    survives("front_end_sends_torn_messages", front_end::torn_messages);
}

#[test]
fn front_end_sends_wrong_descriptors() {
    survives("front_end_sends_wrong_descriptors", front_end::wrong_descriptors);
}

#[test]
fn front_end_cuts_its_memory_short() {
    survives("front_end_cuts_its_memory_short", front_end::cut_memory);
}

#[test]
fn front_ends_come_and_go_and_stay() {
    survives("front_ends_come_and_go_and_stay", front_end::crowd);
}

#[test]
fn nbd_client_sends_garbage() {
    survives("nbd_client_sends_garbage", front_end::nbd_garbage);
}
