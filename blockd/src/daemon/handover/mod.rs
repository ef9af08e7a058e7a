//! Upgrade in place: a daemon hands its disks, sockets and front ends to a successor while guests
//! run.
//!
//! The successor listens on a socket of its own; the one in charge is told where, connects, and
//! they speak (`messages.rs`):
//!
//! ```text
//! successor    in charge
//!     ── Hello ──▶          the layouts it understands
//!                           cuts NBD clients off, closes the store; its disks stay open and served
//!     ◀── Free ───
//!     opens the store
//!     ── Ready ───▶
//!                           stops the front ends' rings, leaves the disks
//!     ◀── State ──          what is served, with every descriptor
//!     opens every disk
//!     ── Opened ──▶         from here on the store is the successor's
//!     goes on with the front ends
//!     ── Serving ─▶         ends
//! ```
//!
//! Guests wait from `Ready` to `Serving`; what can be done before is done before.
//!
//! Invariants, and the crash each is for:
//! - Disks are left as a killed process leaves them, and opened as after a kill: what completed is
//!   in the tails. So a death of either side at any moment is one that the disks survive anyway.
//! - The one in charge keeps every descriptor until `Serving`. When the successor ends before
//!   `Opened`, it has run no ring, and the one in charge goes on as if nothing had happened.
//! - The successor runs rings only after `Opened` was sent: never do two daemons run one ring.
//! - Nobody else uses the store meanwhile: holds are closed, and while the successor has the store
//!   open, the one in charge touches nothing of it but the files of the disks that it serves, which
//!   have locks of their own.
//!
//! Tests: `daemon_upgrade`.

mod leave;
mod take;

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use format::units::Epoch;
use format::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use vhost_blk::session::Handover;

use super::attachments::Attachment;
use super::doors::HandedDoor;
use crate::disk::Vouched;

pub use take::{Inheritance, Predecessor};

/// Version of what the two say to each other.
const LAYOUT: u32 = 1;

/// The first word of a successor.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    layouts: Vec<u32>,
    version: String,
}

/// The store is closed, and its lock is free.
#[derive(Debug, Serialize, Deserialize)]
struct Free;

/// How far a successor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Progress {
    Ready,
    Opened,
    Serving,
}

/// What is handed over; descriptors follow in the order in which this speaks of them, after that of
/// the control interface.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    version: String,
    /// Number of the last event.
    event: u64,
    disks: Vec<DiskState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct DiskState {
    attachment: Attachment,
    keep_cache: bool,
    /// Of the opening in which the successor can go on.
    epoch: Option<u64>,
    /// As many as the attachment has exports.
    doors: Vec<DoorState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct DoorState {
    listener: bool,
    sessions: Vec<SessionState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SessionState {
    numbers: Vec<u8>,
    files: usize,
}

/// A disk between two daemons.
struct HandedDisk {
    attachment: Attachment,
    vouched: Vouched,
    doors: Vec<HandedDoor>,
}

impl HandedDisk {
    fn describe(&self) -> DiskState {
        let session =
            |s: &Handover| SessionState { numbers: s.numbers.clone(), files: s.files.len() };
        let door = |door: &HandedDoor| DoorState {
            listener: door.listener.is_some(),
            sessions: door.sessions.iter().map(session).collect(),
        };
        DiskState {
            attachment: self.attachment.clone(),
            keep_cache: self.vouched != Vouched::Nothing,
            epoch: match self.vouched {
                Vouched::Opening(epoch) => Some(epoch.0),
                Vouched::Nothing | Vouched::Cache => None,
            },
            doors: self.doors.iter().map(door).collect(),
        }
    }

    fn files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.doors.iter().flat_map(|door| {
            let sessions = door.sessions.iter().flat_map(|s| &s.files);
            door.listener.iter().chain(sessions).map(|file| file.as_fd())
        })
    }

    /// Puts a disk together from its description and the next descriptors.
    fn assemble(state: DiskState, files: &mut impl Iterator<Item = OwnedFd>) -> Result<Self> {
        let missing = || Error::new(Kind::Corrupt, "descriptors are missing in a handover");
        let mut doors = Vec::new();
        for door in state.doors {
            let listener = door.listener.then(|| files.next().ok_or_else(missing)).transpose()?;
            let mut sessions = Vec::new();
            for session in door.sessions {
                let own: Vec<OwnedFd> = files.by_ref().take(session.files).collect();
                if own.len() != session.files {
                    return Err(missing());
                }
                sessions.push(Handover { numbers: session.numbers, files: own });
            }
            doors.push(HandedDoor { listener, sessions });
        }
        let vouched = match (state.keep_cache, state.epoch) {
            (false, _) => Vouched::Nothing,
            (true, None) => Vouched::Cache,
            (true, Some(epoch)) => Vouched::Opening(Epoch(epoch)),
        };
        Ok(HandedDisk { attachment: state.attachment, vouched, doors })
    }

    fn front_ends(&self) -> u64 {
        self.doors.iter().map(|door| door.sessions.len() as u64).sum()
    }
}
