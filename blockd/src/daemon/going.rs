//! Forks that are answered before they are durable: how far each of them is, and the word to cut.
//!
//! A fork is a thread. Who asks about it is none: a machine stands until it is told of its cut, and
//! would wait for a thread to be woken and scheduled. For the same reason whoever says the word
//! brings the instant about itself, if nothing has to be waited for (`cut.rs`, `Upcoming`); else
//! the thread does it. What is to be durable behind the instant is the thread's in either case.
//!
//! Invariant: `upcoming` is there from `Ready` until the thread takes it back, which it does in no
//! stage but `Back` and `Cut`; who moves the stage from `Ready` to `Coming` has it alone.
//!
//! Lock order: `upcoming`, then those of the daemon's tables; `stage` and `children` are leaves.
//!
//! Tests: `fork_served`, `fork_under_load`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;
use uuid::Uuid;

use super::Daemon;
use super::cut::{DRAIN_MAX, Steps, Upcoming};
use super::standing::{Standing, gave_way};
use crate::api::types::{CutFork, CutForks, Failure, ForkedDisks, MadeChild};
use crate::catalogue::ForkRow;

/// How long the outcome of a fork is kept at least for who asks.
const OUTCOME_KEPT: Duration = Duration::from_secs(600);

/// With fewer outcomes than that nobody looks for old ones.
const LOOK_MIN: usize = 64;

/// How long a fork that is ready waits for the word to cut.
const READY_MAX: Duration = Duration::from_secs(10);
/// How long after its instant a fork begins to be made durable that nobody waits for.
const UNWANTED_MAX: Duration = Duration::from_millis(3);
/// How long who says the word waits for requests in work at most: others wait for its answers.
const AT_ONCE: Duration = Duration::from_micros(100);
/// How long one stands by that gives way to others.
const STANDBY_MAX: Duration = Duration::from_secs(600);

/// How far a fork is.
enum Stage {
    /// It is being prepared.
    Begun,
    /// Nothing is left to do before the instant.
    Ready,
    /// Somebody has said the word, and brings the instant about.
    Coming,
    /// It is for the fork itself to bring its instant about, or to end before it, for this reason.
    Back(Option<Error>),
    /// The instant is past, for which disks in service let nobody in for so long; somebody waits
    /// for it to be durable, or not yet.
    Cut { pause: Duration, wanted: bool },
    /// It is durable, or failed.
    Ended(Instant, Result<ForkedDisks, Failure>),
}

