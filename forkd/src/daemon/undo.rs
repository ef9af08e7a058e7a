//! What to remove when something is not finished.
//!
//! A record is durable before the first step of what it undoes, and gone before anybody is told
//! that the last step was done. While it is there, the work counts as not done: a daemon that finds
//! it removes what it names, whether the work was given up, failed or was killed.
//!
//! The order of removing, and why: first the processes, so that nobody uses a disk; then a fork
//! that is under way is ended or waited for, so that there are no disks to come; then blockd's
//! sockets, so that disks are free; then the disks; then the folders; last the record, so that a
//! removal that is cut short is taken up again. Every step may find that it was done before.
//!
//! A disk is never removed by its name alone, which may be another's by now, nor is it missed
//! because it has another name: it has the identity that was noted, or stands on the very segment
//! that it was made over. The record of a fork has identities: blockd tells them when it is ready,
//! and makes nothing of a fork that nobody cuts. Elsewhere identities are noted as soon as they are
//! known, before anybody uses the disks: one in service may be flattened, and then stands on
//! nothing that it was made over. That note is a file of its own, and not durable: after a kill it
//! is there, after a power cut it may be missing, and the first one counts.
//!
//! Of a snapshot, the folder that it is made in says whether it is done: it takes another name as
//! the last step. While it has the first one, it and the disks go; when it has not, the snapshot is
//! there, or was never begun, and nothing goes. The folder goes after the disks, because it is what
//! says that they are to go.
//!
//! A machine that ended by itself stays, but blockd is to let go of its disks; that is tried again
//! until it is done as well, and looked for at every start.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use format::{Context as _, Error, Kind, Result};
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Daemon;
use super::state::{self, StateDir};
use crate::api::types::EventKind;
use crate::process::Process;

/// Version of the records.
const LAYOUT: u32 = 1;
/// How the file of known disks ends that is beside a record.
const KNOWN: &str = "disks";
/// Time between two attempts.
const AGAIN: Duration = Duration::from_secs(1);

/// What to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    layout: u32,
    /// Its name.
    pub id: Uuid,
    /// VM processes and their folders.
    pub machines: Vec<Uuid>,
    /// True when blockd may serve disks in these folders.
    pub attached: bool,
    /// Disks.
    pub disks: Vec<UndoDisk>,
    /// The fork that makes them.
    #[serde(default)]
    pub fork: Option<Uuid>,
    /// The folder of a snapshot that is not done; without it there, the disks stay.
    #[serde(default)]
    pub partial: Option<PathBuf>,
}

/// The disks of a record, when their identities are known.
#[derive(Serialize, Deserialize)]
struct Known {
    layout: u32,
    disks: Vec<UndoDisk>,
}

/// A disk to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoDisk {
    /// Its name.
    pub name: String,
    /// How it is told from another one of that name.
    pub is: Which,
}

/// Which disk is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Which {
    /// The one with this identity.
    Identity(Uuid),
    /// The one that stands on this segment: what a fork has frozen, if it came to that.
    Over(Uuid),
}

impl Undo {
    /// A record of machines, and whether they use disks.
    #[must_use]
    pub fn of(machines: Vec<Uuid>, attached: bool, disks: Vec<UndoDisk>) -> Undo {
        let id = Uuid::new_v4();
        Undo { layout: LAYOUT, id, machines, attached, disks, fork: None, partial: None }
    }

    /// A record of a snapshot's disks, and the folder in which it is while it is not done.
    #[must_use]
    pub fn of_snapshot(partial: PathBuf, disks: Vec<UndoDisk>) -> Undo {
        Undo { partial: Some(partial), ..Undo::of(Vec::new(), false, disks) }
    }
}

/// Removes what is to be removed, until it is.
pub struct Janitor {
    folder: PathBuf,
    work: Mutex<Work>,
    changed: Condvar,
}

#[derive(Default)]
struct Work {
    /// To be removed by the janitor.
    undo: BTreeMap<Uuid, Undo>,
    /// Ended machines whose disks blockd still serves.
    release: BTreeSet<Uuid>,
    /// Every VM process that this daemon knows of.
    processes: BTreeMap<Uuid, Arc<Process>>,
}

