//! Live forks (D-h, D-k, D-n): a guest's driver works at full load on a disk that is forked again
//! and again. No request fails, no write is lost, none shows in a child that it came after, and a
//! cut across two disks is one instant.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{OpenOptions, StoreDir, boot_id};
use offshoot_tests::daemon::program;
use offshoot_tests::load::{self, Load};
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::{Value, json};
use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};

const REPEAT: &str = "cargo test -p offshoot-tests --test fork_under_load";

fn fork(store: &TestStore, args: &[&str]) -> Value {
    let args: Vec<&str> = ["disk", "fork", "--json"].iter().chain(args).copied().collect();
    serde_json::from_slice(&store.done(&args)).unwrap()
}

/// Pauses, in order.
fn report(what: &str, mut pauses: Vec<Duration>, loads: &[Load]) {
    pauses.sort_unstable();
    let (median, worst) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    let longest = loads.iter().map(|load| load.longest).max().unwrap();
    println!("{what}: pause of {} forks: {median:?} (median), {worst:?} (longest)", pauses.len());
    println!("longest time without a completion, as the driver saw it: {longest:?}");
}

fn forks_under_load(packed: bool) {
    let forks = if soak() { 200 } else { 12 };
    let seed = seed(41);
    println!("repeat with OFFSHOOT_SEED={seed} {REPEAT}");
    let bench = ServedDisk::new(TestStore::new());
    let daemon = bench.daemon();
    bench.attach();
    let (client, queues) = bench.connect(packed);
    let mut rng = Rng::new(seed);
    let (loads, pauses) = load::during(bench.loads(queues, seed), |done| {
        let mut pauses = Vec::new();
        for n in 0..forks {
            let before = done();
            until("progress", || done() >= before + 50);
            std::thread::sleep(Duration::from_micros(rng.below(50_000)));
            let forked = fork(&bench, &["vm", &format!("child{n}")]);
            pauses.push(Duration::from_micros(forked["pause_us"].as_u64().unwrap()));
            // Children go while the disk is at work: frozen segments stay as long as it needs them.
            if n % 3 == 2 {
                bench.done(&["disk", "rm", &format!("child{}", n - 1)]);
            }
        }
        let before = done();
        until("progress", || done() >= before + 200);
        pauses
    });
    drop(client);
    report(if packed { "packed" } else { "split" }, pauses, &loads);
    let last = format!("child{}", forks - 1);
    // Nobody has written to it: it is what it was, whatever the disk became.
    let first = bench.done(&["disk", "read", &last, "--offset", "0", "--length", "64M"]);
    assert!(daemon.terminate().success());
    bench.compare(&loads);
    for name in ["child0", &last] {
        bench.done(&["disk", "check", name]);
    }
    bench.done(&["disk", "rm", "vm"]);
    let again = bench.done(&["disk", "read", &last, "--offset", "0", "--length", "64M"]);
    assert!(first == again, "the child depends on nothing that its parent does");
}

#[test]
fn a_guest_goes_on_through_forks() {
    forks_under_load(false);
}

#[test]
fn a_guest_goes_on_through_forks_with_packed_rings() {
    forks_under_load(true);
}

/// Blocks on each of the two disks that sequence numbers go to in turn.
const SLOTS: u64 = 512;

/// Writes one number to its block and waits until that is complete.
fn write_number(queue: &mut ClientQueue, number: u64) {
    let mut block = [0; 4096];
    block[..8].copy_from_slice(&number.to_le_bytes());
    let data = queue.data().0;
    queue.arena().write(data, &block);
    let span = Span { offset: data, len: 4096 };
    queue.submit(Op::Write, number / 2 % SLOTS * 4096, &[span], number).unwrap();
    queue.kick();
    loop {
        assert!(queue.wait(60_000), "write {number} never completes");
        if let Some(done) = queue.poll() {
            assert_eq!((done.token, done.status), (number, 0));
            return;
        }
    }
}

/// The numbers in the blocks of a disk.
fn numbers(store: &StoreDir, name: &str) -> Vec<u64> {
    let disk = store.open_disk(name, Access::Read, &store.disk_options()).unwrap();
    let mut bytes = vec![0; usize::try_from(SLOTS * 4096).unwrap()];
    disk.read(0, 0, &mut bytes).unwrap();
    bytes.chunks(4096).map(|b| u64::from_le_bytes(b[..8].try_into().unwrap())).collect()
}

/// The last number below `end` that went to a slot of a disk; zero for none. Numbers go to the two
/// disks in turn, from 2 on.
fn expected(disk: u64, slot: u64, end: u64) -> u64 {
    (2..end).rev().find(|n| n % 2 == disk && n / 2 % SLOTS == slot).unwrap_or(0)
}

