//! The daemon as others see it: a process, a socket, HTTP. Nothing here knows how it is made.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blockd::storedir::IDENTITY_FILE;
use offshoot_tests::daemon::{Daemon, Reply, Talk, program};
use offshoot_tests::inject::Injected;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn create(daemon: &Daemon, name: &str, size: u64) -> Value {
    daemon.json("POST", "/v1/disks", &json!({"name": name, "size": size}))
}

fn segments(bench: &TestStore) -> usize {
    let names = fs::read_dir(bench.store()).unwrap().map(|e| e.unwrap().file_name());
    names.filter(|n| n.to_string_lossy().contains('-')).count()
}

fn names(daemon: &Daemon) -> Vec<String> {
    let disks = daemon.json("GET", "/v1/disks", &Value::Null);
    disks.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap().to_owned()).collect()
}

/// Fails the test unless an answer is a failure of this kind, told in full.
fn refused(reply: &Reply, status: u16, kind: &str) -> Value {
    let error = reply.json()["error"].clone();
    assert_eq!((reply.status, error["kind"].as_str()), (status, Some(kind)), "{reply:?}");
    for field in ["tried", "object", "reason", "hint", "message"] {
        assert!(error.get(field).is_some(), "{field}: {reply:?}");
    }
    assert!(error["object"].is_string(), "nothing says what it is about: {reply:?}");
    error
}

