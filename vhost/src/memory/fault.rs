//! Survives a peer that truncates shared memory under us.
//!
//! A mapped file that shrinks turns every access past its new end into SIGBUS, which by default
//! kills the whole daemon and so every other guest. Each mapping of a peer's file is therefore
//! entered in a table; on SIGBUS inside such a mapping the handler puts anonymous zero pages over
//! the whole mapping, marks it lost and lets the access go on. The owner finds the mark
//! (`Entry::is_lost`) and ends that session. Every other SIGBUS goes to whoever handled it
//! before.
//!
//! Invariant: the handler touches only atomics and calls only `mmap`, so it may interrupt anything.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use format::{Error, Kind, Result};

/// Most mappings of peers' files that one process can hold at a time.
pub const MAPPINGS_MAX: usize = 4096;

struct Slot {
    taken: AtomicBool,
    /// Start address; 0 while the rest of the slot must not be trusted.
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

static SLOTS: [Slot; MAPPINGS_MAX] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; MAPPINGS_MAX];

/// Number of mappings lost so far, process-wide: a cheap "nothing happened" test for hot loops.
static LOSSES: AtomicU64 = AtomicU64::new(0);

/// What handled SIGBUS before us. Written once, before our handler can run.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// How many mappings this process has lost. Compare with an earlier value; if it changed, ask
/// each mapping.
#[must_use]
pub fn losses() -> u64 {
    // Pairs with the Release increment in `on_sigbus`.
    LOSSES.load(Ordering::Acquire)
}

/// One guarded mapping. Dropping it ends the guard; do that before unmapping.
#[derive(Debug)]
pub(super) struct Entry(usize);

impl Entry {
    /// Guards `len` bytes at `start`.
    pub(super) fn new(start: usize, len: usize) -> Result<Entry> {
        install()?;
        for (i, slot) in SLOTS.iter().enumerate() {
            // Acquire pairs with the Release in `drop`: the previous user's stores are over.
            if slot.taken.swap(true, Ordering::Acquire) {
                continue;
            }
            slot.lost.store(false, Ordering::Relaxed);
            slot.len.store(len, Ordering::Relaxed);
            // Release pairs with the Acquire loads in `find`: a visible start has its length.
            slot.start.store(start, Ordering::Release);
            return Ok(Entry(i));
        }
        Err(Error::new(Kind::Busy, "too many shared memory mappings in this process")
            .hint("detach some disks"))
    }

    /// Whether the peer truncated the file and the mapping now shows zeros.
    pub(super) fn is_lost(&self) -> bool {
        // Pairs with the Release store in `on_sigbus`.
        SLOTS[self.0].lost.load(Ordering::Acquire)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let slot = &SLOTS[self.0];
        slot.start.store(0, Ordering::Release); // pairs with the loads in `find`
        slot.taken.store(false, Ordering::Release); // pairs with the swap in `new`
    }
}

/// The slot that guards `address`. A slot that changes hands between the two looks at its start
/// is skipped: its mapping is not the one that faulted.
fn find(address: usize) -> Option<(&'static Slot, usize, usize)> {
    SLOTS.iter().find_map(|slot| {
        let start = slot.start.load(Ordering::Acquire); // pairs with `new` and `drop`
        let len = slot.len.load(Ordering::Acquire);
        let inside = start != 0 && address >= start && address - start < len;
        (inside && slot.start.load(Ordering::Acquire) == start).then_some((slot, start, len))
    })
}

fn install() -> Result<()> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = Box::leak(Box::new(
            // SAFETY: all-zero is a valid `sigaction` (default action, empty mask).
            unsafe { std::mem::zeroed::<libc::sigaction>() },
        ));
        // SAFETY: as above.
        let mut action = unsafe { std::mem::zeroed::<libc::sigaction>() };
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: reading the present action into `previous`, which lives for ever.
        unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), previous) };
        PREVIOUS.store(previous, Ordering::Release); // pairs with the load in `on_sigbus`
        // SAFETY: `action` is initialised and its handler is async-signal-safe.
        unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    });
    if PREVIOUS.load(Ordering::Acquire).is_null() {
        return Err(Error::new(Kind::Failed, "the SIGBUS guard could not be installed"));
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for SIGBUS.
    let address = unsafe { (*info).si_addr() } as usize;
    if let Some((slot, start, len)) = find(address) {
        // SAFETY: errno is thread-local and valid; it is put back below.
        let errno = unsafe { *libc::__errno_location() };
        // SAFETY: the range is one of our own mappings, still mapped because its guard is still
        // in the table; replacing its pages keeps every pointer into it valid.
        let map = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        if map != libc::MAP_FAILED {
            slot.lost.store(true, Ordering::Release); // pairs with `is_lost`
            LOSSES.fetch_add(1, Ordering::Release); // pairs with `losses`
            return;
        }
    }
    // SAFETY: `PREVIOUS` was set before this handler was installed and is never freed.
    let previous = unsafe { &*PREVIOUS.load(Ordering::Acquire) };
    if previous.sa_sigaction == libc::SIG_DFL || previous.sa_sigaction == libc::SIG_IGN {
        // SAFETY: restores the default; the faulting access then repeats and ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    } else if previous.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: SA_SIGINFO says that the stored address is a three-argument handler.
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(previous.sa_sigaction) };
        handler(signal, info, context);
    } else {
        // SAFETY: without SA_SIGINFO the stored address is a one-argument handler.
        let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(previous.sa_sigaction) };
        handler(signal);
    }
}
