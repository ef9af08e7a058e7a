//! A stopped session in a form that another process can take: upgrade in place.
//!
//! The front end keeps its connection and does not notice: the successor has the socket, the
//! memory, the rings' positions and doorbells, the in-flight area and the log.
//!
//! Layout: 64-bit little-endian words in the order of [`Session::into_handover`], and the
//! descriptors in the order in which the words speak of them. Predecessor and successor may be of
//! different versions: the first word names the layout, and an unknown one is refused.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use format::{Error, Kind, Result};

use super::rings::Ring;
use super::{Device, PROTOCOL_FEATURES, Session, SessionHandle};
use crate::dirty_log::DirtyLog;
use crate::event::EventFd;
use crate::inflight::{InflightArea, InflightSpec};
use crate::memory::{GuestAddr, Memory, Region, RegionSpec, UserAddr};
use crate::queue::RingAddrs;
use crate::util::{low16, low32, wide};

/// "OVH" and the version of the layout.
const MAGIC: u64 = 0x4856_4f00_0000_0001;

/// A session between two processes. Both parts travel together, the files in this order.
#[derive(Debug)]
pub struct Handover {
    /// The negotiated numbers.
    pub numbers: Vec<u8>,
    /// The socket, the shared memory and the doorbells.
    pub files: Vec<OwnedFd>,
}

#[derive(Default)]
struct Writer {
    words: Vec<u64>,
    files: Vec<OwnedFd>,
}

impl Writer {
    fn words<const N: usize>(&mut self, words: [u64; N]) {
        self.words.extend(words);
    }

    fn file(&mut self, file: Option<OwnedFd>) {
        self.words.push(u64::from(file.is_some()));
        self.files.extend(file);
    }
}

struct Reader {
    words: VecDeque<u64>,
    files: VecDeque<OwnedFd>,
}

impl Reader {
    fn word(&mut self) -> Result<u64> {
        self.words.pop_front().ok_or_else(|| Error::corrupt("the handed-over session is cut short"))
    }

    fn words<const N: usize>(&mut self) -> Result<[u64; N]> {
        let mut words = [0; N];
        for word in &mut words {
            *word = self.word()?;
        }
        Ok(words)
    }

    fn file(&mut self) -> Result<Option<OwnedFd>> {
        if self.word()? == 0 {
            return Ok(None);
        }
        let file = self.files.pop_front();
        file.map(Some).ok_or_else(|| Error::corrupt("the handed-over session lacks a file"))
    }

    fn needed(&mut self) -> Result<OwnedFd> {
        self.file()?.ok_or_else(|| Error::corrupt("the handed-over session lacks a file"))
    }
}

impl Session {
    /// Takes a session apart that ended as [`super::End::Stopped`].
    ///
    /// # Errors
    /// `Busy` when it did not stop between two requests; the host's error when no descriptor is
    /// free.
    pub fn into_handover(self) -> Result<Handover> {
        if self.running() || self.receiver.in_message() || self.transfer.is_some() {
            return Err(Error::new(Kind::Busy, "the session is in the middle of something"));
        }
        let mut w = Writer::default();
        let cache = self.cache_choice.map_or(2, u64::from);
        w.words([MAGIC, self.features, self.protocol, self.status.into(), cache]);
        w.words([self.shared.write_back.load(Ordering::Relaxed).into()]); // no worker is left
        w.file(Some(self.socket.into()));
        w.file(self.shared.channel.lock().unwrap_or_else(PoisonError::into_inner).take());
        w.file(self.log.as_ref().map(|l| l.file().try_clone_to_owned()).transpose()?);
        w.words(self.log.as_ref().map_or([0, 0], |l| [l.offset(), wide(l.size())]));
        w.file(self.inflight.as_ref().map(|a| a.file().try_clone_to_owned()).transpose()?);
        w.words(self.inflight.as_ref().map_or([0; 4], |area| {
            let s = area.spec();
            [s.size, s.offset, s.queues.into(), s.queue_size.into()]
        }));
        w.words([wide(self.memory.regions().len())]);
        for region in self.memory.regions() {
            let s = region.spec();
            w.words([s.guest.0, s.user.0, s.size, s.offset]);
            // A front end's region has a file; without one the other side refuses the hand-over.
            w.file(region.file().map(|f| f.try_clone_to_owned()).transpose()?);
        }
        w.words([wide(self.rings.len())]);
        for ring in self.rings {
            let a = ring.addrs.unwrap_or_default();
            w.words([ring.size.into(), ring.base.into(), ring.enabled.into()]);
            w.words([ring.addrs.is_some().into(), a.desc.0, a.driver.0, a.device.0]);
            w.words([ring.log.is_some().into(), ring.log.unwrap_or(0)]);
            w.file(ring.kick.map(OwnedFd::from));
            w.file(ring.call.map(OwnedFd::from));
            w.file(ring.err.map(OwnedFd::from));
        }
        let numbers = w.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(Handover { numbers, files: w.files })
    }

