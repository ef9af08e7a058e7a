//! What becomes of a request: the steps between its start and its answer.
//!
//! Order of a write, and the crash it defends against: the transfers, then the publication, then,
//! in write-through mode, a flush, then the answer. A guest that was answered relies on the write
//! surviving the death of this process, and in write-through mode a power cut.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Error, Result};
use vhost_blk::blk::{Request, Status};

use super::slot::{Phase, Slot};
use super::{FileTraits, GATE_WAIT, HANDFUL, STROKE, STROKE_MAX, STROKE_REQUEST, Worker};
use crate::disk::plan::{Planned, WINDOW};
use crate::serve::hold;
use crate::serve::slow::{Errand, Outcome, Work};
use crate::store::buf::AlignedBuf;

/// What to do with a slot after a step.
enum Next {
    /// It waits for something that will ring.
    Wait,
    /// The request is done.
    Done,
    /// Wait so long, then start it again, before any request behind it.
    Later(Duration),
    /// The next window.
    Again,
}

impl Worker {
    fn slot(&mut self, number: u32) -> &mut Slot {
        &mut self.slots[number as usize]
    }

    /// Starts what can be started, until a stroke of work is done; returns whether there was any.
    pub(super) fn start_ready(&mut self) -> bool {
        self.wake_at = None;
        self.stroke = self.next_stroke;
        let mut any = false;
        while self.stroke > 0
            && let Some(number) = self.ready.pop_front()
        {
            match self.begin(number) {
                Ok(Next::Later(wait)) => {
                    self.ready.push_front(number);
                    self.wake_at = Some(self.now + wait);
                    return any;
                }
                next => self.follow(number, next),
            }
            any = true;
        }
        if self.stroke == 0 {
            self.next_stroke = (self.next_stroke * 2).min(STROKE_MAX);
        }
        any
    }

    fn follow(&mut self, number: u32, next: Result<Next>) {
        match next {
            Ok(Next::Wait) => {}
            Ok(Next::Done) => self.finish(number, Status::Ok),
            Ok(Next::Again | Next::Later(_)) => {
                self.slot(number).phase = Phase::Ready;
                self.ready.push_front(number);
            }
            Err(e) => self.failed(number, &e),
        }
    }

    /// Holds a request that the host cannot do now, answers any other failure.
    fn failed(&mut self, number: u32, error: &Error) {
        let (slot, volume) = (&mut self.slots[number as usize], &self.volume);
        slot.error = None;
        if hold::is_held(error) {
            slot.phase = Phase::Held;
            match std::mem::replace(&mut slot.held, true) {
                false => volume.begin_hold(error),
                true => volume.still_held(),
            }
            if self.held.is_empty() {
                self.retry_at = Some(self.now + hold::RETRY);
            }
            self.held.push(number);
            return;
        }
        volume.note_failure(error);
        tracing::debug!(disk = %volume.name(), %error, "a request failed");
        self.finish(number, Status::IoError);
    }

    /// Starts a request, or its next window.
    fn begin(&mut self, number: u32) -> Result<Next> {
        let slot = &mut self.slots[number as usize];
        if !slot.paid {
            if let Some(wait) = self.volume.throttle().take(slot.bytes()) {
                return Ok(Next::Later(wait));
            }
            slot.paid = true;
        }
        match slot.request {
            // Nothing to move: an empty request, or a write that was held at its flush.
            Request::Read { .. } | Request::Write { .. } if slot.rest().1 == 0 => {
                Ok(self.window_done(number, 0))
            }
            Request::Read { .. } => self.begin_window(number, false),
            Request::Write { .. } => self.begin_window(number, true),
            Request::GetId => {
                let serial = self.serial;
                self.slot(number).chain.fill(&serial);
                Ok(Next::Done)
            }
            Request::Flush => {
                self.flush(number, Phase::Durable);
                Ok(Next::Wait)
            }
            Request::Discard | Request::WriteZeroes => Ok(self.next_range(number)),
        }
    }

