//! A store in a temporary folder, the real binary, and what the tests have to say about its
//! answers.

use std::fmt;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use offshoot_tests::daemon::Daemon;
use offshoot_tests::store::TestStore;
pub use offshoot_tests::until;
use serde_json::Value;

/// The binary under test.
pub const OFFSHOOT: &str = env!("CARGO_BIN_EXE_offshoot");

/// What a run of the binary gave.
pub struct Ran {
    pub code: i32,
    pub out: Vec<u8>,
    pub err: String,
}

impl fmt::Debug for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = &self.out[..self.out.len().min(4000)];
        let out = String::from_utf8_lossy(head);
        write!(f, "exit code {}\nstdout: {out}\nstderr: {}", self.code, self.err)
    }
}

impl Ran {
    fn new(output: Output) -> Self {
        let status = output.status;
        Ran {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            out: output.stdout,
            err: String::from_utf8(output.stderr).expect("messages are text"),
        }
    }

    /// Standard output as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.out).expect("the output is text")
    }

    /// Standard output as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.out).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"))
    }

    /// Fails the test unless the run ended well.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// Fails the test unless the run failed with `code` and one line that has all `words` in it.
    pub fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        let lines: Vec<&str> =
            self.err.lines().filter(|l| l.starts_with("offshoot: cannot ")).collect();
        assert_eq!(lines.len(), 1, "one line says what failed: {self:?}");
        for word in words {
            assert!(lines[0].contains(word), "{word:?} is not in: {}", lines[0]);
        }
        self
    }
}

/// A command of the binary with nothing inherited that could change its answers.
pub fn offshoot(args: &[&str]) -> Command {
    let mut command = Command::new(OFFSHOOT);
    command.env_remove("OFFSHOOT_STORE").args(args).stdin(Stdio::null());
    command
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ran {
    Ran::new(command.output().expect("the binary starts"))
}

/// Waits for a child to end.
pub fn wait(child: Child) -> Ran {
    Ran::new(child.wait_with_output().expect("the child is waited for"))
}

/// A store, and commands on it.
pub struct Bench(TestStore);

impl Bench {
    /// A store in a folder of the usual temporary place.
    pub fn new() -> Self {
        Bench(TestStore::new())
    }

    /// As [`Bench::new`], with the store somewhere else.
    pub fn at(store: &Path) -> Self {
        Bench(TestStore::at(store.to_owned()))
    }

    /// Starts a daemon on the store.
    pub fn daemon(&self) -> Daemon {
        self.0.daemon()
    }

    /// Where the daemon listens.
    pub fn api(&self) -> PathBuf {
        self.0.api()
    }

    /// A path beside the store.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    /// The same as text, for command lines.
    pub fn arg(&self, name: &str) -> String {
        self.path(name).to_str().expect("a plain path").to_owned()
    }

    /// The folder of the store.
    pub fn store(&self) -> &Path {
        self.0.store()
    }

    /// A command on the store.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = offshoot(&["--store"]);
        command.arg(self.store()).args(args);
        command
    }

    /// Runs a command on the store.
    pub fn run(&self, args: &[&str]) -> Ran {
        run(&mut self.command(args))
    }

    /// Runs a command that must end well.
    pub fn ok(&self, args: &[&str]) -> Ran {
        self.run(args).ok()
    }

    /// The JSON of a command that must end well.
    pub fn json(&self, args: &[&str]) -> Value {
        self.ok(&[args, &["--json"]].concat()).json()
    }

    /// Starts a command and leaves it running, with pipes at all three ends.
    pub fn start(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("the binary starts")
    }

    /// Runs a command with `input`.
    pub fn feed(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut child = self.start(args);
        let mut pipe = child.stdin.take().expect("a pipe");
        // A command that fails before it read everything closes the pipe.
        let _ = pipe.write_all(input);
        drop(pipe);
        wait(child)
    }

    /// Bytes of a disk.
    pub fn read(&self, disk: &str, offset: u64, len: u64) -> Vec<u8> {
        let (offset, len) = (offset.to_string(), len.to_string());
        self.ok(&["disk", "read", disk, "--offset", &offset, "--length", &len]).out
    }

    /// Writes to a disk.
    pub fn write(&self, disk: &str, offset: u64, bytes: &[u8]) {
        let offset = offset.to_string();
        self.feed(&["disk", "write", disk, "--offset", &offset], bytes).ok();
    }

    /// The path of a disk's own segment file.
    pub fn segment(&self, disk: &str) -> PathBuf {
        let shown = self.json(&["disk", "ls"]);
        let rows = shown.as_array().expect("a list");
        let row = rows.iter().find(|r| r["name"] == disk).expect("the disk is listed");
        self.segments().join(format!("{}.seg", row["segment"].as_str().expect("an identity")))
    }

    /// The folder that holds segment files.
    pub fn segments(&self) -> PathBuf {
        self.store().to_owned()
    }

    /// Names of the files of the store that end in `suffix`.
    pub fn files(&self, suffix: &str) -> Vec<String> {
        names(&self.segments()).into_iter().filter(|n| n.ends_with(suffix)).collect()
    }

    /// Names of all disks.
    pub fn disks(&self) -> Vec<String> {
        let list = self.json(&["disk", "ls"]);
        let name = |row: &Value| row["name"].as_str().expect("a name").to_owned();
        list.as_array().expect("a list").iter().map(name).collect()
    }

    /// A disk is whole.
    pub fn is_clean(&self, disk: &str) {
        let report = self.json(&["disk", "check", disk, "--data"]);
        assert_eq!(report["clean"], true, "{report:#}");
    }
}

/// Names in a folder.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a folder");
    entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
}

/// Bytes that depend on `seed` and repeat at no distance that a store cares about.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // The output function of SplitMix64 over a counter.
    for (i, chunk) in (0_u64..).zip(bytes.chunks_mut(8)) {
        let mut z = (seed << 32 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        chunk.copy_from_slice(&z.to_le_bytes()[..chunk.len()]);
    }
    bytes
}

/// A sparse file of `size` bytes with pieces in it.
pub fn sparse(path: &Path, size: u64, pieces: &[(u64, &[u8])]) {
    let file = fs::File::create(path).expect("a file");
    file.set_len(size).expect("a length");
    for (offset, bytes) in pieces {
        file.write_all_at(bytes, *offset).expect("room");
    }
}

/// Waits until a child has a segment file open, and so the store's lock. (To find out by asking for
/// the lock could keep the child from getting it.)
pub fn has_store(child: &Child) {
    let dir = format!("/proc/{}/fd", child.id());
    until("the child has the store", || {
        let open = fs::read_dir(&dir).expect("the child lives").flatten();
        let mut targets = open.filter_map(|fd| fs::read_link(fd.path()).ok());
        targets.any(|path| path.extension().is_some_and(|e| e == "seg"))
    });
}

/// Sends a signal to a child.
pub fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, signal).expect("the child is there");
}