impl Janitor {
    /// With what is left from before.
    ///
    /// # Errors
    /// What the host reports. A record that makes no sense is told of and left alone.
    pub fn open(dir: &StateDir) -> Result<Janitor> {
        let folder = dir.undo();
        let mut work = Work::default();
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "new") {
                // Its work had not begun.
                fs::remove_file(&path)?;
                continue;
            }
            if path.extension().is_some_and(|e| e == KNOWN) {
                if !path.with_extension("json").exists() {
                    fs::remove_file(&path)?;
                }
                continue;
            }
            match state::read::<Undo>(&path) {
                Ok(Some(mut undo)) => {
                    // One that a power cut left makes no sense, and is not needed then.
                    if let Ok(Some(known)) = state::read::<Known>(&path.with_extension(KNOWN)) {
                        undo.disks = known.disks;
                    }
                    work.undo.insert(undo.id, undo);
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "not undone"),
            }
        }
        Ok(Janitor { folder, work: Mutex::new(work), changed: Condvar::new() })
    }

    /// Things that are to be removed and were not yet.
    #[must_use]
    pub fn pending(&self) -> u64 {
        let work = self.work.lock();
        (work.undo.len() + work.release.len()) as u64
    }

    /// True when a machine is to be removed.
    #[must_use]
    pub fn condemns(&self, machine: Uuid) -> bool {
        self.work.lock().undo.values().any(|undo| undo.machines.contains(&machine))
    }

    /// Remembers a process.
    pub fn know(&self, process: Arc<Process>) {
        self.work.lock().processes.insert(process.id, process);
    }

    /// Has the disks of an ended machine let go.
    pub fn release(&self, machine: Uuid) {
        self.work.lock().release.insert(machine);
        self.changed.notify_all();
    }

    fn file(&self, id: Uuid) -> PathBuf {
        self.folder.join(file_name(id))
    }

    /// Notes durably what is to be removed unless [`Janitor::done`] is said.
    ///
    /// # Errors
    /// What the host reports; nothing is noted then.
    pub fn begin(&self, undo: &Undo) -> Result<()> {
        state::write(&self.folder, &file_name(undo.id), undo, true)
    }

    /// Notes which disks were made, by name and identity, before anybody uses them.
    ///
    /// # Errors
    /// What the host reports.
    pub fn made(&self, undo: &mut Undo, made: &BTreeMap<String, Uuid>) -> Result<()> {
        for disk in &mut undo.disks {
            if let Some(id) = made.get(&disk.name) {
                disk.is = Which::Identity(*id);
            }
        }
        let known = Known { layout: LAYOUT, disks: undo.disks.clone() };
        state::write(&self.folder, &format!("{}.{KNOWN}", undo.id.simple()), &known, false)
    }

    /// What was under way is done: durably nothing of it is to be removed.
    ///
    /// # Errors
    /// What the host reports; it then still counts as not done.
    pub fn done(&self, undo: &Undo) -> Result<()> {
        let remove = || -> Result<()> {
            fs::remove_file(self.file(undo.id))?;
            // After the record: without it, this says nothing. Mostly it is not there.
            let _ = fs::remove_file(self.file(undo.id).with_extension(KNOWN));
            // A record that comes back after a power cut would remove what somebody was told of.
            state::sync_folder(&self.folder)
        };
        remove().context("remove", || shown(&self.file(undo.id)))
    }

    /// Has it removed from now on.
    pub(super) fn hand_over(&self, undo: Undo) {
        self.work.lock().undo.insert(undo.id, undo);
        self.changed.notify_all();
    }
}

impl Daemon {
    /// Starts the thread that removes what could not be removed at once.
    ///
    /// # Errors
    /// What the host reports.
    pub(super) fn start_janitor(self: &Arc<Self>) -> Result<()> {
        let daemon = Arc::downgrade(self);
        std::thread::Builder::new().name("janitor".into()).spawn(move || {
            while let Some(daemon) = daemon.upgrade() {
                daemon.clean_up();
                let mut work = daemon.janitor.work.lock();
                daemon.janitor.changed.wait_for(&mut work, AGAIN);
            }
        })?;
        Ok(())
    }

    /// One attempt at everything.
    pub(super) fn clean_up(&self) {
        let (undo, release) = {
            let work = self.janitor.work.lock();
            (work.undo.values().cloned().collect::<Vec<_>>(), work.release.clone())
        };
        for undo in undo {
            // It is tried again, for as long as it takes; health tells how much is left.
            let _ = self.remove(&undo);
        }
        for machine in release {
            if self.let_go_of_disks(machine).is_ok() {
                self.janitor.work.lock().release.remove(&machine);
            }
        }
    }

    /// Removes what was under way, now if that is possible, else as soon as it is.
    pub(super) fn give_up(&self, undo: Undo) -> Result<()> {
        let removed = self.remove(&undo);
        if removed.is_err() {
            self.janitor.hand_over(undo);
        }
        removed
    }

    fn remove(&self, undo: &Undo) -> Result<()> {
        for machine in &undo.machines {
            self.end_process(*machine)?;
        }
        // Before its disks are looked for, which are not there before it has ended.
        undo.fork.map_or(Ok(()), |token| self.blockd.end_fork(token))?;
        if undo.attached {
            undo.machines.iter().try_for_each(|machine| self.let_go_of_disks(*machine))?;
        }
        match &undo.partial {
            None => undo.disks.iter().try_for_each(|disk| self.remove_disk(disk))?,
            Some(partial) => {
                if is_there(partial)? {
                    undo.disks.iter().try_for_each(|disk| self.remove_disk(disk))?;
                    remove_folder(partial)?;
                }
                // What a power cut may undo is not yet so.
                sync_above(partial)?;
            }
        }
        for machine in &undo.machines {
            remove_folder(&self.state.vm(*machine))?;
        }
        if !undo.machines.is_empty() {
            state::sync_folder(&self.state.vms())?;
        }
        match self.janitor.done(undo) {
            Err(e) if e.kind() != Kind::NotFound => return Err(e),
            _ => {}
        }
        let mut work = self.janitor.work.lock();
        if work.undo.remove(&undo.id).is_some() {
            drop(work);
            let detail = format!("{} machines, {} disks", undo.machines.len(), undo.disks.len());
            self.events.add(EventKind::CleanedUp, format!("unfinished {}", undo.id), detail);
        }
        Ok(())
    }

