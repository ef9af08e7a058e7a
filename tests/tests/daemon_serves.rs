//! Disks in the service of a real daemon process: what is attached, who is connected, and what
//! becomes of it when the daemon ends, in order or not.

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use offshoot_tests::daemon::{Daemon, Reply, program};
use offshoot_tests::load::{Load, loads};
use offshoot_tests::mount::Mount;
use offshoot_tests::nbd;
use offshoot_tests::pattern::{self, Found};
use offshoot_tests::rng::seed;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::{Value, json};
use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};

const MIB: u64 = 1 << 20;

fn create(daemon: &Daemon, name: &str, size: u64) {
    daemon.json("POST", "/v1/disks", &json!({"name": name, "size": size}));
}

fn attach(daemon: &Daemon, name: &str, export: Value) -> Reply {
    let body = json!({ "export": export }).to_string();
    daemon.ask("POST", &format!("/v1/disks/{name}/attach"), body.as_bytes())
}

fn get(daemon: &Daemon, path: &str) -> Value {
    daemon.json("GET", path, &Value::Null)
}

fn kind(reply: &Reply) -> String {
    reply.json()["error"]["kind"].as_str().unwrap_or("none").to_owned()
}

fn events(daemon: &Daemon) -> Vec<(String, String)> {
    let text = String::from_utf8(daemon.ask("GET", "/v1/events", b"").body).unwrap();
    let event = |line: &str| {
        let event: Value = serde_json::from_str(line).unwrap();
        let field = |name: &str| event[name].as_str().unwrap().to_owned();
        (field("kind"), field("object"))
    };
    text.lines().map(event).collect()
}

