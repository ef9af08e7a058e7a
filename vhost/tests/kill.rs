//! The daemon dies by SIGKILL under a verifying load of several queues, again and again, and a new
//! one takes over: no completed write is lost, none runs again after it was completed, and every
//! request completes exactly once.
//!
//! The daemon is this program, started once more with `DAEMON_SOCKET` set; it serves the file
//! `DAEMON_DISK`. The disk is a file in the page cache, which outlives the process as it must.

mod common;

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{DISK_SIZE, Disk, Rng, Server, capabilities, load};
use vhost_blk::client::{Client, Options};
use vhost_blk::session::Session;

const QUEUES: u16 = 2;

fn main() {
    match std::env::var_os("DAEMON_SOCKET") {
        Some(socket) => serve(Path::new(&socket)),
        None => {
            let kills = std::env::var("KILLS").ok().and_then(|k| k.parse().ok()).unwrap_or(20);
            let options = Options { queues: QUEUES, ..Options::default() };
            survives(kills, options);
            println!("test kill: split rings, {kills} kills ... ok");
            survives(kills, common::packed(options));
            println!("test kill: packed rings, {kills} kills ... ok");
            // Chains of several descriptors, in a ring whose end they wrap around.
            let direct = options.features & !vhost_blk::queue::F_INDIRECT_DESC;
            let direct = Options { features: direct, queue_size: 97, ..options };
            survives(kills, common::packed(direct));
            println!("test kill: packed rings without tables, {kills} kills ... ok");
        }
    }
}

fn serve(socket: &Path) {
    let disk = std::env::var_os("DAEMON_DISK").unwrap();
    let file = File::options().read(true).write(true).open(disk).unwrap();
    let pid = u64::from(std::process::id());
    let disk = Disk::new(file, capabilities(QUEUES), pid);
    let (events, _keep) = std::sync::mpsc::channel();
    // Under another name first: a name that can be seen can be connected to.
    let hidden = socket.with_extension("new");
    let listener = UnixListener::bind(&hidden).unwrap();
    std::fs::rename(&hidden, socket).unwrap();
    let (connection, _) = listener.accept().unwrap();
    let mut server = Server { disk, events, cache: Arc::default(), workers: Vec::new() };
    let (mut session, _) = Session::new(connection, &server).unwrap();
    session.run(&mut server).unwrap();
}

struct Running {
    child: Child,
    socket: std::path::PathBuf,
}

impl Running {
    fn new(dir: &Path, n: u32) -> Running {
        let socket = dir.join(format!("{n}.sock"));
        let child = Command::new(std::env::current_exe().unwrap())
            .env("DAEMON_SOCKET", &socket)
            .env("DAEMON_DISK", dir.join("disk"))
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < end, "the daemon starts");
            std::thread::sleep(Duration::from_millis(1));
        }
        Running { child, socket }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn survives(kills: u32, options: Options) {
    let mut rng = Rng(common::seed("kill"));
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("disk")).unwrap().set_len(DISK_SIZE).unwrap();
    let mut daemon = Running::new(dir.path(), 0);
    let (mut client, queues) = Client::connect(&daemon.socket, options).unwrap();
    let quit = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (i, mut q) in queues.into_iter().enumerate() {
            let quit = &quit;
            scope.spawn(move || {
                load(&mut q, i as u64, u64::from(QUEUES), |_| !quit.load(Ordering::Relaxed));
            });
        }
        for n in 1..=kills {
            std::thread::sleep(Duration::from_micros(rng.below(40_000)));
            // The old daemon dies here, by the drop, when the new one already listens.
            daemon = Running::new(dir.path(), n);
            client.reconnect(&daemon.socket).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        quit.store(true, Ordering::Relaxed);
    });
}
