//! Batches of reads or writes through io_uring.
//!
//! Invariants:
//! - The kernel may touch a buffer from the moment its entry is pushed until its completion is
//!   reaped. [`Ring::run`] therefore never returns, and never unwinds, while a slot is busy and its
//!   entry was handed over ([`Run`]'s `Drop` waits).
//! - A ring whose `io_uring_enter` failed is never used again: entries that the kernel did not take
//!   name buffers that are gone. What such a ring left undone is done by plain system calls, so a
//!   failing ring never fails a read or write.
//! - At most [`DEPTH`] operations are in flight per ring; both queues hold that many, so neither
//!   overflows.
//!
//! Who owns a ring: a batch takes one out of the pool, has it alone while it runs, and puts it
//! back. The pool's lock is held only to pop and push, so concurrent batches never wait for each
//! other, and there are as many rings as there ever were concurrent batches (idle ones above
//! [`IDLE_MAX`] are closed). A ring per thread would do as well for speed, but would tie the number
//! of rings, each with its file descriptor and locked memory, to the number of threads that ever
//! did I/O, and would need thread-exit hooks to give them back.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use format::{Error, Result};
use io_uring::{IoUring, Probe, opcode, squeue};
use parking_lot::Mutex;
use rustix::io::Errno;

/// Operations in flight per ring.
const DEPTH: usize = 64;
const ENTRIES: u32 = 64;

/// Rings kept open while nobody uses them.
const IDLE_MAX: usize = 8;

/// Operations of one direction on one file.
///
/// # Safety
/// The memory that an entry names must stay valid, unmoved and untouched by anyone else from
/// [`Batch::entry`] until the operation completed, or as long as the implementor is borrowed.
pub(super) unsafe trait Batch {
    /// Number of operations.
    fn count(&self) -> usize;
    /// Bytes of operation `op` still to do when `done` are.
    fn rest(&self, op: usize, done: usize) -> usize;
    /// The entry that does the rest; `None` when the ring is not the way to do it.
    fn entry(&mut self, op: usize, done: usize) -> Option<squeue::Entry>;
    /// Does the rest by plain system calls.
    fn finish(&mut self, op: usize, done: usize) -> Result<()>;
    /// The error to report when the kernel answered `errno`.
    fn failed(&self, op: usize, done: usize, errno: Errno) -> Error;
}

/// The rings of one store.
pub(super) struct Rings {
    idle: Mutex<Vec<Ring>>,
    /// The host has no io_uring for us. Guards no other data, hence relaxed on both sides.
    off: AtomicBool,
}

impl Rings {
    pub(super) fn new() -> Self {
        Rings { idle: Mutex::new(Vec::new()), off: AtomicBool::new(false) }
    }

    /// Runs those operations of the batch that have an entry; `None` when there is no ring to be
    /// had, and then nothing was done.
    pub(super) fn run(&self, batch: &mut dyn Batch) -> Option<Result<()>> {
        let mut ring = self.take()?;
        let result = ring.run(batch);
        if !ring.unusable {
            let mut idle = self.idle.lock();
            if idle.len() < IDLE_MAX {
                idle.push(ring);
            }
        }
        Some(result)
    }

    fn take(&self) -> Option<Ring> {
        if self.off.load(Ordering::Relaxed) {
            return None;
        }
        if let Some(ring) = self.idle.lock().pop() {
            return Some(ring);
        }
        match Ring::new() {
            Ok(ring) => Some(ring),
            Err(e) => {
                self.give_up(&e);
                None
            }
        }
    }

    /// Lack of memory or descriptors passes; a host that forbids io_uring stays that way.
    pub(super) fn give_up(&self, e: &io::Error) {
        let errno = Errno::from_io_error(e);
        let forbidden = matches!(errno, Some(Errno::NOSYS | Errno::PERM | Errno::ACCESS))
            || e.kind() == io::ErrorKind::Unsupported;
        if forbidden && !self.off.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                error = %e,
                "io_uring is not available on this host; batches use plain reads and writes"
            );
        }
    }
}

