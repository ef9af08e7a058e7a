//! The frames of one network card: from the guest's ring to the host's interface and back.
//!
//! Whoever holds the engine's lock runs it: mostly the card's own thread, and the thread that
//! stops the machine.
//!
//! *Sending.* The header is copied and checked; the frame goes to the host from where the guest
//! has it. While the link is down frames are dropped, as on a wire without a plug.
//!
//! *Receiving.* A frame is taken from the interface when the ring has something to put it into,
//! into memory of our own, because its length is not known before. If one buffer is too small and
//! the driver agreed on that, it fills several; one that finds too few waits for more.
//!
//! Invariants: a chain is held over a sleep only for a frame that waits, and goes back to the ring
//! before the machine is saved: the rings alone say where a machine goes on. A frame that waits
//! stays with this machine; a child does not get it. What a driver breaks is its own: the device
//! stops until it is reset, and counts it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vhost_blk::queue::{Chain, Queue, as_iovecs};

use super::link::Link;
use crate::devices::mmio::Notifier;
use crate::tap::{HEADER, Offload, Tap, is_gone};

pub(super) const F_CSUM: u64 = 1;
pub(super) const F_GUEST_CSUM: u64 = 1 << 1;
pub(super) const F_MAC: u64 = 1 << 5;
pub(super) const F_GUEST_TSO4: u64 = 1 << 7;
pub(super) const F_GUEST_TSO6: u64 = 1 << 8;
pub(super) const F_HOST_TSO4: u64 = 1 << 11;
pub(super) const F_HOST_TSO6: u64 = 1 << 12;
pub(super) const F_MRG_RXBUF: u64 = 1 << 15;
pub(super) const F_STATUS: u64 = 1 << 16;

/// Descriptors of a ring at most.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Bytes of a frame with its header at most: what an IP packet can have, and Ethernet's and a
/// VLAN's part.
const FRAME_MAX: usize = HEADER + 18 + 65_535;
/// Frames before the driver is told, and before the lock is given up for a moment.
const BATCH: u16 = 64;
/// Pieces that a frame may have and go to the host without a copy.
const PIECES: usize = 64;
/// Frames that a host keeps for an interface at most, in its usual set-up.
const STALE_MAX: usize = 1000;

/// Header: flags, and the kind of a frame that is to be cut into segments.
const FLAGS: usize = 0;
const KIND: usize = 1;
const NEEDS_SUM: u8 = 1;
const KIND_TCP4: u8 = 1;
const KIND_TCP6: u8 = 4;
/// Header: in how many buffers a received frame is.
const BUFFERS: usize = 10;

/// What passed a network card since its machine began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetCounts {
    /// Frames that the guest received.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that the guest sent.
    pub sent_frames: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that went nowhere: sent while the link was down, refused by the host, or too large
    /// for what the guest has to receive them.
    pub dropped: u64,
    /// Times that the guest's driver broke a rule of its rings.
    pub broken: u64,
}

/// What the guest's driver set up.
struct Driver {
    receive: Queue,
    send: Queue,
    /// Features that it accepted.
    features: u64,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Done,
    Dropped,
    /// There is no room for it now.
    Waits,
    /// The driver broke a rule.
    Broken,
}

/// What the card's thread is to wait for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wish {
    /// There is something to do already.
    pub(super) now: bool,
    /// A frame from the host.
    pub(super) frame: bool,
    /// Room for a frame at the host.
    pub(super) room: bool,
}

/// One network card at work.
pub(super) struct Engine {
    tap: Option<Arc<Tap>>,
    link: Arc<Link>,
    /// Set by who stops the machine, without the lock.
    paused: Arc<AtomicBool>,
    notifier: Arc<Notifier>,
    driver: Option<Driver>,
    /// Whether the interface is to be told what the driver takes.
    untold: bool,
    /// A frame from the host, with its header; how many bytes of it wait.
    frame: Box<[u8]>,
    waiting: usize,
    /// Chains for that frame: how many are taken, and how many bytes they have.
    chains: Vec<Chain>,
    taken: usize,
    room: usize,
    /// A chain to send, whether it is taken, and its header.
    out: Chain,
    is_out: bool,
    header: [u8; HEADER],
    /// For frames in very many pieces.
    gathered: Box<[u8]>,
    counts: NetCounts,
}

