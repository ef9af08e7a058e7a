//! The two crash domains, with a guest's driver at work: the daemon dies and comes back under it,
//! and the machine's monitor dies and the disk is none the worse.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{OpenOptions, StoreDir, boot_id};
use offshoot_tests::daemon::{Daemon, program};
use offshoot_tests::load::Load;
use offshoot_tests::pattern::{self, Found};
use offshoot_tests::rng::{Rng, seed, soak};
use tempfile::TempDir;
use vhost_blk::client::{Client, Options};
use vhost_blk::queue::F_RING_PACKED;

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;
const QUEUES: u16 = 2;

struct Bench {
    dir: TempDir,
}

impl Bench {
    /// A store with one disk.
    fn new() -> Bench {
        let bench = Bench { dir: tempfile::tempdir().unwrap() };
        bench.offshoot(&["init"]);
        bench.offshoot(&["disk", "create", "vm", "--size", "64M"]);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("vm.sock")
    }

    fn offshoot(&self, args: &[&str]) {
        let mut command = Command::new(program("offshoot"));
        command.env_remove("OFFSHOOT_API").arg("--store").arg(self.path("store")).args(args);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
    }

    fn start(&self) -> Daemon {
        Daemon::start(&self.path("store"), &self.path("api.sock"))
    }

    fn attach(&self) {
        let socket = self.socket();
        let queues = QUEUES.to_string();
        let socket = socket.to_str().unwrap();
        self.offshoot(&["disk", "attach", "vm", "--socket", socket, "--queues", &queues]);
    }

    /// What the disk holds when no daemon runs, next to what the loads expect.
    fn compare(&self, loads: &[Load]) {
        self.offshoot(&["disk", "check", "vm"]);
        let how = OpenOptions { access: Access::Read, cache: CacheMode::Auto, boot: boot_id() };
        let store = StoreDir::open(&self.path("store"), &how).unwrap();
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

fn options(packed: bool) -> Options {
    let plain = Options { queues: QUEUES, data_size: 2 << 20, ..Options::default() };
    let features = plain.features | if packed { F_RING_PACKED } else { 0 };
    Options { features, ..plain }
}

/// Connects again to a daemon that has just come back; the socket may not be there yet.
fn reconnect(client: &mut Client, socket: &Path) {
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(e) = client.reconnect(socket) {
        assert!(Instant::now() < end, "the daemon does not come back: {e}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Kills the daemon so many times at random moments of a load; returns what must be on the disk.
fn kill_under_load(bench: &Bench, packed: bool, kills: u64, seed: u64) -> Vec<Load> {
    let first = bench.start();
    bench.attach();
    let (mut client, queues) = Client::connect(&bench.socket(), options(packed)).unwrap();
    let part = SECTORS / u64::from(QUEUES);
    let load = |(i, queue)| Load::new(queue, i * part, part, seed + i);
    let loads: Vec<Load> = (0..).zip(queues).map(load).collect();
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut rng = Rng::new(seed);
    let (loads, daemon) = std::thread::scope(|s| {
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
        let (mut daemon, mut gaps) = (first, Vec::new());
        for _ in 0..kills {
            // From before the first request is taken to well into the load.
            std::thread::sleep(Duration::from_micros(rng.below(120_000)));
            daemon.kill();
            let dead = Instant::now();
            daemon = bench.start();
            reconnect(&mut client, &bench.socket());
            gaps.push(dead.elapsed());
        }
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        gaps.sort_unstable();
        let (median, worst) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
        println!("without a daemon: {median:?} (median), {worst:?} (longest) of {kills} kills");
        (threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>(), daemon)
    });
    let served = done.load(Ordering::Relaxed);
    assert!(served > kills * 20, "the load makes progress between kills: {served}");
    drop(client);
    assert!(daemon.terminate().success());
    loads
}

fn no_write_is_lost(packed: bool) {
    let kills = if soak() { 110 } else { 12 };
    let seed = seed(77);
    println!("repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test served_crashes");
    let bench = Bench::new();
    let loads = kill_under_load(&bench, packed, kills, seed);
    bench.compare(&loads);
}

/// Story: the first daemons of this kind replied to a guest and kept the record of a first write in
/// their own memory; when they were killed the guest read zeroes where it had written.
#[test]
fn a_daemon_killed_under_load_loses_no_completed_write() {
    no_write_is_lost(false);
}

#[test]
fn a_daemon_killed_under_load_loses_no_completed_write_on_packed_rings() {
    no_write_is_lost(true);
}

#[test]
fn a_monitor_that_dies_leaves_a_disk_that_opens_clean() {
    let bench = Bench::new();
    let daemon = bench.start();
    bench.attach();
    for round in 0..4 {
        let (client, queues) = Client::connect(&bench.socket(), options(round % 2 == 1)).unwrap();
        for (i, queue) in (0..).zip(queues) {
            let start = (round * u64::from(QUEUES) + i) * 8192;
            Load::new(queue, start, 8192, round + i).leave(&mut |done| done < 300);
        }
        // Requests are in work, and nobody will ever look at their completions.
        drop(client);
    }
    assert!(daemon.terminate().success());
    bench.offshoot(&["disk", "check", "vm"]);
    bench.offshoot(&["disk", "scrub", "vm"]);
}
