//! The loop of a VM process.
//!
//! Threads: one per connection, one that waits for the end of the machine, and the machine's own.
//! Questions that change the machine are answered one at a time.
//!
//! Invariants:
//! - While nobody has said [`Ask::Begin`], the end of the first connection is the end of the
//!   process.
//! - A machine that ended is told of in its folder first; then the process ends, and everything
//!   with it. Nothing runs in here after that file is there.
//! - A cut that fails leaves the machine as it was: running if it ran.
//!
//! Lock order: the machine's change, the shell, watchers, its phase.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use blockd::api::types::Failure;
use blockd::messages;
use format::{Context as _, Error, Result};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::wire::{
    Answer, Ask, BecomeChild, Begin, BootVm, CutVm, Cutting, DisksAre, Ended, Folder, Hardware,
    PauseUs, Phase, Ready, Told, WasCut,
};
use super::{confine, hardware};
use crate::devices::DeviceSet;
use crate::http::{self, Reply};
use crate::machine::{Exit, Image, Machine, Pause, SizeClass};
use crate::memory::{GuestRam, Layer};
use crate::wires::{Devices, DiskCut, Wires};
use blockd::clock;

/// How long a watcher may take to take a word: one that does not listen is let go.
const WATCHER_MAX: Duration = Duration::from_secs(1);

/// What a VM process is started with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Options {
    /// Its folder.
    pub dir: PathBuf,
    /// What the shell is made for.
    pub class: SizeClass,
    /// Whether it confines itself.
    pub sandbox: bool,
}

/// A VM process from the inside.
struct Vm {
    folder: Folder,
    class: SizeClass,
    /// Until it has content.
    shell: Mutex<Option<Machine>>,
    /// From then on.
    machine: OnceLock<Machine>,
    /// Its devices.
    devices: OnceLock<Arc<DeviceSet>>,
    changing: Mutex<()>,
    state: Mutex<State>,
    watchers: Mutex<Vec<UnixStream>>,
}

struct State {
    phase: Phase,
    /// It stays when the daemon goes.
    stays: bool,
}

/// Holds one machine until it ends. `tether` is the connection to who started it.
///
/// # Errors
/// Why there is no machine; the one who started it is told as well.
pub fn serve(options: &Options, tether: UnixStream) -> Result<()> {
    let (vm, listener) = match prepare(options) {
        Ok((vm, listener, sandbox)) => {
            messages::send(&tether, &Answer::Done(Ready { sandbox }), &[])?;
            (vm, listener)
        }
        Err(e) => {
            messages::send(&tether, &Answer::<Ready>::Failed(Failure::from(&e)), &[])?;
            return Err(e);
        }
    };
    let on_tether = Arc::clone(&vm);
    std::thread::Builder::new().name("tether".into()).spawn(move || {
        on_tether.converse(tether);
        if !on_tether.state.lock().stays {
            std::process::exit(0);
        }
    })?;
    let at_end = Arc::clone(&vm);
    std::thread::Builder::new().name("end".into()).spawn(move || at_end.wait_for_end())?;
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                let vm = Arc::clone(&vm);
                let spawned = std::thread::Builder::new().name("control".into());
                if let Err(error) = spawned.spawn(move || vm.converse(socket)) {
                    tracing::warn!(%error, "no thread for a connection");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept");
                std::thread::sleep(WATCHER_MAX / 10);
            }
        }
    }
}

fn prepare(options: &Options) -> Result<(Arc<Vm>, UnixListener, Vec<String>)> {
    let folder = Folder(options.dir.clone());
    let confined_by = if options.sandbox { confine::enter(&options.dir)? } else { Vec::new() };
    let machine = Machine::shell(&options.class)?;
    // The folder is its owner's alone, and so is what is in it.
    let listener = UnixListener::bind(folder.control())
        .context("listen at", || folder.control().display().to_string())?;
    let state = State { phase: Phase::Shell, stays: false };
    let vm = Vm {
        folder,
        class: options.class,
        shell: Mutex::new(Some(machine)),
        machine: OnceLock::new(),
        devices: OnceLock::new(),
        changing: Mutex::default(),
        state: Mutex::new(state),
        watchers: Mutex::default(),
    };
    Ok((Arc::new(vm), listener, confined_by))
}

