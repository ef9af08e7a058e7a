//! The process that serves a disk, and its commands.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use offshoot_tests::guest::{GuestDisk, die_with_test};
use offshoot_tests::kill::memory_dir;
use serde_json::Value;
use tempfile::TempDir;

/// How a disk is served.
#[derive(Debug, Clone)]
pub struct Setup {
    pub mib: u64,
    pub queues: u16,
    pub flags: Vec<&'static str>,
}

impl Setup {
    pub fn plain(mib: u64) -> Setup {
        Setup { mib, queues: 1, flags: Vec::new() }
    }
}

/// One disk and the process that serves it now.
pub struct Backend {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    setup: Setup,
    dir: TempDir,
}

fn start(dir: &Path, setup: &Setup) -> (Child, ChildStdin, BufReader<ChildStdout>) {
    let socket = dir.join("socket");
    let _ = fs::remove_file(&socket);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost_disk"));
    command.args([&socket, &dir.join("disk")]).arg(setup.queues.to_string());
    command.args(&setup.flags).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = die_with_test(&mut command).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        assert!(Instant::now() < end, "the backend starts");
        std::thread::sleep(Duration::from_millis(1));
    }
    let (commands, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    (child, commands, BufReader::new(answers))
}

impl Backend {
    /// Serves a new, empty disk.
    pub fn new(setup: Setup) -> Backend {
        Backend::with(setup, |file| File::create(file).map(drop).unwrap())
    }

    /// Serves a disk that `make` fills.
    pub fn with(setup: Setup, make: impl FnOnce(&Path)) -> Backend {
        let dir = memory_dir();
        make(&dir.path().join("disk"));
        let file = File::options().write(true).open(dir.path().join("disk")).unwrap();
        file.set_len(setup.mib << 20).unwrap();
        let (child, commands, answers) = start(dir.path(), &setup);
        Backend { child, commands, answers, setup, dir }
    }

    /// The guest's end of it.
    pub fn disk(&self) -> GuestDisk {
        let queues = self.setup.queues;
        let packed = self.setup.flags.contains(&"packed");
        GuestDisk { queues, packed, ..GuestDisk::new(&self.dir.path().join("socket")) }
    }

    /// Gives a command to the process and returns its answer.
    pub fn command(&mut self, line: &str) -> String {
        writeln!(self.commands, "{line}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    /// How often `what` happened since the process started.
    pub fn count(&mut self, what: &str) -> u64 {
        let all: Value = serde_json::from_str(&self.command("counters")).unwrap();
        all[what].as_u64().unwrap_or(0)
    }

    /// Waits until `what` happened at least `count` times.
    pub fn wait_for(&mut self, what: &str, count: u64) {
        let end = Instant::now() + Duration::from_secs(30);
        while self.count(what) < count {
            assert!(Instant::now() < end, "{what}: {}", self.command("counters"));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills the process with SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts a new process on the same disk and socket after [`Backend::kill`].
    pub fn revive(&mut self) {
        (self.child, self.commands, self.answers) = start(self.dir.path(), &self.setup);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
