//! Requests in two halves, for a caller that moves the data itself: a plan says where the bytes of
//! a request lie, and after the caller has moved them, a first write is published.
//!
//! The halves are those of [`Disk::read`] and [`Disk::write`]; what differs is that nothing here
//! waits for another request. Where a wait would be needed (a busy block, a partial block that must
//! be completed from older content) the answer is [`Planned::Slow`], and the caller hands the
//! request to a thread that may wait.
//!
//! Contract, and the crash it defends against:
//! - A [`Pass`] is held from before the plan is made until the last transfer has ended and the plan
//!   is published or abandoned: else space that a transfer still touches is given to another
//!   extent, and a disk is frozen before a write is recorded that its guest takes for complete.
//! - [`Disk::publish_plan`] is called only after every transfer of the plan succeeded: a record
//!   that a killed process leaves must not name a block whose data never arrived.
//!
//! Test: `tests/tests/vhost_user.rs` (`killed_under_load_…`), `tests/tests/hot_path.rs`, and below.

use std::time::Duration;

use format::entry::BlockState;
use format::journal::Record;
use format::limits::{BLOCK, EXTENT};
use format::units::{ExtentId, GuestBlock, GuestExtent, index};
use format::{Context, Error, Kind, Result};

use super::claims::{Claim, mask};
use super::gate::{Closed, Inside, Pass};
use super::{Disk, blocks_of};
use crate::store::RawFile;

/// Bytes that one plan covers at most.
pub const WINDOW: u64 = 1 << 20;
/// Transfers that one plan has at most.
pub const TRANSFERS_MAX: usize = 64;

/// Where the bytes of a transfer are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: they read as zeroes.
    Zeroes,
    /// In the file of a row of the segment table, at this byte offset.
    File {
        /// Row of the segment table.
        row: u16,
        /// Byte offset in the file.
        offset: u64,
    },
}

/// Neighbouring bytes of a request that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Where they are.
    pub place: Place,
    /// Number of bytes.
    pub len: u64,
}

impl Transfer {
    /// Its last `left` bytes.
    #[must_use]
    pub(super) fn after(self, left: u64) -> Self {
        let place = match self.place {
            Place::Zeroes => Place::Zeroes,
            Place::File { row, offset } => Place::File { row, offset: offset + self.len - left },
        };
        Transfer { place, len: left }
    }
}

/// An extent that a first write is giving space to.
#[derive(Debug)]
struct Part {
    claim: Claim,
    target: ExtentId,
    block: GuestBlock,
    count: usize,
}

/// A reusable plan. One that has been filled by [`Disk::plan_write`] must go to
/// [`Disk::publish_plan`] or [`Disk::abandon`]: it may hold claims.
#[derive(Debug)]
pub struct Plan {
    transfers: Vec<Transfer>,
    parts: Vec<Part>,
    bytes: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Plan {
            transfers: Vec::with_capacity(TRANSFERS_MAX),
            parts: Vec::with_capacity(index(WINDOW / EXTENT) + 1),
            bytes: 0,
        }
    }
}

/// What came of planning a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planned {
    /// Move the bytes of the plan, then publish.
    Ready,
    /// Somebody would have to wait: use [`Disk::write`] on a thread that may. Nothing is held.
    Slow,
}

impl Plan {
    /// The transfers, in the order of the request's bytes.
    #[must_use]
    pub fn transfers(&self) -> &[Transfer] {
        &self.transfers
    }

    /// Bytes from the start of the planned range that the plan covers.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn clear(&mut self) {
        debug_assert!(self.parts.is_empty(), "claims of an earlier plan are held");
        self.transfers.clear();
        self.bytes = 0;
    }

    /// Adds bytes to the plan; false when it is full.
    fn add(&mut self, place: Place, len: u64) -> bool {
        if let Some(last) = self.transfers.last_mut() {
            let follows = match (last.place, place) {
                (Place::Zeroes, Place::Zeroes) => true,
                (Place::File { row: a, offset: x }, Place::File { row: b, offset: y }) => {
                    a == b && x + last.len == y
                }
                _ => false,
            };
            if follows {
                last.len += len;
                self.bytes += len;
                return true;
            }
        }
        if self.transfers.len() == TRANSFERS_MAX {
            return false;
        }
        self.transfers.push(Transfer { place, len });
        self.bytes += len;
        true
    }
}

/// End of the window that begins at `offset`.
fn window_end(offset: u64, len: u64) -> u64 {
    ((offset / WINDOW + 1) * WINDOW).min(offset + len)
}