#[test]
fn a_request_that_makes_no_sense_is_refused_and_says_why() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", MIB);

    for (method, path, body, status, kind) in [
        ("GET", "/v1/disk", "", 404, "not-found"),
        ("GET", "/v1/disks/missing", "", 404, "not-found"),
        ("PATCH", "/v1/disks/a", "", 405, "invalid"),
        ("POST", "/v1/disks", "{", 400, "invalid"),
        ("POST", "/v1/disks", r#"{"name": "b"}"#, 400, "invalid"),
        ("POST", "/v1/disks", r#"{"name": "b", "size": 1048576, "sice": 1}"#, 400, "invalid"),
        ("POST", "/v1/disks", r#"{"name": "../b", "size": 1048576}"#, 400, "invalid"),
        ("POST", "/v1/disks", r#"{"name": "a", "size": 1048576}"#, 409, "exists"),
        ("POST", "/v1/disks", r#"{"name": "b", "parent": "a"}"#, 400, "invalid"),
        ("GET", "/v1/disks/a/data?offset=-1", "", 400, "invalid"),
        ("GET", "/v1/disks/a/data?ofset=1", "", 400, "invalid"),
        ("GET", "/v1/disks/a/data?offset=1&length=18446744073709551615", "", 400, "invalid"),
        ("GET", "/v1/jobs/77", "", 404, "not-found"),
        ("GET", "/v1/jobs/x", "", 400, "invalid"),
        ("GET", "/v1/sessions/77/data?offset=0&length=512", "", 404, "not-found"),
    ] {
        let reply = daemon.ask(method, path, body.as_bytes());
        refused(&reply, status, kind);
    }
    let long = vec![b' '; 2 << 20];
    refused(&daemon.ask("POST", "/v1/disks", &long), 400, "invalid");
    let mut talk = Talk::to(daemon.api()).unwrap();
    talk.send(b"\x16\x03\x01 what is this?\r\n\r\n").unwrap();
    assert_eq!(talk.answer().map(|r| r.status).unwrap_or(400), 400);
    assert_eq!(names(&daemon), ["a"]);
}

#[test]
fn the_interface_describes_itself() {
    let bench = TestStore::new();
    let daemon = bench.daemon();

    let served = daemon.ask("GET", "/openapi.json", b"");

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    assert_eq!(served.body, fs::read(path).unwrap());
    assert_eq!(daemon.json("GET", "/v1/version", &Value::Null)["api"], "v1");
    let health = daemon.json("GET", "/v1/health", &Value::Null);
    assert_eq!((&health["pid"], &health["jobs"]), (&json!(daemon.pid()), &json!(0)));
    let metrics = daemon.ask("GET", "/metrics", b"");
    let text = String::from_utf8(metrics.body).unwrap();
    assert!(text.contains("offshoot_store_disks 0\n"), "{text}");
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let family = name.split('{').next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .fold(family, |f, e| f.strip_suffix(e).unwrap_or(f));
        assert!(text.contains(&format!("# TYPE {family} ")), "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
}

#[test]
fn bytes_go_in_and_out_of_a_disk_as_one_request() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", 8 * MIB);
    let bytes: Vec<u8> = (0..3_000_001_u32).map(|i| (i * 7 % 251) as u8).collect();

    let put = daemon.ask("PUT", "/v1/disks/a/data?offset=1001", &bytes);

    let moved = json!({"disk": "a", "offset": 1001, "length": bytes.len()});
    assert_eq!((put.status, put.json()), (200, moved));
    let path = format!("/v1/disks/a/data?offset=1001&length={}", bytes.len());
    assert_eq!(daemon.ask("GET", &path, b"").body, bytes);
    assert_eq!(daemon.ask("GET", "/v1/disks/a/data", b"").body.len() as u64, 8 * MIB);
    let over = daemon.ask("PUT", &format!("/v1/disks/a/data?offset={}", 8 * MIB - 1), b"ab");
    refused(&over, 400, "invalid");
    let range = json!({"offset": 0, "length": 8 * MIB});
    daemon.json("POST", "/v1/disks/a/discard", &range);
    let map = daemon.json("GET", "/v1/disks/a/map", &Value::Null);
    assert!(map.as_array().unwrap().iter().all(|r| r["state"] != "data"), "{map}");
}

/// A client that dies in the middle of a request leaves what it sent, and nothing that is held.
#[test]
fn a_request_that_is_cut_off_lets_go_of_the_disk() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", 8 * MIB);
    let mut talk = Talk::to(daemon.api()).unwrap();
    let head = "PUT /v1/disks/a/data HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n\r\n";
    talk.send(head.as_bytes()).unwrap();
    talk.send(&vec![7; 2_500_000]).unwrap();
    until("the request runs", || daemon.json("GET", "/v1/health", &Value::Null)["jobs"] == 1);

    drop(talk);

    until("the request ended", || daemon.json("GET", "/v1/health", &Value::Null)["jobs"] == 0);
    assert_eq!(daemon.ask("GET", "/v1/disks/a/data?length=1048576", b"").body, vec![7; 1 << 20]);
    assert_eq!(daemon.ask("DELETE", "/v1/disks/a", b"").status, 200);
}

#[test]
fn a_session_ends_with_its_connection() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    let mut talk = Talk::to(daemon.api()).unwrap();
    let request = json!({"disk": "a", "use": "import", "size": 8 * MIB}).to_string();

    let opened = talk.ask("POST", "/v1/sessions", request.as_bytes()).unwrap();

    assert_eq!(opened.status, 201, "{opened:?}");
    let id = opened.json()["id"].clone();
    let data = format!("/v1/sessions/{id}/data?offset=0");
    // Its requests may come from anywhere.
    assert_eq!(daemon.ask("PUT", &data, &[1; 512]).json(), json!({"stored": 512}));
    refused(&daemon.ask("PUT", &data, b"x"), 400, "invalid");
    let second = daemon.ask("POST", "/v1/sessions", request.as_bytes());
    refused(&second, 409, "busy");
    assert_eq!((names(&daemon).len(), segments(&bench)), (0, 1));
    drop(talk);
    until("the import is gone", || segments(&bench) == 0);
    refused(&daemon.ask("PUT", &data, b"x"), 404, "not-found");

    let mut talk = Talk::to(daemon.api()).unwrap();
    let id = talk.ask("POST", "/v1/sessions", request.as_bytes()).unwrap().json()["id"].clone();
    let sector = vec![5; 4096];
    let data = format!("/v1/sessions/{id}/data?offset=4096");
    assert_eq!(talk.ask("PUT", &data, &sector).unwrap().json(), json!({"stored": 4096}));
    let made = talk.ask("POST", &format!("/v1/sessions/{id}/finish"), b"").unwrap();
    assert_eq!(made.json()["name"], "a");
    drop(talk);
    assert_eq!(daemon.ask("GET", "/v1/disks/a/data?offset=4096&length=4096", b"").body, sector);
    daemon.kill();
    // Durable before the answer.
    let daemon = bench.daemon();
    assert_eq!(daemon.ask("GET", "/v1/disks/a/data?offset=4096&length=4096", b"").body, sector);
}

#[test]
fn a_cancelled_import_leaves_nothing_and_readers_share_what_a_writer_has_alone() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", 8 * MIB);
    let mut talk = Talk::to(daemon.api()).unwrap();
    let mut open = |name: &str, purpose: &str| {
        let request = json!({"disk": name, "use": purpose, "size": 8 * MIB}).to_string();
        talk.ask("POST", "/v1/sessions", request.as_bytes()).unwrap()
    };
    let readers = [open("a", "read"), open("a", "export")];
    assert_eq!(readers.each_ref().map(|r| r.status), [201, 201]);
    refused(&open("a", "write"), 409, "busy");
    let import = open("b", "import").json()["id"].clone();

    let asked = daemon.json("DELETE", &format!("/v1/jobs/{import}"), &Value::Null);

    assert_eq!(asked["state"], "running");
    let path = format!("/v1/sessions/{import}");
    refused(&daemon.ask("PUT", &format!("{path}/data?offset=0"), b"x"), 409, "cancelled");
    refused(&daemon.ask("POST", &format!("{path}/finish"), b""), 409, "cancelled");
    assert_eq!(names(&daemon), ["a"]);
    assert_eq!(segments(&bench), 1);
    let job = daemon.json("GET", &format!("/v1/jobs/{import}"), &Value::Null);
    assert_eq!((&job["state"], &job["kind"]), (&json!("cancelled"), &json!("import")));
    for reader in &readers {
        let id = reader.json()["id"].clone();
        assert_eq!(daemon.ask("DELETE", &format!("/v1/sessions/{id}"), b"").status, 204);
    }
    assert_eq!(open("a", "write").status, 201);
}

#[test]
fn long_work_is_a_job_that_can_be_followed() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", 64 * MIB);
    let bytes = vec![9; 32 << 20];
    assert_eq!(daemon.ask("PUT", "/v1/disks/a/data", &bytes).status, 200);

    let started = daemon.ask("POST", "/v1/disks/a/seal?wait=false", b"");

    assert_eq!(started.status, 202);
    let id = started.json()["id"].clone();
    let ended = daemon.json("GET", &format!("/v1/jobs/{id}?wait_ms=60000"), &Value::Null);
    assert_eq!((&ended["state"], &ended["done"]), (&json!("done"), &json!(32 << 20)));
    assert_eq!(ended["result"], daemon.json("GET", "/v1/disks", &Value::Null)[0]);
    let again = daemon.ask("POST", "/v1/disks/a/seal", b"");
    refused(&again, 400, "invalid");
    let scrubbed = daemon.json("POST", "/v1/disks/a/scrub", &Value::Null);
    assert_eq!((&scrubbed["clean"], &scrubbed["summed_bytes"]), (&json!(true), &json!(32 << 20)));

    let events = daemon.ask("GET", "/v1/events", b"");
    let text = String::from_utf8(events.body).unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let kinds: Vec<&str> = lines.iter().map(|e| e["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds[0], "started");
    let count = |kind| kinds.iter().filter(|k| **k == kind).count();
    assert_eq!((count("job-started"), count("job-finished")), (4, 4), "{text}");
    let numbers: Vec<u64> = lines.iter().map(|e| e["seq"].as_u64().unwrap()).collect();
    assert!(numbers.windows(2).all(|w| w[0] + 1 == w[1]));
    let last = daemon.ask("GET", &format!("/v1/events?since={}", numbers.len() - 1), b"");
    assert_eq!(String::from_utf8(last.body).unwrap().lines().count(), 1);
}

#[test]
fn who_follows_events_is_told_of_the_end() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    let mut follower = Talk::to(daemon.api()).unwrap();
    follower.send(b"GET /v1/events?follow=true HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();

    let read = std::thread::spawn(move || follower.answer());
    create(&daemon, "a", MIB);
    assert!(daemon.json("POST", "/v1/disks/a/check", &Value::Null)["clean"] == true);
    assert!(daemon.terminate().success());

    let text = String::from_utf8(read.join().unwrap().unwrap().body).unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["kind"], "stopping", "{text}");
    assert!(text.contains("job-finished"));
    assert!(!bench.api().exists() && !bench.store().join("daemon.json").exists());
}

#[test]
fn one_daemon_has_a_store_and_a_killed_one_is_replaced() {
    let bench = TestStore::new();
    let first = bench.daemon();
    create(&first, "a", MIB);
    let file = fs::read_to_string(bench.store().join("daemon.json")).unwrap();
    let file: Value = serde_json::from_str(&file).unwrap();
    assert_eq!((&file["pid"], &file["api"]), (&json!(first.pid()), &json!(bench.api())));
    let second = |api: PathBuf| {
        let mut command = Command::new(program("blockd"));
        command.arg("--store").arg(bench.store()).arg("--api").arg(api);
        let output = command.stdin(Stdio::null()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };

    let (code, said) = second(bench.path("other.sock"));

    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("another process has it open"), "{said}");
    assert_eq!(names(&first), ["a"]);
    let other = TestStore::new();
    let mut command = Command::new(program("blockd"));
    command.arg("--store").arg(other.store()).arg("--api").arg(bench.api());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(5), "the socket of another daemon was taken");

    first.kill();

    assert!(bench.api().exists() && bench.store().join("daemon.json").exists());
    let third = bench.daemon();
    assert_eq!(names(&third), ["a"]);
    assert!(third.terminate().success());
}