/// A guest does not notice that the daemon was killed: its socket is there again, with the same
/// options, and every write that completed is in the disk.
#[test]
fn what_was_served_is_served_again() {
    let seed = seed(5);
    println!("repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test daemon_serves");
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", 64 * MIB);
    create(&daemon, "b", 64 * MIB);
    let (vhost, nbd) = (bench.path("a.sock"), bench.path("a.nbd"));
    let export = json!({"kind": "vhost-user", "socket": vhost, "queues": 2});
    assert_eq!(attach(&daemon, "a", export).status, 201);
    let export = json!({"kind": "nbd", "socket": nbd, "read_only": true});
    assert_eq!(attach(&daemon, "a", export).status, 201);
    let limits = json!({"iops": 50_000, "bytes_per_s": 0, "burst_ms": 200});
    assert_eq!(daemon.json("PUT", "/v1/disks/a/limits", &limits), limits);
    let options = Options { queues: 2, data_size: 2 << 20, ..Options::default() };
    let (mut client, queues) = Client::connect(&vhost, options).unwrap();
    let mut loads = loads(queues, 64 * MIB, seed);

    let mut running = Some(daemon);
    for _ in 0..3 {
        let killed = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            let threads = loads.iter_mut().map(|load| {
                // Requests go on being made while nobody is there to answer them.
                scope.spawn(move || {
                    let from = load.done;
                    load.run(&mut |done| !killed.load(Ordering::Relaxed) || done < from + 300);
                })
            });
            let threads: Vec<_> = threads.collect();
            std::thread::sleep(Duration::from_millis(100));
            running.take().expect("it runs").kill();
            running = Some(bench.daemon());
            client.reconnect(&vhost).unwrap();
            killed.store(true, Ordering::Relaxed);
            threads.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    let daemon = running.expect("it runs");
    loads.iter_mut().for_each(Load::verify);
    until("both queues run", || get(&daemon, "/v1/exports")[0]["queues_running"] == 2);
    let exports = get(&daemon, "/v1/exports");
    let of = |i: usize, field: &str| exports[i][field].clone();
    assert_eq!((of(0, "kind"), of(0, "queues")), (json!("vhost-user"), json!(2)), "{exports}");
    assert_eq!((of(0, "state"), of(0, "queues_running")), (json!("connected"), json!(2)));
    assert_eq!((of(1, "kind"), of(1, "read_only")), (json!("nbd"), json!(true)));
    assert_eq!(get(&daemon, "/v1/stats")[0]["limits"], limits);
    drop(client);
    assert!(daemon.terminate().success());
    assert!(!vhost.exists() && !nbd.exists());
    // Ended in order, it serves the same again, and the disk holds what the guest was told.
    let daemon = bench.daemon();
    assert_eq!(get(&daemon, "/v1/exports").as_array().unwrap().len(), 2);
    let bytes = daemon.ask("GET", "/v1/disks/a/data", b"").body;
    loads.iter().for_each(|load| load.holds(&bytes));
    let ended = daemon.json("POST", "/v1/disks/a/detach", &json!({}));
    assert_eq!(ended.as_array().unwrap().len(), 2);
    let checked = daemon.json("POST", "/v1/disks/a/check", &Value::Null);
    assert_eq!(checked["clean"], true, "{checked}");
    daemon.kill();
    assert_eq!(get(&bench.daemon(), "/v1/exports"), json!([]));
}

#[test]
fn a_disk_in_service_can_be_looked_at_and_not_be_written_to() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", 8 * MIB);
    let bytes = vec![7; 1 << 20];
    assert_eq!(daemon.ask("PUT", "/v1/disks/a/data?offset=4096", &bytes).status, 200);
    let socket = bench.path("a.sock");

    let export = json!({"kind": "vhost-user", "socket": socket});
    let attached = attach(&daemon, "a", export.clone());

    assert_eq!((attached.status, attached.json()["state"].clone()), (201, json!("listening")));
    let again = attach(&daemon, "a", export);
    assert_eq!((again.status, kind(&again)), (409, "exists".into()), "{again:?}");
    assert_eq!(daemon.ask("GET", "/v1/disks/a/data?offset=4096&length=1048576", b"").body, bytes);
    assert_eq!(get(&daemon, "/v1/disks/a")["exports"][0]["socket"], json!(socket));
    for (method, what) in [
        ("PUT", "/data"),
        ("POST", "/seal"),
        ("POST", "/check"),
        ("POST", "/repair"),
        ("DELETE", ""),
    ] {
        let reply = daemon.ask(method, &format!("/v1/disks/a{what}"), b"");
        assert_eq!((reply.status, kind(&reply)), (409, "busy".into()), "{what}: {reply:?}");
        assert!(reply.json()["error"]["hint"].as_str().unwrap().contains("detach"), "{reply:?}");
    }
    let (mut client, _queues) = Client::connect(&socket, Options::default()).unwrap();
    assert_eq!(client.disk_size().unwrap(), 8 * MIB);
    let resize = json!({"size": {"grow": 4 * MIB}});
    assert_eq!(daemon.json("POST", "/v1/disks/a/resize", &resize)["size"], 12 * MIB);
    assert!(client.config_changed(10_000).unwrap());
    assert_eq!(client.disk_size().unwrap(), 12 * MIB);
    let refused = daemon.ask("POST", "/v1/disks/a/detach", b"");
    assert_eq!((refused.status, kind(&refused)), (409, "in-use".into()), "{refused:?}");
    assert!(socket.exists());
    let peer = get(&daemon, "/v1/exports")[0]["peers"][0].clone();
    assert_eq!(peer, json!(std::process::id()));

    daemon.json("POST", "/v1/disks/a/detach", &json!({"force": true}));

    assert!(!socket.exists());
    assert_eq!(daemon.ask("PUT", "/v1/disks/a/data", &bytes).status, 200);
    assert_eq!(get(&daemon, "/v1/disks/a")["size"], 12 * MIB);
    let told: Vec<String> = events(&daemon)
        .into_iter()
        .filter(|(kind, object)| object == "disk a" && !kind.starts_with("job"))
        .map(|(kind, _)| kind)
        .collect();
    assert_eq!(told, ["attached", "connected", "disconnected", "detached"]);
}

