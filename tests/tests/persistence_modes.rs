//! Persistence modes of disks (D-m), through the command line, with a daemon and without one, and
//! with guests' drivers on real sockets: what is kept, what is dropped, and when.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{ForkOf, Keep, NewDisk, OpenOptions, StoreDir, boot_id};
use format::superblock::Mode;
use offshoot_tests::daemon::{Daemon, program};
use offshoot_tests::load;
use offshoot_tests::pattern::{self, SECTOR};
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::{Value, json};
use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};

/// Bytes of the disks.
const SIZE: u64 = 8 << 20;
/// How long a request may take, a restart of the daemon included.
const PATIENCE_MS: u32 = 60_000;

/// Runs a test with a daemon that has the store, and without one.
fn each(test: impl Fn(&TestStore)) {
    for with_daemon in [false, true] {
        println!("with a daemon: {with_daemon}");
        let store = TestStore::new();
        let daemon = with_daemon.then(|| store.daemon());
        test(&store);
        if let Some(daemon) = daemon {
            assert!(daemon.terminate().success());
        }
    }
}

/// Creates the disk `vm`, with something on it, and gives it a mode. Gives back what it holds.
fn disk_of(store: &TestStore, mode: &str) -> Vec<u8> {
    store.done(&["disk", "create", "vm", "--size", &SIZE.to_string()]);
    store.write("vm", 0, &pattern::bytes(1, 0, 600));
    let disk = store.json(&["disk", "mode", "vm", mode]);
    assert_eq!(disk["mode"], mode);
    let listed = store.json(&["disk", "ls"]);
    assert_eq!(listed[0]["mode"], mode, "{listed}");
    assert_eq!(store.json(&["disk", "show", "vm"])["base"].is_null(), mode == "persistent");
    let content = store.read("vm");
    assert_eq!(content[..600 * SECTOR], pattern::bytes(1, 0, 600), "a mode drops nothing");
    content
}

/// Changes what the disk `vm` holds; gives back what that is.
fn change(store: &TestStore, tag: u32) -> Vec<u8> {
    let first = u64::from(tag) * 40;
    store.write("vm", first * SECTOR as u64, &pattern::bytes(tag, first, 300));
    store.read("vm")
}

fn is_sound(store: &TestStore, disk: &str) {
    store.done(&["disk", "check", disk]);
}

/// D-m: `undoable`: commit or undo decides.
#[test]
fn undoable_is_committed_or_undone() {
    each(|store| {
        let base = disk_of(store, "undoable");
        let pending = change(store, 2);
        assert!(pending != base);
        store.done(&["disk", "undo", "vm"]);
        assert!(store.read("vm") == base);

        let committed = change(store, 3);
        store.done(&["disk", "commit", "vm"]);
        change(store, 4);
        store.done(&["disk", "discard", "vm", "--offset", "0", "--length", "4M"]);
        store.done(&["disk", "resize", "vm", "16M"]);
        let disk = store.json(&["disk", "undo", "vm"]);

        assert_eq!(disk["size"], SIZE, "the size is undone with the rest");
        assert!(store.read("vm") == committed);
        store.done(&["disk", "undo", "vm"]);
        assert!(store.read("vm") == committed, "undone twice is undone once");
        let kept = change(store, 5);
        store.done(&["disk", "mode", "vm", "persistent"]);
        assert!(store.read("vm") == kept);
        for verb in ["undo", "commit"] {
            let said = store.refused(&["disk", verb, "vm"], 2);
            assert!(said.contains("persistent"), "{said}");
        }
        is_sound(store, "vm");
        store.done(&["disk", "rm", "vm"]);
        assert_eq!(store.segments(), 0);
    });
}

