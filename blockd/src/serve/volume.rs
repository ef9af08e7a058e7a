//! An open disk in service.
//!
//! Invariants:
//! - Nobody but the volume's front doors uses the disk; [`Volume::close`] takes the disk back only
//!   when all of them are gone.
//! - A lane belongs to a queue worker or to a thread of a front door; lanes may be shared, at the
//!   price of sharing counters.

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use parking_lot::Mutex;

use super::budget::{Budget, HeldNews, HeldTold};
use super::cache_mode::{self, CacheMode};
use super::current::Current;
use super::hold::{self, Change, Hold};
use super::limits::{Limits, Throttle};
use super::slow::{Errand, Mailbox, SlowLane};
use super::stats::{self, LaneStats, OpKind, VolumeStats};
use crate::catalogue::{Child, Forked};
use crate::disk::{Disk, Options, Vouched};
use crate::store::Access;
use crate::storedir::{Crossing, StoreDir};

/// What happens to a volume that somebody may want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeEvent {
    /// Requests are held, for this reason.
    Held(String),
    /// Nothing is held any more.
    Resumed,
    /// The disk failed and answers errors until it is opened anew.
    Failed(String),
    /// A front end connected; its process id, if the host tells.
    Connected(Option<u32>),
    /// A front end is gone; why, if it was not in order.
    Disconnected(Option<String>),
    /// A client that is no virtual machine connected; what to call it.
    ClientConnected(String),
    /// It is gone; why, if it was not in order.
    ClientDisconnected(String, Option<String>),
    /// The guest broke a queue.
    QueueFailed(u16, String),
    /// So many events that clients caused were not told: there were too many.
    Skipped(u64),
}

impl VolumeEvent {
    /// True for what a client can cause as often as it likes.
    fn is_of_clients(&self) -> bool {
        match self {
            VolumeEvent::Connected(_)
            | VolumeEvent::Disconnected(_)
            | VolumeEvent::ClientConnected(_)
            | VolumeEvent::ClientDisconnected(..)
            | VolumeEvent::QueueFailed(..) => true,
            VolumeEvent::Held(_)
            | VolumeEvent::Resumed
            | VolumeEvent::Failed(_)
            | VolumeEvent::Skipped(_) => false,
        }
    }
}

/// Who is told of events. Called from data threads: it must not wait.
pub trait Observer: Send + Sync {
    /// Something happened to the volume of this name.
    fn event(&self, volume: &str, event: VolumeEvent);
}

/// How to open a volume.
#[derive(Clone)]
pub struct VolumeOptions {
    /// Lanes: as many as queues will be served at the same time.
    pub lanes: usize,
    /// Open the disk for reading only.
    pub read_only: bool,
    /// Limits from the start.
    pub limits: Limits,
    /// Open although completed writes of a living client may be missing.
    pub accept_lost_tail: bool,
    /// What the one who had the disk before vouches for.
    pub vouched: Vouched,
    /// Who is told of events.
    pub observer: Option<Arc<dyn Observer>>,
}

impl Default for VolumeOptions {
    fn default() -> Self {
        VolumeOptions {
            lanes: 8,
            read_only: false,
            limits: Limits::default(),
            accept_lost_tail: false,
            vouched: Vouched::Nothing,
            observer: None,
        }
    }
}

/// An open disk in service.
pub struct Volume {
    name: String,
    /// The name that it got instead.
    renamed: OnceLock<String>,
    // Before the disk: its threads end first.
    slow: SlowLane,
    disk: Arc<Current>,
    throttle: Throttle,
    hold: Hold,
    lanes: Box<[LaneStats]>,
    workers: Mutex<Vec<Weak<Mailbox>>>,
    cache_mode: CacheMode,
    observer: Option<Arc<dyn Observer>>,
    budget: Budget,
    held_told: HeldTold,
    failure_told: std::sync::atomic::AtomicBool,
}

/// Most records in the tail of a disk that goes on, or begins, at a fork, 768 KiB: whoever waits
/// for the fork waits until this memory is there, and of children there may be hundreds. Opened
/// again, it gets a tail like any disk.
const FORKED_TAIL_RECORDS_MAX: u64 = 16_384;

/// How long threads may take to let go of a volume that is closed. Nothing makes them wait then.
const LET_GO_MAX: Duration = Duration::from_secs(5);