/// One bad disk keeps no other from being served, and what is wrong with it can be read.
#[test]
fn a_disk_that_cannot_be_served_again_is_listed_as_failed() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    for name in ["good", "gone"] {
        create(&daemon, name, MIB);
        let export = json!({"kind": "vhost-user", "socket": bench.path(name)});
        assert_eq!(attach(&daemon, name, export).status, 201);
    }
    let segment = get(&daemon, "/v1/disks/gone")["segment"].as_str().unwrap().to_owned();
    assert!(daemon.terminate().success());
    let file = bench.store().join(format!("{segment}.seg"));
    fs::rename(&file, bench.path("aside")).unwrap();

    let daemon = bench.daemon();

    let exports = get(&daemon, "/v1/exports");
    let state = |name: &str| {
        let all = exports.as_array().unwrap();
        all.iter().find(|e| e["disk"] == name).unwrap_or_else(|| panic!("{exports}")).clone()
    };
    assert_eq!(state("good")["state"], "listening");
    assert_eq!(state("gone")["state"], "failed");
    assert!(state("gone")["error"].as_str().unwrap().contains("disk gone"), "{exports}");
    assert_eq!(get(&daemon, "/v1/health")["failed"], json!(["gone"]));
    assert!(Client::connect(&bench.path("good"), Options::default()).is_ok());
    // Kept for a start at which it is there again.
    assert!(daemon.terminate().success());
    fs::rename(bench.path("aside"), file).unwrap();
    let daemon = bench.daemon();
    assert_eq!(get(&daemon, "/v1/health")["failed"], json!([]));
    assert!(Client::connect(&bench.path("gone"), Options::default()).is_ok());
}

/// The story: a socket that is there before it is remembered leaves a guest waiting for ever when
/// the daemon is killed in between. So at every instant, a socket that exists is remembered.
#[test]
fn a_socket_that_exists_is_remembered() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", MIB);
    let socket = bench.path("a.sock");
    let done = AtomicBool::new(false);
    let file = bench.store().join("attachments.json");
    let looks = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut looks = 0_u64;
            while !done.load(Ordering::Relaxed) {
                let Ok(before) = fs::metadata(&socket) else { continue };
                let remembered = fs::read_to_string(&file).unwrap_or_default();
                use std::os::unix::fs::MetadataExt as _;
                let same = fs::metadata(&socket).is_ok_and(|m| m.ino() == before.ino());
                assert!(!same || remembered.contains("a.sock"), "not remembered: {remembered}");
                looks += 1;
            }
            looks
        });
        for _ in 0..20 {
            let export = json!({"kind": "vhost-user", "socket": socket});
            assert_eq!(attach(&daemon, "a", export).status, 201);
            daemon.json("POST", "/v1/disks/a/detach", &json!({}));
        }
        done.store(true, Ordering::Relaxed);
        watcher.join().unwrap()
    });
    assert!(looks > 0, "the watcher never saw the socket");
}

#[test]
fn numbers_of_disks_in_service_are_told() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", 8 * MIB);
    let socket = bench.path("a.sock");
    attach(&daemon, "a", json!({"kind": "vhost-user", "socket": socket}));
    let options = Options { data_size: 2 << 20, ..Options::default() };
    let (_client, mut queues) = Client::connect(&socket, options).unwrap();
    let mut load = Load::new(queues.remove(0), 0, 8 * MIB / 512, 1);
    load.run(&mut |done| done < 500);
    load.flush();

    let text = String::from_utf8(daemon.ask("GET", "/metrics", b"").body).unwrap();

    let value = |line: &str| {
        let found = text.lines().find_map(|l| l.strip_prefix(line));
        let found = found.unwrap_or_else(|| panic!("no {line} in\n{text}"));
        found.trim().parse::<f64>().unwrap()
    };
    let kinds = ["read", "write", "flush", "discard", "write_zeroes"];
    let label = |kind: &str| format!("{{disk=\"a\",kind=\"{kind}\"}} ");
    let sum =
        |name: &str| -> f64 { kinds.iter().map(|k| value(&format!("{name}{}", label(k)))).sum() };
    assert!((sum("offshoot_disk_requests_total") - load.done as f64).abs() < 0.5, "{text}");
    assert!((sum("offshoot_disk_request_seconds_count") - load.done as f64).abs() < 0.5);
    assert!(sum("offshoot_disk_request_seconds_sum") > 0.0);
    let bucket = "offshoot_disk_request_seconds_bucket{disk=\"a\",kind=\"write\",le=\"+Inf\"} ";
    let count = format!("offshoot_disk_request_seconds_count{}", label("write"));
    assert!((value(bucket) - value(&count)).abs() < 0.5);
    assert!(value("offshoot_disk_front_ends{disk=\"a\"} ") > 0.5);
    assert!(value("offshoot_disk_map_bytes{disk=\"a\"} ") > 0.5);
}

