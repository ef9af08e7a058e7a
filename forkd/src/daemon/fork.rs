//! Forking a machine: all of its children, or none.
//!
//! The order, and what each step defends against:
//! 1. names are reserved, tap interfaces opened, shells taken, identities made: what can be refused
//!    is refused before anything changes. Without new random numbers there is no fork;
//! 2. blockd gets ready for the fork of the disks, and says which disks there are going to be, and
//!    at which sockets. It forgets all of this if nobody says when, so a daemon that is killed here
//!    leaves nothing;
//! 3. what is going to be made is written down durably (`undo.rs`) — before the cut, behind which a
//!    disk may become durable. Meanwhile the shells connect to the disks of their children;
//! 4. the parent's process is told to cut. It stops the machine, has blockd cut the disks on a
//!    connection that is open already, and lets the machine go on; then it answers. Nobody else has
//!    a part in the pause: a daemon that is killed or slow does not prolong it;
//! 5. children are described, each shell becomes one, with its identity in place, and stands;
//! 6. when all of them are there, they begin to run; an only child need not be told twice. The
//!    fork of the disks need not be durable yet: blockd lets no flush of a child end before it is.
//!    Should it fail, the children are ended: nobody was told that they are there, and none of them
//!    was told that anything is durable;
//! 7. when it is, descriptions are made durable, and what was written down in 3 goes. Only then is
//!    somebody told.
//!
//! Whatever fails on the way, the parent goes on, and what was made of children is removed. A
//! daemon that is killed leaves shells that end with it, children that the next one removes, and
//! the record that says so.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockd::api::types::{
    CutForks, FlattenWhen, ForkDisk, ForkDisks, ForkMode, MadeChild, ServeChild,
};
use blockd::clock;
use format::{Error, Kind, Result};
use parking_lot::Mutex;
use uuid::Uuid;

use super::Daemon;
use super::blockd::{Blockd, export};
use super::net::{Card, cards};
use super::pool::Busy;
use super::run::{hardware, lent};
use super::state::Description;
use super::table::{Machine, object};
use super::undo::{Undo, UndoDisk, Which};
use crate::api::types::{EventKind, ForkVm, ForkedVms, VmDisk, VmParent, VmState};
use crate::process::Process;
use crate::process::wire::{Ask, BecomeChild, Begin, CutVm, Cutting, DisksAre, WasCut};
use crate::wires::Identity;
use crate::{http, identity};

/// Children of one fork at most.
const CHILDREN_MAX: usize = 1024;
/// Children that are made side by side.
const LANES: usize = 4;

/// Counts of forks.
#[derive(Debug, Default)]
pub struct Forks(Mutex<ForkCounts>);

/// What became of forks so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ForkCounts {
    /// Done.
    pub done: u64,
    /// Given up.
    pub failed: u64,
    /// Children that were made.
    pub children: u64,
    /// Microseconds for which parents stood.
    pub pause_us: u64,
}

impl Forks {
    /// The counts of now.
    #[must_use]
    pub fn snapshot(&self) -> ForkCounts {
        *self.0.lock()
    }

    fn add(&self, outcome: &Result<ForkedVms>) {
        let mut counts = self.0.lock();
        match outcome {
            Ok(forked) => {
                counts.done += 1;
                counts.children += forked.children.len() as u64;
                counts.pause_us += forked.pause_us;
            }
            Err(_) => counts.failed += 1,
        }
    }
}

/// A disk that is going to be forked.
pub(super) struct Frozen {
    /// Its number in the machine.
    pub(super) i: usize,
    /// Its name.
    pub(super) disk: String,
}

/// What came of making children: the machines, the cut, and when all of them ran.
type Made = (Vec<Arc<Machine>>, WasCut, Instant);

/// A child that is being made.
struct Child {
    process: Arc<Process>,
    identity: Identity,
    disks: Vec<VmDisk>,
    card: Option<Card>,
}