/// Not only the mode of the file keeps strangers out: who connects is asked of the kernel.
#[test]
fn strangers_are_turned_away() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    let mode = fs::metadata(bench.api()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    if !rustix::process::geteuid().is_root() {
        offshoot_tests::skip("strangers_are_turned_away", "to be a stranger needs root");
        return;
    }
    fs::set_permissions(bench.api(), fs::Permissions::from_mode(0o666)).unwrap();
    fs::set_permissions(bench.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let offshoot = program("offshoot");
    // A stranger may not be able to reach the folder that it was built in.
    let copy = bench.path("offshoot");
    fs::copy(offshoot, &copy).unwrap();
    let ask = |uid: u32, gid: u32| {
        let mut command = Command::new(&copy);
        command.args(["disk", "ls", "--api"]).arg(bench.api());
        command.uid(uid).gid(gid).current_dir("/").env_remove("OFFSHOOT_STORE");
        command.output().unwrap()
    };
    assert!(ask(0, 0).status.success());

    let stranger = ask(65_534, 65_534);

    assert_eq!(stranger.status.code(), Some(10), "{stranger:?}");
    assert!(daemon.log().contains("turned away"), "{}", daemon.log());
    drop(daemon);
    let _daemon = bench.daemon_with(&["--allow-group", "4242"]);
    let mode = fs::metadata(bench.api()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let member = ask(65_534, 4242);
    assert!(member.status.success(), "{member:?}");
    fs::set_permissions(bench.api(), fs::Permissions::from_mode(0o666)).unwrap();
    assert!(!ask(65_534, 65_534).status.success());
}

/// What the daemon says that confines it is what the kernel says, and it bites.
#[test]
fn the_daemon_confines_itself() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "a", MIB);
    let status = |daemon: &Daemon| {
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let mode = status.lines().find_map(|l| l.strip_prefix("Seccomp:")).unwrap().trim();
        mode.to_owned()
    };
    let sandbox = daemon.json("GET", "/v1/health", &Value::Null)["sandbox"].clone();
    let applied: Vec<&str> = sandbox.as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(applied.contains(&"seccomp"), "{sandbox}");
    assert_eq!(status(&daemon), "2");
    let outside = tempfile::tempdir_in("/var/tmp").unwrap();
    let socket = outside.path().join("a.sock");
    let export = json!({"export": {"kind": "vhost-user", "socket": socket}}).to_string();
    if applied.contains(&"landlock") {
        let reply = daemon.ask("POST", "/v1/disks/a/attach", export.as_bytes());
        refused(&reply, 403, "read-only");
    } else {
        let test = "the_daemon_confines_itself (landlock)";
        offshoot_tests::skip(test, "this kernel has no landlock");
    }
    drop(daemon);

    let folder = outside.path().to_str().unwrap();
    let wider = bench.daemon_with(&["--socket-dir", folder]);
    assert_eq!(wider.ask("POST", "/v1/disks/a/attach", export.as_bytes()).status, 201);
    drop(wider);
    let free = bench.daemon_with(&["--sandbox", "off"]);
    assert_eq!(free.json("GET", "/v1/health", &Value::Null)["sandbox"], json!([]));
    assert_eq!(status(&free), "0");
}

