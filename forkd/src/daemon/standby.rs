//! Children that stand by: connected to their disks before anybody asks for them.
//!
//! Most of what a fork takes has nothing to do with its instant: blockd opens new segments and
//! sockets, and shells connect to them. All of that can be done ahead. A machine that was forked is
//! likely to be forked again into as many, so children stand by for it: shells of the pool, with
//! devices, whose disks are a fork that is ready in blockd. A fork that finds them takes them,
//! cuts, and fills them; it is as any other then.
//!
//! They are in the way of nobody. They are made when it is quiet, of shells that are ready. blockd
//! ends them when somebody wants the parent's disks, or changes what is served there; then they are
//! removed here, and made again, a few times. A fork that finds them ended goes the long way.
//!
//! Invariants:
//! - One set stands by at most: blockd has room for one.
//! - Nothing of it is the parent's. Memory, state and disks of its children are those of the cut,
//!   and so are their identities.
//! - It is written down as what is to be undone from before anybody can cut it. A daemon that is
//!   killed leaves shells that end with it, and a fork that blockd forgets; the next one finds the
//!   record.
//!
//! Test: `vm_standby`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockd::api::types::ForkAnswer;
use format::{Kind, Result};
use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::Daemon;
use super::blockd::ReadyFork;
use super::fork_disks::{check_count, disks_of, fork_request, frozen_of, to_undo};
use super::run::hardware;
use super::table::Machine;
use super::undo::Undo;
use crate::process::Process;
use crate::process::wire::Ask;

/// Children that stand by at most: for more, what is done ahead is little of what a fork takes.
const CHILDREN_MAX: usize = 8;
/// Sets that are made for one fork that was done, if all of them are ended.
const TRIES_MAX: u32 = 4;
/// Time between two looks whether it is quiet.
const LOOK: Duration = Duration::from_millis(10);
/// How long it may take to get quiet.
const PATIENCE: Duration = Duration::from_secs(5);

/// Children that stand by.
pub(super) struct StandbySet {
    /// The machine that they are to be children of.
    parent: Arc<Machine>,
    pub(super) shells: Vec<Arc<Process>>,
    /// The fork of their disks, which are to get other names.
    pub(super) fork: ReadyFork,
    pub(super) undo: Undo,
}

/// The set that stands by, and what it is to be.
#[derive(Default)]
pub(super) struct Standby {
    slot: Mutex<Slot>,
    changed: Condvar,
}

#[derive(Default)]
struct Slot {
    wanted: Option<Wanted>,
    set: Option<StandbySet>,
    closed: bool,
}

struct Wanted {
    parent: Arc<Machine>,
    count: usize,
    tries: u32,
}

impl Standby {
    /// Wants as many children of a machine to stand by.
    fn want(&self, parent: &Arc<Machine>, count: usize) {
        let parent = Arc::clone(parent);
        self.slot.lock().wanted = Some(Wanted { parent, count, tries: TRIES_MAX });
        self.changed.notify_all();
    }

    /// Waits until a set is wanted; `None` at the end.
    fn next(&self) -> Option<(Arc<Machine>, usize)> {
        let mut slot = self.slot.lock();
        loop {
            if slot.closed {
                return None;
            }
            match &mut slot.wanted {
                Some(Wanted { tries: 0, .. }) => slot.wanted = None,
                Some(wanted) => {
                    wanted.tries -= 1;
                    return Some((Arc::clone(&wanted.parent), wanted.count));
                }
                None => self.changed.wait(&mut slot),
            }
        }
    }

    /// Whether that is still wanted: another fork may have been done meanwhile.
    fn wants(&self, parent: &Machine, count: usize) -> bool {
        let slot = self.slot.lock();
        let wanted = slot.wanted.as_ref().filter(|_| !slot.closed);
        wanted.is_some_and(|w| w.parent.is.id == parent.is.id && w.count == count)
    }

    /// Has a set stand by; it is given back at the end.
    fn put(&self, set: StandbySet) -> Option<StandbySet> {
        let mut slot = self.slot.lock();
        if slot.closed {
            return Some(set);
        }
        slot.set = Some(set);
        None
    }

    /// Takes the set, if it is of as many children of this machine.
    pub(super) fn take(&self, parent: &Machine, count: usize) -> Option<StandbySet> {
        let fits = |set: &StandbySet| set.parent.is.id == parent.is.id && set.shells.len() == count;
        self.slot.lock().set.take_if(|set| fits(set))
    }

    /// Takes the set with this fork, if nobody has.
    fn take_of(&self, token: Uuid) -> Option<StandbySet> {
        self.slot.lock().set.take_if(|set| set.fork.token == token)
    }

    fn has(&self, token: Uuid) -> bool {
        self.slot.lock().set.as_ref().is_some_and(|set| set.fork.token == token)
    }

