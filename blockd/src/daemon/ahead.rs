//! Children of a fork that are served from its instant on: opened, with their sockets, before it.
//!
//! A machine that is forked together with its disks begins at the instant, and must not wait until
//! the fork is durable. So its front end can connect before the instant; requests wait for that,
//! and flushes until the fork is settled, as those of the parent do (`disk/succeed.rs`). What
//! completes in between survives a kill as the parent's does (`storedir/cut.rs`).
//!
//! Invariants:
//! - That a child is served is remembered before its socket exists, as for any disk
//!   (`attachments.rs`), by an identity that it gets with the fork; durably when the fork is
//!   settled. A daemon that is killed is followed by one that settles the fork first, and then
//!   serves the child, or finds that there is none, and lists the socket as failed.
//! - Nobody else sees the child before the fork is settled: its name is held for the fork, and it
//!   is not among the disks in service.
//!
//! Test: `fork_under_load` (`a_child_is_served_from_the_instant_on`), `crash_points::cut`.

use std::collections::BTreeMap;
use std::sync::Arc;

use format::superblock::check_name;
use format::{Context as _, Error, Kind, Result};
use parking_lot::Mutex;

use super::Daemon;
use super::attachments::Attachment;
use super::cut::{Children, Volumes};
use super::doors::{Door, Teller};
use super::holds::Hold;
use super::served::{LANES_MIN, Served};
use crate::api::types::{EventKind, ExportKind, ForkDisk, ForkDisks, ServeChild, SocketName};
use crate::catalogue::{Child, ForkRow, Forked};
use crate::disk::HeldDisk;
use crate::serve::{Volume, VolumeOptions};
use crate::side_by_side::side_by_side;
use crate::store::Access;
use crate::storedir::{Crossing, StoreDir};

/// A child that is served from the instant on.
pub(super) struct Ahead {
    attachment: Attachment,
    crossing: Crossing,
    /// Until the instant.
    held: Option<HeldDisk>,
    door: Door,
    volume: Arc<Volume>,
}

/// One whose socket is still to be made.
struct Opened {
    attachment: Attachment,
    crossing: Crossing,
    volume: Arc<Volume>,
}

impl Ahead {
    /// The instant is past: machines are let in.
    pub(super) fn begin(&mut self) {
        self.crossing.cross();
        self.held = None;
    }

    /// Its way into its segment.
    pub(super) fn crossing(&self) -> &Crossing {
        &self.crossing
    }

    /// There is no such child after all.
    pub(super) fn give_up(self, why: &Error) {
        self.crossing.next().give_up(Error::new(why.kind(), why.to_string()));
        self.door.close();
    }
}

/// Children that a fork is asked to serve.
pub(super) struct AskedFor {
    pub(super) daemon: Arc<Daemon>,
    pub(super) dir: Arc<StoreDir>,
    pub(super) request: ForkDisks,
    /// Of their names.
    pub(super) holds: Mutex<BTreeMap<String, Hold>>,
}

impl Children for AskedFor {
    fn open(&self, fork: &ForkRow, volumes: &Volumes) -> Result<Vec<Ahead>> {
        self.daemon.open_ahead(&self.dir, &self.request, fork, volumes)
    }

    /// A machine may stand until this is done: what is not free at once is refused.
    fn rename(&self, fork: &ForkRow, names: Vec<String>, ahead: &[Ahead]) -> Result<ForkRow> {
        let mut renamed = fork.clone();
        let children: Vec<&mut Child> =
            renamed.disks.iter_mut().flat_map(|forked| &mut forked.children).collect();
        if names.len() != children.len() || ahead.len() != children.len() {
            let reason = "all children of a fork get other names, if they are served, or none";
            return Err(Error::invalid(reason).tried("rename"));
        }
        let mut holds = BTreeMap::new();
        for (child, name) in children.into_iter().zip(names) {
            check_name(&name)?;
            let hold = self.daemon.holds.take_now(&name, Access::Write)?;
            self.dir.check_name_free(&name)?;
            let served = ahead.iter().find(|served| served.attachment.disk == child.disk);
            let served = served.ok_or_else(|| Error::invalid("it is not served"))?;
            served.volume.rename_once(&name);
            holds.insert(name.clone(), hold);
            child.name = name;
        }
        self.dir.foresee_renamed(&renamed);
        *self.holds.lock() = holds;
        Ok(renamed)
    }
}

/// What is asked to be served, with the disk that is its parent.
fn asked<'a>(
    request: &'a ForkDisks,
    fork: &'a ForkRow,
) -> impl Iterator<Item = (&'a Forked, &'a ServeChild)> {
    let with_row = request.disks.iter().zip(&fork.disks);
    with_row.flat_map(|(of, forked)| of.serve.iter().map(move |serve| (forked, serve)))
}

