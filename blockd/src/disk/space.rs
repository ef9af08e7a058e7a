//! Space of the own segment: leases, growth, and the way back of what is no longer named.
//!
//! Order on the way back, and the crash it defends against:
//! 1. the record that no longer names the extent is durable — else a power cut brings back a map
//!    that names an extent which holds another's data by now;
//! 2. every request that began before has ended — else a late write lands in another's data;
//! 3. the punch is done — else it wipes what the next owner wrote (the loss of a queued punch).
//!
//! Tests: `crash_points::reuse_before_durable_is_caught`, `discard_returns_space`.

use std::ops::RangeInclusive;

use format::limits::{BLOCK, EXTENT};
use format::space::ExtentRun;
use format::units::ExtentId;
use format::{Kind, Result};
use parking_lot::MutexGuard;

use super::claims::{Claim, mask};
use super::{BlockPunch, Core, Disk};

/// Extents that a queue takes at once: 4 MiB.
const LEASE_EXTENTS: u64 = 64;
/// The file grows by a quarter to a half of what it has, but by at least 16 MiB and at most
/// 1 GiB: each step waits for the writes under way, and every first write waits for the step.
const GROW_EXTENTS: RangeInclusive<u64> = 256..=16_384;

impl Disk {
    /// Takes one extent from the lease of a queue.
    pub(super) fn take_extent(&self, lane: usize) -> Result<ExtentId> {
        let mut lease = self.lane(lane).lock();
        if lease.count == 0 {
            let mut core = self.core.lock();
            *lease = core.space.take_lease(LEASE_EXTENTS)?;
            if let Err(e) = self.grow(&mut core, lease.first.0 + lease.count) {
                let run =
                    std::mem::replace(&mut *lease, ExtentRun { first: ExtentId(0), count: 0 });
                (0..run.count).for_each(|i| core.space.give_back(run.first.plus(i)));
                return Err(e);
            }
        }
        let extent = lease.first;
        lease.first = extent.next();
        lease.count -= 1;
        Ok(extent)
    }

    /// Makes the file long enough for `extents` extents. The length is durable with the next sync,
    /// which comes before anything durable counts on it.
    pub(super) fn grow(&self, core: &mut Core, extents: u64) -> Result<()> {
        if extents > core.grown {
            let (least, most) = (*GROW_EXTENTS.start(), *GROW_EXTENTS.end());
            let to = extents.next_multiple_of((extents / 4).next_power_of_two().clamp(least, most));
            self.file.set_len(to * EXTENT)?;
            core.grown = to;
        }
        Ok(())
    }

    /// The core lock with room for `records` records in the tail; commits if there is none.
    pub(super) fn make_room(&self, records: u64) -> Result<MutexGuard<'_, Core>> {
        loop {
            let core = self.core.lock();
            if core.tail.room() >= records {
                return Ok(core);
            }
            drop(core);
            self.flush()?;
        }
    }

    /// Ends a claim; the last holder's target goes back if the map does not name it.
    pub(super) fn release(&self, core: &mut Core, claim: Claim) {
        let extent = claim.extent;
        if let Some(target) = self.claims.release(claim)
            && self.map.own_extent(extent).is_ok_and(|own| own != Some(target))
        {
            self.retire(core, target);
        }
    }

    /// Nothing names the extent from the next record on.
    pub(super) fn retire(&self, core: &mut Core, extent: ExtentId) {
        core.space.retire(extent, core.tail.next());
    }

    /// Moves what it can along the way back. Called after each commit; never waits.
    pub(super) fn reclaim(&self) {
        let _one = self.reclaiming.lock();
        let (ready, punches) = {
            let mut core = self.core.lock();
            let committed = core.tail.head();
            let tag = self.gate.epoch();
            let durable = core.space.take_durable(committed);
            core.limbo.extend(durable.into_iter().map(|e| (tag, e)));
            self.gate.try_advance();
            self.gate.try_advance();
            let passed = core.limbo.iter().take_while(|(tag, _)| self.gate.passed(*tag)).count();
            let mut ready: Vec<ExtentId> = core.limbo.drain(..passed).map(|(_, e)| e).collect();
            ready.sort_unstable();
            (ready, std::mem::take(&mut core.punches))
        };
        for run in runs(&ready) {
            self.punch(run.first.file_offset(), run.count * EXTENT);
        }
        let mut core = self.core.lock();
        ready.into_iter().for_each(|e| core.space.give_back(e));
        drop(core);
        punches.into_iter().for_each(|p| self.punch_blocks(p));
    }

    /// Gives back the host space of zeroed blocks in an extent that stays. The claim keeps first
    /// writes away until the punch is done; a block that was written again keeps its data.
    fn punch_blocks(&self, p: BlockPunch) {
        let Some(claim) = self.claims.try_claim(p.extent, mask(p.first, p.count)) else {
            return;
        };
        // With a target, so that whoever empties the extent meanwhile leaves it alone until the
        // punch is done.
        let owned = self.claims.target(&claim, || self.map.own_extent(p.extent), None);
        let owned = owned.is_ok_and(|e| e == Some(p.target));
        let vector = self.map.vector(p.extent);
        let still =
            vector.is_ok_and(|v| v[p.first..p.first + p.count].iter().all(|b| b.reads_zero()));
        if still && owned {
            self.punch(p.target.block(p.first).file_offset(), p.count as u64 * BLOCK);
        }
        let mut core = self.core.lock();
        self.release(&mut core, claim);
    }

    /// Gives host space back. A host that cannot, or fails to, keeps its space for now: the range
    /// is unused either way, so nothing depends on it and no flush fails for it. Told once: a guest
    /// that discards on such a host would fill the log.
    pub(super) fn punch(&self, offset: u64, len: u64) {
        let Err(error) = self.file.punch(offset, len) else { return };
        if error.kind() != Kind::Unsupported && self.punch_failed.is_first() {
            tracing::warn!(disk = %self.object(), %error, "space was not given back");
        }
    }
}

/// Neighbouring extents as runs; `extents` is sorted.
fn runs(extents: &[ExtentId]) -> Vec<ExtentRun> {
    let mut runs: Vec<ExtentRun> = Vec::new();
    for e in extents {
        match runs.last_mut() {
            Some(run) if run.first.plus(run.count) == *e => run.count += 1,
            _ => runs.push(ExtentRun { first: *e, count: 1 }),
        }
    }
    runs
}