impl Disk {
    /// Lets a request of queue `lane` in; `None` while the disk is closed to requests for a moment.
    #[must_use]
    pub fn enter(&self, lane: usize) -> Option<Pass> {
        self.gate.try_enter(lane)
    }

    /// Lets a request out that came in with `pass`.
    pub fn leave(&self, pass: Pass) {
        self.gate.leave(pass);
    }

    /// Says where to read the first bytes of `offset..offset + len`, both multiples of 512. Takes
    /// no lock and allocates nothing.
    ///
    /// # Errors
    /// As [`Disk::read`].
    pub fn plan_read(&self, offset: u64, len: u64, plan: &mut Plan) -> Result<()> {
        plan.clear();
        self.check_alive()?;
        self.check_range(offset, len)?;
        self.resolve_into(offset, window_end(offset, len), plan, &mut |_| true)
            .map_err(|e| e.within("read", self.object()))
            .map(|_| ())
    }

    /// Says where to write the first bytes of `offset..offset + len`, both multiples of 512.
    /// Allocates nothing and takes no lock when every block lies in the own segment already.
    ///
    /// # Errors
    /// As [`Disk::write`]; nothing is held then.
    pub fn plan_write(
        &self,
        lane: usize,
        offset: u64,
        len: u64,
        plan: &mut Plan,
    ) -> Result<Planned> {
        plan.clear();
        self.check_writable()?;
        self.check_range(offset, len)?;
        let end = window_end(offset, len);
        let own = self.map.own();
        let mut is_own =
            |state| matches!(state, BlockState::Data { segment, .. } if segment == own);
        let outcome = match self.resolve_into(offset, end, plan, &mut is_own) {
            Ok(true) => Ok(Planned::Ready),
            Ok(false) => self.plan_first_write(lane, offset, end, plan),
            Err(e) => Err(e),
        };
        outcome.map_err(|e| e.within("write", self.object()))
    }

    /// Fills `plan` with the places of a range as long as `wanted` says yes; false when it said no.
    fn resolve_into(
        &self,
        offset: u64,
        end: u64,
        plan: &mut Plan,
        wanted: &mut dyn FnMut(BlockState) -> bool,
    ) -> Result<bool> {
        let (first, count) = blocks_of(offset, end - offset);
        let (mut all, mut room) = (true, true);
        self.map.resolve(first, count, &mut |piece| {
            all = all && wanted(piece.state);
            if !all || !room {
                return Ok(());
            }
            let from = piece.block.offset().0.max(offset);
            let to = (piece.block.offset().0 + piece.count * BLOCK).min(end);
            let place = match piece.state {
                BlockState::Hole | BlockState::Zero => Place::Zeroes,
                BlockState::Data { segment, block } => {
                    let base = self.row(segment.get())?.base.file_offset();
                    let inside = from - piece.block.offset().0;
                    let offset = base + block.file_offset() + inside;
                    Place::File { row: segment.get(), offset }
                }
            };
            room = plan.add(place, to - from);
            Ok(())
        })?;
        Ok(all)
    }

    fn plan_first_write(
        &self,
        lane: usize,
        offset: u64,
        end: u64,
        plan: &mut Plan,
    ) -> Result<Planned> {
        plan.clear();
        // The last block of the disk may be a partial one: it is whole as far as the disk goes.
        let ends_whole = end.is_multiple_of(BLOCK) || end == self.size();
        if !offset.is_multiple_of(BLOCK) || !ends_whole {
            return Ok(Planned::Slow);
        }
        let outcome = self.claim_parts(lane, offset, end, plan);
        if !matches!(outcome, Ok(Planned::Ready)) {
            self.abandon(plan);
        }
        outcome
    }

    fn claim_parts(&self, lane: usize, offset: u64, end: u64, plan: &mut Plan) -> Result<Planned> {
        let mut at = offset;
        while at < end {
            let extent = GuestExtent(at / EXTENT);
            let stop = ((extent.0 + 1) * EXTENT).min(end);
            let (block, count) = blocks_of(at, stop - at);
            let count = index(count);
            // Before anything is recorded: a record about a damaged leaf could never leave the
            // journal.
            self.map.check_changes(block, count as u64)?;
            let Some(claim) = self.claims.try_claim(extent, mask(block.in_extent(), count)) else {
                return Ok(Planned::Slow);
            };
            // In the plan whatever happens next, so that it is released.
            plan.parts.push(Part { claim, target: ExtentId(0), block, count });
            let part = plan.parts.last_mut().expect("just pushed");
            part.target = self.target(lane, &part.claim)?;
            let offset = part.target.file_offset() + at % EXTENT;
            plan.add(Place::File { row: self.map.own().get(), offset }, stop - at);
            at = stop;
        }
        Ok(Planned::Ready)
    }

