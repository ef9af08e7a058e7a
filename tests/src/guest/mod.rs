//! A real Linux guest in QEMU, its disks served over vhost-user sockets.
//!
//! [`Guest::boot`] starts the guest from [`Image`] and waits until it takes commands;
//! [`Guest::run`] runs them. The harness panics when the guest does not do what it must, with the
//! end of the guest's console in the message; dropping a guest kills it.
//!
//! Relied on: the guest's init (`tests/guest/init`) answers on the second serial line, which works
//! whatever its disks do.

mod image;
mod qmp;

pub use image::{Accel, Image, Nested};
pub use qmp::Qmp;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a guest may take to boot: many times what an emulated one needs on an idle machine.
pub const BOOT: Duration = Duration::from_secs(90);
/// How long [`Guest::run`] waits.
pub const RUN: Duration = Duration::from_secs(90);

/// One disk of a guest: a vhost-user-blk device on PCI.
#[derive(Debug, Clone)]
pub struct GuestDisk {
    /// Where its backend listens.
    pub socket: PathBuf,
    /// Number of queues.
    pub queues: u16,
    /// Descriptors of each queue, a power of two.
    pub queue_size: u16,
    /// How often to look for a backend that went away, in milliseconds; `None` to give up.
    pub reconnect_ms: Option<u32>,
    /// Whether the guest may choose packed rings.
    pub packed: bool,
    /// Whether the guest may see and switch the cache mode.
    pub config_wce: bool,
}

impl GuestDisk {
    /// A disk with one queue that waits for its backend to come back.
    #[must_use]
    pub fn new(socket: &Path) -> GuestDisk {
        GuestDisk {
            socket: socket.to_owned(),
            queues: 1,
            queue_size: 128,
            reconnect_ms: Some(100),
            packed: false,
            config_wce: true,
        }
    }
}

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// Its disks: `/dev/vda` and on.
    pub disks: Vec<GuestDisk>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Whether it needs fio. Costs a second and 200 MiB of memory.
    pub fio: bool,
    /// Whether it boots the system on its first disk; emulated, through a loop device on that disk
    /// (`tests/guest/init` says why).
    pub root_on_disk: bool,
    /// How its processors are made.
    pub accel: Accel,
    /// Whether its processors have virtualisation of their own, which is always emulated, and how.
    pub nested: Option<Nested>,
    /// An archive to be unpacked after the initramfs.
    pub second_archive: Option<PathBuf>,
}

impl Default for GuestOptions {
    fn default() -> Self {
        GuestOptions {
            disks: Vec::new(),
            memory_mib: 256,
            cpus: 2,
            fio: false,
            root_on_disk: false,
            accel: Accel::best(),
            nested: None,
            second_archive: None,
        }
    }
}

impl GuestOptions {
    /// A guest with these disks.
    #[must_use]
    pub fn with(disks: Vec<GuestDisk>) -> GuestOptions {
        GuestOptions { disks, ..GuestOptions::default() }
    }