impl Engine {
    pub(super) fn new(
        tap: Option<Arc<Tap>>,
        link: Arc<Link>,
        paused: Arc<AtomicBool>,
        notifier: Arc<Notifier>,
    ) -> Engine {
        Engine {
            tap,
            link,
            paused,
            notifier,
            driver: None,
            untold: false,
            frame: vec![0; FRAME_MAX].into(),
            waiting: 0,
            chains: Vec::new(),
            taken: 0,
            room: 0,
            out: Chain::new(),
            is_out: false,
            header: [0; HEADER],
            gathered: vec![0; FRAME_MAX].into(),
            counts: NetCounts::default(),
        }
    }

    pub(super) fn counts(&self) -> NetCounts {
        self.counts
    }

    /// A driver set up its rings.
    pub(super) fn start(&mut self, receive: Queue, send: Queue, features: u64) {
        self.stop();
        self.driver = Some(Driver { receive, send, features });
        self.untold = true;
    }

    /// The driver is gone, or broke a ring.
    pub(super) fn stop(&mut self) {
        let Some(mut driver) = self.driver.take() else { return };
        for chain in &mut self.chains[..self.taken] {
            driver.receive.abandon(chain);
        }
        if self.is_out {
            driver.send.abandon(&mut self.out);
        }
        (self.taken, self.room, self.waiting, self.is_out) = (0, 0, 0, false);
    }

    /// The positions in the driver's rings. The machine is to be saved: nothing is held.
    pub(super) fn bases(&self) -> Vec<u32> {
        let bases = |d: &Driver| vec![d.receive.base(), d.send.base()];
        self.driver.as_ref().map_or_else(Vec::new, bases)
    }

    /// Puts back what is held.
    pub(super) fn let_go(&mut self) {
        let Some(driver) = &mut self.driver else { return };
        // The one that was taken last comes first.
        for chain in self.chains[..self.taken].iter_mut().rev() {
            driver.receive.put_back(chain);
        }
        if self.is_out {
            driver.send.put_back(&mut self.out);
        }
        (self.taken, self.room, self.is_out) = (0, 0, false);
    }

    /// Pairs with the store in `Nic::pause`: who stops the machine waits for one frame at most.
    fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// Does whatever can be done without waiting.
    pub(super) fn run(&mut self) {
        if self.is_paused() {
            return;
        }
        self.tend();
        let up = self.link.is_up();
        self.send(up);
        if up {
            self.receive();
        }
    }

    /// What to wait for afterwards.
    pub(super) fn arm(&mut self) -> Wish {
        let mut wish = Wish::default();
        let Some(driver) = self.driver.as_mut().filter(|_| !self.paused.load(Ordering::Acquire))
        else {
            return wish; // As in `is_paused`.
        };
        match self.is_out {
            true => wish.room = true,
            false => wish.now |= driver.send.enable_kicks(),
        }
        if self.link.is_up() {
            let more = driver.receive.enable_kicks();
            match self.waiting > 0 {
                true => wish.now |= more,
                false => wish.frame = more,
            }
        }
        wish
    }

    /// Looks after the interface and the link.
    fn tend(&mut self) {
        let Some(tap) = self.tap.clone() else { return };
        if let (Some(driver), true) = (&self.driver, std::mem::take(&mut self.untold)) {
            let has = |feature: u64| driver.features & feature != 0;
            let may = Offload {
                sums: has(F_GUEST_CSUM),
                tcp4: has(F_GUEST_TSO4),
                tcp6: has(F_GUEST_TSO6),
            };
            // A host that does not do it gives whole frames, which every driver takes.
            let _ = tap.set_offload(may);
        }
        if self.link.is_to_come_up() {
            self.forget(&tap);
            if self.is_paused() {
                return;
            }
            tap.set_carrier(true);
            self.link.raise();
            self.notifier.config_changed();
        }
    }

