//! The daemon's end: a process, and the connection to it.
//!
//! Invariants:
//! - A connection on which something went wrong is never used again: a late answer would be taken
//!   for that of the next question. The next question gets a new connection.
//! - A process is named by a descriptor of it, not by its number, which may be another's tomorrow.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blockd::messages;
use format::{Context as _, Error, Kind, Result};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::wire::{Answer, Ask, Ended, Folder, Phase};

/// How long a process may take for an answer: a large image has to be read to boot it.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take for a number that nothing depends on.
const ASIDE_MAX: Duration = Duration::from_millis(200);
/// How long a process whose connections are closed may take to be gone, if it is going to be.
const DYING_MAX: Duration = Duration::from_secs(1);
/// How long a process that was killed may take to be gone.
const END_MAX: Duration = Duration::from_secs(20);

/// A connection to a VM process.
pub struct Link(UnixStream);

impl Link {
    /// Over a socket that is connected.
    ///
    /// # Errors
    /// What the host reports.
    pub fn new(socket: UnixStream) -> Result<Link> {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Link(socket))
    }

    /// Asks, and waits for the answer and the files with it.
    ///
    /// # Errors
    /// The outer one when the connection is of no use any more, the inner one is the failure that
    /// the process told of.
    pub(super) fn ask<Q: Serialize, T: DeserializeOwned>(
        &self,
        ask: &Q,
        files: &[BorrowedFd<'_>],
    ) -> Result<Result<(T, Vec<OwnedFd>)>> {
        let gone = |e: Error| e.hint("`offshoot vm ls` says which machines have ended");
        messages::send(&self.0, ask, files).map_err(gone)?;
        let (answer, files) = messages::receive::<Answer<T>>(&self.0).map_err(gone)?;
        Ok(answer.outcome().map(|value| (value, files)))
    }

    /// Hears what the other side says by itself.
    ///
    /// # Errors
    /// The failure that it tells of, or that it is gone.
    pub fn hear<T: DeserializeOwned>(&self) -> Result<T> {
        messages::receive::<Answer<T>>(&self.0)?.0.outcome()
    }

    /// Waits for what is said by itself for as long as it takes.
    ///
    /// # Errors
    /// What the host reports.
    pub fn wait_for_ever(&self) -> Result<()> {
        Ok(self.0.set_read_timeout(None)?)
    }
}

/// A VM process.
pub struct Process {
    /// The identity of its machine, and the name of its folder.
    pub id: Uuid,
    /// Its number, for people.
    pub pid: u32,
    folder: Folder,
    link: Mutex<Option<Link>>,
    itself: OwnedFd,
}

impl Process {
    /// A process that was just started, with its number and a descriptor of it, and the connection
    /// on which it was.
    #[must_use]
    pub fn started(
        id: Uuid,
        folder: PathBuf,
        (pid, itself): (u32, OwnedFd),
        link: Link,
    ) -> Process {
        Process { id, pid, folder: Folder(folder), link: Mutex::new(Some(link)), itself }
    }

    /// The process that listens in a folder, and how it is.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn find(id: Uuid, folder: PathBuf) -> Result<(Process, Phase)> {
        let folder = Folder(folder);
        let gone = || Error::new(Kind::NotFound, "its process is gone");
        let socket = UnixStream::connect(folder.control()).map_err(|e| gone().caused_by(e))?;
        let peer = rustix::net::sockopt::socket_peercred(&socket).map_err(io::Error::from)?;
        let itself = pidfd_open(peer.pid, PidfdFlags::empty())
            .map_err(|e| gone().caused_by(io::Error::from(e)))?;
        let pid = peer.pid.as_raw_nonzero().get().unsigned_abs();
        let link = Link::new(socket)?;
        let process = Process { id, pid, folder, link: Mutex::default(), itself };
        // It answers after the descriptor was opened, so the descriptor is of the one that answers.
        let (phase, _) = match link.ask::<_, Phase>(&Ask::Status, &[]) {
            Ok(answer) => answer?,
            // It was killed since it was connected to.
            Err(e) if process.is_dying() => return Err(gone().caused_by(e)),
            Err(e) => return Err(e),
        };
        *process.link.lock() = Some(link);
        Ok((process, phase))
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Asks, and waits for the answer and the files with it.
    ///
    /// # Errors
    /// The failure that the process told of; `Failed` when it is gone or silent.
    pub fn ask_with<T: DeserializeOwned>(
        &self,
        ask: &Ask,
        files: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>)> {
        let mut slot = self.link.lock();
        let link = match slot.take() {
            Some(link) => link,
            None => self.connect()?,
        };
        let answer = link.ask(ask, files)?;
        *slot = Some(link);
        answer
    }

