//! Disks in service: taken into it, served on sockets, taken out of it again.
//!
//! Invariants:
//! - A disk in service is held by its name, for writing unless it is served for reading only; who
//!   uses its volume besides its sockets (to read it, say) holds its name among those in service.
//! - Attaching and detaching come one at a time. What is remembered (`attachments.rs`) is written
//!   before a socket is made and after it is gone.
//! - A disk that cannot be served again when the daemon starts is listed with the reason, and keeps
//!   no other from being served. Neither does a socket that cannot, of the same disk or another.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use format::{Context as _, Error, Kind, Result};
use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use super::Daemon;
use super::attachments::{Attachment, AttachmentsFile};
use super::doors::{Door, Teller, described};
use super::holds::Hold;
use super::standing::{Changing, Standing};
use crate::api::types::{
    AttachDisk, DetachDisk, DiskStats, EventKind, Export, ExportKind, ExportSpec, ExportState,
};
use crate::disk::Vouched;
use crate::serve::{Limits, Volume, VolumeOptions};
use crate::store::Access;

/// Lanes of a volume at least: what comes later shares them.
pub(super) const LANES_MIN: usize = 8;

/// A disk in service.
pub(super) struct Served {
    pub(super) disk: Uuid,
    pub(super) doors: Vec<Door>,
    pub(super) limits: Limits,
    pub(super) read_only: bool,
    // Before the hold: the disk is closed when others may have it.
    pub(super) volume: Arc<Volume>,
    pub(super) hold: Hold,
}

/// What there is already of a disk that is taken into service.
#[derive(Default)]
pub(super) struct Kept {
    /// Its name is held.
    pub(super) hold: Option<Hold>,
    /// What the one who had it before vouches for.
    pub(super) vouched: Vouched,
}

/// A disk that could not be served again.
pub(super) struct Failed {
    pub(super) attachment: Attachment,
    pub(super) error: String,
}

#[derive(Default)]
pub(super) struct Table {
    pub(super) served: BTreeMap<String, Served>,
    pub(super) failed: BTreeMap<String, Failed>,
}

/// All disks in service.
pub struct Service {
    table: Mutex<Table>,
    /// Held by the one who attaches or detaches; before `table`.
    pub(super) changing: Changing,
    pub(super) file: AttachmentsFile,
}

impl Service {
    /// Nothing is in service yet.
    pub(super) fn of(store: &Path, standing: &Arc<Standing>) -> Self {
        Service {
            table: Mutex::default(),
            changing: Changing::new(Arc::clone(standing)),
            file: AttachmentsFile::of(store),
        }
    }
}

/// What a volume in service is called among holds.
pub(super) fn in_service(name: &str) -> String {
    format!("{name} (in service)")
}

impl Served {
    pub(super) fn attachment(&self) -> Attachment {
        let exports = self.doors.iter().map(|door| door.spec().clone()).collect();
        Attachment { disk: self.disk, limits: self.limits, exports }
    }

    fn exports(&self, name: &str) -> Vec<Export> {
        self.doors.iter().map(|door| door.export(name)).collect()
    }

    /// A front end lets others wait for it, but only at its own socket: two machines at two sockets
    /// would both write.
    fn check_one_writer(&self, export: &ExportSpec) -> Result<()> {
        let writes = |spec: &ExportSpec| spec.kind == ExportKind::VhostUser && !spec.read_only;
        let other = |door: &&Door| door.failure().is_none() && door.spec().socket != export.socket;
        match self.doors.iter().filter(other).map(Door::spec).find(|spec| writes(spec)) {
            Some(other) if writes(export) => {
                let reason = format!(
                    "a machine writes to it at {}: a disk that several write to is not supported",
                    other.socket
                );
                Err(Error::new(Kind::Unsupported, reason)
                    .hint("fork it for the other machine, or attach it with --readonly"))
            }
            _ => Ok(()),
        }
    }

    fn sockets(&self) -> String {
        let sockets = self.doors.iter().map(|d| d.spec().socket.to_string());
        sockets.collect::<Vec<_>>().join(", ")
    }
}

