//! The requests of one disk: from the guest's ring to blockd and back.
//!
//! Whoever holds the engine's lock runs it: mostly the disk's own thread, and the thread that stops
//! the machine, which so waits for requests without being switched to another one.
//!
//! A request is cut into parts of at most 1 MiB, each a request to blockd with chunks of the arena
//! of its own. A request that lacks chunks waits, and while one waits none is taken after it, so
//! the guest's ring holds what we have no room for.
//!
//! Invariants: guest memory is touched between taking a chain and giving it back, and at no other
//! time; a request is given back once, after its last part; requests of a driver that was reset are
//! never given back, and no request of its successor is begun before their last part is done, so
//! that an old write cannot land after a new one.
//!
//! *Write-through.* blockd always runs in write-back mode here. While the guest has switched the
//! cache off, or cannot flush, a write is followed by a flush before it completes: the crash
//! between the two loses a write that the guest does not yet believe in. A mode kept by blockd
//! would be forgotten when it restarts, just while it runs the requests that its predecessor had
//! begun.

use std::collections::VecDeque;
use std::sync::Arc;

use vhost_blk::blk::{F_FLUSH, Limits, RangeList, Request, Status, parse};
use vhost_blk::client::{Completion, Op};
use vhost_blk::queue::{Chain, Queue};

use super::Shape;
use super::arena::{Chunks, Pool};
use super::link::{DEPTH, Link, Tended};
use crate::devices::mmio::Notifier;

/// Requests of the guest that are in work at once.
const WORKS_MAX: u16 = DEPTH;
/// Rounds before the lock is given up for a moment.
const ROUNDS: u32 = 16;
/// Bytes of a serial number.
const SERIAL: u64 = 20;

/// A request of the guest.
struct Work {
    chain: Chain,
    request: Request,
    ranges: RangeList,
    /// Bytes of data that parts were made for.
    begun: u64,
    /// Whether a part without data is still to be made: flush, discard, the flush of a write.
    plain: bool,
    /// Whether a flush has to follow before it completes.
    durable: bool,
    /// Whether the part to be made is that flush.
    flushing: bool,
    parts: u16,
    status: u8,
    /// Its driver is gone.
    orphan: bool,
}

impl Work {
    fn data_len(&self) -> u64 {
        match self.request {
            Request::Read { len, .. } | Request::Write { len, .. } => len,
            Request::GetId => SERIAL,
            _ => 0,
        }
    }

    fn is_done(&self) -> bool {
        self.parts == 0 && !self.plain && (self.begun == self.data_len() || self.orphan)
    }
}

/// A part of a request, at blockd.
#[derive(Clone, Copy)]
struct Part {
    work: u16,
    /// Where its data begins in the request's.
    at: u64,
    chunks: Chunks,
}

/// What the guest's driver set up.
struct Driver {
    queue: Queue,
    limits: Limits,
    /// Features that it accepted.
    features: u64,
}

/// One disk at work.
pub(super) struct Engine {
    pub(super) link: Link,
    pool: Pool,
    driver: Option<Driver>,
    works: Vec<Work>,
    idle: Vec<u16>,
    parts: Vec<Part>,
    idle_parts: Vec<u16>,
    /// Requests of which a part is still to be made, the oldest first.
    backlog: VecDeque<u16>,
    orphans: u16,
    /// Whether requests stay in the guest's ring. A machine that does not run yet has none taken.
    paused: bool,
    shape: Arc<Shape>,
    notifier: Arc<Notifier>,
}

impl Engine {
    pub(super) fn new(link: Link, shape: Arc<Shape>, notifier: Arc<Notifier>) -> Engine {
        let (start, _) = link.queue.data();
        let part = Part { work: 0, at: 0, chunks: Chunks::NONE };
        Engine {
            link,
            pool: Pool::new(start),
            driver: None,
            works: Vec::new(),
            idle: Vec::new(),
            parts: vec![part; DEPTH.into()],
            idle_parts: (0..DEPTH).rev().collect(),
            backlog: VecDeque::new(),
            orphans: 0,
            paused: true,
            shape,
            notifier,
        }
    }

    /// A driver set up its ring.
    pub(super) fn start(&mut self, queue: Queue, features: u64) {
        self.stop();
        let limits = self.shape.limits(features);
        self.driver = Some(Driver { queue, limits, features });
    }

    /// The driver is gone, or broke its ring: what it asked for is not answered any more.
    pub(super) fn stop(&mut self) {
        let Some(mut driver) = self.driver.take() else { return };
        for (i, work) in (0..).zip(&mut self.works) {
            if work.orphan || self.idle.contains(&i) {
                continue;
            }
            // blockd works on the arena, never on guest memory: nothing points into the chain.
            driver.queue.abandon(&mut work.chain);
            work.orphan = true;
            work.plain = false;
            self.orphans += 1;
        }
        self.backlog.clear();
        for i in 0..self.works.len() {
            self.retire(u16::try_from(i).unwrap_or(0));
        }
    }