/// D-m: `append`: changes are kept apart until they are committed; an undo is refused by name.
#[test]
fn append_is_kept_until_committed() {
    each(|store| {
        disk_of(store, "append");
        let pending = change(store, 2);
        let said = store.refused(&["disk", "undo", "vm"], 2);
        assert!(said.contains("append") && said.contains("disk vm"), "{said}");
        assert!(store.read("vm") == pending);
        store.done(&["disk", "commit", "vm"]);
        assert!(store.read("vm") == pending);
        let more = change(store, 3);
        // Another mode keeps apart what was kept apart.
        store.done(&["disk", "mode", "vm", "undoable"]);
        assert!(store.read("vm") == more);
        store.done(&["disk", "undo", "vm"]);
        assert!(store.read("vm") == pending);
        is_sound(store, "vm");
    });
}

/// D-m: `nonpersistent`: verbs are no machine: what they write stays until a machine was on and
/// off, or until it is undone; a commit keeps it.
#[test]
fn nonpersistent_outlives_verbs() {
    each(|store| {
        let base = disk_of(store, "nonpersistent");
        let pending = change(store, 2);
        assert!(store.read("vm") == pending);
        store.done(&["disk", "undo", "vm"]);
        assert!(store.read("vm") == base);
        let kept = change(store, 3);
        store.done(&["disk", "commit", "vm"]);
        change(store, 4);
        store.done(&["disk", "undo", "vm"]);
        assert!(store.read("vm") == kept);
        is_sound(store, "vm");
    });
}

/// D-m: the rules on fork: a child of a disk of any mode holds what the disk holds, pending or not,
/// and is persistent; the disk keeps its mode, and its base.
#[test]
fn a_fork_takes_what_is_pending_and_leaves_it_pending() {
    for mode in ["nonpersistent", "undoable"] {
        each(|store| {
            let base = disk_of(store, mode);
            let pending = change(store, 2);
            let forked = store.json(&["disk", "fork", "vm", "child"]);
            assert_eq!(forked["children"][0]["mode"], "persistent");
            assert!(store.read("child") == pending);
            assert_eq!(store.json(&["disk", "show", "vm"])["mode"], mode);
            change(store, 3);

            store.done(&["disk", "undo", "vm"]);

            assert!(store.read("vm") == base, "back to before the fork");
            assert!(store.read("child") == pending);
            // The child has a mode, and a base, of its own.
            store.done(&["disk", "mode", "child", "undoable"]);
            store.done(&["disk", "discard", "child", "--offset", "0", "--length", "1M"]);
            store.done(&["disk", "rm", "vm"]);
            store.done(&["disk", "undo", "child"]);
            assert!(store.read("child") == pending);
            is_sound(store, "child");
            store.done(&["disk", "rm", "child"]);
            assert_eq!(store.segments(), 0);
        });
    }
}

/// D-m: the other rules: rename, export and a fork of a group go on as ever, in any mode; sealing
/// would keep what may be dropped, and is refused.
#[test]
fn what_else_can_be_done_in_each_mode() {
    for mode in ["nonpersistent", "undoable", "append"] {
        each(|store| {
            disk_of(store, mode);
            let pending = change(store, 2);
            let said = store.refused(&["disk", "seal", "vm"], 2);
            assert!(said.contains(mode) && said.contains("persistent"), "{said}");
            let image = store.path("vm.raw");
            store.done(&["disk", "export", "vm", image.to_str().unwrap()]);
            assert!(fs::read(&image).unwrap() == pending, "what it holds now");
            store.done(&["disk", "import", image.to_str().unwrap(), "again"]);
            assert_eq!(store.json(&["disk", "show", "again"])["mode"], "persistent");
            fs::remove_file(image).unwrap();
            store.done(&["disk", "rename", "vm", "www"]);
            let forked = ["disk", "fork", "www", "one", "--with", "again:two"];
            store.done(&forked);
            assert!(store.read("one") == pending && store.read("two") == pending);
            assert_eq!(store.json(&["disk", "show", "www"])["mode"], mode);
            store.done(&["disk", "mode", "www", mode]);
            store.done(&["disk", "mode", "www", "persistent"]);
            store.done(&["disk", "seal", "www"]);
            let said = store.refused(&["disk", "mode", "www", "undoable"], 2);
            assert!(said.contains("sealed"), "{said}");
        });
    }
}

