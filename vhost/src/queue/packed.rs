//! Packed ring, device side.
//!
//! One ring of descriptors serves both directions. Two flag bits say whose a descriptor is,
//! relative to a wrap counter that each side flips when it passes the end: the driver stores the
//! flags of a chain's first descriptor last (Release), we load them first (Acquire); we store the
//! flags of a completion last (Release), the driver loads them first. Wishes about notifications
//! stand in two small areas, with a full fence on both sides as in the split ring.
//!
//! Each completion is made visible by itself, in [`PackedQueue::complete`]: in a batch that is
//! shown by its first descriptor, a kill would leave later ones marked as used, and the driver
//! would find them when a successor completes in another order.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use format::{Error, Result};

use super::keeper::Keeper;
use super::{
    Chain, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, F_EVENT_IDX, F_INDIRECT_DESC, LogTarget,
    QueueSetup, RingAddrs, RingError,
};
use crate::inflight::InflightArea;
use crate::inflight::packed::{PackedTracker, Position};
use crate::memory::mapping::copy_in;
use crate::memory::{GuestAddr, Memory};
use crate::util::{index, low16, low32, wide};

const DESC_SIZE: u64 = 16;
const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;

/// Wishes about notifications.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// Our own copy of one descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawDesc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

impl RawDesc {
    fn decode(raw: &[u8; 16]) -> RawDesc {
        let (addr, rest) = raw.split_at(8);
        let rest = u64::from_le_bytes(rest.try_into().expect("8 of 16"));
        RawDesc {
            addr: u64::from_le_bytes(addr.try_into().expect("8 of 16")),
            len: low32(rest),
            id: low16(rest >> 32),
            flags: low16(rest >> 48),
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Pointers to the parts of the ring, checked against a memory table that the keeper holds, and
/// the guest addresses of what we write, for the log.
#[derive(Debug, Clone, Copy)]
struct View {
    desc: *mut u8,
    driver: *mut u8,
    device: *mut u8,
    size: u16,
    desc_guest: u64,
    device_guest: u64,
}

// SAFETY: the pointers lead into shared memory that the queue's keeper holds; access to it is
// atomic or a volatile copy.
unsafe impl Send for View {}

impl View {
    fn new(memory: &Memory, addrs: &RingAddrs, size: u16) -> Result<View> {
        let part = |addr: crate::memory::UserAddr, len: u64, align: usize| {
            let found = memory.user_ptr(addr, len).zip(memory.guest_of(addr));
            found.filter(|(p, _)| p.align_offset(align) == 0)
        };
        let desc = part(addrs.desc, DESC_SIZE * u64::from(size), 16);
        match (desc, part(addrs.driver, 4, 4), part(addrs.device, 4, 4)) {
            (Some((desc, desc_guest)), Some((driver, _)), Some((device, device_guest))) => {
                let (desc_guest, device_guest) = (desc_guest.0, device_guest.0);
                Ok(View { desc, driver, device, size, desc_guest, device_guest })
            }
            _ => Err(Error::invalid("a part of the ring is unaligned or not in shared memory")),
        }
    }

    fn at(&self, i: u16) -> *mut u8 {
        assert!(i < self.size);
        self.desc.wrapping_add(16 * usize::from(i))
    }

    fn flags(&self, i: u16) -> &AtomicU16 {
        // SAFETY: inside the part that `new` checked, aligned to 2; both sides access flags
        // atomically.
        unsafe { AtomicU16::from_ptr(self.at(i).wrapping_add(14).cast()) }
    }

    /// Whether the descriptor at a position is the driver's offer of this round.
    fn is_available(&self, at: Position) -> bool {
        // Pairs with the driver's Release store: the chain behind the flags is complete.
        let flags = self.flags(at.index).load(Ordering::Acquire);
        (flags & DESC_F_AVAIL != 0) == at.wrap && (flags & DESC_F_USED != 0) != at.wrap
    }

    fn descriptor(&self, i: u16) -> RawDesc {
        let mut raw = [0; 16];
        // SAFETY: inside the part that `new` checked.
        unsafe { copy_in(&mut raw, self.at(i)) };
        RawDesc::decode(&raw)
    }

    /// Writes a completion, all but its flags.
    fn set_used(&self, i: u16, id: u16, len: u32) {
        let at = self.at(i).wrapping_add(8);
        // SAFETY: inside the part that `new` checked, aligned to 8; access is atomic.
        let (a, b) =
            unsafe { (AtomicU32::from_ptr(at.cast()), AtomicU16::from_ptr(at.add(4).cast())) };
        a.store(len, Ordering::Relaxed); // ordered by the store to the flags
        b.store(id, Ordering::Relaxed);
    }

    fn wish(&self, area: *mut u8) -> &AtomicU32 {
        // SAFETY: one of the two areas that `new` checked and aligned to 4; access is atomic.
        unsafe { AtomicU32::from_ptr(area.cast()) }
    }
}

/// The device side of a packed ring.
#[derive(Debug)]
pub(super) struct PackedQueue {
    view: View,
    addrs: RingAddrs,
    keeper: Keeper,
    event_idx: bool,
    indirect: bool,
    avail: Position,
    used: Position,
    /// Position at the last decision to notify; nothing before the first.
    notified: Option<u16>,
    /// Whether something was completed since that decision.
    completed: bool,
    /// The chain being read; has room for a whole ring.
    scratch: Vec<RawDesc>,
    tracker: Option<PackedTracker>,
    /// Requests of a previous life, the oldest last.
    again: Vec<u16>,
    log: LogTarget,
    area: Option<Arc<InflightArea>>,
}

impl PackedQueue {
    pub(super) fn new(setup: QueueSetup) -> Result<PackedQueue> {
        let size = setup.size;
        let view = View::new(&setup.memory, &setup.addrs, size)?;
        let (mut avail, mut used) = start(&view, setup.base)?;
        let (mut tracker, mut again) = (None, Vec::new());
        if let Some(area) = &setup.inflight {
            let mut t = PackedTracker::new(area.clone(), setup.index, size)?;
            if let Some(known) = t.recover(used, |at| view.is_available(at))? {
                // Everything taken was either given back or is in work.
                used = known.used;
                avail = used.advance(known.descriptors, size);
                again = known.heads;
                again.reverse();
            }
            tracker = Some(t);
        }
        Ok(PackedQueue {
            view,
            addrs: setup.addrs,
            keeper: Keeper::new(setup.memory),
            event_idx: setup.features & F_EVENT_IDX != 0,
            indirect: setup.features & F_INDIRECT_DESC != 0,
            avail,
            used,
            notified: None,
            completed: false,
            scratch: Vec::with_capacity(usize::from(size)),
            tracker,
            again,
            log: setup.log,
            area: setup.inflight,
        })
    }

    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let entry = match (self.again.pop(), &self.tracker) {
            (Some(head), Some(tracker)) => {
                tracker.recorded(head, &mut self.scratch);
                head
            }
            _ => {
                if !self.view.is_available(self.avail) {
                    return Ok(false);
                }
                self.fetch()?;
                let count = low16(wide(self.scratch.len()));
                let entry = match &mut self.tracker {
                    Some(tracker) => tracker.begin(&self.scratch).ok_or(RingError::IndexJump)?,
                    None => 0,
                };
                self.avail = self.avail.advance(count, self.view.size);
                entry
            }
        };
        let last = self.scratch.last().ok_or(RingError::Loop)?;
        chain.reset(last.id, self.keeper.take());
        (chain.slots, chain.entry) = (low16(wide(self.scratch.len())), entry);
        let built = self.build(chain);
        if built.is_err() {
            self.keeper.give_back(chain.generation);
        }
        built.map(|()| true)
    }

    /// Reads the chain at the present position into `scratch`, each descriptor once.
    fn fetch(&mut self) -> Result<(), RingError> {
        self.scratch.clear();
        let mut at = self.avail;
        for _ in 0..self.view.size {
            let desc = self.view.descriptor(at.index);
            self.scratch.push(desc);
            if !desc.has(DESC_F_NEXT) {
                return Ok(());
            }
            at = at.advance(1, self.view.size);
        }
        Err(RingError::Loop)
    }

    fn build(&self, chain: &mut Chain) -> Result<(), RingError> {
        let memory = self.keeper.memory();
        for desc in &self.scratch {
            if desc.has(DESC_F_INDIRECT) {
                if !self.indirect {
                    return Err(RingError::IndirectNotNegotiated);
                }
                if self.scratch.len() > 1 {
                    return Err(RingError::NestedIndirect);
                }
                return build_table(memory, desc, chain);
            }
            chain.push(memory, desc.addr, desc.len, desc.has(DESC_F_WRITE))?;
        }
        Ok(())
    }

    pub(super) fn complete(&mut self, chain: &mut Chain, written: u32) {
        if let Some(log) = &self.log.log {
            chain.written(|addr, len| log.mark(addr, len));
        }
        let (view, at) = (self.view, self.used);
        view.set_used(at.index, chain.id, written);
        let show = || {
            let used = if at.wrap { DESC_F_AVAIL | DESC_F_USED } else { 0 };
            let wrote = if written > 0 { DESC_F_WRITE } else { 0 };
            // Pairs with the driver's Acquire load: it sees data, status, id and length first.
            view.flags(at.index).store(used | wrote, Ordering::Release);
        };
        match &mut self.tracker {
            Some(tracker) => tracker.give_back(chain.entry, chain.slots, show),
            None => show(),
        }
        let offset = DESC_SIZE * u64::from(at.index);
        self.log_write(self.view.desc_guest.saturating_add(offset), DESC_SIZE);
        self.used = at.advance(chain.slots, self.view.size);
        self.completed = true;
        self.keeper.give_back(chain.generation);
    }

    pub(super) fn abandon(&mut self, chain: &mut Chain) {
        self.keeper.give_back(chain.generation);
    }

    pub(super) fn put_back(&mut self, chain: &mut Chain) {
        match self.tracker {
            // It stays marked as in work, and is the first of those.
            Some(_) => self.again.push(chain.entry),
            None => self.avail = self.avail.retreat(chain.slots, self.view.size),
        }
        self.keeper.give_back(chain.generation);
    }

    pub(super) fn set_aside(&mut self, chain: &mut Chain) {
        self.keeper.set_aside(chain.generation);
    }

    /// The log address that front ends send is that of a split ring's used ring; the parts of a
    /// packed ring that we write are logged where they are.
    fn log_write(&self, guest: u64, len: u64) {
        if let (Some(log), Some(_)) = (&self.log.log, self.log.ring) {
            log.mark(guest, len);
        }
    }

    pub(super) fn publish(&mut self) -> bool {
        if !std::mem::take(&mut self.completed) {
            return false;
        }
        // Pairs with the driver's fence between setting its wish and looking at the ring.
        fence(Ordering::SeqCst);
        let wish = u64::from(self.view.wish(self.view.driver).load(Ordering::Relaxed));
        let (position, flags) = (low16(wish), low16(wish >> 16));
        let new = self.used.index;
        let Some(mut old) = self.notified.replace(new) else { return flags != EVENT_DISABLE };
        if flags != EVENT_DESC || !self.event_idx {
            return flags != EVENT_DISABLE;
        }
        let size = self.view.size;
        let mut wanted = position & 0x7fff;
        if (position >> 15 != 0) != self.used.wrap {
            wanted = wanted.wrapping_sub(size);
        }
        if new <= old {
            old = old.wrapping_sub(size);
        }
        super::passed(wanted, old, new)
    }

    fn set_wish(&mut self, flags: u16) {
        let position = self.avail.index | u16::from(self.avail.wrap) << 15;
        let word = u32::from(position) | u32::from(flags) << 16;
        self.view.wish(self.view.device).store(word, Ordering::Relaxed);
        self.log_write(self.view.device_guest, 4);
    }

    pub(super) fn enable_kicks(&mut self) -> bool {
        self.set_wish(if self.event_idx { EVENT_DESC } else { EVENT_ENABLE });
        // Pairs with the driver's fence between offering a chain and looking at our wish.
        fence(Ordering::SeqCst);
        self.has_work()
    }

    pub(super) fn disable_kicks(&mut self) {
        self.set_wish(EVENT_DISABLE);
    }

    pub(super) fn has_work(&mut self) -> bool {
        !self.again.is_empty() || self.view.is_available(self.avail)
    }

    pub(super) fn base(&self) -> u32 {
        let half = |at: Position| u32::from(at.index) | u32::from(at.wrap) << 15;
        half(self.avail) | half(self.used) << 16
    }

    pub(super) fn outstanding(&self) -> u32 {
        self.keeper.outstanding()
    }

    pub(super) fn close(&mut self) {
        if let (Some(tracker), 0) = (&mut self.tracker, self.keeper.outstanding()) {
            tracker.close();
        }
    }

    pub(super) fn let_go(&mut self) {
        self.keeper.replace(Arc::default());
    }

    pub(super) fn set_memory(&mut self, memory: Arc<Memory>) -> Result<()> {
        self.view = View::new(&memory, &self.addrs, self.view.size)?;
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

/// Entries of a packed ring's table count by order; their flags say only who writes.
fn build_table(memory: &Memory, table: &RawDesc, chain: &mut Chain) -> Result<(), RingError> {
    let len = u64::from(table.len);
    if len == 0 || !len.is_multiple_of(DESC_SIZE) {
        return Err(RingError::IndirectSize);
    }
    if index(len / DESC_SIZE) > super::CHAIN_SEGMENTS_MAX {
        return Err(RingError::Oversize);
    }
    for i in 0..len / DESC_SIZE {
        let mut raw = [0; 16];
        let addr = table.addr.checked_add(i * DESC_SIZE).ok_or(RingError::BadAddress)?;
        memory.read(GuestAddr(addr), &mut raw)?;
        let desc = RawDesc::decode(&raw);
        if desc.has(DESC_F_INDIRECT) {
            return Err(RingError::NestedIndirect);
        }
        chain.push(memory, desc.addr, desc.len, desc.has(DESC_F_WRITE))?;
    }
    Ok(())
}

/// The positions that a front end's number stands for. Front ends that know only split rings send
/// 0 for a new ring, which for a packed ring would be the start of a second round; but after a
/// first round the device has left its mark on some descriptor, and a new ring has none.
fn start(view: &View, base: u32) -> Result<(Position, Position)> {
    if base == 0 {
        let touched = |i| view.flags(i).load(Ordering::Acquire) & DESC_F_USED != 0;
        if !(0..view.size).any(touched) {
            let first = Position { index: 0, wrap: true };
            return Ok((first, first));
        }
    }
    let half = |bits: u32| {
        let bits = low16(bits.into());
        Position { index: bits & 0x7fff, wrap: bits >> 15 != 0 }
    };
    let (avail, used) = (half(base), half(base >> 16));
    if avail.index >= view.size || used.index >= view.size {
        return Err(Error::invalid("a position is outside the ring"));
    }
    Ok((avail, used))
}
