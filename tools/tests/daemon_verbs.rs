//! The verbs that only a daemon can do: start, status, stop, attach, jobs, events, top.

#[allow(dead_code)] // Each test file uses a part of it.
mod support;

use std::fs;
use std::io::{BufRead as _, BufReader};

use serde_json::{Value, json};
use support::{Bench, Ran, offshoot, run, until, wait};

/// Has the command line start the daemon of a store.
fn start(bench: &Bench) -> Ran {
    let program = offshoot_tests::daemon::program("blockd");
    let program = program.to_str().expect("a plain path");
    bench.run(&["--api", &bench.arg("api"), "daemon", "start", "--program", program])
}

#[test]
fn a_daemon_is_started_looked_at_and_stopped() {
    let bench = &Bench::new();
    bench.run(&["daemon", "status"]).fails(3, &["none is running", "daemon start"]);

    let started = start(bench).ok();

    assert!(started.text().starts_with("started the daemon of store "), "{started:?}");
    let status = bench.json(&["daemon", "status"]);
    assert_eq!((&status["served"], &status["jobs"]), (&json!(0), &json!(0)));
    assert!(
        bench.ok(&["daemon", "status"]).text().contains(&format!("process     {}", status["pid"]))
    );
    start(bench).fails(5, &["answers at", "already"]);
    let taken = Bench::new();
    let program = offshoot_tests::daemon::program("blockd");
    let mut command = taken.command(&["daemon", "start", "--api", &bench.arg("api"), "--program"]);
    run(command.arg(program)).fails(13, &["another process answers there"]);
    bench.ok(&["disk", "create", "a", "--size", "1M"]);

    bench.ok(&["daemon", "stop"]);

    assert!(!bench.path("api").exists() && !bench.store().join("daemon.json").exists());
    assert_eq!(bench.disks(), ["a"]);
    bench.run(&["daemon", "stop"]).fails(3, &["none is running"]);
}

#[test]
fn disks_are_attached_limited_and_detached() {
    let bench = &Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "8M"]);
    bench.run(&["disk", "attach", "a", "--socket", "x"]).fails(3, &["none is running"]);
    start(bench).ok();
    let (socket, nbd) = (bench.arg("a.sock"), bench.arg("a.nbd"));

    let args = ["disk", "attach", "a", "--socket", &socket, "--queues", "2", "--iops", "1000"];
    let attached = bench.json(&args);

    assert_eq!((&attached["socket"], &attached["queues"]), (&json!(socket), &json!(2)));
    bench.ok(&["disk", "export-nbd", "a", "--socket", &nbd, "--readonly"]);
    assert!(bench.ok(&["disk", "show", "a"]).text().contains(&format!("nbd at {nbd}, listening")));
    bench.run(&["disk", "attach", "b", "--socket", &bench.arg("b")]).fails(3, &["disk b"]);
    bench.run(&["disk", "rm", "a"]).fails(5, &["served on", "disk detach a"]);
    bench.run(&["disk", "write", "a"]).fails(5, &["served on"]);
    assert_eq!(bench.read("a", 0, 512), vec![0; 512]);
    assert_eq!(bench.json(&["disk", "resize", "a", "16M"])["size"], 16 << 20);
    let limits = bench.json(&["disk", "limits", "a", "--bps", "1M"]);
    assert_eq!(limits, json!({"iops": 0, "bytes_per_s": 1 << 20, "burst_ms": 0}));
    bench.run(&["disk", "limits", "b"]).fails(3, &["not served"]);
    assert_eq!(bench.json(&["disk", "resume", "a"]), json!({"resumed": "a"}));
    let top = bench.json(&["top", "--interval", "0.1"]);
    assert_eq!((&top[0]["disk"], &top[0]["in_flight"]), (&json!("a"), &json!(0)));
    let table = bench.ok(&["top", "--once", "--interval", "0.1"]);
    assert!(table.text().lines().nth(1).is_some_and(|l| l.starts_with('a')), "{table:?}");

    let ended = bench.json(&["disk", "detach", "a", "--socket", &nbd]);

    assert_eq!(ended.as_array().map(Vec::len), Some(1));
    bench.ok(&["disk", "detach", "a"]);
    bench.run(&["disk", "detach", "a"]).fails(3, &["not served"]);
    bench.ok(&["disk", "rm", "a"]);
}

/// Story: a mode for a disk was taken, and the daemon went on with its own.
#[test]
fn a_use_of_the_page_cache_that_is_not_the_daemons_is_refused() {
    let bench = &Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "8M"]);
    start(bench).ok();
    assert_eq!(bench.json(&["daemon", "status"])["cache"], "buffered");
    let attach = |mode: &str| {
        bench.run(&["disk", "attach", "a", "--socket", &bench.arg("a.sock"), "--cache", mode])
    };
    attach("direct").fails(2, &["--cache buffered", "start it with --cache direct"]);
    attach("buffered").ok();
    bench.run(&["daemon", "stop", "--cache", "auto"]).fails(2, &["--cache buffered"]);
    bench.ok(&["daemon", "stop"]);
}