/// How to open a disk for clients that outlive the process.
fn live_options(dir: &StoreDir, lanes: usize) -> Options {
    Options { lanes, live: true, ..dir.disk_options() }
}

/// The same for one that a fork makes.
fn forked_options(dir: &StoreDir, lanes: usize) -> Options {
    Options { tail_records_max: FORKED_TAIL_RECORDS_MAX, ..live_options(dir, lanes) }
}

impl Volume {
    /// Opens a disk of a store and takes it into service. Completed writes survive the death of
    /// this process.
    ///
    /// # Errors
    /// As [`StoreDir::open_disk`], or what the host reports.
    pub fn open(dir: &StoreDir, name: &str, options: &VolumeOptions) -> Result<Arc<Volume>> {
        let disk_options = Options {
            accept_lost_tail: options.accept_lost_tail,
            vouched: options.vouched,
            ..live_options(dir, options.lanes)
        };
        let access = if options.read_only { Access::Read } else { Access::Write };
        let disk = dir.open_disk(name, access, &disk_options)?;
        let tail_dir = &dir.identity().tail_dir;
        let cache_mode = CacheMode::in_file(cache_mode::path_in(tail_dir, dir.disk(name)?.disk));
        Volume::assemble(Arc::new(disk), name, options, cache_mode)
    }

    /// Opens a child ahead of a fork of this disk, and takes it into service.
    ///
    /// # Errors
    /// As [`StoreDir::begin_crossing`], or what the host reports.
    pub fn begin_child(
        &self,
        dir: &StoreDir,
        (forked, child): (&Forked, &Child),
        options: &VolumeOptions,
    ) -> Result<(Crossing, Arc<Volume>)> {
        let live = forked_options(dir, options.lanes);
        let crossing = dir.begin_crossing_into(child.segment, forked, &self.disk(), &live)?;
        let path = cache_mode::path_in(&dir.identity().tail_dir, child.disk);
        let next = Arc::clone(crossing.next());
        let volume = Volume::assemble(next, &child.name, options, CacheMode::in_file(path))?;
        Ok((crossing, volume))
    }

    /// Takes an open disk into service.
    ///
    /// # Errors
    /// What the host reports.
    pub fn over(disk: Arc<Disk>, name: &str, options: &VolumeOptions) -> Result<Arc<Volume>> {
        Volume::assemble(disk, name, options, CacheMode::default())
    }

    fn assemble(
        disk: Arc<Disk>,
        name: &str,
        options: &VolumeOptions,
        cache_mode: CacheMode,
    ) -> Result<Arc<Volume>> {
        let disk = Current::new(disk);
        Ok(Arc::new(Volume {
            name: name.to_owned(),
            renamed: OnceLock::new(),
            slow: SlowLane::start(&disk, name)?,
            disk,
            throttle: Throttle::new(options.limits),
            hold: Hold::default(),
            lanes: (0..options.lanes.max(1)).map(|_| LaneStats::default()).collect(),
            workers: Mutex::default(),
            cache_mode,
            observer: options.observer.clone(),
            budget: Budget::default(),
            held_told: HeldTold::default(),
            failure_told: std::sync::atomic::AtomicBool::new(false),
        }))
    }

    /// Name of the disk.
    #[must_use]
    pub fn name(&self) -> &str {
        self.renamed.get().unwrap_or(&self.name)
    }

    /// Gives it another name. That can be done once; threads keep what they are called.
    pub(crate) fn rename_once(&self, name: &str) {
        // A second name would be a bug, and change nothing.
        let _ = self.renamed.set(name.to_owned());
    }

    /// The disk as it is now.
    ///
    /// # Panics
    /// Never: it is there until the volume is closed.
    #[must_use]
    pub fn disk(&self) -> Arc<Disk> {
        self.disk.get().expect("there until closed")
    }

    /// How often a fork has replaced the disk.
    pub(super) fn swaps(&self) -> u64 {
        self.disk.swaps()
    }

    /// Opens the successor of the disk ahead of a fork.
    ///
    /// # Errors
    /// As [`StoreDir::begin_crossing`].
    pub fn begin_crossing(&self, dir: &StoreDir, forked: &Forked) -> Result<Crossing> {
        dir.begin_crossing(forked, &self.disk(), &forked_options(dir, self.lanes.len()))
    }

