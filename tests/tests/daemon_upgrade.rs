//! Upgrade in place: a daemon hands its disks, sockets and guests to a successor, and a guest's
//! driver sees nothing of it but a pause.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use offshoot_tests::daemon::{Reply, Talk, ask, program};
use offshoot_tests::load::{self, Load};
use offshoot_tests::mount::Mount;
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::{Value, json};

/// A store with one disk.
fn bench() -> ServedDisk {
    ServedDisk::new(TestStore::new())
}

fn refused(bench: &TestStore, args: &[&str], code: i32) -> String {
    let output = bench.offshoot(args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    said
}

fn upgrade(bench: &TestStore) -> Value {
    let program = program("blockd");
    let args = ["daemon", "upgrade", "--json", "--program", program.to_str().unwrap()];
    serde_json::from_slice(&bench.done(&args)).unwrap()
}

/// Asks the daemon that has the store now, whichever it is.
fn get(bench: &TestStore, path: &str) -> Value {
    ask(&bench.api(), "GET", path, b"").unwrap().json()
}

fn pid(bench: &TestStore) -> u64 {
    get(bench, "/v1/health")["pid"].as_u64().unwrap()
}

/// Does something while a guest's driver works on the disk over one connection, and gives back what
/// must be on it. `Client` does not connect again by itself: a lost connection fails the load.
fn under_load(bench: &ServedDisk, packed: bool, seed: u64, work: impl FnOnce()) -> Vec<Load> {
    let (client, queues) = bench.connect(packed);
    let (loads, ()) = load::during(bench.loads(queues, seed), |done| {
        let progress = || {
            let before = done();
            until("progress", || done() >= before + 200);
        };
        progress();
        work();
        progress();
    });
    drop(client);
    loads
}

fn upgrades_under_load(options: &[&str], packed: bool, upgrades: usize) {
    let upgrades = if soak() { upgrades * 17 } else { upgrades };
    let seed = seed(91);
    println!("repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test daemon_upgrade");
    let bench = bench();
    let mut first = bench.daemon_with(options);
    bench.attach();
    let mut rng = Rng::new(seed);
    let mut blackouts = Vec::new();
    let loads = under_load(&bench, packed, seed, || {
        for _ in 0..upgrades {
            std::thread::sleep(Duration::from_micros(rng.below(150_000)));
            let before = pid(&bench);
            let upgraded = upgrade(&bench);
            assert_ne!(upgraded["pid"], before);
            assert_eq!(upgraded["front_ends"], 1, "{upgraded}: {}", bench.log());
            assert_eq!(bench.writes_directly(pid(&bench)), !options.is_empty());
            blackouts.push(Duration::from_micros(upgraded["blackout_us"].as_u64().unwrap()));
        }
    });
    assert!(first.wait().success());
    blackouts.sort_unstable();
    let (median, worst) = (blackouts[blackouts.len() / 2], blackouts[blackouts.len() - 1]);
    let longest = loads.iter().map(|load| load.longest).max().unwrap();
    println!("blackout of {upgrades} upgrades: {median:?} (median), {worst:?} (longest)");
    println!("longest time without a completion, as the driver saw it: {longest:?}");
    bench.done(&["daemon", "stop"]);
    bench.compare(&loads);
}

#[test]
fn a_guest_goes_on_through_upgrades() {
    upgrades_under_load(&[], false, 6);
}

#[test]
fn a_guest_goes_on_through_upgrades_with_packed_rings() {
    upgrades_under_load(&[], true, 6);
}

#[test]
fn a_guest_goes_on_through_upgrades_past_the_page_cache() {
    upgrades_under_load(&["--cache", "direct"], false, 2);
}

/// What a successor does up to the moment at which it is of no use.
enum Fake {
    /// Says that it speaks something else.
    Stranger,
    /// Ends with the store closed by the other one.
    Hesitates,
    /// Ends with everything in its hands, before it has opened a disk.
    Drops,
    /// Ends after it has said that it has the store.
    TakesAndDies,
}

fn say(socket: &mut UnixStream, message: &Value) {
    let body = message.to_string();
    let head = [u32::try_from(body.len()).unwrap().to_le_bytes(), [0; 4]].concat();
    socket.write_all(&[&head, body.as_bytes()].concat()).unwrap();
}

fn hear(socket: &mut UnixStream) -> Vec<u8> {
    let mut head = [0; 8];
    socket.read_exact(&mut head).unwrap();
    let mut body = vec![0; u32::from_le_bytes(head[..4].try_into().unwrap()).try_into().unwrap()];
    socket.read_exact(&mut body).unwrap();
    body
}

/// Has the daemon hand over to something that is no daemon.
fn hand_over_to(bench: &TestStore, fake: &Fake) -> Reply {
    let path = bench.path("fake.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let reply = std::thread::scope(|s| {
        let asked = s.spawn(|| {
            let body = json!({ "socket": path }).to_string();
            ask(&bench.api(), "POST", "/v1/handover", body.as_bytes()).unwrap()
        });
        let (mut socket, _) = listener.accept().unwrap();
        let mut state = vec![];
        let layouts = if matches!(fake, Fake::Stranger) { [9000] } else { [1] };
        say(&mut socket, &json!({ "layouts": layouts, "version": "fake" }));
        if matches!(fake, Fake::Drops | Fake::TakesAndDies) {
            assert_eq!(hear(&mut socket), b"null", "the store is free");
            say(&mut socket, &json!("Ready"));
            let mut head = [0; 8];
            socket.read_exact(&mut head).unwrap();
            assert!(head[4] > 0, "descriptors come with it");
            let bytes = u32::from_le_bytes(head[..4].try_into().unwrap());
            // And one more byte, which carries the descriptors.
            state = vec![0; usize::try_from(bytes).unwrap() + 1];
        }
        if matches!(fake, Fake::TakesAndDies) {
            socket.read_exact(&mut state).unwrap();
            say(&mut socket, &json!("Opened"));
        }
        drop(socket);
        asked.join().unwrap()
    });
    fs::remove_file(path).unwrap();
    reply
}