pub(super) fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Daemon {
    /// Forks a machine, which goes on if it runs.
    ///
    /// # Errors
    /// `NotFound`; `Exists` when a child's name or disk is taken; `Failed` when the machine has
    /// ended; or what its process, blockd or a shell says. There are no children then, and the
    /// machine goes on.
    pub fn fork(self: &Arc<Self>, name: &str, request: &ForkVm) -> Result<ForkedVms> {
        let forked = self.fork_counted(name, request);
        self.forks.add(&forked);
        let forked = forked.map_err(|e| e.within("fork", object(name)))?;
        let children = request.children.join(", ");
        self.events.add(EventKind::Forked, object(name), format!("into {children}"));
        Ok(forked)
    }

    fn fork_counted(self: &Arc<Self>, name: &str, request: &ForkVm) -> Result<ForkedVms> {
        let began = Instant::now();
        let count = request.children.len();
        if count == 0 || count > CHILDREN_MAX {
            return Err(Error::invalid(format!("a fork has 1 to {CHILDREN_MAX} children")));
        }
        let parent = self.table.get(name)?;
        let _changing = parent.changing.lock();
        parent.living_process()?;
        let _reserved = self.table.reserve(&request.children)?;
        let cards = cards(parent.is.net.is_some(), request.net.as_ref(), &request.children)?;
        self.take_memory_back(&parent)?;
        let busy = self.pool.leave_alone();
        let (shells, cold) = self.pool.take(&parent.is.class(), count)?;
        let ids = shells.iter().map(|shell| shell.id).collect();
        let mut undo = Undo::of(ids, !parent.is.disks.is_empty(), Vec::new());
        let made = self.make_children(&parent, request, (shells, cards, busy), &mut undo);
        match made {
            Ok((children, was_cut, ready)) => Ok(ForkedVms {
                children: children.iter().map(|child| child.describe(&self.state)).collect(),
                pause_us: was_cut.pause.whole,
                disks_us: was_cut.pause.disks,
                ready_us: us(ready - began),
                took_us: us(began.elapsed()),
                cold: cold as u64,
            }),
            Err(e) => {
                // What cannot be removed now is told of by health, and removed later.
                let _ = self.give_up(undo);
                Err(e)
            }
        }
    }

    fn make_children(
        self: &Arc<Self>,
        parent: &Machine,
        request: &ForkVm,
        (shells, cards, busy): (Vec<Arc<Process>>, Vec<Option<Card>>, Busy<'_>),
        undo: &mut Undo,
    ) -> Result<Made> {
        shells.iter().for_each(|shell| self.janitor.know(Arc::clone(shell)));
        let fresh = |(name, shell): (&String, &Arc<Process>)| identity::fresh(name, shell.id);
        let identities: Result<Vec<_>> = request.children.iter().zip(&shells).map(fresh).collect();
        let identities = identities?;
        let frozen = frozen_of(parent);
        let disks = fork_request(request, &frozen, &shells);
        let ready = (!frozen.is_empty()).then(|| self.blockd.fork_ready(&disks)).transpose()?;
        let token = ready.as_ref().map(|ready| ready.token);
        let disks = ready.map_or_else(Vec::new, |ready| ready.children);
        let make = || {
            if disks.len() != frozen.len() * shells.len() {
                let reason = "blockd answers with other disks than asked";
                return Err(Error::new(Kind::Unsupported, reason));
            }
            undo.disks = disks.iter().map(to_undo).collect();
            let own = identities.into_iter().zip(cards);
            let children = children_of(parent, (&frozen, &disks), shells, own);
            self.note_and_equip(&children, undo)?;
            let (was_cut, files) = self.cut(parent, token, &mut undo.disks)?;
            if let Some((status, body)) = &was_cut.disks {
                let body = body.clone().into_bytes();
                http::Reply { status: *status, body }.read::<CutForks>()?;
            }
            let described = self.describe_children(parent, &children, &was_cut)?;
            let_run(&children, (&was_cut, &files), Begin { paused: request.paused })?;
            let ready = Instant::now();
            // What is left waits for storage: shells for the next fork can be made meanwhile.
            drop(busy);
            let state = if request.paused { VmState::Paused } else { VmState::Running };
            let kept = self.keep(described, children, (token, state), undo)?;
            Ok((kept, was_cut, ready))
        };
        make().inspect_err(|_| token.into_iter().for_each(|token| self.blockd.end_fork(token)))
    }

    /// Notes what is to be undone, and has the children that are to be connected to their disks.
    fn note_and_equip(&self, children: &[Child], undo: &Undo) -> Result<()> {
        let (noted, equipped) = std::thread::scope(|s| {
            let noted = s.spawn(|| self.janitor.begin(undo));
            let equipped = side_by_side(children, &|child| self.equip(child));
            // A panic in there is a bug, and is one here as well.
            (noted.join().unwrap_or_else(|e| std::panic::resume_unwind(e)), equipped)
        });
        noted.and(equipped)
    }

    /// Connects a child that is to be to its disks. Those that are its parent's as well are to be
    /// served to it first.
    fn equip(&self, child: &Child) -> Result<()> {
        let shared = child.disks.iter().enumerate().filter(|(_, disk)| disk.read_only);
        let equip = || {
            for (i, disk) in shared {
                self.attach_disk(&child.process, i, disk)?;
            }
            let mut hardware = hardware(&child.process, &child.disks);
            hardware.net = child.card.as_ref().map(|card| card.is.clone());
            let tap: Vec<_> = child.card.as_ref().and_then(Card::file).into_iter().collect();
            child.process.ask_with::<()>(&Ask::Equip(hardware), &tap).map(drop)
        };
        equip().map_err(|e: Error| e.within("make", object(&child.identity.name)))
    }

    /// Has a machine cut, and its disks if there is a token for them.
    pub(super) fn cut(
        &self,
        parent: &Machine,
        token: Option<Uuid>,
        undo: &mut Vec<UndoDisk>,
    ) -> Result<(WasCut, Vec<OwnedFd>)> {
        let connection = token.map(|_| self.blockd.connect()).transpose();
        let connection = connection.inspect_err(|_| undo.clear())?;
        let lent: Vec<BorrowedFd> = connection.iter().map(|c| c.as_fd()).collect();
        let text = |bytes| String::from_utf8(bytes).map_err(|_| Error::invalid("it is no text"));
        let request = token.map(|token| Blockd::cut_request(token).and_then(text)).transpose()?;
        let ask = Ask::Cut(CutVm { request });
        match parent.living_process()?.ask_with::<Cutting>(&ask, &lent)? {
            (Cutting::Cut(was_cut), files) => Ok((was_cut, files)),
            (Cutting::Failed { failure, disks }, _) => {
                if disks == DisksAre::Untouched {
                    // Whatever has such a name is somebody else's.
                    undo.clear();
                }
                Err(failure.into())
            }
        }
    }

    /// Describes children that are going to be. Not durable yet: after a power cut there is no
    /// child, and the record of step 3 stands.
    fn describe_children(
        &self,
        parent: &Machine,
        children: &[Child],
        was_cut: &WasCut,
    ) -> Result<Vec<Description>> {
        let describe = |child: &Child| Description {
            layout: Description::LAYOUT,
            name: child.identity.name.clone(),
            id: child.identity.id,
            disks: child.disks.clone(),
            net: child.card.as_ref().map(|card| card.is.clone()),
            generation_id: Uuid::from_bytes(child.identity.generation_id),
            mac: child.identity.mac,
            parent: Some(VmParent { name: parent.is.name.clone(), id: parent.is.id }),
            layers: was_cut.layers.len() as u64,
            created: clock::now(),
            ..parent.is.clone()
        };
        let described: Vec<Description> = children.iter().map(describe).collect();
        described.iter().try_for_each(|is| self.state.describe(is, false))?;
        Ok(described)
    }

    /// Waits until the fork of the disks is durable, and makes the children so: they are there.
    fn keep(
        self: &Arc<Self>,
        described: Vec<Description>,
        children: Vec<Child>,
        (token, state): (Option<Uuid>, VmState),
        undo: &Undo,
    ) -> Result<Vec<Arc<Machine>>> {
        if let Some(token) = token {
            self.blockd.forked(token)?;
        }
        self.state.sync(&described.iter().map(|is| is.id).collect::<Vec<_>>())?;
        self.janitor.done(undo)?;
        let added = described.into_iter().zip(children);
        added.map(|(is, child)| self.add(is, child.process, state)).collect()
    }
}

/// The children, and what disks they have: their own for those that are forked.
fn children_of(
    parent: &Machine,
    (frozen, made): (&[Frozen], &[MadeChild]),
    shells: Vec<Arc<Process>>,
    own: impl Iterator<Item = (Identity, Option<Card>)>,
) -> Vec<Child> {
    let count = shells.len();
    let child = |(n, (process, (identity, card))): (usize, (Arc<Process>, (_, _)))| {
        let mut disks = parent.disks();
        for (k, f) in frozen.iter().enumerate() {
            // blockd answers disk by disk, with the children of each in their order.
            let MadeChild { name, disk } = made[k * count + n].clone();
            disks[f.i] = VmDisk { disk: name, id: disk, own: true, ..disks[f.i].clone() };
        }
        Child { process, identity, disks, card }
    };
    shells.into_iter().zip(own).enumerate().map(child).collect()
}

/// Makes shells that are connected to their disks children that run, or stand.
fn let_run(children: &[Child], image: (&WasCut, &[OwnedFd]), how: Begin) -> Result<()> {
    if let [only] = children {
        return fill(only, image, Some(how));
    }
    side_by_side(children, &|child| fill(child, image, None))?;
    side_by_side(children, &|child| child.process.ask::<()>(&Ask::Begin(how)))
}

/// Makes a shell a child.
fn fill(
    child: &Child,
    (was_cut, files): (&WasCut, &[OwnedFd]),
    begin: Option<Begin>,
) -> Result<()> {
    let become_child =
        BecomeChild { layers: was_cut.layers.clone(), identity: child.identity.clone(), begin };
    let ask = Ask::Become(Box::new(become_child));
    let filled = child.process.ask_with::<()>(&ask, &lent(files));
    filled.map(drop).map_err(|e| e.within("make", object(&child.identity.name)))
}

/// The name of the disk that a child gets for disk number `i` of its parent.
fn disk_name(child: &str, i: usize) -> String {
    format!("{child}-disk{i}")
}

fn to_undo(made: &MadeChild) -> UndoDisk {
    UndoDisk { name: made.name.clone(), is: Which::Identity(made.disk) }
}

/// The disks of a machine that are going to be forked: those that are its own.
pub(super) fn frozen_of(parent: &Machine) -> Vec<Frozen> {
    let disks = parent.is.disks.iter().enumerate().filter(|(_, disk)| !disk.read_only);
    disks.map(|(i, disk)| Frozen { i, disk: disk.disk.clone() }).collect()
}

/// What blockd is to fork, and where it is to serve the children.
fn fork_request(request: &ForkVm, frozen: &[Frozen], shells: &[Arc<Process>]) -> ForkDisks {
    let disk = |f: &Frozen| {
        let children: Vec<String> =
            request.children.iter().map(|child| disk_name(child, f.i)).collect();
        let serve = |(child, shell): (&String, &Arc<Process>)| ServeChild {
            child: child.clone(),
            export: export(&shell.folder().disk(f.i), false),
            limits: None,
        };
        let serve = children.iter().zip(shells).map(serve).collect();
        ForkDisk { disk: f.disk.clone(), children, serve }
    };
    ForkDisks {
        disks: frozen.iter().map(disk).collect(),
        mode: ForkMode::Live,
        flatten: FlattenWhen::Auto,
        ..ForkDisks::default()
    }
}

/// Does something for each child, several at a time; all of it is tried, the first failure counts.
fn side_by_side(children: &[Child], work: &(dyn Fn(&Child) -> Result<()> + Sync)) -> Result<()> {
    let lane = |part: &[Child]| {
        // Every one is tried, so that no other is under way when the failure is told.
        let outcomes: Vec<Result<()>> = part.iter().map(work).collect();
        outcomes.into_iter().collect::<Result<()>>()
    };
    if children.len() < 2 {
        return lane(children);
    }
    std::thread::scope(|s| {
        let parts = children.chunks(children.len().div_ceil(LANES));
        let lanes: Vec<_> = parts.map(|part| s.spawn(move || lane(part))).collect();
        let outcomes = lanes.into_iter().map(|lane| {
            // A panic in there is a bug, and is one here as well.
            lane.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
        });
        let outcomes: Vec<Result<()>> = outcomes.collect();
        outcomes.into_iter().collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_disk_of_every_child_is_asked_for_and_can_be_undone() {
        let children = vec!["a".to_owned(), "b".to_owned()];
        let request = ForkVm { children, paused: false, net: None };
        let frozen = [Frozen { i: 0, disk: "root".into() }, Frozen { i: 2, disk: "data".into() }];

        let body = fork_request(&request, &frozen, &[]);

        let names = |d: &ForkDisk| (d.disk.clone(), d.children.join(" "));
        let asked: Vec<_> = body.disks.iter().map(names).collect();
        assert_eq!(
            asked,
            [
                ("root".to_owned(), "a-disk0 b-disk0".to_owned()),
                ("data".to_owned(), "a-disk2 b-disk2".to_owned()),
            ]
        );
        let made = MadeChild { name: "b-disk2".into(), disk: Uuid::from_u128(7) };
        let is = Which::Identity(made.disk);
        assert_eq!(to_undo(&made), UndoDisk { name: "b-disk2".into(), is });
        assert!(fork_request(&request, &[], &[]).disks.is_empty());
    }
}