    fn arguments(&self, image: &Image, dir: &Path) -> Vec<String> {
        let memory = self.memory_mib + if self.fio { 256 } else { 0 };
        let initramfs = match (&image.initramfs_fio, self.fio) {
            (Some(fio), true) => fio,
            _ => &image.initramfs,
        };
        let joined = dir.join("initramfs");
        let initramfs = if self.second_archive.is_some() { &joined } else { initramfs };
        let root = match (self.root_on_disk, self.accel) {
            (false, _) => "",
            (true, Accel::Kvm) => " root=/dev/vda",
            (true, Accel::Tcg) => " root=/dev/vda root_via=loop",
        };
        let dir = dir.display();
        let accel = self.nested.map_or_else(|| self.accel.arguments(), Nested::arguments);
        let mut words: Vec<String> = accel.map(str::to_owned).to_vec();
        let mut add = |name: &str, value: String| words.extend([name.to_owned(), value]);
        add("-machine", "q35,memory-backend=memory".to_owned());
        add("-m", format!("{memory}M"));
        // Shared: the backend reads and writes guest memory itself.
        add("-object", format!("memory-backend-memfd,id=memory,size={memory}M,share=on"));
        add("-smp", self.cpus.to_string());
        add("-display", "none".to_owned());
        add("-serial", format!("file:{dir}/console"));
        // QEMU waits for the harness, so that no byte goes nowhere.
        for name in ["agent", "qmp"] {
            let socket = format!("socket,id={name},path={dir}/{name},server=on,wait=on");
            add("-chardev", socket);
        }
        add("-serial", "chardev:agent".to_owned());
        add("-mon", "chardev=qmp,mode=control".to_owned());
        add("-kernel", image.kernel.display().to_string());
        add("-initrd", initramfs.display().to_string());
        // init_on_alloc: no memory that only a disk's backend has written looks changed to QEMU.
        // no_timer_check: a kernel that counts ticks as it boots gives up when it sees none, which
        // an emulator that waits for its turn on a busy host does not deliver in time.
        let kernel = "console=ttyS0 quiet panic=-1 nokaslr mitigations=off init_on_alloc=0";
        add("-append", format!("{kernel} no_timer_check{root}"));
        for (i, disk) in self.disks.iter().enumerate() {
            add("-chardev", disk.chardev(i, image.version));
            add("-device", disk.device(i));
        }
        words.extend(["-nodefaults", "-no-user-config"].map(str::to_owned));
        words
    }
}

impl GuestDisk {
    fn chardev(&self, i: usize, version: (u32, u32)) -> String {
        let socket = format!("socket,id=disk{i},path={}", self.socket.display());
        match self.reconnect_ms {
            None => socket,
            Some(ms) if version >= (9, 2) => format!("{socket},reconnect-ms={ms}"),
            Some(ms) => format!("{socket},reconnect={}", ms.div_ceil(1000)),
        }
    }

    fn device(&self, i: usize) -> String {
        let on = |flag| if flag { "on" } else { "off" };
        format!(
            "vhost-user-blk-pci,chardev=disk{i},num-queues={},queue-size={},\
             packed={},config-wce={}",
            self.queues,
            self.queue_size,
            on(self.packed),
            on(self.config_wce)
        )
    }
}

/// What a command in the guest did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// What it wrote, to both its outputs.
    pub text: String,
}

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    agent: UnixStream,
    /// What came over the agent's line and is not taken yet.
    received: Vec<u8>,
    qmp: Qmp,
    commands: u64,
    dir: TempDir,
}

impl Guest {
    /// Boots a guest and waits until it takes commands.
    ///
    /// # Panics
    /// When it does not boot.
    #[must_use]
    pub fn boot(image: &Image, options: &GuestOptions) -> Guest {
        let mut guest = Guest::start(image, options, None);
        guest.wait_ready(BOOT);
        guest
    }

    /// Starts a guest that waits to be filled by [`Guest::start_migration`].
    ///
    /// # Panics
    /// When QEMU does not start.
    #[must_use]
    pub fn incoming(image: &Image, options: &GuestOptions, from: &Path) -> Guest {
        Guest::start(image, options, Some(from))
    }

    fn start(image: &Image, options: &GuestOptions, incoming: Option<&Path>) -> Guest {
        let dir = tempfile::tempdir().expect("a folder for the guest");
        if let Some(second) = &options.second_archive {
            join(&[&image.initramfs, second], &dir.path().join("initramfs"));
        }
        let mut command = Command::new(&image.qemu);
        command.args(options.arguments(image, dir.path()));
        if let Some(from) = incoming {
            command.args(["-incoming", &format!("unix:{}", from.display())]);
        }
        let said = fs::File::create(dir.path().join("qemu")).expect("a file for QEMU's messages");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        let mut child = die_with_test(&mut command).spawn().expect("QEMU starts");
        // In the order in which QEMU makes and waits for them.
        let agent = connect(&mut child, dir.path(), "agent");
        let qmp = connect(&mut child, dir.path(), "qmp");
        let qmp = Qmp::new(qmp).unwrap_or_else(|e| panic!("{e}\n{}", tail(dir.path())));
        Guest { child, agent, received: Vec::new(), qmp, commands: 0, dir }
    }

