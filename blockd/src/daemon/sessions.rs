//! Disks that are held open for one client: to read, to write, or to fill a new one.
//!
//! Invariants:
//! - A session belongs to the connection it was opened on, and ends with it at the latest. An
//!   import that was not finished leaves nothing; what was written to a disk is made durable.
//! - A session is a job: whoever looks at the jobs sees it, and can cancel it. Requests of a
//!   cancelled session fail.
//! - Requests of a session may come on any connection, and run side by side; finishing it waits for
//!   them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use format::{Context as _, Error, Kind, Result};
use parking_lot::{Mutex, RwLock};
use serde_json::Value;

use super::Daemon;
use super::disks::{Noted, Opened};
use super::holds::Hold;
use super::jobs::Running;
use crate::api::types::{
    ByteRange, Disk as Summary, Extent, JobKind, OpenSession, Session, SessionUse,
};
use crate::content;
use crate::disk::Disk;
use crate::pump::lanes;
use crate::store::Access;
use crate::storedir::{Import, NewDisk, StoreDir};
use crate::verbs;

/// Extents that one answer lists at most.
const EXTENTS_MAX: usize = 4096;

/// What a session has open.
enum Body {
    Read(Opened),
    Write(Opened),
    /// The disk being filled, and what is held for it.
    Import(Box<Import<Arc<StoreDir>>>, Vec<Hold>),
}

impl Body {
    fn disk(&self) -> &Disk {
        match self {
            Body::Read(opened) | Body::Write(opened) => opened.disk(),
            Body::Import(import, _) => import.disk(),
        }
    }
}

/// The content of a session, for requests.
pub struct Content {
    name: String,
    owner: u64,
    job: Mutex<Option<Running>>,
    entry: Arc<super::jobs::Entry>,
    body: RwLock<Option<Body>>,
    next_lane: AtomicUsize,
}

/// All sessions.
#[derive(Default)]
pub struct Sessions {
    table: Mutex<HashMap<u64, Arc<Content>>>,
}

fn gone(id: u64) -> Error {
    Error::new(Kind::NotFound, "there is no such session, or it has ended")
        .on(format!("session {id}"))
}

impl Content {
    fn with<T>(&self, work: impl FnOnce(&Body) -> Result<T>) -> Result<T> {
        let run = || {
            self.entry.check()?;
            match &*self.body.read() {
                Some(body) => work(body),
                None => Err(gone(self.entry.id())),
            }
        };
        run().map_err(|e| e.on(self.object()))
    }

    fn lane(&self) -> usize {
        // Relaxed: any number will do.
        self.next_lane.fetch_add(1, Ordering::Relaxed) % lanes()
    }

    fn object(&self) -> String {
        format!("disk {}", self.name)
    }

    /// Fills `buf` from `offset`; both are multiples of 512.
    ///
    /// # Errors
    /// As [`Disk::read`], or `NotFound` when the session has ended.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let read = self.with(|body| body.disk().read(self.lane(), offset, buf));
        read.map_err(|e| e.tried("read"))?;
        self.entry.add(buf.len() as u64);
        Ok(())
    }

    /// Stores bytes; gives back how many of them were stored. In an import, `offset` is a multiple
    /// of 4 KiB and blocks of zeroes are not stored.
    ///
    /// # Errors
    /// As [`Disk::write`], `Invalid` outside the disk, `ReadOnly` in a session that only reads,
    /// `NotFound` when the session has ended.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<u64> {
        let stored = self.with(|body| {
            verbs::check_end(body.disk().size(), offset, bytes.len() as u64)?;
            match body {
                Body::Read(_) => Err(self.read_only()),
                Body::Write(opened) => {
                    verbs::write_bytes(opened.disk(), offset, bytes)?;
                    Ok(bytes.len() as u64)
                }
                Body::Import(import, _) => import.store(self.lane(), offset, bytes),
            }
        })?;
        self.entry.add(bytes.len() as u64);
        Ok(stored)
    }

    /// Makes ranges read as zeroes.
    ///
    /// # Errors
    /// As [`Content::write`].
    pub fn zero(&self, ranges: &[ByteRange]) -> Result<()> {
        self.with(|body| match body {
            Body::Read(_) => Err(self.read_only()),
            Body::Write(_) | Body::Import(..) => {
                let zero = |r: &ByteRange| verbs::zero(body.disk(), 0, r.offset, r.length);
                ranges.iter().try_for_each(zero)
            }
        })
    }

    fn read_only(&self) -> Error {
        Error::new(Kind::ReadOnly, "the session is for reading").on(self.object())
    }

    /// What lies from `offset` on, up to `end`, in order and without gaps; perhaps not all of it.
    ///
    /// # Errors
    /// `Invalid` outside the disk, `Corrupt` in a damaged range.
    pub fn extents(&self, offset: u64, end: u64) -> Result<Vec<Extent>> {
        self.with(|body| {
            let disk = body.disk();
            let end = end.min(disk.size());
            let (mut at, mut extents) = (offset, Vec::new());
            while at < end && extents.len() < EXTENTS_MAX {
                let run = match content::Content::status(disk, at, end - at) {
                    // What lies before the damage can still be had.
                    Err(_) if !extents.is_empty() => break,
                    run => run?,
                };
                extents.push(Extent { offset: at, length: run.len, kind: run.kind });
                at += run.len;
            }
            Ok(extents)
        })
    }
}

