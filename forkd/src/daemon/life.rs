//! The life of a machine that is there: it pauses, goes on, ends, and is removed.

use std::sync::Arc;
use std::time::Duration;

use format::{Error, Kind, Result};

use super::Daemon;
use super::net;
use super::table::{Machine, object};
use super::undo::{Undo, UndoDisk, Which};
use crate::api::types::{EventKind, RemoveVm, RemovedVm, Vm, VmDisk, VmState};
use crate::process::wire::{Ask, Phase, Told};
use crate::process::{Link, Process};

/// Stack of a thread that listens to a machine: there is one for each.
const LISTENER_STACK: usize = 128 << 10;
/// Time before a machine that broke a connection off is listened to again.
const AGAIN: Duration = Duration::from_millis(100);

impl Daemon {
    /// All machines.
    #[must_use]
    pub fn list(&self) -> Vec<Vm> {
        self.table.all().iter().map(|m| m.describe(&self.state)).collect()
    }

    /// A machine.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn show(&self, name: &str) -> Result<Vm> {
        let machine = self.table.get(name)?;
        let mut vm = machine.describe(&self.state);
        if let Some(net) = &mut vm.net {
            net.status = net::status(&machine);
        }
        Ok(vm)
    }

    /// Stops a machine between two instructions.
    ///
    /// # Errors
    /// `NotFound`, `Failed` when it has ended, or what its process says.
    pub fn pause(&self, name: &str) -> Result<Vm> {
        self.change(name, "pause", &Ask::Pause, VmState::Paused, EventKind::Paused)
    }

    /// Lets a machine go on.
    ///
    /// # Errors
    /// As [`Daemon::pause`].
    pub fn resume(&self, name: &str) -> Result<Vm> {
        self.change(name, "resume", &Ask::Resume, VmState::Running, EventKind::Resumed)
    }

    fn change(
        &self,
        name: &str,
        tried: &'static str,
        ask: &Ask,
        state: VmState,
        event: EventKind,
    ) -> Result<Vm> {
        let machine = self.table.get(name)?;
        let _changing = machine.changing.lock();
        let before = machine.state();
        let change = || machine.living_process()?.ask::<()>(ask);
        change().map_err(|e| e.within(tried, object(name)))?;
        machine.set_state(state);
        if before != state {
            self.events.add(event, machine.object(), "");
        }
        Ok(machine.describe(&self.state))
    }

    /// Asks the guest of a machine to turn itself off, as its power button does. False when there
    /// is nobody to wait for: the guest does not listen to the button, or the machine has ended.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when it is paused, and so cannot be asked.
    pub fn press_power_button(&self, name: &str) -> Result<bool> {
        let machine = self.table.get(name)?;
        let _changing = machine.changing.lock();
        let Ok(process) = machine.living_process() else { return Ok(false) };
        if machine.state() == VmState::Paused {
            return Err(Error::invalid("it is paused, and cannot turn itself off")
                .tried("stop")
                .on(object(name))
                .hint("resume it first, or cut its power with --force"));
        }
        match process.ask::<bool>(&Ask::PressPowerButton) {
            Ok(listens) => Ok(listens),
            // It ended this moment, or will not say: its power is cut.
            Err(_) => Ok(false),
        }
    }

    /// Whether a machine has ended.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn has_ended(&self, name: &str) -> Result<bool> {
        let machine = self.table.get(name)?;
        Ok(machine.living_process().map_or(true, |process| !process.is_alive()))
    }

    /// Ends a machine as if its power was cut. One that has ended stays as it is.
    ///
    /// # Errors
    /// `NotFound`, or what the host reports.
    pub fn end(self: &Arc<Self>, name: &str) -> Result<Vm> {
        let machine = self.table.get(name)?;
        let _changing = machine.changing.lock();
        let end = || -> Result<()> {
            let Some(process) = &machine.process else { return Ok(()) };
            if process.is_alive() {
                // One that does not answer has its power cut all the same.
                match process.ask::<()>(&Ask::Stop) {
                    Ok(()) => process.reap()?,
                    Err(_) => process.kill()?,
                }
            }
            self.note_end(&machine, process);
            // Here and not only in the background: who stops a machine may want its disks.
            self.let_go_of_disks_now(&machine)
        };
        end().map_err(|e| e.within("stop", object(name)))?;
        Ok(machine.describe(&self.state))
    }

    fn let_go_of_disks_now(&self, machine: &Machine) -> Result<()> {
        if machine.is.disks.is_empty() { Ok(()) } else { self.let_go_of_disks(machine.is.id) }
    }

    /// Removes a machine, and the disks that were made for it.
    ///
    /// # Errors
    /// `NotFound`; `InUse` when it has not ended and nobody forces it; or what blockd says about a
    /// disk: the machine is gone all the same, and its disks will be.
    pub fn rm(self: &Arc<Self>, name: &str, how: RemoveVm) -> Result<RemovedVm> {
        let machine = self.table.get(name)?;
        let _changing = machine.changing.lock();
        if machine.state() != VmState::Ended && !how.force {
            return Err(Error::new(Kind::InUse, "it has not ended")
                .tried("remove")
                .on(object(name))
                .hint("stop it first, or say --force"));
        }
        let own = |d: &&VmDisk| d.own && !how.keep_disks;
        let disks: Vec<&VmDisk> = machine.is.disks.iter().filter(own).collect();
        let names = disks.iter().map(|d| d.disk.clone()).collect();
        let meant = |d: &&VmDisk| UndoDisk { name: d.disk.clone(), is: Which::Identity(d.id) };
        let disks = disks.iter().map(meant).collect();
        let undo = Undo::of(vec![machine.is.id], !machine.is.disks.is_empty(), disks);
        // From here on it is removed, whoever is killed.
        self.janitor.begin(&undo).map_err(|e| e.within("remove", object(name)))?;
        self.table.remove(&machine);
        machine.set_state(VmState::Ended);
        let removed = self.give_up(undo);
        self.events.add(EventKind::Removed, machine.object(), "");
        removed.map_err(|e| {
            let e = e.hint("the rest is removed as soon as that is possible");
            e.within("remove", object(name))
        })?;
        Ok(RemovedVm { removed: name.to_owned(), disks: names })
    }

    /// Listens to a machine until it ends.
    pub(super) fn watch(self: &Arc<Self>, machine: &Arc<Machine>) -> Result<()> {
        let (daemon, machine) = (Arc::downgrade(self), Arc::clone(machine));
        let listen = move || {
            let Some(process) = machine.process.clone() else { return };
            loop {
                listen(&machine, &process);
                if !process.is_alive() {
                    break;
                }
                std::thread::sleep(AGAIN);
            }
            if let Some(daemon) = daemon.upgrade() {
                daemon.note_end(&machine, &process);
                if !machine.is.disks.is_empty() {
                    daemon.janitor.release(machine.is.id);
                }
            }
        };
        let thread = std::thread::Builder::new().name("listener".into());
        thread.stack_size(LISTENER_STACK).spawn(listen)?;
        Ok(())
    }

    /// Notes the end of a machine whose process is gone, once.
    fn note_end(&self, machine: &Machine, process: &Process) {
        // It is gone, so this only takes it off the host's table.
        let _ = process.reap();
        let ended = process.ended();
        let detail = match ended.detail.is_empty() {
            true => ended.reason.clone(),
            false => format!("{}: {}", ended.reason, ended.detail),
        };
        if machine.set_ended(ended) {
            self.events.add(EventKind::Ended, machine.object(), detail);
        }
    }
}

/// Notes what a machine says, until the connection ends.
fn listen(machine: &Machine, process: &Process) {
    let Ok(link) = process.watch() else { return };
    while let Ok(Told::Is(phase)) = Link::hear(&link) {
        match phase {
            Phase::Running => machine.set_state(VmState::Running),
            Phase::Paused => machine.set_state(VmState::Paused),
            Phase::Shell => {}
        }
    }
}
