//! A disk of a store that a real `blockd` serves.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use offshoot_tests::daemon::{Daemon, program};
use offshoot_tests::guest::GuestDisk;
use offshoot_tests::mount::Mount;
use offshoot_tests::store::TestStore;
use serde_json::{Value, json};

/// Name of the disk, which is also its serial number.
pub const NAME: &str = "guest-disk";

/// One disk in a store of its own, and the daemon that serves it now.
pub struct Served {
    daemon: Option<Daemon>,
    queues: u16,
    store: TestStore,
    /// The file system of the store, when it is one of its own. After the store.
    mount: Option<Mount>,
}

impl Served {
    /// Serves a new, empty disk.
    pub fn new(mib: u64, queues: u16) -> Served {
        Served::on(None, mib, queues)
    }

    /// As [`Served::new`], with the store on a file system of its own.
    pub fn on(mount: Option<Mount>, mib: u64, queues: u16) -> Served {
        let in_mount = |m: &Mount| TestStore::at(m.path().join("store"));
        let store = mount.as_ref().map_or_else(TestStore::new, in_mount);
        let mut served = Served { daemon: None, queues, store, mount };
        served.revive();
        served.ask("POST", "/v1/disks", &json!({"name": NAME, "size": mib << 20}));
        let socket = served.place("socket");
        let export = json!({"kind": "vhost-user", "socket": socket, "queues": queues});
        served.ask("POST", &served.path("/attach"), &json!({ "export": export }));
        served
    }

    /// Serves the content of an image for reading only.
    pub fn read_only(image: &Path) -> Served {
        let mut served = Served { daemon: None, queues: 1, store: TestStore::new(), mount: None };
        served.revive();
        let socket = served.place("socket");
        let [image, socket] = [image, &socket].map(|path| path.to_str().unwrap());
        served.store.done(&["disk", "import", image, NAME]);
        served.store.done(&["disk", "attach", NAME, "--socket", socket, "--readonly"]);
        served
    }

    fn path(&self, rest: &str) -> String {
        format!("/v1/disks/{NAME}{rest}")
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("it runs")
    }

