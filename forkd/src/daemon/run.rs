//! Booting a machine.

use std::fs::File;
use std::io::Seek as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use blockd::clock;
use format::{Context as _, Error, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use uuid::Uuid;

use super::Daemon;
use super::net::Card;
use super::state::Description;
use super::table::{Machine, object};
use super::undo::Undo;
use crate::api::types::{EventKind, RunVm, UseDisk, Vm, VmDisk, VmState};
use crate::boot::linux::check_kernel;
use crate::devices::DiskConfig;
use crate::identity;
use crate::machine::SizeClass;
use crate::process::Process;
use crate::process::wire::{Ask, Begin, BootVm, Hardware, Program};

/// Bytes of memory come in whole ones of these.
const MIB: u64 = 1 << 20;

impl Daemon {
    /// Boots a machine.
    ///
    /// # Errors
    /// `Invalid` for what cannot be one, `Exists` when its name is taken; what blockd says about a
    /// disk, and what the host says about a kernel or a machine. Nothing is left then.
    pub fn run(self: &Arc<Self>, request: &RunVm) -> Result<Vm> {
        self.run_checked(request).map_err(|e| e.within("run", object(&request.name)))
    }

    fn run_checked(self: &Arc<Self>, request: &RunVm) -> Result<Vm> {
        check(request)?;
        let _reserved = self.table.reserve(std::slice::from_ref(&request.name))?;
        let class = SizeClass { memory_bytes: request.memory_bytes, vcpus: request.vcpus };
        let disks = self.disks_of(request)?;
        let card = request.net.as_ref().map(|net| Card::to_boot(&request.name, net)).transpose()?;
        let (mut shells, _) = self.pool.take(&class, 1)?;
        let shell = shells.pop().ok_or_else(|| Error::invalid("no machine was asked for"))?;
        let undo = Undo::of(vec![shell.id], !disks.is_empty(), Vec::new());
        let made = self.make(&undo, &shell, request, (disks, card));
        let machine = match made {
            Ok(machine) => machine,
            Err(e) => {
                // What cannot be removed now is told of by health, and removed later.
                let _ = self.give_up(undo);
                return Err(e);
            }
        };
        self.events.add(EventKind::Booted, machine.object(), "");
        Ok(machine.describe(&self.state))
    }

    fn disks_of(&self, request: &RunVm) -> Result<Vec<VmDisk>> {
        let disk = |asked: &UseDisk| -> Result<VmDisk> {
            let found = self.blockd.show(&asked.disk)?;
            let UseDisk { disk, read_only, path } = asked.clone();
            Ok(VmDisk { disk, id: found.disk.disk, read_only, own: false, path })
        };
        request.disks.iter().map(disk).collect()
    }

    fn make(
        self: &Arc<Self>,
        undo: &Undo,
        shell: &Arc<Process>,
        request: &RunVm,
        (disks, card): (Vec<VmDisk>, Option<Card>),
    ) -> Result<Arc<Machine>> {
        self.janitor.know(Arc::clone(shell));
        self.janitor.begin(undo)?;
        let identity = identity::fresh(&request.name, shell.id)?;
        let mut hardware = self.attach_disks(shell, &disks)?;
        hardware.net = card.as_ref().map(|card| card.is.clone());
        let program = Program { cmdline: request.cmdline.clone() };
        let files = files_of(request)?;
        let description = Description {
            layout: Description::LAYOUT,
            name: request.name.clone(),
            id: shell.id,
            memory_bytes: request.memory_bytes,
            vcpus: request.vcpus,
            disks,
            net: hardware.net.clone(),
            generation_id: Uuid::from_bytes(identity.generation_id),
            mac: identity.mac,
            parent: None,
            layers: 0,
            created: clock::now(),
        };
        let boot = BootVm { program, hardware, identity };
        let mut lent = lent(&files);
        lent.extend(card.as_ref().and_then(Card::file));
        let booted = shell.ask_with::<()>(&Ask::Boot(Box::new(boot)), &lent);
        booted.context("boot", || format!("kernel {}", request.kernel.display()))?;
        self.state.describe(&description, true)?;
        shell.ask::<()>(&Ask::Begin(Begin { paused: request.paused }))?;
        self.janitor.done(undo)?;
        let state = if request.paused { VmState::Paused } else { VmState::Running };
        self.add(description, Arc::clone(shell), state)
    }

    /// Has blockd serve disks in the folder of a machine.
    pub(super) fn attach_disks(&self, machine: &Process, disks: &[VmDisk]) -> Result<Hardware> {
        let mut disks_in_order = disks.iter().enumerate();
        disks_in_order.try_for_each(|(i, disk)| self.attach_disk(machine, i, disk))?;
        Ok(hardware(machine, disks))
    }

    /// Has blockd serve disk number `i` of a machine in its folder.
    pub(super) fn attach_disk(&self, machine: &Process, i: usize, disk: &VmDisk) -> Result<()> {
        self.blockd
            .attach(&disk.disk, &machine.folder().disk(i), disk.read_only)
            .context("use", || format!("disk {}", disk.disk))
    }

    /// Adds a machine that lives to the table, and watches over it.
    pub(super) fn add(
        self: &Arc<Self>,
        is: Description,
        process: Arc<Process>,
        state: VmState,
    ) -> Result<Arc<Machine>> {
        let machine = Arc::new(Machine::living(is, process, state));
        self.table.add(Arc::clone(&machine));
        self.watch(&machine)?;
        Ok(machine)
    }
}

fn check(request: &RunVm) -> Result<()> {
    let size = request.memory_bytes;
    if size == 0 || !size.is_multiple_of(MIB) {
        return Err(Error::invalid("the memory of a machine is a whole number of MiB"));
    }
    let files = [Some(&request.kernel), request.initrd.as_ref()];
    if let Some(path) = files.into_iter().flatten().find(|path| !path.is_absolute()) {
        return Err(Error::invalid("the path is not absolute").on(path.display().to_string()));
    }
    let mut names: Vec<&str> = request.disks.iter().map(|d| d.disk.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|w| w[0] == w[1]) {
        Some(twice) => Err(Error::invalid("it is named twice").on(format!("disk {}", twice[0]))),
        None => Ok(()),
    }
}

/// Kernel and first file system, as files that are nowhere but in memory: the process of a machine
/// reaches no other, and who replaces the named ones meanwhile changes nothing.
fn files_of(request: &RunVm) -> Result<Vec<OwnedFd>> {
    check_kernel(&request.kernel)?;
    let copy = |path: &PathBuf| -> Result<OwnedFd> {
        let copy = || -> Result<OwnedFd> {
            let mut from = File::open(path)?;
            let to = memfd_create(c"boot", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
            let mut to = File::from(to);
            std::io::copy(&mut from, &mut to)?;
            to.rewind()?;
            Ok(to.into())
        };
        copy().context("read", || path.display().to_string())
    };
    [Some(&request.kernel), request.initrd.as_ref()].into_iter().flatten().map(copy).collect()
}

/// What a machine is to be made of whose disks blockd serves in its folder.
pub(super) fn hardware(machine: &Process, disks: &[VmDisk]) -> Hardware {
    let disk = |(i, disk): (usize, &VmDisk)| {
        let (name, socket) = (disk.disk.clone(), machine.folder().disk(i));
        DiskConfig { name, socket, read_only: disk.read_only, path: disk.path.into() }
    };
    Hardware { disks: disks.iter().enumerate().map(disk).collect(), net: None }
}

/// Files as they are lent to a message.
pub(super) fn lent(files: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(AsFd::as_fd).collect()
}
