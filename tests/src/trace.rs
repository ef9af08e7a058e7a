//! Killing a process at one of its system calls: at any of those that somebody else could see.
//!
//! What a program has done when it is killed is what it had done at some system call, so killing it
//! at each one in turn is killing it at every step that it has. The steps are found, not written
//! down in the program: [`steps_of`] follows it once, and a step that somebody adds is tried as
//! well. A step is told by what is called and on what, and by how often that came before: other
//! threads may come in between.
//!
//! By `ptrace`. The traced process sees nothing of it. Only its own threads are traced, not the
//! programs that it starts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use libc::{c_long, c_void, pid_t};

/// A stop of the tracee on a signal that is no signal: a system call.
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
/// How long between two looks at the tracee.
const LOOK: Duration = Duration::from_micros(20);

/// The steps of a server: it has read from a socket; it is about to write to one.
pub const HEARD: &str = "heard";
/// See [`HEARD`].
pub const ANSWER: &str = "answer";

/// A step: what is done, and the how manieth of its name it is, from 1.
pub type Step = (String, usize);

/// A tracer at work.
pub struct Tracer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Traced>,
}

impl Tracer {
    /// Follows a process, and kills it when it begins with a step.
    ///
    /// # Panics
    /// When the kernel does not let us trace.
    #[must_use]
    pub fn kill_at(pid: u32, step: Option<&Step>) -> Tracer {
        Self::start(pid, Traced { at: step.cloned(), ..Traced::default() })
    }

    /// Follows a process, and has calls of it fail.
    ///
    /// # Panics
    /// When the kernel does not let us trace.
    #[must_use]
    pub fn refuse(pid: u32, refused: Refused) -> Tracer {
        Self::start(pid, Traced { refused: Some(refused), ..Traced::default() })
    }

    fn start(pid: u32, mut traced: Traced) -> Tracer {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let (ready, follows) = std::sync::mpsc::channel();
        // A tracer is a thread: only that one may ask about the tracee, and its end lets go of it.
        let thread = std::thread::spawn(move || {
            traced.pid = pid_t::try_from(pid).expect("a number of a process");
            traced.seize_all();
            ready.send(()).expect("somebody waits");
            traced.follow(&asked);
            traced
        });
        follows.recv().expect("the tracer follows");
        Tracer { stop, thread }
    }

    /// Lets go of the process. True if it was killed.
    ///
    /// # Panics
    /// When the tracer did.
    #[must_use]
    pub fn end(self) -> bool {
        self.end_told().killed
    }

    /// Lets go of the process; gives back how many calls of it were refused.
    ///
    /// # Panics
    /// When the tracer did.
    #[must_use]
    pub fn refusals(self) -> usize {
        self.end_told().refusals
    }

    fn end_told(self) -> Traced {
        // Relaxed: a flag alone.
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the tracer ends in order")
    }
}

/// The steps that a process takes while `work` goes on, but for those of a server alone: how files
/// grow, and who listens and answers at sockets.
///
/// # Panics
/// When the kernel does not let us trace.
pub fn steps_of(pid: u32, work: impl FnOnce()) -> Vec<Step> {
    let servers = [HEARD, ANSWER, "bind", "ftruncate", "fallocate"];
    let mut steps = server_steps_of(pid, work);
    steps.retain(|step| !servers.iter().any(|begin| step.0.starts_with(begin)));
    steps
}

/// All steps that a process takes while `work` goes on.
///
/// # Panics
/// When the kernel does not let us trace.
pub fn server_steps_of(pid: u32, work: impl FnOnce()) -> Vec<Step> {
    let tracer = Tracer::kill_at(pid, None);
    work();
    let mut seen = BTreeMap::new();
    let numbered = |name: String| {
        let count = seen.entry(name.clone()).or_insert(0);
        *count += 1;
        (name, *count)
    };
    tracer.end_told().steps.into_iter().map(numbered).collect()
}

#[derive(Default)]
struct Traced {
    pid: pid_t,
    /// Where it is to be killed.
    at: Option<Step>,
    killed: bool,
    steps: Vec<String>,
    /// Threads that have asked somebody something and not begun to wait for the answer.
    asking: BTreeSet<pid_t>,
    /// Threads that read from a socket.
    hearing: BTreeSet<pid_t>,
    /// What is refused, and threads in the middle of it.
    refused: Option<Refused>,
    refusing: BTreeSet<pid_t>,
    refusals: usize,
}

