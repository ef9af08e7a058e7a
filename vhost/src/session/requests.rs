//! The requests of a front end that concern the device as a whole.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use format::{Error, Kind, Result};
use zerocopy::{FromBytes, IntoBytes};

use super::{Device, PROTOCOL_FEATURES, STATUS_NEEDS_RESET, Session};
use crate::blk::{F_CONFIG_WCE, read_config, write_cache_byte};
use crate::dirty_log::{DirtyLog, WriteLog};
use crate::inflight::{InflightArea, InflightSpec};
use crate::memory::{GuestAddr, Memory, REGIONS_MAX, Region, RegionSpec, UserAddr};
use crate::proto::{self, F_PROTOCOL_FEATURES, request};
use crate::queue::F_LOG_ALL;
use crate::socket::{Message, concat, is_unix_stream};
use crate::util::{index, wide};

/// How a request is answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// Granted; an acknowledgement if the front end wants one.
    Done,
    /// A reply of its own.
    Bytes(Vec<u8>),
    /// A reply with a descriptor.
    WithFile(Vec<u8>, OwnedFd),
}

fn number(value: u64) -> Result<Answer> {
    Ok(Answer::Bytes(value.as_bytes().to_vec()))
}

fn done(result: Result<()>) -> Result<Answer> {
    result.map(|()| Answer::Done)
}

impl Session {
    /// Grants a request whose shape is right, or says why not.
    pub(super) fn grant(&mut self, message: Message, device: &mut dyn Device) -> Result<Answer> {
        match message.header.request {
            request::GET_FEATURES => number(offered(device)),
            request::SET_FEATURES => done(self.set_features(message.number()?, device)),
            request::SET_OWNER => Ok(Answer::Done),
            request::RESET_OWNER => done(self.reset_rings()),
            request::GET_PROTOCOL_FEATURES => number(PROTOCOL_FEATURES),
            request::SET_PROTOCOL_FEATURES => done(self.set_protocol_features(message.number()?)),
            request::GET_QUEUE_NUM => number(wide(self.rings.len())),
            request::GET_MAX_MEM_SLOTS => number(wide(REGIONS_MAX)),
            request::SET_MEM_TABLE => done(self.set_mem_table(message, device)),
            request::ADD_MEM_REG => done(self.add_mem_reg(message, device)),
            request::REM_MEM_REG => done(self.rem_mem_reg(&message)),
            request::SET_LOG_BASE => self.set_log_base(message),
            // An eventfd to announce log writes; nobody waits for it, and it may be left unused.
            request::SET_LOG_FD => Ok(Answer::Done),
            request::SET_VRING_NUM => done(self.set_vring_num(&message, device)),
            request::SET_VRING_ADDR => done(self.set_vring_addr(&message, device)),
            request::SET_VRING_BASE => done(self.set_vring_base(&message)),
            request::GET_VRING_BASE => {
                Ok(Answer::Bytes(self.get_vring_base(&message)?.as_bytes().to_vec()))
            }
            request::SET_VRING_KICK => done(self.set_vring_kick(message, device)),
            request::SET_VRING_CALL => done(self.set_vring_call(message)),
            request::SET_VRING_ERR => done(self.set_vring_err(message)),
            request::SET_VRING_ENABLE => done(self.set_vring_enable(&message, device)),
            request::SET_BACKEND_REQ_FD => done(self.set_backend_channel(message)),
            request::GET_CONFIG => self.get_config(&message, device),
            request::SET_CONFIG => done(self.set_config(&message, device)),
            request::GET_INFLIGHT_FD => self.get_inflight(&message),
            request::SET_INFLIGHT_FD => done(self.set_inflight(message)),
            request::RESET_DEVICE => done(self.reset_device(device)),
            request::SET_STATUS => done(self.set_status(message.number()?)),
            request::GET_STATUS => number(self.device_status().into()),
            request::SET_DEVICE_STATE_FD => self.start_transfer(message),
            request::CHECK_DEVICE_STATE => number(u64::from(self.finish_transfer(device).is_err())),
            _ => Err(Error::new(Kind::Unsupported, "the request has a shape but no handler")),
        }
    }

    fn set_features(&mut self, features: u64, device: &mut dyn Device) -> Result<()> {
        if features & !offered(device) != 0 {
            return Err(Error::invalid("features that were not offered"));
        }
        if self.running() && (features ^ self.features) & !F_LOG_ALL != 0 {
            return Err(Error::new(Kind::Busy, "features change while a ring is running"));
        }
        self.features = features;
        self.apply_write_cache(device)?;
        self.mark_what_a_predecessor_wrote();
        self.publish_log()
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !PROTOCOL_FEATURES != 0 {
            return Err(Error::invalid("protocol features that were not offered"));
        }
        self.protocol = features;
        // Relaxed: handles read it under the channel's lock, which is set later.
        self.shared.protocol.store(features, Ordering::Relaxed);
        Ok(())
    }

