//! Processors: a thread for each, its run loop, and how it is stopped between two instructions.
//!
//! Invariants:
//! - A processor is *parked* when its thread holds no lock, is outside KVM_RUN, and has finished
//!   the port or memory access it was in the middle of. Only then may its state be read or set.
//! - To stop one: say so in `want`, set its `immediate_exit`, then signal its thread. The thread
//!   clears `immediate_exit` before it looks at `want`, so a stop that comes between the look and
//!   KVM_RUN makes KVM_RUN return at once. Nothing depends on the signal arriving in time.
//! - Whatever the guest does ends in an end with a name, never in a panic.
//!
//! Lock order: `fd`, then `gate`. Devices are called with `fd` held.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use kvm_bindings::{kvm_regs, kvm_run, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::machine::ending::{Ending, Reason};
use crate::memory::Gpa;
use crate::wires::Devices;

/// How long a processor may take to park. Only a host that is far out of its depth needs longer.
const PARK_MAX: Duration = Duration::from_secs(10);
/// How long to wait before the signal is sent once more.
const KICK_AGAIN: Duration = Duration::from_millis(5);

const PARK: u8 = 0;
const RUN: u8 = 1;
const QUIT: u8 = 2;

/// What the thread is to do and whether it does.
#[derive(Debug, Default)]
struct Gate {
    parked: bool,
    gone: bool,
    let_go_at: Option<Instant>,
}

/// One processor.
pub struct Cpu {
    index: u8,
    fd: Mutex<VcpuFd>,
    /// The shared page of `fd`, for `immediate_exit`. Never changes, and is atomic only because
    /// threads share it.
    page: AtomicPtr<kvm_run>,
    want: AtomicU8,
    /// The kernel's number of the thread; 0 before it began.
    tid: AtomicI32,
    /// Times that KVM_RUN came back. Written by the thread alone.
    exits: AtomicU64,
    gate: Mutex<Gate>,
    changed: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
    devices: Mutex<Option<Arc<dyn Devices>>>,
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cpu {}", self.index)
    }
}

fn page_of(fd: &mut VcpuFd) -> *mut kvm_run {
    std::ptr::from_mut(fd.get_kvm_run())
}

impl Cpu {
    /// Starts the thread of processor `index`, parked.
    ///
    /// # Errors
    /// The host's error when there is no thread to be had.
    pub(crate) fn start(index: u8, mut fd: VcpuFd, ending: &Arc<Ending>) -> Result<Arc<Cpu>> {
        install_signal_handler()?;
        let page = AtomicPtr::new(page_of(&mut fd));
        let cpu = Arc::new(Cpu {
            index,
            fd: Mutex::new(fd),
            page,
            want: AtomicU8::new(PARK),
            tid: AtomicI32::new(0),
            exits: AtomicU64::new(0),
            gate: Mutex::default(),
            changed: Condvar::new(),
            thread: Mutex::default(),
            devices: Mutex::default(),
        });
        let (own, ending) = (Arc::clone(&cpu), Arc::clone(ending));
        let thread = std::thread::Builder::new().name(format!("vcpu{index}"));
        let thread = thread
            .spawn(move || own.live(&ending))
            .map_err(|e| Error::from(e).tried("start").on(format!("processor {index}")))?;
        *cpu.thread.lock() = Some(thread);
        cpu.wait_parked()?;
        Ok(cpu)
    }

    /// The number of the processor.
    pub(crate) fn index(&self) -> u8 {
        self.index
    }

    /// Says where its accesses go. Before the first run.
    pub(crate) fn attach(&self, devices: &Arc<dyn Devices>) {
        *self.devices.lock() = Some(Arc::clone(devices));
    }

