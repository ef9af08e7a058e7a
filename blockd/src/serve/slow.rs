//! The slow lane of a volume: threads for what a queue worker must not wait for.
//!
//! One thread commits: flushes that arrive while a commit runs are served together by the next.
//! Others do requests that wait for another request, move bytes that the host cannot take as they
//! are, or empty large ranges. A worker hands an [`Errand`] over and finds the outcome in its
//! [`Mailbox`]; the bytes travel with it, so guest memory is touched by its worker only.
//!
//! Lock order: queue and mailbox locks are leaves.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use format::{Error, Result};
use parking_lot::{Condvar, Mutex};
use vhost_blk::blk::Range;
use vhost_blk::event::EventFd;

use super::current::Current;
use crate::disk::Disk;
use crate::store::buf::AlignedBuf;

/// Threads beside the committing one.
const THREADS: usize = 2;

/// What a slow request does.
pub(super) enum Work {
    /// Read into the buffer.
    Read(AlignedBuf),
    /// Write the buffer.
    Write(AlignedBuf),
    /// Empty one range.
    Discard(Range),
    /// Zero one range.
    WriteZeroes(Range),
    /// Make everything durable that completed before.
    Flush,
}

/// A request on its way to the slow lane.
pub(super) struct Errand {
    pub(super) lane: usize,
    /// Byte offset on the disk of a read or write.
    pub(super) offset: u64,
    pub(super) work: Work,
    pub(super) reply: Arc<Mailbox>,
    /// Tells the sender which of its requests this is.
    pub(super) token: u32,
}

/// The outcome of an errand.
pub(super) struct Outcome {
    pub(super) token: u32,
    pub(super) result: Result<()>,
    /// What was read.
    pub(super) read: Option<AlignedBuf>,
}

/// Where a worker finds outcomes, and what wakes it.
pub(super) struct Mailbox {
    arrived: Mutex<Vec<Outcome>>,
    pending: AtomicBool,
    wake: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Mailbox {
            arrived: Mutex::default(),
            pending: AtomicBool::new(false),
            wake: EventFd::new()?,
        }))
    }

    /// Wakes the worker without an outcome.
    pub(super) fn wake(&self) {
        // Release pairs with the Acquire load in `has_news`.
        self.pending.store(true, Ordering::Release);
        self.wake.signal();
    }

    pub(super) fn has_news(&self) -> bool {
        self.pending.load(Ordering::Acquire) // pairs with the stores in `wake` and `put`
    }

    /// Moves what arrived to `into`.
    pub(super) fn take(&self, into: &mut Vec<Outcome>) {
        self.wake.drain();
        // Before the lock: what arrives later sets it again.
        self.pending.store(false, Ordering::Relaxed);
        into.append(&mut self.arrived.lock());
    }

    fn put(&self, outcome: Outcome) {
        self.arrived.lock().push(outcome);
        self.wake();
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[derive(Default)]
struct Waiting {
    commits: Vec<Errand>,
    others: VecDeque<Errand>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    /// Somebody asked for a commit that nobody waits for, and it has not begun.
    early: AtomicBool,
    waiting: Mutex<Waiting>,
    commit: Condvar,
    other: Condvar,
}

/// The slow lane of one volume. Threads end when it is dropped, after what was handed over is done.
pub(super) struct SlowLane {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl SlowLane {
    /// Starts the threads. They hold the disk only while they do something with it.
    pub(super) fn start(disk: &Arc<Current>, name: &str) -> Result<Self> {
        let mut lane = SlowLane { shared: Arc::default(), threads: Vec::new() };
        for i in 0..=THREADS {
            let (shared, disk) = (Arc::clone(&lane.shared), Arc::clone(disk));
            let kind = if i == 0 { "commit" } else { "slow" };
            let builder = std::thread::Builder::new().name(format!("{kind} {name}"));
            let thread = builder.spawn(move || match i {
                0 => commit_all(&shared, &disk),
                _ => run_errands(&shared, &disk),
            });
            let thread = thread.map_err(|e| Error::from(e).tried("start a thread"))?;
            lane.threads.push(thread);
        }
        Ok(lane)
    }

    /// Hands an errand over; its outcome comes to its mailbox.
    pub(super) fn send(&self, errand: Errand) {
        let mut waiting = self.shared.waiting.lock();
        if matches!(errand.work, Work::Flush) {
            waiting.commits.push(errand);
            self.shared.commit.notify_one();
        } else {
            waiting.others.push_back(errand);
            self.shared.other.notify_one();
        }
    }
}

impl SlowLane {
    /// Has a commit made that nobody waits for, unless one is asked for already. One load when it
    /// is: every request asks while a commit is due, on all queues.
    pub(super) fn commit_early(&self) {
        // Relaxed: a hint. The lock orders what the commit reads.
        let early = &self.shared.early;
        if !early.load(Ordering::Relaxed) && !early.swap(true, Ordering::Relaxed) {
            let _waiting = self.shared.waiting.lock();
            self.shared.commit.notify_one();
        }
    }
}

impl Drop for SlowLane {
    fn drop(&mut self) {
        self.shared.waiting.lock().stop = true;
        self.shared.commit.notify_all();
        self.shared.other.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

fn commit_all(shared: &Shared, disk: &Current) {
    let mut batch: Vec<Errand> = Vec::new();
    loop {
        let early = {
            let mut waiting = shared.waiting.lock();
            let early = loop {
                let early = shared.early.load(Ordering::Relaxed); // as in `commit_early`
                if early || !waiting.commits.is_empty() {
                    break early;
                }
                if waiting.stop {
                    return;
                }
                shared.commit.wait(&mut waiting);
            };
            std::mem::swap(&mut waiting.commits, &mut batch);
            early
        };
        let outcome = disk.with(&mut Disk::flush);
        if early {
            // Asked for again from now on; a failure is met by whoever needs the room.
            shared.early.store(false, Ordering::Relaxed); // as in `commit_early`
        }
        let said = outcome.as_ref().err().map(|e| (e.kind(), e.to_string()));
        for errand in batch.drain(..) {
            let result = said.clone().map_or(Ok(()), |(kind, text)| Err(Error::new(kind, text)));
            errand.reply.put(Outcome { token: errand.token, result, read: None });
        }
    }
}

fn run_errands(shared: &Shared, disk: &Current) {
    loop {
        let errand = {
            let mut waiting = shared.waiting.lock();
            loop {
                if let Some(errand) = waiting.others.pop_front() {
                    break errand;
                }
                if waiting.stop {
                    return;
                }
                shared.other.wait(&mut waiting);
            }
        };
        let (lane, offset) = (errand.lane, errand.offset);
        let mut work = errand.work;
        let result = disk.with(&mut |disk| match &mut work {
            Work::Read(buf) => disk.read(lane, offset, buf),
            Work::Write(buf) => disk.write(lane, offset, buf),
            Work::Discard(range) => disk.discard(lane, range.offset, range.len),
            Work::WriteZeroes(r) => disk.write_zeroes(lane, r.offset, r.len, r.unmap),
            Work::Flush => disk.flush(),
        });
        let read = if let Work::Read(buf) = work { Some(buf) } else { None };
        errand.reply.put(Outcome { token: errand.token, result, read });
    }
}