    /// Waits until a guest that boots, for example after a reset, takes commands.
    ///
    /// # Panics
    /// When it does not do so in time.
    pub fn wait_ready(&mut self, within: Duration) {
        let end = Instant::now() + within;
        while self.line(end) != "ready" {}
    }

    /// Runs a line of shell in the guest and returns what it wrote.
    ///
    /// # Panics
    /// When it fails or takes longer than [`RUN`].
    pub fn run(&mut self, command: &str) -> String {
        let output = self.try_run(command, RUN);
        if output.code != 0 {
            self.fail(&format!("`{command}` failed with {}: {}", output.code, output.text));
        }
        output.text
    }

    /// Runs a line of shell in the guest, whatever comes of it.
    ///
    /// # Panics
    /// When it takes longer than `within`.
    pub fn try_run(&mut self, command: &str, within: Duration) -> Output {
        self.submit(command);
        self.collect(within)
    }

    /// Starts a line of shell; [`Guest::collect`] has the outcome. One at a time.
    ///
    /// # Panics
    /// When the guest's line is dead.
    pub fn submit(&mut self, command: &str) {
        assert!(!command.contains('\n'), "a command is one line");
        self.commands += 1;
        writeln!(self.agent, "{} {command}", self.commands).expect("the guest's line takes it");
    }

    /// The outcome of what was submitted.
    ///
    /// # Panics
    /// When it does not come in time.
    pub fn collect(&mut self, within: Duration) -> Output {
        let end = Instant::now() + within;
        let line = self.line(end);
        let words: Vec<&str> = line.split(' ').collect();
        let parsed = match words[..] {
            [id, code, bytes] if id == self.commands.to_string() => {
                code.parse().ok().zip(bytes.parse::<usize>().ok())
            }
            _ => None,
        };
        let Some((code, bytes)) = parsed else { self.fail(&format!("not an answer: {line}")) };
        while self.received.len() < bytes {
            self.receive(end);
        }
        let text: Vec<u8> = self.received.drain(..bytes).collect();
        Output { code, text: String::from_utf8_lossy(&text).into_owned() }
    }