    /// Goes on with another disk that shows the same. The gate of the one before is closed.
    pub fn go_on(&self, next: &Arc<Disk>) {
        self.disk.replace(Arc::clone(next));
        self.wake_workers();
    }

    /// Counters and state.
    #[must_use]
    pub fn stats(&self) -> VolumeStats {
        let mut sums = stats::sum(&self.lanes);
        sums.held = self.hold.info();
        let disk = self.disk();
        sums.journal_pages = disk.journal_use();
        sums.map_bytes = disk.map().memory_bytes() as u64;
        sums
    }

    /// Changes the limits; requests that wait for the old ones look again within a second.
    pub fn set_limits(&self, limits: Limits) {
        self.throttle.set(limits);
        self.wake_workers();
    }

    /// Has held requests tried again now.
    pub fn resume(&self) {
        self.hold.resume();
        self.wake_workers();
    }

    /// Ends the waiting of requests on threads, for space and for limits: they fail. The first step
    /// of taking a disk out of service.
    pub fn give_up_waiting(&self) {
        self.hold.close();
        self.throttle.close();
        self.wake_workers();
    }

    /// Takes the disk out of service and closes it in order. All front doors have been stopped.
    ///
    /// # Errors
    /// `Busy` when a thread of one does not let go, else as [`Disk::close`].
    pub fn close(self: Arc<Self>) -> Result<()> {
        let until = Instant::now() + LET_GO_MAX;
        while Arc::strong_count(&self) > 1 && Instant::now() < until {
            std::thread::sleep(LET_GO_MAX / 1000);
        }
        let cache_file = self.cache_mode.clone_file();
        self.into_disk()?.close()?;
        cache_file.forget();
        Ok(())
    }

    /// Takes the disk out of service and leaves it as a killed process would: what completed is in
    /// its tail and goes to who opens it next. Nothing waits for the host. Returns what the next
    /// one may believe: see [`Disk::hand_on`].
    ///
    /// # Errors
    /// `Busy` when a front door has not been stopped, or what the host reports.
    pub fn hand_on(self: Arc<Self>) -> Result<Vouched> {
        self.into_disk()?.hand_on()
    }

    fn into_disk(self: Arc<Self>) -> Result<Disk> {
        let name = self.name().to_owned();
        let busy =
            || Error::new(Kind::Busy, "it is in use").tried("close").on(format!("disk {name}"));
        let volume = Arc::into_inner(self).ok_or_else(busy)?;
        let Volume { slow, disk, .. } = volume;
        drop(slow);
        disk.take().and_then(Arc::into_inner).ok_or_else(busy)
    }

    pub(super) fn lane(&self, lane: usize) -> &LaneStats {
        &self.lanes[lane % self.lanes.len()]
    }

    pub(super) fn cache_mode(&self) -> &CacheMode {
        &self.cache_mode
    }

    pub(super) fn throttle(&self) -> &Throttle {
        &self.throttle
    }

    pub(super) fn hold(&self) -> &Hold {
        &self.hold
    }

    /// Has the journal written in good time: so that no first write has to wait for it.
    pub(super) fn commit_early(&self) {
        self.slow.commit_early();
    }

    pub(super) fn send(&self, errand: Errand) {
        self.slow.send(errand);
    }

    /// Lets a worker be woken when something changes for all.
    pub(super) fn register(&self, mailbox: &Arc<Mailbox>) {
        let mut workers = self.workers.lock();
        workers.retain(|w| w.strong_count() > 0);
        workers.push(Arc::downgrade(mailbox));
    }

    fn wake_workers(&self) {
        self.workers.lock().iter().filter_map(Weak::upgrade).for_each(|m| m.wake());
    }

    pub(crate) fn tell(&self, event: VolumeEvent) {
        let Some(observer) = &self.observer else { return };
        if event.is_of_clients() {
            match self.budget.take(Instant::now()) {
                None => return,
                Some(skipped) => self.tell_skipped(skipped),
            }
        }
        observer.event(self.name(), event);
    }

    fn tell_skipped(&self, count: u64) {
        if count > 0 {
            self.tell(VolumeEvent::Skipped(count));
        }
    }

    /// A request is held from now on.
    pub(super) fn begin_hold(&self, error: &Error) {
        if self.hold.begin(error) == Change::First {
            self.tell_held(false);
        }
    }

    /// A held request was tried again in vain.
    pub(super) fn still_held(&self) {
        self.tell_held(true);
    }

