//! Tokens name the cut of a fork: whose disks are held at that instant until somebody says go, or
//! which is made durable while who asked for it goes on.
//!
//! Who forks a machine takes its memory at the same instant as its disks. It asks for a fork that
//! holds, takes the memory while no request of the machine is begun, and releases the token; a
//! token that nobody releases runs out, so that a machine never waits for one that died.
//!
//! Invariant: while disks are held their names are kept, so nobody forks, resizes or detaches them,
//! or hands the daemon over.
//!
//! Test: `fork_under_load` (`a_token_…`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;
use uuid::Uuid;

use super::Daemon;
use super::cut::Steps;
use super::holds::Hold;
use super::standing::{Standing, gave_way};
use crate::api::types::{
    CutFork, CutForks, EventKind, Failure, ForkedDisks, MadeChild, ReleasedFork,
};
use crate::catalogue::ForkRow;
use crate::disk::HeldDisk;

/// How long a token lasts at most.
const TOKEN_MAX: Duration = Duration::from_secs(60);

/// Disks that are held at the instant of a fork.
pub(super) struct Token {
    // Before the names: the disks go on when others may have them.
    _disks: Vec<HeldDisk>,
    since: Instant,
    _names: Arc<Vec<Hold>>,
}

/// All tokens that are out.
pub(super) type Tokens = Mutex<BTreeMap<Uuid, Token>>;

/// How long the outcome of a fork is kept at least for who asks.
const OUTCOME_KEPT: Duration = Duration::from_secs(600);

/// How long a fork that is ready waits for the word to cut.
const READY_MAX: Duration = Duration::from_secs(10);
/// How long after its instant a fork begins to be made durable that nobody waits for.
const UNWANTED_MAX: Duration = Duration::from_millis(3);
/// How long one stands by that gives way to others.
const STANDBY_MAX: Duration = Duration::from_secs(600);

/// How far a fork is.
enum Stage {
    /// It is being prepared.
    Begun,
    /// Nothing is left to do before the instant.
    Ready,
    /// The instant is to be now, and the children are to have these names, if any are given.
    Go(Vec<String>),
    /// It is to end before its instant.
    GivenUp(fn() -> Error),
    /// The instant is past, for which disks in service let nobody in for so long; somebody waits
    /// for it to be durable, or not yet.
    Cut { pause: Duration, wanted: bool },
    /// It is durable, or failed.
    Ended(Instant, Result<ForkedDisks, Failure>),
}

/// A fork that is answered before it is durable.
///
/// Who asks about it is no thread: a machine stands until it is told of its cut, and would wait for
/// a thread to be woken and scheduled besides.
pub(super) struct Going {
    stage: Mutex<Stage>,
    /// For those who ask.
    changed: Notify,
    /// For the fork itself, which waits for the word.
    said: Condvar,
    children: Mutex<Vec<MadeChild>>,
    waits: Waits,
}

/// Whether a fork that is ready waits for the word to cut.
pub(super) enum Waits {
    /// It does not.
    No,
    /// For one that is about to come; others wait meanwhile.
    Shortly,
    /// For one that may come; it gives way to others.
    StandsBy(Arc<Standing>),
}

impl Going {
    /// One that cuts as soon as it is ready, or waits for the word.
    pub(super) fn new(waits: Waits) -> Arc<Self> {
        Arc::new(Going {
            stage: Mutex::new(Stage::Begun),
            changed: Notify::new(),
            said: Condvar::new(),
            children: Mutex::default(),
            waits,
        })
    }

    /// Has a fork end that is ready, for somebody who wants what it holds. One that has had the
    /// word is about to end by itself.
    pub(super) fn give_way(&self) {
        self.give_up(gave_way);
    }

    /// Whether it is given up: its instant has not come.
    fn give_up(&self, why: fn() -> Error) -> bool {
        let mut stage = self.stage.lock();
        let ready = matches!(*stage, Stage::Ready);
        if ready {
            *stage = Stage::GivenUp(why);
            self.said.notify_all();
        }
        ready
    }

    /// How it is: ready, or past its instant.
    pub(super) fn describe(&self, token: Uuid, pause: Option<Duration>) -> CutForks {
        let pause_us = pause.and_then(|pause| u64::try_from(pause.as_micros()).ok());
        CutForks { token, pause_us, children: self.children.lock().clone() }
    }

    fn set(&self, stage: Stage) {
        *self.stage.lock() = stage;
        self.changed.notify_waiters();
    }

