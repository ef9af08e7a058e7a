//! Making a machine of a snapshot.
//!
//! It is another machine than the one that the snapshot is of, from its first instruction on: it
//! has a name, identity, generation, address and seed of its own, as the child of a fork has. Its
//! disks are new ones over those of the snapshot, so that a snapshot can be restored any number of
//! times. What can be refused is refused before anything is made.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use ::blockd::api::types::{Disk, DiskState};
use ::blockd::clock;
use ::blockd::pump::Watch;
use format::{Context as _, Error, Kind, Result};
use uuid::Uuid;

use super::Daemon;
use super::net::{Card, cards};
use super::state::Description;
use super::table::{Machine, object};
use super::undo::{Undo, UndoDisk, Which};
use crate::api::types::{DiskPath, EventKind, RestoreVm, SnapshotDisk, Vm, VmDisk, VmState};
use crate::identity;
use crate::memory::Layer;
use crate::process::Process;
use crate::process::serve::in_memory;
use crate::process::wire::{Ask, BecomeChild, Begin};
use crate::snapshot::{Folder, Manifest};

/// A disk that a machine is going to have, and how.
struct Base {
    disk: Disk,
    read_only: bool,
}

impl Daemon {
    /// Makes a machine of a snapshot.
    ///
    /// # Errors
    /// `NotFound` when there is no snapshot, or a disk of it is missing; `Corrupt` when something
    /// of it was altered; `Unsupported` when it is of another version, or of a processor that can
    /// what this host's cannot; `Exists` when the name is taken; or what `job`, blockd or the host
    /// says. Nothing is left then.
    pub fn restore(self: &Arc<Self>, request: &RestoreVm, job: &dyn Watch) -> Result<Vm> {
        let restored = self.restore_checked(request, job);
        let machine = restored.map_err(|e| e.within("restore", object(&request.name)))?;
        let detail = format!("from {}", request.path.display());
        self.events.add(EventKind::Restored, machine.object(), detail);
        Ok(machine.describe(&self.state))
    }

    fn restore_checked(
        self: &Arc<Self>,
        request: &RestoreVm,
        job: &dyn Watch,
    ) -> Result<Arc<Machine>> {
        let _reserved = self.table.reserve(std::slice::from_ref(&request.name))?;
        let folder = Folder::open(&request.path)?;
        let manifest = &folder.manifest;
        let names = std::slice::from_ref(&request.name);
        let card = cards(manifest.network_card, request.net.as_ref(), names)?.pop().flatten();
        let bases = self.bases_of(manifest, &request.disks)?;
        let (state, memory) = (folder.state()?, folder.memory(job)?);
        let (mut shells, _) = self.pool.take(&manifest.class(), 1)?;
        let shell = shells.pop().ok_or_else(|| Error::invalid("no machine was asked for"))?;
        let to_undo = |(i, base): (usize, &Base)| UndoDisk {
            name: disk_name(&request.name, i),
            is: Which::Over(base.disk.segment),
        };
        let own = bases.iter().enumerate().filter(|(_, base)| !base.read_only);
        let mut undo = Undo::of(vec![shell.id], !bases.is_empty(), own.map(to_undo).collect());
        let parts = (&shell, &bases[..], card);
        self.make_restored(request, manifest, (&state, memory), parts, &mut undo).inspect_err(
            |_| {
                // What cannot be removed now is told of by health, and removed later.
                let _ = self.give_up(undo);
            },
        )
    }

