//! The worker of one virtqueue: a thread with a ring of its own.
//!
//! Over and over it looks at what completed, takes what the guest offers, starts of it what takes
//! one stroke of work, hands that to the kernel, shows the guest what is done, and when there was
//! nothing of all this polls for a while that adapts itself, then sleeps until a doorbell rings.
//!
//! Invariants:
//! - Reads and overwrites neither allocate nor lock nor log (`tests/tests/hot_path.rs`), once the
//!   queue has been as deep as it is.
//! - A request is inside the gate of its disk from before it is planned until it is published, or
//!   its sync has ended, and nothing waits inside it for another request of the same queue.
//! - The disk is replaced between two rounds, when nothing is inside its gate.
//! - A request is answered once, after its bytes were moved and, if it was a first write,
//!   published; a write in write-through mode only when it is durable.
//! - When the queue is stopped, what is in work is finished and answered, except for what is held:
//!   that stays marked in the in-flight area and is done by whoever serves the ring next.

mod inline;
mod poll;
mod request;
mod ring;
mod slot;

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use format::{Error, Result};
use vhost_blk::blk::{Limits, Status};
use vhost_blk::session::{ActiveQueue, Control};

use super::hold;
use super::slow::{Mailbox, Outcome};
use super::volume::Volume;
use crate::disk::Disk;
use crate::store::RawFile;
use inline::Inline;
use poll::Poller;
use ring::{Bell, DataRing, Done};
use slot::{Phase, Slot};

/// Most requests that one queue has in work.
const SLOTS_MAX: u32 = 128;
/// What one round copies or zeroes before the guest is shown what is done, in bytes: so little
/// after a pause, so that a guest that sleeps is called while the worker goes on; then twice as
/// much each time, up to the second number, because each call costs both sides something. What
/// devices move by themselves does not count.
const STROKE: u64 = 64 << 10;
const STROKE_MAX: u64 = 256 << 10;
/// What a request takes beside copying, in bytes that could be copied meanwhile.
const STROKE_REQUEST: u64 = 4 << 10;
/// Transfers past the page cache that are handed to the kernel at once. A device may tell of what
/// it got together only when all of it is done: few at a time keep it busy while the guest answers
/// to the first of them. With all at once, guest, worker and device took turns.
const HANDFUL: u32 = 4;
/// How soon a request is tried again that came to a closed gate.
const GATE_WAIT: Duration = Duration::from_micros(200);

/// What a worker and who started it share.
#[derive(Debug, Default)]
pub(super) struct WorkerState {
    /// Counts the rounds of the worker.
    rounds: AtomicU64,
    ended: AtomicBool,
}

impl WorkerState {
    /// Rounds that the worker has begun.
    pub(super) fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Acquire) // pairs with the store in `Worker::run`
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire) // pairs with the store at the end of `Worker::run`
    }
}

/// What a worker is started with.
pub(super) struct Setup {
    /// The disk.
    pub(super) volume: Arc<Volume>,
    /// The ring of the guest.
    pub(super) queue: ActiveQueue,
    /// What requests are checked against.
    pub(super) limits: Limits,
    /// Most microseconds to poll before sleeping; 0 for never.
    pub(super) poll_us_max: u32,
    /// Answer to a question for the serial number.
    pub(super) serial: [u8; 20],
    /// For the starter to look at.
    pub(super) state: Arc<WorkerState>,
}

/// A file, and what it asks of buffers.
#[derive(Debug, Clone, Copy)]
struct FileTraits {
    fd: i32,
    memory_align: usize,
    offset_align: u64,
}

impl FileTraits {
    /// Whether its bytes go through the page cache.
    fn is_cached(&self) -> bool {
        self.offset_align == 1
    }
}

struct Worker {
    /// The disk of the volume, as of `swaps`. Before the volume, which takes it back when all are
    /// gone.
    disk: Arc<Disk>,
    swaps: u64,
    volume: Arc<Volume>,
    queue: ActiveQueue,
    limits: Limits,
    serial: [u8; 20],
    state: Arc<WorkerState>,
    lane: usize,
    ring: DataRing,
    files: Vec<Option<FileTraits>>,
    mailbox: Arc<Mailbox>,
    outcomes: Vec<Outcome>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots to be started, in the order of their arrival.
    ready: VecDeque<u32>,
    held: Vec<u32>,
    /// When to look at `ready` again although nothing rings.
    wake_at: Option<Instant>,
    retry_at: Option<Instant>,
    /// The clock, as it was at the start of the round or after the last write of the worker: each
    /// look at it costs as much as planning a request.
    now: Instant,
    resumes: u64,
    refused: u64,
    finished: bool,
    /// What is left of the stroke, and what the next one may be, in bytes.
    stroke: u64,
    next_stroke: u64,
    poller: Poller,
    inline: Inline,
}

