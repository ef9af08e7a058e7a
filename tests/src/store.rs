//! A store of a test's own, what works on it, and nothing left of it.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use blockd::storedir::{IDENTITY_FILE, Identity, StoreDir};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;
use tempfile::TempDir;

use crate::daemon::{Daemon, program};

/// What the store at a path leaves outside of it: when this is dropped, however its test ended, a
/// daemon that has the store is killed, and its folder of tails in memory goes.
pub struct Leftovers(pub PathBuf);

impl Leftovers {
    /// Kills the daemon and waits for its end. The successor of a daemon is nobody's child.
    fn end_daemon(&self) -> io::Result<()> {
        let file: Value = serde_json::from_slice(&fs::read(self.0.join("daemon.json"))?)?;
        let pid = file["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let Some(pid) = pid else { return Ok(()) };
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        // A killed daemon leaves its file, and its number may be another process's by now.
        let store = self.0.canonicalize()?;
        let open = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero()))?.flatten();
        if open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|to| to.starts_with(&store)) {
            pidfd_send_signal(&process, Signal::KILL)?;
            poll(&mut [PollFd::new(&process, PollFlags::IN)], None)?;
        }
        Ok(())
    }

    fn tail_dir(&self) -> io::Result<PathBuf> {
        let text = fs::read(self.0.join(IDENTITY_FILE))?;
        Ok(serde_json::from_slice::<Identity>(&text)?.tail_dir)
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        // Mostly there is none any more.
        let _ = self.end_daemon();
        // A store whose disks were never in service has none.
        let _ = self.tail_dir().and_then(fs::remove_dir_all);
    }
}

/// A store in a temporary folder. Both go when it is dropped, and so do its [`Leftovers`].
pub struct TestStore {
    // Before the folder, which says what there is.
    leftovers: Leftovers,
    dir: TempDir,
}

impl TestStore {
    /// A new one.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = dir.path().join("store");
        Self::made(dir, store)
    }

    /// A new one in a folder of another file system.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn at(store: PathBuf) -> Self {
        Self::made(tempfile::tempdir().expect("a temporary folder"), store)
    }

    /// A new one, with everything beside it in `dir`.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn made(dir: TempDir, store: PathBuf) -> Self {
        StoreDir::init(&store, None).expect("a new store");
        TestStore { leftovers: Leftovers(store), dir }
    }

    /// The folder of the store.
    #[must_use]
    pub fn store(&self) -> &Path {
        &self.leftovers.0
    }

    /// The folder of its tails.
    ///
    /// # Panics
    /// When the store does not say.
    #[must_use]
    pub fn tail_dir(&self) -> PathBuf {
        self.leftovers.tail_dir().expect("a store says where its tails are")
    }

    /// The folder that it is in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// A path beside it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where its daemon listens.
    #[must_use]
    pub fn api(&self) -> PathBuf {
        self.path("api.sock")
    }

    /// Starts a daemon on it.
    ///
    /// # Panics
    /// When it does not get ready.
    #[must_use]
    pub fn daemon(&self) -> Daemon {
        self.daemon_with(&[])
    }

    /// As [`TestStore::daemon`], with further options.
    ///
    /// # Panics
    /// When it does not get ready.
    #[must_use]
    pub fn daemon_with(&self, options: &[&str]) -> Daemon {
        Daemon::start_with(self.store(), &self.api(), options)
    }

    /// What its daemons logged.
    #[must_use]
    pub fn log(&self) -> String {
        let log = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
        log(self.path("api.log")) + &log(self.store().join("daemon.log"))
    }

    /// Runs the command line on it.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn offshoot(&self, args: &[&str]) -> Output {
        let mut command = Command::new(program("offshoot"));
        command.env_remove("OFFSHOOT_API").arg("--store").arg(self.store());
        command.args(args).output().expect("the command line starts")
    }

    /// As [`TestStore::offshoot`], for what must succeed; gives back its output.
    ///
    /// # Panics
    /// When it fails.
    pub fn done(&self, args: &[&str]) -> Vec<u8> {
        let output = self.offshoot(args);
        assert!(output.status.success(), "{args:?}: {output:?}\n{}", self.log());
        output.stdout
    }

    /// As [`TestStore::done`], for what says what it did as JSON.
    ///
    /// # Panics
    /// When it fails.
    #[must_use]
    pub fn json(&self, args: &[&str]) -> Value {
        let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        serde_json::from_slice(&self.done(&args)).expect("JSON")
    }

    /// Runs the command line for what must fail with this exit code; gives back what it said.
    ///
    /// # Panics
    /// When it does not.
    pub fn refused(&self, args: &[&str], code: i32) -> String {
        let output = self.offshoot(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        said
    }

    /// Writes bytes to a disk.
    ///
    /// # Panics
    /// When that fails.
    pub fn write(&self, disk: &str, offset: u64, bytes: &[u8]) {
        let mut command = Command::new(program("offshoot"));
        command.env_remove("OFFSHOOT_API").arg("--store").arg(self.store());
        command.args(["disk", "write", disk, "--offset", &offset.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().expect("the command line starts");
        child.stdin.take().expect("a pipe").write_all(bytes).expect("it takes the bytes");
        assert!(child.wait().expect("a child").success(), "{}", self.log());
    }

    /// All that a disk holds.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn read(&self, disk: &str) -> Vec<u8> {
        self.done(&["disk", "read", disk])
    }

    /// Number of segments in it.
    ///
    /// # Panics
    /// When its folder cannot be read.
    #[must_use]
    pub fn segments(&self) -> usize {
        let names = fs::read_dir(self.store()).expect("a folder");
        let is_segment = |f: &io::Result<fs::DirEntry>| {
            f.as_ref().is_ok_and(|f| f.path().extension().is_some_and(|e| e == "seg"))
        };
        names.filter(is_segment).count()
    }
}

impl Default for TestStore {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestStore {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of the daemon:\n{}", self.log());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::served::ServedDisk;

    /// The daemon is nobody's child, and its disk has a tail.
    #[test]
    fn a_test_that_fails_leaves_nothing() {
        let failed = std::panic::catch_unwind(|| {
            let disk = ServedDisk::new(TestStore::new());
            let (api, blockd) = (disk.api(), program("blockd"));
            let [api, blockd] = [&api, &blockd].map(|path| path.to_str().expect("a plain path"));
            disk.done(&["--api", api, "daemon", "start", "--program", blockd]);
            disk.attach();
            let file = fs::read(disk.store().join("daemon.json")).expect("a daemon has the store");
            let file: Value = serde_json::from_slice(&file).expect("JSON");
            let process = PathBuf::from(format!("/proc/{}/fd", file["pid"]));
            let left = [process, disk.tail_dir(), disk.path("")];
            assert!(left.iter().all(|path| path.exists()), "{left:?}");
            std::panic::panic_any(left);
        });

        let left = failed.expect_err("it fails").downcast::<[PathBuf; 3]>();
        let left = left.expect("it fails where it should");
        let is_there = |path: &&PathBuf| fs::read_dir(path).is_ok_and(|all| all.count() > 0);
        assert_eq!(left.iter().find(is_there), None);
    }
}