/// What was exported over NBD is what a tool that is not ours reads.
#[test]
fn a_tool_reads_a_disk_over_nbd() {
    if !offshoot_tests::mount::have("a_tool_reads_a_disk_over_nbd", &["qemu-img"]) {
        return;
    }
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", 8 * MIB);
    let bytes: Vec<u8> = (0..2_000_000_u32).map(|i| (i % 253) as u8).collect();
    assert_eq!(daemon.ask("PUT", "/v1/disks/a/data?offset=12345", &bytes).status, 200);
    let socket = bench.path("nbd");
    let export = json!({"kind": "nbd", "socket": socket, "read_only": true});
    assert_eq!(attach(&daemon, "a", export).status, 201);
    let (uri, raw) = (format!("nbd+unix:///a?socket={}", socket.display()), bench.path("raw"));

    let raw_arg = raw.to_str().unwrap();
    offshoot_tests::mount::run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, raw_arg]);

    assert!(fs::read(&raw).unwrap() == daemon.ask("GET", "/v1/disks/a/data", b"").body);
}

/// Those who use a disk over NBD are told of by name, and so is what one of them did wrong; one who
/// only haggles is not.
#[test]
fn clients_of_nbd_come_and_go_in_the_events() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", MIB);
    let socket = bench.path("nbd");
    assert_eq!(attach(&daemon, "a", json!({"kind": "nbd", "socket": socket})).status, 201);
    let before = events(&daemon).len();
    let told = |count: usize| -> Vec<String> {
        until("it is told", || events(&daemon).len() >= before + count);
        let text = String::from_utf8(daemon.ask("GET", "/v1/events", b"").body).unwrap();
        let line = |line: &str| {
            let event: Value = serde_json::from_str(line).unwrap();
            assert_eq!(event["object"], "disk a");
            format!("{} {}", event["kind"].as_str().unwrap(), event["detail"].as_str().unwrap())
        };
        text.lines().skip(before).map(line).collect()
    };
    let client = || nbd::Client::connect(&socket).greeted();
    let who =
        format!("process {} of user {}", std::process::id(), rustix::process::geteuid().as_raw());

    drop(client());
    let mut good = client();
    good.go("a");
    told(1);
    drop(good);
    told(2);
    let mut bad = client();
    bad.go("a");
    bad.send(&[0; 28]);
    bad.until_closed();
    told(4);
    let mut cut_off = client();
    cut_off.go("a");
    told(5);
    daemon.json("POST", "/v1/disks/a/detach", &json!({"force": true}));

    let (came, went) = (format!("connected {who}"), format!("disconnected {who}"));
    let broke = format!("{went}: it does not follow the protocol");
    let detached = format!("detached nbd at {}", socket.display());
    let expected = [&came, &went, &came, &broke, &came, &went, &detached];
    assert_eq!(told(7).iter().collect::<Vec<_>>(), expected);
}

