//! The daemon, as the command line sees it.
//!
//! Invariants:
//! - Requests of one thread come one at a time; each thread that works side by side has a
//!   connection of its own (a lane).
//! - The first connection is the one that sessions belong to: it stays open as long as the client.

mod http;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use blockd::api::types::{Job, JobState};
use blockd::pump::{Watch, lanes};
use format::{Error, Kind, Result};
use hyper::Method;
use hyper::body::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::output::{Outcome, Output};
use http::{Answer, Ask, BLOCKD, Connection, Whom};

pub use http::FORKD;

/// How long one question about a job waits for its end. Signals are looked at in between.
const JOB_WAIT_MS: u64 = 200;

/// A daemon that answers.
pub struct Client {
    whom: &'static Whom,
    socket: PathBuf,
    out: Output,
    lanes: Vec<Mutex<Option<Connection>>>,
}

/// A path with a name in it that may be anything.
#[must_use]
pub fn path_of(before: &str, name: &str, after: &str) -> String {
    format!("{before}{}{after}", encoded(name))
}

/// A text as a part of a path or of parameters.
#[must_use]
pub fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                out.push(char::from(byte));
            }
            // Writing to memory cannot fail.
            _ => drop(write!(out, "%{byte:02X}")),
        }
    }
    out
}

fn read_answer<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|e| {
        Error::new(Kind::Unsupported, "it answers something that is not known here")
            .caused_by(e)
            .tried("ask")
            .on("the daemon")
            .hint("use the same version of offshoot and blockd")
    })
}

impl Client {
    /// Connects to the daemon that listens at `socket`.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn open(socket: &Path, out: Output) -> Result<Self> {
        Self::open_to(&BLOCKD, socket, out)
    }

    /// Connects to a daemon of another kind.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn open_to(whom: &'static Whom, socket: &Path, out: Output) -> Result<Self> {
        let first = Connection::open(whom, socket)?;
        let mut all = vec![Mutex::new(Some(first))];
        all.extend((0..lanes()).map(|_| Mutex::new(None)));
        Ok(Client { whom, socket: socket.to_owned(), out, lanes: all })
    }

    /// Where the daemon listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn on_lane<T>(&self, lane: usize, work: impl FnOnce(&mut Connection) -> T) -> Result<T> {
        let slot = &self.lanes[lane % self.lanes.len()];
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let connection = match slot.take() {
            Some(connection) => connection,
            None => Connection::open(self.whom, &self.socket)?,
        };
        Ok(work(slot.insert(connection)))
    }

    fn tell(&self, notes: &[String]) {
        notes.iter().for_each(|note| self.out.note(note));
    }

    fn ask(&self, method: Method, path: String, body: &impl Serialize) -> Result<Answer> {
        let mut body = serde_json::to_vec(body).map_err(std::io::Error::from)?;
        if body == b"null" {
            body.clear();
        }
        let answer = self.on_lane(0, |connection| {
            connection.call(&Ask { method, path, body: body.into(), json: true })
        })??;
        self.tell(&answer.notes);
        Ok(answer)
    }

    /// Asks for something.
    ///
    /// # Errors
    /// The failure that the daemon told of; `Io` when it went away.
    pub fn get<T: DeserializeOwned>(&self, path: String) -> Result<T> {
        read_answer(&self.ask(Method::GET, path, &())?.body)
    }

    /// Asks for something to be done.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn post<T: DeserializeOwned>(&self, path: String, body: &impl Serialize) -> Result<T> {
        read_answer(&self.ask(Method::POST, path, body)?.body)
    }

    /// Asks for something to be set.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn put<T: DeserializeOwned>(&self, path: String, body: &impl Serialize) -> Result<T> {
        read_answer(&self.ask(Method::PUT, path, body)?.body)
    }

    /// Asks for something to be done that has no answer.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn tell_to(&self, method: Method, path: String, body: &impl Serialize) -> Result<()> {
        self.ask(method, path, body).map(|_| ())
    }

    /// Asks for something to go away.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn delete<T: DeserializeOwned>(&self, path: String) -> Result<T> {
        read_answer(&self.ask(Method::DELETE, path, &())?.body)
    }

    /// Reads or sends bytes, on a lane of the caller's.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn bytes(&self, lane: usize, method: Method, path: String, body: &[u8]) -> Result<Bytes> {
        let body = Bytes::copy_from_slice(body);
        let ask = Ask { method, path, body, json: false };
        // Lane 0 is the one that owns sessions; it works as well as the others.
        Ok(self.on_lane(lane + 1, |connection| connection.call(&ask))??.body)
    }

    /// Passes an answer on as it comes.
    ///
    /// # Errors
    /// As [`Client::get`], or what `each` reports.
    pub fn stream(&self, path: String, each: &mut dyn FnMut(&[u8]) -> Outcome<()>) -> Outcome<()> {
        let ask = Ask { method: Method::GET, path, body: Bytes::new(), json: false };
        self.on_lane(0, |connection| connection.stream(&ask, &mut |notes| self.tell(&notes), each))?
    }

    /// Asks for long work to be done, and looks after it: tells how far it is, and cancels it when
    /// `watch` says stop.
    ///
    /// # Errors
    /// As [`Client::get`], or what `watch` reports.
    pub fn job<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        watch: &dyn Watch,
    ) -> Result<T> {
        let answer = self.ask(Method::POST, format!("{path}?wait=false"), body)?;
        let mut job: Job = read_answer(&answer.body)?;
        debug_assert!(answer.accepted, "a job is accepted");
        let mut stopped = Ok(());
        while job.state == JobState::Running {
            if stopped.is_ok() {
                watch.set(job.done, job.total.unwrap_or(0));
                stopped = watch.check();
                if stopped.is_err() {
                    job = self.delete(format!("/v1/jobs/{}", job.id))?;
                    continue;
                }
            }
            job = self.get(format!("/v1/jobs/{}?wait_ms={JOB_WAIT_MS}", job.id))?;
        }
        self.tell(&job.notes);
        match (job.error, job.result) {
            (Some(failure), _) => match (Error::from(failure), stopped) {
                // Told in the words of the one who stopped it, with what the daemon adds.
                (e, Err(why)) if e.kind() == Kind::Cancelled => Err(with_context_of(why, &e)),
                (e, _) => Err(e),
            },
            (None, Some(result)) => read_answer(result.to_string().as_bytes()),
            (None, None) => Err(Error::new(Kind::Failed, "the job ended without an answer")),
        }
    }
}

fn with_context_of(mut error: Error, other: &Error) -> Error {
    if let Some(tried) = other.attempted() {
        error = error.tried(tried.to_owned());
    }
    if let Some(object) = other.object() {
        error = error.on(object);
    }
    if let Some(hint) = other.next_step() {
        error = error.hint(hint.to_owned());
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_fits_into_a_path() {
        let path = path_of("/v1/disks/", "a b/../\u{fc}?", "/map");

        assert_eq!(path, "/v1/disks/a%20b%2F..%2F%C3%BC%3F/map");
    }
}
