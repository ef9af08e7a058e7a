//! The process of which shells are forked, from both ends.
//!
//! The daemon has threads and much memory, so to fork it and to start the program anew costs more
//! than all that a shell is made of. A *zygote* is started once; it has the program loaded and
//! KVM looked at, and forks a process for each shell that it is asked for.
//!
//! Invariants:
//! - A zygote has one thread. So what its forks find in memory is whole, and they may do anything.
//! - It waits for a process only after it has opened a descriptor of it: until then the number is
//!   that process's own. The daemon knows processes by these descriptors.
//! - It lives as long as the connection on which it was started, which no shell has; and makes
//!   `SHELLS_MAX` shells, because those of one zygote have the same layout of addresses.
//!
//! Test: `vm_life` (`a_zygote_that_is_killed_…`).

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blockd::messages;
use format::{Context as _, Error, Kind, Result};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use super::link::Link;
use super::serve::{self, Options};
use super::wire::Answer;
use crate::kvm::Host;

/// This very program, also after its file was replaced by another version of it.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// Shells of one zygote at most.
const SHELLS_MAX: u32 = 256;
/// What a process calls itself.
const NAME: &str = "forkd";
/// Length of the path of a machine's folder below that of all: a slash and an identity.
const FOLDER: usize = 1 + 32;

/// A shell that is wanted. Files: the connection on which it is asked, and its log.
#[derive(Debug, Serialize, Deserialize)]
pub struct Wanted(pub Options);

/// A shell that was begun. File: a descriptor of its process.
#[derive(Debug, Serialize, Deserialize)]
struct Begun {
    pid: u32,
}

/// Zygotes, one after the other.
pub struct Zygotes {
    /// The folder below which shells have theirs.
    vms: PathBuf,
    running: Mutex<Option<Running>>,
}

struct Running {
    link: Link,
    child: Child,
    made: u32,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing depends on when it goes: its shells have left it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Zygotes {
    /// None runs yet.
    #[must_use]
    pub fn new(vms: PathBuf) -> Zygotes {
        Zygotes { vms, running: Mutex::default() }
    }

    /// Begins a shell: its number, and a descriptor of its process.
    ///
    /// # Errors
    /// What the zygote or the host reports.
    pub fn begin(
        &self,
        wanted: &Wanted,
        tether: OwnedFd,
        log: &fs::File,
    ) -> Result<(u32, OwnedFd)> {
        let mut running = self.running.lock();
        let files = [tether.as_fd(), log.as_fd()];
        for is_last in [false, true] {
            let mut zygote = match running.take() {
                Some(zygote) if zygote.made < SHELLS_MAX => zygote,
                _ => start(&self.vms)?,
            };
            match zygote.link.ask::<_, Begun>(wanted, &files) {
                Ok(answer) => {
                    zygote.made += 1;
                    *running = Some(zygote);
                    let (begun, mut files) = answer?;
                    let process = files.pop();
                    let process = process.ok_or_else(|| Error::corrupt("a file is missing"))?;
                    return Ok((begun.pid, process));
                }
                // Killed by somebody; the next one is as good.
                Err(e) if !is_last => tracing::warn!(error = %e, "a zygote has ended"),
                Err(e) => return Err(e),
            }
        }
        Err(Error::new(Kind::Failed, "no zygote stays"))
    }
}

fn start(vms: &Path) -> Result<Running> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(OWN_PROGRAM);
    // Room for what its shells call themselves.
    let room = " ".repeat(vms.as_os_str().len() + FOLDER);
    command.arg0(NAME).args(["zygote", &room]);
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
    // SAFETY: between fork and exec, only a system call that may be made there is made.
    unsafe {
        // A session of its own: no terminal, and no signal that is meant for the daemon, ends it.
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from));
    }
    let child = command.spawn().map_err(Error::from)?;
    Ok(Running { link: Link::new(ours)?, child, made: 0 })
}

/// Is a zygote until the other end of standard input goes.
///
/// # Errors
/// What the host reports.
pub fn serve() -> Result<()> {
    let socket = UnixStream::from(take_standard_input()?);
    let ended = watch_for_ends()?;
    // Remembered, and so each shell has it. A host without KVM is told of by each of them.
    let _ = Host::get();
    loop {
        let mut fds = [PollFd::new(&socket, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
        poll(&mut fds, None).map_err(io::Error::from)?;
        let [asked, has_ended] = fds.map(|fd| !fd.revents().is_empty());
        if has_ended {
            wait_for_ended(&ended);
        }
        if !asked {
            continue;
        }
        let Ok((wanted, files)) = messages::receive::<Wanted>(&socket) else { return Ok(()) };
        match fork(wanted, files)? {
            Side::Zygote(begun) => answer(&socket, begun)?,
            Side::Shell(wanted, tether) => {
                drop((socket, ended));
                return be_shell(&wanted, tether);
            }
        }
    }
}

fn take_standard_input() -> Result<OwnedFd> {
    let ours =
        rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).map_err(io::Error::from)?;
    let null = fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null).map_err(io::Error::from)?;
    Ok(ours)
}