/// A driver writes ascending numbers to two disks, each only when the one before is complete. Every
/// pair of children holds all numbers up to one, and none after it.
#[test]
fn a_cut_across_two_disks_is_one_instant() {
    let forks = if soak() { 100 } else { 10 };
    let store = TestStore::new();
    let daemon = store.daemon();
    let sockets = ["a", "b"].map(|name| {
        let socket = store.path(&format!("{name}.sock"));
        store.done(&["disk", "create", name, "--size", "16M"]);
        store.done(&["disk", "attach", name, "--socket", socket.to_str().unwrap()]);
        socket
    });
    let [mut a, mut b] =
        sockets.map(|socket| Client::connect(&socket, Options::default()).expect("let in"));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        let writer = s.spawn(|| {
            let mut number = 2;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let queue = if number % 2 == 0 { &mut a.1[0] } else { &mut b.1[0] };
                write_number(queue, number);
                number += 1;
            }
            number
        });
        for n in 0..forks {
            std::thread::sleep(Duration::from_millis(30));
            fork(&store, &["a", &format!("a{n}"), "--with", &format!("b:b{n}")]);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        println!("numbers written: {}", writer.join().unwrap());
    });
    drop((a, b));
    assert!(daemon.terminate().success());
    let how = OpenOptions { access: Access::Read, cache: CacheMode::Auto, boot: boot_id() };
    let dir = StoreDir::open(store.store(), &how).unwrap();
    let mut before = 0;
    for n in 0..forks {
        let [a, b] = ["a", "b"].map(|disk| numbers(&dir, &format!("{disk}{n}")));
        let last = a.iter().chain(&b).copied().max().unwrap();
        for (disk, found) in (0..).zip([a, b]) {
            for (slot, found) in (0..).zip(found) {
                let want = expected(disk, slot, last + 1);
                assert_eq!(found, want, "fork {n}, up to {last}: disk {disk}, slot {slot}");
            }
        }
        assert!(last >= before, "cuts follow each other");
        before = last;
    }
    assert!(before > 2, "the driver made progress");
}

/// Sees that nothing completes. What was answered before the cut may be seen by the driver only
/// after it, when the machine is busy: it once was, by 50 ms.
fn stands_still(done: &dyn Fn() -> u64) {
    until("nothing completes while it is held", || {
        let before = done();
        std::thread::sleep(Duration::from_millis(300));
        done() == before
    });
}

/// From the instant of the cut on no request is answered until the token is released, so that
/// somebody can take a machine's memory at that instant; a token that nobody releases runs out.
#[test]
fn a_token_holds_the_disk_until_it_is_released_or_runs_out() {
    let bench = ServedDisk::new(TestStore::new());
    let _ = bench.refused(&["disk", "fork", "vm", "none", "--hold", "100"], 2);
    let daemon = bench.daemon();
    bench.attach();
    let (client, queues) = bench.connect(false);
    let (loads, ()) = load::during(bench.loads(queues, 47), |done| {
        let progress = || {
            let before = done();
            until("progress", || done() >= before + 100);
        };
        progress();
        let forked = fork(&bench, &["vm", "one", "--hold", "30000"]);
        let token = forked["token"].as_str().unwrap();
        stands_still(done);
        // Nobody else gets at it meanwhile.
        let _ = bench.refused(&["disk", "fork", "vm", "two"], 5);
        let _ = bench.refused(&["disk", "resize", "vm", "128M"], 5);
        let _ = bench.refused(&["daemon", "upgrade"], 5);

        let released = bench.json(&["disk", "fork", "--release", token]);

        assert!(released["held_us"].as_u64().unwrap() >= 300_000, "{released}");
        progress();
        let _ = bench.refused(&["disk", "fork", "--release", token], 3);
        fork(&bench, &["vm", "three", "--hold", "3000"]);
        stands_still(done);
        progress();
        // One that is out when the daemon is stopped does not keep it.
        fork(&bench, &["vm", "four", "--hold", "200"]);
        progress();
    });
    drop(client);
    fork(&bench, &["vm", "five", "--hold", "60000"]);
    let stopped = Instant::now();
    assert!(daemon.terminate().success());
    assert!(stopped.elapsed() < Duration::from_secs(20));
    bench.compare(&loads);
}

