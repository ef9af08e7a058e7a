//! Virtual machines as an administrator has them: blockd, forkd and the command line as programs,
//! and guests that boot as kernels do (`guest/main.rs`).
//!
//! Nothing of a test is left on the host: when a [`Lab`] goes, so does every process that works in
//! its folder, also when it goes because the test was killed.

mod console;
mod held;
mod saved;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use crate::daemon::{Daemon, ask, program};
use crate::store::TestStore;
use crate::until;
use crate::watch::Watch;

pub use console::{Console, word};
pub use held::Held;
pub use saved::{memory_of, parts};

/// The guest, as a kernel that boots by PVH.
pub static GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernel.elf"));
/// How long forkd may take to be ready.
const READY_MAX: Duration = Duration::from_secs(60);

/// A store with a blockd, and a forkd whose machines have disks of it.
pub struct Lab {
    forkd: Option<Child>,
    /// None while a test has killed it.
    pub blockd: Option<Daemon>,
    options: Vec<String>,
    _watch: Watch,
    // Last: everybody else works in its folder.
    /// The store.
    pub store: TestStore,
}

/// What there is of a lab on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces {
    /// Folders of VM processes.
    pub folders: usize,
    /// VM processes.
    pub processes: usize,
    /// Sockets at which blockd serves disks to machines.
    pub exports: usize,
    /// Disks.
    pub disks: BTreeSet<String>,
}

impl Lab {
    /// A lab, or none where there is no KVM: then the test is counted as skipped. No children stand
    /// by in it: what there is of machines can be counted.
    ///
    /// # Panics
    /// When the daemons do not start.
    #[must_use]
    pub fn new(test: &str) -> Option<Lab> {
        Self::with(test, &["--pool-size", "2", "--standby", "off"])
    }

    /// As [`Lab::new`], with options of forkd.
    ///
    /// # Panics
    /// When the daemons do not start.
    #[must_use]
    pub fn with(test: &str, options: &[&str]) -> Option<Lab> {
        if !Path::new("/dev/kvm").exists() {
            crate::skip(test, "this machine has no /dev/kvm");
            return None;
        }
        Some(Self::over(TestStore::new(), options))
    }

    /// A lab over this store, whose folder is where forkd has its own.
    ///
    /// # Panics
    /// When the daemons do not start.
    #[must_use]
    pub fn over(store: TestStore, options: &[&str]) -> Lab {
        fs::write(store.path("kernel"), GUEST).expect("a kernel");
        let watch = Watch::over(store.folder());
        let blockd = Some(store.daemon());
        let options = options.iter().map(|o| (*o).to_owned()).collect();
        let mut lab = Lab { forkd: None, blockd, options, _watch: watch, store };
        lab.start_forkd();
        lab
    }

