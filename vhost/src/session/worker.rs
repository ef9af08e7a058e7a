//! A ring in the hands of a worker thread, and the mailbox through which the control thread
//! reaches it.
//!
//! Invariants: between [`super::Device::start_queue`] and the drop of the [`ActiveQueue`] the
//! worker alone touches the ring. The control thread asks for changes through the mailbox and
//! waits until they are done, so that it answers the front end only when its request holds. A
//! worker that goes away, in whatever way, hands the ring back by the drop; nobody waits for ever
//! for a dead worker.
//!
//! Lock order: the mailbox lock is a leaf; no other lock is taken and no I/O is done under it.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use format::{Error, Kind, Result};

use super::Shared;
use crate::blk::{Limits, RangeList, Request, Status, parse};
use crate::event::EventFd;
use crate::memory::{Memory, fault};
use crate::queue::{Chain, LogTarget, Queue};

/// A change that the control thread asks a worker to make.
#[derive(Debug)]
pub(super) enum Update {
    Memory(Arc<Memory>),
    Log(LogTarget),
    Call(Option<EventFd>),
    Err(Option<EventFd>),
}

/// How a ring came back.
#[derive(Debug, Clone, Copy)]
pub(super) struct HandedBack {
    /// Position for the next start.
    pub(super) base: u32,
    /// Requests that the worker left undone.
    pub(super) outstanding: u32,
}

#[derive(Debug, Default)]
struct Slot {
    updates: Vec<Update>,
    posted: u64,
    done: u64,
    error: Option<Error>,
    stop: bool,
    handed_back: Option<HandedBack>,
}

/// The control thread's end of an [`ActiveQueue`].
#[derive(Debug)]
pub(super) struct Mailbox {
    pending: AtomicBool,
    failed: AtomicBool,
    wake: EventFd,
    slot: Mutex<Slot>,
    changed: Condvar,
}