impl Table {
    /// What is to be remembered.
    fn attachments(&self) -> Vec<Attachment> {
        let served = self.served.values().map(Served::attachment);
        served.chain(self.failed.values().map(|f| f.attachment.clone())).collect()
    }

    fn served(&mut self, name: &str) -> Result<&mut Served> {
        self.served.get_mut(name).ok_or_else(|| {
            Error::new(Kind::NotFound, "it is not served").on(format!("disk {name}"))
        })
    }
}

impl Daemon {
    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.service.table.lock()
    }

    /// The volume of a disk in service, for somebody who reads it; held until the hold is dropped.
    pub(super) fn served_volume(&self, name: &str) -> Result<Option<(Arc<Volume>, Hold)>> {
        if !self.table().served.contains_key(name) {
            return Ok(None);
        }
        let hold = self.holds.take(&in_service(name), Access::Read)?;
        // It may have been detached while the hold was waited for.
        let volume = self.table().served.get(name).map(|s| Arc::clone(&s.volume));
        Ok(volume.map(|volume| (volume, hold)))
    }

    /// Refuses what a disk in service does not allow.
    pub(super) fn check_not_served(&self, name: &str, access: Access) -> Result<()> {
        let table = self.table();
        match table.served.get(name) {
            Some(served) if access == Access::Write || !served.read_only => {
                Err(Error::new(Kind::Busy, format!("it is served on {}", served.sockets()))
                    .on(format!("disk {name}"))
                    .hint(format!("detach it first: `offshoot disk detach {name}`")))
            }
            _ => Ok(()),
        }
    }

    /// All exports.
    #[must_use]
    pub fn exports(&self) -> Vec<Export> {
        let table = self.table();
        let served = table.served.iter().flat_map(|(name, s)| s.exports(name));
        let failed = table.failed.iter().flat_map(|(name, failed)| {
            failed.attachment.exports.iter().map(|spec| Export {
                error: Some(failed.error.clone()),
                ..described(name, spec, ExportState::Failed)
            })
        });
        served.chain(failed).collect()
    }

    /// What the disks in service did.
    #[must_use]
    pub fn stats(&self) -> Vec<DiskStats> {
        let table = self.table();
        let of = |(name, served): (&String, &Served)| DiskStats {
            disk: name.clone(),
            size: served.volume.disk().size(),
            exports: served.exports(name),
            limits: served.limits,
            stats: served.volume.stats(),
        };
        table.served.iter().map(of).collect()
    }

    /// Serves a disk on a socket.
    ///
    /// # Errors
    /// `NotFound`, `Exists` when the socket is taken, `Busy` when somebody else uses the disk,
    /// `ReadOnly` for a sealed disk that is not to be read only, or what the host reports.
    pub fn attach(self: &Arc<Self>, name: &str, request: &AttachDisk) -> Result<Export> {
        let changing = self.service.changing.lock();
        let attach = || -> Result<Export> {
            request.export.place()?;
            self.check_attachable(name, request)?;
            let disk = self.dir()?.disk(name)?.disk;
            // On its own: the table must not be locked while the disk is opened.
            let known = self.table().served.contains_key(name);
            let newly = match known {
                true => None,
                false => Some(self.take_into_service(name, request, Kept::default())?),
            };
            let limits = request.limits.unwrap_or_default();
            // Remembered before there is a socket: see `attachments.rs`.
            let mut remembered = self.table().attachments();
            match remembered.iter_mut().find(|a| a.disk == disk) {
                Some(known) => {
                    // The same socket once more is one that failed, and is attached anew.
                    known.exports.retain(|e| e.socket != request.export.socket);
                    known.exports.push(request.export.clone());
                }
                None => {
                    let exports = vec![request.export.clone()];
                    remembered.push(Attachment { disk, limits, exports });
                }
            }
            self.service.file.write(&remembered)?;
            self.open_door(name, request, newly).inspect_err(|_| self.remember())
        };
        let export = attach().context("attach", || format!("disk {name}"))?;
        let detail = format!("{} at {}", export.kind.name(), export.socket);
        self.events.add(EventKind::Attached, format!("disk {name}"), detail);
        drop(changing);
        self.flatten_by_policy(name);
        Ok(export)
    }

    fn check_attachable(&self, name: &str, request: &AttachDisk) -> Result<()> {
        let table = self.table();
        // A socket of this disk that failed is mended by attaching it anew.
        let counts = |of: &str, door: &&Door| of != name || door.failure().is_none();
        let taken = |(of, served): (&String, &Served)| {
            let mut doors = served.doors.iter().filter(|door| counts(of, door));
            doors.any(|door| door.spec().socket == request.export.socket)
        };
        if table.served.iter().any(taken) {
            return Err(Error::new(Kind::Exists, "a disk is served there already")
                .on(format!("socket {}", request.export.socket)));
        }
        if table.failed.contains_key(name) {
            let reason = "it could not be served again when the daemon started";
            return Err(Error::new(Kind::Failed, reason)
                .hint(format!("detach it first: `offshoot disk detach {name}`")));
        }
        match table.served.get(name) {
            Some(served) if served.read_only && !request.export.read_only => {
                Err(Error::new(Kind::ReadOnly, "it is served for reading only")
                    .hint("detach it first, or attach it with --readonly"))
            }
            Some(served) => served.check_one_writer(&request.export),
            None => Ok(()),
        }
    }

    pub(super) fn take_into_service(
        &self,
        name: &str,
        request: &AttachDisk,
        kept: Kept,
    ) -> Result<Served> {
        let read_only = request.export.read_only;
        let access = if read_only { Access::Read } else { Access::Write };
        let hold = kept.hold.map_or_else(|| self.hold(name, access), Ok)?;
        let limits = request.limits.unwrap_or_default();
        let options = VolumeOptions {
            lanes: LANES_MIN.max(usize::from(request.export.queues)),
            read_only,
            limits,
            accept_lost_tail: request.accept_lost_tail,
            vouched: kept.vouched,
            observer: Some(Arc::new(Teller::new(Arc::clone(&self.events)))),
        };
        let dir = self.dir()?;
        let row = dir.disk(name)?;
        let volume = Volume::open(&dir, name, &options)?;
        if let Some(problem) = volume.disk().problems.first() {
            let detail = format!("{}: {}", problem.object, problem.detail);
            self.events.add(EventKind::Damaged, format!("disk {name}"), detail);
        }
        Ok(Served { disk: row.disk, doors: Vec::new(), limits, read_only, volume, hold })
    }

    /// Makes the socket of a disk in service, or of one that is just taken into it.
    fn open_door(&self, name: &str, request: &AttachDisk, newly: Option<Served>) -> Result<Export> {
        let dir = self.dir()?;
        if let Some(mut served) = newly {
            return match Door::open(&dir, &served.volume, request.export.clone()) {
                Ok(door) => {
                    let export = door.export(name);
                    served.doors.push(door);
                    self.table().served.insert(name.to_owned(), served);
                    Ok(export)
                }
                Err(e) => {
                    let Served { volume, .. } = served;
                    // The failure that is told is the first one.
                    let _ = volume.close();
                    Err(e)
                }
            };
        }
        let mut table = self.table();
        let served = table.served(name)?;
        let door = Door::open(&dir, &served.volume, request.export.clone())?;
        let export = door.export(name);
        served.doors.retain(|failed| failed.spec().socket != request.export.socket);
        served.doors.push(door);
        if let Some(limits) = request.limits {
            served.limits = limits;
            served.volume.set_limits(limits);
        }
        Ok(export)
    }

    /// Writes down what is served now. A failure is told and costs nothing yet: what is remembered
    /// too much is served again at the next start, and can be detached then.
    pub(super) fn remember(&self) {
        let attachments = self.table().attachments();
        if let Err(error) = self.service.file.write(&attachments) {
            tracing::error!(%error, "what is served could not be written down");
        }
    }

    /// Ends exports of a disk; with the last one the disk is taken out of service.
    ///
    /// # Errors
    /// `NotFound`; `InUse` when a front end is connected, unless forced; `Busy` when somebody reads
    /// the disk; or what closing it reports.
    pub fn detach(&self, name: &str, request: &DetachDisk) -> Result<Vec<Export>> {
        let _changing = self.service.changing.lock();
        let ended = self.detach_changing(name, request);
        let ended = ended.context("detach", || format!("disk {name}"))?;
        for export in &ended {
            let detail = format!("{} at {}", export.kind.name(), export.socket);
            self.events.add(EventKind::Detached, format!("disk {name}"), detail);
        }
        Ok(ended)
    }

    fn detach_changing(&self, name: &str, request: &DetachDisk) -> Result<Vec<Export>> {
        let chosen = |e: &Export| request.socket.as_ref().is_none_or(|s| *s == e.socket);
        let exports = self.exports();
        let ending: Vec<Export> =
            exports.into_iter().filter(|e| e.disk == name && chosen(e)).collect();
        if ending.is_empty() {
            return Err(Error::new(Kind::NotFound, "it is not served there")
                .hint("`offshoot disk show` lists where it is"));
        }
        if let Some(busy) = ending.iter().find(|e| e.connected > 0 && !request.force) {
            let who: Vec<String> = busy.peers.iter().map(|p| format!("process {p}")).collect();
            let who = if who.is_empty() { "a front end".into() } else { who.join(", ") };
            let reason = format!("{who} is connected to {}", busy.socket);
            return Err(Error::new(Kind::InUse, reason).hint("stop it first, or say --force"));
        }
        let drops = self.is_nonpersistent(name)?;
        if self.table().failed.contains_key(name) {
            match if drops { self.drop_delta(name, None) } else { Ok(()) } {
                Err(error) if request.force => {
                    tracing::warn!(disk = %name, %error, "detached with what was written to it");
                }
                outcome => outcome?,
            }
            self.table().failed.remove(name);
            self.remember();
            return Ok(ending);
        }
        // Whoever reads the disk besides keeps it in service; asked before anything is ended.
        let _alone = self.holds.take(&in_service(name), Access::Write)?;
        let (doors, last, attachment) = {
            let mut table = self.table();
            let served = table.served(name)?;
            let attachment = served.attachment();
            let sockets: Vec<_> = ending.iter().map(|e| &e.socket).collect();
            let doors: Vec<Door> =
                served.doors.extract_if(.., |d| sockets.contains(&&d.spec().socket)).collect();
            let last = served.doors.is_empty();
            (doors, if last { table.served.remove(name) } else { None }, attachment)
        };
        doors.into_iter().for_each(Door::close);
        let closed = match last {
            Some(served) if drops => self.power_off(name, served, attachment),
            Some(served) => take_out_of_service(served),
            None => Ok(()),
        };
        // Forgotten after the sockets are gone: see `attachments.rs`.
        self.remember();
        closed.map(|()| ending)
    }

    /// Changes what a disk in service may do.
    ///
    /// # Errors
    /// `NotFound` when it is not in service, or what the host reports.
    pub fn set_limits(&self, name: &str, limits: Limits) -> Result<Limits> {
        let _changing = self.service.changing.lock();
        let set = || -> Result<()> {
            let mut table = self.table();
            let served = table.served(name)?;
            served.limits = limits;
            served.volume.set_limits(limits);
            let attachments = table.attachments();
            drop(table);
            self.service.file.write(&attachments)
        };
        set().context("limit", || format!("disk {name}"))?;
        Ok(limits)
    }

    /// Has held requests of a disk in service tried again now.
    ///
    /// # Errors
    /// `NotFound` when it is not in service.
    pub fn resume(&self, name: &str) -> Result<()> {
        let mut table = self.table();
        let served = table.served(name).context("resume", || format!("disk {name}"))?;
        served.volume.resume();
        Ok(())
    }

    /// Tells the guests of a disk in service that it has another size.
    pub(super) fn tell_of_size(&self, name: &str) {
        if let Some(served) = self.table().served.get(name) {
            served.doors.iter().for_each(|door| door.config_changed());
        }
    }
}

/// Closes a disk whose sockets are gone.
pub(super) fn take_out_of_service(served: Served) -> Result<()> {
    let (_hold, closed) = close(served);
    closed
}

/// As [`take_out_of_service`]; gives back the hold of its name if that is for writing.
pub(super) fn close(served: Served) -> (Option<Hold>, Result<()>) {
    let Served { volume, hold, doors, read_only, .. } = served;
    drop(doors);
    volume.give_up_waiting();
    let closed = volume.close();
    ((!read_only).then_some(hold), closed)
}