/// Who forks a whole machine is told of the instant before the fork is durable, or says when it is,
/// and asks for the children later. The machine goes on in between.
#[test]
fn a_fork_is_answered_at_its_instant() {
    let bench = ServedDisk::new(TestStore::new());
    let daemon = bench.daemon();
    let of = |child: &str, more: Value| {
        let mut asked =
            json!({ "disks": [{ "disk": "vm", "children": [child] }], "return": "cut" });
        asked.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        asked
    };
    let none = daemon.ask("POST", "/v1/forks", of("none", json!({})).to_string().as_bytes());
    assert_eq!(none.status, 400, "nobody serves it");
    bench.attach();
    let (client, queues) = bench.connect(false);
    let (loads, ()) = load::during(bench.loads(queues, 53), |done| {
        for (child, more) in [("one", json!({})), ("two", json!({ "hold_ms": 30_000 }))] {
            let held = more.get("hold_ms").is_some();
            let before = done();
            until("progress", || done() >= before + 100);

            let cut = daemon.json("POST", "/v1/forks", &of(child, more));
            let forked = daemon.json("GET", &path_of(&cut), &Value::Null);

            assert_eq!(forked["token"], cut["token"]);
            assert_eq!(forked["pause_us"], cut["pause_us"]);
            assert_eq!(forked["children"][0]["name"], child);
            // Whoever asks again gets the same.
            assert_eq!(daemon.json("GET", &path_of(&cut), &Value::Null), forked);
            if held {
                stands_still(done);
                let path = format!("{}/release", path_of(&cut));
                daemon.json("POST", &path, &Value::Null);
            }
            let _ = bench.json(&["disk", "show", child]);
        }
        // Ready first, and the instant when somebody says so; or not at all.
        for (child, cuts) in [("three", true), ("four", false)] {
            let asked = of(child, json!({ "return": "ready" }));
            let ready = daemon.json("POST", "/v1/forks", &asked);
            assert!(ready["pause_us"].is_null(), "{ready}");
            let before = done();
            until("progress", || done() >= before + 100);
            // Its name is kept, and nothing has it yet.
            let _ = bench.refused(&["disk", "show", child], 5);
            if cuts {
                let cut = daemon.json("POST", &format!("{}/cut", path_of(&ready)), &Value::Null);
                let forked = daemon.json("GET", &path_of(&ready), &Value::Null);
                assert_eq!(forked["pause_us"], cut["pause_us"]);
                let again = daemon.json("POST", &format!("{}/cut", path_of(&ready)), &Value::Null);
                assert_eq!(again, cut, "who asks again gets the same answer");
            } else {
                assert_eq!(daemon.ask("DELETE", &path_of(&ready), b"").status, 204);
                assert_eq!(daemon.ask("GET", &path_of(&ready), b"").status, 409);
                let _ = bench.refused(&["disk", "show", child], 3);
            }
        }
    });
    drop(client);
    // What fails before the instant is answered at once.
    let taken = daemon.ask("POST", "/v1/forks", of("one", json!({})).to_string().as_bytes());
    assert_eq!(taken.status, 409);
    let unknown = daemon.ask("GET", &format!("/v1/forks/{}", uuid::Uuid::new_v4()), b"");
    assert_eq!(unknown.status, 404);
    assert!(daemon.terminate().success());
    bench.compare(&loads);
}

fn path_of(cut: &Value) -> String {
    format!("/v1/forks/{}", cut["token"].as_str().unwrap())
}

/// The daemon is killed at random moments of forks under load. The guest's driver connects again
/// and misses nothing, and each child is there with what it should hold, or not at all.
#[test]
fn a_daemon_killed_in_a_fork_loses_nothing() {
    let kills = if soak() { 100 } else { 12 };
    let seed = seed(43);
    println!("repeat with OFFSHOOT_SEED={seed} {REPEAT}");
    let bench = ServedDisk::new(TestStore::new());
    let first = bench.daemon();
    bench.attach();
    let (mut client, queues) = bench.connect(false);
    let mut rng = Rng::new(seed);
    let (loads, daemon) = load::during(bench.loads(queues, seed), |_| {
        let mut daemon = first;
        for n in 0..kills {
            std::thread::sleep(Duration::from_millis(20));
            let mut asked = Command::new(program("offshoot"));
            asked.env_remove("OFFSHOOT_API").arg("--store").arg(bench.store());
            asked.args(["disk", "fork", "vm", &format!("x{n}"), &format!("y{n}")]);
            let mut asked = asked.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            // A fork begins some milliseconds after that, and takes some more.
            std::thread::sleep(Duration::from_micros(rng.below(60_000)));
            daemon.kill();
            // Whatever it was told: what counts is what is there.
            let _ = asked.wait();
            daemon = bench.daemon();
            let end = Instant::now() + Duration::from_secs(20);
            while let Err(e) = client.reconnect(&bench.socket()) {
                assert!(Instant::now() < end, "the daemon does not come back: {e}");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        std::thread::sleep(Duration::from_millis(100));
        daemon
    });
    drop(client);
    assert!(daemon.terminate().success());
    // What a killed process had taken and not used is nobody's.
    bench.done(&["disk", "repair", "vm"]);
    bench.compare(&loads);
    let listed: Value = serde_json::from_slice(&bench.done(&["disk", "ls", "--json"])).unwrap();
    let names: Vec<&str> =
        listed.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    let mut made = 0;
    for n in 0..kills {
        let both = [format!("x{n}"), format!("y{n}")];
        let there = both.iter().filter(|name| names.contains(&name.as_str())).count();
        assert!(there == 0 || there == 2, "all or none of {both:?}: {names:?}");
        if there == 2 {
            made += 1;
            let [x, y] = both.map(|name| {
                bench.done(&["disk", "check", &name]);
                bench.done(&["disk", "read", &name, "--offset", "0", "--length", "64M"])
            });
            assert!(x == y, "children of one instant hold the same");
        }
    }
    println!("{made} of {kills} forks were done when the daemon was killed");
}