    /// Its descriptor. Waits until it is parked.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock()
    }

    /// Lets it run.
    pub(crate) fn run(&self) {
        let mut gate = self.gate.lock();
        // Before the thread is woken: it may take the caller's place on a processor of the host.
        gate.let_go_at = Some(Instant::now());
        // A thread that was told to quit stays told. Release pairs with the load in `wanted`.
        let _ = self.want.compare_exchange(PARK, RUN, Ordering::Release, Ordering::Relaxed);
        drop(gate);
        self.changed.notify_all();
    }

    /// When it was let go last, if it ever was.
    pub(crate) fn let_go_at(&self) -> Option<Instant> {
        self.gate.lock().let_go_at
    }

    /// Asks it to park; does not wait.
    pub(crate) fn ask_to_park(&self) {
        let _ = self.want.compare_exchange(RUN, PARK, Ordering::AcqRel, Ordering::Relaxed);
        self.kick();
    }

    /// Waits until it is parked.
    ///
    /// # Errors
    /// `Busy` when it is not after a long time.
    pub(crate) fn wait_parked(&self) -> Result<()> {
        let until = Instant::now() + PARK_MAX;
        let mut gate = self.gate.lock();
        while !gate.parked && !gate.gone {
            if Instant::now() > until {
                return Err(Error::new(Kind::Busy, "it does not stop")
                    .tried("stop")
                    .on(format!("processor {}", self.index)));
            }
            if self.changed.wait_for(&mut gate, KICK_AGAIN).timed_out() {
                self.kick();
            }
        }
        Ok(())
    }

    fn kick(&self) {
        let page = self.page.load(Ordering::Relaxed); // never changes
        // SAFETY: the page is mapped while `fd` lives, which `self` owns; the field is a byte that
        // both sides access only atomically.
        let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut (*page).immediate_exit) };
        // Release pairs with the swap in `wanted`: who clears this sees what `want` said before.
        immediate_exit.store(1, Ordering::Release);
        if let Some(thread) = &*self.thread.lock() {
            // SAFETY: the handle is not joined yet, so the thread's id is valid.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
        }
    }

    /// What is wanted of the thread now. Clears the request to leave KVM_RUN first.
    fn wanted(&self) -> u8 {
        let page = self.page.load(Ordering::Relaxed); // never changes
        // SAFETY: as in `kick`.
        let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut (*page).immediate_exit) };
        // Acquire pairs with the store in `kick`.
        immediate_exit.swap(0, Ordering::AcqRel);
        self.want.load(Ordering::Acquire)
    }

    /// Times that KVM came back to its thread so far.
    pub(crate) fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed) // a number for people
    }

    /// The kernel's number of its thread.
    pub(crate) fn tid(&self) -> libc::pid_t {
        self.tid.load(Ordering::Relaxed) // set before `start` returned
    }

    /// The thread.
    fn live(&self, ending: &Ending) {
        // SAFETY: asks for a number; touches no memory. The gate's lock publishes it.
        self.tid.store(unsafe { libc::gettid() }, Ordering::Relaxed);
        loop {
            {
                let mut gate = self.gate.lock();
                gate.parked = true;
                self.changed.notify_all();
                // Acquire pairs with the Release in `run`.
                while self.want.load(Ordering::Acquire) == PARK {
                    self.changed.wait(&mut gate);
                }
                if self.want.load(Ordering::Acquire) == QUIT {
                    gate.gone = true;
                    self.changed.notify_all();
                    return;
                }
                gate.parked = false;
            }
            let devices = self.devices.lock().clone();
            let Some(devices) = devices else {
                ending.end(Reason::Failed, "a processor ran before it had devices");
                continue;
            };
            self.run_until_asked(&*devices, ending);
        }
    }

    fn run_until_asked(&self, devices: &dyn Devices, ending: &Ending) {
        let mut fd = self.fd.lock();
        let mut half_done = false;
        while self.wanted() == RUN {
            // Relaxed, and no atomic addition: nobody else writes it, and it orders nothing.
            self.exits.store(self.exits.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            match step(&mut fd, devices, self.index) {
                Ok(Step::Access) => half_done = true,
                Ok(Step::Interrupted) => half_done = false,
                Err((reason, detail)) => {
                    ending.end(reason, detail);
                    // Nobody resumes a machine that ended: see `Machine::resume`.
                    let _ =
                        self.want.compare_exchange(RUN, PARK, Ordering::AcqRel, Ordering::Relaxed);
                    return;
                }
            }
        }
        // The answer to an access reaches the guest's register in the next KVM_RUN only. Without
        // this run, a saved state would do the access twice: once here and once in each child. An
        // access that the processor does in parts may need several.
        while half_done {
            fd.set_kvm_immediate_exit(1);
            match step(&mut fd, devices, self.index) {
                Ok(Step::Access) => {}
                Ok(Step::Interrupted) => half_done = false,
                Err((reason, detail)) => {
                    ending.end(reason, detail);
                    half_done = false;
                }
            }
        }
    }

    /// Ends the thread.
    pub(crate) fn quit(&self) {
        self.want.store(QUIT, Ordering::Release); // pairs with the loads in `live` and `wanted`
        {
            let _gate = self.gate.lock();
            self.changed.notify_all();
        }
        self.kick();
        self.wait_gone();
        if let Some(thread) = self.thread.lock().take() {
            // A panic of the thread was reported by the thread.
            let _ = thread.join();
        }
    }

    fn wait_gone(&self) {
        let mut gate = self.gate.lock();
        while !gate.gone {
            if self.changed.wait_for(&mut gate, KICK_AGAIN).timed_out() {
                self.kick();
            }
        }
    }
}

enum Step {
    /// A port or memory access was passed on; it is finished by the next KVM_RUN.
    Access,
    /// KVM_RUN came back without anything to do.
    Interrupted,
}

