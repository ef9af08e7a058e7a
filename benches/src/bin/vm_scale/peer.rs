//! The same with QEMU, as fast as a user of it can have it.
//!
//! The parent's memory is a file in memory that QEMU maps shared, its disk a qcow2 file. A fork:
//! stop; new overlays for the parent, which were made before; the state of all devices to a file,
//! without the memory (`x-ignore-shared`); a copy of the memory file, because the parent goes on
//! writing to it; go on. The child maps the copy privately, has an overlay of its own over the disk
//! of that instant, which was made before as well, and reads the state.
//!
//! Guests are emulated: the KVM of some machines runs no Linux. What is measured are memory, files
//! and the start of a process, which are the same either way.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use offshoot_benches::figures::Figures;
use offshoot_tests::guest::{Image, Qmp, die_with_test};
use offshoot_tests::tool;
use offshoot_tests::watch::Watch;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::host::progress;

/// How long a guest may take to boot, or to fill its memory.
const GUEST_MAX: Duration = Duration::from_secs(120);
/// How long a migration or a child may take.
const STEP_MAX: Duration = Duration::from_secs(20);
/// MiB of memory that the guest needs for itself and does not fill.
const OWN_MIB: u64 = 132;
/// Time after which a child still has to be there.
const ALIVE: Duration = Duration::from_millis(500);

/// What was measured, in milliseconds.
pub struct Peer {
    pub pause: Figures,
    pub copy: Figures,
    pub runs: Figures,
    pub version: (u32, u32),
    pub filled_mib: u64,
}

/// Files of the parent and its children.
struct Place {
    _watches: [Watch; 2],
    /// In memory.
    memory: TempDir,
    /// On a disk.
    disk: TempDir,
    image: &'static Image,
    qemu_img: PathBuf,
    memory_mib: u64,
}

/// A QEMU. It ends when this is dropped.
struct Qemu {
    process: Child,
    qmp: Qmp,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Forks a guest of QEMU that often.
///
/// # Errors
/// What is missing here.
pub fn measure(memory_mib: u64, rounds: u64) -> Result<Peer, String> {
    let image = Image::get()?;
    let qemu_img = tool("qemu-img").ok_or("no qemu-img on this machine")?;
    let memory = tempfile::tempdir_in("/dev/shm").map_err(|e| format!("/dev/shm: {e}"))?;
    let disk = tempfile::tempdir().map_err(|e| e.to_string())?;
    let watches = [Watch::over(memory.path()), Watch::over(disk.path())];
    let place = Place { _watches: watches, memory, disk, image, qemu_img, memory_mib };
    progress("QEMU: boots and fills the parent");
    let filled_mib = memory_mib - OWN_MIB;
    let mut parent = place.parent(filled_mib)?;
    let mut peer = Peer {
        pause: Figures::default(),
        copy: Figures::default(),
        runs: Figures::default(),
        version: image.version,
        filled_mib,
    };
    for round in 0..rounds {
        progress(&format!("QEMU: fork {} of {rounds}", round + 1));
        place.fork(&mut parent, round, &mut peer)?;
    }
    Ok(peer)
}

fn ms_since(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}

impl Place {
    /// What parent and children have in common.
    fn command(&self, memory: &Path, shared: bool, disk: &Path) -> Command {
        let mut command = Command::new(&self.image.qemu);
        let mib = self.memory_mib;
        let share = if shared { "on" } else { "off" };
        let (memory, disk) = (memory.display(), disk.display());
        command.args(["-accel", "tcg", "-cpu", "qemu64", "-smp", "1", "-display", "none"]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-machine", "q35,memory-backend=memory", "-m", &format!("{mib}M")]);
        command.arg("-object").arg(format!(
            "memory-backend-file,id=memory,size={mib}M,mem-path={memory},share={share}"
        ));
        command
            .arg("-blockdev")
            .arg(format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}"));
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        die_with_test(&mut command);
        command
    }

    /// Starts a QEMU, and waits until it listens to what it is to do.
    fn start(mut command: Command, socket: &Path) -> Result<Qemu, String> {
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", socket.display());
        command.args(["-chardev", &chardev, "-mon", "chardev=qmp,mode=control"]);
        let mut process = command.spawn().map_err(|e| format!("QEMU does not start: {e}"))?;
        let stream = connect(&mut process, socket)?;
        let mut qmp = Qmp::new(stream)?;
        let without_memory = json!([{ "capability": "x-ignore-shared", "state": true }]);
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": without_memory }))?;
        Ok(Qemu { process, qmp })
    }

    fn overlay(&self, over: &Path, to: &Path) -> Result<(), String> {
        let made = Command::new(&self.qemu_img)
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([over, to])
            .arg("64M")
            .status();
        made.ok().filter(|s| s.success()).map(drop).ok_or_else(|| "no overlay".to_owned())
    }

    /// A parent that has written that much of its memory.
    fn parent(&self, filled_mib: u64) -> Result<Qemu, String> {
        let disk = self.disk.path().join("disk0");
        let made = Command::new(&self.qemu_img)
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&disk)
            .arg("64M")
            .status();
        made.ok().filter(|s| s.success()).ok_or("no disk can be made")?;
        let agent = self.disk.path().join("agent");
        let mut command = self.command(&self.memory.path().join("parent"), true, &disk);
        command.arg("-kernel").arg(&self.image.kernel);
        command.arg("-initrd").arg(&self.image.initramfs);
        command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"]);
        command.args(["-serial", "null", "-chardev"]);
        command.arg(format!("socket,id=agent,path={},server=on,wait=on", agent.display()));
        command.args(["-serial", "chardev:agent"]);
        // It waits for the agent before it makes the other socket.
        let listens = std::thread::spawn(move || line_of(&agent));
        let parent = Place::start(command, &self.disk.path().join("parent.qmp"))?;
        let mut agent = listens.join().map_err(|_| "the guest's line")??;
        let fill = format!(
            "busybox mount -t tmpfs -o size={filled_mib}m m /mnt && \
             busybox dd if=/dev/zero of=/mnt/m bs=1M count={} 2>/dev/null",
            filled_mib - 1
        );
        if read_line(&mut agent)? != "ready" {
            return Err("the guest is not ready".to_owned());
        }
        writeln!(agent, "1 {fill}").map_err(|e| e.to_string())?;
        match read_line(&mut agent)?.as_str() {
            "1 0 0" => Ok(parent),
            other => {
                let why = read_line(&mut agent)?;
                Err(format!("the guest does not fill its memory: {other}, {why}"))
            }
        }
    }

