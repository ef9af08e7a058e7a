//! Space in a segment file: which extents are used, and when a used one may be used again.
//!
//! None of this is stored: it is rebuilt from the checked map at open, so the allocator can never
//! hand out what the map names. Invariants:
//! - An extent is free only when nothing durable names it, no request that might still touch it is
//!   under way, and its punch is done: used → pending → punching → free.
//! - Map pages live in extents of their own; a page is reused only when its extent's mask says
//!   free.
//!
//! The caller says when a pending extent's record is durable and when the requests that could touch
//! it have ended.

use std::collections::{BTreeMap, VecDeque};

use crate::limits::{BLOCKS_PER_EXTENT, SEGMENT_EXTENTS_MAX};
use crate::units::{ExtentId, PageNo, Seq, index};
use crate::{Error, Kind, Result};

/// A run of extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentRun {
    /// First extent.
    pub first: ExtentId,
    /// Number of extents.
    pub count: u64,
}

/// The extents of one segment file.
#[derive(Debug)]
pub struct SpaceMap {
    start: u64,
    used: Vec<u64>,
    hint: u64,
    used_count: u64,
    pending: VecDeque<(Seq, ExtentId)>,
    pages: BTreeMap<ExtentId, u16>,
}

impl SpaceMap {
    /// A map in which every extent from `start` on is free.
    #[must_use]
    pub fn new(start: ExtentId) -> Self {
        SpaceMap {
            start: start.0,
            used: Vec::new(),
            hint: start.0,
            used_count: 0,
            pending: VecDeque::new(),
            pages: BTreeMap::new(),
        }
    }

    fn bit(&self, extent: u64) -> bool {
        self.used.get(index(extent / 64)).is_some_and(|w| w & (1 << (extent % 64)) != 0)
    }

    fn set(&mut self, extent: u64, to: bool) {
        let word = index(extent / 64);
        if word >= self.used.len() {
            self.used.resize(word + 1, 0);
        }
        if to {
            self.used[word] |= 1 << (extent % 64);
            self.used_count += 1;
        } else {
            self.used[word] &= !(1 << (extent % 64));
            self.used_count -= 1;
        }
    }

    /// Notes that something names `extent`. For rebuilding and checking.
    ///
    /// # Errors
    /// `Corrupt` when it lies before the data area, past the largest segment, or is used already.
    pub fn claim(&mut self, extent: ExtentId) -> Result<()> {
        if extent.0 < self.start || extent.0 >= SEGMENT_EXTENTS_MAX {
            return Err(Error::corrupt(format!("extent {extent} lies outside the data area")));
        }
        if self.bit(extent.0) {
            return Err(Error::corrupt(format!("extent {extent} is used twice")));
        }
        self.set(extent.0, true);
        Ok(())
    }

    /// Notes that something names `count` pages from `page` on.
    ///
    /// # Errors
    /// `Corrupt` when a page is used already, or its extent holds data or lies outside.
    pub fn claim_pages(&mut self, page: PageNo, count: u64) -> Result<()> {
        for p in (page.0..page.0 + count).map(PageNo) {
            let bit = 1 << p.in_extent();
            if !self.pages.contains_key(&p.extent()) {
                self.claim(p.extent())?;
            }
            let mask = self.pages.entry(p.extent()).or_default();
            if *mask & bit != 0 {
                return Err(Error::corrupt(format!("page {p} is used twice")));
            }
            *mask |= bit;
        }
        Ok(())
    }

    /// True when nothing names the extent.
    #[must_use]
    pub fn is_free(&self, extent: ExtentId) -> bool {
        !self.bit(extent.0)
    }

    /// Extents in use, pending and punching ones included.
    #[must_use]
    pub fn used_count(&self) -> u64 {
        self.used_count
    }

    /// First extent from which on everything is free.
    #[must_use]
    pub fn end(&self) -> ExtentId {
        let last = self.used.iter().rposition(|w| *w != 0);
        let end = last.map_or(0, |i| i as u64 * 64 + 64 - u64::from(self.used[i].leading_zeros()));
        ExtentId(end.max(self.start))
    }

    /// Takes the first free run, up to `count_max` extents long.
    ///
    /// # Errors
    /// `NoSpace` when the segment has reached its largest size.
    pub fn take_lease(&mut self, count_max: u64) -> Result<ExtentRun> {
        let first = self.first_free(self.hint)?;
        let mut count = 0;
        while count < count_max && first + count < SEGMENT_EXTENTS_MAX && !self.bit(first + count) {
            self.set(first + count, true);
            count += 1;
        }
        self.hint = first + count;
        Ok(ExtentRun { first: ExtentId(first), count })
    }

    /// Takes exactly `count` extents in one run (at the end, if no gap is long enough).
    ///
    /// # Errors
    /// `NoSpace` when the segment has reached its largest size.
    pub fn take_run(&mut self, count: u64) -> Result<ExtentRun> {
        let mut first = self.first_free(self.hint)?;
        let mut len = 0;
        while len < count {
            if first + len >= SEGMENT_EXTENTS_MAX {
                return Err(full());
            }
            if self.bit(first + len) {
                first = self.first_free(first + len)?;
                len = 0;
            } else {
                len += 1;
            }
        }
        (first..first + count).for_each(|e| self.set(e, true));
        Ok(ExtentRun { first: ExtentId(first), count })
    }

    fn first_free(&self, from: u64) -> Result<u64> {
        let mut at = from;
        while at < SEGMENT_EXTENTS_MAX {
            let word = self.used.get(index(at / 64)).copied().unwrap_or(0) | ((1 << (at % 64)) - 1);
            if word != u64::MAX {
                return Ok(at / 64 * 64 + u64::from(word.trailing_ones()));
            }
            at = (at / 64 + 1) * 64;
        }
        Err(full())
    }