    /// A held request is not held any more.
    pub(super) fn end_hold(&self) {
        if self.hold.end() == Change::Last {
            self.tell_held(false);
        }
    }

    fn tell_held(&self, again: bool) {
        let within = (&self.budget, Instant::now());
        self.held_told.follow(&self.hold, within, again, &mut |news| match news {
            HeldNews::Began(info, skipped) => {
                self.tell_skipped(skipped);
                let (disk, error) = (self.name(), &info.reason);
                tracing::warn!(%disk, %error, "requests are held until the host can do them");
                self.tell(VolumeEvent::Held(info.reason));
            }
            HeldNews::Ended => {
                tracing::info!(disk = %self.name(), "held requests go on");
                self.tell(VolumeEvent::Resumed);
            }
        });
    }

    /// A request failed and is answered so. Logged and told once if the whole disk failed.
    pub(super) fn note_failure(&self, error: &Error) {
        use std::sync::atomic::Ordering::Relaxed; // told once, orders nothing
        if error.kind() == Kind::Failed && !self.failure_told.swap(true, Relaxed) {
            tracing::error!(disk = %self.name(), %error, "the disk failed");
            self.tell(VolumeEvent::Failed(error.to_string()));
        }
    }
}

/// Requests from threads that may wait: the same limits, holding and counters as on a queue.
impl Volume {
    /// Reads `buf.len()` bytes at `offset`, both multiples of 512.
    ///
    /// # Errors
    /// As [`Disk::read`].
    pub fn read(&self, lane: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.serve(lane, OpKind::Read, len, &mut |disk| disk.read(lane, offset, buf))
    }

    /// Writes `buf` at `offset`, both multiples of 512; with `durable` it also survives a power cut
    /// when this returns.
    ///
    /// # Errors
    /// As [`Disk::write`], but waits while [`Kind::may_pass`] says so.
    pub fn write(&self, lane: usize, offset: u64, buf: &[u8], durable: bool) -> Result<()> {
        self.serve(lane, OpKind::Write, buf.len() as u64, &mut |disk| {
            disk.write(lane, offset, buf)?;
            if durable { disk.flush() } else { Ok(()) }
        })
    }

    /// Makes everything durable that completed before.
    ///
    /// # Errors
    /// As [`Disk::flush`], but waits while [`Kind::may_pass`] says so.
    pub fn flush(&self, lane: usize) -> Result<()> {
        self.serve(lane, OpKind::Flush, 0, &mut Disk::flush)
    }

    /// Makes a range read as zeroes and gives its space back.
    ///
    /// # Errors
    /// As [`Disk::discard`], but waits while [`Kind::may_pass`] says so.
    pub fn discard(&self, lane: usize, offset: u64, len: u64) -> Result<()> {
        self.serve(lane, OpKind::Discard, len, &mut |disk| disk.discard(lane, offset, len))
    }

    /// Writes zeroes; with `unmap` the space may be given back.
    ///
    /// # Errors
    /// As [`Disk::write_zeroes`], but waits while [`Kind::may_pass`] says so.
    pub fn write_zeroes(&self, lane: usize, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.serve(lane, OpKind::WriteZeroes, len, &mut |disk| {
            disk.write_zeroes(lane, offset, len, unmap)
        })
    }

    fn serve(
        &self,
        lane: usize,
        kind: OpKind,
        bytes: u64,
        f: &mut dyn FnMut(&Disk) -> Result<()>,
    ) -> Result<()> {
        let stats = self.lane(lane);
        let start = Instant::now();
        stats.began();
        let mut held = false;
        let outcome = loop {
            if !held && !self.throttle.wait(bytes) {
                break Err(Error::new(Kind::Busy, "the disk is taken out of service"));
            }
            let seen = self.hold.resumes();
            match self.disk.with(f) {
                Err(e) if hold::is_held(&e) => {
                    match std::mem::replace(&mut held, true) {
                        false => self.begin_hold(&e),
                        true => self.still_held(),
                    }
                    if !self.hold.wait(seen) {
                        break Err(e);
                    }
                }
                outcome => break outcome,
            }
        };
        if held {
            self.end_hold();
        }
        if let Err(e) = &outcome {
            self.note_failure(e);
        }
        stats.ended(kind, bytes, start.elapsed(), outcome.is_ok());
        outcome
    }
}
