//! Each disk of a daemon is a fault domain: what is wrong with one is told, costs its own guest
//! errors, and costs a guest that works on another disk of the same daemon nothing.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use blockd::segment::{file_name, read_superblock};
use blockd::store::file::{FileStore, FileStoreOptions};
use blockd::store::{Access, Store as _};
use format::node::NodePtr;
use format::tree::Tree;
use format::units::LeafNo;
use offshoot_tests::daemon::Daemon;
use offshoot_tests::load::{self, Load};
use offshoot_tests::mount::{Mount, run};
use offshoot_tests::pattern;
use offshoot_tests::rng::seed;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use serde_json::{Value, json};
use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// A store with two disks of the same size, which no daemon has yet. On `bad` there is data in the
/// first MiB of each half.
fn bench() -> TestStore {
    let bench = TestStore::new();
    for name in ["good", "bad"] {
        bench.done(&["disk", "create", name, "--size", &SIZE.to_string()]);
    }
    for at in [0, SIZE / 2] {
        bench.write("bad", at, &pattern::bytes(1, at / 512, MIB / 512));
    }
    bench
}

fn segment(bench: &TestStore, name: &str) -> PathBuf {
    let segment = bench.json(&["disk", "show", name])["segment"].as_str().unwrap().to_owned();
    bench.store().join(file_name(segment.parse().unwrap()))
}

fn connect(bench: &TestStore, name: &str) -> (Client, ClientQueue) {
    let socket = bench.path(&format!("{name}.sock"));
    bench.done(&["disk", "attach", name, "--socket", socket.to_str().unwrap()]);
    let options = Options { data_size: 2 << 20, ..Options::default() };
    let (client, mut queues) = Client::connect(&socket, options).unwrap();
    (client, queues.remove(0))
}

/// The status of one request of a page, whose place in the queue's memory is `offset` mod 1 MiB.
fn status(queue: &mut ClientQueue, op: Op, offset: u64) -> u8 {
    let span = Span { offset: queue.data().0 + offset % MIB, len: 4096 };
    let spans = if matches!(op, Op::Flush) { &[][..] } else { &[span] };
    queue.run(op, offset, spans, 20_000).unwrap().status
}

/// True when a page is as [`bench`] wrote it.
fn reads_well(queue: &mut ClientQueue, offset: u64) -> bool {
    let mut bytes = vec![0; 4096];
    let read = status(queue, Op::Read, offset);
    queue.arena().read(queue.data().0 + offset % MIB, &mut bytes);
    read == 0 && bytes == pattern::bytes(1, offset / 512, 8)
}

/// What was told about disk `bad`, of this kind.
fn told(daemon: &Daemon, kind: &str) -> Vec<String> {
    let text = String::from_utf8(daemon.ask("GET", "/v1/events", b"").body).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let chosen = events.filter(|e| e["kind"] == kind && e["object"] == "disk bad");
    chosen.map(|e| e["detail"].as_str().unwrap().to_owned()).collect()
}

/// Does something while a guest works on `good`, which goes on before and after.
fn beside_a_guest<R>(bench: &TestStore, daemon: Daemon, work: impl FnOnce(&Daemon) -> R) -> R {
    let seed = seed(55);
    println!("repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test fault_domains");
    let (client, queue) = connect(bench, "good");
    let load = Load::new(queue, 0, SIZE / 512, seed);
    let (loads, (daemon, result)) = load::during(vec![load], |done| {
        let progress = || {
            let before = done();
            until("the other guest goes on", || done() > before + 100);
        };
        progress();
        let result = work(&daemon);
        progress();
        (daemon, result)
    });
    let stats = daemon.json("GET", "/v1/stats", &Value::Null);
    let good = stats.as_array().unwrap().iter().find(|s| s["disk"] == "good").unwrap();
    let kinds = good["stats"]["kinds"].as_array().unwrap();
    assert!(kinds.iter().all(|kind| kind["errors"] == 0), "{good}");
    drop(client);
    assert!(daemon.terminate().success(), "{}", bench.log());
    assert!(!bench.log().contains("panicked"), "{}", bench.log());
    let checked = bench.json(&["disk", "check", "good"]);
    assert_eq!((&checked["clean"], &checked["stats"]["attached"]), (&json!(true), &json!("no")));
    let bytes = bench.read("good");
    loads.iter().for_each(|load| load.holds(&bytes));
    result
}