    /// Drops what is from before the link came up: frames of another machine, and for it.
    fn forget(&mut self, tap: &Tap) {
        for _ in 0..QUEUE_SIZE / BATCH {
            self.send(false);
        }
        for _ in 0..STALE_MAX {
            if !matches!(tap.read(&mut self.frame), Ok(Some(_))) {
                break;
            }
        }
        self.waiting = 0;
    }

    /// The interface was removed.
    fn lose_tap(&mut self) {
        self.tap = None;
        self.link.cable_is_gone();
        self.notifier.config_changed();
    }

    fn break_ring(&mut self) {
        self.counts.broken += 1;
        self.stop();
        self.notifier.needs_reset();
    }

    /// Sends what the guest wants to send, a batch at most; drops it without a link.
    fn send(&mut self, up: bool) {
        for _ in 0..BATCH {
            let Some(driver) =
                self.driver.as_mut().filter(|_| !self.paused.load(Ordering::Acquire))
            else {
                break; // As in `is_paused`.
            };
            if !self.is_out {
                match driver.send.pop(&mut self.out) {
                    Ok(true) if self.out.take(&mut self.header) => self.is_out = true,
                    Ok(false) => break,
                    taken => {
                        if taken.is_ok() {
                            driver.send.abandon(&mut self.out);
                        }
                        return self.break_ring();
                    }
                }
            }
            match if up { self.put() } else { Fate::Dropped } {
                Fate::Waits => break,
                Fate::Done => {
                    self.counts.sent_frames += 1;
                    self.counts.sent_bytes += self.out.readable_len();
                }
                Fate::Dropped | Fate::Broken => self.counts.dropped += 1,
            }
            if let Some(driver) = &mut self.driver {
                driver.send.complete(&mut self.out, 0);
                self.is_out = false;
            }
        }
        if self.driver.as_mut().is_some_and(|d| d.send.publish()) {
            self.notifier.used();
        }
    }

