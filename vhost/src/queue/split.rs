//! Split ring, device side.
//!
//! Shared words and their order: the driver fills descriptors and ring entry, then stores
//! `avail.idx` (Release); we load it (Acquire) before we read those. We fill used entries, then
//! store `used.idx` (Release); the driver loads it before it reads those. For notifications each
//! side stores its index, passes a full fence and then looks at what the other side wants; so at
//! least one of them sees the other's store, and no wake-up is lost.
//!
//! With an in-flight area: marks go before the first look at a request and are cleared after
//! `used.idx` (see `inflight::split`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use format::{Error, Result};

use super::keeper::Keeper;
use super::{
    Chain, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, F_EVENT_IDX, F_INDIRECT_DESC, LogTarget,
    QueueSetup, RingAddrs, RingError, passed,
};
use crate::inflight::InflightArea;
use crate::inflight::split::SplitTracker;
use crate::memory::mapping::copy_in;
use crate::memory::{GuestAddr, Memory};
use crate::util::{low16, low32, wide};

const DESC_SIZE: u64 = 16;

/// Driver's flag: do not notify me. Only looked at without event index.
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Device's flag: do not notify me. Only set without event index.
const USED_F_NO_NOTIFY: u16 = 1;

/// Bytes from the start of the used ring to its index and to its entries.
const USED_IDX: u64 = 2;
const USED_RING: u64 = 4;
const USED_ELEM: u64 = 8;

/// Pointers to the parts of the ring, checked against a memory table that the keeper holds.
#[derive(Debug, Clone, Copy)]
struct View {
    desc: *const u8,
    avail: *mut u8,
    used: *mut u8,
    size: u16,
}

// SAFETY: the pointers lead into shared memory that the queue's keeper holds; access to it is
// atomic or a volatile copy.
unsafe impl Send for View {}

impl View {
    fn new(memory: &Memory, addrs: &RingAddrs, size: u16, event_idx: bool) -> Result<View> {
        let n = u64::from(size);
        // The event words at the end of both rings exist only when they are negotiated.
        let event = if event_idx { 2 } else { 0 };
        let part = |addr: crate::memory::UserAddr, len: u64, align: u64| {
            let aligned = addr.0.is_multiple_of(align);
            memory.user_ptr(addr, len).filter(|p| aligned && p.align_offset(4) == 0)
        };
        let desc = part(addrs.desc, n * DESC_SIZE, 16);
        let avail = memory
            .user_ptr(addrs.driver, 4 + 2 * n + event)
            .filter(|p| addrs.driver.0.is_multiple_of(2) && p.align_offset(2) == 0);
        let used = part(addrs.device, USED_RING + USED_ELEM * n + event, 4);
        match (desc, avail, used) {
            (Some(desc), Some(avail), Some(used)) => Ok(View { desc, avail, used, size }),
            _ => Err(Error::invalid("a part of the ring is unaligned or not in shared memory")),
        }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    fn word(base: *mut u8, offset: usize) -> *mut u16 {
        base.wrapping_add(offset).cast()
    }

    fn avail_word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers pass offsets inside the part that `new` checked and aligned; both sides
        // access these words atomically.
        unsafe { AtomicU16::from_ptr(Self::word(self.avail, offset)) }
    }

    fn used_word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as in `avail_word`.
        unsafe { AtomicU16::from_ptr(Self::word(self.used, offset)) }
    }

    fn avail_flags(&self) -> &AtomicU16 {
        self.avail_word(0)
    }

    fn avail_idx(&self) -> &AtomicU16 {
        self.avail_word(2)
    }

    fn avail_entry(&self, index: u16) -> &AtomicU16 {
        self.avail_word(4 + 2 * self.slot(index))
    }

    /// Where the driver says when it wants a notification. Only with event index.
    fn used_event(&self) -> &AtomicU16 {
        self.avail_word(4 + 2 * usize::from(self.size))
    }

    fn used_flags(&self) -> &AtomicU16 {
        self.used_word(0)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.used_word(2)
    }

    /// Where we say when we want a kick. Only with event index.
    fn avail_event(&self) -> &AtomicU16 {
        self.used_word(4 + 8 * usize::from(self.size))
    }

    fn set_used_entry(&self, index: u16, id: u16, len: u32) {
        let at = self.used.wrapping_add(4 + 8 * self.slot(index)).cast::<u32>();
        // SAFETY: an entry of the part that `new` checked and aligned to 4.
        let (a, b) = unsafe { (AtomicU32::from_ptr(at), AtomicU32::from_ptr(at.add(1))) };
        a.store(u32::from(id), Ordering::Relaxed); // ordered by the store to `used.idx`
        b.store(len, Ordering::Relaxed);
    }

    fn descriptor(&self, index: u16) -> Descriptor {
        let mut raw = [0; 16];
        // SAFETY: `index` is below the size of the table that `new` checked.
        unsafe { copy_in(&mut raw, self.desc.add(16 * usize::from(index))) };
        Descriptor::decode(&raw)
    }
}