    /// Puts an orphan away when its last part is done.
    fn retire(&mut self, i: u16) {
        let work = &mut self.works[usize::from(i)];
        if work.orphan && work.parts == 0 {
            work.orphan = false;
            self.orphans -= 1;
            self.idle.push(i);
        }
    }

    pub(super) fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Has the driver look at its ring.
    pub(super) fn notify(&self) {
        self.notifier.used();
    }

    /// Requests that are taken and not given back, or whose driver is gone and blockd still works.
    pub(super) fn in_work(&self) -> usize {
        self.works.len() - self.idle.len()
    }

    /// The position in the driver's ring.
    pub(super) fn base(&self) -> Option<u32> {
        self.driver.as_ref().map(|d| d.queue.base())
    }

    /// Looks after the connection.
    pub(super) fn tend(&mut self) {
        if self.link.tend() == Tended::Changed {
            self.reshape();
        }
    }

    /// Does whatever can be done without waiting; `true` when there is more to do at once.
    pub(super) fn run(&mut self) -> bool {
        for _ in 0..ROUNDS {
            let moved = self.reap() | self.feed() | self.take();
            self.link.queue.kick();
            if !moved {
                return false;
            }
        }
        true
    }

    /// Arranges to be woken; `false` when there is something to do already.
    pub(super) fn arm(&mut self) -> bool {
        let completed = self.link.queue.wait(0);
        let offered = match &mut self.driver {
            Some(d) if !self.paused && self.orphans == 0 && self.backlog.is_empty() => {
                let room = !self.idle.is_empty() || self.works.len() < WORKS_MAX.into();
                d.queue.enable_kicks() && room
            }
            _ => false,
        };
        !completed && !offered
    }

    /// The size or something else of the disk may have changed.
    fn reshape(&mut self) {
        let Ok(space) = self.link.space() else { return };
        if self.shape.update(&space) {
            if let Some(driver) = &mut self.driver {
                driver.limits = self.shape.limits(driver.features);
            }
            self.notifier.config_changed();
        }
    }

    /// Takes completions; whether there were some.
    fn reap(&mut self) -> bool {
        let mut some = false;
        while let Some(completion) = self.link.queue.poll() {
            some = true;
            self.part_done(completion);
        }
        if some
            && let Some(driver) = &mut self.driver
            && driver.queue.publish()
        {
            self.notifier.used();
        }
        some
    }

    fn part_done(&mut self, completion: Completion) {
        let Ok(number) = u16::try_from(completion.token) else { return };
        let part = self.parts[usize::from(number)];
        let work = &mut self.works[usize::from(part.work)];
        work.parts -= 1;
        if completion.status != Status::Ok as u8 && work.status == Status::Ok as u8 {
            let known = completion.status == Status::Unsupported as u8;
            work.status = if known { completion.status } else { Status::IoError as u8 };
        }
        let good = completion.status == Status::Ok as u8 && !work.orphan;
        let arena = self.link.queue.arena();
        match work.request {
            Request::Read { .. } if good => {
                part.chunks.drain(arena, work.chain.writable(), part.at);
            }
            Request::GetId if good => {
                let mut serial = [0; 20];
                arena.read(part.chunks.spans()[0].offset, &mut serial);
                work.chain.fill(&serial);
            }
            _ => {}
        }
        self.pool.give(&part.chunks);
        self.idle_parts.push(number);
        self.settle(part.work);
    }

    /// Goes on with a request after a part of it was done.
    fn settle(&mut self, i: u16) {
        let work = &mut self.works[usize::from(i)];
        if work.orphan {
            return self.retire(i);
        }
        if !work.is_done() {
            return;
        }
        if work.durable && work.status == Status::Ok as u8 {
            (work.durable, work.flushing, work.plain) = (false, true, true);
            self.backlog.push_back(i);
            return;
        }
        let driver = self.driver.as_mut().expect("only orphans outlive their driver");
        give_back(&mut driver.queue, &mut work.chain, work.status);
        self.idle.push(i);
    }

    /// Makes parts of requests that wait; whether one was made.
    fn feed(&mut self) -> bool {
        let mut some = false;
        while let Some(&i) = self.backlog.front() {
            let (all, made) = self.make_parts(i);
            some |= made;
            if !all {
                break;
            }
            self.backlog.pop_front();
        }
        some
    }