/// The files of a disk by row, and their descriptors for a ring.
fn files_of(disk: &Disk) -> Result<(Vec<Option<FileTraits>>, Vec<i32>)> {
    let traits = |raw: RawFile<'_>| FileTraits {
        fd: raw.fd.as_raw_fd(),
        memory_align: raw.memory_align,
        offset_align: raw.offset_align,
    };
    let files: Vec<_> = disk.raw_files()?.into_iter().map(|raw| raw.map(traits)).collect();
    // A row without a file is never named by the map of an open disk; -1 keeps its place.
    let fds = files.iter().map(|f| f.map_or(-1, |f| f.fd)).collect();
    Ok((files, fds))
}

/// Runs the worker of a queue until the queue is stopped. `started` is told once whether it could
/// begin.
pub(super) fn work(setup: Setup, started: &SyncSender<Result<Arc<Mailbox>>>) {
    let state = Arc::clone(&setup.state);
    match Worker::new(setup) {
        Ok(mut worker) => {
            let _ = started.send(Ok(Arc::clone(&worker.mailbox)));
            worker.run();
        }
        Err(e) => {
            let _ = started.send(Err(e));
        }
    }
    state.ended.store(true, Ordering::Release); // pairs with the load in `has_ended`
}

impl Worker {
    fn new(setup: Setup) -> Result<Worker> {
        let Setup { volume, queue, limits, poll_us_max, serial, state } = setup;
        let (swaps, disk) = (volume.swaps(), volume.disk());
        let (files, fds) = files_of(&disk)?;
        let mut ring = DataRing::new(&fds)?;
        let mailbox = Mailbox::new()?;
        volume.register(&mailbox);
        ring.watch(Bell::Kick, std::os::fd::AsFd::as_fd(queue.kick()))?;
        ring.watch(Bell::Control, queue.control_fd())?;
        ring.watch(Bell::Mail, std::os::fd::AsFd::as_fd(&*mailbox))?;
        let resumes = volume.hold().resumes();
        Ok(Worker {
            lane: usize::from(queue.index()),
            disk,
            swaps,
            volume,
            queue,
            limits,
            serial,
            state,
            ring,
            files,
            mailbox,
            outcomes: Vec::with_capacity(SLOTS_MAX as usize),
            slots: Vec::with_capacity(SLOTS_MAX as usize),
            free: Vec::with_capacity(SLOTS_MAX as usize),
            ready: VecDeque::with_capacity(SLOTS_MAX as usize),
            held: Vec::with_capacity(SLOTS_MAX as usize),
            wake_at: None,
            retry_at: None,
            now: Instant::now(),
            resumes,
            refused: 0,
            finished: false,
            stroke: 0,
            next_stroke: STROKE,
            poller: Poller::new(poll_us_max),
            inline: Inline::default(),
        })
    }

    fn run(&mut self) {
        loop {
            // Release pairs with the load in `rounds`: what this round sees, it sees after the
            // starter's change.
            self.state.rounds.fetch_add(1, Ordering::Release);
            self.now = Instant::now();
            if self.volume.swaps() != self.swaps
                && let Err(error) = self.follow_swap()
            {
                self.give_up(&error);
                return;
            }
            let stopping = self.queue.control() == Control::Stop;
            let mut progress = self.show_done();
            progress |= self.read_mail();
            progress |= self.retry_held();
            if !stopping {
                progress |= self.fetch();
            }
            progress |= self.start_ready();
            if let Err(error) = self.ring.submit() {
                self.give_up(&error);
                return;
            }
            // What the page cache had is done by now.
            progress |= self.show_done();
            if stopping && self.is_drained() {
                self.drop_held();
                return;
            }
            if !progress && !self.ring.has_completions() {
                self.idle(stopping);
            }
        }
    }

    /// Goes on with the disk that a fork has put in place of the one before, on which nothing is in
    /// work any more.
    fn follow_swap(&mut self) -> Result<()> {
        // The count first: a swap in between is followed in the next round.
        (self.swaps, self.disk) = (self.volume.swaps(), self.volume.disk());
        let (files, fds) = files_of(&self.disk)?;
        self.files = files;
        self.ring.replace_files(&fds)
    }

    /// Nothing is left that will end by itself.
    fn is_drained(&self) -> bool {
        self.free.len() + self.held.len() == self.slots.len()
    }

