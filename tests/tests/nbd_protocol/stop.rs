//! The end of a server: what is under way is answered, and nothing is held afterwards.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use blockd::disk::Disk;
use blockd::nbd::wire::{Style, command as c};
use blockd::nbd::{
    Ancestors, Export, ExportEntry, Exports, Listener, NbdServer, NoAncestors, ServerOptions,
    VolumeExport,
};
use blockd::serve::Volume;
use format::{Kind, Result};
use offshoot_tests::nbd::{Client, Disks, PATIENCE, in_service};

use super::{Memory, serve};

/// What was read from a client before the stop is answered; then connections are closed.
#[test]
fn a_stop_answers_what_is_under_way() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    let mut client = served.transmitting("memory", Style::Simple);
    let mut idle = served.transmitting("memory", Style::Simple);
    let mut haggling = served.client();
    memory.hold(Some(0));
    client.request((c::WRITE, 0), 5, (0, 512), &[9; 512]);
    memory.wait_for_held(1);
    let released = Arc::clone(&memory);
    let releaser = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        released.hold(None);
    });

    served.server.stop(PATIENCE).unwrap();

    assert_eq!(client.simple(0), (5, 0, vec![]));
    for client in [&mut client, &mut idle, &mut haggling] {
        assert_eq!(client.until_closed(), b"");
    }
    releaser.join().unwrap();
    assert!(std::os::unix::net::UnixStream::connect(served.socket()).is_err());
    assert_eq!(served.server.status().connections, []);
}

#[test]
fn a_stop_says_when_a_request_does_not_end() {
    let memory = Memory::new();
    let served = serve(Arc::clone(&memory) as Arc<dyn Export>);
    let mut client = served.transmitting("memory", Style::Simple);
    memory.hold(Some(0));
    client.request((c::WRITE, 0), 5, (0, 512), &[9; 512]);
    memory.wait_for_held(1);

    let stopped = served.server.stop(Duration::from_millis(50));

    assert_eq!(stopped.unwrap_err().kind(), Kind::Busy);
    memory.hold(None);
    served.server.stop(PATIENCE).unwrap();
}

/// Something that takes its time to go, with what a disk is to its export.
struct Lingering(Arc<()>, Duration);

impl Drop for Lingering {
    fn drop(&mut self) {
        thread::sleep(self.1);
    }
}

impl Ancestors for Lingering {
    fn names(&self) -> Vec<String> {
        vec![format!("of {} users", Arc::strong_count(&self.0))]
    }

    fn open(&self, name: &str) -> Result<Arc<Disk>> {
        NoAncestors.open(name)
    }
}

/// Makes an export anew for each client, as the daemon does.
struct Making(Arc<Volume>, Lingering);

impl Exports for Making {
    fn open(&self, _: &str) -> Result<Arc<dyn Export>> {
        let ancestors = Box::new(Lingering(Arc::clone(&self.1.0), Duration::from_millis(300)));
        Ok(Arc::new(VolumeExport::new(Arc::clone(&self.0)).with_ancestors(ancestors)))
    }

    fn list(&self) -> Vec<ExportEntry> {
        Vec::new()
    }
}

/// Story: a client that went just before the server was stopped was off the list while its thread
/// still had the disk. The daemon stopped the server, could not close the disk, and left it as a
/// killed daemon would.
#[test]
fn a_stopped_server_has_let_go_of_its_exports() {
    let disks = Disks::new();
    let volume = in_service("vm", disks.disk(1, 8192, None));
    let users = Arc::new(());
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("nbd")).unwrap();
    let lingering = Lingering(Arc::clone(&users), Duration::from_millis(100));
    let exports = Arc::new(Making(Arc::clone(&volume), lingering));
    let listeners = vec![Listener::Unix(listener)];
    let server = NbdServer::start(listeners, exports, ServerOptions::default()).unwrap();
    let mut client = Client::connect(&dir.path().join("nbd")).greeted();
    client.go("vm");
    drop(client);

    server.stop(PATIENCE).unwrap();

    assert_eq!((Arc::strong_count(&users), Arc::strong_count(&volume)), (1, 1));
    volume.hand_on().unwrap();
}