    fn begin_window(&mut self, number: u32, write: bool) -> Result<Next> {
        let Worker { disk, slots, files, lane, .. } = self;
        let lane = *lane;
        let Some(pass) = disk.enter(lane) else {
            return Ok(Next::Later(GATE_WAIT));
        };
        let slot = &mut slots[number as usize];
        let (offset, len) = slot.rest();
        let planned = if write {
            disk.plan_write(lane, offset, len, &mut slot.plan)
        } else {
            disk.plan_read(offset, len, &mut slot.plan).map(|()| Planned::Ready)
        };
        let planned = match planned {
            Ok(planned) => planned,
            Err(e) => {
                disk.leave(pass);
                return Err(e);
            }
        };
        let fits = planned == Planned::Ready
            && slot.lay_out(&mut |row| {
                let file = files[usize::from(row)].expect("the map names rows with files only");
                (file.memory_align, file.offset_align)
            });
        if !fits {
            disk.abandon(&mut slot.plan);
            disk.leave(pass);
            return Ok(self.go_slow(number));
        }
        let copied = slot
            .bytes_copied(&mut |row| files[usize::from(row)].is_some_and(|file| file.is_cached()));
        if copied > 0 {
            self.stroke = self.stroke.saturating_sub(copied + STROKE_REQUEST);
        }
        slot.pass = Some(pass);
        slot.phase = Phase::Moving;
        slot.moving = u32::try_from(slot.parts.len()).expect("a window has few transfers");
        let parts = slot.parts.len();
        for part in 0..parts {
            let moved = match write {
                true if self.inline.is_quick(self.now) => self.write_inline(number, part),
                false if self.is_alone() => self.read_inline(number, part),
                _ => self.start_transfer(number, part),
            };
            self.slot(number).note(moved);
        }
        Ok(match self.slot(number).moving {
            0 => self.window_moved(number)?,
            _ => Next::Wait,
        })
    }

    /// Whether what is started now is all that the stroke has for the ring.
    fn is_alone(&self) -> bool {
        (self.ready.is_empty() || self.stroke == 0) && self.ring.unsubmitted() == 0
    }

    /// Reads what the page cache has at once; hands the rest to the ring.
    fn read_inline(&mut self, number: u32, part: usize) -> Result<()> {
        let slot = &mut self.slots[number as usize];
        let at = slot.parts[part];
        if let Some(file) = self.files[usize::from(at.row)].filter(FileTraits::is_cached) {
            // SAFETY: as in `write_inline`.
            let fd = unsafe { BorrowedFd::borrow_raw(file.fd) };
            let bytes = self.inline.read(fd, at.offset, slot.buffers(part));
            if bytes > 0 && slot.advance(part, bytes) {
                slot.moving -= 1;
                return Ok(());
            }
        }
        self.start_transfer(number, part)
    }

    /// Writes through the page cache at once; hands to the ring what goes past it, or is left.
    fn write_inline(&mut self, number: u32, part: usize) -> Result<()> {
        let slot = &mut self.slots[number as usize];
        let at = slot.parts[part];
        let Some(file) = self.files[usize::from(at.row)].filter(FileTraits::is_cached) else {
            return self.start_transfer(number, part);
        };
        // SAFETY: the volume keeps the disk open, and the disk its files, as long as the worker is.
        let fd = unsafe { BorrowedFd::borrow_raw(file.fd) };
        match self.inline.write(fd, at.offset, slot.buffers(part), &mut self.now) {
            Ok(bytes) if bytes > 0 && slot.advance(part, bytes) => {
                slot.moving -= 1;
                Ok(())
            }
            // The ring finds out what is wrong with the rest.
            Ok(_) => self.start_transfer(number, part),
            Err(e) => {
                slot.moving -= 1;
                Err(e.on(format!("disk {}, segment {}", self.volume.name(), at.row)))
            }
        }
    }

    /// Hands one transfer, or what is left of it, to the ring. One that cannot be handed over
    /// counts as ended.
    fn start_transfer(&mut self, number: u32, part: usize) -> Result<()> {
        let slot = &mut self.slots[number as usize];
        let write = matches!(slot.request, Request::Write { .. });
        let at = slot.parts[part];
        let which = (number, u32::try_from(part).expect("a window has few transfers"));
        let handed = self.ring.transfer(write, at.row, at.offset, slot.buffers(part), which);
        handed.inspect_err(|_| slot.moving -= 1)?;
        let is_cached = self.files[usize::from(at.row)].is_some_and(|file| file.is_cached());
        if !is_cached && self.ring.unsubmitted() >= HANDFUL {
            // A ring that fails here fails at the end of the round as well, which ends the queue.
            let _ = self.ring.submit();
        }
        Ok(())
    }