fn failing_successors(packed: bool) {
    let bench = bench();
    let daemon = bench.daemon();
    bench.attach();
    let before = pid(&bench);
    let loads = under_load(&bench, packed, 17, || {
        let reply = hand_over_to(&bench, &Fake::Stranger);
        assert_eq!(reply.json()["error"]["kind"], "unsupported", "{reply:?}");
        for fake in [Fake::Drops, Fake::Hesitates, Fake::Drops, Fake::Drops] {
            let reply = hand_over_to(&bench, &fake);
            assert_eq!(reply.json()["error"]["kind"], "failed", "{reply:?}");
        }
        let nbd = bench.path("vm.nbd");
        bench.done(&["disk", "export-nbd", "vm", "--socket", nbd.to_str().unwrap()]);
        for fake in [Fake::Hesitates, Fake::Drops] {
            assert_eq!(hand_over_to(&bench, &fake).status, 500);
            let mut greeting = [0; 8];
            UnixStream::connect(&nbd).unwrap().read_exact(&mut greeting).unwrap();
            assert_eq!(&greeting, b"NBDMAGIC");
            until("the client is gone", || get(&bench, "/v1/exports")[1]["connected"] == 0);
        }
        let said = refused(&bench, &["daemon", "upgrade", "--program", "/bin/false"], 13);
        assert!(said.contains("the new one ended"), "{said}");
        assert_eq!(pid(&bench), before);
    });
    assert!(!bench.path("api.sock.next").exists(), "a successor that ended leaves nothing");
    assert!(daemon.terminate().success());
    bench.compare(&loads);
}

/// The guest's connection, its rings and what is in work survive a successor that is no good.
#[test]
fn a_successor_that_fails_leaves_the_daemon_in_charge() {
    failing_successors(false);
}

#[test]
fn a_successor_that_fails_leaves_the_daemon_in_charge_of_packed_rings() {
    failing_successors(true);
}

/// The point of no return: what happens after it is a crash of the daemon, which loses nothing.
#[test]
fn a_successor_that_dies_with_the_store_loses_nothing() {
    let bench = bench();
    let mut first = bench.daemon();
    bench.attach();
    let (mut client, queues) = bench.connect(false);
    let mut loads: Vec<Load> = Vec::new();
    for (i, queue) in (0..).zip(queues) {
        let mut load = Load::new(queue, i * 4096, 4096, i);
        load.run(&mut |done| done < 400);
        loads.push(load);
    }
    let failed = hand_over_to(&bench, &Fake::TakesAndDies);
    assert_eq!(failed.json()["error"]["kind"], "failed", "{failed:?}");
    assert!(first.wait().success(), "the store is not its own any more");

    let second = bench.daemon();
    client.reconnect(&bench.socket()).unwrap();
    for load in &mut loads {
        load.run(&mut |done| done < 800);
        load.verify();
    }
    drop(client);
    assert!(second.terminate().success());
    bench.compare(&loads);
}