    /// The folder of forkd.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.store.path("f")
    }

    /// The socket of forkd.
    #[must_use]
    pub fn forkd_api(&self) -> PathBuf {
        self.store.path("forkd.sock")
    }

    /// What forkd and its processes logged.
    #[must_use]
    pub fn log(&self) -> String {
        let vms = fs::read_dir(self.state().join("vms")).into_iter().flatten().flatten();
        let logs = vms.map(|vm| vm.path().join("log")).chain([self.store.path("forkd.log")]);
        logs.filter_map(|log| fs::read_to_string(log).ok()).collect()
    }

    /// Starts forkd, and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    pub fn start_forkd(&mut self) {
        self.start_forkd_by(Command::new(program("forkd")));
    }

    /// As [`Lab::start_forkd`], by another program that is given all of it as arguments.
    ///
    /// # Panics
    /// When it does not get ready.
    pub fn start_forkd_by(&mut self, mut command: Command) {
        let log = fs::File::options().create(true).append(true).open(self.store.path("forkd.log"));
        command.env_remove("OFFSHOOT_FORKD").env_remove("OFFSHOOT_FORKD_STATE");
        command.arg("--state").arg(self.state()).arg("--blockd").arg(self.store.api());
        command.arg("--api").arg(self.forkd_api()).args(&self.options);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log.expect("a log"));
        let mut child = command.spawn().expect("forkd starts");
        let start = Instant::now();
        while ask(&self.forkd_api(), "GET", "/v1/health", b"").is_err() {
            let ended = child.try_wait().expect("a child");
            assert!(ended.is_none(), "forkd ended ({ended:?}): {}", self.log());
            assert!(start.elapsed() < READY_MAX, "forkd is not ready: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.forkd = Some(child);
    }

    /// Kills forkd in the middle of whatever it does.
    ///
    /// # Panics
    /// When it is not there.
    pub fn kill_forkd(&mut self) {
        let mut forkd = self.forkd.take().expect("it runs");
        forkd.kill().expect("it was there");
        forkd.wait().expect("it is waited for");
    }

    /// The number of the process of forkd.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn forkd_pid(&self) -> u32 {
        self.forkd.as_ref().expect("it runs").id()
    }

    /// Asks forkd to end, and waits.
    ///
    /// # Panics
    /// When it fails.
    pub fn stop_forkd(&mut self) {
        let mut forkd = self.forkd.take().expect("it runs");
        let pid = Pid::from_child(&forkd);
        rustix::process::kill_process(pid, Signal::TERM).expect("it is there");
        assert!(forkd.wait().expect("a child").success(), "{}", self.log());
    }

    /// Kills blockd in the middle of whatever it does.
    ///
    /// # Panics
    /// When it is not there.
    pub fn kill_blockd(&mut self) {
        self.blockd.take().expect("it runs").kill();
    }

    /// Starts blockd again.
    ///
    /// # Panics
    /// When it does not get ready.
    pub fn start_blockd(&mut self) {
        self.blockd = Some(self.store.daemon());
    }

    /// The command line, on this lab.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program("offshoot"));
        command.env_remove("OFFSHOOT_API").env_remove("OFFSHOOT_FORKD");
        command.arg("--store").arg(self.store.store()).arg("--forkd").arg(self.forkd_api());
        command.args(args);
        command
    }

    /// Runs the command line.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn offshoot(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().expect("the command line starts")
    }

    /// As [`Lab::offshoot`], for what must succeed; gives back what it prints.
    ///
    /// # Panics
    /// When it fails.
    pub fn done(&self, args: &[&str]) -> String {
        let output = self.offshoot(args);
        assert!(output.status.success(), "{args:?}: {output:?}\n{}", self.log());
        String::from_utf8(output.stdout).expect("text")
    }

    /// As [`Lab::done`], for what it says as JSON.
    ///
    /// # Panics
    /// When it fails, or says none.
    #[must_use]
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.done(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
    }

    /// As [`Lab::offshoot`], for what must fail with this kind; gives back the line that it says.
    ///
    /// # Panics
    /// When it succeeds, or fails otherwise.
    pub fn refused(&self, args: &[&str], kind: &str) -> String {
        let output = self.offshoot(&[args, &["--json"]].concat());
        assert!(!output.status.success(), "{args:?}: {output:?}");
        let told: Value = serde_json::from_slice(&output.stdout).expect("an object");
        assert_eq!(told["error"]["kind"], kind, "{args:?}: {told}\n{}", self.log());
        told["error"]["message"].as_str().expect("a line").to_owned()
    }

    /// Boots a machine with 32 MiB and these disks, and waits until it listens.
    ///
    /// # Panics
    /// When it does not.
    pub fn run(&self, name: &str, disks: &[&str]) -> Console {
        self.run_with("32M", name, disks)
    }

    /// As [`Lab::run`], with so much memory.
    ///
    /// # Panics
    /// When it does not listen.
    pub fn run_with(&self, memory: &str, name: &str, disks: &[&str]) -> Console {
        self.boot(name, disks, &["--mem", memory])
    }

    /// As [`Lab::run`], with these options.
    ///
    /// # Panics
    /// When it does not listen.
    pub fn boot(&self, name: &str, disks: &[&str], options: &[&str]) -> Console {
        let kernel = self.store.path("kernel");
        let kernel = kernel.to_str().expect("a plain path");
        let mut args = vec!["vm", "run", name, "--kernel", kernel];
        args.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
        self.done(&[&args, options].concat());
        let mut console = self.console(name);
        assert_eq!(console.hear("= "), "= ready");
        console
    }

    /// A new disk of 16 MiB.
    ///
    /// # Panics
    /// When it cannot be created.
    pub fn disk(&self, name: &str) {
        self.done(&["disk", "create", name, "--size", "16M"]);
    }

    /// What `vm show` says.
    ///
    /// # Panics
    /// When there is no such machine.
    #[must_use]
    pub fn show(&self, name: &str) -> Value {
        self.json(&["vm", "show", name])
    }

    /// The console of a machine.
    ///
    /// # Panics
    /// When it cannot be attached to.
    #[must_use]
    pub fn console(&self, name: &str) -> Console {
        let vm = self.show(name);
        Console::attach(Path::new(vm["console"].as_str().expect("a path")), name)
    }

    /// Waits until a machine has ended; gives back how.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn end_of(&self, name: &str) -> Value {
        let mut vm = Value::Null;
        until("the machine has ended", || {
            vm = self.show(name);
            vm["state"] == "ended"
        });
        vm["end"].clone()
    }

    /// The process of a machine.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn pid(&self, name: &str) -> u32 {
        let pid = self.show(name)["pid"].as_u64().expect("it has a process");
        u32::try_from(pid).expect("a number of a process")
    }

    /// What there is of machines on this host.
    ///
    /// # Panics
    /// When blockd does not say.
    #[must_use]
    pub fn traces(&self) -> Traces {
        let folders = fs::read_dir(self.state().join("vms")).map_or(0, Iterator::count);
        let blockd = self.blockd.as_ref().expect("it runs");
        let exports = blockd.json("GET", "/v1/exports", &Value::Null);
        let exports = exports.as_array().expect("a list").len();
        let disks = blockd.json("GET", "/v1/disks", &Value::Null);
        let disks = disks.as_array().expect("a list").iter();
        let disks = disks.map(|d| d["name"].as_str().expect("a name").to_owned()).collect();
        Traces { folders, processes: processes_in(&self.state()).len(), exports, disks }
    }

    /// Waits until nothing is left to be removed, and shells are as many as are wanted.
    ///
    /// # Panics
    /// When that does not come.
    pub fn settle(&self) {
        until("nothing is unfinished", || {
            let health = self.json(&["vm", "status"]);
            let full = |class: &Value| class["ready"] == health["pool_size"];
            let pool = health["pool"].as_array().expect("a list");
            health["unfinished"] == 0 && pool.iter().all(full)
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut forkd) = self.forkd.take() {
            // It may have ended already.
            let _ = forkd.kill();
            let _ = forkd.wait();
        }
        for pid in processes_in(&self.state()) {
            kill(pid, Signal::KILL);
        }
    }
}

/// Sends a signal to a process, if it is there.
pub fn kill(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let Some(pid) = pid else { return };
    if let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) {
        // One that ended meanwhile needs none.
        let _ = pidfd_send_signal(&process, signal);
    }
}

/// Stops a process, and waits until none of its threads runs: the signal alone leaves them time to
/// do what they were just asked for.
///
/// # Panics
/// When it does not stop.
pub fn stop(pid: u32) {
    let stands = |task: &Path| {
        let stat = fs::read_to_string(task.join("stat")).unwrap_or_default();
        // Behind the name, which may have anything in it.
        stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" T"))
    };
    kill(pid, Signal::STOP);
    until("the process stands", || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it is there");
        tasks.flatten().all(|task| stands(&task.path()))
    });
}

/// VM processes whose folders are below `state`; those that have ended and were not waited for are
/// not among them.
#[must_use]
pub fn processes_in(state: &Path) -> Vec<u32> {
    let vms = state.join("vms").display().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|p| p.file_name().to_str()?.parse::<u32>().ok());
    let ours = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).split('\0').any(|word| word.starts_with(&vms))
    };
    pids.filter(ours).collect()
}