    /// A transfer or sync of the ring completed.
    pub(super) fn moved(&mut self, number: u32, part: u32, result: i32) {
        let slot = &mut self.slots[number as usize];
        if slot.phase == Phase::Durable {
            return self.synced(number, result);
        }
        let part = part as usize;
        let outcome = match u64::try_from(result) {
            Ok(0) => Err(Error::corrupt("the file ends early")),
            Ok(bytes) if slot.advance(part, bytes) => Ok(true),
            Ok(_) => Ok(false),
            Err(_) => match -result {
                libc::EAGAIN | libc::EINTR => Ok(false),
                errno => Err(Error::from(std::io::Error::from_raw_os_error(errno))),
            },
        };
        match outcome {
            Ok(true) => slot.moving -= 1,
            Ok(false) => {
                let again = self.start_transfer(number, part);
                self.slot(number).note(again);
            }
            Err(e) => {
                let row = slot.parts[part].row;
                slot.moving -= 1;
                slot.note(Err(e.on(format!("disk {}, segment {row}", self.volume.name()))));
            }
        }
        if self.slot(number).moving == 0 {
            let next = self.window_moved(number);
            self.follow(number, next);
        }
    }

    /// All transfers of a window have ended.
    fn window_moved(&mut self, number: u32) -> Result<Next> {
        let (slot, disk) = (&mut self.slots[number as usize], &self.disk);
        if let Some(error) = slot.error.take() {
            disk.abandon(&mut slot.plan);
            slot.leave(disk);
            return Err(error);
        }
        let published = disk.publish_plan(&mut slot.plan);
        if matches!(published, Ok(false)) {
            self.flush(number, Phase::Room);
            return Ok(Next::Wait);
        }
        // Only now: a fork that finds nobody inside takes what is published for all there is.
        slot.leave(disk);
        published?;
        let bytes = slot.plan.bytes();
        if disk.should_commit() {
            self.volume.commit_early();
        }
        Ok(self.window_done(number, bytes))
    }

    fn window_done(&mut self, number: u32, bytes: u64) -> Next {
        let write_back = self.queue.write_back();
        let slot = self.slot(number);
        slot.done += bytes;
        if slot.rest().1 > 0 {
            return Next::Again;
        }
        if matches!(slot.request, Request::Write { .. }) && !write_back {
            self.flush(number, Phase::Durable);
            return Next::Wait;
        }
        Next::Done
    }

    /// Makes everything durable that completed before, then goes on as `phase` says. One sync by
    /// the ring does when no record waits for the journal.
    fn flush(&mut self, number: u32, phase: Phase) {
        let (slot, disk) = (&mut self.slots[number as usize], &self.disk);
        slot.phase = phase;
        let own = disk.map().own().get();
        let simple = phase == Phase::Durable && disk.is_writable() && disk.one_sync_suffices();
        // Inside the gate, so that a fork waits for it: the host tells of a failure once.
        if simple && let Some(pass) = disk.enter(self.lane) {
            slot.pass = Some(pass);
            if self.ring.sync(own, number).is_ok() {
                return;
            }
            slot.leave(disk);
        }
        self.send(number, 0, Work::Flush);
    }

    /// A sync by the ring completed. A failure is final: see [`crate::disk::Disk::sync_failed`].
    fn synced(&mut self, number: u32, result: i32) {
        let next = match -result {
            0 => Ok(Next::Done),
            errno => {
                let error = Error::from(std::io::Error::from_raw_os_error(errno));
                Err(self.disk.sync_failed(error))
            }
        };
        self.slots[number as usize].leave(&self.disk);
        self.follow(number, next);
    }

