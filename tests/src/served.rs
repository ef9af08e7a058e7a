//! One disk that a daemon serves to a guest's driver.

use std::fs;
use std::ops::Deref;
use std::path::PathBuf;

use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{OpenOptions, StoreDir, boot_id};
use vhost_blk::client::{Client, ClientQueue, Options};
use vhost_blk::queue::F_RING_PACKED;

use crate::load::{Load, loads};
use crate::store::TestStore;

/// Size of the disk, in bytes.
const SIZE: u64 = 64 << 20;

/// Queues that it is served with.
pub const QUEUES: u16 = 2;

/// A store with one disk, `vm`.
pub struct ServedDisk(TestStore);

impl Deref for ServedDisk {
    type Target = TestStore;

    fn deref(&self) -> &TestStore {
        &self.0
    }
}

impl ServedDisk {
    /// In a new store, served by nobody yet.
    ///
    /// # Panics
    /// When it cannot be created.
    #[must_use]
    pub fn new(store: TestStore) -> Self {
        store.done(&["disk", "create", "vm", "--size", &SIZE.to_string()]);
        ServedDisk(store)
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("vm.sock")
    }

    /// Has the daemon serve it.
    ///
    /// # Panics
    /// When it does not.
    pub fn attach(&self) {
        let (socket, queues) = (self.socket(), QUEUES.to_string());
        let socket = socket.to_str().expect("a plain path");
        self.done(&["disk", "attach", "vm", "--socket", socket, "--queues", &queues]);
    }

    /// A driver that connects, and its queues.
    ///
    /// # Panics
    /// When it is not let in.
    #[must_use]
    pub fn connect(&self, packed: bool) -> (Client, Vec<ClientQueue>) {
        let plain = Options { queues: QUEUES, data_size: 2 << 20, ..Options::default() };
        let features = plain.features | if packed { F_RING_PACKED } else { 0 };
        let options = Options { features, ..plain };
        Client::connect(&self.socket(), options).expect("the daemon lets a driver in")
    }

    /// True when a daemon writes to the segments that it has open past the page cache.
    ///
    /// # Panics
    /// When it has none open for writing, or some so and some otherwise.
    #[must_use]
    pub fn writes_directly(&self, daemon: u64) -> bool {
        let open = fs::read_dir(format!("/proc/{daemon}/fd")).expect("it runs").flatten();
        let segments = open.filter(|fd| {
            let to = fs::read_link(fd.path()).unwrap_or_default();
            to.starts_with(self.store()) && to.extension().is_some_and(|e| e == "seg")
        });
        let flags = segments.map(|fd| {
            let path = format!("/proc/{daemon}/fdinfo/{}", fd.file_name().display());
            let info = fs::read_to_string(path).expect("it is open");
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            i32::from_str_radix(flags.expect("flags").trim(), 8).expect("a number")
        });
        let writable = flags.filter(|flags| flags & libc::O_ACCMODE == libc::O_RDWR);
        let direct: Vec<bool> = writable.map(|flags| flags & libc::O_DIRECT != 0).collect();
        assert!(!direct.is_empty() && direct.iter().all(|d| *d == direct[0]), "{direct:?}");
        direct[0]
    }

    /// A load for each queue, together on the whole disk.
    #[must_use]
    pub fn loads(&self, queues: Vec<ClientQueue>, seed: u64) -> Vec<Load> {
        loads(queues, SIZE, seed)
    }

    /// What the disk holds when no daemon runs, next to what the loads expect.
    ///
    /// # Panics
    /// When they differ, or the disk is not sound.
    pub fn compare(&self, loads: &[Load]) {
        self.done(&["disk", "check", "vm"]);
        let how = OpenOptions { access: Access::Read, cache: CacheMode::Auto, boot: boot_id() };
        let store = StoreDir::open(self.store(), &how).expect("nobody has the store");
        read_back(&store, "vm", loads);
    }
}

/// What a disk that nobody serves holds, next to what loads expect.
///
/// # Panics
/// When they differ, or it cannot be read.
pub fn read_back(store: &StoreDir, name: &str, loads: &[Load]) {
    let disk = store.open_disk(name, Access::Read, &store.disk_options()).expect("the disk opens");
    let mut bytes = vec![0; usize::try_from(disk.size()).expect("a small disk")];
    disk.read(0, 0, &mut bytes).expect("the disk can be read");
    loads.iter().for_each(|load| load.holds(&bytes));
}