/// A file that is mounted over another one.
struct Bound(PathBuf);

impl Bound {
    fn over(file: &Path, place: &Path) -> Bound {
        run("mount", &["--bind", file.to_str().unwrap(), place.to_str().unwrap()]);
        Bound(place.to_owned())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

/// The device under one disk's segment dies: its guest gets errors from then on, and whoever
/// follows the events is told once. What the guest had flushed is there when the device is back.
#[test]
fn a_disk_that_fails_in_service_takes_no_other_down() {
    let test = "fault_domains::a_disk_that_fails_in_service_takes_no_other_down";
    let Some(mount) = Mount::ext4(test, 128 << 20) else { return };
    let bench = bench();
    let place = segment(&bench, "bad");
    let file = mount.path().join("segment");
    fs::copy(&place, &file).unwrap();
    let bound = Bound::over(&file, &place);

    beside_a_guest(&bench, bench.daemon(), |daemon| {
        let (client, mut queue) = connect(&bench, "bad");
        queue.arena().write(queue.data().0, &pattern::bytes(1, 16 * MIB / 512, 8));
        assert_eq!(status(&mut queue, Op::Write, 16 * MIB), 0);
        assert_eq!(status(&mut queue, Op::Flush, 0), 0);
        assert!(told(daemon, "failed").is_empty());

        mount.cut_power();

        assert_eq!(status(&mut queue, Op::Write, 17 * MIB), 1);
        assert_eq!(status(&mut queue, Op::Flush, 0), 1);
        for _ in 0..3 {
            assert_eq!(status(&mut queue, Op::Write, 16 * MIB), 1);
            assert_eq!(status(&mut queue, Op::Flush, 0), 1);
        }
        until("it is told", || !told(daemon, "failed").is_empty());
        assert_eq!(told(daemon, "failed").len(), 1, "{:?}", told(daemon, "failed"));
        drop(client);
        let detach = bench.offshoot(&["disk", "detach", "bad", "--force"]);
        assert!(!detach.status.success(), "it cannot be closed in order: {detach:?}");
    });

    drop(bound);
    mount.power_up();
    let _bound = Bound::over(&file, &place);
    // What was not flushed may be lost, and somebody has to know that.
    let said = bench.refused(&["disk", "check", "bad"], 12);
    assert!(said.contains("a sync failed"), "{said}");
    bench.done(&["disk", "check", "bad", "--accept-lost-tail"]);
    let bytes = bench.done(&["disk", "read", "bad", "--accept-lost-tail"]);
    for at in [0, 16 * MIB, SIZE / 2] {
        let from = usize::try_from(at).unwrap();
        assert!(bytes[from..from + 4096] == pattern::bytes(1, at / 512, 8), "{at}");
    }
}

/// A page of a disk's map is damaged: that is told when it is taken into service; its guest gets
/// errors where that page is needed and nowhere else.
#[test]
fn a_damaged_disk_is_served_where_it_is_sound() {
    let bench = bench();
    let file = segment(&bench, "bad");
    let store = FileStore::open(bench.store(), FileStoreOptions::default()).unwrap();
    let name = file.file_name().unwrap().to_str().unwrap();
    let stored = store.open(name, Access::Read).unwrap();
    let root = read_superblock(stored.as_ref()).unwrap().superblock.root;
    let (tree, _) = Tree::load(root, &mut |at, buf| stored.read_at(at.page.file_offset(), buf));
    let Ok(NodePtr::Page(leaf)) = tree.leaf(LeafNo(1)) else { panic!("leaf 1 has a page") };
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    let written = File::options().write(true).open(&file).unwrap();
    written.write_all_at(b"damaged", leaf.page.file_offset()).unwrap();
    drop((stored, store, written));

    beside_a_guest(&bench, bench.daemon(), |daemon| {
        let (_client, mut queue) = connect(&bench, "bad");
        assert_eq!(told(daemon, "damaged").len(), 1);
        for _ in 0..3 {
            assert!(reads_well(&mut queue, MIB / 2));
            assert_eq!(status(&mut queue, Op::Read, SIZE / 2), 1);
            assert_eq!(status(&mut queue, Op::Write, SIZE / 2 + 4096), 1);
            assert_eq!(status(&mut queue, Op::Write, 3 * MIB), 0);
            assert_eq!(status(&mut queue, Op::Flush, 0), 0);
        }
        assert_eq!(told(daemon, "failed"), [""; 0]);
    });
}
