//! Children of a fork that are served from its instant on: a machine that is forked with its disks
//! does not wait until the fork is durable (D-h, F-b).

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use offshoot_tests::daemon::Daemon;
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::{Value, json};
use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};

const SPAN: Span = Span { offset: 0, len: 4096 };
const PATIENCE_MS: u32 = 10_000;

/// A driver with one queue, which writes and reads blocks that are full of one byte.
struct Driver {
    client: Client,
    queue: ClientQueue,
}

impl Driver {
    fn to(socket: &Path) -> Self {
        let options = Options { queues: 1, data_size: 1 << 20, ..Options::default() };
        let (client, mut queues) = Client::connect(socket, options).unwrap();
        Driver { client, queue: queues.remove(0) }
    }

    fn data(&self) -> u64 {
        self.queue.data().0
    }

    fn span(&self) -> Span {
        Span { offset: self.data(), ..SPAN }
    }

    fn write(&mut self, block: u64, byte: u8) {
        self.queue.arena().write(self.data(), &[byte; 4096]);
        let span = self.span();
        let done = self.queue.run(Op::Write, block * 4096, &[span], PATIENCE_MS).unwrap();
        assert_eq!(done.status, 0);
    }

    fn begin_read(&mut self, block: u64) {
        let span = self.span();
        self.queue.submit(Op::Read, block * 4096, &[span], block).unwrap();
        self.queue.kick();
    }

    fn end_read(&mut self) -> u8 {
        until("the read is done", || {
            let _ = self.queue.wait(100);
            self.queue.poll().is_some()
        });
        let mut bytes = [0; 4096];
        self.queue.arena().read(self.data(), &mut bytes);
        assert_eq!(bytes, [bytes[0]; 4096]);
        bytes[0]
    }

    fn read(&mut self, block: u64) -> u8 {
        self.begin_read(block);
        self.end_read()
    }

    fn flush(&mut self) {
        assert_eq!(self.queue.run(Op::Flush, 0, &[], PATIENCE_MS).unwrap().status, 0);
    }
}

fn serve(child: &str, socket: &Path) -> Value {
    json!({ "child": child, "export": { "kind": "vhost-user", "socket": socket } })
}

fn of(children: &[&str], serve: &[Value]) -> Value {
    let disk = json!({ "disk": "vm", "children": children, "serve": serve });
    json!({ "disks": [disk], "return": "ready" })
}

/// Waits until the daemon has seen that no driver is connected to a disk any more.
fn await_disconnected(daemon: &Daemon, disk: &str) {
    until("its driver is gone", || {
        let exports = daemon.json("GET", "/v1/exports", &Value::Null);
        let mut of_disk = exports.as_array().unwrap().iter().filter(|e| e["disk"] == disk);
        of_disk.all(|e| e["connected"] == 0)
    });
}

/// A fork that stands by, of one child that is served.
fn standby(child: &str, socket: &Path) -> Value {
    let mut asked = of(&[child], &[serve(child, socket)]);
    asked["return"] = "standby".into();
    asked
}

/// Drafts in the store, and notes of them.
fn drafts(bench: &ServedDisk) -> usize {
    let names = std::fs::read_dir(bench.store()).unwrap().flatten().map(|e| e.file_name());
    names.filter(|n| [".new", ".fork"].iter().any(|end| n.to_string_lossy().ends_with(end))).count()
}

/// Waits until nothing is left of a fork that has ended before its instant.
fn await_nothing_left(bench: &ServedDisk, socket: &Path) {
    until("nothing is left of it", || !socket.exists() && drafts(bench) == 0);
}

fn path_of(cut: &Value, what: &str) -> String {
    format!("/v1/forks/{}{what}", cut["token"].as_str().unwrap())
}

fn bench() -> (ServedDisk, Daemon, Driver) {
    let bench = ServedDisk::new(TestStore::new());
    let daemon = bench.daemon();
    bench.attach();
    let driver = Driver::to(&bench.socket());
    (bench, daemon, driver)
}

