//! Eventfds: the doorbells between driver, ring worker and control thread.
//!
//! Invariant: [`EventFd::signal`] and [`EventFd::drain`] do not block, whatever flags the other
//! side has set on the shared open file. (A peer that changes the counter between our check and
//! our call can still make one call wait; it can only stall the worker of its own ring by that.)

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use format::Result;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl};

/// An eventfd, made here or received from a peer.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
    nonblocking: bool,
}

impl EventFd {
    /// A new non-blocking eventfd with counter 0.
    ///
    /// # Errors
    /// The host's error, for example when the process has no free descriptor.
    pub fn new() -> Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| format::Error::from(std::io::Error::from(e)).tried("create an eventfd"))?;
        Ok(EventFd { fd, nonblocking: true })
    }

    /// Adopts a received descriptor. Its flags are left alone: they belong to the peer as well.
    #[must_use]
    pub fn adopt(fd: OwnedFd) -> Self {
        let nonblocking = fcntl_getfl(&fd).is_ok_and(|f| f.contains(OFlags::NONBLOCK));
        EventFd { fd, nonblocking }
    }

    /// A second handle on the same eventfd.
    ///
    /// # Errors
    /// The host's error when no descriptor is free.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(EventFd { fd: self.fd.try_clone()?, nonblocking: self.nonblocking })
    }

    /// Rings the doorbell. A full counter already means "rung" and is not an error.
    pub fn signal(&self) {
        if self.ready(PollFlags::OUT) {
            // The only failures left are a full counter, or a descriptor that never was an
            // eventfd: both are the peer's own affair.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Takes the counter back to 0; returns whether it had been rung.
    pub fn drain(&self) -> bool {
        let mut counter = [0u8; 8];
        self.ready(PollFlags::IN) && rustix::io::read(&self.fd, &mut counter).is_ok()
    }

    /// Waits until the doorbell has been rung, at most `timeout_ms`. Does not drain it.
    #[must_use]
    pub fn wait(&self, timeout_ms: u32) -> bool {
        let time = Timespec {
            tv_sec: i64::from(timeout_ms / 1000),
            tv_nsec: i64::from(timeout_ms % 1000) * 1_000_000,
        };
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&time)), Ok(n) if n > 0)
    }

    fn ready(&self, flags: PollFlags) -> bool {
        if self.nonblocking {
            return true;
        }
        let mut fds = [PollFd::new(&self.fd, flags)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(flags)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<EventFd> for OwnedFd {
    fn from(event: EventFd) -> OwnedFd {
        event.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocking() -> EventFd {
        EventFd::adopt(eventfd(0, EventfdFlags::CLOEXEC).unwrap())
    }

    #[test]
    fn blocking_descriptor_neither_blocks_on_drain_nor_on_a_full_counter() {
        let event = blocking();
        assert!(!event.drain());
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal();
        assert!(event.drain());
        assert!(!event.drain());
    }

    #[test]
    fn flags_of_an_adopted_descriptor_stay_as_they_were() {
        let event = blocking();
        event.signal();
        assert!(!fcntl_getfl(&event).unwrap().contains(OFlags::NONBLOCK));
    }
}