#[derive(Clone, Copy)]
struct Slot {
    op: usize,
    done: usize,
}

struct Ring {
    uring: IoUring,
    slots: [Slot; DEPTH],
    /// One bit per slot that nobody uses.
    free: u64,
    unusable: bool,
}

impl Ring {
    fn new() -> io::Result<Self> {
        let uring = IoUring::new(ENTRIES)?;
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::Write::CODE) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel is older than 5.6"));
        }
        Ok(Ring { uring, slots: [Slot { op: 0, done: 0 }; DEPTH], free: u64::MAX, unusable: false })
    }

    fn run(&mut self, batch: &mut dyn Batch) -> Result<()> {
        let mut run = Run { ring: self, batch, next: 0, error: None };
        while run.fill() {
            match run.ring.uring.submit_and_wait(1) {
                Ok(_) => run.reap(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    tracing::warn!(error = %e, "an io_uring failed and is given up");
                    run.quiesce();
                    run.finish_by_calls();
                }
            }
        }
        match run.error.take() {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    fn busy(&self) -> u32 {
        self.free.count_zeros()
    }
}

/// One batch on its way through a ring.
struct Run<'a> {
    ring: &'a mut Ring,
    batch: &'a mut dyn Batch,
    /// First operation that was not looked at.
    next: usize,
    /// The first error; from then on nothing new starts.
    error: Option<Error>,
}