#[test]
fn a_disk_is_exported_over_tcp_under_tls_only() {
    let bench = &Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "8M"]);
    start(bench).ok();
    let authority = offshoot_tests::tls::Authority::new();
    let pem = |name: &str| authority.path(name).to_str().expect("a plain path").to_owned();
    let (cert, key, ca) = (pem("server-cert.pem"), pem("server-key.pem"), pem("ca-cert.pem"));
    let address = format!("127.0.0.1:{}", offshoot_tests::tls::free_port());
    let export = ["disk", "export-nbd", "a", "--tcp", &address];
    bench.run(&export).fails(2, &[&address, "under TLS only", "--tls-cert"]);
    let tls = ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &ca];

    let made = bench.json(&[&export, &tls[..]].concat());

    assert_eq!((&made["socket"], &made["kind"]), (&json!(address), &json!("nbd")));
    assert_eq!(made["tls"], json!({"cert": cert, "key": key, "client_ca": ca}));
    assert!(std::net::TcpStream::connect(&address).is_ok());
    bench.run(&[&export, &tls[..]].concat()).fails(4, &[&address, "served there already"]);
    let shown = bench.ok(&["disk", "show", "a"]);
    assert!(shown.text().contains(&format!("nbd at {address} under TLS, ")), "{shown:?}");
    bench.run(&["disk", "detach", "a", "--socket", "127.0.0.1:1"]).fails(3, &["not served there"]);
    let ended = bench.json(&["disk", "detach", "a", "--socket", &address, "--force"]);
    assert_eq!(ended[0]["socket"], json!(address));
    bench.ok(&["disk", "rm", "a"]);
}

#[test]
fn jobs_and_events_are_told() {
    let bench = &Bench::new();
    start(bench).ok();
    bench.ok(&["disk", "create", "a", "--size", "8M"]);
    bench.ok(&["disk", "seal", "a"]);

    let jobs = bench.json(&["job", "ls"]);

    let job = &jobs.as_array().unwrap()[0];
    assert_eq!((&job["kind"], &job["state"]), (&json!("seal"), &json!("done")));
    assert!(bench.ok(&["job", "ls"]).text().contains("seal  disk a  done"));
    let id = job["id"].to_string();
    assert_eq!(bench.json(&["job", "watch", &id])["result"]["name"], "a");
    assert_eq!(bench.json(&["job", "cancel", &id])["state"], "done");
    bench.run(&["disk", "seal", "a"]).fails(2, &["sealed already"]);
    bench.run(&["job", "watch", "2"]).fails(2, &["cannot seal disk a: it is sealed already"]);
    bench.run(&["job", "watch", "99"]).fails(3, &["job 99"]);
    let lines = bench.ok(&["events", "--json"]);
    let events: Vec<Value> =
        lines.text().lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(events[0]["kind"], "started");
    let since = (events.len() - 1).to_string();
    let last = bench.ok(&["events", "--since", &since]);
    assert!(last.text().contains("job-finished  job 2 (seal): cannot seal"), "{last:?}");
    run(&mut offshoot(&["job", "ls", "--api", &bench.arg("nobody")])).fails(3, &["nobody answers"]);
}

/// A job that one client runs is stopped by another: the verb fails, says that it was stopped, and
/// nothing of what it was making is left.
#[test]
fn a_job_that_runs_is_cancelled() {
    let bench = &Bench::new();
    start(bench).ok();
    fs::write(bench.path("image"), vec![1; 256 << 20]).expect("room");
    let import = bench.start(&["disk", "import", &bench.arg("image"), "a", "--json"]);
    let running = || {
        let jobs = bench.json(&["job", "ls"]).as_array().expect("a list").clone();
        jobs.into_iter().find(|j| j["state"] == "running" && j["done"].as_u64() > Some(0))
    };
    let mut job = None;
    until("it runs", || {
        job = running();
        job.is_some()
    });
    let id = job.expect("seen")["id"].to_string();

    let said = bench.ok(&["job", "cancel", &id]);

    assert!(said.text().contains(&format!("job {id} was asked to stop")), "{said:?}");
    let ran = wait(import).fails(130, &["import", "cancelled"]);
    assert_eq!(ran.json()["error"]["kind"], "cancelled");
    let watched = bench.run(&["job", "watch", &id]);
    assert_eq!(
        (watched.code, watched.err.contains("it was cancelled")),
        (130, true),
        "{watched:?}"
    );
    assert_eq!(bench.json(&["job", "ls"])[0]["state"], "cancelled");
    assert!(bench.disks().is_empty());
    until("its segment is gone", || bench.files(".new").is_empty());
    assert!(bench.files(".seg").is_empty());
}

/// Who follows the events is told of each when it happens, and of the end of the daemon; then the
/// verb ends well.
#[test]
fn events_are_followed() {
    let bench = &Bench::new();
    start(bench).ok();
    let mut follower = bench.start(&["events", "--follow"]);
    let mut as_json = bench.start(&["events", "--follow", "--json", "--since", "1"]);
    let mut lines = BufReader::new(follower.stdout.take().expect("a pipe")).lines();
    let mut next = || lines.next().expect("it goes on").expect("text");
    assert!(next().contains("started"));

    bench.ok(&["disk", "create", "a", "--size", "8M"]);
    bench.ok(&["disk", "seal", "a"]);

    // While it follows: nothing else will come that could push them out.
    for told in ["job-started   job 1 (seal): disk a", "job-finished  job 1 (seal): disk a: done"] {
        let line = next();
        assert!(line.contains(told), "{line}");
    }
    let mut json = BufReader::new(as_json.stdout.take().expect("a pipe")).lines();
    let line = json.next().expect("it goes on").expect("text");
    let event: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!((&event["kind"], &event["seq"]), (&json!("job-started"), &json!(2)));
    bench.ok(&["daemon", "stop"]);
    assert!(next().contains("stopping"));
    assert!(lines.next().is_none());
    assert_eq!(json.count(), 2, "the end of the job, and of the daemon");
    wait(follower).ok();
    wait(as_json).ok();
}