/// Runs the guest until KVM wants something, and does it.
fn step(fd: &mut VcpuFd, devices: &dyn Devices, index: u8) -> Result<Step, (Reason, String)> {
    let page = page_of(fd);
    let bus = devices.bus();
    match fd.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            for part in data.chunks_mut(port_width(page)) {
                bus.pio_read(port, part);
            }
            return Ok(Step::Access);
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            for part in data.chunks(port_width(page)) {
                bus.pio_write(port, part);
            }
            return Ok(Step::Access);
        }
        Ok(VcpuExit::MmioRead(at, data)) => {
            bus.mmio_read(Gpa(at), data);
            return Ok(Step::Access);
        }
        Ok(VcpuExit::MmioWrite(at, data)) => {
            bus.mmio_write(Gpa(at), data);
            return Ok(Step::Access);
        }
        Ok(VcpuExit::Intr) => return Ok(Step::Interrupted),
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
            return Ok(Step::Interrupted);
        }
        _ => {}
    }
    Err(end_of(fd, page, index))
}

/// The bytes of one port access; a string instruction does several in one exit.
fn port_width(page: *const kvm_run) -> usize {
    // SAFETY: called after an exit for port access, when this member of the union is the valid
    // one; the page is mapped while the descriptor lives.
    let size = unsafe { (*page).__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

/// Why the guest cannot go on.
fn end_of(fd: &mut VcpuFd, page: *const kvm_run, index: u8) -> (Reason, String) {
    // SAFETY: the page is mapped while the descriptor lives.
    let exit = unsafe { (*page).exit_reason };
    let (reason, what) = match exit {
        kvm_bindings::KVM_EXIT_SHUTDOWN => (Reason::TripleFault, "triple fault".to_owned()),
        kvm_bindings::KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: for this exit reason this member of the union is the valid one.
            let error = unsafe { (*page).__bindgen_anon_1.internal };
            let data = &error.data[..(error.ndata as usize).min(error.data.len())];
            let what = format!("KVM cannot go on: internal error {} {data:x?}", error.suberror);
            (Reason::InternalError, what)
        }
        kvm_bindings::KVM_EXIT_FAIL_ENTRY => {
            (Reason::InternalError, "the processor refused the guest's state".to_owned())
        }
        kvm_bindings::KVM_EXIT_SYSTEM_EVENT => (Reason::PowerOff, "system event".to_owned()),
        other => (Reason::InternalError, format!("KVM_RUN ended with reason {other}")),
    };
    (reason, format!("{what}; {}", picture(fd, index)))
}

/// The registers, for people.
fn picture(fd: &VcpuFd, index: u8) -> String {
    match (fd.get_regs(), fd.get_sregs()) {
        (Ok(r), Ok(s)) => format!("processor {index}: {}", registers(&r, &s)),
        _ => format!("processor {index}, registers unknown"),
    }
}

fn registers(r: &kvm_regs, s: &kvm_sregs) -> String {
    // AMD's processors leave no state behind at a shutdown, and KVM then resets the processor.
    // What it says afterwards would send people to look for a guest that ran in real mode.
    if (r.rip, s.cs.selector) == (0xfff0, 0xf000) {
        return "KVM has reset it, its registers are lost".to_owned();
    }
    format!(
        "rip {:#x} rsp {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} \
         rdi {:#x} rbp {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} cs {:#x} idt {:#x}",
        r.rip,
        r.rsp,
        r.rflags,
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        r.rbp,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer,
        s.cs.selector,
        s.idt.base
    )
}

/// The signal that makes KVM_RUN come back.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

fn install_signal_handler() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static ONCE: Once = Once::new();
    let mut failure = None;
    ONCE.call_once(|| {
        // SAFETY: all-zero is a valid `sigaction` (default action, empty mask).
        let mut action = unsafe { std::mem::zeroed::<libc::sigaction>() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the handler does nothing, so it may interrupt anything. Without SA_RESTART the
        // call that it interrupts comes back.
        if unsafe { libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) } != 0 {
            failure = Some(std::io::Error::last_os_error());
        }
    });
    failure.map_or(Ok(()), |e| Err(Error::from(e).tried("set up the signal of processors")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_that_are_lost_are_not_shown_as_the_guests() {
        let mut regs = kvm_regs { rip: 0xffff_ffff_8100_0000, rsp: 0x1000, ..Default::default() };
        let mut sregs = kvm_sregs { cr2: 0xff8, ..Default::default() };
        let shown = registers(&regs, &sregs);
        assert!(shown.starts_with("rip 0xffffffff81000000 rsp 0x1000"), "{shown}");
        assert!(shown.contains("cr2 0xff8"), "{shown}");
        regs.rip = 0xfff0;
        sregs.cs.selector = 0xf000;
        assert_eq!(registers(&regs, &sregs), "KVM has reset it, its registers are lost");
    }
}
