//! A front end without rings of its own: it passes a guest's ring on, with the guest's memory and
//! doorbells, and the device serves it without anybody in between.
//!
//! Invariants:
//! - The device has the ring from [`DirectClient::start`] until the answer to
//!   [`DirectClient::stop_soon`], or until it is gone. Nothing is asked or told in between those
//!   two.
//! - What the device has begun is in an in-flight area that we keep. It is given to the next
//!   device after a [`DirectClient::reconnect`], and forgotten only when the ring's driver is gone.
//! - Addresses of rings are the guest's own, so the front end's address of a region is its guest
//!   address.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use format::{Error, Kind, Result};

use super::front_end::{Channel, FrontEnd};
use crate::blk::F_CONFIG_WCE;
use crate::event::EventFd;
use crate::memory::RegionSpec;
use crate::proto::{self, F_PROTOCOL_FEATURES, feature, request};
use crate::queue::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, RingAddrs};
use crate::session::PROTOCOL_FEATURES;

/// Protocol features without which a ring cannot be passed on.
const NEEDED: u64 = feature::REPLY_ACK
    | feature::CONFIG
    | feature::INFLIGHT_SHMFD
    | feature::CONFIGURE_MEM_SLOTS
    | feature::BACKEND_REQ;
/// Ring features that the device has to have: the guest is offered them.
const RING_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// Guest memory that is one file, and can be mapped by somebody else.
#[derive(Debug, Clone)]
pub struct SharedMemory {
    /// The file.
    pub file: Arc<OwnedFd>,
    /// Where which part of it is in guest-physical space. Guest and front-end addresses are equal.
    pub regions: Vec<RegionSpec>,
}

/// A guest's ring, as its driver set it up, and its doorbells.
#[derive(Debug)]
pub struct GuestRing<'a> {
    /// Descriptors.
    pub size: u16,
    /// Where it is, in guest addresses.
    pub addrs: RingAddrs,
    /// Features that the driver accepted.
    pub features: u64,
    /// Whether the guest's cache mode is write-back. Counts if the driver accepted the switch.
    pub write_back: bool,
    /// Rung by the guest.
    pub kick: &'a EventFd,
    /// Rung by the device: the guest's interrupt.
    pub call: &'a EventFd,
    /// Rung by the device when the driver broke the ring.
    pub err: &'a EventFd,
}

/// The connection over which a ring is passed on; see the module's head. One ring, number 0.
#[derive(Debug)]
pub struct DirectClient {
    front: FrontEnd,
    memory: SharedMemory,
    /// Features that the device offers.
    offered: u64,
    channel: Channel,
    inflight: Option<(proto::Inflight, OwnedFd)>,
}

fn state(num: u32) -> proto::VringState {
    proto::VringState { index: 0, num }
}

fn region(spec: &RegionSpec) -> proto::SingleMemRegion {
    let RegionSpec { guest, user, size, offset } = *spec;
    let region = proto::MemRegion { guest: guest.0, size, user: user.0, offset };
    proto::SingleMemRegion { padding: 0, region }
}

impl DirectClient {
    /// Connects to the device at `path`, and shares `memory` with it.
    ///
    /// # Errors
    /// `Unsupported` when it lacks what this needs; what the device says.
    pub fn connect(path: &Path, memory: SharedMemory) -> Result<DirectClient> {
        let (front, offered, channel) = open(path, &memory)?;
        Ok(DirectClient { front, memory, offered, channel, inflight: None })
    }

    /// Goes over to another device, or to the same one after it died. The ring is not started.
    ///
    /// # Errors
    /// As [`DirectClient::connect`], and when the device offers less than before.
    pub fn reconnect(&mut self, path: &Path) -> Result<()> {
        let (mut front, offered, channel) = open(path, &self.memory)?;
        if self.offered & !offered != 0 {
            return Err(Error::new(Kind::Unsupported, "the back end offers other features now"));
        }
        if let Some((area, file)) = &self.inflight {
            front.tell(request::SET_INFLIGHT_FD, area, &[file.as_fd()])?;
        }
        (self.front, self.channel) = (front, channel);
        Ok(())
    }

