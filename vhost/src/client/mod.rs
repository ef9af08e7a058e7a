//! Driver side: a small vhost-user-blk front end.
//!
//! A client owns one arena of shared memory with its rings, request headers and data, so the
//! device never sees any other memory of this process. It survives the back end: after
//! [`Client::reconnect`] the rings are where they were, and with an in-flight area the next back
//! end finishes what the last one had in work.
//!
//! [`Client`] is the control half; the [`ClientQueue`]s it makes are independent of it and can
//! each go to a thread. [`DirectClient`] has no rings of its own: it passes a guest's on.

mod arena;
mod direct;
mod front_end;
mod packed;
mod queue;
mod split;

pub use arena::{Arena, GUEST_BASE};
pub use direct::{DirectClient, GuestRing, SharedMemory};
use front_end::Channel;
pub use front_end::FrontEnd;
pub use queue::{ClientQueue, Completion, Op, SPANS_MAX, Span};

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use format::{Error, Kind, Result};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use zerocopy::IntoBytes as _;

use crate::blk::{F_MQ, SECTOR};
use crate::dirty_log::{DirtyLog, LOG_PAGE};
use crate::event::EventFd;
use crate::memory::GuestAddr;
use crate::proto::{self, F_PROTOCOL_FEATURES, feature, request};
use crate::queue::{F_LOG_ALL, F_RING_PACKED};
use crate::socket::concat;
use crate::util::{low16, wide};
use queue::SLOT_SIZE;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    addr: GuestAddr,
    len: u32,
    writable: bool,
}

/// Where the three parts of a ring lie in the arena, as offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingOffsets {
    /// Descriptors.
    pub desc: u64,
    /// Available ring, or driver event suppression.
    pub driver: u64,
    /// Used ring, or device event suppression.
    pub device: u64,
}

/// Where everything of one queue lies in the arena, as offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueuePlace {
    /// The ring.
    pub ring: RingOffsets,
    /// Number of descriptors.
    pub size: u16,
    /// Request headers.
    slots: u64,
    /// Data.
    data: u64,
    /// Bytes of data.
    data_size: u64,
}

impl QueuePlace {
    fn new(start: u64, size: u16, data_size: u64) -> QueuePlace {
        let n = u64::from(size);
        let desc = start;
        let driver = desc + 16 * n;
        let device = (driver + 6 + 2 * n).next_multiple_of(4);
        let slots = (device + 6 + 8 * n).next_multiple_of(64);
        let data = (slots + SLOT_SIZE * n).next_multiple_of(4096);
        QueuePlace { ring: RingOffsets { desc, driver, device }, size, slots, data, data_size }
    }

    fn end(&self) -> u64 {
        (self.data + self.data_size).next_multiple_of(4096)
    }
}

/// The position of a new packed ring: index 0 of the first round, for both directions.
const PACKED_START: u32 = 0x8000_8000;

/// What a client asks for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Number of queues.
    pub queues: u16,
    /// Descriptors per queue; for split rings a power of two.
    pub queue_size: u16,
    /// Data bytes of each queue.
    pub data_size: u64,
    /// Virtio features to accept if they are offered.
    pub features: u64,
    /// Protocol features to accept if they are offered. 0 speaks the oldest dialect.
    pub protocol: u64,
    /// Bytes of the configuration space to read while connecting, which costs no time then; see
    /// [`Client::first_config`].
    pub first_config: usize,
}

impl Default for Options {
    /// One queue of 128 with 1 MiB of data, all features but the packed ring and the dirty log.
    fn default() -> Self {
        Options {
            queues: 1,
            queue_size: 128,
            data_size: 1 << 20,
            features: !(F_RING_PACKED | F_LOG_ALL),
            protocol: crate::session::PROTOCOL_FEATURES,
            first_config: 0,
        }
    }
}

#[derive(Debug)]
struct Doorbells {
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    err: EventFd,
}

/// The control half of a front end; see the module's head.
#[derive(Debug)]
pub struct Client {
    front: FrontEnd,
    options: Options,
    features: u64,
    protocol: u64,
    arena: Arc<Arena>,
    places: Vec<QueuePlace>,
    doorbells: Vec<Doorbells>,
    inflight: Option<(proto::Inflight, OwnedFd)>,
    log: Option<Arc<DirtyLog>>,
    channel: Option<Channel>,
    first_config: Vec<u8>,
}