impl Vm {
    /// Answers questions until the other side goes.
    fn converse(self: &Arc<Self>, socket: UnixStream) {
        while let Ok((ask, files)) = messages::receive::<Ask>(&socket) {
            let told = match ask {
                Ask::Boot(asked) => reply(&socket, self.boot(&asked, files)),
                Ask::Equip(hardware) => reply(&socket, self.equip(&hardware, files)),
                Ask::Become(asked) => reply(&socket, self.become_child(&asked, files)),
                Ask::Begin(how) => reply(&socket, self.begin(how)),
                Ask::Pause => reply(&socket, self.pause()),
                Ask::Resume => reply(&socket, self.resume()),
                Ask::TakeMemoryBack => reply(&socket, self.take_memory_back()),
                Ask::LendsMemory => reply(&socket, self.filled().map(Machine::lends_memory)),
                Ask::Cut(asked) => self.cut(&socket, &asked, files.into_iter().next()),
                Ask::Status => reply(&socket, Ok(self.state.lock().phase)),
                Ask::Exits => reply(&socket, Ok(self.machine.get().map_or(0, Machine::exits))),
                Ask::Net => reply(&socket, Ok(self.devices.get().and_then(|set| set.net()))),
                Ask::PressPowerButton => reply(&socket, self.press_power_button()),
                Ask::Stop => {
                    let ended =
                        Ended { reason: "stopped".into(), detail: String::new(), at: clock::now() };
                    self.leave_word(&ended);
                    let _ = reply(&socket, Ok(()));
                    std::process::exit(0);
                }
                Ask::Watch => return self.add_watcher(socket),
            };
            if told.is_err() {
                return;
            }
        }
    }

    fn boot(self: &Arc<Self>, asked: &BootVm, mut files: Vec<OwnedFd>) -> Result<()> {
        let config = hardware::config(&asked.hardware, &self.folder.console(), &mut files)?;
        let loader = hardware::loader(&asked.program, &files, &config)?;
        let mut make = |ram: &Arc<GuestRam>, wires: &dyn Wires| {
            self.keep(hardware::devices(&config, ram, wires, Some(&asked.identity))?)
        };
        self.fill(|machine| machine.boot_with(&loader, &mut make))
    }

    fn equip(&self, wanted: &Hardware, mut files: Vec<OwnedFd>) -> Result<()> {
        let _changing = self.changing.lock();
        let config = hardware::config(wanted, &self.folder.console(), &mut files)?;
        let mut shell = self.shell.lock();
        let machine = shell.as_mut().ok_or_else(no_shell)?;
        machine.equip(&mut |ram: &Arc<GuestRam>, wires: &dyn Wires| {
            self.keep(hardware::devices(&config, ram, wires, None)?)
        })
    }

    fn become_child(self: &Arc<Self>, asked: &BecomeChild, mut files: Vec<OwnedFd>) -> Result<()> {
        let missing = || Error::invalid("files of the image are missing");
        let state = files.pop().ok_or_else(missing)?;
        if files.len() != asked.layers.len() {
            return Err(missing());
        }
        let ram_bytes = self.class.memory_bytes;
        let layers = files.into_iter().zip(&asked.layers);
        let layers = layers.map(|(file, spans)| Layer::new(file, spans.clone(), ram_bytes));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let image = Image { layers, state: read_all(state)?, pause: Pause::default() };
        let bare = || Error::invalid("it has no devices yet");
        let mut make = |_: &Arc<GuestRam>, _: &dyn Wires| Err(bare());
        self.fill(|machine| machine.become_with(&image, &asked.identity, &mut make).map(drop))?;
        asked.begin.map_or(Ok(()), |how| self.begin(how))
    }