/// The kernel refuses a daemon what it says that it has given up, whatever makes it try.
#[test]
fn a_confined_daemon_is_refused_what_it_does_not_need() {
    const EPERM: i64 = -libc::EPERM as i64;
    const EACCES: i64 = -libc::EACCES as i64;
    let bench = TestStore::new();
    let outside = tempfile::tempdir_in("/var/tmp").unwrap();
    let [file, own] = [outside.path().join("file"), bench.store().join(IDENTITY_FILE)];
    fs::write(&file, "x").unwrap();
    let open = |daemon: &Injected, path: &Path, flags: i32| {
        let at = daemon.text(path.to_str().unwrap());
        let flags = u64::from(flags.unsigned_abs());
        let opened = daemon.call(libc::SYS_openat, [u64::MAX, at, flags, 0]);
        if let Ok(fd) = u64::try_from(opened) {
            daemon.call(libc::SYS_close, [fd, 0, 0, 0]);
        }
        opened
    };
    let daemon = bench.daemon();
    let sandbox = daemon.json("GET", "/v1/health", &Value::Null)["sandbox"].clone();
    let confined = Injected::into(daemon.pid());
    // Of no use with these arguments, should they be let through.
    for call in [libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace, libc::SYS_unshare] {
        assert_eq!(confined.call(call, [0; 4]), EPERM, "call {call}");
    }
    for call in [libc::SYS_mount, libc::SYS_bpf, libc::SYS_setns, libc::SYS_init_module] {
        assert_eq!(confined.call(call, [0; 4]), EPERM, "call {call}");
    }
    assert!(open(&confined, &own, libc::O_RDWR) >= 0, "its own files are its own");
    if sandbox.as_array().unwrap().contains(&json!("landlock")) {
        for flags in [libc::O_RDONLY, libc::O_RDWR] {
            assert_eq!(open(&confined, &file, flags), EACCES);
        }
        assert!(open(&confined, Path::new("/etc/passwd"), libc::O_RDONLY) >= 0);
        assert_eq!(open(&confined, Path::new("/etc/passwd"), libc::O_RDWR), EACCES);
    }
    drop(confined);
    // It goes on as if nothing had been.
    create(&daemon, "a", MIB);
    assert!(daemon.terminate().success());

    let daemon = bench.daemon_with(&["--sandbox", "off"]);
    let free = Injected::into(daemon.pid());
    assert_eq!(free.call(libc::SYS_execve, [0; 4]), -i64::from(libc::EFAULT));
    assert!(open(&free, &file, libc::O_RDWR) >= 0);
}

