//! Device state for migration (DEVICE_STATE): the little that is neither in the rings, nor in
//! guest memory, nor on the disk. Today that is the guest's choice of cache mode.
//!
//! Layout, 8 bytes: magic `OVBS`, version 1, cache mode (0 write-through, 1 write-back, 2 not
//! chosen), two zero bytes.
//!
//! Invariant: the control thread never blocks on the front end's pipe. A state is written in one
//! piece that fits any pipe, and read only as far as it is there when the front end says that it
//! is complete.

use std::os::fd::OwnedFd;

use format::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::requests::Answer;
use super::{Device, Session};
use crate::proto::DeviceState;
use crate::socket::Message;

const MAGIC: [u8; 4] = *b"OVBS";
const VERSION: u8 = 1;
const STATE_SIZE: usize = 8;

/// The reply's flag that no descriptor comes with it.
const NO_FD: u64 = 1 << 8;

/// A transfer between its start and its check.
#[derive(Debug)]
pub(super) enum Transfer {
    Saved(Result<()>),
    Loading(OwnedFd),
}

impl Session {
    pub(super) fn start_transfer(&mut self, mut message: Message) -> Result<Answer> {
        let state: DeviceState = message.body()?;
        let pipe = message.fds.pop().ok_or_else(|| Error::invalid("no descriptor"))?;
        let allowed = state.phase == 0 && state.direction <= 1 && !self.running();
        self.transfer = allowed.then(|| match state.direction {
            0 => Transfer::Saved(save(&pipe, self.cache_choice)),
            _ => Transfer::Loading(pipe),
        });
        let reply = NO_FD | u64::from(!allowed);
        Ok(Answer::Bytes(reply.to_ne_bytes().to_vec()))
    }

    pub(super) fn finish_transfer(&mut self, device: &mut dyn Device) -> Result<()> {
        match self.transfer.take() {
            Some(Transfer::Saved(result)) => result,
            Some(Transfer::Loading(pipe)) => {
                self.cache_choice = load(&pipe)?;
                self.apply_write_cache(device)
            }
            None => Err(Error::invalid("no state transfer was started")),
        }
    }
}

fn ready(pipe: &OwnedFd, flags: PollFlags) -> bool {
    let mut fds = [PollFd::new(pipe, flags)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
}

fn save(pipe: &OwnedFd, choice: Option<bool>) -> Result<()> {
    let cache = choice.map_or(2, u8::from);
    let [a, b, c, d] = MAGIC;
    let state: [u8; STATE_SIZE] = [a, b, c, d, VERSION, cache, 0, 0];
    let written = ready(pipe, PollFlags::OUT).then(|| rustix::io::write(pipe, &state));
    match written {
        Some(Ok(STATE_SIZE)) => Ok(()),
        _ => Err(Error::new(Kind::Io, "the front end does not take the device state")),
    }
}

fn load(pipe: &OwnedFd) -> Result<Option<bool>> {
    // One byte more than there can be, so that too much is noticed.
    let (mut state, mut have) = ([0; STATE_SIZE + 1], 0);
    while have < state.len() && ready(pipe, PollFlags::IN) {
        match rustix::io::read(pipe, &mut state[have..]) {
            Ok(n) if n > 0 => have += n,
            _ => break,
        }
    }
    match state[..have] {
        [a, b, c, d, VERSION, cache, 0, 0] if [a, b, c, d] == MAGIC && cache <= 2 => {
            Ok((cache != 2).then_some(cache == 1))
        }
        _ => Err(Error::corrupt("the device state is not one of ours")),
    }
}
