//! Virtio over memory-mapped registers (version 2 of the transport): what every virtio device has
//! in common.
//!
//! The registers are touched by vCPU threads, one at a time (the bus locks). What a device raises
//! comes from its own thread as well, so that part ([`Notifier`]) is shared and atomic.
//!
//! A driver that does things out of order gets nothing: addresses are taken only while a queue is
//! not ready, a device starts at DRIVER_OK only if the features are ones it offered, and whatever
//! goes wrong with a ring sets NEEDS_RESET. None of it is logged; the guest could do it for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use format::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use vhost_blk::event::EventFd;
use vhost_blk::memory::UserAddr;
use vhost_blk::queue::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, QueueSetup, RingAddrs};

use super::bus::MmioDevice;
use super::view::GuestView;
use crate::wires::Interrupt;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "OFFS", read backwards as the others are: no assigned vendor.
const VENDOR: u32 = 0x5346_464f;

/// Offset of the register that a driver writes the number of a queue to.
pub(super) const QUEUE_NOTIFY: u64 = 0x50;
const CONFIG: u64 = 0x100;

/// Feature bits that belong to the rings and so are offered for every device.
const RING_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

const STATUS_FEATURES_OK: u32 = 8;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_NEEDS_RESET: u32 = 64;

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// What a device says to its driver without being asked.
pub(super) struct Notifier {
    interrupt: Arc<dyn Interrupt>,
    status: AtomicU32,
    needs_reset: AtomicBool,
    failed: AtomicU64,
}

impl Notifier {
    pub(super) fn new(interrupt: Arc<dyn Interrupt>) -> Notifier {
        Notifier {
            interrupt,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            failed: AtomicU64::new(0),
        }
    }

    /// Requests were given back.
    pub(super) fn used(&self) {
        self.raise(INTERRUPT_USED);
    }

    /// The interrupt itself, for somebody else who gives requests back. The cause is then shown for
    /// as long as [`VirtioDevice::completes_unseen`] says so.
    pub(super) fn bell(&self) -> Result<EventFd> {
        self.interrupt.bell()
    }

    /// The configuration space changed.
    pub(super) fn config_changed(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    /// The driver broke a ring: the device does nothing more until it is reset.
    pub(super) fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release); // pairs with the load in `status`
        self.config_changed();
    }

    fn raise(&self, cause: u32) {
        // Before the edge, and pairs with the load by which the driver asks for the cause: an edge
        // without a cause would be taken for somebody else's.
        self.status.fetch_or(cause, Ordering::Release);
        // Raising is a write to an eventfd, which fails only if the machine is going away.
        if self.interrupt.raise().is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed); // a statistic
        }
    }

    fn reset(&self) {
        self.status.store(0, Ordering::Release); // pairs with the load of the cause
        self.needs_reset.store(false, Ordering::Release); // as in `needs_reset`
    }
}

/// A ring as the driver set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ring {
    size: u16,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
    /// Position, as `vhost_blk::queue::Queue::base` gives it. Only in a saved state.
    base: u32,
}

impl Ring {
    fn new(size: u16) -> Ring {
        Ring { size, ready: false, desc: 0, driver: 0, device: 0, base: 0 }
    }

    /// What `vhost_blk` starts a ring from. Ring addresses are the guest's own: see
    /// [`GuestView`].
    fn setup(&self, index: u16, features: u64, view: &GuestView) -> QueueSetup {
        QueueSetup {
            index,
            size: self.size,
            addrs: RingAddrs {
                desc: UserAddr(self.desc),
                driver: UserAddr(self.driver),
                device: UserAddr(self.device),
            },
            features,
            base: self.base,
            memory: view.memory(),
            inflight: None,
            log: view.log(self.device),
        }
    }
}

/// What makes one virtio device different from another.
pub(super) trait VirtioDevice: Send {
    /// Device type.
    fn id(&self) -> u32;
    /// Number of queues.
    fn queues(&self) -> u16;
    /// Most descriptors of a queue.
    fn queue_size_max(&self) -> u16;
    /// Offered features, without those of the rings.
    fn features(&self) -> u64;
    /// Reads configuration space. `data` is zeroed.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Changes whenever what `read_config` gives may have changed.
    fn config_generation(&self) -> u32;
    /// Starts: the driver accepted `features` and set up `rings`.
    fn start(&mut self, features: u64, rings: Vec<QueueSetup>) -> Result<()>;
    /// Stops and forgets the rings.
    fn stop(&mut self);
    /// The driver announced requests in a queue by a register access.
    fn notify(&mut self, queue: u16);
    /// Whether somebody else gives requests back and raises the interrupt, so that nobody here can
    /// note the cause.
    fn completes_unseen(&self) -> bool {
        false
    }
    /// The position of each ring. The device is quiet.
    fn bases(&self) -> Vec<u32>;
    /// What else is to be saved.
    fn save(&self) -> serde_json::Value;
    /// Takes over what `save` gave. Called before `start`.
    fn restore(&mut self, state: &serde_json::Value) -> Result<()>;
}