impl Daemon {
    /// Opens a session for the connection `owner`.
    ///
    /// # Errors
    /// As opening the disk, or beginning the import.
    pub fn open_session(&self, owner: u64, request: &OpenSession) -> Result<Noted<Session>> {
        let name = &request.disk;
        let Noted { value: body, notes } = self.session_body(request)?;
        let kind = match request.purpose {
            SessionUse::Read => JobKind::Read,
            SessionUse::Export => JobKind::Export,
            SessionUse::Write => JobKind::Write,
            SessionUse::Import => JobKind::Import,
        };
        let job = self.jobs.start(kind, &format!("disk {name}"), request.total);
        let entry = Arc::clone(job.entry());
        let session = Session { id: entry.id(), disk: name.clone(), size: body.disk().size() };
        let content = Content {
            name: name.clone(),
            owner,
            job: Mutex::new(Some(job)),
            entry,
            body: RwLock::new(Some(body)),
            next_lane: AtomicUsize::new(0),
        };
        self.sessions.table.lock().insert(session.id, Arc::new(content));
        Ok(Noted { value: session, notes })
    }

    fn session_body(&self, request: &OpenSession) -> Result<Noted<Body>> {
        let name = &request.disk;
        let body = |access| self.open_disk(name, access, request.accept_lost_tail);
        match request.purpose {
            SessionUse::Read | SessionUse::Export => {
                let Noted { value, notes } = body(Access::Read)?;
                Ok(Noted { value: Body::Read(value), notes })
            }
            SessionUse::Write => {
                let Noted { value, notes } = body(Access::Write)?;
                Ok(Noted { value: Body::Write(value), notes })
            }
            SessionUse::Import => {
                let size = request.size.ok_or_else(|| {
                    Error::invalid("an import needs the size of the disk").on(name.clone())
                })?;
                let begin = || -> Result<Body> {
                    // The parent is held as well: it must not go, nor become another one of the
                    // same name, while the disk over it is not in the catalogue yet.
                    let parent = request.parent.as_ref().filter(|parent| *parent != name);
                    let parent =
                        parent.map(|parent| self.hold(parent, Access::Read)).transpose()?;
                    let holds = parent.into_iter().chain([self.hold(name, Access::Write)?]);
                    let holds = holds.collect();
                    let import = match &request.parent {
                        None => Import::begin(self.dir()?, &NewDisk::root(name, size), lanes())?,
                        Some(parent) => Import::over(self.dir()?, (name, size), parent, lanes())?,
                    };
                    Ok(Body::Import(Box::new(import), holds))
                };
                let value = begin().context("import", || format!("disk {name}"))?;
                Ok(Noted { value, notes: Vec::new() })
            }
        }
    }

    /// A session.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn session(&self, id: u64) -> Result<Arc<Content>> {
        self.sessions.table.lock().get(&id).cloned().ok_or_else(|| gone(id))
    }

    /// Ends a session in order: what was written is durable, a filled disk is there. The answer is
    /// the new disk, for an import.
    ///
    /// # Errors
    /// `NotFound`, or what closing the disk reports.
    pub fn finish_session(&self, id: u64) -> Result<Option<Summary>> {
        let content = self.session(id)?;
        // Waits for the requests that are under way.
        let body = content.body.write().take();
        self.sessions.table.lock().remove(&id);
        let object = || content.object();
        let finished = match body {
            None => Err(gone(id)),
            Some(Body::Read(opened)) => opened.close().map(|()| None),
            Some(Body::Write(opened)) => opened.close().context("write", object).map(|()| None),
            Some(Body::Import(import, holds)) => {
                let publish = || {
                    // Asked to stop before this moment, it leaves nothing.
                    content.entry.check()?;
                    let row = import.finish()?;
                    drop(holds);
                    verbs::summary(&*self.dir()?, &row).map(Some)
                };
                publish().context("import", object)
            }
        };
        let told = match &finished {
            Ok(disk) => Ok(serde_json::to_value(disk).unwrap_or(Value::Null)),
            Err(e) => Err(Error::new(e.kind(), e.to_string())),
        };
        if let Some(job) = content.job.lock().take() {
            job.finish(&told);
        }
        finished
    }

    /// Ends a session whose client gave it up. What was written is made durable, a disk that was
    /// not filled to its end is gone.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn drop_session(&self, id: u64) -> Result<()> {
        let content = self.session(id)?;
        let body = content.body.write().take();
        self.sessions.table.lock().remove(&id);
        if let Some(Body::Write(opened)) = body
            && let Err(error) = opened.close()
        {
            tracing::warn!(disk = content.name, %error, "closing what a client left open");
        }
        // A client that was told so gives up as well.
        let cancelled = content.entry.check().err();
        let given_up = cancelled
            .unwrap_or_else(|| Error::new(Kind::Cancelled, "its client gave it up"))
            .on(content.object());
        if let Some(job) = content.job.lock().take() {
            job.finish(&Err(given_up));
        }
        Ok(())
    }

    /// Whether a connection has any.
    pub fn has_sessions_of(&self, owner: u64) -> bool {
        self.sessions.table.lock().values().any(|content| content.owner == owner)
    }

    /// Ends the sessions of a connection that is gone.
    pub fn end_sessions_of(&self, owner: u64) {
        self.end_sessions(|content| content.owner == owner);
    }

    /// Ends every session.
    pub(super) fn end_all_sessions(&self) {
        self.end_sessions(|_| true);
    }

    fn end_sessions(&self, which: impl Fn(&Content) -> bool) {
        let table = self.sessions.table.lock();
        let ids: Vec<u64> = table.iter().filter(|(_, c)| which(c)).map(|(id, _)| *id).collect();
        drop(table);
        for id in ids {
            // One that ended meanwhile is what is wanted.
            let _ = self.drop_session(id);
        }
    }
}