    /// The cache mode that holds now.
    pub(super) fn write_back(&self, device: &dyn Device) -> bool {
        let caps = device.capabilities();
        match self.cache_choice {
            Some(choice) if self.features & F_CONFIG_WCE != 0 => choice && caps.volatile_cache,
            _ => caps.initial_write_back(self.features),
        }
    }

    /// The cache mode in the configuration space. Some front ends read the space once, before the
    /// driver has negotiated anything, and show the driver that copy for ever: until then it is
    /// what a driver finds that takes all that is offered. Who can read the field by the
    /// specification has taken the cache mode switch.
    fn shown_write_back(&self, device: &dyn Device) -> bool {
        if self.features & !F_PROTOCOL_FEATURES != 0 {
            return self.write_back(device);
        }
        self.cache_choice.unwrap_or(true) && device.capabilities().volatile_cache
    }

    pub(super) fn apply_write_cache(&mut self, device: &mut dyn Device) -> Result<()> {
        let write_back = self.write_back(device);
        // Relaxed, here and below: only this thread writes it; see `ActiveQueue::write_back`.
        let before = self.shared.write_back.load(Ordering::Relaxed);
        if self.cache_known && before == write_back {
            return Ok(());
        }
        // Writes that complete from now on follow the new mode; the device then deals with those
        // that completed before.
        self.shared.write_back.store(write_back, Ordering::Relaxed);
        if let Err(e) = device.write_cache_changed(write_back) {
            self.shared.write_back.store(before, Ordering::Relaxed);
            return Err(e);
        }
        self.cache_known = true;
        Ok(())
    }

    fn set_memory(&mut self, memory: Memory) -> Result<()> {
        if let Some(log) = &self.log {
            log.check_covers(memory.end())?;
        }
        self.memory = Arc::new(memory);
        self.publish_memory()
    }

    fn set_mem_table(&mut self, message: Message, device: &mut dyn Device) -> Result<()> {
        let (head, rest) = proto::MemTable::read_from_prefix(&message.payload)
            .map_err(|_| Error::invalid("the payload has the wrong length"))?;
        let count = index(u64::from(head.regions));
        if count != message.fds.len() || rest.len() != count * size_of::<proto::MemRegion>() {
            return Err(Error::invalid("the number of regions contradicts the message"));
        }
        let mut regions = Vec::with_capacity(count);
        for (raw, fd) in rest.chunks_exact(size_of::<proto::MemRegion>()).zip(message.fds) {
            let raw = proto::MemRegion::read_from_bytes(raw)
                .map_err(|_| Error::invalid("the payload has the wrong length"))?;
            regions.push(Arc::new(Region::map(spec(&raw), fd)?));
        }
        self.set_memory(Memory::new(regions)?)?;
        self.restart(device)
    }

    fn add_mem_reg(&mut self, mut message: Message, device: &mut dyn Device) -> Result<()> {
        let raw: proto::SingleMemRegion = message.body()?;
        let fd = message.fds.pop().ok_or_else(|| Error::invalid("no descriptor"))?;
        let memory = self.memory.with(Region::map(spec(&raw.region), fd)?)?;
        self.set_memory(memory)?;
        self.restart(device)
    }

    fn rem_mem_reg(&mut self, message: &Message) -> Result<()> {
        let raw: proto::SingleMemRegion = message.body()?;
        self.set_memory(self.memory.without(&spec(&raw.region))?)
    }

    fn set_log_base(&mut self, mut message: Message) -> Result<Answer> {
        let raw: proto::Log = message.body()?;
        let fd = message.fds.pop().ok_or_else(|| Error::invalid("no descriptor"))?;
        let log = DirtyLog::map(fd, raw.offset, raw.size)?;
        log.check_covers(self.memory.end())?;
        self.log = Some(Arc::new(log));
        self.mark_what_a_predecessor_wrote();
        self.publish_log()?;
        // Some front ends want their own payload back, the others do not look at it.
        Ok(Answer::Bytes(message.payload))
    }

    /// Marks all of guest memory in the log of a connection that logs from its first ring on: its
    /// front end migrates the guest, and came back after another back end had died.
    ///
    /// The crash: QEMU (10.0, `vhost_user_async_close`) calls its device stopped as soon as the
    /// connection breaks, and then reads no bit of the log that it drops. What the dead back end
    /// wrote since the last pass over the log would never be copied, and the guest would go on at
    /// its destination without it. Nobody knows any more what that was; all can be copied again.
    fn mark_what_a_predecessor_wrote(&self) {
        match &self.log {
            Some(log) if self.features & F_LOG_ALL != 0 && !self.ran => {
                for spec in self.memory.regions().iter().map(|r| r.spec()) {
                    log.mark(spec.guest.0, spec.size);
                }
            }
            _ => {}
        }
    }