    /// It has ended.
    pub(super) fn end(&self, outcome: Result<ForkedDisks>) {
        self.set(Stage::Ended(Instant::now(), outcome.map_err(|e| Failure::from(&e))));
    }

    /// What `wanted` says; the failure of a fork that ended before.
    fn look<T>(&self, wanted: fn(&Stage) -> Option<T>) -> Option<Result<T>> {
        let stage = self.stage.lock();
        let ended = || match &*stage {
            Stage::Ended(_, Err(failure)) => Some(Err(Error::from(failure.clone()))),
            Stage::Ended(_, Ok(_)) => Some(Err(Error::invalid("its instant is past"))),
            _ => None,
        };
        wanted(&stage).map(Ok).or_else(ended)
    }

    /// Waits until `wanted` says something; the failure of a fork that ended before.
    async fn wait<T>(&self, wanted: fn(&Stage) -> Option<T>) -> Result<T> {
        loop {
            // Before the look: a change behind it is not missed.
            let changed = self.changed.notified();
            if let Some(found) = self.look(wanted) {
                return found;
            }
            changed.await;
        }
    }

    /// Waits until it is ready.
    pub(super) async fn wait_ready(&self) -> Result<()> {
        self.wait(|stage| {
            matches!(stage, Stage::Ready | Stage::Go(_) | Stage::Cut { .. }).then_some(())
        })
        .await
    }

    /// Waits until its instant is past.
    pub(super) async fn wait_cut(&self) -> Result<Duration> {
        self.wait(|stage| match stage {
            Stage::Cut { pause, .. } => Some(*pause),
            Stage::Ended(_, Ok(forked)) => forked.pause_us.map(Duration::from_micros),
            _ => None,
        })
        .await
    }

    async fn wait_ended(&self) -> Result<ForkedDisks> {
        if let Stage::Cut { wanted, .. } = &mut *self.stage.lock() {
            *wanted = true;
            self.said.notify_all();
        }
        self.wait(|stage| match stage {
            Stage::Ended(_, Ok(forked)) => Some(forked.clone()),
            _ => None,
        })
        .await
    }

    fn is_old(&self) -> bool {
        matches!(&*self.stage.lock(), Stage::Ended(since, _) if since.elapsed() > OUTCOME_KEPT)
    }
}

/// The children of a fork, in the order in which they were asked for.
fn made(fork: &ForkRow) -> Vec<MadeChild> {
    let children = fork.disks.iter().flat_map(|forked| &forked.children);
    children.map(|c| MadeChild { name: c.name.clone(), disk: c.disk }).collect()
}

impl Steps for Arc<Going> {
    fn begun(&self, fork: &ForkRow) {
        *self.children.lock() = made(fork);
    }

    fn ready(&self) -> Result<Vec<String>> {
        self.set(Stage::Ready);
        let (_stands, lasts) = match &self.waits {
            Waits::No => return Ok(Vec::new()),
            Waits::Shortly => (None, READY_MAX),
            Waits::StandsBy(standing) => (Some(standing.stand_by(self)?), STANDBY_MAX),
        };
        let until = Instant::now() + lasts;
        let mut stage = self.stage.lock();
        loop {
            match &mut *stage {
                Stage::Go(names) => return Ok(std::mem::take(names)),
                Stage::GivenUp(why) => return Err(why()),
                _ => {}
            }
            if self.said.wait_until(&mut stage, until).timed_out() {
                let reason = format!("nobody said when, for {} s", lasts.as_secs());
                return Err(Error::new(Kind::Cancelled, reason));
            }
        }
    }

    /// Whoever had a fork stand by wants a machine to go on soon that is filled with what was cut,
    /// and needs the processors for that now; making the fork durable takes them, too. So that
    /// begins when it is waited for. Other forks are the sooner done the sooner it begins.
    fn at_cut(&self, pause: Duration) {
        let wanted = !matches!(self.waits, Waits::StandsBy(_));
        self.set(Stage::Cut { pause, wanted });
        let until = Instant::now() + UNWANTED_MAX;
        let mut stage = self.stage.lock();
        while matches!(*stage, Stage::Cut { wanted: false, .. }) {
            if self.said.wait_until(&mut stage, until).timed_out() {
                return;
            }
        }
    }
}

/// All forks that are answered before they are durable, and for a while those that were.
pub(super) type Outcomes = Mutex<BTreeMap<Uuid, Arc<Going>>>;