    /// Features that the device offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Has the device serve `ring` from position `base` on, which may be that of the last used
    /// entry when an in-flight area says more.
    ///
    /// # Errors
    /// What the device says.
    pub fn start(&mut self, ring: &GuestRing<'_>, base: u32) -> Result<()> {
        let front = &mut self.front;
        let features = (ring.features & self.offered) | F_PROTOCOL_FEATURES;
        front.tell_soon(request::SET_FEATURES, &features, &[])?;
        if features & F_CONFIG_WCE != 0 {
            front.set_write_cache(ring.write_back)?;
        }
        if self.inflight.is_none() {
            let queue_size = ring.size;
            let wish = proto::Inflight { size: 0, offset: 0, queues: 1, queue_size, padding: 0 };
            let (area, file) = front.ask(request::GET_INFLIGHT_FD, &wish, &[])?;
            let file = file.ok_or_else(|| Error::invalid("an in-flight area without a file"))?;
            self.inflight = Some((area, file));
        }
        front.tell_soon(request::SET_VRING_NUM, &state(ring.size.into()), &[])?;
        front.tell_soon(request::SET_VRING_BASE, &state(base), &[])?;
        let (desc, used, avail) = (ring.addrs.desc.0, ring.addrs.device.0, ring.addrs.driver.0);
        let addr = proto::VringAddr { index: 0, flags: 0, desc, used, avail, log: 0 };
        front.tell_soon(request::SET_VRING_ADDR, &addr, &[])?;
        let bells = [
            (request::SET_VRING_ERR, ring.err),
            (request::SET_VRING_CALL, ring.call),
            (request::SET_VRING_KICK, ring.kick),
        ];
        for (code, bell) in bells {
            front.tell_soon(code, &0u64, &[bell.as_fd()])?;
        }
        front.tell(request::SET_VRING_ENABLE, &state(1), &[])
    }

    /// Asks the device to finish what it has in work and give the ring back;
    /// [`DirectClient::stopped`] tells when it did.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn stop_soon(&mut self) -> Result<()> {
        self.front.ask_soon(request::GET_VRING_BASE, &state(0))
    }

    /// The position of the ring, once the device gave it back. Behind the last used entry there are
    /// then requests which the device could not finish.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn stopped(&mut self) -> Result<Option<u32>> {
        let answer: Option<proto::VringState> = self.front.answer(request::GET_VRING_BASE)?;
        Ok(answer.map(|state| state.num))
    }

    /// Forgets what the device has begun: nobody waits for it any more.
    pub fn forget(&mut self) {
        self.inflight = None;
    }

    /// Takes guest memory back: when this returns, the device does not map it any more.
    ///
    /// # Errors
    /// What the device says.
    pub fn unshare(&mut self) -> Result<()> {
        for spec in &self.memory.regions {
            self.front.tell_soon(request::REM_MEM_REG, &region(spec), &[])?;
        }
        self.front.settle()
    }

    /// Descriptors to sleep on, new after every [`DirectClient::reconnect`]: the connection, which
    /// becomes readable when the ring was given back or the device is gone, and the channel on
    /// which it announces changes of the configuration.
    ///
    /// # Errors
    /// The host's error when no descriptor is free.
    pub fn sources(&self) -> Result<(OwnedFd, OwnedFd)> {
        Ok((self.front.as_fd().try_clone_to_owned()?, self.channel.source()?))
    }

    /// Reads configuration bytes from `offset`.
    ///
    /// # Errors
    /// `Invalid` when the device does not have them.
    pub fn config(&mut self, offset: u32, dst: &mut [u8]) -> Result<()> {
        self.front.config(offset, dst)
    }

    /// Switches the cache mode, which the driver must have accepted to be a switch.
    ///
    /// # Errors
    /// `Invalid` when the device refuses.
    pub fn set_write_cache(&mut self, write_back: bool) -> Result<()> {
        self.front.set_write_cache(write_back)
    }

    /// Whether the device announced that its configuration changed.
    ///
    /// # Errors
    /// `Invalid` when it announces something else.
    pub fn config_changed(&mut self) -> Result<bool> {
        self.channel.config_changed(0)
    }
}

/// A connection on which everything is said that does not depend on the driver.
fn open(path: &Path, memory: &SharedMemory) -> Result<(FrontEnd, u64, Channel)> {
    let mut front = FrontEnd::connect(path)?;
    let (offered, protocol) = front.greet(PROTOCOL_FEATURES)?;
    if NEEDED & !protocol != 0 || RING_FEATURES & !offered != 0 {
        let reason = "it lacks what a ring needs that is passed on, as the in-flight area";
        return Err(Error::new(Kind::Unsupported, reason));
    }
    let channel = Channel::open(&mut front)?;
    for spec in &memory.regions {
        front.tell_soon(request::ADD_MEM_REG, &region(spec), &[memory.file.as_fd()])?;
    }
    front.settle()?;
    Ok((front, offered, channel))
}