    /// Makes the parts of a request as far as there is room: whether that was all, and whether
    /// there was one.
    fn make_parts(&mut self, i: u16) -> (bool, bool) {
        let work = &mut self.works[usize::from(i)];
        let mut made = false;
        loop {
            let left = work.data_len() - work.begun;
            if left == 0 && !work.plain {
                return (true, made);
            }
            let Some(&number) = self.idle_parts.last() else { return (false, made) };
            let chunks = if left > 0 { self.pool.take(left) } else { Some(Chunks::NONE) };
            let Some(chunks) = chunks else { return (false, made) };
            let at = work.begun;
            if let Request::Write { .. } = work.request {
                chunks.fill(self.link.queue.arena(), work.chain.readable(), at);
            }
            if !submit(&mut self.link, work, at, &chunks, number.into()) {
                self.pool.give(&chunks);
                return (false, made);
            }
            self.idle_parts.pop();
            self.parts[usize::from(number)] = Part { work: i, at, chunks };
            work.parts += 1;
            work.begun += chunks.len();
            if left == 0 {
                work.plain = false;
            }
            made = true;
        }
    }

    /// Takes requests from the guest; whether there were some.
    fn take(&mut self) -> bool {
        let mut some = false;
        while self.backlog.is_empty() && !self.paused && self.orphans == 0 {
            let Some(driver) = &mut self.driver else { break };
            let Some(i) = idle_work(&mut self.idle, &mut self.works) else { break };
            let work = &mut self.works[usize::from(i)];
            let parsed = match driver.queue.pop(&mut work.chain) {
                Ok(false) => {
                    self.idle.push(i);
                    break;
                }
                Ok(true) => {
                    let parsed = parse(&mut work.chain, &driver.limits, &mut work.ranges);
                    if parsed.is_err() {
                        driver.queue.abandon(&mut work.chain);
                    }
                    parsed
                }
                Err(e) => Err(e),
            };
            some = true;
            match parsed {
                Ok(Ok(request)) => {
                    // After the request was taken: a switch of the cache mode that the driver made
                    // before it holds for it.
                    work.begin(request, self.shape.flushes_writes() && can_flush(&self.link));
                    self.backlog.push_back(i);
                    self.feed();
                    self.settle(i);
                }
                Ok(Err(refused)) => {
                    give_back(&mut driver.queue, &mut work.chain, refused.status as u8);
                    self.idle.push(i);
                }
                Err(_) => {
                    self.idle.push(i);
                    self.stop();
                    self.notifier.needs_reset();
                }
            }
        }
        self.publish_refused(some);
        some
    }

    /// Shows the guest what was answered without blockd.
    fn publish_refused(&mut self, some: bool) {
        if let (Some(driver), true) = (&mut self.driver, some)
            && driver.queue.publish()
        {
            self.notifier.used();
        }
    }
}

impl Work {
    fn begin(&mut self, request: Request, flush_writes: bool) {
        self.request = request;
        self.begun = 0;
        self.plain = matches!(request, Request::Flush | Request::Discard | Request::WriteZeroes);
        self.durable = flush_writes
            && matches!(request, Request::Write { .. } | Request::WriteZeroes | Request::Discard);
        (self.parts, self.status) = (0, Status::Ok as u8);
        (self.flushing, self.orphan) = (false, false);
    }
}

fn can_flush(link: &Link) -> bool {
    link.features() & F_FLUSH != 0
}

fn idle_work(idle: &mut Vec<u16>, works: &mut Vec<Work>) -> Option<u16> {
    if let Some(i) = idle.pop() {
        return Some(i);
    }
    let i = u16::try_from(works.len()).ok().filter(|i| *i < WORKS_MAX)?;
    works.push(Work {
        chain: Chain::new(),
        request: Request::Flush,
        ranges: RangeList::default(),
        begun: 0,
        plain: false,
        durable: false,
        flushing: false,
        parts: 0,
        status: 0,
        orphan: false,
    });
    Some(i)
}

fn give_back(queue: &mut Queue, chain: &mut Chain, status: u8) {
    chain.set_status(status);
    let written = chain.written_len();
    queue.complete(chain, written);
}

/// Gives one part to blockd; `false` when its ring is full.
fn submit(link: &mut Link, work: &Work, at: u64, chunks: &Chunks, token: u64) -> bool {
    let mut ranges = [(0, 0); vhost_blk::blk::RANGES_MAX];
    let listed = work.ranges.as_slice();
    for (to, from) in ranges.iter_mut().zip(listed) {
        *to = (from.offset, from.len);
    }
    let ranges = &ranges[..listed.len()];
    let (op, offset) = match work.request {
        _ if work.flushing => (Op::Flush, 0),
        Request::Read { offset, .. } => (Op::Read, offset + at),
        Request::Write { offset, .. } => (Op::Write, offset + at),
        Request::Flush => (Op::Flush, 0),
        Request::GetId => (Op::GetId, 0),
        Request::Discard => (Op::Discard(ranges), 0),
        Request::WriteZeroes => {
            // The flag allows to free space and does not ask for it.
            let unmap = listed.iter().all(|r| r.unmap);
            (Op::WriteZeroes { ranges, unmap }, 0)
        }
    };
    link.submit(op, offset, chunks.spans(), token)
}