impl Run<'_> {
    /// Pushes what fits. False when nothing is in flight any more.
    fn fill(&mut self) -> bool {
        while self.error.is_none() && self.ring.free != 0 && self.next < self.batch.count() {
            let op = self.next;
            self.next += 1;
            if let Some(entry) = self.batch.entry(op, 0) {
                self.push(Slot { op, done: 0 }, entry);
            }
        }
        self.ring.busy() > 0
    }

    /// Needs a free slot.
    fn push(&mut self, slot: Slot, entry: squeue::Entry) {
        let index = self.ring.free.trailing_zeros();
        let entry = entry.user_data(u64::from(index));
        // SAFETY: `Batch` promises that the entry's memory outlives the operation, and this run
        // does not end before the operation did (see the file head).
        let pushed = unsafe { self.ring.uring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the submission queue has a place for every slot");
        self.ring.free &= !(1 << index);
        self.ring.slots[index as usize] = slot;
    }

    fn reap(&mut self) {
        loop {
            let Some(entry) = self.ring.uring.completion().next() else { return };
            let index = entry.user_data();
            let Slot { op, done } = self.ring.slots[super::to_usize(index)];
            self.ring.free |= 1 << index;
            if self.error.is_some() {
                continue;
            }
            if let Err(e) = self.completed(op, done, entry.result()) {
                self.error = Some(e);
            }
        }
    }

    /// Goes on with an operation whose last step gave `result`. An end of file, an interruption and
    /// "try again" are left to the plain calls, which know what to make of them.
    fn completed(&mut self, op: usize, done: usize, result: i32) -> Result<()> {
        let moved = match usize::try_from(result) {
            Ok(bytes) => bytes,
            Err(_) => match Errno::from_raw_os_error(-result) {
                Errno::INTR | Errno::AGAIN => 0,
                errno => return Err(self.batch.failed(op, done, errno)),
            },
        };
        if moved == 0 {
            return self.batch.finish(op, done);
        }
        let done = done + moved;
        if self.batch.rest(op, done) == 0 {
            return Ok(());
        }
        match self.batch.entry(op, done) {
            // On a ring that is being given up this stays in the queue for `finish_by_calls`.
            Some(entry) => {
                self.push(Slot { op, done }, entry);
                Ok(())
            }
            None => self.batch.finish(op, done),
        }
    }

    /// Waits until the kernel holds none of our buffers and gives the ring up. The kernel posts
    /// completions to shared memory without being asked, so this needs no working `enter`.
    fn quiesce(&mut self) {
        self.ring.unusable = true;
        loop {
            self.reap();
            if self.ring.busy() as usize <= self.ring.uring.submission().len() {
                return;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// After `quiesce`: does what the ring left undone.
    fn finish_by_calls(&mut self) {
        while self.ring.free != u64::MAX {
            let index = (!self.ring.free).trailing_zeros();
            self.ring.free |= 1 << index;
            let Slot { op, done } = self.ring.slots[index as usize];
            self.finish(op, done);
        }
        while self.next < self.batch.count() {
            let op = self.next;
            self.next += 1;
            if self.batch.entry(op, 0).is_some() {
                self.finish(op, 0);
            }
        }
    }

    fn finish(&mut self, op: usize, done: usize) {
        if self.error.is_none() {
            self.error = self.batch.finish(op, done).err();
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        if self.ring.busy() > 0 {
            // Only an unwinding caller gets here.
            self.error = Some(Error::new(format::Kind::Cancelled, "the batch was abandoned"));
            self.quiesce();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::mem::ManuallyDrop;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use io_uring::types;

    use super::*;

    /// Reads that ask the ring for at most `step` bytes at a time.
    struct Reads {
        file: File,
        step: u32,
        bufs: Vec<Vec<u8>>,
        finished: Vec<(usize, usize)>,
    }

    /// Operation `i` reads `LEN` bytes at `i * LEN`.
    const LEN: usize = 1000;

    impl Reads {
        fn new(count: usize, step: u32) -> Self {
            let mut file = tempfile::tempfile().unwrap();
            let bytes: Vec<u8> = (0..=250).cycle().take(count * LEN).collect();
            file.write_all(&bytes).unwrap();
            let bufs = vec![vec![0; LEN]; count];
            Reads { file, step, bufs, finished: Vec::new() }
        }

        fn is_right(&self) -> bool {
            self.bufs.concat().into_iter().eq((0..=250).cycle().take(self.bufs.len() * LEN))
        }
    }

    // SAFETY: the buffers live in `bufs` until the value is gone, and only `finish`, which runs for
    // an operation that is not in flight, looks at one.
    unsafe impl Batch for Reads {
        fn count(&self) -> usize {
            self.bufs.len()
        }
        fn rest(&self, op: usize, done: usize) -> usize {
            self.bufs[op].len() - done
        }
        fn entry(&mut self, op: usize, done: usize) -> Option<squeue::Entry> {
            let rest = &mut self.bufs[op][done..];
            let len = self.step.min(u32::try_from(rest.len()).unwrap());
            let at = (op * LEN + done) as u64;
            let fd = types::Fd(self.file.as_raw_fd());
            Some(opcode::Read::new(fd, rest.as_mut_ptr(), len).offset(at).build())
        }
        fn finish(&mut self, op: usize, done: usize) -> Result<()> {
            self.finished.push((op, done));
            let rest = &mut self.bufs[op][done..];
            std::os::unix::fs::FileExt::read_exact_at(&self.file, rest, (op * LEN + done) as u64)?;
            Ok(())
        }
        fn failed(&self, _: usize, _: usize, errno: Errno) -> Error {
            io::Error::from(errno).into()
        }
    }

    #[test]
    fn short_transfers_go_on_through_the_ring() {
        let rings = Rings::new();
        let mut reads = Reads::new(200, 300);

        rings.run(&mut reads).unwrap().unwrap();

        assert!(reads.is_right());
        assert_eq!(reads.finished, []);
        assert_eq!(rings.idle.lock().len(), 1);
    }

    #[test]
    fn end_of_file_is_left_to_plain_calls() {
        let rings = Rings::new();
        let mut reads = Reads::new(200, 1000);
        reads.file.set_len(150_400).unwrap();

        let e = rings.run(&mut reads).unwrap().unwrap_err();

        assert_eq!((e.kind(), e.reason()), (format::Kind::Corrupt, "the file ends early"));
        assert_eq!(reads.finished.len(), 1);
        assert_eq!(rings.idle.lock().len(), 1);
    }

    #[test]
    fn error_of_one_operation_ends_the_batch_but_not_the_ring() {
        let rings = Rings::new();
        let mut reads = Reads::new(200, 1000);
        reads.file = File::open("/").unwrap();

        let e = rings.run(&mut reads).unwrap().unwrap_err();

        assert_eq!(e.kind(), format::Kind::Invalid);
        let mut reads = Reads::new(200, 1000);
        rings.run(&mut reads).unwrap().unwrap();
        assert!(reads.is_right());
        assert_eq!(rings.idle.lock().len(), 1);
    }

    /// Puts another file in the place of the ring's descriptor, so that every `enter` fails.
    fn break_ring(ring: i32) {
        // SAFETY: the descriptor is open and stays owned by the ring: it is never dropped here.
        let owned = unsafe { OwnedFd::from_raw_fd(ring) };
        let mut owned = ManuallyDrop::new(owned);
        let other = tempfile::tempfile().unwrap();
        rustix::io::dup2(&other, &mut owned).unwrap();
    }

    #[test]
    fn broken_ring_is_given_up_and_the_batch_done_by_plain_calls() {
        let rings = Rings::new();
        let ring = rings.take().unwrap();
        break_ring(ring.uring.as_raw_fd());
        rings.idle.lock().push(ring);
        let mut reads = Reads::new(200, 1000);

        rings.run(&mut reads).unwrap().unwrap();

        assert!(reads.is_right());
        assert_eq!(reads.finished.len(), 200);
        assert_eq!(rings.idle.lock().len(), 0);
    }

    /// Operation 0 reads at the end of a file, so `finish` runs for it; operation 1 reads from a
    /// pipe into which nothing is written until `finish` ran and some time passed.
    struct Slow {
        empty: File,
        pipe: io::PipeReader,
        feeder: Option<io::PipeWriter>,
        bufs: [u8; 2],
        on_finish: fn(i32),
        ring: i32,
    }

    // SAFETY: as for `Reads`; `bufs` is only looked at when the batch is over.
    unsafe impl Batch for Slow {
        fn count(&self) -> usize {
            2
        }
        fn rest(&self, _: usize, done: usize) -> usize {
            1 - done
        }
        fn entry(&mut self, op: usize, _: usize) -> Option<squeue::Entry> {
            let fd = [self.empty.as_raw_fd(), self.pipe.as_raw_fd()][op];
            Some(opcode::Read::new(types::Fd(fd), &raw mut self.bufs[op], 1).build())
        }
        fn finish(&mut self, _: usize, _: usize) -> Result<()> {
            let mut feeder = self.feeder.take().expect("only operation 0 ends early");
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                feeder.write_all(b"x").unwrap();
            });
            (self.on_finish)(self.ring);
            Ok(())
        }
        fn failed(&self, _: usize, _: usize, errno: Errno) -> Error {
            io::Error::from(errno).into()
        }
    }

    /// What the buffer of the pipe held when the batch was over, and how it ended.
    fn run_slow(rings: &Rings, on_finish: fn(i32)) -> (u8, std::thread::Result<bool>) {
        let ring = rings.take().unwrap();
        let (pipe, feeder) = io::pipe().unwrap();
        let mut slow = Slow {
            empty: tempfile::tempfile().unwrap(),
            pipe,
            feeder: Some(feeder),
            bufs: [0; 2],
            on_finish,
            ring: ring.uring.as_raw_fd(),
        };
        rings.idle.lock().push(ring);
        let ended = catch_unwind(AssertUnwindSafe(|| rings.run(&mut slow).unwrap().is_ok()));
        (slow.bufs[1], ended)
    }

    #[test]
    fn panic_waits_for_the_kernel_and_gives_the_ring_up() {
        let rings = Rings::new();

        let (byte, ended) = run_slow(&rings, |_| panic!("in the middle of a batch"));

        assert!(ended.is_err());
        assert_eq!(byte, b'x');
        assert_eq!(rings.idle.lock().len(), 0);
    }

    #[test]
    fn ring_that_breaks_in_the_middle_is_waited_for() {
        let rings = Rings::new();

        let (byte, ended) = run_slow(&rings, break_ring);

        assert!(ended.unwrap());
        assert_eq!(byte, b'x');
        assert_eq!(rings.idle.lock().len(), 0);
    }
}
