//! Per-ring state of a session, and the requests that change it.
//!
//! Invariant: `worker` is set exactly while a worker thread may own the ring. Size, position and
//! addresses change only while it is not set.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use format::{Error, Kind, Result};

use super::worker::{Mailbox, Update};
use super::{ActiveQueue, Device, Session};
use crate::event::EventFd;
use crate::memory::{UserAddr, fault};
use crate::proto::{F_PROTOCOL_FEATURES, VRING_F_LOG, VRING_NOFD, VringAddr, VringState};
use crate::queue::{F_LOG_ALL, LogTarget, Queue, QueueSetup, RingAddrs, RingFormat};
use crate::socket::Message;
use crate::util::{index, low16, wide};

/// What the front end said about one ring.
#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) addrs: Option<RingAddrs>,
    /// Guest address of the used ring in the dirty log, if its writes are logged.
    pub(super) log: Option<u64>,
    pub(super) base: u32,
    pub(super) kick: Option<EventFd>,
    pub(super) call: Option<EventFd>,
    pub(super) err: Option<EventFd>,
    pub(super) enabled: bool,
    pub(super) worker: Option<Arc<Mailbox>>,
    /// Whether the last worker left requests in work, which the in-flight area then still shows.
    pub(super) undone: bool,
}

impl Ring {
    fn idle(&self) -> Result<()> {
        match self.worker {
            Some(_) => Err(Error::new(Kind::Busy, "the ring is running")),
            None => Ok(()),
        }
    }
}

impl Session {
    fn ring(&mut self, number: u64) -> Result<(u16, &mut Ring)> {
        let i = low16(number);
        let ring =
            if number < wide(self.rings.len()) { self.rings.get_mut(index(number)) } else { None };
        ring.map(|r| (i, r)).ok_or_else(|| Error::invalid("there is no such ring"))
    }

    /// Starts a ring that has everything it needs.
    fn start(&mut self, i: u16, device: &mut dyn Device) -> Result<()> {
        let log = self.log_target(i);
        let enabled = self.features & F_PROTOCOL_FEATURES == 0;
        let ring = &mut self.rings[usize::from(i)];
        let ready = ring.worker.is_none() && ring.size != 0 && (ring.enabled || enabled);
        let (true, Some(addrs), Some(kick)) = (ready, ring.addrs, &ring.kick) else {
            return Ok(());
        };
        let setup = QueueSetup {
            index: i,
            size: ring.size,
            addrs,
            features: self.features,
            base: ring.base,
            memory: self.memory.clone(),
            inflight: self.inflight.clone(),
            log,
        };
        let mailbox = Mailbox::new()?;
        let copy = |e: &Option<EventFd>| e.as_ref().map(EventFd::try_clone).transpose();
        let queue = ActiveQueue {
            queue: Queue::new(setup)?,
            index: i,
            features: self.features,
            kick: kick.try_clone()?,
            call: copy(&ring.call)?,
            err: copy(&ring.err)?,
            mailbox: mailbox.clone(),
            shared: self.shared.clone(),
            recorded: self.inflight.is_some(),
            failed: false,
            losses: fault::losses(),
            refused: 0,
        };
        // A predecessor may have died between publishing a completion and announcing it.
        if let Some(call) = &ring.call {
            call.signal();
        }
        device.start_queue(queue)?;
        ring.worker = Some(mailbox);
        self.ran = true;
        Ok(())
    }

    /// Starts every ring that is ready: after a change that concerns them all, or when this
    /// session goes on where another stopped.
    pub(super) fn restart(&mut self, device: &mut dyn Device) -> Result<()> {
        (0..self.rings.len()).try_for_each(|i| self.start(low16(wide(i)), device))
    }

    fn stop(&mut self, i: u16) {
        let ring = &mut self.rings[usize::from(i)];
        if let Some(worker) = ring.worker.take() {
            let handed_back = worker.stop();
            ring.base = handed_back.base;
            ring.undone = handed_back.outstanding > 0;
        }
    }

    /// Stops a ring whose position is the front end's from now on: it is told, or starts anew.
    fn stop_for_good(&mut self, i: u16) {
        self.stop(i);
        match &self.inflight {
            Some(area) if !self.rings[usize::from(i)].undone => {
                area.forget(i, RingFormat::of(self.features));
            }
            _ => {}
        }
    }

    /// Stops every ring: asks all of them first, so that they drain at the same time.
    pub(super) fn stop_all(&mut self) -> Result<()> {
        let workers = || self.rings.iter().filter_map(|r| r.worker.as_ref());
        workers().for_each(|w| w.ask_to_stop());
        let undone: u32 = workers().map(|w| w.stop().outstanding).sum();
        (0..self.rings.len()).for_each(|i| self.stop(low16(wide(i))));
        if undone > 0 {
            return Err(Error::new(Kind::Failed, "a worker left requests undone"));
        }
        Ok(())
    }

    /// Brings all rings to their state at the start of a connection. The doorbells to the driver
    /// stay: they belong to the front end, and not every front end sends them again.
    pub(super) fn reset_rings(&mut self) -> Result<()> {
        let stopped = self.stop_all();
        for i in 0..self.rings.len() {
            self.stop_for_good(low16(wide(i)));
            let ring = std::mem::take(&mut self.rings[i]);
            self.rings[i] = Ring { call: ring.call, err: ring.err, ..Ring::default() };
        }
        stopped
    }

    /// Whether any ring runs.
    pub(super) fn running(&self) -> bool {
        self.rings.iter().any(|r| r.worker.is_some())
    }