/// Many clients at once: nothing is lost, nothing is done twice, nobody waits for ever.
#[test]
fn many_clients_at_once_leave_what_each_of_them_was_told() {
    let bench = TestStore::new();
    let daemon = bench.daemon();
    create(&daemon, "base", MIB);
    assert_eq!(daemon.ask("POST", "/v1/disks/base/seal", b"").status, 200);

    let kept: Vec<String> = std::thread::scope(|scope| {
        let client = |n: u8| {
            let daemon = &daemon;
            move || {
                let mut kept = Vec::new();
                for i in 0..6 {
                    let name = format!("d{n}-{i}");
                    daemon.json("POST", "/v1/disks", &json!({"name": name, "parent": "base"}));
                    // Everybody wants this one; one gets it.
                    let shared = json!({"name": format!("shared-{i}"), "size": MIB}).to_string();
                    match daemon.ask("POST", "/v1/disks", shared.as_bytes()).status {
                        201 => kept.push(format!("shared-{i}")),
                        status => assert_eq!(status, 409),
                    }
                    let path = format!("/v1/disks/{name}");
                    assert_eq!(daemon.ask("PUT", &format!("{path}/data"), &[n; 999]).status, 200);
                    if i % 3 == 0 {
                        assert_eq!(daemon.ask("DELETE", &path, b"").status, 200);
                        continue;
                    }
                    let to = json!({"to": format!("{name}.new")});
                    kept.push(
                        daemon.json("POST", &format!("{path}/rename"), &to)["name"]
                            .as_str()
                            .unwrap()
                            .to_owned(),
                    );
                }
                kept
            }
        };
        let threads: Vec<_> = (0..6).map(|n| scope.spawn(client(n))).collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });

    let mut expected = kept;
    expected.push("base".into());
    expected.sort();
    assert_eq!(names(&daemon), expected);
    refused(&daemon.ask("DELETE", "/v1/disks/base", b""), 409, "in-use");
    daemon.kill();
    assert_eq!(names(&bench.daemon()), expected);
}