impl Mailbox {
    pub(super) fn new() -> Result<Arc<Mailbox>> {
        Ok(Arc::new(Mailbox {
            pending: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            wake: EventFd::new()?,
            slot: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        // Nothing under the lock can panic half way through a change.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self) {
        // Pairs with the Acquire load in `ActiveQueue::control`: who sees it sees the slot.
        self.pending.store(true, Ordering::Release);
        self.wake.signal();
    }

    /// Whether the ring is broken.
    pub(super) fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed) // a report of its own, orders nothing
    }

    /// Has the worker make one change and waits for it. A ring that is already back needs none.
    pub(super) fn update(&self, update: Update) -> Result<()> {
        let mut slot = self.lock();
        if slot.handed_back.is_some() {
            return Ok(());
        }
        slot.updates.push(update);
        slot.posted += 1;
        let ticket = slot.posted;
        self.announce();
        while slot.done < ticket && slot.handed_back.is_none() {
            slot = self.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        slot.error.take().map_or(Ok(()), Err)
    }

    /// Asks the worker to drain and hand the ring back, without waiting.
    pub(super) fn ask_to_stop(&self) {
        self.lock().stop = true;
        self.announce();
    }

    /// Asks as [`Mailbox::ask_to_stop`] and waits until the ring is back.
    pub(super) fn stop(&self) -> HandedBack {
        self.ask_to_stop();
        let mut slot = self.lock();
        loop {
            if let Some(handed_back) = slot.handed_back {
                return handed_back;
            }
            slot = self.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What the control thread wants of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Run,
    /// Take nothing more, complete what is in work, publish it and drop the queue. The front end
    /// waits for this.
    Stop,
}

/// A ring and its doorbells, owned by one worker thread.
///
/// The worker's duty, over and over: call [`ActiveQueue::control`]; take requests with
/// [`ActiveQueue::take`]; do them in any order; [`ActiveQueue::finish`] each;
/// [`ActiveQueue::publish`] once per batch; and before it sleeps,
/// [`ActiveQueue::enable_kicks`] and then wait for [`ActiveQueue::kick`],
/// [`ActiveQueue::control_fd`] or its own I/O.
#[derive(Debug)]
pub struct ActiveQueue {
    pub(super) queue: Queue,
    pub(super) index: u16,
    pub(super) features: u64,
    pub(super) kick: EventFd,
    pub(super) call: Option<EventFd>,
    pub(super) err: Option<EventFd>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) shared: Arc<Shared>,
    /// What is in work is in an in-flight area, too.
    pub(super) recorded: bool,
    pub(super) failed: bool,
    pub(super) losses: u64,
    pub(super) refused: u64,
}

impl ActiveQueue {
    /// Number of the queue in its device.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Negotiated virtio features.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The driver's doorbell. Readable when requests may have arrived.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Readable when [`ActiveQueue::control`] has news; it drains it.
    #[must_use]
    pub fn control_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.mailbox.wake.as_fd()
    }

    /// Whether completed writes may stay in a volatile cache. If not, a write completes only when
    /// it is durable. Can change at any time; ask for each write.
    #[must_use]
    pub fn write_back(&self) -> bool {
        // Relaxed: the driver knows of the change only after the front end's request returned,
        // and that waits for `Device::write_cache_changed`, which orders itself with the worker.
        self.shared.write_back.load(Ordering::Relaxed)
    }

    /// Makes the changes that the control thread asked for, and says what it wants. Two loads when
    /// there is nothing.
    pub fn control(&mut self) -> Control {
        let losses = fault::losses();
        if losses != self.losses {
            self.losses = losses;
            if self.queue.is_lost() {
                let error = Error::invalid("the front end truncated its shared memory");
                self.shared.lost.store(true, Ordering::Release); // pairs with the session's load
                self.fail(error);
            }
        }
        // Pairs with the Release store in `Mailbox::announce`.
        if !self.mailbox.pending.load(Ordering::Acquire) {
            return Control::Run;
        }
        self.read_mail()
    }

    #[cold]
    fn read_mail(&mut self) -> Control {
        let mailbox = self.mailbox.clone();
        mailbox.wake.drain();
        mailbox.pending.store(false, Ordering::Relaxed); // before the lock: new mail sets it again
        let (updates, stop) = {
            let mut slot = mailbox.lock();
            (std::mem::take(&mut slot.updates), slot.stop)
        };
        for update in updates {
            let result = self.apply(update);
            let mut slot = mailbox.lock();
            slot.done += 1;
            if let Err(e) = result {
                slot.error = Some(e);
            }
            mailbox.changed.notify_all();
        }
        if stop {
            // A worker may look several times while it drains.
            mailbox.pending.store(true, Ordering::Relaxed);
            return Control::Stop;
        }
        Control::Run
    }

    fn apply(&mut self, update: Update) -> Result<()> {
        match update {
            Update::Memory(memory) => self.queue.set_memory(memory).inspect_err(|_| {
                self.fail(Error::invalid("the ring is no longer in shared memory"));
            })?,
            Update::Log(log) => self.queue.set_log(log),
            Update::Call(call) => {
                self.call = call;
                // Completions that were published to the old one, or to none, may still wait.
                self.notify();
            }
            Update::Err(err) => self.err = err,
        }
        Ok(())
    }

    /// Takes the next chain; `false` when there is none, or when the ring is broken.
    pub fn pop(&mut self, chain: &mut Chain) -> bool {
        if self.failed {
            return false;
        }
        match self.queue.pop(chain) {
            Ok(found) => found,
            Err(e) => {
                self.fail(e.into());
                false
            }
        }
    }

    /// Takes the next request that the disk has to do, with its data in `chain` and its ranges, if
    /// it has any, in `list`. Requests that break `limits` are answered on the way.
    pub fn take(
        &mut self,
        limits: &Limits,
        chain: &mut Chain,
        list: &mut RangeList,
    ) -> Option<Request> {
        while self.pop(chain) {
            match parse(chain, limits, list) {
                Ok(Ok(request)) => return Some(request),
                Ok(Err(refused)) => {
                    self.refused += 1;
                    self.finish(chain, refused.status);
                }
                Err(e) => {
                    self.queue.abandon(chain);
                    self.fail(e.into());
                }
            }
        }
        None
    }

    /// Requests that [`ActiveQueue::take`] answered by itself because the driver broke a rule.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Answers a request. The driver sees it after [`ActiveQueue::publish`].
    pub fn finish(&mut self, chain: &mut Chain, status: Status) {
        chain.set_status(status as u8);
        let written = chain.written_len();
        self.queue.complete(chain, written);
    }

    /// Gives back a chain that [`ActiveQueue::pop`] took, with `written` bytes in it.
    pub fn complete(&mut self, chain: &mut Chain, written: u32) {
        self.queue.complete(chain, written);
    }

    /// Leaves a request undone, for the next owner of the ring: the in-flight area shows it.
    /// Nothing may use its buffers any more.
    pub fn set_aside(&mut self, chain: &mut Chain) {
        self.queue.set_aside(chain);
    }

    /// Makes finished requests visible to the driver and notifies it if it wants that; returns
    /// whether it was notified.
    pub fn publish(&mut self) -> bool {
        let wanted = self.queue.publish();
        if wanted {
            self.notify();
        }
        wanted
    }

    /// Asks the driver to kick; returns whether requests wait already, so that the worker must not
    /// sleep.
    #[must_use]
    pub fn enable_kicks(&mut self) -> bool {
        !self.failed && self.queue.enable_kicks()
    }

    /// Tells the driver that it need not kick, because the worker looks by itself.
    pub fn disable_kicks(&mut self) {
        self.queue.disable_kicks();
    }

    /// Whether a request waits: one load, for busy polling.
    #[must_use]
    pub fn has_work(&mut self) -> bool {
        !self.failed && self.queue.has_work()
    }

    /// Requests taken and not finished.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.queue.outstanding()
    }

    /// Whether the guest broke the ring. It stays silent until it is stopped.
    #[must_use]
    pub fn is_failed(&self) -> bool {
        self.failed
    }

    fn notify(&self) {
        if let Some(call) = &self.call {
            call.signal();
        }
    }

    #[cold]
    fn fail(&mut self, error: Error) {
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        self.mailbox.failed.store(true, Ordering::Relaxed); // see `Mailbox::is_failed`
        if let Some(err) = &self.err {
            err.signal();
        }
        self.shared.report(self.index, error);
    }
}

impl Drop for ActiveQueue {
    fn drop(&mut self) {
        self.publish();
        let outstanding = self.queue.outstanding();
        // What was asked to stop may leave requests that a successor finds in the in-flight area.
        let left_on = self.recorded && self.mailbox.lock().stop;
        if outstanding > 0 && !left_on {
            let e = Error::new(Kind::Failed, "a worker left its queue with requests in work");
            self.shared.report(self.index, e);
        }
        self.queue.close();
        let handed_back = HandedBack { base: self.queue.base(), outstanding };
        // Before anybody is told: who then takes its memory back finds no mapping of this ring's.
        self.queue.let_go();
        self.mailbox.lock().handed_back = Some(handed_back);
        self.mailbox.changed.notify_all();
    }
}
