//! Upgrade in place: a daemon hands its disks, sockets and guests to a successor, and a guest's
//! driver sees nothing of it but a pause.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{OpenOptions, StoreDir, boot_id};
use offshoot_tests::daemon::{Daemon, Reply, Talk, ask, program};
use offshoot_tests::load::Load;
use offshoot_tests::mount::Mount;
use offshoot_tests::pattern::{self, Found};
use offshoot_tests::rng::{Rng, seed, soak};
use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_blk::client::{Client, Options};
use vhost_blk::queue::F_RING_PACKED;

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;
const QUEUES: u16 = 2;

struct Bench {
    dir: TempDir,
    store: PathBuf,
    tail_dir: PathBuf,
}

impl Bench {
    /// A store with one disk.
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        Bench::in_dir(dir, store)
    }

    fn in_dir(dir: TempDir, store: PathBuf) -> Bench {
        let tail_dir = StoreDir::init(&store, None).unwrap().tail_dir;
        let bench = Bench { dir, store, tail_dir };
        bench.done(&["disk", "create", "vm", "--size", "64M"]);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn api(&self) -> PathBuf {
        self.path("api.sock")
    }

    fn socket(&self) -> PathBuf {
        self.path("vm.sock")
    }

    fn offshoot(&self, args: &[&str]) -> Output {
        let mut command = Command::new(program("offshoot"));
        command.env_remove("OFFSHOOT_API").arg("--store").arg(&self.store);
        command.args(args).output().unwrap()
    }

    fn done(&self, args: &[&str]) -> Vec<u8> {
        let output = self.offshoot(args);
        assert!(output.status.success(), "{args:?}: {output:?}\n{}", self.log());
        output.stdout
    }

    fn refused(&self, args: &[&str], code: i32) -> String {
        let output = self.offshoot(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}\n{}", self.log());
        said
    }

    fn log(&self) -> String {
        let log = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        log(&self.path("api.log")) + &log(&self.store.join("daemon.log"))
    }

    fn start(&self) -> Daemon {
        Daemon::start(&self.store, &self.api())
    }

    fn attach(&self) {
        let (socket, queues) = (self.socket(), QUEUES.to_string());
        let socket = socket.to_str().unwrap();
        self.done(&["disk", "attach", "vm", "--socket", socket, "--queues", &queues]);
    }

    fn upgrade(&self) -> Value {
        let program = program("blockd");
        let args = ["daemon", "upgrade", "--json", "--program", program.to_str().unwrap()];
        serde_json::from_slice(&self.done(&args)).unwrap()
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Reply {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        ask(&self.api(), method, path, body.as_bytes()).unwrap()
    }

    fn get(&self, path: &str) -> Value {
        self.ask("GET", path, &Value::Null).json()
    }

    fn pid(&self) -> u64 {
        self.get("/v1/health")["pid"].as_u64().unwrap()
    }

    /// What the disk holds when no daemon runs, next to what the loads expect.
    fn compare(&self, loads: &[Load]) {
        self.done(&["disk", "check", "vm"]);
        let how = OpenOptions { access: Access::Read, cache: CacheMode::Auto, boot: boot_id() };
        let store = StoreDir::open(&self.store, &how).unwrap();
        let disk = store.open_disk("vm", Access::Read, &store.disk_options()).unwrap();
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        disk.read(0, 0, &mut bytes).unwrap();
        for load in loads {
            let (start, tags) = load.expected();
            for (sector, tag) in (start..).zip(tags) {
                let at = usize::try_from(sector * 512).unwrap();
                let want = if *tag == 0 { Found::Zero } else { Found::Tag(*tag) };
                assert_eq!(pattern::look(&bytes[at..at + 512], sector), want, "sector {sector}");
            }
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // A successor is nobody's child.
        let text = fs::read(self.store.join("daemon.json")).unwrap_or_default();
        let file: Value = serde_json::from_slice(&text).unwrap_or_default();
        let pid = file["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let _ = fs::remove_dir_all(&self.tail_dir);
    }
}

fn options(packed: bool) -> Options {
    let plain = Options { queues: QUEUES, data_size: 2 << 20, ..Options::default() };
    let features = plain.features | if packed { F_RING_PACKED } else { 0 };
    Options { features, ..plain }
}

/// Ends loads, also when the test fails.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Does something while a guest's driver works on the disk over one connection, and gives back what
/// must be on it. `Client` does not connect again by itself: a lost connection fails the load.
fn under_load(bench: &Bench, packed: bool, seed: u64, work: impl FnOnce()) -> Vec<Load> {
    let (client, queues) = Client::connect(&bench.socket(), options(packed)).unwrap();
    let part = SECTORS / u64::from(QUEUES);
    let load = |(i, queue)| Load::new(queue, i * part, part, seed + i);
    let loads: Vec<Load> = (0..).zip(queues).map(load).collect();
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let loads = std::thread::scope(|s| {
        let run = |mut load: Load| {
            let (stop, done) = (&stop, &done);
            s.spawn(move || {
                load.run(&mut |n| {
                    done.fetch_max(n, Ordering::Relaxed);
                    !stop.load(Ordering::Relaxed)
                });
                load.verify();
                load.flush();
                load
            })
        };
        let threads: Vec<_> = loads.into_iter().map(run).collect();
        let progress = || {
            let (before, start) = (done.load(Ordering::Relaxed), Instant::now());
            while done.load(Ordering::Relaxed) < before + 200 {
                assert!(start.elapsed() < Duration::from_secs(60), "no progress: {}", bench.log());
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let ending = Ending(&stop);
        progress();
        work();
        progress();
        drop(ending);
        threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
    });
    drop(client);
    loads
}

fn upgrades_under_load(packed: bool) {
    let upgrades = if soak() { 100 } else { 6 };
    let seed = seed(91);
    println!("repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test daemon_upgrade");
    let bench = Bench::new();
    let mut first = bench.start();
    bench.attach();
    let mut rng = Rng::new(seed);
    let mut blackouts = Vec::new();
    let loads = under_load(&bench, packed, seed, || {
        for _ in 0..upgrades {
            std::thread::sleep(Duration::from_micros(rng.below(150_000)));
            let before = bench.pid();
            let upgraded = bench.upgrade();
            assert_ne!(upgraded["pid"], before);
            assert_eq!(upgraded["front_ends"], 1, "{upgraded}: {}", bench.log());
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
    upgrades_under_load(false);
}

#[test]
fn a_guest_goes_on_through_upgrades_with_packed_rings() {
    upgrades_under_load(true);
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
fn hand_over_to(bench: &Bench, fake: &Fake) -> Reply {
    let path = bench.path("fake.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let reply = std::thread::scope(|s| {
        let asked = s.spawn(|| bench.ask("POST", "/v1/handover", &json!({ "socket": path })));
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
    let bench = Bench::new();
    let daemon = bench.start();
    bench.attach();
    let pid = bench.pid();
    let loads = under_load(&bench, packed, 17, || {
        let refused = hand_over_to(&bench, &Fake::Stranger);
        assert_eq!(refused.json()["error"]["kind"], "unsupported", "{refused:?}");
        for fake in [Fake::Drops, Fake::Hesitates, Fake::Drops, Fake::Drops] {
            let refused = hand_over_to(&bench, &fake);
            assert_eq!(refused.json()["error"]["kind"], "failed", "{refused:?}");
        }
        let nbd = bench.path("vm.nbd");
        bench.done(&["disk", "export-nbd", "vm", "--socket", nbd.to_str().unwrap()]);
        for fake in [Fake::Hesitates, Fake::Drops] {
            assert_eq!(hand_over_to(&bench, &fake).status, 500);
            let mut greeting = [0; 8];
            UnixStream::connect(&nbd).unwrap().read_exact(&mut greeting).unwrap();
            assert_eq!(&greeting, b"NBDMAGIC");
            until("the client is gone", || bench.get("/v1/exports")[1]["connected"] == 0);
        }
        let said = bench.refused(&["daemon", "upgrade", "--program", "/bin/false"], 13);
        assert!(said.contains("the new one ended"), "{said}");
        assert_eq!(bench.pid(), pid);
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
    let bench = Bench::new();
    let mut first = bench.start();
    bench.attach();
    let (mut client, queues) = Client::connect(&bench.socket(), options(false)).unwrap();
    let mut loads: Vec<Load> = Vec::new();
    for (i, queue) in (0..).zip(queues) {
        let mut load = Load::new(queue, i * 4096, 4096, i);
        load.run(&mut |done| done < 400);
        loads.push(load);
    }
    let failed = hand_over_to(&bench, &Fake::TakesAndDies);
    assert_eq!(failed.json()["error"]["kind"], "failed", "{failed:?}");
    assert!(first.wait().success(), "the store is not its own any more");

    let second = bench.start();
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
    let bench = Bench::new();
    let mut first = bench.start();
    let nbd = bench.path("vm.nbd");
    bench.done(&["disk", "export-nbd", "vm", "--socket", nbd.to_str().unwrap()]);
    let own = program("blockd");
    let upgrade = ["daemon", "upgrade", "--program", own.to_str().unwrap()];

    let client = UnixStream::connect(&nbd).unwrap();
    let mut greeting = [0; 16];
    (&client).read_exact(&mut greeting).unwrap();
    let said = bench.refused(&upgrade, 5);
    assert!(said.contains("NBD client") && said.contains("--force"), "{said}");
    drop(client);

    // A session that reads another disk is a job.
    bench.done(&["disk", "create", "other", "--size", "1M"]);
    let mut talk = Talk::to(&bench.api()).unwrap();
    let session = json!({"disk": "other", "use": "read"}).to_string();
    let opened = talk.ask("POST", "/v1/sessions", session.as_bytes()).unwrap();
    assert_eq!(opened.status, 201, "{opened:?}");
    let said = bench.refused(&upgrade, 5);
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
    let bench = Bench::new();
    let daemon = bench.start();
    bench.attach();
    let second = bench.path("second.sock");
    bench.done(&["disk", "create", "base", "--size", "8M"]);
    bench.done(&["disk", "seal", "base"]);
    bench.done(&["disk", "attach", "base", "--readonly", "--socket", second.to_str().unwrap()]);
    bench.done(&["disk", "limits", "vm", "--iops", "4321"]);
    let exports = bench.get("/v1/exports");
    let arguments = bench.get("/v1/health")["arguments"].clone();
    let last_event = |bench: &Bench| {
        let text = bench.ask("GET", "/v1/events", &Value::Null).body;
        let text = String::from_utf8(text).unwrap();
        let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        last["seq"].as_u64().unwrap()
    };
    for _ in 0..2 {
        let before = last_event(&bench);
        let upgraded = bench.upgrade();

        assert_eq!(upgraded["arguments"], arguments);
        assert_eq!(bench.get("/v1/exports"), exports);
        assert_eq!(bench.get("/v1/stats")[1]["limits"]["iops"], 4321);
        assert!(last_event(&bench) > before, "followers see no number twice");
        let file: Value =
            serde_json::from_slice(&fs::read(bench.store.join("daemon.json")).unwrap()).unwrap();
        assert_eq!(file["pid"], upgraded["pid"]);
    }
    drop(daemon);
    bench.done(&["disk", "detach", "vm"]);
    assert!(!bench.socket().exists());
    bench.done(&["daemon", "stop"]);
    assert!(!bench.api().exists());
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
    let bench = Bench::in_dir(tempfile::tempdir().unwrap(), mount.path().join("store"));
    let mut first = bench.start();
    bench.attach();
    let held = || bench.get("/v1/health")["held"] == json!(["vm"]);
    let loads = under_load(&bench, false, 3, || {
        let filler = mount.fill(0);
        until("held", held);

        assert_eq!(bench.upgrade()["front_ends"], 1);

        until("held again", held);
        drop(filler);
        bench.done(&["disk", "resume", "vm"]);
        until("resumed", || !held());
    });
    assert!(first.wait().success());
    bench.done(&["daemon", "stop"]);
    bench.compare(&loads);
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