    /// Puts a session together again; its rings start when [`Session::run`] is called.
    ///
    /// # Errors
    /// `Unsupported` for another layout, `Corrupt` or `Invalid` when parts are missing or do not
    /// fit this device.
    pub fn from_handover(
        handover: Handover,
        device: &dyn Device,
    ) -> Result<(Session, SessionHandle)> {
        let words = handover.numbers.chunks_exact(8);
        let words = words.map(|w| u64::from_le_bytes(w.try_into().expect("chunks of 8")));
        let mut r = Reader { words: words.collect(), files: handover.files.into() };
        if r.word()? != MAGIC {
            return Err(Error::new(Kind::Unsupported, "a session of another layout version"));
        }
        let [features, protocol, status, cache, write_back] = r.words()?;
        if protocol & !PROTOCOL_FEATURES != 0 {
            return Err(Error::new(Kind::Unsupported, "a session with unknown protocol features"));
        }
        let (mut session, handle) = Session::new(UnixStream::from(r.needed()?), device)?;
        (session.features, session.protocol) = (features, protocol);
        session.status = low16(status).to_le_bytes()[0];
        session.cache_choice = (cache < 2).then_some(cache == 1);
        session.cache_known = true;
        let shared = &session.shared;
        shared.protocol.store(protocol, Ordering::Relaxed); // no other thread yet
        shared.write_back.store(write_back != 0, Ordering::Relaxed); // no other thread yet
        *shared.channel.lock().unwrap_or_else(PoisonError::into_inner) = r.file()?;
        session.read_areas(&mut r)?;
        session.read_rings(&mut r)?;
        Ok((session, handle))
    }

    fn read_areas(&mut self, r: &mut Reader) -> Result<()> {
        let file = r.file()?;
        let [offset, size] = r.words()?;
        if let Some(file) = file {
            self.log = Some(Arc::new(DirtyLog::map(file, offset, size)?));
        }
        let file = r.file()?;
        let [size, offset, queues, queue_size] = r.words()?;
        if let Some(file) = file {
            let (queues, queue_size) = (low16(queues), low16(queue_size));
            let spec = InflightSpec { size, offset, queues, queue_size };
            self.inflight = Some(Arc::new(InflightArea::attach(spec, file)?));
        }
        let mut regions = Vec::new();
        for _ in 0..r.word()? {
            let [guest, user, size, offset] = r.words()?;
            let (guest, user) = (GuestAddr(guest), UserAddr(user));
            let spec = RegionSpec { guest, user, size, offset };
            regions.push(Arc::new(Region::map(spec, r.needed()?)?));
        }
        self.memory = Arc::new(Memory::new(regions)?);
        Ok(())
    }

    fn read_rings(&mut self, r: &mut Reader) -> Result<()> {
        if r.word()? != wide(self.rings.len()) {
            return Err(Error::invalid("the session has another number of queues"));
        }
        for ring in &mut self.rings {
            let [size, base, enabled] = r.words()?;
            let [placed, desc, driver, device] = r.words()?;
            let [logged, log] = r.words()?;
            let (desc, driver, device) = (UserAddr(desc), UserAddr(driver), UserAddr(device));
            *ring = Ring {
                size: low16(size),
                base: low32(base),
                enabled: enabled != 0,
                addrs: (placed != 0).then_some(RingAddrs { desc, driver, device }),
                log: (logged != 0).then_some(log),
                kick: r.file()?.map(EventFd::adopt),
                call: r.file()?.map(EventFd::adopt),
                err: r.file()?.map(EventFd::adopt),
                worker: None,
                undone: false,
            };
        }
        Ok(())
    }
}
