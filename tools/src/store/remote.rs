//! A store that a daemon has.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use blockd::api::types::{
    ByteRange, CheckDisk, Checked, Compare, Compared, CreateDisk, Df, Digested, Disk as Summary,
    DiskDetails, Extent, FlattenDisk, Flattened, ForkDisks, ForkMode, ForkedDisks, LostTail,
    MapRange, Moved, OpenSession, RemovedDisk, RenameDisk, RepairDisk, Repaired, ResizeDisk,
    Scrubbed, Session, SessionUse, SetFlattenPolicy, SetMode, Stored,
};
use blockd::content::{Content, Run};
use blockd::pump::Watch;
use format::{Context as _, Error, Kind, Result};
use hyper::Method;

use super::{Filling, Flattening, Store, Writing};
use crate::client::{Client, encoded, path_of};
use crate::output::{Outcome, Stop};

/// A store behind a socket.
pub struct Remote {
    client: Client,
    path: Option<PathBuf>,
}

impl Remote {
    /// The store of a daemon; `path` is its folder as the user named it.
    #[must_use]
    pub fn new(client: Client, path: Option<PathBuf>) -> Self {
        Remote { client, path }
    }

    fn session(&self, request: &OpenSession) -> Result<Held<'_>> {
        let session: Session = self.client.post("/v1/sessions".into(), request)?;
        let purpose = request.purpose;
        Ok(Held { client: &self.client, session, purpose, open: true, known: Mutex::default() })
    }
}

fn disk(name: &str, after: &str) -> String {
    path_of("/v1/disks/", name, after)
}

fn tail(lost_tail: bool) -> &'static str {
    if lost_tail { "?accept_lost_tail=true" } else { "" }
}

impl Store for Remote {
    fn list(&self) -> Result<Vec<Summary>> {
        self.client.get("/v1/disks".into())
    }

    fn has(&self, name: &str) -> Result<bool> {
        Ok(self.list()?.iter().any(|d| d.name == name))
    }

    fn show(&self, name: &str, lost_tail: bool) -> Result<DiskDetails> {
        self.client.get(disk(name, tail(lost_tail)))
    }

    fn create(&self, new: &CreateDisk) -> Result<Summary> {
        self.client.post("/v1/disks".into(), new)
    }

    fn fork(&self, request: &ForkDisks, watch: &dyn Watch) -> Result<ForkedDisks> {
        match request.mode {
            ForkMode::Live => self.client.post("/v1/forks".into(), request),
            ForkMode::Inherit => self.client.job("/v1/forks", request, watch),
        }
    }

    fn set_mode(&self, name: &str, request: &SetMode) -> Result<Summary> {
        self.client.post(disk(name, "/mode"), request)
    }

    fn commit(&self, name: &str, accept_lost_tail: bool) -> Result<Summary> {
        self.client.post(disk(name, "/commit"), &LostTail { accept_lost_tail })
    }

    fn undo(&self, name: &str) -> Result<Summary> {
        self.client.post(disk(name, "/undo"), &())
    }

    fn flatten(&self, name: &str, request: &FlattenDisk, watch: &dyn Watch) -> Result<Flattened> {
        self.client.job(&disk(name, "/flatten"), request, watch)
    }

    fn begin_flatten(
        &self,
        name: &str,
        request: &FlattenDisk,
        _: &dyn Watch,
    ) -> Result<Flattening> {
        let job = self.client.post(disk(name, "/flatten?wait=false"), request)?;
        Ok(Flattening::Job(job))
    }

    fn set_disk_policy(&self, name: &str, request: &SetFlattenPolicy) -> Result<Summary> {
        self.client.put(disk(name, "/flatten-policy"), request)
    }

    fn store_policy(&self) -> Result<SetFlattenPolicy> {
        self.client.get("/v1/store/flatten-policy".into())
    }

    fn set_store_policy(&self, request: &SetFlattenPolicy) -> Result<SetFlattenPolicy> {
        self.client.put("/v1/store/flatten-policy".into(), request)
    }

