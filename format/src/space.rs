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

use std::collections::{BTreeMap, BTreeSet, VecDeque};

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
    pages: MetaPages,
}

/// Pages of an extent, as a number of bits.
const PAGES: usize = index(BLOCKS_PER_EXTENT);

/// Which pages of the metadata extents are in use.
///
/// Invariant: `free` names each extent with a free page once, under the length of its longest run
/// of free pages. So a run is found without a look at extents that are full: there are many, and
/// writers wait meanwhile.
#[derive(Debug, Default)]
struct MetaPages {
    used: BTreeMap<ExtentId, u16>,
    free: [BTreeSet<ExtentId>; PAGES],
}

/// Length of the longest run of free pages.
fn longest_free(mask: u16) -> usize {
    let (mut free, mut len) = (!mask, 0);
    while free != 0 {
        free &= free << 1;
        len += 1;
    }
    len
}

/// `count` pages from page `first` of an extent on.
fn run_mask(first: usize, count: usize) -> u16 {
    debug_assert!(first < PAGES && (1..=PAGES - first).contains(&count));
    u16::MAX >> (PAGES - count) << first
}

impl MetaPages {
    fn get(&self, extent: ExtentId) -> Option<u16> {
        self.used.get(&extent).copied()
    }

    /// Sets which pages of an extent are in use; one without any is no metadata extent any more.
    fn set(&mut self, extent: ExtentId, mask: u16) {
        let old = match mask {
            0 => self.used.remove(&extent),
            _ => self.used.insert(extent, mask),
        };
        let (before, after) = (old.map_or(0, longest_free), longest_free(mask) % PAGES);
        if before != after {
            self.free[before].remove(&extent);
            if after > 0 {
                self.free[after].insert(extent);
            }
        }
    }

    /// Takes the first run of `count` free pages of the first extent that has one.
    fn take(&mut self, count: usize) -> Option<PageNo> {
        let fitting = self.free.get(count..)?;
        let extent = *fitting.iter().filter_map(BTreeSet::first).min()?;
        let mask = self.get(extent)?;
        let first = (0..=PAGES - count).find(|first| mask & run_mask(*first, count) == 0)?;
        self.set(extent, mask | run_mask(first, count));
        Some(extent.first_page().plus(first as u64))
    }
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
            pages: MetaPages::default(),
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
            let mask = match self.pages.get(p.extent()) {
                Some(mask) => mask,
                None => self.claim(p.extent()).map(|()| 0)?,
            };
            if mask & bit != 0 {
                return Err(Error::corrupt(format!("page {p} is used twice")));
            }
            self.pages.set(p.extent(), mask | bit);
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

    /// Takes `count` metadata pages, 1 to 16, in one run inside one extent.
    ///
    /// # Errors
    /// `NoSpace` when the segment has reached its largest size.
    pub fn take_pages(&mut self, count: u8) -> Result<PageNo> {
        let count = usize::from(count).clamp(1, PAGES);
        if let Some(page) = self.pages.take(count) {
            return Ok(page);
        }
        let extent = self.take_lease(1)?.first;
        self.pages.set(extent, run_mask(0, count));
        Ok(extent.first_page())
    }

    /// Notes that `count` pages from `page` on are in use, all in one extent that was taken before
    /// and holds no data.
    pub fn hold_pages(&mut self, page: PageNo, count: u8) {
        let mask = self.pages.get(page.extent()).unwrap_or(0);
        let run = run_mask(page.in_extent(), count.into());
        self.pages.set(page.extent(), mask | run);
    }

