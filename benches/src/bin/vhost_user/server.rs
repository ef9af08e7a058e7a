//! The servers that are compared, each a process of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server of one disk behind one socket.
pub struct Server {
    /// The process.
    pub child: Child,
    /// Where it listens.
    pub socket: PathBuf,
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
fn program_on(cpu: Option<usize>, program: &str) -> Command {
    let Some(cpu) = cpu else { return Command::new(program) };
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &cpu.to_string(), program]);
    command
}

impl Server {
    fn start(mut command: Command, socket: PathBuf) -> Server {
        let _ = std::fs::remove_file(&socket);
        let log = std::fs::File::create(socket.with_extension("log")).expect("a log file");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("the server starts");
        let server = Server { child, socket };
        let end = Instant::now() + Duration::from_secs(20);
        while !server.socket.exists() {
            assert!(Instant::now() < end, "the server listens on {}", server.socket.display());
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// Ours: this program again, as a server, on one processor if one is given.
    pub fn ours(disk: Disk<'_>, dir: &Path, buffered: bool, cpu: Option<usize>) -> Server {
        let Disk { store, name: disk } = disk;
        let socket = dir.join(format!("ours-{disk}.sock"));
        let program = std::env::current_exe().expect("this program");
        let mut command = program_on(cpu, program.to_str().expect("a path in UTF-8"));
        command.args(["serve", if buffered { "buffered" } else { "direct" }]);
        command.arg(store).arg(disk).arg(&socket);
        Server::start(command, socket)
    }

    /// `qemu-storage-daemon` with a chain of block devices, given explicitly as JSON whose top node
    /// is called `n`, on one processor if one is given.
    pub fn qsd(name: &str, blockdev: &str, dir: &Path, cpu: Option<usize>) -> Server {
        let socket = dir.join(format!("qsd-{name}.sock"));
        let mut command = program_on(cpu, "qemu-storage-daemon");
        command.args(["--object", "iothread,id=io0", "--blockdev", blockdev, "--export"]);
        command.arg(format!(
            "type=vhost-user-blk,id=e0,node-name=n,addr.type=unix,addr.path={},writable=on,\
             num-queues=2,iothread=io0",
            socket.display()
        ));
        Server::start(command, socket)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The scratch folder goes with everything that it did not write.
        let _ = self.child.kill();
        let _ = self.child.wait();
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
