//! First writes in flight: which virtual extents are being given space, where, and which of their
//! blocks are busy.
//!
//! Invariants:
//! - While a claim on an extent is held, every first write to it goes to the same target extent, so
//!   a virtual extent never owns two extents of the segment.
//! - A block is busy for one holder at a time, from before its data is written until its record is
//!   published: a sub-block read-modify-write never loses a neighbour's write, and a punch never
//!   meets a write.
//! - A target is chosen, and looked at by a discard that empties the extent, under the shard lock.
//!   Lock order: core, then shard. Nobody waits for a claim while holding core.

use std::collections::HashMap;

use format::Result;
use format::units::{ExtentId, GuestExtent, index};
use parking_lot::{Condvar, Mutex};

const SHARDS: u64 = 64;

#[derive(Debug, Default)]
struct Held {
    target: Option<ExtentId>,
    busy: u16,
    holders: u32,
}

#[derive(Debug, Default)]
struct Shard {
    held: Mutex<HashMap<GuestExtent, Held>>,
    freed: Condvar,
}

/// The claims of one disk.
#[derive(Debug)]
pub struct Claims {
    shards: Box<[Shard]>,
}

/// Blocks of one virtual extent, claimed. Must be given to [`Claims::release`].
#[derive(Debug)]
#[must_use = "a claim that is not released blocks its blocks for ever"]
pub struct Claim {
    /// The virtual extent.
    pub extent: GuestExtent,
    mask: u16,
}

impl Default for Claims {
    fn default() -> Self {
        Claims { shards: (0..SHARDS).map(|_| Shard::default()).collect() }
    }
}

/// The busy mask of `count` blocks from index `first` on.
#[must_use]
pub fn mask(first: usize, count: usize) -> u16 {
    (first..first + count).fold(0, |mask, b| mask | (1 << b))
}

impl Claims {
    fn shard(&self, extent: GuestExtent) -> &Shard {
        &self.shards[index(extent.0 % SHARDS)]
    }

    /// Claims the blocks of `mask`, waiting until none of them is busy.
    pub fn claim(&self, extent: GuestExtent, mask: u16) -> Claim {
        let shard = self.shard(extent);
        let mut held = shard.held.lock();
        loop {
            let entry = held.entry(extent).or_default();
            if entry.busy & mask == 0 {
                entry.busy |= mask;
                entry.holders += 1;
                return Claim { extent, mask };
            }
            shard.freed.wait(&mut held);
        }
    }

    /// Claims the blocks of `mask` if none of them is busy.
    pub fn try_claim(&self, extent: GuestExtent, mask: u16) -> Option<Claim> {
        let mut held = self.shard(extent).held.lock();
        if held.get(&extent).is_some_and(|h| h.busy & mask != 0) {
            return None;
        }
        let entry = held.entry(extent).or_default();
        entry.busy |= mask;
        entry.holders += 1;
        Some(Claim { extent, mask })
    }

    /// The extent that the claimed blocks are to be written to: the one another holder chose, else
    /// the one `owned` finds in the map, else `fresh`. Returns false in the second place when
    /// `fresh` was not taken.
    ///
    /// # Errors
    /// What `owned` reports.
    pub fn target(
        &self,
        claim: &Claim,
        owned: impl FnOnce() -> Result<Option<ExtentId>>,
        fresh: Option<ExtentId>,
    ) -> Result<Option<ExtentId>> {
        let mut held = self.shard(claim.extent).held.lock();
        let entry = held.get_mut(&claim.extent).expect("the claim is held");
        if entry.target.is_none() {
            entry.target = owned()?.or(fresh);
        }
        Ok(entry.target)
    }

    /// True when a holder is about to write into `target`: whoever empties the extent must leave
    /// its space to that holder. Caller holds core and has changed the map already.
    #[must_use]
    pub fn holds(&self, extent: GuestExtent, target: ExtentId) -> bool {
        self.shard(extent).held.lock().get(&extent).is_some_and(|h| h.target == Some(target))
    }

    /// Ends a claim. For the last holder, returns the target, which the caller (who holds core)
    /// must retire if the map does not name it.
    pub fn release(&self, claim: Claim) -> Option<ExtentId> {
        let shard = self.shard(claim.extent);
        let mut held = shard.held.lock();
        let entry = held.get_mut(&claim.extent).expect("the claim is held");
        entry.busy &= !claim.mask;
        entry.holders -= 1;
        shard.freed.notify_all();
        if entry.holders > 0 {
            return None;
        }
        held.remove(&claim.extent).and_then(|h| h.target)
    }
}

#[cfg(test)]
impl Claims {
    /// Locks every shard, for a test of who needs none.
    pub(super) fn lock_all(&self) -> Vec<impl Sized + '_> {
        self.shards.iter().map(|shard| shard.held.lock()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_of_one_extent_share_its_target_and_the_last_gets_it_back() {
        let claims = Claims::default();
        let v = GuestExtent(7);
        let a = claims.claim(v, mask(0, 2));
        let b = claims.claim(v, mask(2, 1));
        assert!(claims.try_claim(v, mask(1, 1)).is_none());
        let e = Some(ExtentId(40));

        assert_eq!(claims.target(&a, || Ok(None), e).unwrap(), e);
        assert_eq!(claims.target(&b, || Ok(None), Some(ExtentId(41))).unwrap(), e);

        assert!(claims.holds(v, ExtentId(40)));
        assert_eq!(claims.release(a), None);
        assert_eq!(claims.release(b), e);
        assert!(!claims.holds(v, ExtentId(40)));
    }

    #[test]
    fn a_busy_block_makes_the_second_claim_wait() {
        let claims = Claims::default();
        let v = GuestExtent(7);
        let a = claims.claim(v, mask(3, 1));
        std::thread::scope(|s| {
            let waiter = s.spawn(|| claims.claim(v, mask(0, 16)));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiter.is_finished());

            claims.release(a);

            claims.release(waiter.join().unwrap());
        });
    }
}
