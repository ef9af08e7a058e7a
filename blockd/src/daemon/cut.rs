//! The cut of a fork: the instant at which disks in service go on in their successors, and what is
//! made durable behind it.
//!
//! The order is that of `storedir/cut.rs`. For disks in service, it goes like this:
//! 1. while their guests run: what is left to be made durable begins to be, and the successor is
//!    opened, and children that are to be served at once (`ahead.rs`);
//! 2. the gates of all disks are closed and what is in work ends: the instant. No guest has an
//!    answer to a request that the children do not have, and none of a later one is in them;
//! 3. the volumes go on with the successors, and the old gates send everybody there. Then children
//!    that are served already let their machines in;
//! 4. the fork is confirmed, the old disks are frozen and the fork is settled; flushes of guests
//!    wait for that.
//!
//! A guest waits from 2 to 3, and sees a slow request; there is no I/O of ours in between. Nothing
//! is synced before the instant, but for disks that nobody serves: these are frozen before, because
//! what is wrong with them must be known while nobody has gone on.
//!
//! When 4 fails, a guest was told of writes that the old disk does not have: the disk fails, and
//! whoever opens it again tries to settle the fork. While the host has no space, it is tried again.
//!
//! Tests: `fork_under_load`, `full_host`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};

use super::ahead::Ahead;
use crate::catalogue::{ForkRow, Forked};
use crate::disk::gate::Closed;
use crate::disk::{Disk, HeldDisk};
use crate::serve::Volume;
use crate::side_by_side::side_by_side;
use crate::storedir::{Crossing, StoreDir, not_all_frozen};

/// How long requests in work may take to end.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(2);
/// How long a fork waits for space on the host once disks have gone on.
const NO_SPACE_MAX: Duration = Duration::from_secs(60);
/// How long it waits before it tries again.
const NO_SPACE_WAIT: Duration = Duration::from_millis(200);

/// The volumes of the disks that are in service, by name.
pub(super) type Volumes = BTreeMap<String, Arc<Volume>>;

/// How disks in service go on after their fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// At once.
    GoOn,
    /// When somebody says so.
    Hold,
}

/// The instant, when disks have gone on: how long they let nobody in, and those that still do not.
pub(super) struct Cut {
    pub(super) pause: Duration,
    pub(super) held: Vec<HeldDisk>,
}

/// Children that are served from the instant on.
pub(super) trait Children {
    /// Opens them.
    ///
    /// # Errors
    /// When one cannot be opened; none is then.
    fn open(&self) -> Result<Vec<Ahead>>;

    /// Gives all children of a fork other names, in its order.
    ///
    /// # Errors
    /// When they cannot have them. There is to be no instant then.
    fn rename(&self, fork: &ForkRow, names: Vec<String>, ahead: &[Ahead]) -> Result<ForkRow>;
}

/// A disk in service that is being forked.
struct Live<'a> {
    volume: &'a Volume,
    old: Arc<Disk>,
    crossing: Crossing,
}

/// There are none.
impl Children for () {
    fn open(&self) -> Result<Vec<Ahead>> {
        Ok(Vec::new())
    }

    fn rename(&self, _: &ForkRow, _: Vec<String>, _: &[Ahead]) -> Result<ForkRow> {
        Err(Error::invalid("it has no children that could be renamed"))
    }
}

/// Who follows a fork of disks in service.
pub(super) trait Steps {
    /// It is known what will be made; said again when children have got other names.
    fn begun(&self, _fork: &ForkRow) {}