/// Story: to a daemon in a container the kernel gives the number 0 for clients outside of it. That
/// was kept in a type that never holds 0.
#[test]
fn clients_whose_number_the_daemon_cannot_see_are_served() {
    let test = "daemon_serves::clients_whose_number_the_daemon_cannot_see_are_served";
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child"]);
        command
    };
    if !unshare().arg("true").output().is_ok_and(|output| output.status.success()) {
        offshoot_tests::skip(test, "no PID namespace can be made here");
        return;
    }
    let bench = TestStore::new();
    let mut apart = unshare();
    apart.arg(program("blockd"));
    let daemon = Daemon::start_by(apart, bench.store(), &bench.api(), &[]);
    create(&daemon, "a", MIB);
    let (vhost, nbd) = (bench.path("vhost"), bench.path("nbd"));
    assert_eq!(attach(&daemon, "a", json!({"kind": "vhost-user", "socket": vhost})).status, 201);
    assert_eq!(attach(&daemon, "a", json!({"kind": "nbd", "socket": nbd})).status, 201);

    let _front_end = Client::connect(&vhost, Options::default()).unwrap();
    let mut client = nbd::Client::connect(&nbd).greeted();
    client.go("a");

    let text = || String::from_utf8(daemon.ask("GET", "/v1/events", b"").body).unwrap();
    let user = rustix::process::geteuid().as_raw();
    until("both are told of", || {
        let client = format!("\"a process of user {user}\"");
        text().contains(&client) && text().matches("\"connected\"").count() == 2
    });
    let export = get(&daemon, "/v1/exports")[0].clone();
    assert_eq!((&export["connected"], &export["peers"]), (&json!(1), &json!([])), "{export}");
}

/// Story: what a finished session of a front end kept open stayed so until the next one came.
#[test]
fn descriptors_go_with_the_client_they_were_for() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", MIB);
    let (vhost, nbd) = (bench.path("vhost"), bench.path("nbd"));
    assert_eq!(attach(&daemon, "a", json!({"kind": "vhost-user", "socket": vhost})).status, 201);
    assert_eq!(attach(&daemon, "a", json!({"kind": "nbd", "socket": nbd})).status, 201);
    let held = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    // The connection of the last question may take a moment to go.
    until("nobody is connected", || get(&daemon, "/v1/health")["connected"] == 0);
    std::thread::sleep(Duration::from_millis(100));
    let before = held();

    for _ in 0..50 {
        let (mut front_end, mut queues) = Client::connect(&vhost, Options::default()).unwrap();
        let span = Span { offset: queues[0].data().0, len: 512 };
        assert_eq!(queues[0].run(Op::Read, 0, &[span], 20_000).unwrap().status, 0);
        assert_eq!(front_end.disk_size().unwrap(), MIB);
        let mut client = nbd::Client::connect(&nbd).greeted();
        client.go("a");
        assert!(held() > before);
    }

    until("all is given back", || held() == before);
}

/// Writes on until the host is full and a request is held; gives back its first sector.
fn write_until_held(daemon: &Daemon, queue: &mut ClientQueue, mut sector: u64) -> u64 {
    let held = || !get(daemon, "/v1/stats")[0]["stats"]["held"].is_null();
    loop {
        let bytes = pattern::bytes(2, sector, 1024);
        queue.arena().write(queue.data().0, &bytes);
        let span = Span { offset: queue.data().0, len: 512 << 10 };
        queue.submit(Op::Write, sector * 512, &[span], sector).unwrap();
        queue.kick();
        let start = Instant::now();
        while queue.in_work() > 0 {
            assert!(start.elapsed() < Duration::from_secs(20), "it completes or is held");
            if queue.wait(20) {
                assert_eq!(queue.poll().unwrap().status, 0);
            } else if held() {
                return sector;
            }
        }
        sector += 1024;
    }
}

