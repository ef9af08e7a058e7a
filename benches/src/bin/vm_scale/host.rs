//! A lab with one parent, and what is asked of its daemons.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use offshoot_tests::daemon::ask;
use offshoot_tests::kill::memory_dir;
use offshoot_tests::store::TestStore;
use offshoot_tests::vm::{Console, Lab};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

pub const MIB: u64 = 1 << 20;
/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Where the guest's own memory ends.
pub const HEAP: u64 = 0x80_0000;
/// Space that the guest's own memory and its stack need, in MiB.
const OWN_MIB: u64 = 16;
/// Shells of a pool of usual size.
pub const POOL: u64 = 4;
/// How long to wait for what is to be ready.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// How long to wait for huge pages.
const HUGE_MAX: Duration = Duration::from_secs(20);
/// Where the stores are.
static STORES: OnceLock<PathBuf> = OnceLock::new();

/// Makes the folder of all stores, which goes with the value. They stay until the end: for a while
/// ext4 passes over each inode that was given up when it looks for one, and a row would be slower
/// for those before it.
pub fn stores() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder for stores");
    assert!(STORES.set(folder.path().to_owned()).is_ok(), "they have one folder");
    folder
}

/// What is ready for the next fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// So many shells.
    Shells(u64),
    /// As many children as the last fork had, and shells.
    Children,
}

/// A blockd, a forkd, and a parent that waits for what is typed.
///
/// The store is where temporary files are. forkd's folder is in memory, as its usual one below
/// `/run` is.
pub struct Host {
    pub lab: Lab,
    /// The parent's console.
    pub console: Console,
    /// Pages of the parent that are all written, from [`HEAP`] on.
    pub pages: u64,
    ready: Ready,
}

/// Tells whoever waits how far it is.
pub fn progress(what: &str) {
    eprintln!("vm_scale: {what}");
}

impl Host {
    /// A parent with that much memory, all of it written and in huge pages if the host has them,
    /// as in one that has run for some seconds; and a pool that is full.
    pub fn start(memory_mib: u64, ready: Ready) -> Host {
        let store = STORES.get().expect("a folder for stores").join(Uuid::new_v4().to_string());
        let store = TestStore::made(memory_dir(), store);
        let (pool, standby) = match ready {
            Ready::Shells(pool) => (pool, "off"),
            Ready::Children => (POOL, "on"),
        };
        let pool = pool.to_string();
        let lab = Lab::over(store, &["--pool-size", &pool, "--standby", standby]);
        lab.disk("root");
        let mut console = lab.run_with(&format!("{memory_mib}M"), "p", &["root"]);
        let pages = (memory_mib - OWN_MIB) * MIB / PAGE;
        console.number(&format!("f {HEAP} {pages} 1"));
        let host = Host { lab, console, pages, ready };
        host.await_pool();
        host.await_huge_pages();
        host
    }

    pub fn api(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let reply = ask(&self.lab.forkd_api(), method, path, body.as_bytes());
        let reply = reply.unwrap_or_else(|e| panic!("{method} {path}: {e}: {}", self.lab.log()));
        assert!(reply.status < 300, "{method} {path}: {}", String::from_utf8_lossy(&reply.body));
        reply.json()
    }

    /// Waits until the pool is full.
    fn await_pool(&self) {
        let pool = match self.ready {
            Ready::Shells(pool) => pool,
            Ready::Children => POOL,
        };
        self.await_health(&format!("{pool} shells"), |health| {
            let classes = health["pool"].as_array().expect("a list");
            classes.iter().any(|class| class["ready"].as_u64().is_some_and(|n| n >= pool))
        });
    }

    /// Waits until there is what is to be ready for the next fork of a parent that was forked.
    pub fn await_ready(&self) {
        self.await_pool();
        if self.ready == Ready::Children {
            self.await_health("children that stand by", |health| health["standby"] == "p");
        }
    }

    fn await_health(&self, what: &str, there: impl Fn(&Value) -> bool) {
        let until = Instant::now() + WAIT_MAX;
        loop {
            let health = self.api("GET", "/v1/health", &Value::Null);
            if there(&health) {
                return;
            }
            assert!(Instant::now() < until, "no {what}: {health}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until nearly all of the parent's memory is in huge pages.
    fn await_huge_pages(&self) {
        let rollup = format!("/proc/{}/smaps_rollup", self.lab.pid("p"));
        let until = Instant::now() + HUGE_MAX;
        while Instant::now() < until {
            let text = std::fs::read_to_string(&rollup).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("ShmemPmdMapped:"));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            if kib.unwrap_or(0) * 1024 >= self.pages * PAGE * 9 / 10 {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        progress("the parent's memory is not in huge pages");
    }

    /// Forks the parent; the answer, when everything of it is durable.
    pub fn fork(&self, children: &[String], paused: bool) -> Value {
        self.api("POST", "/v1/vms/p/fork", &json!({ "children": children, "paused": paused }))
    }

    /// The console of a machine.
    pub fn console_of(&self, name: &str) -> Console {
        let vm = self.api("GET", &format!("/v1/vms/{name}"), &Value::Null);
        Console::attach(Path::new(vm["console"].as_str().expect("a path")), name)
    }

    /// Removes a machine, whatever it does, and its disk.
    pub fn remove(&self, name: &str) {
        self.api("DELETE", &format!("/v1/vms/{name}?force=true"), &Value::Null);
    }
}

/// Milliseconds of an answer.
pub fn ms(answer: &Value, key: &str) -> f64 {
    answer[key].as_f64().expect("a number") / 1000.0
}

pub fn names(count: u64) -> Vec<String> {
    (0..count).map(|i| format!("c{i}")).collect()
}