    /// One fork, and the end of its child.
    fn fork(&self, parent: &mut Qemu, round: u64, peer: &mut Peer) -> Result<(), String> {
        let disk = |name: &str| self.disk.path().join(format!("{name}{round}"));
        let (frozen, state, child_disk) = (disk("disk"), disk("state"), disk("child"));
        let next = self.disk.path().join(format!("disk{}", round + 1));
        self.overlay(&frozen, &next)?;
        self.overlay(&frozen, &child_disk)?;
        let memory = self.memory.path().join("child");

        let asked = Instant::now();
        parent.qmp.execute("stop", json!({}))?;
        let node = if round == 0 { "disk".to_owned() } else { format!("disk{round}") };
        parent.qmp.execute(
            "blockdev-snapshot-sync",
            json!({ "node-name": node, "snapshot-file": next, "mode": "existing",
                    "format": "qcow2", "snapshot-node-name": format!("disk{}", round + 1) }),
        )?;
        let uri = format!("file:{}", state.display());
        parent.qmp.execute("migrate", json!({ "uri": uri }))?;
        await_status(&mut parent.qmp, "query-migrate", "completed")?;
        let copying = Instant::now();
        copy(&self.memory.path().join("parent"), &memory)?;
        let copied = ms_since(copying);
        parent.qmp.execute("cont", json!({}))?;
        let paused = ms_since(asked);

        let mut command = self.command(&memory, false, &child_disk);
        command.args(["-serial", "null", "-serial", "null", "-incoming", "defer"]);
        let mut child = Place::start(command, &disk("qmp"))?;
        child.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        await_status(&mut child.qmp, "query-status", "paused")?;
        child.qmp.execute("cont", json!({}))?;
        await_status(&mut child.qmp, "query-status", "running")?;
        peer.runs.add(ms_since(asked));
        peer.pause.add(paused);
        peer.copy.add(copied);

        std::thread::sleep(ALIVE);
        await_status(&mut child.qmp, "query-status", "running")?;
        drop(child);
        for file in [memory, state, child_disk] {
            fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        }
        Ok(())
    }
}

/// Copies a file, and shares its blocks or leaves its holes where that can be.
fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let mut command = Command::new("cp");
    command.args(["--reflink=auto", "--sparse=auto"]).args([from, to]);
    let status = command.status();
    status.ok().filter(|s| s.success()).map(drop).ok_or_else(|| "no copy".to_owned())
}

fn connect(process: &mut Child, socket: &Path) -> Result<UnixStream, String> {
    let until = Instant::now() + GUEST_MAX;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(e) => {
                let ended = process.try_wait().map_err(|e| e.to_string())?;
                if ended.is_some() || Instant::now() > until {
                    return Err(format!("QEMU: {e}, {ended:?}"));
                }
            }
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// The line on which the guest takes commands.
fn line_of(socket: &Path) -> Result<UnixStream, String> {
    let until = Instant::now() + GUEST_MAX;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                stream.set_read_timeout(Some(GUEST_MAX)).map_err(|e| e.to_string())?;
                return Ok(stream);
            }
            Err(e) if Instant::now() > until => return Err(format!("the guest's line: {e}")),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn read_line(stream: &mut UnixStream) -> Result<String, String> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    loop {
        stream.read_exact(&mut byte).map_err(|e| format!("the guest's line: {e}"))?;
        match byte[0] {
            b'\n' => return Ok(String::from_utf8_lossy(&line).trim_end().to_owned()),
            byte => line.push(byte),
        }
    }
}

/// Asks until it is so.
fn await_status(qmp: &mut Qmp, command: &str, wanted: &str) -> Result<Value, String> {
    let until = Instant::now() + STEP_MAX;
    loop {
        let state = qmp.execute(command, json!({}))?;
        if state["status"] == wanted {
            return Ok(state);
        }
        if state["status"] == "failed" || Instant::now() > until {
            return Err(format!("{command}: {state}, not {wanted}"));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}