    /// Asks the daemon for something that must succeed.
    pub fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        self.daemon().json(method, path, body)
    }

    /// The guest's end of it.
    pub fn disk(&self) -> GuestDisk {
        GuestDisk { queues: self.queues, ..GuestDisk::new(&self.place("socket")) }
    }

    /// Forks the disk, and serves the child: the end of it for a guest.
    pub fn fork(&self, child: &str) -> GuestDisk {
        let disks = json!([{"disk": NAME, "children": [child]}]);
        self.ask("POST", "/v1/forks", &json!({ "disks": disks }));
        let socket = self.place(child);
        let export = json!({"kind": "vhost-user", "socket": socket, "queues": self.queues});
        self.ask("POST", &format!("/v1/disks/{child}/attach"), &json!({ "export": export }));
        GuestDisk { queues: self.queues, ..GuestDisk::new(&socket) }
    }

    /// A path beside the store.
    pub fn place(&self, name: &str) -> PathBuf {
        self.store.path(name)
    }

    /// Waits until so many front ends are connected.
    pub fn wait_connected(&self, count: u64) {
        let connected = || self.ask("GET", "/v1/exports", &Value::Null)[0]["connected"].clone();
        let end = Instant::now() + Duration::from_secs(60);
        while connected() != count {
            assert!(Instant::now() < end, "{} front ends are connected", connected());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What happened to the disk: kind and detail of each event, with a blank between.
    pub fn events(&self) -> Vec<String> {
        let text = self.daemon().ask("GET", "/v1/events", b"").body;
        let events = String::from_utf8(text).unwrap();
        let events = events.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
        let of_disk = events.filter(|e| e["object"] == format!("disk {NAME}"));
        let word = |e: &Value, field: &str| e[field].as_str().unwrap().to_owned();
        of_disk.map(|e| format!("{} {}", word(&e, "kind"), word(&e, "detail"))).collect()
    }

    /// Bytes that the disk takes on the host.
    pub fn allocated(&self) -> u64 {
        self.ask("GET", &self.path(""), &Value::Null)["allocated"].as_u64().unwrap()
    }

    /// Changes the size of the disk.
    pub fn resize(&self, mib: u64) {
        self.ask("POST", &self.path("/resize"), &json!({"size": {"to": mib << 20}}));
    }

    /// A number of the daemon's metrics, 0 when it is not there.
    fn number(&self, labelled: &str) -> u64 {
        let page = self.daemon().ask("GET", "/metrics", b"").body;
        let page = String::from_utf8(page).unwrap();
        let value = page.lines().find_map(|l| l.strip_prefix(labelled)?.strip_prefix(' '));
        value.map_or(0, |v| v.parse().unwrap())
    }

    /// Requests of a kind (`write`, `flush`, `discard`) that this process answered.
    pub fn count(&self, kind: &str) -> u64 {
        let labels = format!("{{disk=\"{NAME}\",kind=\"{kind}\"}}");
        self.number(&format!("offshoot_disk_requests_total{labels}"))
    }

    /// Requests that broke a rule, and those that were answered with an error.
    pub fn mistakes(&self) -> u64 {
        let errors: u64 = ["read", "write", "flush", "discard", "write_zeroes"]
            .iter()
            .map(|kind| format!("{{disk=\"{NAME}\",kind=\"{kind}\"}}"))
            .map(|labels| self.number(&format!("offshoot_disk_errors_total{labels}")))
            .sum();
        errors + self.number(&format!("offshoot_disk_refused_total{{disk=\"{NAME}\"}}"))
    }

    /// Waits until this process answered `count` requests of a kind.
    pub fn wait_for(&self, kind: &str, count: u64) {
        let end = Instant::now() + Duration::from_secs(60);
        while self.count(kind) < count {
            assert!(Instant::now() < end, "{kind}: {}, not {count}", self.count(kind));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What the disk holds.
    pub fn content(&self) -> Vec<u8> {
        self.store.read(NAME)
    }

    /// Has a successor take over from the daemon; the guest stays connected.
    pub fn upgrade(&self) {
        let program = program("blockd");
        let upgrade = ["daemon", "upgrade", "--program", program.to_str().unwrap()];
        let upgraded = self.store.json(&upgrade);
        assert_eq!(upgraded["front_ends"], 1, "{upgraded}");
        println!("blackout: {} µs", upgraded["blackout_us"]);
    }

    /// Kills the daemon with SIGKILL.
    pub fn kill(&mut self) {
        self.daemon.take().expect("it runs").kill();
    }

    /// Starts a new daemon on the store; it serves again what was served.
    pub fn revive(&mut self) {
        self.daemon = Some(self.store.daemon());
    }

    /// Kills the daemon and takes away what a power cut takes: the memory that outlives processes,
    /// and what a file system of its own has not synced.
    pub fn cut_power(&mut self) {
        if let Some(mount) = &self.mount {
            mount.cut_power();
        }
        self.kill();
        if let Some(mount) = &self.mount {
            mount.power_up();
        }
        let tail_dir = self.store.tail_dir();
        fs::remove_dir_all(&tail_dir).unwrap();
        fs::create_dir(tail_dir).unwrap();
    }

    /// Reads the disk after [`Served::cut_power`], with a new daemon.
    pub fn read_after_cut(&mut self, length: u64) -> Vec<u8> {
        self.revive();
        let path = self.path(&format!("/data?offset=0&length={length}&accept_lost_tail=true"));
        let reply = self.daemon().ask("GET", &path, b"");
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.body
    }

    /// Has the structure of the disk checked, once no guest uses it.
    pub fn check(self) {
        self.ask("POST", &self.path("/detach"), &json!({"force": true}));
        let checked = self.ask("POST", &self.path("/check"), &json!({}));
        assert_eq!(checked["clean"], true, "{checked}");
    }
}
