//! A verifying load on one queue of a vhost-user disk: random requests of all kinds at full depth,
//! each checked against what completed before it was submitted.
//!
//! The load owns a part of the disk. Sectors that a request in work touches are left alone by
//! others, since their order would be nobody's promise; so every sector has one right content at
//! any time, through the death and return of the device as well.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vhost_blk::client::{ClientQueue, Op, Span};

use crate::pattern::{self, Found, SECTOR};
use crate::rng::Rng;

/// Most bytes of one request.
const REQUEST_MAX: u64 = 64 << 10;
/// How long a request may take, a restart of the device included.
const PATIENCE_MS: u32 = 60_000;

/// What a request in work will have done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    Read,
    Write(u32),
    Zero,
    Flush,
}

#[derive(Debug)]
struct InWork {
    does: Does,
    first: u64,
    count: u64,
}

/// A load on a part of a disk.
pub struct Load {
    queue: ClientQueue,
    rng: Rng,
    /// First sector of the part.
    start: u64,
    /// The tag that each sector holds; 0 for zeroes.
    tags: Vec<u32>,
    next_tag: u32,
    busy: HashMap<u64, InWork>,
    free: Vec<u64>,
    /// Requests that completed.
    pub done: u64,
    /// Longest time for which no request completed while some were in work.
    pub longest: Duration,
}

/// A load for each queue, each on its equal part of a disk of `size` bytes, which reads as zeroes
/// now.
///
/// # Panics
/// As [`Load::new`].
#[must_use]
pub fn loads(queues: Vec<ClientQueue>, size: u64, seed: u64) -> Vec<Load> {
    let part = size / SECTOR as u64 / queues.len() as u64;
    (0..).zip(queues).map(|(i, queue)| Load::new(queue, i * part, part, seed + i)).collect()
}

/// Ends loads, also when the test fails.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed); // with the loads that look, soon enough
    }
}

/// Runs loads on threads of their own while `work` is at work, which can ask how many requests the
/// busiest of them has done. Then each reads its part back and flushes.
///
/// # Panics
/// As [`Load::run`].
pub fn during<R>(mut loads: Vec<Load>, work: impl FnOnce(&dyn Fn() -> u64) -> R) -> (Vec<Load>, R) {
    let (stop, done) = (&AtomicBool::new(false), &AtomicU64::new(0));
    let result = std::thread::scope(|scope| {
        let ending = Ending(stop);
        for load in &mut loads {
            scope.spawn(move || {
                load.run(&mut |n| {
                    done.fetch_max(n, Ordering::Relaxed);
                    !stop.load(Ordering::Relaxed)
                });
                load.verify();
                load.flush();
            });
        }
        let result = work(&|| done.load(Ordering::Relaxed));
        drop(ending);
        result
    });
    (loads, result)
}

impl Load {
    /// A load on `sectors` sectors from `start` on, which read as zeroes now.
    ///
    /// # Panics
    /// When the queue has no room for data.
    #[must_use]
    pub fn new(queue: ClientQueue, start: u64, sectors: u64, seed: u64) -> Self {
        let slots = queue.data().1 / REQUEST_MAX;
        assert!(slots > 0, "the arena has room for a request");
        Load {
            queue,
            rng: Rng::new(seed),
            start,
            tags: vec![0; usize::try_from(sectors).expect("a count")],
            next_tag: 1,
            busy: HashMap::new(),
            free: (0..slots).collect(),
            done: 0,
            longest: Duration::ZERO,
        }
    }

    /// Keeps the queue full while `more(requests done)` says so, then waits for what is in work.
    ///
    /// # Panics
    /// When a request fails, never completes, or returns something wrong.
    pub fn run(&mut self, more: &mut dyn FnMut(u64) -> bool) {
        loop {
            let running = more(self.done);
            while running && self.submit_one() {}
            if self.busy.is_empty() {
                return;
            }
            self.queue.kick();
            let start = Instant::now();
            let came = self.queue.wait(PATIENCE_MS);
            self.longest = self.longest.max(start.elapsed());
            assert!(came, "{} requests never complete; {} did", self.busy.len(), self.done);
            self.collect();
        }
    }

    /// As [`Load::run`], and returns with requests in work, as a monitor does that dies.
    ///
    /// # Panics
    /// As [`Load::run`].
    pub fn leave(&mut self, more: &mut dyn FnMut(u64) -> bool) {
        while more(self.done) {
            while self.submit_one() {}
            self.queue.kick();
            assert!(self.queue.wait(PATIENCE_MS), "requests complete");
            self.collect();
        }
        while self.submit_one() {}
        self.queue.kick();
    }

    /// Reads the whole part back.
    ///
    /// # Panics
    /// As [`Load::run`].
    pub fn verify(&mut self) {
        let (mut at, len, step) = (0, self.tags.len() as u64, REQUEST_MAX / SECTOR as u64);
        while at < len {
            let Some(slot) = self.free.pop() else {
                self.queue.kick();
                assert!(self.queue.wait(PATIENCE_MS), "reads complete");
                self.collect();
                continue;
            };
            let count = step.min(len - at);
            if self.submit(slot, Does::Read, at, count) {
                at += count;
            } else {
                self.free.push(slot);
                self.queue.kick();
                assert!(self.queue.wait(PATIENCE_MS), "reads complete");
                self.collect();
            }
        }
        self.run(&mut |_| false);
    }