/// A device's registers, saved.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct VirtioState {
    id: u32,
    status: u32,
    interrupt: u32,
    needs_reset: bool,
    features: u64,
    features_select: (u32, u32),
    queue_select: u32,
    rings: Vec<Ring>,
    device: serde_json::Value,
}

/// The registers of one device.
pub(super) struct VirtioMmio {
    device: Box<dyn VirtioDevice>,
    notifier: Arc<Notifier>,
    view: Arc<GuestView>,
    status: u32,
    /// Accepted features.
    features: u64,
    /// Which half of the offered and of the accepted features is looked at.
    features_select: (u32, u32),
    queue_select: u32,
    rings: Vec<Ring>,
}

impl VirtioMmio {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        notifier: Arc<Notifier>,
        view: Arc<GuestView>,
    ) -> VirtioMmio {
        let rings = vec![Ring::new(device.queue_size_max()); device.queues().into()];
        VirtioMmio {
            device,
            notifier,
            view,
            status: 0,
            features: 0,
            features_select: (0, 0),
            queue_select: 0,
            rings,
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    fn ring(&self) -> Option<&Ring> {
        self.rings.get(usize::try_from(self.queue_select).ok()?)
    }

    /// The selected ring, while the driver may still change it.
    fn ring_to_set_up(&mut self) -> Option<&mut Ring> {
        let ring = self.rings.get_mut(usize::try_from(self.queue_select).ok()?)?;
        (!ring.ready).then_some(ring)
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.id(),
            0x0c => VENDOR,
            0x10 => half(self.offered(), self.features_select.0),
            0x34 => self.ring().map_or(0, |_| self.device.queue_size_max().into()),
            0x44 => self.ring().map_or(0, |r| r.ready.into()),
            // Pairs with the store in `Notifier::raise`: what the driver finds in its ring now is
            // at least what this cause was raised for.
            0x60 => self.notifier.status.load(Ordering::Acquire) | self.unseen(),
            0x70 => self.status | self.broken(),
            0xfc => self.device.config_generation(),
            // Shared memory regions: there are none, which reads as a length of all ones.
            0xb0 | 0xb4 => u32::MAX,
            _ => 0,
        }
    }

    /// A driver that finds nothing in its ring takes the interrupt for somebody else's.
    fn unseen(&self) -> u32 {
        if self.device.completes_unseen() { INTERRUPT_USED } else { 0 }
    }

    fn broken(&self) -> u32 {
        // Pairs with the store in `Notifier::needs_reset`.
        let broken = self.notifier.needs_reset.load(Ordering::Acquire);
        if broken { STATUS_NEEDS_RESET } else { 0 }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            0x14 => self.features_select.0 = value,
            0x20 if self.status & STATUS_FEATURES_OK == 0 => match self.features_select.1 {
                0 => self.features = low(self.features),
                1 => self.features = high(self.features),
                _ => {}
            },
            0x24 => self.features_select.1 = value,
            0x30 => self.queue_select = value,
            0x38 => {
                let most = u32::from(self.device.queue_size_max());
                if let (Some(ring), true) = (self.ring_to_set_up(), value <= most) {
                    ring.size = u16::try_from(value).unwrap_or(0);
                }
            }
            0x44 => self.set_ready(value == 1),
            QUEUE_NOTIFY => {
                if let (Ok(queue), true) =
                    (u16::try_from(value), self.status & STATUS_DRIVER_OK != 0)
                {
                    self.device.notify(queue);
                }
            }
            0x64 => {
                // Pairs with the update in `Notifier::raise`: a cause that comes after the driver
                // looked is not taken away by its acknowledgement of an older one of another kind.
                self.notifier.status.fetch_and(!value, Ordering::AcqRel);
            }
            0x70 => self.set_status(value),
            _ => {
                let Some(ring) = self.ring_to_set_up() else { return };
                match offset {
                    0x80 => ring.desc = low(ring.desc),
                    0x84 => ring.desc = high(ring.desc),
                    0x90 => ring.driver = low(ring.driver),
                    0x94 => ring.driver = high(ring.driver),
                    0xa0 => ring.device = low(ring.device),
                    0xa4 => ring.device = high(ring.device),
                    _ => {}
                }
            }
        }
    }

    fn set_ready(&mut self, ready: bool) {
        // A single ring cannot be stopped; it goes with the whole device.
        if self.status & STATUS_DRIVER_OK == 0
            && let Some(ring) =
                usize::try_from(self.queue_select).ok().and_then(|i| self.rings.get_mut(i))
        {
            ring.ready = ready;
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let new = value & !self.status;
        self.status = value & !STATUS_NEEDS_RESET;
        if new & STATUS_FEATURES_OK != 0 && !self.features_are_fit() {
            self.status &= !STATUS_FEATURES_OK;
        }
        if new & STATUS_DRIVER_OK != 0 && self.start().is_err() {
            self.notifier.needs_reset();
        }
    }

    /// Whether the driver accepted what was offered and nothing else. Rings older than version 1
    /// have another layout and are not supported.
    fn features_are_fit(&self) -> bool {
        self.features & !self.offered() == 0 && self.features & F_VERSION_1 != 0
    }

    fn start(&mut self) -> Result<()> {
        if self.status & STATUS_FEATURES_OK == 0 || !self.features_are_fit() {
            return Err(Error::invalid("a driver that did not agree on the features"));
        }
        let rings = (0..).zip(&self.rings);
        if !self.rings.iter().all(|r| r.ready) {
            return Err(Error::invalid("a driver that did not set up all queues"));
        }
        let setups = rings.map(|(i, r)| r.setup(i, self.features, &self.view)).collect();
        self.device.start(self.features, setups)
    }

    fn reset(&mut self) {
        self.device.stop();
        self.notifier.reset();
        (self.status, self.features, self.features_select, self.queue_select) = (0, 0, (0, 0), 0);
        self.rings.fill(Ring::new(self.device.queue_size_max()));
    }

    fn is_running(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0 && self.broken() == 0
    }

    /// Everything the driver knows about the device. The device is quiet.
    pub(super) fn save(&self) -> VirtioState {
        let mut rings = self.rings.clone();
        if self.is_running() {
            for (ring, base) in rings.iter_mut().zip(self.device.bases()) {
                ring.base = base;
            }
        }
        VirtioState {
            id: self.device.id(),
            status: self.status,
            // Nothing runs that could change these two: the device is quiet.
            interrupt: self.notifier.status.load(Ordering::Acquire),
            needs_reset: self.notifier.needs_reset.load(Ordering::Acquire),
            features: self.features,
            features_select: self.features_select,
            queue_select: self.queue_select,
            rings,
            device: self.device.save(),
        }
    }

    /// Goes on where another device was saved. The device is new and quiet, guest memory is what it
    /// was, and no vCPU runs.
    ///
    /// # Errors
    /// `Invalid` when the state is not one of this device; `Unsupported` when the guest uses what
    /// this device does not offer.
    pub(super) fn restore(&mut self, state: &VirtioState) -> Result<()> {
        if state.id != self.device.id() || state.rings.len() != self.rings.len() {
            return Err(Error::invalid("the state of another device"));
        }
        if state.features & !self.offered() != 0 {
            return Err(Error::new(
                Kind::Unsupported,
                "the guest uses features that the device does not have here",
            ));
        }
        self.status = state.status;
        self.features = state.features;
        self.features_select = state.features_select;
        self.queue_select = state.queue_select;
        self.rings.clone_from(&state.rings);
        // No vCPU runs yet: nothing is ordered by these.
        self.notifier.status.store(state.interrupt, Ordering::Release);
        self.notifier.needs_reset.store(state.needs_reset, Ordering::Release);
        self.device.restore(&state.device)?;
        if self.is_running() { self.start() } else { Ok(()) }
    }

    /// Tells the driver to look at everything once: an interrupt that was on its way when the state
    /// was saved is lost otherwise. One too many is harmless.
    pub(super) fn raise_again(&self) {
        if self.status & STATUS_DRIVER_OK != 0 {
            self.notifier.used();
        }
    }
}

fn half(word: u64, select: u32) -> u32 {
    let word = match select {
        0 => word & 0xffff_ffff,
        1 => word >> 32,
        _ => 0,
    };
    u32::try_from(word).unwrap_or(0)
}

impl MmioDevice for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            self.device.read_config(offset - CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            self.device.write_config(offset - CONFIG, data);
        } else if let (Ok(word), true) = (data.try_into(), offset.is_multiple_of(4)) {
            self.set_register(offset, u32::from_le_bytes(word));
        }
    }
}