/// How long to hold, from milliseconds that were asked for.
///
/// # Errors
/// `Invalid` when it is too long, or nothing.
pub(super) fn lasting(ms: u64) -> Result<Duration> {
    let asked = Duration::from_millis(ms);
    if asked.is_zero() || asked > TOKEN_MAX {
        let reason = format!("a fork is held for 1 ms to {} s", TOKEN_MAX.as_secs());
        return Err(Error::invalid(reason));
    }
    Ok(asked)
}

impl Daemon {
    /// Keeps what is to come of a fork, and forgets what is old.
    pub(super) fn keep_going(&self, token: Uuid, going: &Arc<Going>) {
        let mut outcomes = self.outcomes.lock();
        outcomes.retain(|_, going| !going.is_old());
        outcomes.insert(token, Arc::clone(going));
    }

    fn going(&self, token: Uuid, tried: &'static str) -> Result<Arc<Going>> {
        let found = self.outcomes.lock().get(&token).map(Arc::clone);
        found.ok_or_else(|| {
            Error::new(Kind::NotFound, "there is no such token, or it is long past")
                .tried(tried)
                .on(format!("token {token}"))
        })
    }

    /// The instant of a fork that is ready is now.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when it is past; `Cancelled` when nobody came for too long, or when it
    /// has given way; as [`Daemon::fork`]; `Exists` or `Invalid` for a name.
    pub async fn cut_now(&self, token: Uuid, request: CutFork) -> Result<CutForks> {
        let going = self.going(token, "cut")?;
        {
            let mut stage = going.stage.lock();
            match &*stage {
                Stage::Ready => *stage = Stage::Go(request.children),
                Stage::Ended(..) | Stage::GivenUp(_) => {}
                _ => return Err(Error::invalid("it is past, or not ready").tried("cut")),
            }
        }
        going.said.notify_all();
        let pause = going.wait_cut().await?;
        Ok(going.describe(token, Some(pause)))
    }

    /// Gives up a fork that is ready: its instant has not come.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when its instant is past.
    pub fn give_up_fork(&self, token: Uuid) -> Result<()> {
        let given_up = || Error::new(Kind::Cancelled, "it was given up before its instant");
        match self.going(token, "give up")?.give_up(given_up) {
            true => Ok(()),
            false => Err(Error::invalid("its instant is past").tried("give up")),
        }
    }

    /// Waits until a fork that was answered before is durable.
    ///
    /// # Errors
    /// `NotFound` when there is no such token, or it is long past; as [`Daemon::fork`].
    pub async fn forked(&self, token: Uuid) -> Result<ForkedDisks> {
        self.going(token, "wait for")?.wait_ended().await
    }

    /// Whether disks are held under a token.
    pub(super) fn is_held(&self, token: Uuid) -> bool {
        self.tokens.lock().contains_key(&token)
    }

    /// Keeps disks held under a token for as long as that at most.
    pub(super) fn keep_held(
        self: &Arc<Self>,
        id: Uuid,
        disks: Vec<HeldDisk>,
        names: Arc<Vec<Hold>>,
        lasts: Duration,
    ) {
        let token = Token { _disks: disks, since: Instant::now(), _names: names };
        self.tokens.lock().insert(id, token);
        let daemon = Arc::clone(self);
        let ends = move || {
            std::thread::sleep(lasts);
            let ran_out = daemon.tokens.lock().remove(&id);
            if let Some(ran_out) = ran_out {
                let detail = format!("token {id} ran out after {} ms", lasts.as_millis());
                daemon.events.add(EventKind::Released, "fork", detail);
                drop(ran_out);
                daemon.go_on_in_background();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("token".into()).spawn(ends) {
            // Without a thread nobody would end it.
            tracing::warn!(%error, "a fork is not held");
            self.tokens.lock().remove(&id);
        }
    }

    /// Lets the disks of a token go on.
    ///
    /// # Errors
    /// `NotFound` when there is no such token, or it has run out.
    pub fn release(self: &Arc<Self>, id: Uuid) -> Result<ReleasedFork> {
        let token = self.tokens.lock().remove(&id).ok_or_else(|| {
            Error::new(Kind::NotFound, "there is no such token: it was released, or ran out")
                .tried("release")
                .on(format!("token {id}"))
                .hint("the children are there; take the memory of the machine anew")
        })?;
        let held_us = u64::try_from(token.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        drop(token);
        self.events.add(EventKind::Released, "fork", format!("token {id} after {held_us} µs"));
        self.go_on_in_background();
        Ok(ReleasedFork { token: id, held_us })
    }

    /// Lets all held disks go on.
    pub(super) fn release_all(&self) {
        self.tokens.lock().clear();
    }
}