impl Client {
    /// Connects to the back end at `path` and starts its queues.
    ///
    /// # Errors
    /// `Unsupported` when it cannot do what `options` need; whatever goes wrong on the way.
    pub fn connect(path: &Path, options: Options) -> Result<(Client, Vec<ClientQueue>)> {
        Client::start(UnixStream::connect(path)?, options)
    }

    /// As [`Client::connect`], over a connected socket.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn start(socket: UnixStream, options: Options) -> Result<(Client, Vec<ClientQueue>)> {
        let mut places = Vec::new();
        let mut end = 0;
        for _ in 0..options.queues {
            places.push(QueuePlace::new(end, options.queue_size, options.data_size));
            end = places[places.len() - 1].end();
        }
        let doorbell = || -> Result<Doorbells> {
            let (kick, call) = (Arc::new(EventFd::new()?), Arc::new(EventFd::new()?));
            Ok(Doorbells { kick, call, err: EventFd::new()? })
        };
        let mut client = Client {
            front: FrontEnd::new(socket),
            options,
            features: 0,
            protocol: 0,
            arena: Arc::new(Arena::new(end)?),
            places,
            doorbells: (0..options.queues).map(|_| doorbell()).collect::<Result<_>>()?,
            inflight: None,
            log: None,
            channel: None,
            first_config: vec![0; options.first_config],
        };
        client.negotiate()?;
        client.set_up()?;
        let pairs = client.places.iter().zip(&client.doorbells);
        let queue = |(place, bells): (&QueuePlace, &Doorbells)| {
            let doorbells = (bells.kick.clone(), bells.call.clone());
            ClientQueue::new(client.arena.clone(), *place, client.features, doorbells)
        };
        let queues = pairs.map(queue).collect();
        let base = if client.is_packed() { PACKED_START } else { 0 };
        for i in 0..options.queues {
            if i > 0 {
                // A socket does not hold what there is to say of many queues.
                client.front.settle()?;
            }
            client.begin_queue(i, base)?;
        }
        if options.first_config > 0 {
            client.front.ask_config(0, &client.first_config)?;
            client.front.take_config(&mut client.first_config)?;
        }
        client.front.settle()?;
        Ok((client, queues))
    }

    fn is_packed(&self) -> bool {
        self.features & F_RING_PACKED != 0
    }

    /// Goes over to another back end, or to the same one after it died. Rings and requests in work
    /// stay as they are.
    ///
    /// # Errors
    /// `Unsupported` when the new back end does not offer what was negotiated before, and for
    /// packed rings without an in-flight area, whose position nobody knows then; whatever else
    /// goes wrong on the way.
    pub fn reconnect(&mut self, path: &Path) -> Result<()> {
        if self.is_packed() && self.inflight.is_none() {
            return Err(Error::new(Kind::Unsupported, "packed rings without an in-flight area"));
        }
        self.front = FrontEnd::connect(path)?;
        let (features, protocol) = (self.features, self.protocol);
        self.negotiate()?;
        if (self.features, self.protocol) != (features, protocol) {
            return Err(Error::new(Kind::Unsupported, "the back end offers other features now"));
        }
        self.set_up()?;
        if let Some(log) = self.log.clone() {
            self.send_log(&log)?;
        }
        for i in 0..self.options.queues {
            self.start_queue(i, self.used_index(i))?;
            // It may have died between taking a kick and looking at the ring.
            self.kick(i);
        }
        Ok(())
    }

    fn negotiate(&mut self) -> Result<()> {
        let (offered, protocol) = self.front.greet(self.options.protocol)?;
        let wanted = self.options.features | F_PROTOCOL_FEATURES | (self.features & F_LOG_ALL);
        (self.features, self.protocol) = (offered & wanted, protocol);
        if self.options.queues > 1 && (!self.has(feature::MQ) || self.features & F_MQ == 0) {
            return Err(Error::new(Kind::Unsupported, "the device has one queue only"));
        }
        if self.has(feature::MQ) {
            // The answer is taken in `set_up`.
            self.front.ask_ahead(request::GET_QUEUE_NUM, &[0u8; 0], &[])?;
        }
        self.front.tell_soon(request::SET_FEATURES, &self.features, &[])
    }

    fn has(&self, bit: u64) -> bool {
        self.protocol & bit != 0
    }

    /// Backend channel, memory and in-flight area.
    fn set_up(&mut self) -> Result<()> {
        if self.has(feature::BACKEND_REQ) {
            self.channel = Some(Channel::open(&mut self.front)?);
        }
        let spec = self.arena.region();
        let (guest, user) = (spec.guest.0, spec.user.0);
        let region = proto::MemRegion { guest, size: spec.size, user, offset: spec.offset };
        if self.has(feature::CONFIGURE_MEM_SLOTS) {
            let single = proto::SingleMemRegion { padding: 0, region };
            self.front.tell_soon(request::ADD_MEM_REG, &single, &[self.arena.file()])?;
        } else {
            let table = proto::MemTable { regions: 1, padding: 0 };
            let bytes = concat(&table, region.as_bytes());
            self.front.tell_soon(request::SET_MEM_TABLE, &bytes[..], &[self.arena.file()])?;
        }
        let lacks_area = self.has(feature::INFLIGHT_SHMFD) && self.inflight.is_none();
        if lacks_area {
            let Options { queues, queue_size, .. } = self.options;
            let wish = proto::Inflight { size: 0, offset: 0, queues, queue_size, padding: 0 };
            self.front.ask_ahead(request::GET_INFLIGHT_FD, &wish, &[])?;
        }
        if self.has(feature::MQ) {
            let most: u64 = self.front.take_answer()?.0;
            if most < u64::from(self.options.queues) {
                return Err(Error::new(Kind::Unsupported, "the device has fewer queues"));
            }
        }
        if lacks_area {
            let (area, file) = self.front.take_answer()?;
            let file = file.ok_or_else(|| Error::invalid("an in-flight area without a file"))?;
            self.inflight = Some((area, file));
        }
        if let Some((area, file)) = &self.inflight {
            self.front.tell_soon(request::SET_INFLIGHT_FD, area, &[file.as_fd()])?;
        }
        Ok(())
    }

    fn send_addr(&mut self, i: u16) -> Result<()> {
        let ring = self.places[usize::from(i)].ring;
        let addr = proto::VringAddr {
            index: i.into(),
            flags: if self.log.is_some() { proto::VRING_F_LOG } else { 0 },
            desc: self.arena.user(ring.desc).0,
            used: self.arena.user(ring.device).0,
            avail: self.arena.user(ring.driver).0,
            log: self.arena.guest(ring.device).0,
        };
        self.front.tell_soon(request::SET_VRING_ADDR, &addr, &[])
    }

    /// Starts queue `i` at position `base`, as GET_VRING_BASE reports it.
    ///
    /// # Errors
    /// What the back end says.
    pub fn start_queue(&mut self, i: u16, base: u32) -> Result<()> {
        self.begin_queue(i, base)?;
        self.front.settle()
    }

    /// As [`Client::start_queue`], without waiting.
    fn begin_queue(&mut self, i: u16, base: u32) -> Result<()> {
        let state = |num: u32| proto::VringState { index: i.into(), num };
        let size = u32::from(self.options.queue_size);
        self.front.tell_soon(request::SET_VRING_NUM, &state(size), &[])?;
        self.front.tell_soon(request::SET_VRING_BASE, &state(base), &[])?;
        self.send_addr(i)?;
        let bells = &self.doorbells[usize::from(i)];
        let word = u64::from(i);
        self.front.tell_soon(request::SET_VRING_ERR, &word, &[bells.err.as_fd()])?;
        self.front.tell_soon(request::SET_VRING_CALL, &word, &[bells.call.as_fd()])?;
        self.front.tell_soon(request::SET_VRING_KICK, &word, &[bells.kick.as_fd()])?;
        if self.features & F_PROTOCOL_FEATURES != 0 {
            self.front.tell_soon(request::SET_VRING_ENABLE, &state(1), &[])?;
        }
        Ok(())
    }

    /// Stops queue `i` after what it has in work; returns its position.
    ///
    /// # Errors
    /// When the back end is gone.
    pub fn stop_queue(&mut self, i: u16) -> Result<u32> {
        let state = proto::VringState { index: i.into(), num: 0 };
        let (state, _) =
            self.front.ask::<_, proto::VringState>(request::GET_VRING_BASE, &state, &[])?;
        Ok(state.num)
    }

    /// The position that is known without asking the back end. Of a packed ring there is none, and
    /// the back end takes it from the in-flight area.
    fn used_index(&self, i: u16) -> u32 {
        if self.is_packed() {
            return PACKED_START;
        }
        let at = self.places[usize::from(i)].ring.device + 2;
        // SAFETY: inside the arena and aligned to 2; both sides access ring words atomically.
        let word = unsafe { AtomicU16::from_ptr(self.arena.at(at, 2).cast()) };
        u32::from(word.load(Ordering::Acquire)) // pairs with the device's Release store
    }

    /// Negotiated virtio features.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Negotiated protocol features.
    #[must_use]
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// Whether queue `i` was reported broken since the last call.
    pub fn queue_broke(&mut self, i: u16) -> bool {
        self.doorbells[usize::from(i)].err.drain()
    }

    /// Kicks queue `i`, whether or not the device asked for it.
    pub fn kick(&self, i: u16) {
        self.doorbells[usize::from(i)].kick.signal();
    }

    /// Descriptors to sleep on, new after every [`Client::reconnect`]: the control connection,
    /// which becomes readable when the back end is gone, and the channel on which it announces
    /// changes of the configuration, if there is one.
    ///
    /// # Errors
    /// The host's error when no descriptor is free.
    pub fn sources(&self) -> Result<(OwnedFd, Option<OwnedFd>)> {
        let channel = self.channel.as_ref().map(Channel::source).transpose()?;
        Ok((self.front.as_fd().try_clone_to_owned()?, channel))
    }

    /// The control connection, for requests that this type does not have.
    pub fn front_end(&mut self) -> &mut FrontEnd {
        &mut self.front
    }

    /// The beginning of the configuration space as it was when this connected: as many bytes as
    /// [`Options::first_config`] says.
    #[must_use]
    pub fn first_config(&self) -> &[u8] {
        &self.first_config
    }

    /// Reads configuration bytes from `offset`.
    ///
    /// # Errors
    /// `Invalid` when the back end does not have them.
    pub fn config(&mut self, offset: u32, dst: &mut [u8]) -> Result<()> {
        self.front.config(offset, dst)
    }

    /// Size of the disk in bytes.
    ///
    /// # Errors
    /// When the back end does not say.
    pub fn disk_size(&mut self) -> Result<u64> {
        let mut sectors = [0; 8];
        self.config(0, &mut sectors)?;
        Ok(u64::from_le_bytes(sectors).saturating_mul(SECTOR))
    }

    /// Whether the disk says that it has a volatile cache.
    ///
    /// # Errors
    /// When the back end does not say.
    pub fn write_cache(&mut self) -> Result<bool> {
        let mut byte = [0];
        self.config(32, &mut byte)?;
        Ok(byte[0] != 0)
    }

    /// Switches the cache mode.
    ///
    /// # Errors
    /// `Invalid` when the back end refuses.
    pub fn set_write_cache(&mut self, write_back: bool) -> Result<()> {
        self.front.set_write_cache(write_back)
    }

    /// Waits for the back end to announce that its configuration changed, at most `timeout_ms`.
    ///
    /// # Errors
    /// `Invalid` when it announces something else.
    pub fn config_changed(&mut self, timeout_ms: u32) -> Result<bool> {
        self.channel.as_mut().map_or(Ok(false), |channel| channel.config_changed(timeout_ms))
    }

    /// Has the back end log what it writes, from now on.
    ///
    /// # Errors
    /// What the back end says.
    pub fn start_log(&mut self) -> Result<Arc<DirtyLog>> {
        let pages = (GUEST_BASE + self.arena.size()).div_ceil(LOG_PAGE);
        let size = pages.div_ceil(8);
        let host = |e| Error::from(std::io::Error::from(e)).tried("create a dirty log");
        let file = memfd_create("vhost-log", MemfdFlags::CLOEXEC).map_err(host)?;
        ftruncate(&file, size).map_err(host)?;
        let log = Arc::new(DirtyLog::map(file, 0, size)?);
        self.send_log(&log)?;
        self.log = Some(log.clone());
        self.log_features(self.features | F_LOG_ALL)?;
        Ok(log)
    }

    /// Ends what [`Client::start_log`] began.
    ///
    /// # Errors
    /// What the back end says.
    pub fn stop_log(&mut self) -> Result<()> {
        self.log = None;
        self.log_features(self.features & !F_LOG_ALL)
    }

    fn log_features(&mut self, features: u64) -> Result<()> {
        self.features = features;
        self.front.tell(request::SET_FEATURES, &features, &[])?;
        (0..low16(wide(self.places.len()))).try_for_each(|i| self.send_addr(i))?;
        self.front.settle()
    }

    fn send_log(&mut self, log: &DirtyLog) -> Result<()> {
        let message = proto::Log { size: wide(log.size()), offset: log.offset() };
        self.front.ask::<_, proto::Log>(request::SET_LOG_BASE, &message, &[log.file()]).map(|_| ())
    }
}