/// A full host is told of, and neither it nor an end of the daemon meanwhile costs the guest its
/// request: it is answered when there is space again, whoever serves the disk then.
#[test]
fn held_requests_are_told_of_and_outlive_the_daemon() {
    let test = "daemon_serves::held_requests_are_told_of_and_outlive_the_daemon";
    let Some(mount) = Mount::ext4(test, 128 << 20) else { return };
    let bench = TestStore::at(mount.path().join("store"));
    let daemon = bench.daemon();
    create(&daemon, "a", 256 * MIB);
    let socket = bench.path("a.sock");
    attach(&daemon, "a", json!({"kind": "vhost-user", "socket": socket}));
    let options = Options { data_size: 2 << 20, ..Options::default() };
    let (mut client, mut queues) = Client::connect(&socket, options).unwrap();
    let queue = &mut queues[0];

    let full = mount.fill(0);
    let sector = write_until_held(&daemon, queue, 0);

    assert_eq!(get(&daemon, "/v1/health")["held"], json!(["a"]));
    drop(full);
    assert_eq!(daemon.ask("POST", "/v1/disks/a/resume", b"").status, 204);
    assert!(queue.wait(20_000), "it goes on");
    assert_eq!(queue.poll().unwrap().status, 0);
    assert_eq!(get(&daemon, "/v1/health")["held"], json!([]));
    let told = events(&daemon);
    let told: Vec<&str> = told.iter().map(|(kind, _)| kind.as_str()).collect();
    assert!(told.ends_with(&["held", "resumed"]), "{told:?}");
    let full = mount.fill(0);
    let sector = write_until_held(&daemon, queue, sector + 1024);
    assert!(daemon.terminate().success());
    drop(full);
    let daemon = bench.daemon();
    client.reconnect(&socket).unwrap();
    assert!(queue.wait(20_000), "it goes on with the next daemon");
    assert_eq!(queue.poll().unwrap().status, 0);
    drop((client, queues));
    let bytes = daemon.ask("GET", "/v1/disks/a/data", b"").body;
    for at in (0..=sector).step_by(1024) {
        let from = usize::try_from(at * 512).unwrap();
        assert_eq!(pattern::look(&bytes[from..from + 512], at), Found::Tag(2), "sector {at}");
    }
}

/// Story: a guest that resets its queue while a write is held makes it go on and be held again, as
/// often as it likes; each time was logged and told. What is told in the end is how it is.
#[test]
fn a_guest_that_drops_and_repeats_a_held_write_is_told_of_within_bounds() {
    const RESETS: usize = 300;
    let test =
        "daemon_serves::a_guest_that_drops_and_repeats_a_held_write_is_told_of_within_bounds";
    let Some(mount) = Mount::ext4(test, 128 << 20) else { return };
    let bench = TestStore::at(mount.path().join("store"));
    let daemon = bench.daemon();
    create(&daemon, "a", 256 * MIB);
    let socket = bench.path("a.sock");
    attach(&daemon, "a", json!({"kind": "vhost-user", "socket": socket}));
    let options = Options { data_size: 2 << 20, ..Options::default() };
    let (mut client, mut queues) = Client::connect(&socket, options).unwrap();
    let full = mount.fill(0);
    write_until_held(&daemon, &mut queues[0], 0);
    let lines_before = daemon.log().lines().count();
    let start = Instant::now();

    for _ in 0..RESETS {
        let base = client.stop_queue(0).unwrap();
        assert_eq!(get(&daemon, "/v1/health")["held"], json!([]));
        client.start_queue(0, base).unwrap();
        until("it is held again", || get(&daemon, "/v1/health")["held"] == json!(["a"]));
    }

    let told = || -> Vec<String> {
        let of_holding = |(kind, _): &(String, String)| kind == "held" || kind == "resumed";
        events(&daemon).into_iter().filter(of_holding).map(|(kind, _)| kind).collect()
    };
    until("it is told that it is held", || told().last().is_some_and(|kind| kind == "held"));
    // A hundred at once, and one a second; each with its end.
    let most = 2 * (100 + usize::try_from(start.elapsed().as_secs()).unwrap() + 1);
    assert!(most < 2 * RESETS, "the test is too slow to tell: {:?}", start.elapsed());
    assert!(told().len() <= most, "{} events", told().len());
    assert!(told().chunks(2).all(|pair| pair[0] == "held"), "{:?}", told());
    let lines = daemon.log().lines().count() - lines_before;
    // The event and a line of the volume's own.
    assert!(lines <= 2 * most + 10, "{lines} lines");
    assert!(events(&daemon).iter().any(|(kind, _)| kind == "skipped"), "{:?}", events(&daemon));
    drop(full);
    assert_eq!(daemon.ask("POST", "/v1/disks/a/resume", b"").status, 204);
    assert!(queues[0].wait(20_000), "it goes on");
    assert_eq!(queues[0].poll().unwrap().status, 0);
    until("that is told, too", || told().last().is_some_and(|kind| kind == "resumed"));
}