fn check_child(of: &ForkDisk, serve: &ServeChild, volumes: &Volumes) -> Result<()> {
    if !of.children.contains(&serve.child) {
        return Err(Error::invalid(format!("it is no child of disk {} in this fork", of.disk)));
    }
    if !volumes.contains_key(&of.disk) {
        return Err(Error::invalid(format!("disk {} is not in service", of.disk))
            .hint("attach it after the fork"));
    }
    if serve.export.kind != ExportKind::VhostUser || serve.export.read_only {
        let reason = "a child can be served at once over vhost-user and for writing only";
        return Err(Error::new(Kind::Unsupported, reason));
    }
    serve.export.place().map(drop)
}

impl Daemon {
    /// Checks what children are to be served.
    ///
    /// # Errors
    /// `Invalid` for a socket or a child that cannot be meant, or a parent that nobody serves;
    /// `Exists` when a disk is served there already.
    pub(super) fn check_ahead(&self, request: &ForkDisks, volumes: &Volumes) -> Result<()> {
        let exports = self.exports();
        let mut taken: Vec<&SocketName> = exports.iter().map(|export| &export.socket).collect();
        for (of, serve) in request.disks.iter().flat_map(|of| of.serve.iter().map(move |s| (of, s)))
        {
            let socket = &serve.export.socket;
            let free = || match taken.contains(&socket) {
                true => Err(Error::new(Kind::Exists, "a disk is served there already")
                    .on(format!("socket {socket}"))),
                false => check_child(of, serve, volumes),
            };
            free().context("serve", || format!("disk {}", serve.child))?;
            taken.push(socket);
        }
        Ok(())
    }

    /// Opens children ahead of the instant, with their sockets.
    ///
    /// # Errors
    /// As [`StoreDir::begin_crossing`], or what the host reports. None is open then.
    fn open_ahead(
        &self,
        dir: &Arc<StoreDir>,
        request: &ForkDisks,
        fork: &ForkRow,
        volumes: &Volumes,
    ) -> Result<Vec<Ahead>> {
        let wanted: Vec<_> = asked(request, fork).collect();
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let open = |(forked, serve): (&Forked, &ServeChild)| {
            self.open_child(dir, forked, serve, &volumes[&forked.name])
                .context("serve", || format!("disk {}", serve.child))
        };
        let opened: Vec<Opened> =
            side_by_side(wanted, open).into_iter().collect::<Result<Vec<_>>>()?;
        let more: Vec<_> = opened.iter().map(|child| child.attachment.clone()).collect();
        self.service.file.write_ahead(&more)?;
        let mut ahead: Vec<Ahead> = Vec::new();
        for Opened { attachment, crossing, volume } in opened {
            // Before anybody can come.
            let held = Some(HeldDisk::of(crossing.next()));
            match Door::open(dir, &volume, attachment.exports[0].clone()) {
                Ok(door) => ahead.push(Ahead { attachment, crossing, held, door, volume }),
                Err(e) => {
                    ahead.into_iter().for_each(|child| child.give_up(&e));
                    return Err(e.within("serve", format!("disk {}", volume.name())));
                }
            }
        }
        Ok(ahead)
    }

    fn open_child(
        &self,
        dir: &Arc<StoreDir>,
        forked: &Forked,
        serve: &ServeChild,
        parent: &Volume,
    ) -> Result<Opened> {
        let child = forked.children.iter().find(|child| child.name == serve.child);
        let child = child.ok_or_else(|| Error::invalid("it is no child of this fork"))?;
        let limits = serve.limits.unwrap_or_default();
        let options = VolumeOptions {
            lanes: LANES_MIN.max(usize::from(serve.export.queues)),
            limits,
            observer: Some(Arc::new(Teller::new(Arc::clone(self.events())))),
            ..VolumeOptions::default()
        };
        let (crossing, volume) = parent.begin_child(dir, (forked, child), &options)?;
        let exports = vec![serve.export.clone()];
        let attachment = Attachment { disk: child.disk, limits, exports };
        Ok(Opened { attachment, crossing, volume })
    }

    /// Children are disks in service from now on: their fork is settled. `holds` are those of their
    /// names.
    pub(super) fn serve_children(&self, ahead: Vec<Ahead>, mut holds: BTreeMap<String, Hold>) {
        if ahead.is_empty() {
            return;
        }
        for Ahead { attachment, volume, door, .. } in ahead {
            let name = volume.name().to_owned();
            // Each of them was held for the fork.
            let Some(hold) = holds.remove(&name) else { continue };
            let detail = format!("{} at {}", door.spec().kind.name(), door.spec().socket);
            let Attachment { disk, limits, .. } = attachment;
            let served = Served { disk, doors: vec![door], limits, read_only: false, volume, hold };
            self.table().served.insert(name.clone(), served);
            self.events.add(EventKind::Attached, format!("disk {name}"), detail);
        }
        self.remember();
    }
}