    /// The disks to stand on, of which all are there and fit.
    fn bases_of(&self, manifest: &Manifest, others: &[String]) -> Result<Vec<Base>> {
        let wanted = &manifest.disks;
        if !others.is_empty() && others.len() != wanted.len() {
            let (has, named) = (wanted.len(), others.len());
            let reason = format!("the snapshot has {has} disks, and {named} are named");
            return Err(Error::invalid(reason));
        }
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let mut there = self.disks_by_identity()?;
        let find = |(i, wanted): (usize, &SnapshotDisk)| {
            let found = match others.get(i) {
                Some(name) => Some(self.blockd.show(name)?.disk),
                None => there.remove(&wanted.id),
            };
            let disk = found.ok_or_else(|| {
                let reason =
                    format!("the store does not have it: a disk with identity {}", wanted.id);
                Error::new(Kind::NotFound, reason)
                    .tried("use")
                    .on(format!("disk {}", wanted.disk))
                    .hint("name others with --disk if they came to this store otherwise")
            })?;
            if !wanted.read_only && disk.state != DiskState::Sealed {
                let reason =
                    format!("it is {}: what the snapshot had may be gone", disk.state.name());
                return Err(Error::invalid(reason)
                    .tried("use")
                    .on(format!("disk {}", disk.name))
                    .hint("`disk seal` makes it immutable"));
            }
            Ok(Base { disk, read_only: wanted.read_only })
        };
        wanted.iter().enumerate().map(find).collect()
    }

    fn make_restored(
        self: &Arc<Self>,
        request: &RestoreVm,
        manifest: &Manifest,
        (state, memory): (&[u8], Layer),
        (shell, bases, card): (&Arc<Process>, &[Base], Option<Card>),
        undo: &mut Undo,
    ) -> Result<Arc<Machine>> {
        self.janitor.know(Arc::clone(shell));
        self.janitor.begin(undo)?;
        let identity = identity::fresh(&request.name, shell.id)?;
        let disks = self.disks_over(&request.name, bases)?;
        let made = disks.iter().map(|disk| (disk.disk.clone(), disk.id)).collect();
        self.janitor.made(undo, &made)?;
        let mut hardware = self.attach_disks(shell, &disks)?;
        hardware.net = card.as_ref().map(|card| card.is.clone());
        let description = Description {
            layout: Description::LAYOUT,
            name: request.name.clone(),
            id: shell.id,
            memory_bytes: manifest.memory_bytes,
            vcpus: manifest.vcpus,
            disks,
            net: hardware.net.clone(),
            generation_id: Uuid::from_bytes(identity.generation_id),
            mac: identity.mac,
            parent: Some(manifest.vm.clone()),
            layers: 1,
            created: clock::now(),
        };
        let layers = vec![memory.spans().to_vec()];
        let state = in_memory(state)?;
        let tap: Vec<BorrowedFd<'_>> = card.as_ref().and_then(Card::file).into_iter().collect();
        shell.ask_with::<()>(&Ask::Equip(hardware), &tap)?;
        let files: [BorrowedFd<'_>; 2] = [memory.file(), state.as_fd()];
        let ask = Ask::Become(Box::new(BecomeChild { layers, identity, begin: None }));
        let filled = shell.ask_with::<()>(&ask, &files);
        filled.context("use", || format!("snapshot {}", request.path.display()))?;
        self.state.describe(&description, true)?;
        shell.ask::<()>(&Ask::Begin(Begin { paused: request.paused }))?;
        self.janitor.done(undo)?;
        let state = if request.paused { VmState::Paused } else { VmState::Running };
        self.add(description, Arc::clone(shell), state)
    }

    /// New disks over those of a snapshot; what is read only is used as it is.
    fn disks_over(&self, name: &str, bases: &[Base]) -> Result<Vec<VmDisk>> {
        let disk = |(i, Base { disk, read_only }): (usize, &Base)| {
            let made = match read_only {
                true => disk.clone(),
                false => self.blockd.create_over(&disk.name, &disk_name(name, i))?,
            };
            let (read_only, own) = (*read_only, !*read_only);
            Ok(VmDisk { disk: made.name, id: made.disk, read_only, own, path: DiskPath::Arena })
        };
        bases.iter().enumerate().map(disk).collect()
    }
}

/// The name of the disk that a machine gets for disk number `i` of a snapshot.
fn disk_name(vm: &str, i: usize) -> String {
    format!("{vm}-disk{i}")
}
