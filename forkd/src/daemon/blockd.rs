//! The daemon that has the disks, as this one sees it.

use std::fmt::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockd::api::types::{
    AttachDisk, CreateDisk, CutFork, CutForks, DetachDisk, Disk, DiskDetails, Export, ExportKind,
    ExportSpec, ForkAnswer, ForkDisks, ForkedDisks, LostTail, MadeChild, RemovedDisk, SocketName,
};
use format::{Context as _, Result};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::http;

/// How long it may take for an answer. A machine that is forked waits for one.
const PATIENCE: Duration = Duration::from_secs(15);

/// A fork that is ready for its instant.
#[derive(Debug)]
pub struct ReadyFork {
    /// Its name.
    pub token: Uuid,
    /// The disks that it is going to make.
    pub children: Vec<MadeChild>,
    connection: UnixStream,
}

/// The word to cut, ready to be said: a machine stands from then on until it is answered, so blockd
/// has read all of the request by then but for its end.
#[derive(Debug)]
pub struct Word {
    /// Where it is to be said.
    pub connection: UnixStream,
    /// What is to be sent.
    pub end: String,
}

/// Where it listens.
#[derive(Debug)]
pub struct Blockd {
    socket: PathBuf,
}

impl Blockd {
    /// The one that listens at `socket`.
    #[must_use]
    pub fn at(socket: PathBuf) -> Self {
        Blockd { socket }
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn object(&self) -> String {
        format!("blockd at {}", self.socket.display())
    }

    /// A connection to it.
    ///
    /// # Errors
    /// `NotFound` when it does not answer, or what the host reports.
    pub fn connect(&self) -> Result<UnixStream> {
        http::connect(&self.socket, PATIENCE).context("reach", || self.object())
    }

    fn ask<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        self.exchange(method, path, body)?.read()
    }

    /// Whatever it answers.
    fn exchange(&self, method: &str, path: &str, body: &impl Serialize) -> Result<http::Reply> {
        let stream = self.connect()?;
        http::request(method, path, body)
            .and_then(|request| http::exchange(&stream, &request))
            .context("ask", || self.object())
    }

    /// Has it serve a disk at a socket.
    ///
    /// # Errors
    /// What it says.
    pub fn attach(&self, disk: &str, socket: &Path, read_only: bool) -> Result<()> {
        let export = export(socket, read_only);
        let request = AttachDisk { export, limits: None, accept_lost_tail: false };
        self.ask::<Export>("POST", &disk_path(disk, "/attach"), &request).map(drop)
    }

    /// Has it serve a disk at a socket no longer, whoever is connected there.
    ///
    /// # Errors
    /// What it says.
    pub fn detach(&self, disk: &str, socket: &SocketName) -> Result<()> {
        let request = DetachDisk { socket: Some(socket.clone()), force: true };
        self.ask::<Vec<Export>>("POST", &disk_path(disk, "/detach"), &request).map(drop)
    }

    /// The sockets below a folder at which it serves disks.
    ///
    /// # Errors
    /// What it says.
    pub fn exports_below(&self, folder: &Path) -> Result<Vec<Export>> {
        let mut exports: Vec<Export> = self.ask("GET", "/v1/exports", &())?;
        exports.retain(|e| matches!(&e.socket, SocketName::Unix(at) if at.starts_with(folder)));
        Ok(exports)
    }

    /// Has it get ready for a fork, which is to be cut within ten seconds (`answer` is `Ready`), or
    /// stands by and gives way to others (`Standby`).
    ///
    /// # Errors
    /// What it says; nothing is made then.
    pub fn fork_ready(&self, request: ForkDisks, answer: ForkAnswer) -> Result<ReadyFork> {
        let connection = self.connect()?;
        let request = ForkDisks { answer, ..request };
        let CutForks { token, children, .. } = self.ask("POST", "/v1/forks", &request)?;
        Ok(ReadyFork { token, children, connection })
    }