    /// The next range of a discard or write-zeroes goes to the slow lane.
    fn next_range(&mut self, number: u32) -> Next {
        let write_back = self.queue.write_back();
        let slot = self.slot(number);
        let next = usize::try_from(slot.done).expect("a list has few ranges");
        let Some(range) = slot.list.as_slice().get(next).copied() else {
            if write_back {
                return Next::Done;
            }
            self.flush(number, Phase::Durable);
            return Next::Wait;
        };
        let discard = matches!(slot.request, Request::Discard);
        slot.phase = Phase::Slow;
        let work = if discard { Work::Discard(range) } else { Work::WriteZeroes(range) };
        self.send(number, range.offset, work);
        Next::Wait
    }

    /// The next window of a read or write goes through a buffer of ours, on a thread that may wait.
    fn go_slow(&mut self, number: u32) -> Next {
        self.volume.lane(self.lane).went_slow();
        let slot = self.slot(number);
        let (offset, len) = slot.rest();
        let len = len.min(WINDOW);
        slot.phase = Phase::Slow;
        let work = if matches!(slot.request, Request::Write { .. }) {
            Work::Write(slot.copy_out(len))
        } else {
            Work::Read(AlignedBuf::zeroed(usize::try_from(len).expect("a window")))
        };
        self.send(number, offset, work);
        Next::Wait
    }

    fn send(&mut self, number: u32, offset: u64, work: Work) {
        let (lane, reply) = (self.lane, Arc::clone(&self.mailbox));
        self.volume.send(Errand { lane, offset, work, reply, token: number });
    }

    /// Takes what the slow lane is done with.
    pub(super) fn read_mail(&mut self) -> bool {
        if !self.mailbox.has_news() {
            return false;
        }
        let mut outcomes = std::mem::take(&mut self.outcomes);
        self.mailbox.take(&mut outcomes);
        for outcome in outcomes.drain(..) {
            let number = outcome.token;
            let next = self.returned(outcome);
            self.follow(number, next);
        }
        self.outcomes = outcomes;
        true
    }

    fn returned(&mut self, outcome: Outcome) -> Result<Next> {
        let number = outcome.token;
        let slot = &mut self.slots[number as usize];
        match slot.phase {
            Phase::Room => {
                if let Err(e) = outcome.result {
                    self.disk.abandon(&mut slot.plan);
                    slot.leave(&self.disk);
                    return Err(e);
                }
                self.window_moved(number)
            }
            Phase::Durable => outcome.result.map(|()| Next::Done),
            _ => {
                outcome.result?;
                if let Some(bytes) = &outcome.read {
                    slot.copy_in(bytes);
                }
                if matches!(slot.request, Request::Discard | Request::WriteZeroes) {
                    slot.done += 1;
                    return Ok(self.next_range(number));
                }
                let bytes = slot.rest().1.min(WINDOW);
                Ok(self.window_done(number, bytes))
            }
        }
    }

    /// Polls for a while, then sleeps until something rings.
    pub(super) fn idle(&mut self, stopping: bool) {
        self.next_stroke = STROKE;
        let can_take = !stopping && !self.free.is_empty();
        if let Some(time) = self.poller.time() {
            let end = Instant::now() + time;
            while Instant::now() < end {
                let found = (can_take && self.queue.has_work())
                    || self.ring.has_completions()
                    || self.mailbox.has_news();
                if found {
                    self.poller.polled(true);
                    self.volume.lane(self.lane).polled(true);
                    return;
                }
                std::hint::spin_loop();
            }
            self.poller.polled(false);
            self.volume.lane(self.lane).polled(false);
        }
        if can_take && self.queue.enable_kicks() {
            return;
        }
        let since = Instant::now();
        if let Err(error) = self.ring.wait(self.sleep_time(since)) {
            tracing::error!(queue = self.lane, %error, "a queue cannot sleep");
            std::thread::sleep(hold::RETRY);
        }
        self.poller.slept(since);
        self.queue.disable_kicks();
    }

    fn sleep_time(&self, now: Instant) -> Option<Duration> {
        let held = self.retry_at.filter(|_| !self.held.is_empty());
        let due = self.wake_at.into_iter().chain(held).min();
        due.map(|at| at.saturating_duration_since(now).max(Duration::from_micros(1)))
    }
}