    fn line(&mut self, end: Instant) -> String {
        loop {
            if let Some(at) = self.received.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.received.drain(..=at).collect();
                return String::from_utf8_lossy(&line[..at]).trim_end().to_owned();
            }
            self.receive(end);
        }
    }

    fn receive(&mut self, end: Instant) {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.fail("the guest did not answer in time");
        }
        self.agent.set_read_timeout(Some(left)).expect("a time can be set");
        let mut bytes = [0; 4096];
        match self.agent.read(&mut bytes) {
            Ok(0) => self.fail("QEMU closed the guest's line"),
            Ok(n) => self.received.extend_from_slice(&bytes[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => self.fail(&format!("the guest's line: {e}")),
        }
    }

    /// Runs a QMP command.
    ///
    /// # Panics
    /// When QEMU refuses it.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        match self.qmp.execute(command, arguments) {
            Ok(value) => value,
            Err(e) => self.fail(&e),
        }
    }

    /// Waits for a QMP event.
    ///
    /// # Panics
    /// When it does not come in time.
    pub fn qmp_event(&mut self, name: &str, within: Duration) -> Value {
        match self.qmp.event(name, within) {
            Ok(value) => value,
            Err(e) => self.fail(&e),
        }
    }

    /// Presses the reset button and waits until the guest is up again.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn reset(&mut self) {
        self.qmp("system_reset", json!({}));
        self.wait_ready(BOOT);
    }

    /// Begins to copy the running guest to `through`, where one that [`Guest::incoming`] started
    /// listens, and waits until all its memory was copied once. Until [`Guest::finish_migration`]
    /// it runs on here, and what changes is copied again and again.
    ///
    /// # Panics
    /// When that fails or takes longer than `within`.
    pub fn start_migration(&mut self, through: &Path, within: Duration) {
        // What is left is hardly ever little enough for so short a pause, even of an emulated guest
        // on a host that has much to do: copying does not end by itself.
        let slow = json!({"downtime-limit": 1, "max-bandwidth": 32 << 20});
        self.qmp("migrate-set-parameters", slow);
        self.qmp("migrate", json!({"uri": format!("unix:{}", through.display())}));
        self.wait_for_migration(within, |state| {
            state["ram"]["dirty-sync-count"].as_u64().is_some_and(|passes| passes > 2)
        });
        // This pass has no end, so QEMU does not look at the dirty log again before the last one:
        // whoever logs a page must see to it that it is found there.
        self.qmp("migrate-set-parameters", json!({"max-bandwidth": 64 << 10}));
    }

    /// Stops the guest here and lets it run on in `target`. A command in work goes on there, and
    /// is collected from `target`.
    ///
    /// # Panics
    /// When that fails or takes longer than `within`.
    pub fn finish_migration(mut self, mut target: Guest, within: Duration) -> Guest {
        let fast = json!({"downtime-limit": 10_000, "max-bandwidth": 1 << 30});
        self.qmp("migrate-set-parameters", fast);
        self.wait_for_migration(within, |state| state["status"] == "completed");
        target.qmp_event("RESUME", within);
        // What the guest said before it moved is still here.
        self.agent.set_nonblocking(true).expect("the line can be read without waiting");
        self.agent.read_to_end(&mut self.received).expect_err("QEMU keeps the line open");
        target.commands = self.commands;
        target.received = std::mem::take(&mut self.received);
        target
    }

    fn wait_for_migration(&mut self, within: Duration, there: impl Fn(&Value) -> bool) {
        let end = Instant::now() + within;
        loop {
            let state = self.qmp("query-migrate", json!({}));
            let failed = state["status"] == "failed" || state["status"] == "completed";
            match there(&state) {
                true => return,
                false if failed || Instant::now() > end => {
                    self.fail(&format!("the migration: {state}"))
                }
                false => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// The end of what the guest and QEMU said.
    #[must_use]
    pub fn console(&self) -> String {
        tail(self.dir.path())
    }

    /// Whether QEMU still runs.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the state of QEMU").is_none()
    }

    /// Kills QEMU as a crash of the host's process would.
    ///
    /// # Panics
    /// When it cannot be killed.
    pub fn kill(&mut self) {
        self.child.kill().expect("QEMU is killed");
        self.child.wait().expect("QEMU is gone");
    }

    fn fail(&mut self, what: &str) -> ! {
        panic!("{what}\n{}", self.console());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes sure that a process ends when the test that started it is killed.
pub fn die_with_test(command: &mut Command) -> &mut Command {
    // SAFETY: the call only asks the kernel for a signal, and is allowed between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    command
}

fn connect(child: &mut Child, dir: &Path, name: &str) -> UnixStream {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match UnixStream::connect(dir.join(name)) {
            Ok(stream) => return stream,
            Err(e) => {
                let ended = child.try_wait().expect("the state of QEMU");
                let late = Instant::now() > end;
                assert!(ended.is_none() && !late, "{name}: {e}, QEMU {ended:?}\n{}", tail(dir));
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Writes `files`, one after the other, to `to`.
fn join(files: &[&Path], to: &Path) {
    let mut to = fs::File::create(to).expect("a file in a folder of our own");
    for file in files {
        let mut file = fs::File::open(file).expect("a file that was just made");
        std::io::copy(&mut file, &mut to).expect("room for a copy");
    }
}

fn tail(dir: &Path) -> String {
    let last = |name: &str, count: usize| {
        let text = fs::read(dir.join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    };
    format!("QEMU:\n{}\nconsole:\n{}", last("qemu", 20), last("console", 40))
}