/// System calls that the kernel is to refuse, by number and arguments, and with what.
#[derive(Clone, Copy)]
pub struct Refused {
    /// Which.
    pub calls: fn(c_long, &[u64; 6]) -> bool,
    /// The error.
    pub errno: i32,
    /// How many of them go well before.
    pub after: usize,
}

fn ptrace(request: libc::c_uint, thread: pid_t, addr: usize, data: usize) -> c_long {
    // SAFETY: the requests used here read and write nothing of this process but what `data` points
    // to, which callers keep alive and large enough.
    unsafe { libc::ptrace(request, thread, addr as *mut c_void, data as *mut c_void) }
}

/// The system call at which a thread stands.
fn syscall_of(tid: pid_t) -> Option<libc::ptrace_syscall_info> {
    // SAFETY: all-zero is a valid value of plain numbers.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::ptrace_syscall_info>();
    let got = ptrace(libc::PTRACE_GET_SYSCALL_INFO, tid, size, &raw mut info as usize);
    (got > 0).then_some(info)
}

/// Where registers of a tracee are: the number of a call, and its result.
const NUMBER: usize = 15 * 8;
const RESULT: usize = 10 * 8;

fn set_register(tid: pid_t, register: usize, value: u64) {
    let value = usize::try_from(value).expect("registers are as wide as addresses");
    // One that was killed meanwhile has none.
    let _ = ptrace(libc::PTRACE_POKEUSER, tid, register, value);
}

