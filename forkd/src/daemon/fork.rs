//! Forking a machine: all of its children, or none.
//!
//! The order, and what each step defends against:
//! 1. names are reserved, tap interfaces opened, shells taken, identities made: what can be refused
//!    is refused before anything changes. Without new random numbers there is no fork;
//! 2. blockd serves to the children what they share, gets ready for the fork of the other disks,
//!    and says which disks there are going to be, and at which sockets. It forgets the fork if
//!    nobody says when, so a daemon that is killed here leaves sockets at most, which the next one
//!    finds;
//! 3. what is going to be made is written down durably (`undo.rs`) — before the cut, behind which a
//!    disk may become durable. Meanwhile the shells connect to the disks of their children;
//! 4. the parent's process is told to cut. It stops the machine, has blockd cut the disks on a
//!    connection that is open already, and lets the machine go on; then it answers. Nobody else has
//!    a part in the pause: a daemon that is killed or slow does not prolong it;
//! 5. each shell becomes a child, with its identity in place, and stands;
//! 6. when all of them are there, they begin to run; an only child need not be told twice. The
//!    fork of the disks need not be durable yet: blockd lets no flush of a child end before it is.
//!    Should it fail, the children are ended: nobody was told that they are there, and none of them
//!    was told that anything is durable;
//! 7. children are described; when the fork is durable, descriptions are made so, and what was
//!    written down in 3 goes. Only then is somebody told. Until then a daemon that finds children
//!    removes them by that record, described or not.
//!
//! Whatever fails on the way, the parent goes on, and what was made of children is removed. A
//! daemon that is killed leaves shells that end with it, children that the next one removes, and
//! the record that says so.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockd::api::types::{CutForks, ForkAnswer, MadeChild};
use blockd::clock;
use format::{Error, Result};
use parking_lot::Mutex;
use uuid::Uuid;

use super::Daemon;
use super::blockd::ReadyFork;
use super::fork_disks::{Frozen, check_count, disks_of, fork_request, frozen_of, rename, to_undo};
use super::net::{Card, cards};
use super::pool::Busy;
use super::run::{hardware, lent};
use super::state::Description;
use super::table::{Machine, object};
use super::undo::{Undo, UndoDisk};
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

/// What came of making children: the machines, the cut, and when all of them ran.
type Made = (Vec<Arc<Machine>>, WasCut, Instant);