    /// Announces the word to cut a fork that is ready, which gives its children these names if
    /// there are any. Nothing is cut before the word is said.
    ///
    /// # Errors
    /// As [`Blockd::connect`]; `Failed` when it went away.
    pub fn announce(&self, fork: &ReadyFork, names: &[String]) -> Result<Word> {
        let cut = CutFork { children: names.to_vec() };
        let request = http::request("POST", &format!("/v1/forks/{}/cut", fork.token), &cut)?;
        let connection = self.connection_of(fork)?;
        let (most, end) = request.split_at(request.len() - 1);
        http::send(&connection, most).context("ask", || self.object())?;
        Ok(Word { connection, end: String::from_utf8_lossy(end).into_owned() })
    }

    /// That of the fork, unless the daemon is another by now.
    fn connection_of(&self, fork: &ReadyFork) -> Result<UnixStream> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        // It says nothing by itself.
        match recv(&fork.connection, &mut [0], flags) {
            Err(Errno::AGAIN) => Ok(fork.connection.try_clone()?),
            _ => self.connect(),
        }
    }

    /// Waits until a fork is durable.
    ///
    /// # Errors
    /// What it says.
    pub fn forked(&self, token: Uuid) -> Result<ForkedDisks> {
        self.ask("GET", &format!("/v1/forks/{token}"), &())
    }

    /// Waits until a fork has ended, or is not known any more.
    ///
    /// # Errors
    /// When it does not answer: it may not have ended.
    pub fn wait_for_fork(&self, token: Uuid) -> Result<()> {
        self.exchange("GET", &format!("/v1/forks/{token}"), &()).map(drop)
    }

    /// Has it forget a fork that is ready and was not cut, and waits for what became of one that
    /// was: nobody has the names of its disks afterwards.
    ///
    /// # Errors
    /// As [`Blockd::wait_for_fork`].
    pub fn end_fork(&self, token: Uuid) -> Result<()> {
        // Refused when it was cut.
        self.exchange("DELETE", &format!("/v1/forks/{token}"), &())?;
        self.wait_for_fork(token)
    }

    /// Everything about a disk.
    ///
    /// # Errors
    /// What it says.
    pub fn show(&self, disk: &str) -> Result<DiskDetails> {
        self.ask("GET", &disk_path(disk, ""), &())
    }

    /// Makes a disk immutable, so that others can stand on it.
    ///
    /// # Errors
    /// What it says.
    pub fn seal(&self, disk: &str) -> Result<()> {
        self.ask::<Disk>("POST", &disk_path(disk, "/seal"), &LostTail::default()).map(drop)
    }

    /// Makes a disk that starts out with what the sealed disk `parent` holds.
    ///
    /// # Errors
    /// What it says.
    pub fn create_over(&self, parent: &str, name: &str) -> Result<Disk> {
        let (name, parent) = (name.to_owned(), Some(parent.to_owned()));
        let request = CreateDisk { name, size: None, parent, journal: None };
        self.ask("POST", "/v1/disks", &request)
    }

    /// All disks.
    ///
    /// # Errors
    /// What it says.
    pub fn disks(&self) -> Result<Vec<Disk>> {
        self.ask("GET", "/v1/disks", &())
    }

    /// Removes a disk.
    ///
    /// # Errors
    /// What it says.
    pub fn remove(&self, disk: &str) -> Result<()> {
        self.ask::<RemovedDisk>("DELETE", &disk_path(disk, ""), &()).map(drop)
    }
}

/// How a disk is served to a machine.
#[must_use]
pub fn export(socket: &Path, read_only: bool) -> ExportSpec {
    ExportSpec {
        kind: ExportKind::VhostUser,
        socket: SocketName::Unix(socket.to_owned()),
        tls: None,
        read_only,
        queues: 1,
        poll_us_max: None,
        packed: true,
    }
}

/// The path of a disk, whose name may be anything.
fn disk_path(disk: &str, what: &str) -> String {
    let mut path = "/v1/disks/".to_owned();
    for byte in disk.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                path.push(char::from(byte));
            }
            // Writing to memory cannot fail.
            _ => drop(write!(path, "%{byte:02X}")),
        }
    }
    path + what
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_fits_into_a_path() {
        assert_eq!(disk_path("a b/../?", "/attach"), "/v1/disks/a%20b%2F..%2F%3F/attach");
    }
}