    /// Gives back metadata pages of one extent that nothing durable names. Returns the extent when
    /// all of its pages are free now: it stays used until the caller has punched it and calls
    /// [`Self::give_back`].
    pub fn give_back_pages(&mut self, page: PageNo, count: u8) -> Option<ExtentId> {
        let extent = page.extent();
        let left = self.pages.get(extent)? & !run_mask(page.in_extent(), count.into());
        self.pages.set(extent, left);
        (left == 0).then_some(extent)
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
    use proptest::prelude::*;

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

    impl MetaPages {
        fn check(&self) {
            let mut free: [BTreeSet<ExtentId>; PAGES] = Default::default();
            for (extent, mask) in self.used.iter().filter(|(_, mask)| **mask != u16::MAX) {
                let runs = (1..=PAGES).rev();
                let fits = |len: &usize| (0..=PAGES - len).any(|s| mask & run_mask(s, *len) == 0);
                free[runs.clone().find(fits).unwrap()].insert(*extent);
            }
            assert_eq!(self.free, free);
            assert!(self.used.values().all(|mask| *mask != 0));
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take(u8),
        GiveBack(usize),
        Hold(u8, u8),
        Claim(u8, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (1..=16_u8).prop_map(Step::Take),
            4 => (1..=2_u8).prop_map(Step::Take),
            6 => any::<usize>().prop_map(Step::GiveBack),
            1 => (0..16_u8, 1..=16_u8).prop_map(|(at, n)| Step::Hold(at, n.min(16 - at))),
            1 => (0..200_u8, 1..=40_u8).prop_map(|(at, n)| Step::Claim(at, n)),
        ]
    }

    /// The first run of free pages, found by a look at every page.
    fn first_fit(used: &BTreeSet<PageNo>, count: u8) -> Option<PageNo> {
        let extents: BTreeSet<ExtentId> = used.iter().map(|page| page.extent()).collect();
        let starts = |e: ExtentId| (0..=u64::from(16 - count)).map(move |i| e.first_page().plus(i));
        let fits = |p: &PageNo| (0..count.into()).all(|i| !used.contains(&p.plus(i)));
        extents.into_iter().flat_map(starts).find(fits)
    }

    proptest! {
        /// Against a set of pages, searched from the front.
        #[test]
        fn pages_are_taken_from_the_front(steps in proptest::collection::vec(step(), 1..150)) {
            let mut s = SpaceMap::new(ExtentId(2));
            let (mut used, mut runs) = (BTreeSet::new(), Vec::new());
            for step in steps {
                let (page, count) = match step {
                    Step::Take(count) => {
                        let expected = first_fit(&used, count);
                        let page = s.take_pages(count).unwrap();
                        let new = used.iter().all(|p: &PageNo| p.extent() != page.extent());
                        let whole = new && page.in_extent() == 0;
                        prop_assert!(expected.map_or(whole, |e| e == page), "{page} {expected:?}");
                        (page, count)
                    }
                    Step::Hold(at, count) => {
                        let page = s.take_lease(1).unwrap().first.first_page().plus(at.into());
                        s.hold_pages(page, count);
                        (page, count)
                    }
                    Step::Claim(at, count) => {
                        for page in (0..count).map(|i| PageNo(32 + u64::from(at) + u64::from(i))) {
                            let is_new = used.insert(page);
                            prop_assert_eq!(s.claim_pages(page, 1).is_ok(), is_new);
                            runs.extend(is_new.then_some((page, 1)));
                        }
                        s.pages.check();
                        continue;
                    }
                    Step::GiveBack(which) => {
                        if runs.is_empty() {
                            continue;
                        }
                        let (page, count) = runs.swap_remove(which % runs.len());
                        (0..count.into()).for_each(|i| _ = used.remove(&page.plus(i)));
                        let empty = used.iter().all(|p| p.extent() != page.extent());
                        let given = s.give_back_pages(page, count);
                        prop_assert_eq!(given, empty.then_some(page.extent()));
                        given.into_iter().for_each(|extent| s.give_back(extent));
                        s.pages.check();
                        continue;
                    }
                };
                for i in 0..count.into() {
                    prop_assert!(used.insert(page.plus(i)), "taken twice");
                }
                runs.push((page, count));
                s.pages.check();
            }
            let extents: BTreeSet<ExtentId> = used.iter().map(|page| page.extent()).collect();
            prop_assert_eq!(s.used_count(), extents.len() as u64);
        }
    }
}