    /// The name of the machine for which children stand by.
    pub(super) fn parent(&self) -> Option<String> {
        self.slot.lock().set.as_ref().map(|set| set.parent.is.name.clone())
    }

    /// Has none stand by any more.
    fn close(&self) -> Option<StandbySet> {
        let mut slot = self.slot.lock();
        slot.closed = true;
        self.changed.notify_all();
        slot.set.take()
    }
}

impl Daemon {
    /// Starts to have children stand by.
    ///
    /// # Errors
    /// What the host reports.
    pub(super) fn start_standby(self: &Arc<Self>) -> Result<()> {
        let daemon = Arc::clone(self);
        std::thread::Builder::new().name("standby".into()).spawn(move || {
            while let Some((parent, count)) = daemon.standby.next() {
                daemon.have_stand_by(&parent, count);
            }
        })?;
        Ok(())
    }

    /// A fork into so many children is done: as many are to stand by, if they can.
    pub(super) fn want_standby(&self, parent: &Arc<Machine>, count: usize) {
        let disks = &parent.is.disks;
        // Disks that are only read have to be attached for each child, which ends what stands by;
        // a card is opened for a child by its name.
        let only_own = !disks.is_empty() && disks.iter().all(|disk| !disk.read_only);
        let can =
            only_own && parent.is.net.is_none() && count <= self.pool.size().min(CHILDREN_MAX);
        if self.stands_by && can {
            self.standby.want(parent, count);
        }
    }

    /// Makes a set, and removes it when it is ended before somebody takes it.
    fn have_stand_by(&self, parent: &Arc<Machine>, count: usize) {
        let Some(shells) = self.idle_shells(parent, count) else { return };
        let set = match self.make_set(parent, shells) {
            Ok(set) => set,
            Err(error) => return tracing::debug!(%error, "no children stand by"),
        };
        let token = set.fork.token;
        if let Some(set) = self.standby.put(set) {
            return self.end_set(set);
        }
        self.wait_for_end(token);
        self.standby.take_of(token).into_iter().for_each(|set| self.end_set(set));
    }

    /// Waits until it is quiet, and takes shells that are ready.
    fn idle_shells(&self, parent: &Machine, count: usize) -> Option<Vec<Arc<Process>>> {
        let until = Instant::now() + PATIENCE;
        let wanted = || self.standby.wants(parent, count) && parent.living_process().is_ok();
        while Instant::now() < until && wanted() {
            let shells = self.pool.take_idle(&parent.is.class(), count);
            if shells.is_some() {
                return shells;
            }
            std::thread::sleep(LOOK);
        }
        None
    }

    fn make_set(&self, parent: &Arc<Machine>, shells: Vec<Arc<Process>>) -> Result<StandbySet> {
        shells.iter().for_each(|shell| self.janitor.know(Arc::clone(shell)));
        let frozen = frozen_of(parent);
        let name = |shell: &Arc<Process>| format!("standby-{}", shell.id.simple());
        let names: Vec<String> = shells.iter().map(name).collect();
        let request = fork_request(&names, &frozen, &shells);
        let ids = shells.iter().map(|shell| shell.id).collect();
        let mut undo = Undo::of(ids, true, Vec::new());
        let fork = self.blockd.fork_ready(request, ForkAnswer::Standby).inspect_err(|_| {
            // What is left of them is removed later.
            self.janitor.hand_over(undo.clone());
        })?;
        let mut equip = || -> Result<()> {
            check_count(&fork.children, &frozen, &shells)?;
            undo.disks = fork.children.iter().map(to_undo).collect();
            undo.fork = Some(fork.token);
            self.janitor.begin(&undo)?;
            for (n, shell) in shells.iter().enumerate() {
                let disks = disks_of(parent, (&frozen, &fork.children), (n, shells.len()));
                shell.ask::<()>(&Ask::Equip(hardware(shell, &disks)))?;
            }
            Ok(())
        };
        let equipped = equip();
        let set = StandbySet { parent: Arc::clone(parent), shells, fork, undo };
        match equipped {
            Ok(()) => Ok(set),
            Err(e) => {
                self.end_set(set);
                Err(e)
            }
        }
    }

    /// Waits until the fork of a set has ended, or somebody has taken the set.
    fn wait_for_end(&self, token: Uuid) {
        while let Err(e) = self.blockd.wait_for_fork(token) {
            // An answer that does not come is no end; blockd that is not there is.
            if e.kind() != Kind::Failed || !self.standby.has(token) {
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Removes a set that nobody has taken.
    fn end_set(&self, set: StandbySet) {
        // What cannot be removed now is told of by health, and removed later.
        let _ = self.give_up(set.undo);
    }

    /// Has no children stand by any more.
    pub(super) fn end_standby(&self) {
        self.standby.close().into_iter().for_each(|set| self.end_set(set));
    }
}
