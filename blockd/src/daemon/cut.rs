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
//! Steps 2 and 3 are an [`Upcoming`], which whoever says the word brings about itself: a machine
//! stands until it is told that they are done, and would wait for a thread to be woken besides.
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

use format::{Error, Result};

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
pub(super) enum Then {
    /// At once.
    GoOn,
    /// When whoever gets them lets them.
    Hold(Box<dyn FnOnce(Vec<HeldDisk>) + Send>),
}

/// Children that are served from the instant on.
pub(super) trait Children: Send + Sync {
    /// Opens them.
    ///
    /// # Errors
    /// When one cannot be opened; none is then.
    fn open(&self, fork: &ForkRow, volumes: &Volumes) -> Result<Vec<Ahead>>;

    /// Gives all children of a fork other names, in its order.
    ///
    /// # Errors
    /// When they cannot have them. There is to be no instant then.
    fn rename(&self, fork: &ForkRow, names: Vec<String>, ahead: &[Ahead]) -> Result<ForkRow>;
}

/// A disk in service that is being forked.
struct Live {
    volume: Arc<Volume>,
    old: Arc<Disk>,
    crossing: Crossing,
}

/// The instant of a fork that is ready for it.
pub(super) struct Upcoming {
    fork: ForkRow,
    live: Vec<Live>,
    ahead: Vec<Ahead>,
    children: Arc<dyn Children>,
    then: Then,
}

impl Upcoming {
    /// What will be made.
    pub(super) fn fork(&self) -> &ForkRow {
        &self.fork
    }

    /// Gives the children other names.
    ///
    /// # Errors
    /// As [`Children::rename`].
    pub(super) fn rename(&mut self, names: Vec<String>) -> Result<()> {
        self.fork = self.children.rename(&self.fork, names, &self.ahead)?;
        Ok(())
    }

    /// Brings the instant about: steps 2 and 3. Returns how long disks let nobody in.
    ///
    /// # Errors
    /// `Busy` when requests in work take longer than `drain_max`; the disks go on, and it may be
    /// tried again.
    pub(super) fn come(&mut self, drain_max: Duration) -> Result<Duration> {
        let (live, began) = (&self.live, Instant::now());
        live.iter().for_each(|disk| disk.old.shut());
        let gates: Result<Vec<Closed<'_>>> =
            live.iter().map(|disk| disk.old.pause(drain_max)).collect();
        let gates = gates.inspect_err(|_| live.iter().for_each(|disk| disk.old.let_in()))?;
        live.iter().for_each(|disk| disk.crossing.cross());
        let then = std::mem::replace(&mut self.then, Then::GoOn);
        let held: Vec<HeldDisk> = match then {
            Then::GoOn => Vec::new(),
            // Held before anybody can get at them.
            Then::Hold(_) => live.iter().map(|disk| HeldDisk::of(disk.crossing.next())).collect(),
        };
        live.iter().for_each(|disk| disk.volume.go_on(disk.crossing.next()));
        gates.into_iter().for_each(Closed::leave);
        let pause = began.elapsed();
        if let Then::Hold(keep) = then {
            keep(held);
        }
        self.ahead.iter_mut().for_each(Ahead::begin);
        Ok(pause)
    }

    /// One of no disks.
    #[cfg(test)]
    pub(super) fn of_nothing() -> Self {
        let (live, ahead, children) = (Vec::new(), Vec::new(), Arc::new(()));
        let fork = ForkRow { fork: uuid::Uuid::nil(), created: 0, disks: Vec::new() };
        Upcoming { fork, live, ahead, children, then: Then::GoOn }
    }
}

/// A fork that is done.
pub(super) struct Done {
    /// As it became.
    pub(super) fork: ForkRow,
    /// Its children that are served.
    pub(super) ahead: Vec<Ahead>,
    /// How long disks in service let nobody in, if there were any.
    pub(super) pause: Option<Duration>,
}

