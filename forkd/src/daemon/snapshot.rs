//! Machines as files: taken while they run, made again, removed.
//!
//! A snapshot is a fork whose child is written down instead of run. The pause is a fork's; the rest
//! is done behind the running machine, from layers that nobody can change. Its disks are children
//! of the machine's, sealed, in blockd's store.
//!
//! The order, and what each step defends against:
//! 1. what is going to be made is written down (`undo.rs`), then the folder is made that says that
//!    the snapshot is not done; only then are disks forked;
//! 2. memory, state and disks are of one instant, by the cut of a fork;
//! 3. the disks are sealed before the snapshot has its name: what can be restored does not change;
//! 4. the folder takes its name, which is the instant at which there is a snapshot, and then the
//!    record of step 1 goes. A daemon that is killed in between leaves both; the next one finds no
//!    folder under the first name, and leaves the disks alone.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ::blockd::api::types::{Disk, FlattenWhen, ForkAnswer, ForkDisk, ForkDisks, ForkMode};
use ::blockd::clock;
use ::blockd::pump::Watch;
use format::{Context as _, Error, Kind, Result};
use uuid::Uuid;

use super::Daemon;
use super::fork::us;
use super::fork_disks::{Frozen, frozen_of};
use super::table::{Machine, object};
use super::undo::{Undo, UndoDisk, Which};
use crate::api::types::{
    EventKind, RemovedSnapshot, SnapshotDisk, SnapshotTaken, TakeSnapshot, VmParent,
};
use crate::http;
use crate::memory::Layer;
use crate::process::serve::read_all;
use crate::process::wire::WasCut;
use crate::snapshot::{Draft, Folder, Manifest, RealHost, aside, set_aside};

/// A snapshot that is being taken.
struct Taking<'a> {
    machine: &'a Machine,
    id: Uuid,
    /// The disks that are going to be forked.
    frozen: &'a [Frozen],
    began: Instant,
}

/// A machine at one instant, as it came from its process.
struct Taken {
    was_cut: WasCut,
    /// The layers of its memory, then its state.
    files: Vec<OwnedFd>,
    /// The disks that were made, as many as were to be forked.
    disks: Vec<Disk>,
}

/// What messages call a snapshot.
fn named(path: &Path) -> String {
    format!("snapshot {}", path.display())
}

/// The name of the disk that snapshot `id` gets for disk number `i` of a machine.
fn disk_name(vm: &str, id: Uuid, i: usize) -> String {
    let id = id.simple().to_string();
    format!("{vm}-snap-{}-disk{i}", &id[..8])
}

impl Daemon {
    /// Writes a machine to files. It goes on if it runs.
    ///
    /// # Errors
    /// `NotFound`; `Failed` when the machine has ended; `Exists` when something is at the place;
    /// `NoSpace`; or what its process, blockd, the host or `job` says. There is no snapshot then.
    pub fn snapshot(
        self: &Arc<Self>,
        name: &str,
        request: &TakeSnapshot,
        job: &dyn Watch,
    ) -> Result<SnapshotTaken> {
        let began = Instant::now();
        let machine = self.table.get(name)?;
        let id = Uuid::new_v4();
        let draft = Draft::plan(&request.path, id, &RealHost)?;
        let within = |e: Error| e.within("snapshot", object(name));
        let frozen = frozen_of(&machine);
        let to_undo = |f: &Frozen| {
            // What the fork is going to freeze.
            let segment = self.blockd.show(&f.disk)?.disk.segment;
            Ok(UndoDisk { name: disk_name(name, id, f.i), is: Which::Over(segment) })
        };
        let disks = frozen.iter().map(to_undo).collect::<Result<_>>().map_err(within)?;
        let mut undo = Undo::of_snapshot(draft.partial().to_owned(), disks);
        let taking = Taking { machine: &machine, id, frozen: &frozen, began };
        let taken = self.write_snapshot(&taking, draft, &mut undo, job).inspect_err(|_| {
            // What cannot be removed now is told of by health, and removed later.
            let _ = self.give_up(undo);
        });
        let taken = taken.map_err(within)?;
        let detail = format!("to {}", request.path.display());
        self.events.add(EventKind::Snapshotted, object(name), detail);
        Ok(taken)
    }

    fn write_snapshot(
        &self,
        taking: &Taking<'_>,
        draft: Draft<'_>,
        undo: &mut Undo,
        job: &dyn Watch,
    ) -> Result<SnapshotTaken> {
        let Taking { machine, id, frozen, began } = *taking;
        self.janitor.begin(undo)?;
        draft.begin()?;
        let taken = self.take(taking, undo)?;
        let created = clock::now();
        taken.disks.iter().try_for_each(|disk| self.blockd.seal(&disk.name))?;
        let disks = disks_of(machine, frozen, &taken.disks);

        let Taken { was_cut, mut files, .. } = taken;
        let missing = || Error::invalid("files of the image are missing");
        let state = read_all(files.pop().ok_or_else(missing)?)?;
        let ram_bytes = machine.is.memory_bytes;
        let layers = files.into_iter().zip(was_cut.layers);
        let layers = layers.map(|(file, spans)| Layer::new(file, spans, ram_bytes));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let memory = draft.memory(&layers, ram_bytes, job)?;
        let state = draft.state(&state)?;
        let vm = VmParent { name: machine.is.name.clone(), id: machine.is.id };
        let memory_bytes = memory.bytes;
        let manifest = Manifest {
            id,
            vm: vm.clone(),
            created,
            memory_bytes: ram_bytes,
            vcpus: machine.is.vcpus,
            disks: disks.clone(),
            network_card: machine.is.net.is_some(),
            state,
            memory: memory.into(),
        };
        job.check()?;
        let path = draft.place().to_owned();
        draft.finish(&manifest)?;
        self.janitor.done(undo)?;
        let (pause_us, disks_us) = (was_cut.pause.whole, was_cut.pause.disks);
        let took_us = us(began.elapsed());
        Ok(SnapshotTaken { path, id, vm, disks, memory_bytes, pause_us, disks_us, took_us })
    }

