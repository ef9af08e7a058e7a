//! A store in memory that records what is done to it, breaks on demand, and can say what a power
//! cut at any moment may leave. For tests, fuzz targets and benches.
//!
//! # Fault model
//!
//! **Process kill.** Every completed operation survives: [`SimStore::live_image`], [`replay`].
//!
//! **Power cut** after any number of completed operations: [`crash_states`].
//! - Content (writes, length changes, punches) is durable once a [`super::File::sync`] of that file
//!   that began after it succeeded. Names (creations, renames, removals) are durable once a
//!   [`super::Store::sync_names`] that began after them succeeded. Neither makes the other durable:
//!   a name may lead to a file whose content is lost, and synced content may have no name.
//! - Of what is not durable, any subset may survive, in any files, whatever the order was. Up to a
//!   stated number of such operations all subsets are tried, above it regular families and random
//!   subsets ([`Bounds`]).
//! - A write may tear between 512-byte sectors (of the file): its first or its last half survives,
//!   with all others and with none of them. A sector never tears.
//! - A write past the durable end of the file may leave its length without its bytes; zeroes then.
//! - Two writes (or a write and a punch) that overlap may reach the disk in reversed order.
//! - A rename survives whole or not at all. A file has at most one name; a name leads to one file.
//! - The read-only mark is durable when it was set.
//!
//! **Failing host** ([`Faults`]): calls that fail, a full disk, a failed sync that loses what it
//! covered (visibly or not), short reads, bits flipped on reads, writes that are acknowledged but
//! lost or that land elsewhere.
//!
//! **Not modelled:** sectors that decay at rest (damage an [`Image`] for that), a torn write of
//! which other pieces than one half survive, a folder that cannot be read, operations that are half
//! done when the process is killed, a sync that lies (take it out of the log with [`drop_syncs`]).
//!
//! All calls are atomic under one lock, so the log is the order in which calls took effect.

use std::sync::Arc;

use format::{Context, Error, Kind, Result};
use parking_lot::Mutex;

use super::{Access, File, Space, Store, name};
use faults::Call;
use file::SimFile;
use log::{Live, LiveFile};

mod content;
mod crash;
mod faults;
mod file;
mod image;
mod log;
mod pages;
mod survivors;
#[cfg(test)]
mod tests;

pub use content::Content;
pub use crash::{CrashState, CrashStats, CrashWalk, all_crash_states, crash_states};
pub use faults::{Fault, Faults, Hit, When};
pub use image::Image;
pub use log::{FileId, Op, drop_ops, drop_syncs, replay, swap};
pub use survivors::{Bounds, Part, Survivor};

/// Size of the simulated file system where no capacity is set, in bytes.
const TOTAL: u64 = 1 << 50;

/// The simulated store. Clones share one store. See the module head.
#[derive(Debug, Clone)]
pub struct SimStore {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    base: Image,
    /// `None`: operations are not recorded.
    log: Option<Vec<Op>>,
    live: Live,
    next: u32,
    faults: Faults,
    hits: Vec<Hit>,
}

impl Default for SimStore {
    fn default() -> Self {
        Self::new()
    }
}

impl SimStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::from_image(Image::new())
    }

    /// A store that holds `image`, all of it durable.
    #[must_use]
    pub fn from_image(image: Image) -> Self {
        let live = Live::new(&image);
        let next = u32::try_from(live.files.len()).expect("an image has fewer than 2^32 files");
        let (faults, hits) = (Faults::none(), Vec::new());
        let state = State { base: image, log: Some(Vec::new()), live, next, faults, hits };
        SimStore { state: Arc::new(Mutex::new(state)) }
    }

    /// A store on which `log` was done since it held `base`: what a process left that was killed
    /// then. What was not durable is not durable here either, and the log goes on behind `log`.
    #[must_use]
    pub fn from_log(base: Image, log: Vec<Op>) -> Self {
        let store = Self::from_image(base);
        {
            let mut state = store.state.lock();
            for op in log {
                if let Op::Create { file, .. } = op {
                    state.next = state.next.max(file.0 + 1);
                }
                state.apply(op);
            }
        }
        store
    }

    /// A store that holds `image` and keeps no log, for long runs that never ask for crash states.
    #[must_use]
    pub fn without_log(image: Image) -> Self {
        let store = Self::from_image(image);
        store.state.lock().log = None;
        store
    }

    /// The image that the log starts from.
    #[must_use]
    pub fn base(&self) -> Image {
        self.state.lock().base.clone()
    }

    /// The operations so far, in order.
    #[must_use]
    pub fn log(&self) -> Vec<Op> {
        self.state.lock().log.clone().unwrap_or_default()
    }

    /// Number of operations so far.
    #[must_use]
    pub fn log_len(&self) -> usize {
        self.state.lock().log_len()
    }

    /// What a process kill would leave now: all completed operations.
    #[must_use]
    pub fn live_image(&self) -> Image {
        self.state.lock().live.image()
    }

    /// Sets the rules for faults; the calls are counted from here on.
    pub fn set_faults(&self, faults: Faults) {
        self.state.lock().faults = faults;
    }

    /// The faults that happened so far, in order.
    #[must_use]
    pub fn hits(&self) -> Vec<Hit> {
        self.state.lock().hits.clone()
    }

    fn handle(&self, file: FileId, name: &str, writable: bool) -> Arc<dyn File> {
        Arc::new(SimFile::new(Arc::clone(&self.state), file, name, writable))
    }
}