    /// Keeps the devices of its machine, to be asked about them.
    fn keep(&self, devices: Arc<DeviceSet>) -> Result<Arc<dyn Devices>> {
        let _ = self.devices.set(Arc::clone(&devices)); // a shell is filled once
        Ok(devices)
    }

    /// Makes something of the shell. Who fails is of no use any more, and is not kept.
    fn fill(self: &Arc<Self>, work: impl FnOnce(&mut Machine) -> Result<()>) -> Result<()> {
        let _changing = self.changing.lock();
        let mut machine = self.shell.lock().take().ok_or_else(no_shell)?;
        work(&mut machine)?;
        self.machine.set(machine).map_err(|_| no_shell())?;
        self.now_is(Phase::Paused);
        Ok(())
    }

    fn wait_for_end(&self) {
        let Exit { reason, detail } = self.machine.wait().wait();
        self.leave_word(&Ended { reason: reason.name().into(), detail, at: clock::now() });
        std::process::exit(0);
    }

    /// Writes down how the machine ended. Not synced: after a power cut every machine of this host
    /// has ended, and the reason is that.
    fn leave_word(&self, ended: &Ended) {
        let write = || -> Result<()> {
            let text = serde_json::to_vec(ended).map_err(std::io::Error::from)?;
            let new = self.folder.ended().with_extension("new");
            fs::write(&new, text)?;
            Ok(fs::rename(&new, self.folder.ended())?)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, ?ended, "cannot leave word");
        }
    }

    fn filled(&self) -> Result<&Machine> {
        self.machine.get().ok_or_else(|| Error::invalid("it has no content yet"))
    }

    fn begin(&self, Begin { paused }: Begin) -> Result<()> {
        let _changing = self.changing.lock();
        let machine = self.filled()?;
        // Before it runs: what a guest has done is never dropped because a daemon ended.
        self.state.lock().stays = true;
        if !paused {
            machine.resume()?;
            self.now_is(Phase::Running);
        }
        Ok(())
    }

    fn pause(&self) -> Result<()> {
        let _changing = self.changing.lock();
        self.filled()?.pause()?;
        self.now_is(Phase::Paused);
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        let _changing = self.changing.lock();
        self.filled()?.resume()?;
        self.now_is(Phase::Running);
        Ok(())
    }

    fn take_memory_back(&self) -> Result<Vec<String>> {
        let _changing = self.changing.lock();
        self.filled()?.take_memory_back()
    }

    fn press_power_button(&self) -> Result<bool> {
        self.filled()?.press_power_button()
    }

    fn now_is(&self, phase: Phase) {
        self.state.lock().phase = phase;
        let word = Answer::Done(Told::Is(phase));
        self.watchers.lock().retain(|watcher| messages::send(watcher, &word, &[]).is_ok());
    }

    fn add_watcher(&self, socket: UnixStream) {
        // Without the bound, one that does not listen would stop the machine's control.
        let bounded = socket.set_write_timeout(Some(WATCHER_MAX));
        let mut watchers = self.watchers.lock();
        // Under the lock: a change from here on is told after this.
        let phase = self.state.lock().phase;
        let first = reply(&socket, Ok(()))
            .and_then(|()| messages::send(&socket, &Answer::Done(Told::Is(phase)), &[]));
        // A daemon that was killed has closed its own, which would stay until the next change.
        watchers.retain(is_open);
        if bounded.is_ok() && first.is_ok() {
            watchers.push(socket);
        }
    }

    /// The failure of a cut is an answer as well: it says what became of the disks.
    fn cut(&self, socket: &UnixStream, asked: &CutVm, blockd: Option<OwnedFd>) -> Result<()> {
        let mut disks = Disks {
            request: asked.request.as_deref(),
            blockd: blockd.map(UnixStream::from),
            reply: None,
            are: DisksAre::Untouched,
        };
        let cut = {
            let _changing = self.changing.lock();
            self.filled().and_then(|machine| machine.cut(&mut disks))
        };
        let made = cut.and_then(|image| disks.tell(&image));
        match made {
            Ok((was_cut, files)) => {
                let files: Vec<BorrowedFd> = files.iter().map(AsFd::as_fd).collect();
                messages::send(socket, &Answer::Done(Cutting::Cut(was_cut)), &files)
            }
            Err(e) => {
                let failed = Cutting::Failed { failure: Failure::from(&e), disks: disks.are };
                messages::send(socket, &Answer::Done(failed), &[])
            }
        }
    }
}