    /// Takes memory, processors, devices and disks at one instant. Nobody else changes the machine
    /// meanwhile; afterwards it may be forked, stopped or removed.
    fn take(&self, taking: &Taking<'_>, undo: &mut Undo) -> Result<Taken> {
        let Taking { machine, id, frozen, .. } = *taking;
        let _changing = machine.changing.lock();
        machine.living_process()?;
        self.take_memory_back(machine).inspect_err(|_| undo.disks.clear())?;
        let child = |f: &Frozen| ForkDisk {
            disk: f.disk.clone(),
            children: vec![disk_name(&machine.is.name, id, f.i)],
            serve: Vec::new(),
        };
        let request = ForkDisks {
            disks: frozen.iter().map(child).collect(),
            mode: ForkMode::Live,
            flatten: FlattenWhen::Auto,
            ..ForkDisks::default()
        };
        let (was_cut, files, disks) = self.cut_with(machine, &request, undo)?;
        if disks.len() != frozen.len() {
            let reason = "blockd answers with other disks than asked";
            return Err(Error::new(Kind::Unsupported, reason));
        }
        Ok(Taken { was_cut, files, disks })
    }

    /// Has a machine and its disks cut at one instant, and waits until the disks are durable.
    fn cut_with(
        &self,
        machine: &Machine,
        disks: &ForkDisks,
        undo: &mut Undo,
    ) -> Result<(WasCut, Vec<OwnedFd>, Vec<Disk>)> {
        if disks.disks.is_empty() {
            let (was_cut, files) = self.cut(machine, None, &[], &mut undo.disks)?;
            return Ok((was_cut, files, Vec::new()));
        }
        let fork = self.blockd.fork_ready(disks.clone(), ForkAnswer::Ready);
        let fork = fork.inspect_err(|_| undo.disks.clear())?;
        undo.fork = Some(fork.token);
        let (was_cut, files) = self.cut(machine, Some(&fork), &[], &mut undo.disks)?;
        if let Some((status, body)) = &was_cut.disks {
            let body = body.clone().into_bytes();
            http::Reply { status: *status, body }.refused()?;
        }
        Ok((was_cut, files, self.blockd.forked(fork.token)?.children))
    }

    /// Removes a snapshot, and the disks that were made for it.
    ///
    /// # Errors
    /// `NotFound`; as [`Manifest::decode`]; `InUse` when a disk stands on one of its; or what the
    /// host or blockd says: once the snapshot is gone, its disks go as soon as that is possible.
    pub fn remove_snapshot(self: &Arc<Self>, path: &Path) -> Result<RemovedSnapshot> {
        let manifest = Folder::open(path)?.manifest;
        let there = self.disks_by_identity().context("remove", || named(path))?;
        let own = manifest.disks.iter().filter(|disk| !disk.read_only);
        let own: Vec<&String> =
            own.filter_map(|disk| there.get(&disk.id)).map(|d| &d.name).collect();
        for disk in &own {
            let on_it = self.blockd.show(disk)?.dependents;
            if !on_it.is_empty() {
                let reason = format!("disks stand on its disk {disk}: {}", on_it.join(", "));
                return Err(Error::new(Kind::InUse, reason)
                    .tried("remove")
                    .on(named(path))
                    .hint("remove the machines that were restored from it first"));
            }
        }
        let meant = |(id, disk): (&Uuid, &Disk)| UndoDisk {
            name: disk.name.clone(),
            is: Which::Identity(*id),
        };
        let disks = there.iter().filter(|(_, disk)| own.contains(&&disk.name)).map(meant).collect();
        let id = Uuid::new_v4();
        let undo = Undo::of_snapshot(aside(path, id)?, disks);
        // First the record: a snapshot that was set aside counts as not done only with it.
        self.janitor.begin(&undo).context("remove", || named(path))?;
        let set = set_aside(path, id, &RealHost);
        let disks = own.into_iter().cloned().collect();
        let removed = self.give_up(undo);
        set?;
        self.events.add(EventKind::SnapshotRemoved, named(path), "");
        removed.map_err(|e| {
            let e = e.hint("the rest is removed as soon as that is possible");
            e.within("remove", named(path))
        })?;
        Ok(RemovedSnapshot { removed: path.to_owned(), disks })
    }

    /// The disks of the store. Names may have changed since a snapshot was taken.
    pub(super) fn disks_by_identity(&self) -> Result<BTreeMap<Uuid, Disk>> {
        Ok(self.blockd.disks()?.into_iter().map(|disk| (disk.disk, disk)).collect())
    }
}

/// The disks of a snapshot, in the order of the machine's: `made` for those that were forked.
fn disks_of(machine: &Machine, frozen: &[Frozen], made: &[Disk]) -> Vec<SnapshotDisk> {
    let made: BTreeMap<usize, &Disk> = frozen.iter().map(|f| f.i).zip(made).collect();
    let disk = |(i, own): (usize, &crate::api::types::VmDisk)| match made.get(&i) {
        Some(disk) => SnapshotDisk { disk: disk.name.clone(), id: disk.disk, read_only: false },
        None => SnapshotDisk { disk: own.disk.clone(), id: own.id, read_only: true },
    };
    machine.is.disks.iter().enumerate().map(disk).collect()
}