/// D-m: disks with several writers are refused by name, and so are modes that there are not.
#[test]
fn shared_disks_are_refused_by_name() {
    each(|store| {
        let before = disk_of(store, "persistent");
        for mode in ["shared", "multi-writer", "independent_persistent"] {
            let said = store.refused(&["disk", "mode", "vm", mode], 8);
            assert!(said.contains(mode) && said.contains("disk vm"), "{said}");
        }
        let said = store.refused(&["disk", "mode", "vm", "forgetful"], 2);
        assert!(said.contains("forgetful") && said.contains("undoable"), "{said}");
        let said = store.refused(&["disk", "mode", "nobody", "undoable"], 3);
        assert!(said.contains("nobody"), "{said}");
        assert!(store.read("vm") == before);
    });
}

/// Story: a removal asked first what disks stand on, and then which segments are frozen. A fork of
/// another disk in between had its frozen segment deleted, under the disk and its child.
#[test]
fn removals_and_undos_beside_forks_take_nothing() {
    let rounds = if soak() { 2000 } else { 30 };
    let store = TestStore::new();
    let how = OpenOptions { access: Access::Write, cache: CacheMode::Auto, boot: boot_id() };
    let dir = StoreDir::open(store.store(), &how).unwrap();
    let new = |name: &str| NewDisk { journal_bytes: 64 << 10, ..NewDisk::root(name, 1 << 20) };
    for n in 0..8 {
        dir.create(&new(&format!("m{n}"))).unwrap();
        dir.keep(&format!("m{n}"), Keep::As(Mode::NonPersistent)).unwrap();
    }
    dir.create(&new("vm")).unwrap();
    let done = AtomicBool::new(false);
    let rounds = || -> Result<(), String> {
        for n in 0..rounds {
            let child = format!("child{n}");
            let wanted = ForkOf { disk: "vm".into(), children: vec![child.clone()] };
            dir.fork(&[wanted]).map_err(|e| format!("round {n}: {e}"))?;
            for name in ["vm", &child] {
                let disk = dir.open_disk(name, Access::Read, &dir.disk_options());
                disk.map_err(|e| format!("round {n}: {e}"))?;
            }
        }
        Ok(())
    };
    let outcome = std::thread::scope(|scope| {
        let undoing = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                dir.undo("m0").unwrap();
            }
        });
        let outcome = rounds();
        done.store(true, Ordering::Relaxed); // soon enough
        undoing.join().unwrap();
        outcome
    });
    assert_eq!(outcome, Ok(()));
}

/// The mode is a segment's own: a catalogue that is made anew knows it.
#[test]
fn a_rebuilt_catalogue_knows_the_mode() {
    let store = TestStore::new();
    let base = disk_of(&store, "undoable");
    let pending = change(&store, 2);
    fs::remove_file(store.store().join("catalogue.redb")).unwrap();
    store.done(&["store", "rebuild"]);
    assert!(store.read("vm") == pending);
    assert_eq!(store.json(&["disk", "ls"])[0]["mode"], "undoable");
    store.done(&["disk", "undo", "vm"]);
    assert!(store.read("vm") == base);
}

/// A machine with one disk.
struct Machine {
    client: Client,
    queue: ClientQueue,
}

impl Machine {
    fn on(socket: &Path) -> Machine {
        let (client, mut queues) = Client::connect(socket, Options::default()).expect("let in");
        Machine { client, queue: queues.remove(0) }
    }

    fn write(&mut self, tag: u32, first: u64) {
        let at = self.queue.data().0;
        self.queue.arena().write(at, &pattern::bytes(tag, first, 8));
        assert_eq!(self.run(Op::Write, first), 0, "written");
    }