    /// Gives the frame that is out to the host.
    fn put(&mut self) -> Fate {
        let (Some(tap), Some(driver)) = (&self.tap, &self.driver) else { return Fate::Dropped };
        let len = usize::try_from(self.out.readable_len()).unwrap_or(usize::MAX);
        if len > FRAME_MAX - HEADER || !is_fit(&mut self.header, driver.features) {
            return Fate::Dropped;
        }
        let piece = |bytes: &[u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut pieces = [piece(&self.header); PIECES + 1];
        let parts = self.out.readable();
        let count = if parts.len() <= PIECES {
            pieces[1..=parts.len()].copy_from_slice(as_iovecs(parts));
            parts.len()
        } else {
            let mut at = 0;
            for part in parts {
                part.copy_to(&mut self.gathered[at..at + part.len()]);
                at += part.len();
            }
            pieces[1] = piece(&self.gathered[..len]);
            1
        };
        // SAFETY: header and copy are ours, the other pieces are the chain's, which is out.
        match unsafe { tap.write(&pieces[..=count]) } {
            Ok(true) => Fate::Done,
            Ok(false) => Fate::Waits,
            Err(e) => {
                if is_gone(&e) {
                    self.lose_tap();
                }
                Fate::Dropped
            }
        }
    }

    /// Gives the guest what the host has for it, a batch at most.
    fn receive(&mut self) {
        for _ in 0..BATCH {
            if self.is_paused() || !self.fetch() {
                break;
            }
            match self.deliver() {
                Fate::Waits => break,
                Fate::Done => {
                    self.counts.received_frames += 1;
                    self.counts.received_bytes += (self.waiting - HEADER) as u64;
                }
                Fate::Dropped => self.counts.dropped += 1,
                Fate::Broken => return self.break_ring(),
            }
            self.waiting = 0;
        }
        if self.driver.as_mut().is_some_and(|d| d.receive.publish()) {
            self.notifier.used();
        }
    }

    /// Has a frame wait, if there is one, and the driver wants one.
    fn fetch(&mut self) -> bool {
        let Some(driver) = &mut self.driver else { return false };
        if self.waiting > 0 {
            return true;
        }
        let (Some(tap), true) = (&self.tap, driver.receive.has_work()) else { return false };
        match tap.read(&mut self.frame) {
            Ok(Some(bytes)) if bytes > HEADER => self.waiting = bytes,
            Ok(_) => {}
            Err(e) if is_gone(&e) => self.lose_tap(),
            // The host took the frame back, and says why.
            Err(_) => self.counts.dropped += 1,
        }
        self.waiting > 0
    }

    /// Puts the frame that waits into the driver's buffers.
    fn deliver(&mut self) -> Fate {
        let Some(driver) = &mut self.driver else { return Fate::Dropped };
        let most = if driver.features & F_MRG_RXBUF != 0 { usize::from(QUEUE_SIZE) } else { 1 };
        while self.room < self.waiting {
            if self.taken == most {
                self.let_go();
                return Fate::Dropped;
            }
            if self.taken == self.chains.len() {
                self.chains.push(Chain::new());
            }
            let chain = &mut self.chains[self.taken];
            match driver.receive.pop(chain) {
                Ok(true) => {}
                Ok(false) => return Fate::Waits,
                Err(_) => return Fate::Broken,
            }
            self.taken += 1;
            // The header is in one piece, whatever the driver agreed on.
            let here = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
            if here < HEADER {
                return Fate::Broken;
            }
            self.room = self.room.saturating_add(here);
        }
        let buffers = u16::try_from(self.taken).unwrap_or(u16::MAX);
        self.frame[BUFFERS..HEADER].copy_from_slice(&buffers.to_le_bytes());
        let mut rest = &self.frame[..self.waiting];
        for chain in &mut self.chains[..self.taken] {
            chain.shorten(rest.len() as u64);
            let (now, later) = rest.split_at(chain.fill(rest));
            driver.receive.complete(chain, u32::try_from(now.len()).unwrap_or(0));
            rest = later;
        }
        (self.taken, self.room) = (0, 0);
        Fate::Done
    }
}

/// Whether a frame asks the host for nothing but what was agreed on. What else there is in its
/// header is taken out: it means nothing in this direction.
fn is_fit(header: &mut [u8; HEADER], features: u64) -> bool {
    let has = |feature: u64| features & feature != 0;
    header[FLAGS] &= NEEDS_SUM;
    header[BUFFERS..].fill(0);
    let kind = match header[KIND] {
        0 => true,
        KIND_TCP4 => has(F_HOST_TSO4),
        KIND_TCP6 => has(F_HOST_TSO6),
        _ => false,
    };
    kind && (header[FLAGS] == 0 || has(F_CSUM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_asks_for_nothing_that_was_not_agreed_on() {
        let fit = |flags: u8, kind: u8, features: u64| {
            let mut header = [0xff; HEADER];
            (header[FLAGS], header[KIND]) = (flags, kind);
            let fit = is_fit(&mut header, features);
            assert_eq!((header[FLAGS], header[BUFFERS]), (flags & NEEDS_SUM, 0));
            fit
        };
        assert!(fit(0, 0, 0) && fit(2, 0, 0));
        assert!(!fit(NEEDS_SUM, 0, 0) && fit(NEEDS_SUM, 0, F_CSUM));
        for (kind, feature) in [(KIND_TCP4, F_HOST_TSO4), (KIND_TCP6, F_HOST_TSO6)] {
            assert!(!fit(NEEDS_SUM, kind, F_CSUM) && fit(NEEDS_SUM, kind, F_CSUM | feature));
        }
        for kind in [2, 3, 5, 0x81, 0xff] {
            assert!(!fit(0, kind, u64::MAX), "{kind}");
        }
    }
}