    /// Ends the process of a machine, and forgets it.
    pub(super) fn end_process(&self, machine: Uuid) -> Result<()> {
        let known = self.janitor.work.lock().processes.get(&machine).cloned();
        let found = match known {
            Some(process) => Some(process),
            None => match Process::find(machine, self.state.vm(machine)) {
                Ok((process, _)) => Some(Arc::new(process)),
                Err(e) if e.kind() == Kind::NotFound => None,
                Err(e) => return Err(e),
            },
        };
        if let Some(process) = found {
            process.kill()?;
        }
        self.janitor.work.lock().processes.remove(&machine);
        Ok(())
    }

    /// Has blockd serve no disk in the folder of a machine any more.
    pub(super) fn let_go_of_disks(&self, machine: Uuid) -> Result<()> {
        for export in self.blockd.exports_below(&self.state.vm(machine))? {
            match self.blockd.detach(&export.disk, &export.socket) {
                Err(e) if e.kind() != Kind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    fn remove_disk(&self, disk: &UndoDisk) -> Result<()> {
        let Some(name) = self.find_disk(disk)? else { return Ok(()) };
        match self.blockd.remove(&name) {
            Err(e) if e.kind() == Kind::NotFound => self.blockd.connect().map(drop),
            removed => removed,
        }
    }

    /// The name that a disk has by now; `None` when it is not there.
    fn find_disk(&self, disk: &UndoDisk) -> Result<Option<String>> {
        match self.blockd.show(&disk.name) {
            Ok(found) => {
                let meant = match disk.is {
                    Which::Identity(id) => found.disk.disk == id,
                    Which::Over(at) => found.segments.iter().any(|s| s.segment == at && !s.own),
                };
                if meant {
                    return Ok(Some(found.disk.name));
                }
            }
            // blockd itself may be what is not found.
            Err(e) if e.kind() == Kind::NotFound => self.blockd.connect().map(drop)?,
            Err(e) => return Err(e),
        }
        match disk.is {
            // It may have got another name.
            Which::Identity(id) => {
                let named = self.blockd.disks()?.into_iter().find(|found| found.disk == id);
                Ok(named.map(|found| found.name))
            }
            Which::Over(_) => Ok(None),
        }
    }
}

fn is_there(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        // Nobody knows: it is asked again.
        Err(e) => Err(Error::from(e).tried("look at").on(path.display().to_string())),
    }
}

fn sync_above(path: &Path) -> Result<()> {
    match path.parent().map_or(Ok(()), state::sync_folder) {
        Err(e) if e.kind() == Kind::NotFound => Ok(()),
        synced => synced.context("make durable", || path.display().to_string()),
    }
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::from).context("remove", || path.display().to_string()),
    }
}

fn file_name(id: Uuid) -> String {
    format!("{}.json", id.simple())
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn undo() -> Undo {
        let disk = |name: &str| UndoDisk { name: name.into(), is: Which::Over(Uuid::nil()) };
        Undo::of(Vec::new(), true, vec![disk("a"), disk("b")])
    }

    fn found(dir: &StateDir) -> Vec<Undo> {
        Janitor::open(dir).unwrap().work.lock().undo.values().cloned().collect()
    }

    /// Work was killed when one of its disks had been flattened: the disk stood on nothing that it
    /// was made over any more, was taken for somebody else's, and stayed for ever.
    #[test]
    fn disks_whose_identity_is_known_are_found_by_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = StateDir::open(dir.path()).unwrap();
        let janitor = Janitor::open(&dir).unwrap();
        let mut undo = undo();
        janitor.begin(&undo).unwrap();
        assert_eq!(found(&dir), [undo.clone()]);
        let made = BTreeMap::from([("b".to_owned(), Uuid::from_u128(7))]);
        janitor.made(&mut undo, &made).unwrap();
        assert_eq!(undo.disks[1].is, Which::Identity(Uuid::from_u128(7)));
        assert_eq!(found(&dir), [undo.clone()]);
        // What a power cut leaves of the second note counts for nothing.
        fs::write(janitor.file(undo.id).with_extension(KNOWN), [0; 64]).unwrap();
        let first = found(&dir);
        assert_eq!(first[0].disks[1].is, Which::Over(Uuid::nil()));

        janitor.made(&mut undo, &made).unwrap();
        janitor.done(&undo).unwrap();
        assert!(found(&dir).is_empty());
        assert_eq!(fs::read_dir(dir.undo()).unwrap().count(), 0);
        // Killed between the removals of the two.
        janitor.made(&mut undo, &made).unwrap();
        assert!(found(&dir).is_empty());
        assert_eq!(fs::read_dir(dir.undo()).unwrap().count(), 0);
    }
}