/// Our own copy of one descriptor.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn decode(raw: &[u8; 16]) -> Descriptor {
        let raw = u128::from_le_bytes(*raw);
        #[allow(clippy::cast_possible_truncation)] // takes a 128-bit word apart
        let half = |shift: u32| (raw >> shift) as u64;
        Descriptor {
            addr: half(0),
            len: low32(half(64)),
            flags: low16(half(96)),
            next: low16(half(112)),
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The device side of a split ring.
#[derive(Debug)]
pub(super) struct SplitQueue {
    view: View,
    addrs: RingAddrs,
    keeper: Keeper,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    /// Available index as last read: requests before it are ours to take.
    seen_avail: u16,
    next_used: u16,
    published_used: u16,
    /// Used index at the last decision to notify; nothing before the first.
    notified_used: Option<u16>,
    tracker: Option<SplitTracker>,
    /// Requests of a previous life, the oldest last.
    again: Vec<u16>,
    log: LogTarget,
    area: Option<Arc<InflightArea>>,
}

impl SplitQueue {
    pub(super) fn new(setup: QueueSetup) -> Result<SplitQueue> {
        if !setup.size.is_power_of_two() {
            return Err(Error::invalid("the size of a split ring is no power of two"));
        }
        let event_idx = setup.features & F_EVENT_IDX != 0;
        let view = View::new(&setup.memory, &setup.addrs, setup.size, event_idx)?;
        // Where the last process stopped is in the ring itself; only the position of the next
        // request has to come from the front end, or from the in-flight area.
        let used = view.used_idx().load(Ordering::Acquire); // pairs with our own `publish`
        let mut next_avail = low16(u64::from(setup.base));
        let (mut tracker, mut again) = (None, Vec::new());
        if let Some(area) = &setup.inflight {
            let mut t = SplitTracker::new(area.clone(), setup.index, setup.size)?;
            let recovered = t.recover(used)?;
            again = recovered.heads;
            // Everything taken was either given back or is in work. After a crash the front end
            // cannot know where that leaves us: it only sees the used index.
            if recovered.known {
                next_avail = used.wrapping_add(low16(wide(again.len())));
            }
            again.reverse();
            tracker = Some(t);
        }
        Ok(SplitQueue {
            view,
            addrs: setup.addrs,
            keeper: Keeper::new(setup.memory),
            event_idx,
            indirect: setup.features & F_INDIRECT_DESC != 0,
            next_avail,
            seen_avail: next_avail,
            next_used: used,
            published_used: used,
            notified_used: None,
            tracker,
            again,
            log: setup.log,
            area: setup.inflight,
        })
    }

    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let head = match self.again.pop() {
            Some(head) => head,
            None => {
                if !self.look_for_work()? {
                    return Ok(false);
                }
                // Ordered after the Acquire load of the index in `look_for_work`.
                let head = self.view.avail_entry(self.next_avail).load(Ordering::Relaxed);
                if head >= self.view.size {
                    return Err(RingError::OutOfRange);
                }
                self.next_avail = self.next_avail.wrapping_add(1);
                if let Some(tracker) = &mut self.tracker {
                    tracker.begin(head);
                }
                head
            }
        };
        chain.reset(head, self.keeper.take());
        let walked = self.walk(head, chain);
        if walked.is_err() {
            self.keeper.give_back(chain.generation);
        }
        walked.map(|()| true)
    }

    fn look_for_work(&mut self) -> Result<bool, RingError> {
        if self.seen_avail == self.next_avail {
            // Pairs with the driver's Release store: entries and descriptors before it are there.
            self.seen_avail = self.view.avail_idx().load(Ordering::Acquire);
            if self.seen_avail.wrapping_sub(self.next_avail) > self.view.size {
                self.seen_avail = self.next_avail;
                return Err(RingError::IndexJump);
            }
        }
        Ok(self.seen_avail != self.next_avail)
    }

    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        let mut index = head;
        for _ in 0..self.view.size {
            let desc = self.view.descriptor(index);
            if desc.has(DESC_F_INDIRECT) {
                if !self.indirect {
                    return Err(RingError::IndirectNotNegotiated);
                }
                if desc.has(DESC_F_NEXT) {
                    return Err(RingError::NestedIndirect);
                }
                return self.walk_table(desc, chain);
            }
            chain.push(self.keeper.memory(), desc.addr, desc.len, desc.has(DESC_F_WRITE))?;
            if !desc.has(DESC_F_NEXT) {
                return Ok(());
            }
            if desc.next >= self.view.size {
                return Err(RingError::OutOfRange);
            }
            index = desc.next;
        }
        Err(RingError::Loop)
    }

    fn walk_table(&self, table: Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let len = u64::from(table.len);
        if len == 0 || !len.is_multiple_of(DESC_SIZE) {
            return Err(RingError::IndirectSize);
        }
        let memory = self.keeper.memory();
        let count = len / DESC_SIZE;
        // The common case is a table in one region; one that spans two is read piece by piece.
        let whole = memory.guest_ptr(GuestAddr(table.addr), len);
        let mut index = 0;
        for _ in 0..count {
            let mut raw = [0; 16];
            match whole {
                // SAFETY: `index` is below `count`, and the pointer holds for `len` bytes.
                Some(base) => unsafe {
                    copy_in(&mut raw, base.add(16 * usize::from(index)));
                },
                None => {
                    let offset = DESC_SIZE * u64::from(index);
                    let addr = table.addr.checked_add(offset).ok_or(RingError::BadAddress)?;
                    memory.read(GuestAddr(addr), &mut raw)?;
                }
            }
            let desc = Descriptor::decode(&raw);
            if desc.has(DESC_F_INDIRECT) {
                return Err(RingError::NestedIndirect);
            }
            chain.push(memory, desc.addr, desc.len, desc.has(DESC_F_WRITE))?;
            if !desc.has(DESC_F_NEXT) {
                return Ok(());
            }
            if u64::from(desc.next) >= count {
                return Err(RingError::OutOfRange);
            }
            index = desc.next;
        }
        Err(RingError::Loop)
    }

    pub(super) fn complete(&mut self, chain: &mut Chain, written: u32) {
        if let Some(log) = &self.log.log {
            chain.written(|addr, len| log.mark(addr, len));
        }
        self.view.set_used_entry(self.next_used, chain.id, written);
        if let Some(tracker) = &mut self.tracker {
            tracker.give_back(chain.id);
        }
        self.log_ring(USED_RING + USED_ELEM * wide(self.view.slot(self.next_used)), USED_ELEM);
        self.next_used = self.next_used.wrapping_add(1);
        self.keeper.give_back(chain.generation);
    }

    pub(super) fn abandon(&mut self, chain: &mut Chain) {
        self.keeper.give_back(chain.generation);
    }

    pub(super) fn put_back(&mut self, chain: &mut Chain) {
        match self.tracker {
            // It stays marked as in work, and is the first of those.
            Some(_) => self.again.push(chain.id),
            None => self.next_avail = self.next_avail.wrapping_sub(1),
        }
        self.keeper.give_back(chain.generation);
    }

    pub(super) fn set_aside(&mut self, chain: &mut Chain) {
        self.keeper.set_aside(chain.generation);
    }

    fn log_ring(&self, offset: u64, len: u64) {
        if let (Some(log), Some(ring)) = (&self.log.log, self.log.ring) {
            log.mark(ring.saturating_add(offset), len);
        }
    }

    pub(super) fn publish(&mut self) -> bool {
        if self.published_used == self.next_used {
            return false;
        }
        // Pairs with the driver's Acquire load: it sees entries, data and status before the index.
        self.view.used_idx().store(self.next_used, Ordering::Release);
        self.published_used = self.next_used;
        if let Some(tracker) = &mut self.tracker {
            tracker.published(self.next_used);
        }
        self.log_ring(USED_IDX, 2);
        self.wants_notification()
    }

    fn wants_notification(&mut self) -> bool {
        // Pairs with the driver's fence between setting its wish and looking at `used.idx`.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.view.avail_flags().load(Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0;
        }
        let wish = self.view.used_event().load(Ordering::Relaxed);
        let Some(old) = self.notified_used.replace(self.next_used) else { return true };
        passed(wish, old, self.next_used)
    }

    pub(super) fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.view.avail_event().store(self.next_avail, Ordering::Relaxed);
            self.log_ring(USED_RING + USED_ELEM * u64::from(self.view.size), 2);
        } else {
            self.view.used_flags().store(0, Ordering::Relaxed);
            self.log_ring(0, 2);
        }
        // Pairs with the driver's fence between storing `avail.idx` and looking at our wish.
        fence(Ordering::SeqCst);
        self.has_work()
    }

    pub(super) fn disable_kicks(&mut self) {
        // With event index a wish that lies behind is as good as none.
        if !self.event_idx {
            self.view.used_flags().store(USED_F_NO_NOTIFY, Ordering::Relaxed); // a hint only
            self.log_ring(0, 2);
        }
    }

    pub(super) fn has_work(&mut self) -> bool {
        !self.again.is_empty() || self.view.avail_idx().load(Ordering::Relaxed) != self.next_avail
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    pub(super) fn outstanding(&self) -> u32 {
        self.keeper.outstanding()
    }

    pub(super) fn close(&mut self) {
        if let (Some(tracker), 0) = (&mut self.tracker, self.keeper.outstanding()) {
            tracker.close(self.published_used);
        }
    }

    pub(super) fn let_go(&mut self) {
        self.keeper.replace(Arc::default());
    }

    pub(super) fn set_memory(&mut self, memory: Arc<Memory>) -> Result<()> {
        self.view = View::new(&memory, &self.addrs, self.view.size, self.event_idx)?;
        self.keeper.replace(memory);
        Ok(())
    }

    pub(super) fn set_log(&mut self, log: LogTarget) {
        self.log = log;
    }

    pub(super) fn is_lost(&self) -> bool {
        self.keeper.memory().is_lost()
            || self.log.log.as_ref().is_some_and(|l| l.is_lost())
            || self.area.as_ref().is_some_and(|a| a.is_lost())
    }
}