impl State {
    fn log_len(&self) -> usize {
        self.log.as_ref().map_or(0, Vec::len)
    }

    /// Does and records an operation.
    fn apply(&mut self, op: Op) {
        self.live.apply(&op);
        if let Some(log) = &mut self.log {
            log.push(op);
        }
    }

    /// What befalls this call, if anything.
    fn fault(&mut self, call: Call, name: &str) -> Option<Fault> {
        let fault = self.faults.hit(call, name)?;
        self.hits.push(Hit { fault, name: name.to_owned(), at: self.log_len() });
        Some(fault)
    }

    /// Like [`State::fault`], for calls on which a fault means that nothing happens.
    fn refuse(&mut self, call: Call, name: &str) -> Result<()> {
        match self.fault(call, name) {
            None => Ok(()),
            Some(fault) => Err(injected(fault)),
        }
    }

    fn find(&self, name: &str) -> Result<FileId> {
        let found = self.live.names.get(name).copied();
        found.ok_or_else(|| Error::new(Kind::NotFound, "no such file"))
    }

    /// Bytes of the pages of all named files.
    fn used(&self) -> u64 {
        let files = self.live.names.values().filter_map(|id| self.live.files.get(id));
        files.map(LiveFile::allocated).sum()
    }
}

/// The error that a fault causes.
fn injected(fault: Fault) -> Error {
    let (kind, reason) = match fault {
        Fault::WriteNoSpace
        | Fault::CreateNoSpace
        | Fault::SetLenNoSpace
        | Fault::ReserveNoSpace => (Kind::NoSpace, "no space left on the host file system"),
        Fault::PunchUnsupported | Fault::ReserveUnsupported => {
            (Kind::Unsupported, "the file system cannot do this")
        }
        Fault::ReadShort => (Kind::Corrupt, "the file ends early"),
        _ => (Kind::Io, "the host reported an I/O error"),
    };
    Error::new(kind, reason).caused_by(format!("injected {fault:?}"))
}

/// How messages name a file.
fn object(name: &str) -> String {
    format!("simulated file {name}")
}

impl Store for SimStore {
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>> {
        let open = || {
            name::check(name)?;
            let state = self.state.lock();
            let file = state.find(name)?;
            let writable = access == Access::Write;
            if writable && state.live.files[&file].content.is_read_only() {
                return Err(Error::new(Kind::ReadOnly, "the file is marked read-only"));
            }
            Ok(self.handle(file, name, writable))
        };
        open().context("open", || object(name))
    }

    fn create(&self, name: &str) -> Result<Arc<dyn File>> {
        let create = || {
            name::check(name)?;
            let mut state = self.state.lock();
            if state.live.names.contains_key(name) {
                return Err(Error::new(Kind::Exists, "exists already"));
            }
            state.refuse(Call::Create, name)?;
            let file = FileId(state.next);
            state.next += 1;
            state.apply(Op::Create { file, name: name.into() });
            Ok(self.handle(file, name, true))
        };
        create().context("create", || object(name))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let rename = || -> Result<()> {
            name::check(from)?;
            name::check(to)?;
            let mut state = self.state.lock();
            let file = state.find(from)?;
            state.refuse(Call::Rename, from)?;
            if from != to {
                state.apply(Op::Rename { file, from: from.into(), to: to.into() });
            }
            Ok(())
        };
        rename().context("rename", || object(from))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let remove = || -> Result<()> {
            name::check(name)?;
            let mut state = self.state.lock();
            let file = state.find(name)?;
            state.refuse(Call::Remove, name)?;
            state.apply(Op::Remove { file, name: name.into() });
            Ok(())
        };
        remove().context("remove", || object(name))
    }

    fn names(&self) -> Result<Vec<String>> {
        Ok(self.state.lock().live.names.keys().map(ToString::to_string).collect())
    }

    fn sync_names(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.refuse(Call::SyncNames, "").context("sync the names of", || self.describe())?;
        state.apply(Op::SyncNames);
        Ok(())
    }

    fn space(&self) -> Result<Space> {
        let state = self.state.lock();
        let total = state.faults.limit().unwrap_or(TOTAL);
        Ok(Space { free: total.saturating_sub(state.used()), total })
    }

    fn describe(&self) -> String {
        "simulated store".into()
    }
}