    /// All is ready for the instant, which is when this returns; with names for the children, if
    /// they are to have others.
    ///
    /// # Errors
    /// When there is to be none.
    fn ready(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// The instant is past: so long disks let nobody in. What is to be durable waits for this to
    /// return.
    fn at_cut(&self, _pause: Duration) {}
}

/// Nobody follows it.
impl Steps for () {}

/// Forks disks that [`StoreDir::begin_fork`] has begun to fork: they are all frozen and have their
/// children afterwards, or none has. `children` are those that are served from the instant on,
/// which are given back with the fork as it became; `at_cut` is called at the instant if any disk
/// is in service.
pub(super) fn cut(
    (dir, fork): (&StoreDir, &ForkRow),
    volumes: &Volumes,
    then: Then,
    steps: &dyn Steps,
    children: &dyn Children,
    at_cut: &mut dyn FnMut(Cut),
) -> Result<(ForkRow, Vec<Ahead>)> {
    let (live, mut ahead) = match open(dir, fork, volumes, children) {
        Ok(open) => open,
        Err(e) => return give_up(dir, fork, e),
    };
    let ready = || -> Result<ForkRow> {
        freeze_others(dir, fork, volumes)?;
        match if live.is_empty() { Vec::new() } else { steps.ready()? } {
            names if names.is_empty() => Ok(fork.clone()),
            names => {
                let renamed = children.rename(fork, names, &ahead)?;
                steps.begun(&renamed);
                Ok(renamed)
            }
        }
    };
    let cut = ready().and_then(|fork| Ok((fork, at_one_instant(&live, then)?)));
    let fork = match cut {
        Ok((fork, cut)) if !live.is_empty() => {
            let pause = cut.pause;
            at_cut(cut);
            ahead.iter_mut().for_each(Ahead::begin);
            steps.at_cut(pause);
            fork
        }
        Ok((fork, _)) => fork,
        Err(e) => {
            ahead.into_iter().for_each(|child| child.give_up(&e));
            return give_up(dir, fork, e);
        }
    };
    go_on(dir, fork, live, ahead)
}

/// Step 4, and what becomes of disks that have gone on when it fails.
fn go_on(
    dir: &StoreDir,
    fork: ForkRow,
    live: Vec<Live<'_>>,
    ahead: Vec<Ahead>,
) -> Result<(ForkRow, Vec<Ahead>)> {
    let crossings: Vec<Crossing> = live.into_iter().map(|disk| disk.crossing).collect();
    match settle(dir, &fork, &crossings, &ahead) {
        Ok(true) => Ok((fork, ahead)),
        Ok(false) => {
            let e = not_all_frozen();
            ahead.into_iter().for_each(|child| child.give_up(&e));
            Err(e)
        }
        Err(e) => {
            let why = || Error::new(e.kind(), format!("its fork failed: {e}"));
            crossings.iter().for_each(|crossing| crossing.next().give_up(why()));
            ahead.into_iter().for_each(|child| child.give_up(&why()));
            Err(e)
        }
    }
}

/// Ends a fork whose instant did not come. Disks that nobody serves may be frozen: they go on.
fn give_up<T>(dir: &StoreDir, fork: &ForkRow, error: Error) -> Result<T> {
    dir.settle_fork(fork, &[]).and(Err(error))
}

/// Step 1: both kinds of drafts at the same time, which somebody waits for.
fn open<'a>(
    dir: &StoreDir,
    fork: &ForkRow,
    volumes: &'a Volumes,
    children: &dyn Children,
) -> Result<(Vec<Live<'a>>, Vec<Ahead>)> {
    let mut live = Ok(Vec::new());
    // What takes longer is done here: the end of a thread takes its time, too.
    let ahead = std::thread::scope(|s| {
        s.spawn(|| live = begin(dir, fork, volumes));
        children.open()
    });
    match (live, ahead) {
        (Ok(live), Ok(ahead)) => Ok((live, ahead)),
        (Err(e), ahead) => {
            ahead.into_iter().flatten().for_each(|child| child.give_up(&e));
            Err(e)
        }
        (Ok(_), Err(e)) => Err(e),
    }
}

/// Opens the successors.
fn begin<'a>(dir: &StoreDir, fork: &ForkRow, volumes: &'a Volumes) -> Result<Vec<Live<'a>>> {
    let begin = |forked: &Forked| {
        let Some(volume) = volumes.get(&forked.name) else { return Ok(None) };
        let old = volume.disk();
        old.prepare_freeze()?;
        let crossing = volume.begin_crossing(dir, forked)?;
        Ok(Some(Live { volume, old, crossing }))
    };
    let live: Result<Vec<_>> =
        side_by_side(fork.disks.iter().collect(), begin).into_iter().collect();
    Ok(live?.into_iter().flatten().collect())
}

/// Freezes the disks that nobody serves. All drafts are open that will be: from here on they count.
fn freeze_others(dir: &StoreDir, fork: &ForkRow, volumes: &Volumes) -> Result<()> {
    let is_other = |forked: &&Forked| !volumes.contains_key(&forked.name);
    let others: Vec<&Forked> = fork.disks.iter().filter(is_other).collect();
    if others.is_empty() {
        return Ok(());
    }
    dir.confirm_fork(fork)?;
    let freeze = |forked: &Forked| dir.freeze(forked, &dir.disk_options());
    side_by_side(others, freeze).into_iter().collect()
}

/// Steps 2 and 3.
fn at_one_instant(live: &[Live<'_>], then: Then) -> Result<Cut> {
    let began = Instant::now();
    live.iter().for_each(|disk| disk.old.shut());
    let gates: Result<Vec<Closed<'_>>> =
        live.iter().map(|disk| disk.old.pause(DRAIN_MAX)).collect();
    let gates = gates.inspect_err(|_| live.iter().for_each(|disk| disk.old.let_in()))?;
    live.iter().for_each(|disk| disk.crossing.cross());
    let held = match then {
        Then::GoOn => Vec::new(),
        // Held before anybody can get at them.
        Then::Hold => live.iter().map(|disk| HeldDisk::of(disk.crossing.next())).collect(),
    };
    live.iter().for_each(|disk| disk.volume.go_on(disk.crossing.next()));
    gates.into_iter().for_each(Closed::leave);
    Ok(Cut { pause: began.elapsed(), held })
}

/// Step 4. Returns whether there are children.
fn settle(dir: &StoreDir, fork: &ForkRow, crossings: &[Crossing], ahead: &[Ahead]) -> Result<bool> {
    let all: Vec<&Crossing> = crossings.iter().chain(ahead.iter().map(Ahead::crossing)).collect();
    let until = Instant::now() + NO_SPACE_MAX;
    let mut told = false;
    let freeze = || {
        dir.confirm_fork(fork)?;
        let frozen = side_by_side(crossings.iter().collect(), |crossing| crossing.freeze(dir));
        frozen.into_iter().collect::<Result<()>>()
    };
    loop {
        match freeze().and_then(|()| dir.settle_fork(fork, &all)) {
            Err(error) if error.kind() == Kind::NoSpace && Instant::now() < until => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "a fork waits for space on the host");
                }
                std::thread::sleep(NO_SPACE_WAIT);
            }
            outcome => return outcome,
        }
    }
}