#[test]
fn nobody_is_cut_off_without_being_asked() {
    let bench = bench();
    let mut first = bench.daemon();
    let nbd = bench.path("vm.nbd");
    bench.done(&["disk", "export-nbd", "vm", "--socket", nbd.to_str().unwrap()]);
    let own = program("blockd");
    let upgrade = ["daemon", "upgrade", "--program", own.to_str().unwrap()];

    let client = UnixStream::connect(&nbd).unwrap();
    let mut greeting = [0; 16];
    (&client).read_exact(&mut greeting).unwrap();
    let said = refused(&bench, &upgrade, 5);
    assert!(said.contains("NBD client") && said.contains("--force"), "{said}");
    drop(client);

    // A session that reads another disk is a job.
    bench.done(&["disk", "create", "other", "--size", "1M"]);
    let mut talk = Talk::to(&bench.api()).unwrap();
    let session = json!({"disk": "other", "use": "read"}).to_string();
    let opened = talk.ask("POST", "/v1/sessions", session.as_bytes()).unwrap();
    assert_eq!(opened.status, 201, "{opened:?}");
    let said = refused(&bench, &upgrade, 5);
    assert!(said.contains("1 jobs are running") && said.contains("--force"), "{said}");
    assert!(!bench.path("api.sock.next").exists());

    bench.done(&[&upgrade[..], &["--force"]].concat());

    assert!(first.wait().success());
    // The NBD socket was never away.
    let client = UnixStream::connect(&nbd).unwrap();
    (&client).read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    bench.done(&["daemon", "stop"]);
}

/// All that a daemon knows and was told goes over, and the second upgrade finds it as well.
#[test]
fn a_successor_serves_what_was_served_in_the_same_way() {
    let bench = bench();
    let daemon = bench.daemon();
    bench.attach();
    let second = bench.path("second.sock");
    bench.done(&["disk", "create", "base", "--size", "8M"]);
    bench.done(&["disk", "seal", "base"]);
    bench.done(&["disk", "attach", "base", "--readonly", "--socket", second.to_str().unwrap()]);
    bench.done(&["disk", "limits", "vm", "--iops", "4321"]);
    let exports = get(&bench, "/v1/exports");
    let arguments = get(&bench, "/v1/health")["arguments"].clone();
    let last_event = |bench: &TestStore| {
        let text = ask(&bench.api(), "GET", "/v1/events", b"").unwrap().body;
        let text = String::from_utf8(text).unwrap();
        let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        last["seq"].as_u64().unwrap()
    };
    for _ in 0..2 {
        let before = last_event(&bench);
        let upgraded = upgrade(&bench);

        assert_eq!(upgraded["arguments"], arguments);
        assert_eq!(get(&bench, "/v1/exports"), exports);
        assert_eq!(get(&bench, "/v1/stats")[1]["limits"]["iops"], 4321);
        assert!(last_event(&bench) > before, "followers see no number twice");
        let file: Value =
            serde_json::from_slice(&fs::read(bench.store().join("daemon.json")).unwrap()).unwrap();
        assert_eq!(file["pid"], upgraded["pid"]);
    }
    drop(daemon);
    bench.done(&["disk", "detach", "vm"]);
    assert!(!bench.socket().exists());
    bench.done(&["daemon", "stop"]);
    assert!(!bench.api().exists());
}

/// A fork that stands by keeps no daemon from handing over, and is none any more then.
#[test]
fn a_fork_that_stands_by_ends_with_an_upgrade() {
    let bench = bench();
    let mut first = bench.daemon();
    bench.attach();
    let socket = bench.path("child.sock");
    let export = json!({ "kind": "vhost-user", "socket": socket });
    let serve = json!({ "child": "child", "export": export });
    let disk = json!({ "disk": "vm", "children": ["child"], "serve": [serve] });
    first.json("POST", "/v1/forks", &json!({ "disks": [disk], "return": "standby" }));
    assert!(socket.exists());

    upgrade(&bench);

    assert!(first.wait().success());
    assert!(!socket.exists());
    let exports = get(&bench, "/v1/exports");
    assert_eq!(exports.as_array().unwrap().len(), 1, "{exports}");
    bench.done(&["disk", "fork", "vm", "child"]);
    bench.done(&["daemon", "stop"]);
}

/// Requests that wait for space wait on at the successor, and the guest sees no error.
///
/// Story: the log of a new daemon lies in the store's folder. On a full file system the first line
/// of it ended the daemon, and its state file could not be written, which ended it as well.
#[test]
fn what_is_held_is_held_at_the_successor() {
    let Some(mount) = Mount::ext4("what_is_held_is_held_at_the_successor", 96 << 20) else {
        return;
    };
    let bench = ServedDisk::new(TestStore::at(mount.path().join("store")));
    let mut first = bench.daemon();
    bench.attach();
    let held = || get(&bench, "/v1/health")["held"] == json!(["vm"]);
    let loads = under_load(&bench, false, 3, || {
        let filler = mount.fill(0);
        until("held", held);

        assert_eq!(upgrade(&bench)["front_ends"], 1);

        until("held again", held);
        drop(filler);
        bench.done(&["disk", "resume", "vm"]);
        until("resumed", || !held());
    });
    assert!(first.wait().success());
    bench.done(&["daemon", "stop"]);
    bench.compare(&loads);
}