    fn remove(&self, name: &str) -> Result<RemovedDisk> {
        self.client.delete(disk(name, ""))
    }

    fn rename(&self, name: &str, to: &str) -> Result<Summary> {
        self.client.post(disk(name, "/rename"), &RenameDisk { to: to.into() })
    }

    fn resize(&self, name: &str, request: &ResizeDisk) -> Result<Summary> {
        self.client.post(disk(name, "/resize"), request)
    }

    fn seal(&self, name: &str, lost_tail: bool, watch: &dyn Watch) -> Result<Summary> {
        let request = LostTail { accept_lost_tail: lost_tail };
        self.client.job(&disk(name, "/seal"), &request, watch)
    }

    fn check(&self, name: &str, request: CheckDisk, watch: &dyn Watch) -> Result<Checked> {
        self.client.job(&disk(name, "/check"), &request, watch)
    }

    fn scrub(&self, name: &str, watch: &dyn Watch) -> Result<Scrubbed> {
        self.client.job(&disk(name, "/scrub"), &(), watch)
    }

    fn digest(&self, name: &str, watch: &dyn Watch) -> Result<Digested> {
        self.client.job(&disk(name, "/digest"), &(), watch)
    }

    fn repair(&self, name: &str, request: RepairDisk, watch: &dyn Watch) -> Result<Repaired> {
        self.client.job(&disk(name, "/repair"), &request, watch)
    }

    fn map(
        &self,
        name: &str,
        lost_tail: bool,
        visit: &mut dyn FnMut(MapRange) -> Outcome<()>,
    ) -> Outcome<()> {
        // One range per line: an answer of any length is read in a little memory.
        let mut rest = Vec::new();
        let mut line = |line: &[u8]| -> Outcome<()> {
            let line = line.strip_suffix(b",").unwrap_or(line);
            match line {
                b"" | b"[" | b"]" => Ok(()),
                _ => visit(serde_json::from_slice(line).map_err(|e| Stop::from(strange(e)))?),
            }
        };
        self.client.stream(disk(name, &format!("/map{}", tail(lost_tail))), &mut |bytes| {
            for byte in bytes {
                match byte {
                    b'\n' => line(&std::mem::take(&mut rest))?,
                    byte => rest.push(*byte),
                }
            }
            Ok(())
        })?;
        line(&rest)
    }

    fn compare(&self, request: &Compare, watch: &dyn Watch) -> Result<Compared> {
        self.client.job("/v1/compare", request, watch)
    }

    fn diff(&self, name: &str, from: &str, lost_tail: bool) -> Result<Vec<ByteRange>> {
        let (name, from) = (encoded(name), encoded(from));
        let path = format!("/v1/diff?disk={name}&from={from}&accept_lost_tail={lost_tail}");
        self.client.get(path)
    }

    fn discard(&self, name: &str, range: ByteRange, lost_tail: bool) -> Result<Moved> {
        self.client.post(disk(name, &format!("/discard{}", tail(lost_tail))), &range)
    }

    fn df(&self) -> Result<Df> {
        let df: Df = self.client.get("/v1/store".into())?;
        let path = self.path.clone().unwrap_or(df.path);
        Ok(Df { path, ..df })
    }

    fn open(
        &self,
        name: &str,
        purpose: SessionUse,
        lost_tail: bool,
    ) -> Result<Box<dyn Content + '_>> {
        Ok(Box::new(self.session(&asked(name, purpose, lost_tail))?))
    }

    fn open_for_writing(&self, name: &str, lost_tail: bool) -> Result<Box<dyn Writing + '_>> {
        Ok(Box::new(self.session(&asked(name, SessionUse::Write, lost_tail))?))
    }

    fn import(&self, name: &str, size: u64, parent: Option<&str>) -> Result<Box<dyn Filling + '_>> {
        let parent = parent.map(str::to_owned);
        let request = asked(name, SessionUse::Import, false);
        Ok(Box::new(self.session(&OpenSession { size: Some(size), parent, ..request })?))
    }
}