    /// Flushes, as a guest does that wants to rely on what it wrote.
    ///
    /// # Panics
    /// As [`Load::run`].
    pub fn flush(&mut self) {
        self.run(&mut |_| false);
        let slot = self.free.pop().expect("nothing is in work");
        assert!(self.submit(slot, Does::Flush, 0, 0));
        self.run(&mut |_| false);
    }

    /// Compares the bytes of the whole disk with what this load wrote.
    ///
    /// # Panics
    /// At the first sector of its part that holds something else.
    pub fn holds(&self, disk: &[u8]) {
        for (sector, tag) in (self.start..).zip(&self.tags) {
            let at = usize::try_from(sector).expect("an index") * SECTOR;
            let want = if *tag == 0 { Found::Zero } else { Found::Tag(*tag) };
            assert_eq!(pattern::look(&disk[at..at + SECTOR], sector), want, "sector {sector}");
        }
    }

    fn overlaps_busy(&self, first: u64, count: u64) -> bool {
        self.busy.values().any(|w| first < w.first + w.count && w.first < first + count)
    }

    /// Submits one random request; false when the queue is full.
    fn submit_one(&mut self) -> bool {
        let Some(slot) = self.free.pop() else { return false };
        let sectors = self.tags.len() as u64;
        for _ in 0..8 {
            // Whole blocks mostly, as guests write; single sectors to meet the partial ones.
            let (unit, units_max) = if self.rng.one_in(4) { (1, 24) } else { (8, 16) };
            let count = (unit * (self.rng.below(units_max) + 1)).min(sectors);
            let first = self.rng.below(sectors - count + 1) / unit * unit;
            if self.overlaps_busy(first, count) {
                continue;
            }
            let does = match self.rng.below(20) {
                0..=8 => {
                    self.next_tag += 1;
                    Does::Write(self.next_tag)
                }
                9..=16 => Does::Read,
                17 | 18 => Does::Zero,
                _ => Does::Flush,
            };
            if self.submit(slot, does, first, count) {
                return true;
            }
            break;
        }
        self.free.push(slot);
        false
    }

    fn submit(&mut self, slot: u64, does: Does, first: u64, count: u64) -> bool {
        let bytes = count * SECTOR as u64;
        let offset = (self.start + first) * SECTOR as u64;
        let data = self.queue.data().0 + slot * REQUEST_MAX;
        // Two buffers, cut where no block ends.
        let cut = if bytes > 1024 { bytes / 2 / 512 * 512 } else { bytes };
        let span = |from: u64, to: u64| Span {
            offset: data + from,
            len: u32::try_from(to - from).expect("a request is small"),
        };
        let spans = [span(0, cut), span(cut, bytes)];
        let spans = if cut < bytes { &spans[..] } else { &spans[..1] };
        let ranges = [(offset, bytes)];
        let submitted = match does {
            Does::Read => {
                self.queue.arena().write(data, &vec![0xee; usize::try_from(bytes).expect("small")]);
                self.queue.submit(Op::Read, offset, spans, slot)
            }
            Does::Write(tag) => {
                self.queue.arena().write(data, &pattern::bytes(tag, self.start + first, count));
                self.queue.submit(Op::Write, offset, spans, slot)
            }
            Does::Zero if self.rng.one_in(2) => {
                let unmap = self.rng.one_in(2);
                self.queue.submit(Op::WriteZeroes { ranges: &ranges, unmap }, 0, &[], slot)
            }
            Does::Zero => self.queue.submit(Op::Discard(&ranges), 0, &[], slot),
            Does::Flush => self.queue.submit(Op::Flush, 0, &[], slot),
        };
        if submitted.is_err() {
            return false;
        }
        let count = if does == Does::Flush { 0 } else { count };
        self.busy.insert(slot, InWork { does, first, count });
        true
    }

    fn collect(&mut self) {
        while let Some(c) = self.queue.poll() {
            let work = self.busy.remove(&c.token).expect("each request completes once");
            assert_eq!(c.status, 0, "{work:?} fails");
            let range = usize::try_from(work.first).expect("an index")
                ..usize::try_from(work.first + work.count).expect("an index");
            match work.does {
                Does::Read => self.check_read(c.token, &work),
                Does::Write(tag) => self.tags[range].fill(tag),
                Does::Zero => self.tags[range].fill(0),
                Does::Flush => {}
            }
            self.free.push(c.token);
            self.done += 1;
        }
    }

    fn check_read(&self, slot: u64, work: &InWork) {
        let mut seen = [0; SECTOR];
        for i in 0..work.count {
            let at = self.queue.data().0 + slot * REQUEST_MAX + i * SECTOR as u64;
            self.queue.arena().read(at, &mut seen);
            let tag = self.tags[usize::try_from(work.first + i).expect("an index")];
            let want = if tag == 0 { Found::Zero } else { Found::Tag(tag) };
            let sector = self.start + work.first + i;
            let found = pattern::look(&seen, sector);
            assert_eq!(found, want, "sector {sector}, in a read of {work:?}");
        }
    }
}