    /// Takes completions, and shows the guest what is done.
    fn show_done(&mut self) -> bool {
        let any = self.ring.has_completions() && self.reap();
        let finished = std::mem::take(&mut self.finished);
        if finished {
            self.queue.publish();
        }
        any || finished
    }

    /// Takes completions from the ring.
    fn reap(&mut self) -> bool {
        let mut any = false;
        while let Some(done) = self.ring.next() {
            any = true;
            match done {
                Done::Transfer { slot, part, result } => self.moved(slot, part, result),
                Done::Bell { bell, again: false, result } => self.watch_again(bell, result),
                Done::Bell { .. } => {}
            }
        }
        any
    }

    fn watch_again(&mut self, bell: Bell, result: i32) {
        use std::os::fd::AsFd;
        if result < 0 {
            // A doorbell that cannot be watched was no eventfd: the front end's own affair. The
            // queue is looked at whenever something else wakes the worker.
            tracing::debug!(queue = self.lane, ?bell, result, "a doorbell cannot be watched");
            return;
        }
        let watched = match bell {
            Bell::Kick => self.ring.watch(bell, self.queue.kick().as_fd()),
            Bell::Control => self.ring.watch(bell, self.queue.control_fd()),
            Bell::Mail => self.ring.watch(bell, (*self.mailbox).as_fd()),
        };
        if let Err(error) = watched {
            tracing::warn!(queue = self.lane, %error, "a doorbell is no longer watched");
        }
    }

    /// A slot that nobody has. One is made when the queue is that deep for the first time: most
    /// queues never are, and each slot takes 48 KiB.
    fn free_slot(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let number = u32::try_from(self.slots.len()).ok().filter(|n| *n < SLOTS_MAX)?;
            self.slots.push(Slot::default());
            Some(number)
        })
    }

    /// Takes requests from the guest as long as there are free slots.
    fn fetch(&mut self) -> bool {
        let mut any = false;
        // A resize shows at once.
        self.limits.sectors = self.disk.size() / vhost_blk::blk::SECTOR;
        while let Some(number) = self.free_slot() {
            let slot = &mut self.slots[number as usize];
            let Some(request) = self.queue.take(&self.limits, &mut slot.chain, &mut slot.list)
            else {
                self.free.push(number);
                break;
            };
            slot.start(request, self.now);
            any = true;
            self.volume.lane(self.lane).began();
            self.ready.push_back(number);
        }
        if self.queue.refused() != self.refused {
            // Those were answered on the way, and the guest is to see it.
            self.refused = self.queue.refused();
            self.volume.lane(self.lane).set_refused(self.refused);
            self.finished = true;
        }
        any
    }

    fn retry_held(&mut self) -> bool {
        if self.held.is_empty() {
            return false;
        }
        let resumes = self.volume.hold().resumes();
        let due = self.retry_at.is_none_or(|at| self.now >= at);
        if !due && resumes == self.resumes {
            return false;
        }
        self.resumes = resumes;
        self.retry_at = Some(self.now + hold::RETRY);
        for number in self.held.drain(..) {
            self.slots[number as usize].phase = Phase::Ready;
            self.ready.push_back(number);
        }
        true
    }

    /// The queue stops while requests are held: they stay in the in-flight area, undone.
    fn drop_held(&mut self) {
        for number in std::mem::take(&mut self.held) {
            let slot = &mut self.slots[number as usize];
            if std::mem::take(&mut slot.held) {
                self.volume.end_hold();
            }
            self.queue.set_aside(&mut slot.chain);
            self.volume.lane(self.lane).dropped();
        }
    }

    /// The ring itself failed: nothing can be moved any more, and what is in work stays undone.
    fn give_up(&mut self, error: &Error) {
        tracing::error!(disk = %self.volume.name(), queue = self.lane, %error, "a queue ends");
        self.drop_held();
    }

    fn finish(&mut self, number: u32, status: Status) {
        let slot = &mut self.slots[number as usize];
        debug_assert!(slot.pass.is_none() && slot.moving == 0);
        if std::mem::take(&mut slot.held) {
            self.volume.end_hold();
        }
        let took = self.now.saturating_duration_since(slot.began);
        let (kind, bytes) = (slot.kind(), slot.bytes());
        self.volume.lane(self.lane).ended(kind, bytes, took, status == Status::Ok);
        self.queue.finish(&mut slot.chain, status);
        slot.phase = Phase::Free;
        self.free.push(number);
        self.finished = true;
    }
}