/// Shells for children, and a fork of the disks that is ready, if there are any.
struct Ready {
    shells: Vec<Arc<Process>>,
    fork: Option<ReadyFork>,
    /// The shells are connected to these disks, which have other names yet, and it is noted what is
    /// to be undone.
    stood_by: bool,
}

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
        let forked = match self.fork_standing(&parent, request, began)? {
            Some(forked) => forked,
            None => self.fork_from_pool(&parent, request, (cards, began))?,
        };
        self.want_standby(&parent, count);
        Ok(forked)
    }

    /// Forks into children that stand by, if there are any; `None` when there are none, or they
    /// were ended meanwhile, and nothing has happened.
    fn fork_standing(
        self: &Arc<Self>,
        parent: &Machine,
        request: &ForkVm,
        began: Instant,
    ) -> Result<Option<ForkedVms>> {
        if request.net.is_some() {
            return Ok(None);
        }
        let count = request.children.len();
        let Some(set) = self.standby.take(parent, count) else { return Ok(None) };
        let busy = self.pool.leave_alone();
        self.pool.used(count);
        let mut undo = set.undo;
        let ready = Ready { shells: set.shells, fork: Some(set.fork), stood_by: true };
        let cards = (0..count).map(|_| None).collect();
        match self.make_children(parent, request, (ready, cards, busy), &mut undo) {
            Ok(made) => Ok(Some(self.forked(made, (began, 0, true)))),
            // What kept it from being cut is met again, and told of, if it is still there.
            Err(_) if undo.disks.is_empty() => {
                self.janitor.hand_over(undo);
                Ok(None)
            }
            Err(e) => {
                let _ = self.give_up(undo);
                Err(e)
            }
        }
    }

    /// Forks into children that are made from the beginning.
    fn fork_from_pool(
        self: &Arc<Self>,
        parent: &Machine,
        request: &ForkVm,
        (cards, began): (Vec<Option<Card>>, Instant),
    ) -> Result<ForkedVms> {
        let busy = self.pool.leave_alone();
        let (shells, cold) = self.pool.take(&parent.is.class(), request.children.len())?;
        let ids = shells.iter().map(|shell| shell.id).collect();
        let mut undo = Undo::of(ids, !parent.is.disks.is_empty(), Vec::new());
        let made = self.get_ready(parent, request, shells).and_then(|ready| {
            undo.fork = ready.fork.as_ref().map(|fork| fork.token);
            self.make_children(parent, request, (ready, cards, busy), &mut undo)
        });
        match made {
            Ok(made) => Ok(self.forked(made, (began, cold, false))),
            Err(e) => {
                // What cannot be removed now is told of by health, and removed later.
                let _ = self.give_up(undo);
                Err(e)
            }
        }
    }

    fn forked(
        &self,
        (children, was_cut, ready): Made,
        (began, cold, stood_by): (Instant, usize, bool),
    ) -> ForkedVms {
        ForkedVms {
            children: children.iter().map(|child| child.describe(&self.state)).collect(),
            pause_us: was_cut.pause.whole,
            disks_us: was_cut.pause.disks,
            ready_us: us(ready - began),
            took_us: us(began.elapsed()),
            cold: cold as u64,
            stood_by,
        }
    }

    /// Has blockd serve disks that are shared, and get ready if there are disks to fork. In this
    /// order: while it is ready it begins to serve nothing else.
    fn get_ready(
        &self,
        parent: &Machine,
        request: &ForkVm,
        shells: Vec<Arc<Process>>,
    ) -> Result<Ready> {
        shells.iter().for_each(|shell| self.janitor.know(Arc::clone(shell)));
        for (i, disk) in parent.is.disks.iter().enumerate().filter(|(_, disk)| disk.read_only) {
            shells.iter().try_for_each(|shell| self.attach_disk(shell, i, disk))?;
        }
        let frozen = frozen_of(parent);
        if frozen.is_empty() {
            return Ok(Ready { shells, fork: None, stood_by: false });
        }
        let asked = fork_request(&request.children, &frozen, &shells);
        let fork = Some(self.blockd.fork_ready(asked, ForkAnswer::Ready)?);
        Ok(Ready { shells, fork, stood_by: false })
    }

    fn make_children(
        self: &Arc<Self>,
        parent: &Machine,
        request: &ForkVm,
        (ready, cards, busy): (Ready, Vec<Option<Card>>, Busy<'_>),
        undo: &mut Undo,
    ) -> Result<Made> {
        let Ready { shells, fork, stood_by } = ready;
        let mut disks = fork.as_ref().map(|fork| fork.children.clone()).unwrap_or_default();
        let fresh = |(name, shell): (&String, &Arc<Process>)| identity::fresh(name, shell.id);
        let identities = request.children.iter().zip(&shells).map(fresh);
        let identities = identities.collect::<Result<Vec<_>>>()?;
        let frozen = frozen_of(parent);
        check_count(&disks, &frozen, &shells)?;
        undo.disks = disks.iter().map(to_undo).collect();
        let names = if stood_by { rename(&mut disks, &request.children, &frozen) } else { vec![] };
        let own = identities.into_iter().zip(cards);
        let children = children_of(parent, (&frozen, &disks), shells, own);
        if !stood_by {
            self.note_and_equip(&children, undo)?;
        }
        let (was_cut, files) = self.cut(parent, fork.as_ref(), &names, &mut undo.disks)?;
        if let Some((status, body)) = &was_cut.disks {
            let body = body.clone().into_bytes();
            http::Reply { status: *status, body }.read::<CutForks>()?;
        }
        let_run(&children, (&was_cut, &files), Begin { paused: request.paused })?;
        let ready = Instant::now();
        // What is left waits for storage: shells for the next fork can be made meanwhile.
        drop(busy);
        let described = self.describe_children(parent, &children, &was_cut)?;
        let state = if request.paused { VmState::Paused } else { VmState::Running };
        let token = fork.map(|fork| fork.token);
        let kept = self.keep(described, children, (token, state), undo)?;
        Ok((kept, was_cut, ready))
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

    /// Connects a child that is to be to its disks.
    fn equip(&self, child: &Child) -> Result<()> {
        let mut hardware = hardware(&child.process, &child.disks);
        hardware.net = child.card.as_ref().map(|card| card.is.clone());
        let tap: Vec<_> = child.card.as_ref().and_then(Card::file).into_iter().collect();
        let equipped = child.process.ask_with::<()>(&Ask::Equip(hardware), &tap);
        equipped.map(drop).map_err(|e| e.within("make", object(&child.identity.name)))
    }

    /// Has a machine cut, and its disks if a fork of them is ready; their children get these names
    /// if there are any.
    pub(super) fn cut(
        &self,
        parent: &Machine,
        fork: Option<&ReadyFork>,
        names: &[String],
        undo: &mut Vec<UndoDisk>,
    ) -> Result<(WasCut, Vec<OwnedFd>)> {
        let word = fork.map(|fork| self.blockd.announce(fork, names)).transpose();
        let word = word.inspect_err(|_| undo.clear())?;
        let lent: Vec<BorrowedFd> = word.iter().map(|word| word.connection.as_fd()).collect();
        let request = word.as_ref().map(|word| word.end.clone());
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
        let disks = disks_of(parent, (frozen, made), (n, count));
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
