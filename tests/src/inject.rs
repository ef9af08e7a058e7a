//! Having another process make a system call, by `ptrace`: what it may do is asked of the kernel,
//! with nothing built into the process for it.

use std::ffi::c_void;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use libc::{c_long, pid_t, user_regs_struct};

/// The instruction of a system call on x86-64.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// A process whose first thread stands still, in a system call that waits, until this is dropped.
/// Only the thread that made this may use it.
pub struct Injected {
    pid: pid_t,
    memory: File,
    saved: user_regs_struct,
}

fn trace(request: libc::c_uint, pid: pid_t, data: *mut c_void) {
    // SAFETY: `data` is null, or points to registers, as the requests below want it.
    let done = unsafe { libc::ptrace(request, pid, std::ptr::null_mut::<c_void>(), data) };
    assert_eq!(done, 0, "ptrace {request}: {}", std::io::Error::last_os_error());
}

/// Waits until the thread has stopped.
fn stopped(pid: pid_t) {
    let mut status = 0;
    // SAFETY: the call writes a number, which outlives it.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
    assert!(waited == pid && libc::WIFSTOPPED(status), "{status:#x}");
}

fn registers(pid: pid_t) -> user_regs_struct {
    // SAFETY: the registers are plain numbers.
    let mut regs: user_regs_struct = unsafe { std::mem::zeroed() };
    trace(libc::PTRACE_GETREGS, pid, (&raw mut regs).cast());
    regs
}

impl Injected {
    /// Stops the first thread of a process that waits for something, as daemons do.
    ///
    /// # Panics
    /// When the kernel does not let us trace it, or it does not wait.
    #[must_use]
    pub fn into(process: u32) -> Injected {
        let pid = pid_t::try_from(process).expect("a number of a process");
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"));
        let memory = memory.expect("its memory");
        trace(libc::PTRACE_SEIZE, pid, std::ptr::null_mut());
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            trace(libc::PTRACE_INTERRUPT, pid, std::ptr::null_mut());
            stopped(pid);
            let saved = registers(pid);
            let mut code = [0; 2];
            memory.read_exact_at(&mut code, saved.rip - 2).expect("its code");
            if code == SYSCALL {
                return Injected { pid, memory, saved };
            }
            // One that has just begun to answer may still have something to do.
            assert!(Instant::now() < until, "it does not wait in a system call");
            trace(libc::PTRACE_CONT, pid, std::ptr::null_mut());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Puts text where a call can name it; the next text takes its place.
    ///
    /// # Panics
    /// When its memory cannot be written.
    pub fn text(&self, text: &str) -> u64 {
        // On its stack, far below what it uses.
        let at = self.saved.rsp - 16384;
        self.memory.write_all_at(&[text.as_bytes(), &[0]].concat(), at).expect("its stack");
        at
    }

    /// Makes a call; gives back what the kernel answers, an error as its negative number.
    ///
    /// # Panics
    /// When the process does not do it.
    pub fn call(&self, number: c_long, args: [u64; 4]) -> i64 {
        let [rdi, rsi, rdx, r10] = args;
        let number = number.cast_unsigned();
        let rip = self.saved.rip - 2;
        // No call to begin again, of the one that was interrupted.
        let orig_rax = u64::MAX;
        let mut regs =
            user_regs_struct { rax: number, orig_rax, rip, rdi, rsi, rdx, r10, ..self.saved };
        trace(libc::PTRACE_SETREGS, self.pid, (&raw mut regs).cast());
        trace(libc::PTRACE_SINGLESTEP, self.pid, std::ptr::null_mut());
        stopped(self.pid);
        registers(self.pid).rax.cast_signed()
    }
}

impl Drop for Injected {
    fn drop(&mut self) {
        trace(libc::PTRACE_SETREGS, self.pid, (&raw mut self.saved).cast());
        trace(libc::PTRACE_DETACH, self.pid, std::ptr::null_mut());
    }
}