    /// Gives back an extent that was never published.
    pub fn give_back(&mut self, extent: ExtentId) {
        self.set(extent.0, false);
        self.hint = self.hint.min(extent.0);
    }

    /// The extent is no longer named once the record before `seq` is durable.
    pub fn retire(&mut self, extent: ExtentId, seq: Seq) {
        self.pending.push_back((seq, extent));
    }

    /// Pending extents whose records are durable: all with a sequence number up to `durable`. They
    /// stay used until [`Self::give_back`], which the caller calls after the punch.
    pub fn take_durable(&mut self, durable: Seq) -> Vec<ExtentId> {
        let mut ready = Vec::new();
        self.pending.retain(|(seq, extent)| {
            let durable = *seq <= durable;
            if durable {
                ready.push(*extent);
            }
            !durable
        });
        ready
    }

    /// Extents that wait for their record to become durable.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// Takes `count` metadata pages in one run inside one extent.
    ///
    /// # Errors
    /// `NoSpace` when the segment has reached its largest size.
    pub fn take_pages(&mut self, count: u8) -> Result<PageNo> {
        let want = u16::MAX >> (16 - u32::from(count.clamp(1, 16)));
        for (extent, mask) in &mut self.pages {
            let fits = (0..=16 - count).find(|s| *mask & (want << s) == 0);
            if let Some(s) = fits {
                *mask |= want << s;
                return Ok(extent.first_page().plus(s.into()));
            }
        }
        let extent = self.take_lease(1)?.first;
        self.pages.insert(extent, want);
        Ok(extent.first_page())
    }

    /// Notes that `count` pages from `page` on are in use, all in one extent that was taken before
    /// and holds no data.
    pub fn hold_pages(&mut self, page: PageNo, count: u8) {
        let mask = self.pages.entry(page.extent()).or_default();
        (0..count.into()).for_each(|i| *mask |= 1 << page.plus(i).in_extent());
    }

    /// Gives back metadata pages that nothing durable names. Returns the extent when all of its
    /// pages are free now: it stays used until the caller has punched it and calls
    /// [`Self::give_back`].
    pub fn give_back_pages(&mut self, page: PageNo, count: u64) -> Option<ExtentId> {
        let extent = page.extent();
        let mask = self.pages.get_mut(&extent)?;
        for p in page.0..page.0 + count {
            *mask &= !(1 << PageNo(p).in_extent());
        }
        if *mask != 0 {
            return None;
        }
        self.pages.remove(&extent);
        Some(extent)
    }
}

fn full() -> Error {
    Error::new(Kind::NoSpace, "the segment has reached its largest size")
}

/// Extents that `pages` pages take when they start at an extent boundary.
#[must_use]
pub fn extents_for_pages(pages: u64) -> u64 {
    pages.div_ceil(BLOCKS_PER_EXTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_fill_gaps_first_and_runs_skip_gaps_that_are_too_short() {
        let mut s = SpaceMap::new(ExtentId(20));
        s.claim(ExtentId(22)).unwrap();
        assert_eq!(s.take_run(4).unwrap().first, ExtentId(23));
        assert_eq!(s.take_lease(16).unwrap(), ExtentRun { first: ExtentId(20), count: 2 });
        assert_eq!(s.take_lease(3).unwrap(), ExtentRun { first: ExtentId(27), count: 3 });
        assert_eq!((s.used_count(), s.end()), (10, ExtentId(30)));

        s.give_back(ExtentId(21));

        assert_eq!(s.take_lease(9).unwrap(), ExtentRun { first: ExtentId(21), count: 1 });
    }

    #[test]
    fn a_retired_extent_stays_used_until_durable_and_given_back() {
        let mut s = SpaceMap::new(ExtentId(0));
        let e = s.take_lease(1).unwrap().first;
        s.retire(e, Seq(10));

        assert!(s.take_durable(Seq(9)).is_empty());
        assert_eq!(s.take_durable(Seq(10)), vec![e]);
        assert!(!s.is_free(e));

        s.give_back(e);
        assert!(s.is_free(e));
    }

    #[test]
    fn double_use_and_places_outside_are_corrupt() {
        let mut s = SpaceMap::new(ExtentId(20));
        s.claim(ExtentId(20)).unwrap();
        assert!(s.claim(ExtentId(20)).unwrap_err().to_string().contains("used twice"));
        assert!(s.claim(ExtentId(19)).is_err());
        s.claim_pages(ExtentId(21).first_page(), 3).unwrap();
        assert!(s.claim_pages(ExtentId(21).first_page().plus(2), 1).is_err());
        assert!(s.claim_pages(ExtentId(20).first_page(), 1).is_err());
        assert!(s.claim(ExtentId(21)).is_err());
    }

    #[test]
    fn page_runs_share_extents_and_empty_extents_come_back() {
        let mut s = SpaceMap::new(ExtentId(0));
        let a = s.take_pages(10).unwrap();
        let b = s.take_pages(6).unwrap();
        let c = s.take_pages(16).unwrap();
        assert_eq!((a.extent(), b.extent()), (ExtentId(0), ExtentId(0)));
        assert_eq!(c, ExtentId(1).first_page());

        assert_eq!(s.give_back_pages(a, 10), None);
        assert_eq!(s.give_back_pages(b, 6), Some(ExtentId(0)));
        assert!(!s.is_free(ExtentId(0)), "used until punched");
    }
}