/// A fork that is answered before it is durable.
pub(super) struct Going {
    stage: Mutex<Stage>,
    /// For those who ask.
    changed: Notify,
    /// For the fork itself, which waits for the word.
    said: Condvar,
    children: Mutex<Vec<MadeChild>>,
    /// While it is ready, and until it is past or given up.
    upcoming: Mutex<Option<Upcoming>>,
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
            upcoming: Mutex::default(),
            waits,
        })
    }

    /// Has a fork end that is ready, for somebody who wants what it holds. One that has had the
    /// word is about to end by itself.
    pub(super) fn give_way(&self) {
        self.give_up(gave_way());
    }

    /// Whether it is given up: its instant has not come.
    fn give_up(&self, why: Error) -> bool {
        let mut stage = self.stage.lock();
        let ready = matches!(*stage, Stage::Ready);
        if ready {
            *stage = Stage::Back(Some(why));
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
            matches!(stage, Stage::Ready | Stage::Coming | Stage::Back(_) | Stage::Cut { .. })
                .then_some(())
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

    /// Has the rest be done of a fork whose instant is past.
    fn want(&self) {
        if let Stage::Cut { wanted: wanted @ false, .. } = &mut *self.stage.lock() {
            *wanted = true;
            self.said.notify_all();
        }
    }

    async fn wait_ended(&self) -> Result<ForkedDisks> {
        self.want();
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

    fn instant(&self, mut ready: Upcoming) -> (Upcoming, Result<Duration>) {
        let (standing, lasts) = match &self.waits {
            Waits::No => return self.bring_about(ready),
            Waits::Shortly => (None, READY_MAX),
            Waits::StandsBy(standing) => (Some(standing), STANDBY_MAX),
        };
        *self.upcoming.lock() = Some(ready);
        self.set(Stage::Ready);
        let stands = standing.map(|standing| standing.stand_by(self)).transpose();
        if stands.is_err() {
            self.give_way();
        }
        let word = self.wait_for_word(lasts);
        drop(stands);
        ready = self.upcoming.lock().take().expect("nobody else takes it away");
        match word {
            Ok(None) => self.bring_about(ready),
            Ok(Some(pause)) => (ready, Ok(pause)),
            Err(e) => (ready, Err(e)),
        }
    }
}

impl Going {
    /// By the fork itself.
    fn bring_about(&self, mut ready: Upcoming) -> (Upcoming, Result<Duration>) {
        let came = ready.come(DRAIN_MAX);
        if let Ok(pause) = came {
            self.set(Stage::Cut { pause, wanted: true });
        }
        (ready, came)
    }

    /// Waits until the instant is past and the rest is wanted, and returns how long disks let
    /// nobody in; or until it is for the fork itself to bring it about.
    fn wait_for_word(&self, lasts: Duration) -> Result<Option<Duration>> {
        let until = Instant::now() + lasts;
        let mut stage = self.stage.lock();
        loop {
            match &mut *stage {
                Stage::Back(error) => return error.take().map_or(Ok(None), Err),
                Stage::Cut { pause, wanted: true } => return Ok(Some(*pause)),
                Stage::Ready if Instant::now() >= until => {
                    let reason = format!("nobody said when, for {} s", lasts.as_secs());
                    *stage = Stage::Back(Some(Error::new(Kind::Cancelled, reason)));
                }
                Stage::Ready => _ = self.said.wait_until(&mut stage, until),
                // Whoever is at it, or is to want it, is not long.
                _ => self.said.wait(&mut stage),
            }
        }
    }

    /// Says the word, and brings the instant about unless that means to wait: then the fork does.
    fn say_word(self: &Arc<Self>, names: Vec<String>) -> Result<()> {
        {
            let mut stage = self.stage.lock();
            match *stage {
                Stage::Ready => *stage = Stage::Coming,
                Stage::Ended(..) | Stage::Back(_) => return Ok(()),
                _ => return Err(Error::invalid("it is past, or not ready").tried("cut")),
            }
        }
        let stage = self.bring_about_at_once(names).unwrap_or_else(|e| Stage::Back(Some(e)));
        let past = matches!(stage, Stage::Cut { .. });
        self.set(stage);
        match &self.waits {
            Waits::StandsBy(_) if past => self.want_later(),
            _ if past => self.want(),
            _ => _ = self.said.notify_all(),
        }
        Ok(())
    }

    /// Whoever had a fork stand by wants a machine to go on soon that is filled with what was cut,
    /// and needs the processors for that now; making the fork durable takes them, too. So that
    /// begins when it is waited for, or a little later. Other forks are the sooner done the sooner
    /// it begins.
    fn want_later(self: &Arc<Self>) {
        let later = WantedWhenDropped(Arc::clone(self));
        tokio::spawn(async move {
            tokio::time::sleep(UNWANTED_MAX).await;
            drop(later);
        });
    }

    fn bring_about_at_once(self: &Arc<Self>, names: Vec<String>) -> Result<Stage> {
        let mut upcoming = self.upcoming.lock();
        let ready = upcoming.as_mut().expect("it is there while a fork is ready");
        if !names.is_empty() {
            ready.rename(names)?;
            self.begun(ready.fork());
        }
        match ready.come(AT_ONCE) {
            Ok(pause) => Ok(Stage::Cut { pause, wanted: false }),
            // Requests are in work.
            Err(e) if e.kind() == Kind::Busy => Ok(Stage::Back(None)),
            Err(e) => Err(e),
        }
    }
}

/// The rest of a fork is to be done when this is dropped at the latest: the runtime may end.
struct WantedWhenDropped(Arc<Going>);

impl Drop for WantedWhenDropped {
    fn drop(&mut self) {
        self.0.want();
    }
}

/// All forks that are answered before they are durable, and for a while those that were.
#[derive(Default)]
pub(super) struct Outcomes(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    forks: BTreeMap<Uuid, Arc<Going>>,
    /// With so many of them, those that are old are looked for.
    look_at: usize,
}

impl Daemon {
    /// Keeps what is to come of a fork, and forgets what is old.
    pub(super) fn keep_going(&self, token: Uuid, going: &Arc<Going>) {
        let mut kept = self.outcomes.0.lock();
        if kept.forks.len() >= kept.look_at {
            kept.forks.retain(|_, going| !going.is_old());
            // Not at every fork: there may be many thousands.
            kept.look_at = 2 * kept.forks.len() + LOOK_MIN;
        }
        kept.forks.insert(token, Arc::clone(going));
    }

    fn going(&self, token: Uuid, tried: &'static str) -> Result<Arc<Going>> {
        let found = self.outcomes.0.lock().forks.get(&token).map(Arc::clone);
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
        going.say_word(request.children)?;
        let pause = going.wait_cut().await?;
        Ok(going.describe(token, Some(pause)))
    }

    /// Gives up a fork that is ready: its instant has not come.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when its instant is past.
    pub fn give_up_fork(&self, token: Uuid) -> Result<()> {
        let given_up = Error::new(Kind::Cancelled, "it was given up before its instant");
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
}