fn asked(name: &str, purpose: SessionUse, accept_lost_tail: bool) -> OpenSession {
    let disk = name.into();
    OpenSession { disk, purpose, size: None, parent: None, total: None, accept_lost_tail }
}

fn strange(e: serde_json::Error) -> Error {
    Error::new(Kind::Unsupported, "it answers something that is not known here")
        .caused_by(e)
        .tried("ask")
        .on("the daemon")
}

/// A disk that the daemon holds open for this process. It lets go when the connection ends, too.
struct Held<'a> {
    client: &'a Client,
    session: Session,
    purpose: SessionUse,
    open: bool,
    /// Extents that were asked for, in order, and not used up.
    known: Mutex<VecDeque<Extent>>,
}

impl Held<'_> {
    fn path(&self, what: &str) -> String {
        format!("/v1/sessions/{}{what}", self.session.id)
    }

    fn end(&mut self) -> Result<Option<Summary>> {
        self.open = false;
        self.client.post(self.path("/finish"), &())
    }

    fn extents(&self, offset: u64) -> Result<Vec<Extent>> {
        let length = self.session.size - offset;
        let path = self.path(&format!("/extents?offset={offset}&length={length}"));
        self.client.get(path)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        // If this fails, the session ends with the connection.
        let _ = match self.purpose {
            SessionUse::Read | SessionUse::Export => self.end().map(|_| ()),
            SessionUse::Write | SessionUse::Import => {
                self.client.tell_to(Method::DELETE, self.path(""), &())
            }
        };
    }
}

impl Content for Held<'_> {
    fn size(&self) -> u64 {
        self.session.size
    }

    fn status(&self, offset: u64, limit: u64) -> Result<Run> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let holds = |e: &Extent| e.offset <= offset && offset < e.offset + e.length;
        while known.front().is_some_and(|first| !holds(first)) {
            known.pop_front();
        }
        if known.is_empty() {
            known.extend(self.extents(offset)?);
        }
        match known.front().filter(|first| holds(first)) {
            Some(e) => Ok(Run { len: (e.offset + e.length - offset).min(limit), kind: e.kind }),
            None => Err(Error::new(Kind::Failed, "the daemon skips a part of the disk")),
        }
    }

    fn read_at(&self, lane: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        let length = buf.len();
        let path = self.path(&format!("/data?offset={offset}&length={length}"));
        let bytes = self.client.bytes(lane, Method::GET, path, &[])?;
        if bytes.len() != length {
            return Err(Error::new(Kind::Failed, "the daemon gives less than was asked for"));
        }
        buf.copy_from_slice(&bytes);
        Ok(())
    }
}

impl Writing for Held<'_> {
    fn size(&self) -> u64 {
        self.session.size
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let path = self.path(&format!("/data?offset={at}"));
        self.client.bytes(0, Method::PUT, path, bytes).map(|_| ())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.end().map(|_| ())
    }
}

impl Filling for Held<'_> {
    fn zero(&self, _: usize, offset: u64, length: u64) -> Result<()> {
        let ranges = [ByteRange { offset, length }];
        self.client.tell_to(Method::POST, self.path("/zeroes"), &ranges)
    }

    fn store(&self, lane: usize, offset: u64, bytes: &[u8]) -> Result<u64> {
        let path = self.path(&format!("/data?offset={offset}"));
        let answer = self.client.bytes(lane, Method::PUT, path, bytes)?;
        let stored: Stored = serde_json::from_slice(&answer).map_err(strange)?;
        Ok(stored.stored)
    }

    fn finish(mut self: Box<Self>) -> Result<Summary> {
        let made = self.end()?;
        let missing = || Error::new(Kind::Failed, "the daemon made no disk");
        made.ok_or_else(missing).context("import", || format!("disk {}", self.session.disk))
    }
}
