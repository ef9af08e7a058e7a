//! Flatten in place (D-i, D-o): a guest's driver works at full load on a disk that is flattened,
//! forked, killed under and upgraded under meanwhile. No request fails, no write is lost, the
//! number of segments below the disk stays small, and space comes back.

use std::time::{Duration, Instant};

use offshoot_tests::daemon::{Daemon, program};
use offshoot_tests::load::{self, Load};
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::Value;
use vhost_blk::client::Client;

const REPEAT: &str = "cargo test -p offshoot-tests --test flatten_under_load";

fn show(store: &TestStore) -> Value {
    store.json(&["disk", "show", "vm"])
}

fn depth(store: &TestStore) -> u64 {
    show(store)["depth"].as_u64().unwrap()
}

/// Nothing is being flattened, and the disk stands on no more than its base.
fn is_flat(store: &TestStore) -> bool {
    let shown = show(store);
    shown["depth"].as_u64().unwrap() <= 1 && shown["flattening"].is_null()
}

/// A disk with a guest's driver at work on it; `work` is done meanwhile.
fn under_load<R>(
    seed: u64,
    policy: &str,
    work: impl FnOnce(&ServedDisk, Daemon, &mut Client, &dyn Fn() -> u64) -> (R, Option<Daemon>),
) -> (ServedDisk, Vec<Load>, R) {
    println!("repeat with OFFSHOOT_SEED={seed} {REPEAT}");
    let bench = ServedDisk::new(TestStore::new());
    let daemon = bench.daemon();
    bench.done(&["disk", "flatten-policy", "vm", policy]);
    bench.attach();
    let (mut client, queues) = bench.connect(false);
    let (loads, (result, daemon)) = load::during(bench.loads(queues, seed), |done| {
        let worked = work(&bench, daemon, &mut client, done);
        let before = done();
        until("progress", || done() >= before + 200);
        worked
    });
    drop(client);
    match daemon {
        Some(daemon) => assert!(daemon.terminate().success()),
        // A successor has the store.
        None => _ = bench.done(&["daemon", "stop"]),
    }
    bench.done(&["disk", "repair", "vm"]);
    bench.compare(&loads);
    (bench, loads, result)
}

/// Forks in a row, each of which has the disk flattened: depth is bounded, and when the children
/// are gone, so is all that was frozen for them. `disk show` is asked all the time besides; it once
/// took two locks in the wrong order, and daemon and guest stood still.
#[test]
fn forks_in_a_row_leave_no_depth() {
    let forks = if soak() { 1000 } else { 40 };
    let seed = seed(51);
    let mut rng = Rng::new(seed);
    let (bench, loads, deepest) = under_load(seed, "after-fork", |bench, daemon, _, done| {
        let mut deepest = 0;
        for n in 0..forks {
            let before = done();
            until("progress", || done() >= before + 10);
            std::thread::sleep(Duration::from_micros(rng.below(30_000)));
            bench.done(&["disk", "fork", "vm", &format!("child{n}")]);
            deepest = deepest.max(depth(bench));
            if n > 0 {
                bench.done(&["disk", "rm", &format!("child{}", n - 1)]);
            }
        }
        bench.done(&["disk", "rm", &format!("child{}", forks - 1)]);
        until("it is flat", || is_flat(bench));
        (deepest, Some(daemon))
    });
    println!("{forks} forks, at most {deepest} segments below the disk");
    let longest = loads.iter().map(|load| load.longest).max().unwrap();
    println!("longest time without a completion, as the driver saw it: {longest:?}");
    assert!(deepest <= 256, "a fork waits for the flatten in time");
    assert_eq!(bench.segments(), 2, "the disk and its base");
}

/// Killed at random moments of a flatten, the daemon goes on with it when it is started again.
#[test]
fn a_daemon_killed_in_a_flatten_goes_on() {
    let kills = if soak() { 100 } else { 10 };
    let seed = seed(53);
    let mut rng = Rng::new(seed);
    let (bench, _, ()) = under_load(seed, "manual", |bench, first, client, done| {
        let mut daemon = first;
        for n in 0..kills {
            let before = done();
            until("progress", || done() >= before + 200);
            bench.done(&["disk", "fork", "vm", &format!("child{n}")]);
            bench.done(&["disk", "fork", "vm", &format!("other{n}")]);
            bench.done(&["disk", "flatten", "vm", "--rate", "40M"]);
            std::thread::sleep(Duration::from_micros(rng.below(400_000)));
            daemon.kill();
            daemon = bench.daemon();
            let end = Instant::now() + Duration::from_secs(20);
            while let Err(e) = client.reconnect(&bench.socket()) {
                assert!(Instant::now() < end, "the daemon does not come back: {e}");
                std::thread::sleep(Duration::from_millis(2));
            }
            until("it goes on by itself", || is_flat(bench));
            bench.done(&["disk", "rm", &format!("child{n}")]);
            bench.done(&["disk", "rm", &format!("other{n}")]);
        }
        ((), Some(daemon))
    });
    assert_eq!(bench.segments(), 2, "the disk and its base");
}

/// What comes in between stops a flatten for a moment, and it goes on: another fork, an upgrade of
/// the daemon.
#[test]
fn a_flatten_goes_on_after_a_fork_and_an_upgrade() {
    let seed = seed(57);
    let (_, _, ()) = under_load(seed, "manual", |bench, daemon, _, done| {
        let program = program("blockd");
        let program = program.to_str().unwrap();
        let before = done();
        until("there is something to copy", || done() >= before + 500);
        bench.done(&["disk", "fork", "vm", "one"]);
        bench.done(&["disk", "fork", "vm", "two"]);
        until("there is something to copy", || done() >= before + 1500);
        bench.done(&["disk", "fork", "vm", "three"]);
        bench.done(&["disk", "flatten", "vm", "--rate", "4M"]);
        std::thread::sleep(Duration::from_millis(300));

        bench.done(&["disk", "fork", "vm", "four"]);
        assert_eq!(show(bench)["flattening"], "base");
        let upgraded = bench.json(&["daemon", "upgrade", "--program", program]);
        println!("blackout: {} µs", upgraded["blackout_us"]);

        assert_eq!(show(bench)["flattening"], "base", "the successor goes on");
        let again = bench.offshoot(&["disk", "flatten", "vm", "--wait"]);
        assert_eq!(again.status.code(), Some(5), "one at a time");
        until("it ends", || is_flat(bench));
        let mut predecessor = daemon;
        assert!(predecessor.wait().success());
        ((), None)
    });
}

/// A flatten that is cancelled leaves the disk as it is, with what was copied, and does not begin
/// again by itself.
#[test]
fn a_cancelled_flatten_stays_cancelled() {
    let seed = seed(59);
    let (_, _, ()) = under_load(seed, "manual", |bench, daemon, _, done| {
        let before = done();
        until("there is something to copy", || done() >= before + 1000);
        bench.done(&["disk", "fork", "vm", "one"]);
        until("there is something to copy", || done() >= before + 2000);
        bench.done(&["disk", "fork", "vm", "two"]);
        let job = bench.json(&["disk", "flatten", "vm", "--rate", "1M"]);
        std::thread::sleep(Duration::from_millis(300));

        bench.done(&["job", "cancel", &job["id"].to_string()]);

        until("it has ended", || show(bench)["flattening"].is_null());
        assert_eq!(depth(bench), 2);
        ((), Some(daemon))
    });
}