impl Traced {
    /// Begins to trace each of its threads; those that they start follow by themselves.
    fn seize_all(&self) {
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE;
        let options = usize::try_from(options).expect("flags");
        let mut seized = BTreeSet::new();
        // Until a look finds no new one: a thread may be started by one that is not traced yet.
        loop {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).expect("the process");
            let tasks = tasks.flatten().filter_map(|t| t.file_name().to_str()?.parse().ok());
            let new: Vec<pid_t> = tasks.filter(|tid| !seized.contains(tid)).collect();
            if new.is_empty() {
                break;
            }
            for tid in new {
                // One that was started by one that is traced already is traced already.
                let _ = ptrace(libc::PTRACE_SEIZE, tid, 0, options);
                seized.insert(tid);
            }
        }
        // A thread is told of system calls from a stop on only.
        for tid in seized {
            let _ = ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0);
        }
    }

    fn follow(&mut self, asked: &AtomicBool) {
        while !asked.load(Ordering::Relaxed) && !self.killed {
            let mut status = 0;
            // Own tracees only: children of other threads are waited for by those.
            let flags = libc::__WALL | libc::WNOHANG | libc::__WNOTHREAD;
            // SAFETY: writes one number, which outlives the call.
            let tid = unsafe { libc::waitpid(-1, &raw mut status, flags) };
            match tid {
                0 => std::thread::sleep(LOOK),
                // Nobody is left.
                ..0 => return,
                _ if !libc::WIFSTOPPED(status) => {}
                _ => self.stopped(tid, status),
            }
        }
    }

    /// A thread stopped: the process is killed there, or the thread goes on.
    fn stopped(&mut self, tid: pid_t, status: i32) {
        let signal = libc::WSTOPSIG(status);
        let mut pass_on = 0;
        if signal == SYSCALL_STOP {
            self.refuse_if_asked(tid);
            if let Some(step) = self.step(tid) {
                self.steps.push(step.clone());
                let count = self.steps.iter().filter(|other| **other == step).count();
                if self.at.as_ref() == Some(&(step, count)) {
                    // SAFETY: sends a signal to a process that is traced, and so not another one.
                    unsafe { libc::kill(self.pid, libc::SIGKILL) };
                    self.killed = true;
                    return;
                }
            }
        } else if status >> 16 == 0 {
            // A signal that is meant for it; anything else is a stop of the tracer's own.
            pass_on = usize::try_from(signal).unwrap_or(0);
        }
        // One that was killed meanwhile cannot go on.
        let _ = ptrace(libc::PTRACE_SYSCALL, tid, 0, pass_on);
    }

    /// Has a call fail that is to be refused: another one that does not exist is done instead, and
    /// its result is the error. (On x86-64.)
    fn refuse_if_asked(&mut self, tid: pid_t) {
        let Some(refused) = &mut self.refused else { return };
        let Some(info) = syscall_of(tid) else { return };
        if info.op == libc::PTRACE_SYSCALL_INFO_ENTRY {
            // SAFETY: at an entry this member of the union is the valid one.
            let entry = unsafe { info.u.entry };
            let call = c_long::try_from(entry.nr).unwrap_or(-1);
            if (refused.calls)(call, &entry.args) {
                if refused.after > 0 {
                    refused.after -= 1;
                    return;
                }
                set_register(tid, NUMBER, u64::MAX);
                self.refusing.insert(tid);
            }
        } else if self.refusing.remove(&tid) {
            set_register(tid, RESULT, i64::from(-refused.errno).cast_unsigned());
            self.refusals += 1;
        }
    }

    /// The step that a thread is about to take, if it begins with a visible system call. To wait
    /// for an answer is one: whoever was asked is at work then. To look whether somebody asks is
    /// none.
    fn step(&mut self, tid: pid_t) -> Option<String> {
        let info = syscall_of(tid)?;
        if info.op == libc::PTRACE_SYSCALL_INFO_EXIT && self.hearing.remove(&tid) {
            // SAFETY: at an exit this member of the union is the valid one.
            return (unsafe { info.u.exit }.sval > 0).then(|| HEARD.to_owned());
        }
        if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
            return None;
        }
        // SAFETY: at an entry this member of the union is the valid one.
        let entry = unsafe { info.u.entry };
        let args = entry.args;
        let call = c_long::try_from(entry.nr).ok()?;
        let hears = matches!(call, libc::SYS_read | libc::SYS_recvfrom | libc::SYS_recvmsg);
        if hears && self.file(args[0]).starts_with("socket:") {
            self.hearing.insert(tid);
        }
        match call {
            libc::SYS_rename | libc::SYS_unlink | libc::SYS_rmdir | libc::SYS_mkdir => {
                Some(format!("{} {}", name_of(call), self.text(args[0])))
            }
            libc::SYS_unlinkat | libc::SYS_mkdirat | libc::SYS_renameat | libc::SYS_renameat2 => {
                Some(format!("{} {}", name_of(call), self.text(args[1])))
            }
            libc::SYS_fsync | libc::SYS_fdatasync | libc::SYS_ftruncate | libc::SYS_fallocate => {
                Some(format!("{} {}", name_of(call), self.file(args[0])))
            }
            libc::SYS_memfd_create => Some(format!("memfd_create {}", self.text(args[0]))),
            libc::SYS_connect => Some("connect".to_owned()),
            libc::SYS_bind => Some("bind".to_owned()),
            libc::SYS_write | libc::SYS_writev if self.file(args[0]).starts_with("socket:") => {
                Some(ANSWER.to_owned())
            }
            libc::SYS_sendmsg | libc::SYS_sendto => {
                self.asking.insert(tid);
                Some("send".to_owned())
            }
            libc::SYS_recvmsg | libc::SYS_recvfrom => {
                self.asking.remove(&tid).then(|| "wait for an answer".to_owned())
            }
            _ => None,
        }
    }

    fn file(&self, fd: u64) -> String {
        let link = fs::read_link(format!("/proc/{}/fd/{fd}", self.pid));
        short(&link.unwrap_or_else(|_| PathBuf::from("?")).display().to_string())
    }

    /// The text at an address of the process.
    fn text(&self, at: u64) -> String {
        use std::os::unix::fs::FileExt as _;
        let mut bytes = [0; 256];
        let memory = fs::File::open(format!("/proc/{}/mem", self.pid));
        let read = memory.and_then(|memory| memory.read_at(&mut bytes, at)).unwrap_or(0);
        let end = bytes[..read].iter().position(|byte| *byte == 0).unwrap_or(read);
        short(&String::from_utf8_lossy(&bytes[..end]))
    }
}

fn name_of(call: c_long) -> &'static str {
    match call {
        libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => "rename",
        libc::SYS_unlink | libc::SYS_unlinkat => "unlink",
        libc::SYS_rmdir => "rmdir",
        libc::SYS_mkdir | libc::SYS_mkdirat => "mkdir",
        libc::SYS_fsync => "fsync",
        libc::SYS_ftruncate => "ftruncate",
        libc::SYS_fallocate => "fallocate",
        _ => "fdatasync",
    }
}

/// The last two parts of a path, with numbers of things taken out of them: the same in each run.
fn short(path: &str) -> String {
    let parts: Vec<&str> = path.rsplit('/').take(2).collect();
    let mut text = String::new();
    for part in parts.iter().rev().filter(|part| !part.is_empty()) {
        let of_id = |c: char| c.is_ascii_hexdigit() || c == '-';
        let id = |word: &str| word.len() >= 8 && word.chars().all(of_id);
        let words: Vec<&str> = part.split('.').map(|w| if id(w) { "ID" } else { w }).collect();
        text += if text.is_empty() { "" } else { "/" };
        text += &words.join(".");
    }
    text
}