    fn read(&mut self, first: u64) -> Vec<u8> {
        assert_eq!(self.run(Op::Read, first), 0, "read");
        let mut bytes = vec![0; 8 * SECTOR];
        self.queue.arena().read(self.queue.data().0, &mut bytes);
        bytes
    }

    fn run(&mut self, op: Op<'_>, first: u64) -> u8 {
        let span = Span { offset: self.queue.data().0, len: 4096 };
        let done = self.queue.run(op, first * SECTOR as u64, &[span], PATIENCE_MS);
        done.expect("an answer").status
    }

    /// As a monitor does whose daemon is gone.
    fn reconnect(&mut self, socket: &Path) {
        until("it connects again", || self.client.reconnect(socket).is_ok());
    }
}

fn attach(store: &TestStore, disk: &str, options: &[&str]) -> PathBuf {
    let socket = store.path(&format!("{disk}.sock"));
    let args = ["disk", "attach", disk, "--socket", socket.to_str().unwrap()];
    store.done(&[&args, options].concat());
    socket
}

fn detach(store: &TestStore, disk: &str) {
    // The daemon needs a moment to see that a front end is gone.
    until("it is detached", || store.offshoot(&["disk", "detach", disk]).status.success());
}

fn events(daemon: &Daemon, kind: &str) -> Vec<String> {
    let text = String::from_utf8(daemon.ask("GET", "/v1/events", b"").body).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of_kind = events.filter(|event| event["kind"] == kind);
    of_kind.map(|event| format!("{}: {}", event["object"], event["detail"])).collect()
}

/// D-m: `nonpersistent`: what a machine writes is dropped when its disk is detached; not when the
/// daemon is killed, upgraded, ended in order, or when the front end goes and comes again.
#[test]
fn nonpersistent_is_dropped_at_power_off_and_never_before() {
    let store = TestStore::new();
    let mut daemon = store.daemon();
    let base = disk_of(&store, "nonpersistent");
    let socket = attach(&store, "vm", &[]);
    let mut machine = Machine::on(&socket);
    machine.write(2, 0);
    // Killed while the machine is on.
    daemon.kill();
    daemon = store.daemon();
    machine.reconnect(&socket);
    assert_eq!(machine.read(0), pattern::bytes(2, 0, 8));
    machine.write(3, 800);
    // Ended in order, and started again.
    assert!(daemon.terminate().success());
    daemon = store.daemon();
    machine.reconnect(&socket);
    assert_eq!(machine.read(800), pattern::bytes(3, 800, 8));
    // Upgraded.
    store.done(&["daemon", "upgrade", "--program", program("blockd").to_str().unwrap()]);
    assert!(daemon.wait().success());
    machine.write(4, 1600);
    // The front end goes, and another one comes.
    drop(machine);
    let mut machine = Machine::on(&socket);
    let all = [(2, 0), (3, 800), (4, 1600)];
    for (tag, first) in all {
        assert_eq!(machine.read(first), pattern::bytes(tag, first, 8));
    }
    drop(machine);
    let pending = store.read("vm");

    detach(&store, "vm");

    assert!(pending != base);
    assert!(store.read("vm") == base, "the machine is off");
    let socket = attach(&store, "vm", &[]);
    let mut machine = Machine::on(&socket);
    assert!(machine.read(800).iter().all(|byte| *byte == 0), "every start is a first one");
    machine.write(5, 24);
    drop(machine);
    detach(&store, "vm");
    assert!(store.read("vm") == base);
    is_sound(&store, "vm");
    store.done(&["daemon", "stop"]);
    assert_eq!(store.segments(), 2, "base and an empty delta");
}