/// Who one is after a fork.
enum Side {
    Zygote(Result<(Begun, OwnedFd)>),
    Shell(Wanted, UnixStream),
}

fn fork(wanted: Wanted, files: Vec<OwnedFd>) -> Result<Side> {
    let Ok([tether, log]) = <[OwnedFd; 2]>::try_from(files) else {
        return Ok(Side::Zygote(Err(Error::invalid("a shell needs a connection and a log"))));
    };
    // SAFETY: this process has one thread, so the other one finds all memory and locks as whole as
    // they are here.
    match unsafe { libc::fork() } {
        -1 => Ok(Side::Zygote(Err(io::Error::last_os_error().into()))),
        0 => {
            rustix::process::setsid().map_err(io::Error::from)?;
            rustix::stdio::dup2_stderr(&log).map_err(io::Error::from)?;
            Ok(Side::Shell(wanted, UnixStream::from(tether)))
        }
        pid => {
            let of = Pid::from_raw(pid).ok_or_else(|| Error::corrupt("a process without number"));
            let open = |of| Ok(pidfd_open(of, PidfdFlags::empty()).map_err(io::Error::from)?);
            let begun = |process| (Begun { pid: pid.unsigned_abs() }, process);
            Ok(Side::Zygote(of.and_then(open).map(begun)))
        }
    }
}

fn answer(socket: &UnixStream, begun: Result<(Begun, OwnedFd)>) -> Result<()> {
    match begun {
        Ok((begun, process)) => messages::send(socket, &Answer::Done(begun), &[process.as_fd()]),
        Err(e) => messages::send(socket, &Answer::<Begun>::of(Err(e)), &[]),
    }
}

fn be_shell(wanted: &Wanted, tether: UnixStream) -> Result<()> {
    set_blocked(libc::SIG_UNBLOCK)?;
    call_itself(&wanted.0.dir);
    serve::serve(&wanted.0, tether)
}

/// Ends of shells as something that can be read.
fn watch_for_ends() -> Result<OwnedFd> {
    let set = set_blocked(libc::SIG_BLOCK)?;
    // SAFETY: a set that is whole, and no descriptor to replace.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("watch", || "the ends of shells".into());
    }
    // SAFETY: the call has just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Blocks the signal that tells of an ended child, or lets it through.
fn set_blocked(how: i32) -> Result<libc::sigset_t> {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: the first call makes the set whole, the others change it and this thread's mask.
    let (set, done) = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD);
        let set = set.assume_init();
        (set, libc::sigprocmask(how, &raw const set, std::ptr::null_mut()))
    };
    if done == 0 { Ok(set) } else { Err(io::Error::last_os_error().into()) }
}

fn wait_for_ended(ended: &OwnedFd) {
    let mut told = [0; size_of::<libc::signalfd_siginfo>()];
    // Several ends may be one signal; what is told of them is of no interest.
    while rustix::io::read(ended, &mut told).is_ok_and(|n| n > 0) {}
    // SAFETY: nobody else in this process waits for children, and no status is wanted.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

/// Says on the command line, as the host shows it, which machine this is: all that tells one forked
/// process from another, for people. A host that does not let it has them all called zygotes.
fn call_itself(folder: &Path) {
    // SAFETY: the name is a string that ends; a host that refuses it leaves the old one.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"forkd vm".as_ptr()) };
    let Some((start, end)) = command_line_place() else { return };
    let mut line = format!("{NAME}\0vm\0{}", folder.display()).into_bytes();
    line.resize(end - start, 0);
    // SAFETY: the kernel says that this is where the arguments of this process are, which are its
    // own memory and writable. Nothing reads them any more: they were copied at the start.
    unsafe { std::ptr::copy_nonoverlapping(line.as_ptr(), start as *mut u8, line.len()) };
}

/// Where the arguments of this process begin and end, by proc(5): fields 48 and 49.
fn command_line_place() -> Option<(usize, usize)> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name may hold anything, also spaces.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(45);
    let start: usize = fields.next()?.parse().ok()?;
    let end: usize = fields.next()?.parse().ok()?;
    (start != 0 && start < end).then_some((start, end))
}