    /// As [`Process::ask_with`], for what goes without files.
    ///
    /// # Errors
    /// As there.
    pub fn ask<T: DeserializeOwned>(&self, ask: &Ask) -> Result<T> {
        Ok(self.ask_with(ask, &[])?.0)
    }

    fn connect(&self) -> Result<Link> {
        let socket = UnixStream::connect(self.folder.control())
            .context("reach", || "the process of the machine".into())?;
        Link::new(socket)
    }

    /// As [`Process::ask`], on a connection of its own, so that it waits for nobody else's answer;
    /// and not for long.
    ///
    /// # Errors
    /// As there.
    pub fn ask_aside<T: DeserializeOwned>(&self, ask: &Ask) -> Result<T> {
        let link = self.connect()?;
        link.0.set_read_timeout(Some(ASIDE_MAX))?;
        Ok(link.ask(ask, &[])??.0)
    }

    /// A connection on which it tells of every change, until the end.
    ///
    /// # Errors
    /// What the host reports, or that it is gone.
    pub fn watch(&self) -> Result<Link> {
        let link = self.connect()?;
        link.ask::<_, ()>(&Ask::Watch, &[])??;
        link.wait_for_ever()?;
        Ok(link)
    }

    /// What it says before it is asked anything.
    ///
    /// # Errors
    /// The failure that it tells of, or that it is gone.
    pub fn first_word<T: DeserializeOwned>(&self) -> Result<T> {
        match &*self.link.lock() {
            Some(link) => link.hear(),
            None => Err(Error::new(Kind::Failed, "the connection broke before its first word")),
        }
    }

    /// Whether it ends, for one that has closed a connection. Waits a little.
    #[must_use]
    pub fn is_dying(&self) -> bool {
        self.ends_within(DYING_MAX)
    }

    /// True while it has not ended.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.ends_within(Duration::ZERO)
    }

    /// Ends it, whatever it does, and waits until it is gone: until nothing is mapped, and no file
    /// or connection of it is open.
    ///
    /// # Errors
    /// `Busy` when the host does not get rid of it, or what it reports.
    pub fn kill(&self) -> Result<()> {
        // One that is gone already is what is wanted.
        let _ = pidfd_send_signal(&self.itself, Signal::KILL);
        self.reap()
    }

    /// Waits until it is gone.
    ///
    /// # Errors
    /// `Busy` when it is not.
    pub fn reap(&self) -> Result<()> {
        if self.ends_within(END_MAX) {
            return Ok(());
        }
        Err(Error::new(Kind::Busy, "its process does not end"))
    }

    fn ends_within(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            let mut fds = [PollFd::new(&self.itself, PollFlags::IN)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return false,
                Ok(_) => return true,
                // A signal to this process says nothing about that one.
                Err(_) if left.is_zero() => return false,
                Err(_) => {}
            }
        }
    }

    /// How its machine ended, when the process is gone.
    #[must_use]
    pub fn ended(&self) -> Ended {
        how_it_ended(&self.folder)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.itself.as_fd()
    }
}

/// How the machine of a folder ended whose process is gone.
#[must_use]
pub fn how_it_ended(folder: &Folder) -> Ended {
    let text = fs::read(folder.ended()).ok();
    text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_else(|| Ended {
        reason: "killed".into(),
        detail: "its process is gone, and did not say why".into(),
        at: blockd::clock::now(),
    })
}