fn no_shell() -> Error {
    Error::invalid("it is no shell any more")
}

/// The disks of a cut.
struct Disks<'a> {
    request: Option<&'a str>,
    blockd: Option<UnixStream>,
    reply: Option<Reply>,
    are: DisksAre,
}

/// Whether somebody is at the other end.
fn is_open(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // One that cannot be looked at is kept until it cannot be told anything.
    poll(&mut fds, Some(&now)).is_err() || !fds[0].revents().contains(PollFlags::HUP)
}

impl DiskCut for Disks<'_> {
    fn begin(&mut self) -> Result<()> {
        let (Some(request), Some(blockd)) = (self.request, &self.blockd) else { return Ok(()) };
        // Before the first byte is sent: from then on only an answer tells.
        self.are = DisksAre::Unknown;
        http::send(blockd, request.as_bytes()).context("fork", with_blockd)
    }

    fn finish(&mut self) -> Result<()> {
        let (Some(_), Some(blockd)) = (self.request, &self.blockd) else { return Ok(()) };
        let reply = http::receive(blockd).context("fork", with_blockd)?;
        if let Err(e) = reply.refused() {
            self.are = DisksAre::Untouched;
            return Err(e);
        }
        self.reply = Some(reply);
        Ok(())
    }
}

fn with_blockd() -> String {
    "the disks with blockd".into()
}

impl Disks<'_> {
    /// The answer to a cut that was made.
    fn tell(&mut self, image: &Image) -> Result<(WasCut, Vec<OwnedFd>)> {
        let mut files = Vec::with_capacity(image.layers.len() + 1);
        for layer in &image.layers {
            files.push(layer.file().try_clone_to_owned()?);
        }
        files.push(in_memory(&image.state)?);
        let disks = self.reply.take();
        let was_cut = WasCut {
            layers: image.layers.iter().map(|layer| layer.spans().to_vec()).collect(),
            pause: in_us(&image.pause),
            disks: disks.map(|r| (r.status, String::from_utf8_lossy(&r.body).into_owned())),
        };
        Ok((was_cut, files))
    }
}

fn in_us(pause: &Pause) -> PauseUs {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    PauseUs {
        whole: us(pause.whole),
        park: us(pause.park),
        quiesce: us(pause.quiesce),
        save: us(pause.save),
        memory: us(pause.memory),
        disks: us(pause.disks),
    }
}

/// Bytes as a file that is nowhere but in memory.
pub(crate) fn in_memory(bytes: &[u8]) -> Result<OwnedFd> {
    let file = memfd_create(c"state", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
    let mut file = fs::File::from(file);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// All of a file, from its beginning.
pub(crate) fn read_all(file: OwnedFd) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::from(file);
    let length = usize::try_from(file.metadata()?.len()).map_err(std::io::Error::other)?;
    let mut bytes = vec![0; length];
    // The offset of a file that several processes have is shared: it is not used.
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn reply<T: Serialize>(socket: &UnixStream, outcome: Result<T>) -> Result<()> {
    messages::send(socket, &Answer::of(outcome), &[])
}