    fn set_backend_channel(&mut self, mut message: Message) -> Result<()> {
        let fd = message.fds.pop().ok_or_else(|| Error::invalid("no descriptor"))?;
        if !is_unix_stream(&fd) {
            return Err(Error::invalid("the descriptor is not a Unix stream socket"));
        }
        *self.shared.channel.lock().unwrap_or_else(PoisonError::into_inner) = Some(fd);
        Ok(())
    }

    fn get_config(&self, message: &Message, device: &dyn Device) -> Result<Answer> {
        let (head, bytes) = config(message)?;
        let mut bytes = vec![0; bytes.len()];
        let caps = device.capabilities();
        if read_config(&caps, self.shown_write_back(device), head.offset, &mut bytes) {
            return Ok(Answer::Bytes(concat(&head, &bytes)));
        }
        // A reply without bytes is the protocol's way to say no.
        Ok(Answer::Bytes(concat(&proto::Config { size: 0, ..head }, &[])))
    }

    fn set_config(&mut self, message: &Message, device: &mut dyn Device) -> Result<()> {
        let (head, bytes) = config(message)?;
        let choice = write_cache_byte(head.offset, bytes)
            .ok_or_else(|| Error::invalid("a configuration field that cannot be written"))?;
        if self.features & F_CONFIG_WCE == 0 {
            return Err(Error::invalid("the cache mode switch was not negotiated"));
        }
        let before = self.cache_choice.replace(choice);
        self.apply_write_cache(device).inspect_err(|_| self.cache_choice = before)
    }

    fn get_inflight(&mut self, message: &Message) -> Result<Answer> {
        let raw = inflight(message)?;
        if usize::from(raw.queues) > self.rings.len() {
            return Err(Error::invalid("more queues than the device has"));
        }
        self.no_ring_runs()?;
        let area = InflightArea::create(raw.queues, raw.queue_size)?;
        let file = area.file().try_clone_to_owned()?;
        let spec = area.spec();
        self.inflight = Some(Arc::new(area));
        let reply = proto::Inflight { size: spec.size, offset: spec.offset, ..raw };
        Ok(Answer::WithFile(reply.as_bytes()[..message.payload.len()].to_vec(), file))
    }

    fn set_inflight(&mut self, mut message: Message) -> Result<()> {
        let raw = inflight(&message)?;
        let fd = message.fds.pop().ok_or_else(|| Error::invalid("no descriptor"))?;
        self.no_ring_runs()?;
        let proto::Inflight { size, offset, queues, queue_size, .. } = raw;
        let area = InflightArea::attach(InflightSpec { size, offset, queues, queue_size }, fd)?;
        self.inflight = Some(Arc::new(area));
        Ok(())
    }

    fn no_ring_runs(&self) -> Result<()> {
        match self.running() {
            true => Err(Error::new(Kind::Busy, "a ring is running")),
            false => Ok(()),
        }
    }

    fn reset_device(&mut self, device: &mut dyn Device) -> Result<()> {
        self.reset_rings()?;
        self.features &= F_PROTOCOL_FEATURES;
        self.status = 0;
        self.cache_choice = None;
        self.apply_write_cache(device)
    }

    /// Status 0 stops the device but, unlike a reset, leaves the guest's choice of cache mode: a
    /// front end also sends it when it only pauses a guest.
    fn set_status(&mut self, status: u64) -> Result<()> {
        self.status = u8::try_from(status)
            .map_err(|_| Error::invalid("the device status has only eight bits"))?;
        if self.status == 0 { self.reset_rings() } else { Ok(()) }
    }

    fn device_status(&self) -> u8 {
        let broken = self.rings.iter().any(|r| r.worker.as_ref().is_some_and(|w| w.is_failed()));
        self.status | if broken { STATUS_NEEDS_RESET } else { 0 }
    }
}

fn offered(device: &dyn Device) -> u64 {
    device.capabilities().features() | F_LOG_ALL | F_PROTOCOL_FEATURES
}

fn spec(raw: &proto::MemRegion) -> RegionSpec {
    RegionSpec {
        guest: GuestAddr(raw.guest),
        user: UserAddr(raw.user),
        size: raw.size,
        offset: raw.offset,
    }
}

fn config(message: &Message) -> Result<(proto::Config, &[u8])> {
    let (head, bytes) = proto::Config::read_from_prefix(&message.payload)
        .map_err(|_| Error::invalid("the payload has the wrong length"))?;
    if index(u64::from(head.size)) != bytes.len() {
        return Err(Error::invalid("the number of bytes contradicts the message"));
    }
    Ok((head, bytes))
}

fn inflight(message: &Message) -> Result<proto::Inflight> {
    let mut raw = [0; size_of::<proto::Inflight>()];
    let short = message.payload.len() == proto::INFLIGHT_SHORT;
    if !short && message.payload.len() != raw.len() {
        return Err(Error::invalid("the payload has the wrong length"));
    }
    raw[..message.payload.len()].copy_from_slice(&message.payload);
    proto::Inflight::read_from_bytes(&raw)
        .map_err(|_| Error::invalid("the payload has the wrong length"))
}