/// D-m: the daemon is killed at random moments of a power-off. Afterwards the disk is attached,
/// with what its machine wrote or without it, or it is detached without it: no other machine ever
/// starts with what this one left.
#[test]
fn a_daemon_killed_in_a_power_off_leaves_no_delta_behind() {
    let (rounds, seed) = (if soak() { 200 } else { 12 }, seed(67));
    println!(
        "repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test persistence_modes"
    );
    let mut rng = Rng::new(seed);
    let store = TestStore::new();
    let mut daemon = store.daemon();
    let base = disk_of(&store, "nonpersistent");
    let mut ends = [0; 3];
    for round in 0..rounds {
        let socket = attach(&store, "vm", &[]);
        Machine::on(&socket).write(2, 400);
        until("the front end is gone", || store.json(&["daemon", "status"])["connected"] == 0);
        let pending = store.read("vm");
        let mut asked = Command::new(program("offshoot"));
        asked.env_remove("OFFSHOOT_API").arg("--store").arg(store.store());
        asked.args(["disk", "detach", "vm"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut asked = asked.spawn().unwrap();
        std::thread::sleep(Duration::from_micros(rng.below(120_000)));
        daemon.kill();
        // Whatever it was told: what counts is what is there.
        let _ = asked.wait();
        daemon = store.daemon();
        let attached = store.json(&["daemon", "status"])["served"] == 1;
        let found = store.read("vm");
        assert!(found == base || attached && found == pending, "round {round}: {attached}");
        ends[usize::from(attached) + usize::from(found == pending)] += 1;
        if attached {
            store.done(&["disk", "detach", "vm"]);
        }
        assert!(store.read("vm") == base, "round {round}");
    }
    let [detached, without, with] = ends;
    println!("detached: {detached}; attached without what was written: {without}, with it: {with}");
    is_sound(&store, "vm");
    assert_eq!(store.segments(), 2);
}

/// D-m: what a machine wrote to a disk of another mode stays at power-off.
#[test]
fn undoable_and_append_outlive_a_power_off() {
    let store = TestStore::new();
    let daemon = store.daemon();
    let base = disk_of(&store, "undoable");
    for mode in ["undoable", "append"] {
        store.done(&["disk", "mode", "vm", mode]);
        let socket = attach(&store, "vm", &[]);
        Machine::on(&socket).write(2, 400);
        detach(&store, "vm");
        assert_eq!(store.read("vm")[400 * SECTOR..408 * SECTOR], pattern::bytes(2, 400, 8));
    }
    store.done(&["disk", "mode", "vm", "undoable"]);
    store.done(&["disk", "undo", "vm"]);
    assert!(store.read("vm") == base);
    assert_eq!(events(&daemon, "undone").len(), 1);
    assert_eq!(events(&daemon, "mode").len(), 4, "{:?}", events(&daemon, "mode"));
}

/// D-m: a mode and a commit come while the machine is on, without a lost write; an undo does not.
#[test]
fn a_machine_goes_on_through_modes_and_commits() {
    let seed = seed(61);
    println!(
        "repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test persistence_modes"
    );
    let bench = ServedDisk::new(TestStore::new());
    let daemon = bench.daemon();
    bench.attach();
    let (client, queues) = bench.connect(false);
    let (loads, ()) = load::during(bench.loads(queues, seed), |done| {
        for mode in ["undoable", "append", "persistent", "nonpersistent", "undoable"] {
            bench.done(&["disk", "mode", "vm", mode]);
            let before = done();
            until("progress", || done() >= before + 50);
            if mode != "persistent" {
                bench.done(&["disk", "commit", "vm"]);
            }
            std::thread::sleep(Duration::from_millis(20));
            let said = bench.refused(&["disk", "undo", "vm"], 5);
            assert!(said.contains("disk detach vm"), "{said}");
        }
    });
    let committed = bench.read("vm");
    bench.done(&["disk", "commit", "vm"]);
    drop(client);
    let mut machine = Machine::on(&bench.socket());
    machine.write(99, 0);
    drop(machine);
    assert!(bench.read("vm") != committed);
    detach(&bench, "vm");
    bench.done(&["disk", "undo", "vm"]);
    assert_eq!(events(&daemon, "committed").len(), 5);
    assert!(daemon.terminate().success());
    bench.compare(&loads);
}

/// A delta that cannot be dropped is not forgotten: the disk is listed as failed, nobody starts a
/// machine on what another left, and detaching it once more tries again.
#[test]
fn a_power_off_that_fails_is_told_and_repeated() {
    let store = TestStore::new();
    let _daemon = store.daemon();
    let base = disk_of(&store, "nonpersistent");
    let socket = attach(&store, "vm", &[]);
    Machine::on(&socket).write(2, 400);
    let segment = store.json(&["disk", "ls"])[0]["segment"].as_str().unwrap().to_owned();
    let (file, away) = (store.store().join(format!("{segment}.seg")), store.path("away"));
    fs::rename(&file, &away).unwrap();
    until("the front end is gone", || store.json(&["daemon", "status"])["connected"] == 0);
    let said = store.refused(&["disk", "detach", "vm"], 3);
    assert!(said.contains("disk vm"), "{said}");
    assert_eq!(store.json(&["daemon", "status"])["failed"], json!(["vm"]));
    fs::rename(&away, &file).unwrap();
    let socket = socket.to_str().unwrap();
    let said = store.refused(&["disk", "attach", "vm", "--socket", socket], 13);
    assert!(said.contains("detach"), "{said}");

    store.done(&["disk", "detach", "vm"]);

    assert!(store.read("vm") == base);
    is_sound(&store, "vm");
}

/// D-m: two machines do not write to one disk, whatever sockets they come by.
#[test]
fn a_second_writer_is_refused_by_name() {
    let store = TestStore::new();
    let _daemon = store.daemon();
    disk_of(&store, "persistent");
    let first = attach(&store, "vm", &[]);
    let second = store.path("second.sock");
    let second = second.to_str().unwrap();
    let said = store.refused(&["disk", "attach", "vm", "--socket", second], 8);
    assert!(said.contains("disk vm") && said.contains(first.to_str().unwrap()), "{said}");
    store.done(&["disk", "attach", "vm", "--socket", second, "--readonly"]);
    let (mut writer, mut reader) = (Machine::on(&first), Machine::on(Path::new(second)));
    writer.write(2, 80);
    assert_eq!(reader.read(80), pattern::bytes(2, 80, 8));
    assert_ne!(reader.run(Op::Write, 80), 0, "it reads only");
}

/// D-m: media that are only read are shared by reference: one sealed disk, several machines at the
/// same time, and not one more segment.
///
/// Story: where no disk had ever been served for writing there was no folder to remember a guest's
/// cache mode in, and every driver that came to a sealed disk was turned away.
#[test]
fn sealed_disks_are_shared_without_a_delta() {
    let store = TestStore::new();
    let _daemon = store.daemon();
    disk_of(&store, "persistent");
    store.done(&["disk", "seal", "vm"]);
    let before = store.segments();
    let sockets = [1, 2, 3].map(|n| store.path(&format!("{n}.sock")));
    for socket in &sockets {
        let socket = socket.to_str().unwrap();
        let said = store.refused(&["disk", "attach", "vm", "--socket", socket], 9);
        assert!(said.contains("disk vm"), "{said}");
        store.done(&["disk", "attach", "vm", "--socket", socket, "--readonly"]);
    }
    let mut machines = sockets.each_ref().map(|socket| Machine::on(socket));
    for machine in &mut machines {
        assert_eq!(machine.read(40), pattern::bytes(1, 40, 8));
        assert_ne!(machine.run(Op::Write, 40), 0, "nobody writes to it");
    }
    assert_eq!(store.segments(), before, "nothing is kept for any of them");
    // A machine of its own may stand on it, too.
    store.done(&["disk", "create", "child", "--parent", "vm"]);
    let mut own = Machine::on(&attach(&store, "child", &[]));
    own.write(7, 40);
    assert_eq!(machines[0].read(40), pattern::bytes(1, 40, 8));
    assert_eq!(own.read(40), pattern::bytes(7, 40, 8));
}