    /// Publishes a first write whose transfers have all succeeded, and ends its claims. False, with
    /// nothing changed, when the tail has no room: flush, then try again.
    ///
    /// # Errors
    /// `Corrupt` in a damaged range; the claims have ended then, too.
    pub fn publish_plan(&self, plan: &mut Plan) -> Result<bool> {
        if plan.parts.is_empty() {
            return Ok(true);
        }
        let mut core = self.core.lock();
        if core.tail.room() < plan.parts.len() as u64 {
            return Ok(false);
        }
        let mut outcome = Ok(());
        for part in plan.parts.drain(..) {
            let set = self.publish_part(&mut core, part.block, part.count, part.target);
            outcome = outcome.and(set);
            self.release(&mut core, part.claim);
        }
        outcome.context("write", || self.object()).map(|()| true)
    }

    /// Record, then entry: a reader that saw the entry has seen data that a kill must keep.
    pub(super) fn publish_part(
        &self,
        core: &mut super::Core,
        block: GuestBlock,
        count: usize,
        target: ExtentId,
    ) -> Result<()> {
        let first = target.block(block.in_extent());
        core.tail.append(&Record::Map { block, count: count as u64, target: first });
        core.dirty.insert(block.extent().leaf());
        self.map.set_own(block, count, target).map(|_| ())
    }

    /// Whether so many records wait for the journal that a commit should be made now, before first
    /// writes have to wait for room: half of what fits. Not sooner, because a commit that no guest
    /// asked for writes out data that the host would otherwise gather in its page cache; not later,
    /// because the other half is what first writes go on in while the commit runs. Two loads.
    #[must_use]
    pub fn should_commit(&self) -> bool {
        self.tail.room() < self.tail.capacity() / 2
    }

    /// Lets no request in from now on, and waits for nobody: [`Disk::pause`] or [`Disk::let_in`]
    /// must follow.
    pub fn shut(&self) {
        self.gate.shut();
    }

    /// Lets requests in after [`Disk::shut`].
    pub fn let_in(&self) {
        self.gate.open();
    }