/// The driver of a child connects before the instant. What it asks for waits until then, and shows
/// what the parent held at that instant, not before or after. Both go on apart; a flush of either
/// is done when the fork is.
#[test]
fn a_child_is_served_from_the_instant_on() {
    let (bench, daemon, mut parent) = bench();
    parent.write(0, 1);
    parent.write(1, 1);
    let sockets: Vec<PathBuf> = ["a.sock", "b.sock"].map(|name| bench.path(name)).into();
    let asked = of(&["a", "b", "plain"], &[serve("a", &sockets[0]), serve("b", &sockets[1])]);
    let ready = daemon.json("POST", "/v1/forks", &asked);
    let names: Vec<&str> =
        ready["children"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b", "plain"]);
    let mut children = [0, 1].map(|i| Driver::to(&sockets[i]));
    children.iter_mut().for_each(|child| child.begin_read(0));
    parent.write(0, 2);
    std::thread::sleep(Duration::from_millis(100));
    for child in &mut children {
        assert!(child.queue.poll().is_none(), "there is no child before the instant");
    }

    let cut = daemon.json("POST", &path_of(&ready, "/cut"), &Value::Null);
    parent.write(0, 3);

    assert_eq!(cut["children"], ready["children"]);
    for (child, byte) in children.iter_mut().zip([10, 11]) {
        assert_eq!((child.end_read(), child.read(1), child.read(2)), (2, 1, 0));
        child.write(1, byte);
        child.flush();
    }
    parent.flush();
    let forked = daemon.json("GET", &path_of(&ready, ""), &Value::Null);
    assert_eq!(forked["children"][1]["disk"], ready["children"][1]["disk"]);
    assert_eq!((parent.read(0), parent.read(1)), (3, 1));
    assert_eq!(children.each_mut().map(|child| child.read(1)), [10, 11]);
    // They are disks in service like any other.
    let exports = daemon.json("GET", "/v1/exports", &Value::Null);
    let served: Vec<&str> =
        exports.as_array().unwrap().iter().map(|e| e["disk"].as_str().unwrap()).collect();
    assert_eq!(served, ["a", "b", "vm"]);
    drop(children);
    bench.done(&["disk", "fork", "a", "of-a"]);
    await_disconnected(&daemon, "a");
    bench.done(&["disk", "detach", "a"]);
    assert!(!sockets[0].exists());
    drop(parent);
    assert!(daemon.terminate().success());
    for (disk, block) in [("a", 10), ("of-a", 10), ("b", 11), ("plain", 1)] {
        bench.done(&["disk", "check", disk]);
        assert_eq!(bench.read(disk)[4096], block, "{disk}");
    }
}

/// A daemon is killed at any time after a child was written to: the next one serves the child at
/// the same socket, with all that its driver was told of.
#[test]
fn a_child_outlives_the_daemon() {
    for wait_us in [0, 300, 1000, 3000, 10_000, 30_000, 100_000] {
        let (bench, daemon, mut parent) = bench();
        (0..8).for_each(|block| parent.write(block, 1));
        let socket = bench.path("a.sock");
        let ready = daemon.json("POST", "/v1/forks", &of(&["a"], &[serve("a", &socket)]));
        let mut child = Driver::to(&socket);
        daemon.json("POST", &path_of(&ready, "/cut"), &Value::Null);
        child.write(0, 9);
        std::thread::sleep(Duration::from_micros(wait_us));
        daemon.kill();

        let daemon = bench.daemon();
        child.client.reconnect(&socket).unwrap();
        parent.client.reconnect(&bench.socket()).unwrap();

        assert_eq!((child.read(0), child.read(7)), (9, 1), "after {wait_us} µs");
        assert_eq!((parent.read(0), parent.read(7)), (1, 1));
        child.write(7, 8);
        child.flush();
        drop((parent, child));
        assert!(daemon.terminate().success());
        bench.done(&["disk", "check", "a"]);
        assert_eq!(bench.read("a")[7 * 4096], 8);
    }
}

/// A fork that is given up takes the sockets of its children with it, and what cannot be meant is
/// refused before anything is made.
#[test]
fn a_fork_that_does_not_come_leaves_no_socket() {
    let (bench, daemon, mut parent) = bench();
    let socket = bench.path("a.sock");
    let ready = daemon.json("POST", "/v1/forks", &of(&["a"], &[serve("a", &socket)]));
    let child = Driver::to(&socket);
    // Somebody else's socket, and a name that is kept.
    let _ = bench.refused(&["disk", "create", "a", "--size", "64M"], 5);

    assert_eq!(daemon.ask("DELETE", &path_of(&ready, ""), b"").status, 204);

    let gone = Instant::now();
    while socket.exists() {
        assert!(gone.elapsed() < Duration::from_secs(10), "the socket stays");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(child);
    let _ = bench.refused(&["disk", "show", "a"], 3);
    let read_only = json!({ "child": "a", "export":
        { "kind": "vhost-user", "socket": socket, "read_only": true } });
    let nbd = json!({ "child": "a", "export": { "kind": "nbd", "socket": socket } });
    let cases = [
        (of(&["a"], &[serve("b", &socket)]), 400),
        (of(&["a"], &[serve("a", &bench.socket())]), 409),
        (of(&["a", "b"], &[serve("a", &socket), serve("b", &socket)]), 409),
        (of(&["a"], &[serve("a", Path::new("relative.sock"))]), 400),
        (of(&["a"], &[read_only]), 501),
        (of(&["a"], &[nbd]), 501),
    ];
    for (asked, status) in cases {
        let answer = daemon.ask("POST", "/v1/forks", asked.to_string().as_bytes());
        assert_eq!(answer.status, status, "{asked}");
    }
    parent.write(0, 1);
    parent.flush();
    bench.done(&["disk", "fork", "vm", "a"]);
    drop(parent);
    await_disconnected(&daemon, "vm");
    bench.done(&["disk", "detach", "vm"]);
    let asked = of(&["c"], &[serve("c", &socket)]);
    let answer = daemon.ask("POST", "/v1/forks", asked.to_string().as_bytes());
    assert_eq!(answer.status, 400, "nobody serves its parent");
    assert!(daemon.terminate().success());
    let remembered = std::fs::read_to_string(bench.store().join("attachments.json")).unwrap();
    assert!(!remembered.contains("a.sock"), "{remembered}");
}

/// A fork stands by until somebody says when, and with that what its children are called: that is
/// their name for good.
#[test]
fn children_that_stood_by_have_the_names_that_came_with_the_word() {
    let (bench, daemon, mut parent) = bench();
    parent.write(0, 1);
    let socket = bench.path("a.sock");
    let ready = daemon.json("POST", "/v1/forks", &standby("later", &socket));
    let mut child = Driver::to(&socket);
    // It is in nobody's way who does not want its disk.
    bench.done(&["disk", "create", "other", "--size", "64M"]);
    parent.write(0, 2);

    let cut = daemon.json("POST", &path_of(&ready, "/cut"), &json!({ "children": ["web"] }));
    parent.write(0, 3);

    let is = json!({ "name": "web", "disk": ready["children"][0]["disk"] });
    assert_eq!(cut["children"], json!([is]));
    assert_eq!(child.read(0), 2);
    child.write(1, 7);
    child.flush();
    let forked = daemon.json("GET", &path_of(&ready, ""), &Value::Null);
    assert_eq!(
        (&forked["children"][0]["name"], &forked["children"][0]["disk"]),
        (&is["name"], &is["disk"])
    );
    // Who lost the answer gets the same one again.
    assert_eq!(daemon.json("POST", &path_of(&ready, "/cut"), &json!({})), cut);
    let _ = bench.refused(&["disk", "show", "later"], 3);
    bench.done(&["disk", "fork", "web", "of-web"]);
    daemon.kill();
    let daemon = bench.daemon();
    child.client.reconnect(&socket).unwrap();
    assert_eq!((child.read(0), child.read(1)), (2, 7));
    drop((parent, child));
    assert!(daemon.terminate().success());
    // What the catalogue says, its segments say as well.
    bench.done(&["store", "rebuild"]);
    for disk in ["web", "of-web"] {
        bench.done(&["disk", "check", disk]);
        assert_eq!(bench.read(disk)[4096], 7);
    }
}

/// The word may come while requests are in work, which the instant waits for: a child has all of a
/// write, or nothing.
#[test]
fn the_word_may_come_in_the_midst_of_requests() {
    const LEN: u64 = 1 << 20;
    let (bench, daemon, mut parent) = bench();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let span = Span { offset: parent.data(), len: LEN.try_into().unwrap() };
            for byte in (1..=u8::MAX).cycle() {
                parent.queue.arena().write(span.offset, &vec![byte; LEN.try_into().unwrap()]);
                let done = parent.queue.run(Op::Write, 0, &[span], PATIENCE_MS).unwrap();
                assert_eq!(done.status, 0);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        for n in 0..12 {
            let (name, socket) = (format!("c{n}"), bench.path(&format!("{n}.sock")));
            let ready = daemon.json("POST", "/v1/forks", &of(&[&name], &[serve(&name, &socket)]));
            let mut child = Driver::to(&socket);
            let cut = daemon.json("POST", &path_of(&ready, "/cut"), &Value::Null);
            assert!(cut["pause_us"].is_u64(), "{cut}");
            let (first, last) = (child.read(0), child.read(LEN / 4096 - 1));
            assert_eq!(first, last, "child {n} has a part of a write");
            let forked = daemon.json("GET", &path_of(&ready, ""), &Value::Null);
            assert_eq!(forked["children"][0]["name"], name.as_str());
        }
        stop.store(true, Ordering::Relaxed); // orders nothing
    });
}

/// Names that cannot be had end the fork before its instant.
#[test]
fn names_that_cannot_be_had_are_refused() {
    let (bench, daemon, mut parent) = bench();
    let socket = bench.path("a.sock");
    bench.done(&["disk", "create", "taken", "--size", "64M"]);
    let cases = [
        (json!(["taken"]), 409),
        (json!(["vm"]), 409),
        (json!(["a/b"]), 400),
        (json!(["a", "b"]), 400),
    ];
    for (names, status) in cases {
        let ready = daemon.json("POST", "/v1/forks", &standby("later", &socket));
        let asked = json!({ "children": names }).to_string();
        let answer = daemon.ask("POST", &path_of(&ready, "/cut"), asked.as_bytes());
        assert_eq!(answer.status, status, "{names}");
        await_nothing_left(&bench, &socket);
    }
    parent.write(0, 1);
    parent.flush();
    let mut unserved = standby("later", &socket);
    unserved["disks"][0]["children"] = json!(["later", "plain"]);
    let answer = daemon.ask("POST", "/v1/forks", unserved.to_string().as_bytes());
    assert_eq!(
        answer.status, 400,
        "a child that is not served would have to be opened at the instant"
    );
    drop(parent);
    assert!(daemon.terminate().success());
    assert_eq!(bench.read("vm")[0], 1);
}

/// A fork that stands by keeps nobody waiting: who wants its disk, or changes what is served, gets
/// that at once. Whoever says when afterwards is told that it is too late.
#[test]
fn a_fork_that_stands_by_gives_way() {
    let (bench, daemon, mut parent) = bench();
    let socket = bench.path("a.sock");
    let other = bench.path("other.sock");
    let other = other.to_str().unwrap();
    bench.done(&["disk", "create", "other", "--size", "64M"]);
    let wants: [&[&str]; 7] = [
        &["disk", "show", "vm"],
        &["disk", "read", "vm", "--length", "4096"],
        &["disk", "resize", "vm", "+1M"],
        &["disk", "attach", "other", "--socket", other],
        &["disk", "detach", "other"],
        &["disk", "fork", "vm", "one"],
        &["disk", "create", "later", "--size", "64M"],
    ];
    for wanted in wants {
        let ready = daemon.json("POST", "/v1/forks", &standby("later", &socket));
        let began = Instant::now();
        bench.done(wanted);
        assert!(began.elapsed() < Duration::from_secs(1), "{wanted:?} took {:?}", began.elapsed());

        let answer = daemon.ask("POST", &path_of(&ready, "/cut"), b"");

        assert_eq!(answer.status, 409, "{wanted:?}");
        await_nothing_left(&bench, &socket);
        parent.write(0, 1);
        parent.flush();
        if wanted.contains(&"later") {
            bench.done(&["disk", "rm", "later"]);
        }
    }
    // Neither does it keep the daemon from ending.
    daemon.json("POST", "/v1/forks", &standby("later", &socket));
    drop(parent);
    let began = Instant::now();
    assert!(daemon.terminate().success());
    assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
}

/// A daemon is killed while a fork stands by, or at any time after it was cut: the next one has no
/// child, or one with all that its driver was told of, under one of its names.
#[test]
fn a_fork_that_stood_by_outlives_the_daemon_or_was_none() {
    for wait_us in [None, Some(0), Some(500), Some(2000), Some(5000), Some(20_000), Some(100_000)] {
        let (bench, daemon, mut parent) = bench();
        parent.write(0, 1);
        let socket = bench.path("a.sock");
        let ready = daemon.json("POST", "/v1/forks", &standby("later", &socket));
        let mut child = Driver::to(&socket);
        if let Some(wait_us) = wait_us {
            daemon.json("POST", &path_of(&ready, "/cut"), &json!({ "children": ["web"] }));
            child.write(0, 9);
            std::thread::sleep(Duration::from_micros(wait_us));
        }
        daemon.kill();

        let daemon = bench.daemon();

        parent.client.reconnect(&bench.socket()).unwrap();
        assert_eq!(parent.read(0), 1);
        let disks = daemon.json("GET", "/v1/disks", &Value::Null);
        let disks = disks.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap());
        let children: Vec<&str> = disks.filter(|name| *name != "vm").collect();
        if wait_us.is_none() {
            // The socket is listed as one that failed, as that of any disk that is gone.
            assert!(children.is_empty() && drafts(&bench) == 0, "{children:?}");
            continue;
        }
        assert!(children == ["web"] || children == ["later"], "{children:?} after {wait_us:?}");
        child.client.reconnect(&socket).unwrap();
        assert_eq!(child.read(0), 9);
        child.flush();
        let name = children[0].to_owned();
        drop((parent, child));
        assert!(daemon.terminate().success());
        bench.done(&["disk", "check", &name]);
        assert_eq!(bench.read(&name)[0], 9);
    }
}
