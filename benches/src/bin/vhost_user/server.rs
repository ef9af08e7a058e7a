//! The servers that are compared, each a process of its own: `blockd` as anybody runs it, sandbox
//! included, and the peer.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use offshoot_tests::daemon::{Daemon, program};
use serde_json::json;

/// A server of one disk behind one socket.
pub struct Server {
    /// The process.
    pub pid: u32,
    /// Where it listens.
    pub socket: PathBuf,
    process: Process,
}

enum Process {
    /// A daemon, and the disk that it serves; taken when it is to end.
    Ours(Option<Daemon>, String),
    Peer(Child),
}

/// A disk of a store.
#[derive(Debug, Clone, Copy)]
pub struct Disk<'a> {
    /// Folder of the store.
    pub store: &'a Path,
    /// Name of the disk.
    pub name: &'a str,
}

/// A command, kept on one processor if one is given (`taskset` becomes the program).
fn program_on(cpu: Option<usize>, program: &Path) -> Command {
    let Some(cpu) = cpu else { return Command::new(program) };
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &cpu.to_string()]).arg(program);
    command
}

impl Server {
    /// `blockd` on the store, with the disk attached, on one processor if one is given.
    pub fn ours(disk: Disk<'_>, dir: &Path, buffered: bool, cpu: Option<usize>) -> Server {
        let Disk { store, name } = disk;
        let socket = dir.join(format!("ours-{name}.sock"));
        let command = program_on(cpu, &program("blockd"));
        let cache = ["--cache", if buffered { "buffered" } else { "direct" }];
        let daemon = Daemon::start_by(command, store, &dir.join("blockd.sock"), &cache);
        let export = json!({ "kind": "vhost-user", "socket": &socket, "queues": 2 });
        daemon.json("POST", &format!("/v1/disks/{name}/attach"), &json!({ "export": export }));
        Server { pid: daemon.pid(), socket, process: Process::Ours(Some(daemon), name.to_owned()) }
    }

    /// `qemu-storage-daemon` with a chain of block devices, given explicitly as JSON whose top node
    /// is called `n`, on one processor if one is given.
    pub fn qsd(name: &str, blockdev: &str, dir: &Path, cpu: Option<usize>) -> Server {
        let socket = dir.join(format!("qsd-{name}.sock"));
        let mut command = program_on(cpu, Path::new("qemu-storage-daemon"));
        command.args(["--object", "iothread,id=io0", "--blockdev", blockdev, "--export"]);
        command.arg(format!(
            "type=vhost-user-blk,id=e0,node-name=n,addr.type=unix,addr.path={},writable=on,\
             num-queues=2,iothread=io0",
            socket.display()
        ));
        let _ = std::fs::remove_file(&socket);
        let log = std::fs::File::create(socket.with_extension("log")).expect("a log file");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("the server starts");
        let server = Server { pid: child.id(), socket, process: Process::Peer(child) };
        let end = Instant::now() + Duration::from_secs(20);
        while !server.socket.exists() {
            assert!(Instant::now() < end, "the server listens on {}", server.socket.display());
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        match &mut self.process {
            Process::Ours(daemon, disk) => {
                // Else the next daemon on the store serves it again by itself. By force: that the
                // client has gone may not be noticed yet.
                let daemon = daemon.take().expect("it runs until here");
                daemon.json("POST", &format!("/v1/disks/{disk}/detach"), &json!({ "force": true }));
                assert!(daemon.terminate().success(), "the daemon ends in order");
            }
            Process::Peer(child) => {
                // The scratch folder goes with everything that it did not write.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// A file node, direct or through the page cache.
pub fn file_node(path: &Path, buffered: bool) -> String {
    format!(
        r#"{{"driver":"file","filename":"{}","cache":{{"direct":{}}},
            "aio":"io_uring","discard":"unmap"}}"#,
        path.display(),
        !buffered
    )
}

/// A raw disk.
pub fn raw(path: &Path, buffered: bool) -> String {
    let file = file_node(path, buffered);
    format!(r#"{{"driver":"raw","node-name":"n","discard":"unmap","file":{file}}}"#)
}

/// A device of zeroes that reads and writes nothing.
pub fn null(size: u64) -> String {
    format!(r#"{{"driver":"null-co","node-name":"n","size":{size},"read-zeroes":true}}"#)
}

/// A qcow2 overlay over a raw file, both layers and their options spelled out.
pub fn overlay(top: &Path, base: &Path, buffered: bool) -> String {
    let (top, base) = (file_node(top, buffered), file_node(base, buffered));
    format!(
        r#"{{"driver":"qcow2","node-name":"n","discard":"unmap","file":{top},
            "backing":{{"driver":"raw","read-only":true,"file":{base}}}}}"#
    )
}

/// A chain of qcow2 files through the page cache, the top one first, every layer spelled out.
pub fn chain(files: &[std::path::PathBuf]) -> String {
    let (top, below) = files.split_first().expect("a chain has a top");
    let backing = below.iter().rev().fold("null".to_owned(), |backing, path| {
        let file = file_node(path, true);
        format!(r#"{{"driver":"qcow2","read-only":true,"file":{file},"backing":{backing}}}"#)
    });
    let file = file_node(top, true);
    format!(r#"{{"driver":"qcow2","node-name":"n","file":{file},"backing":{backing}}}"#)
}