    /// Lets no request in, and waits until those in work have ended, for as long as `limit`.
    ///
    /// # Errors
    /// `Busy` when one takes longer; the disk goes on.
    pub fn pause(&self, limit: Duration) -> Result<Closed<'_>> {
        self.gate.close_within(limit).ok_or_else(|| {
            Error::new(Kind::Busy, "requests in work did not end in time")
                .on(self.object())
                .hint("try again when the host is less busy")
        })
    }

    /// True when the disk goes on elsewhere: requests must be made there.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.gate.has_left()
    }

    pub(super) fn inside(&self, lane: usize) -> Result<Inside<'_>> {
        let left = || Error::new(Kind::Failed, "it goes on in another segment").on(self.object());
        self.gate.enter(lane).ok_or_else(left)
    }

    /// Ends this opening for a reason outside of the disk: what completed is in its tail.
    pub fn give_up(&self, error: Error) {
        self.fail(error);
    }

    /// Ends the claims of a plan that is not published: its write failed.
    pub fn abandon(&self, plan: &mut Plan) {
        if !plan.parts.is_empty() {
            let mut core = self.core.lock();
            plan.parts.drain(..).for_each(|part| self.release(&mut core, part.claim));
        }
        plan.clear();
    }

    /// The files of all rows of the segment table, for a caller that moves bytes itself.
    ///
    /// # Errors
    /// `Unsupported` when a file is not one of the host.
    pub fn raw_files(&self) -> Result<Vec<Option<RawFile<'_>>>> {
        let foreign = || {
            Error::new(Kind::Unsupported, "its store has no files of the host").on(self.object())
        };
        let mut files = Vec::with_capacity(self.rows.len());
        for row in &self.rows {
            let raw = row.as_ref().map(|row| row.file.raw().ok_or_else(foreign));
            files.push(raw.transpose()?);
        }
        Ok(files)
    }

    /// Whether one sync of the own file makes everything durable that has completed: true when no
    /// record waits for the journal, and no other file is still being frozen. A caller that syncs
    /// by itself must report a failure to [`Disk::sync_failed`]. Takes no lock.
    #[must_use]
    pub fn one_sync_suffices(&self) -> bool {
        // In this order: a record that completed before is below `next`, and what is below the head
        // by then is durable.
        let next = self.tail.next();
        let all_durable = self.tail.head() == next && self.ground.is_settled();
        all_durable && self.check_alive().is_ok()
    }

    /// A sync of the own file failed: this opening of the disk is at its end.
    pub fn sync_failed(&self, error: Error) -> Error {
        self.fail(error.tried("sync"))
    }

    /// Whether the disk was opened for writing.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use format::superblock::Mode;
    use format::units::OwnerEpoch;
    use uuid::Uuid;

    use super::*;
    use crate::disk::Options;
    use crate::disk::create::NewSegment;
    use crate::segment::{Sealed, Segments, new_name};
    use crate::store::sim::SimStore;
    use crate::store::{Access, Store};

    struct NoParents;

    impl Segments for NoParents {
        fn sealed(&self, _: Uuid) -> Result<Arc<Sealed>> {
            Err(Error::new(Kind::ParentMissing, "there are no parents here"))
        }
    }

    /// A disk whose first extents are written and flushed.
    fn disk() -> Disk {
        let (store, segment) = (SimStore::new(), Uuid::from_u128(1));
        let new = NewSegment {
            store: Uuid::from_u128(2),
            segment,
            disk: segment,
            name: "disk".into(),
            virtual_size: 8 << 20,
            journal_extents: 16,
            created: 0,
            owner_epoch: OwnerEpoch(1),
            mode: Mode::Persistent,
            base: Uuid::nil(),
        };
        new.write(&store, None).unwrap();
        let file = store.open(&new_name(segment), Access::Write).unwrap();
        let disk = Disk::open(file, &NoParents, &Options::default()).unwrap();
        disk.write(0, 0, &[7; 3 * 65536]).unwrap();
        disk.flush().unwrap();
        disk
    }

    /// Every lock of the disk is held by somebody else meanwhile.
    #[test]
    fn reads_and_overwrites_wait_for_no_lock() {
        let disk = disk();
        let work = || {
            let (mut plan, mut buf) = (Plan::default(), [0; 8192]);
            for offset in [0, 512, 60 << 10, 1 << 20] {
                let pass = disk.enter(0).expect("the gate is open");
                disk.plan_read(offset, 8192, &mut plan).unwrap();
                disk.leave(pass);
                disk.read(0, offset, &mut buf).unwrap();
            }
            for offset in [0, 512, 60 << 10] {
                let pass = disk.enter(0).expect("the gate is open");
                let planned = disk.plan_write(0, offset, 8192, &mut plan).unwrap();
                assert_eq!((planned, plan.parts.len()), (Planned::Ready, 0));
                disk.leave(pass);
                assert!(disk.publish_plan(&mut plan).unwrap());
                disk.write(0, offset, &buf).unwrap();
            }
            assert!(disk.one_sync_suffices() && !disk.should_commit());
        };
        std::thread::scope(|s| {
            let _rare = (disk.reclaiming.lock(), disk.checkpoint.lock(), disk.commit.lock());
            let _leases: Vec<_> = disk.leases.iter().map(|lease| lease.lock()).collect();
            let _core = (disk.core.lock(), disk.tickets.lock(), disk.failure.lock());
            let _claims = disk.claims.lock_all();
            let worker = s.spawn(work);
            let until = Instant::now() + Duration::from_secs(20);
            while !worker.is_finished() {
                assert!(Instant::now() < until, "it waits for a lock");
                std::thread::sleep(Duration::from_millis(1));
            }
            worker.join().unwrap();
        });
    }

    /// Story: a sync that failed for want of space was taken for a write that did, and the flush of
    /// a guest was held for what cannot succeed any more.
    #[test]
    fn a_failed_sync_is_final_whatever_it_says() {
        let disk = disk();
        let error = disk.sync_failed(Error::new(Kind::NoSpace, "no space left"));
        assert_eq!(error.kind(), Kind::Failed);
        assert_eq!(disk.flush().unwrap_err().kind(), Kind::Failed);
    }

    /// Story: whoever asked for the facts of a disk held `core` while it waited for the lock of the
    /// journal. A commit held that and waited for `core`: `disk show` under load stopped the
    /// daemon.
    #[test]
    fn facts_are_gathered_one_lock_at_a_time() {
        let disk = disk();
        std::thread::scope(|s| {
            let commit = disk.commit.lock();
            let asked = s.spawn(|| disk.facts().unwrap());
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(2));
                let core = disk.core.try_lock_for(Duration::from_secs(5));
                assert!(core.is_some(), "it is held by who waits for the journal");
            }
            drop(commit);
            asked.join().unwrap();
        });
    }
}