/// There are none.
impl Children for () {
    fn open(&self, _: &ForkRow, _: &Volumes) -> Result<Vec<Ahead>> {
        Ok(Vec::new())
    }

    fn rename(&self, _: &ForkRow, _: Vec<String>, _: &[Ahead]) -> Result<ForkRow> {
        Err(Error::invalid("it has no children that could be renamed"))
    }
}

/// Who follows a fork of disks in service.
pub(super) trait Steps {
    /// It is known what will be made.
    fn begun(&self, _fork: &ForkRow) {}

    /// All is ready for the instant. Sees to it that it comes, and gives it back with how long
    /// disks let nobody in; what is to be durable waits for this to return. An error when there is
    /// to be none, or it could not be.
    fn instant(&self, mut ready: Upcoming) -> (Upcoming, Result<Duration>) {
        let came = ready.come(DRAIN_MAX);
        (ready, came)
    }
}

/// Nobody follows it.
impl Steps for () {}

/// Forks disks that [`StoreDir::begin_fork`] has begun to fork: they are all frozen and have their
/// children afterwards, or none has. `children` are those that are served from the instant on.
pub(super) fn cut(
    (dir, fork): (&StoreDir, &ForkRow),
    volumes: &Volumes,
    then: Then,
    steps: &dyn Steps,
    children: Arc<dyn Children>,
) -> Result<Done> {
    let (live, ahead) = match open(dir, fork, volumes, &*children) {
        Ok(open) => open,
        Err(e) => return give_up(dir, fork, e),
    };
    let ready = Upcoming { fork: fork.clone(), live, ahead, children, then };
    let (Upcoming { fork, live, ahead, .. }, came) = match freeze_others(dir, fork, volumes) {
        Ok(()) if ready.live.is_empty() => (ready, Ok(None)),
        Ok(()) => {
            let (past, came) = steps.instant(ready);
            (past, came.map(Some))
        }
        Err(e) => (ready, Err(e)),
    };
    match came {
        Ok(pause) => {
            let ahead = go_on(dir, &fork, live, ahead)?;
            Ok(Done { fork, ahead, pause })
        }
        Err(e) => {
            ahead.into_iter().for_each(|child| child.give_up(&e));
            give_up(dir, &fork, e)
        }
    }
}

/// Step 4, and what becomes of disks that have gone on when it fails.
fn go_on(dir: &StoreDir, fork: &ForkRow, live: Vec<Live>, ahead: Vec<Ahead>) -> Result<Vec<Ahead>> {
    let crossings: Vec<Crossing> = live.into_iter().map(|disk| disk.crossing).collect();
    match settle(dir, fork, &crossings, &ahead) {
        Ok(true) => Ok(ahead),
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
fn open(
    dir: &StoreDir,
    fork: &ForkRow,
    volumes: &Volumes,
    children: &dyn Children,
) -> Result<(Vec<Live>, Vec<Ahead>)> {
    let mut live = Ok(Vec::new());
    // What takes longer is done here: the end of a thread takes its time, too.
    let ahead = std::thread::scope(|s| {
        s.spawn(|| live = begin(dir, fork, volumes));
        children.open(fork, volumes)
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
fn begin(dir: &StoreDir, fork: &ForkRow, volumes: &Volumes) -> Result<Vec<Live>> {
    let begin = |forked: &Forked| {
        let Some(volume) = volumes.get(&forked.name) else { return Ok(None) };
        let old = volume.disk();
        old.prepare_freeze()?;
        let crossing = volume.begin_crossing(dir, forked)?;
        Ok(Some(Live { volume: Arc::clone(volume), old, crossing }))
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
            Err(error) if error.kind().may_pass() && Instant::now() < until => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "a fork waits for the host");
                }
                std::thread::sleep(NO_SPACE_WAIT);
            }
            outcome => return outcome,
        }
    }
}
