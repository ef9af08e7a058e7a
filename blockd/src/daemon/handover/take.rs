//! The side that comes, and takes over.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use format::{Context as _, Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::Daemon;
use super::super::served::Kept;
use super::{Free, HandedDisk, Hello, LAYOUT, Progress, State};
use crate::api::types::EventKind;
use crate::messages;
use crate::side_by_side::side_by_side;
use crate::sockets::{self, Peer};

/// How long a predecessor may take to come.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// A daemon that hands over. The store is free for this one.
pub struct Predecessor {
    socket: UnixStream,
}

/// What it handed.
pub struct Inheritance {
    socket: UnixStream,
    version: String,
    event: u64,
    control: Option<OwnedFd>,
    disks: Vec<HandedDisk>,
}

/// The socket file of a successor that waits; it goes when somebody came.
struct Meeting<'a>(&'a Path);

impl Drop for Meeting<'_> {
    fn drop(&mut self) {
        // Nobody looks for it any more.
        let _ = fs::remove_file(self.0);
    }
}

impl Predecessor {
    /// Waits at `path` for a daemon that hands over, until the store is free.
    ///
    /// # Errors
    /// `Failed` when nobody came or it changed its mind, or
    /// what the host reports.
    pub fn meet(path: &Path) -> Result<Predecessor> {
        let meet = || -> Result<Predecessor> {
            // Whoever finds the file finds somebody who listens: it exists a little earlier.
            let early = PathBuf::from(format!("{}.new", path.display()));
            // The process has one thread: nobody else makes files meanwhile.
            let listener = sockets::listen_alone(&early)?;
            fs::rename(&early, path)?;
            let socket = {
                let _meeting = Meeting(path);
                accept(&listener)?
            };
            let version = env!("CARGO_PKG_VERSION").to_owned();
            messages::send(&socket, &Hello { layouts: vec![LAYOUT], version }, &[])?;
            messages::receive::<Free>(&socket)?;
            Ok(Predecessor { socket })
        };
        meet().context("take over at", || format!("socket {}", path.display()))
    }

    /// Says that the store is open, and gets what is served. Guests wait from now on.
    ///
    /// # Errors
    /// `Failed` when it changed its mind, or what the host reports.
    pub fn inherit(self) -> Result<Inheritance> {
        let socket = self.socket;
        messages::send(&socket, &Progress::Ready, &[])?;
        let (state, files) = messages::receive::<State>(&socket)?;
        let mut files = files.into_iter();
        let control = files.next();
        let disks = state.disks.into_iter().map(|d| HandedDisk::assemble(d, &mut files));
        let disks = disks.collect::<Result<_>>()?;
        Ok(Inheritance { socket, version: state.version, event: state.event, control, disks })
    }
}

impl Inheritance {
    /// The listening socket of its control interface.
    ///
    /// # Errors
    /// `Corrupt` when it sent none.
    pub fn take_control(&mut self) -> Result<UnixListener> {
        let control = self.control.take();
        control.map(UnixListener::from).ok_or_else(|| Error::corrupt("the control is missing"))
    }
}

/// The first one who comes and may: who could write to the store anyway.
fn accept(listener: &UnixListener) -> Result<UnixStream> {
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    let limit = Timespec { tv_sec: WAIT_MAX.as_secs().cast_signed(), tv_nsec: 0 };
    let came = poll(&mut fds, Some(&limit)).map_err(std::io::Error::from)?;
    if came == 0 {
        return Err(Error::new(Kind::Failed, "no daemon came to hand over"));
    }
    let (socket, _) = listener.accept()?;
    let peer = Peer::of(&socket)?;
    if !peer.is_trusted() {
        return Err(Error::invalid(format!("a process of user {} came", peer.uid)));
    }
    Ok(socket)
}

impl Daemon {
    /// Serves what a predecessor served, on the same sockets and to the same front ends.
    ///
    /// # Errors
    /// What keeps a disk from being opened: the process must then end, and the predecessor goes on.
    pub fn take_over(&self, inheritance: Inheritance) -> Result<()> {
        let Inheritance { socket, version, event, disks, .. } = inheritance;
        let changing = self.service.changing.lock();
        self.events.go_on_after(event);
        let opened = side_by_side(disks, |disk| {
            let name = self.name_of(&disk.attachment)?;
            let served = self.open_again(
                &name,
                &disk.attachment,
                Kept { vouched: disk.vouched, hold: None },
            );
            served.map(|served| (name, served, disk))
        });
        let opened = opened.into_iter().collect::<Result<Vec<_>>>()?;
        // From here on the predecessor does not come back: rings may run.
        messages::send(&socket, &Progress::Opened, &[])?;
        side_by_side(opened, |(name, served, disk)| {
            let HandedDisk { attachment, doors, .. } = disk;
            self.go_on(&name, Ok(served), attachment, doors);
        });
        drop(changing);
        let detail = format!("from version {version}");
        self.events.add(EventKind::Upgraded, format!("store {}", self.path().display()), detail);
        // It may have ended meanwhile; nothing is needed from it any more.
        let _ = messages::send(&socket, &Progress::Serving, &[]);
        // What could not be served before may be possible now.
        self.serve_again()
    }
}