    /// Sends the present memory table to every running ring.
    pub(super) fn publish_memory(&self) -> Result<()> {
        self.update_all(|_| Update::Memory(self.memory.clone()))
    }

    /// Sends the present log target to every running ring.
    pub(super) fn publish_log(&self) -> Result<()> {
        self.update_all(|i| Update::Log(self.log_target(i)))
    }

    fn update_all(&self, update: impl Fn(u16) -> Update) -> Result<()> {
        for (i, ring) in self.rings.iter().enumerate() {
            if let Some(worker) = &ring.worker {
                worker.update(update(low16(wide(i))))?;
            }
        }
        Ok(())
    }

    fn log_target(&self, i: u16) -> LogTarget {
        match &self.log {
            Some(log) if self.features & F_LOG_ALL != 0 => {
                LogTarget { log: Some(log.clone()), ring: self.rings[usize::from(i)].log }
            }
            _ => LogTarget::default(),
        }
    }

    pub(super) fn set_vring_num(&mut self, message: &Message, device: &dyn Device) -> Result<()> {
        let state: VringState = message.body()?;
        let max = device.capabilities().queue_size_max;
        let (_, ring) = self.ring(state.index.into())?;
        ring.idle()?;
        match u16::try_from(state.num) {
            Ok(size) if size > 0 && size <= max => ring.size = size,
            _ => return Err(Error::invalid("the ring size is out of range")),
        }
        Ok(())
    }

    pub(super) fn set_vring_base(&mut self, message: &Message) -> Result<()> {
        let state: VringState = message.body()?;
        let (_, ring) = self.ring(state.index.into())?;
        ring.idle()?;
        ring.base = state.num;
        Ok(())
    }

    pub(super) fn get_vring_base(&mut self, message: &Message) -> Result<VringState> {
        let state: VringState = message.body()?;
        let (i, _) = self.ring(state.index.into())?;
        self.stop_for_good(i);
        let ring = &mut self.rings[usize::from(i)];
        ring.kick = None; // the next kick descriptor starts it again
        Ok(VringState { index: state.index, num: ring.base })
    }

    /// The one ring setting that may change on the fly is whether it is logged.
    pub(super) fn set_vring_addr(
        &mut self,
        message: &Message,
        device: &mut dyn Device,
    ) -> Result<()> {
        let addr: VringAddr = message.body()?;
        if addr.flags & !VRING_F_LOG != 0 {
            return Err(Error::invalid("unknown ring flags"));
        }
        let (i, ring) = self.ring(addr.index.into())?;
        let addrs = RingAddrs {
            desc: UserAddr(addr.desc),
            driver: UserAddr(addr.avail),
            device: UserAddr(addr.used),
        };
        if ring.addrs != Some(addrs) {
            ring.idle()?;
        }
        ring.addrs = Some(addrs);
        ring.log = (addr.flags & VRING_F_LOG != 0).then_some(addr.log);
        let update = Update::Log(self.log_target(i));
        if let Some(worker) = &self.rings[usize::from(i)].worker {
            worker.update(update)?;
        }
        self.start(i, device)
    }

    pub(super) fn set_vring_enable(
        &mut self,
        message: &Message,
        device: &mut dyn Device,
    ) -> Result<()> {
        let state: VringState = message.body()?;
        if self.features & F_PROTOCOL_FEATURES == 0 {
            return Err(Error::invalid("its feature was not negotiated"));
        }
        let (i, ring) = self.ring(state.index.into())?;
        ring.enabled = match state.num {
            0 => false,
            1 => true,
            _ => return Err(Error::invalid("a ring is enabled with 1 and disabled with 0")),
        };
        if ring.enabled {
            return self.start(i, device);
        }
        self.stop(i);
        Ok(())
    }

    fn vring_fd(&mut self, message: Message) -> Result<(u16, Option<EventFd>)> {
        let word = message.number()?;
        let (i, _) = self.ring(word & 0xff)?;
        let fd: Option<OwnedFd> = message.fds.into_iter().next();
        if fd.is_some() == (word & VRING_NOFD != 0) {
            return Err(Error::invalid("the flag for a descriptor contradicts the message"));
        }
        Ok((i, fd.map(EventFd::adopt)))
    }

    pub(super) fn set_vring_kick(
        &mut self,
        message: Message,
        device: &mut dyn Device,
    ) -> Result<()> {
        let (i, kick) = self.vring_fd(message)?;
        if kick.is_none() {
            let e = Error::new(Kind::Unsupported, "a ring without a kick descriptor");
            return Err(e.hint("the front end must send one"));
        }
        self.stop(i);
        self.rings[usize::from(i)].kick = kick;
        self.start(i, device)
    }

    pub(super) fn set_vring_call(&mut self, message: Message) -> Result<()> {
        let (i, call) = self.vring_fd(message)?;
        let ring = &mut self.rings[usize::from(i)];
        ring.call = call;
        let copy = ring.call.as_ref().map(EventFd::try_clone).transpose()?;
        ring.worker.as_ref().map_or(Ok(()), |w| w.update(Update::Call(copy)))
    }

    pub(super) fn set_vring_err(&mut self, message: Message) -> Result<()> {
        let (i, err) = self.vring_fd(message)?;
        let ring = &mut self.rings[usize::from(i)];
        ring.err = err;
        let copy = ring.err.as_ref().map(EventFd::try_clone).transpose()?;
        ring.worker.as_ref().map_or(Ok(()), |w| w.update(Update::Err(copy)))
    }
}
