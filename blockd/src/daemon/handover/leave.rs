//! The side that is in charge, and goes.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use format::{Context as _, Error, Kind, Result};

use super::super::Daemon;
use super::super::doors::Door;
use super::super::holds::{Hold, PATIENCE};
use super::super::served::{Kept, Served};
use super::{Free, HandedDisk, Hello, LAYOUT, Progress, State};
use crate::api::types::{EventKind, ExportKind, HandOver, HandedOver};
use crate::disk::Vouched;
use crate::messages;
use crate::side_by_side::side_by_side;
use crate::sockets::Peer;

/// How long a successor may take for its first word.
const HELLO_MAX: Duration = Duration::from_secs(10);

const GOES_ON: &str = "this daemon goes on; the log of the new one says more";
const GIVEN_BACK: &str = "a successor ended before it served, and this daemon goes on";

/// A disk that was left: how that went, and what goes over.
struct Left {
    name: String,
    outcome: Result<()>,
    /// Nobody else gets the disk before it is clear who goes on with it.
    hold: Hold,
    handed: HandedDisk,
}

/// Stops serving a disk and leaves it as a killed process would.
fn leave((name, served): (String, Served)) -> Left {
    let attachment = served.attachment();
    let Served { doors, volume, hold, .. } = served;
    let doors = doors.into_iter().map(Door::hand_over).collect();
    // What waits for space goes on waiting, at the successor.
    let left = volume.hand_on();
    let vouched = *left.as_ref().unwrap_or(&Vouched::Nothing);
    let outcome = left.map(drop);
    Left { name, outcome, hold, handed: HandedDisk { attachment, vouched, doors } }
}

fn all_left(left: &[Left]) -> Result<()> {
    let failed = left.iter().find_map(|l| Some((l, l.outcome.as_ref().err()?)));
    failed.map_or(Ok(()), |(left, e)| {
        Err(Error::new(e.kind(), e.to_string()).on(format!("disk {}", left.name)))
    })
}

/// Waits until the successor has got so far.
fn expect(successor: &UnixStream, step: Progress) -> Result<()> {
    match messages::receive::<Progress>(successor)? {
        (told, _) if told == step => Ok(()),
        (told, _) => Err(Error::corrupt(format!("the successor tells of {told:?} too early"))),
    }
}

/// Connects to a successor that waits.
fn greet(path: &Path) -> Result<(UnixStream, Hello)> {
    let socket = UnixStream::connect(path).context("connect to", || path.display().to_string())?;
    let peer = Peer::of(&socket)?;
    if !peer.is_trusted() {
        return Err(Error::invalid(format!("a process of user {} waits there", peer.uid)));
    }
    socket.set_read_timeout(Some(HELLO_MAX))?;
    let (hello, _) = messages::receive::<Hello>(&socket)?;
    socket.set_read_timeout(None)?;
    if !hello.layouts.contains(&LAYOUT) {
        let reason = format!("version {} does not take over from this one", hello.version);
        return Err(Error::new(Kind::Unsupported, reason)
            .hint("stop the daemon and start the new one: guests connect again by themselves"));
    }
    Ok((socket, hello))
}

impl Daemon {
    /// Hands everything to the successor that waits at a socket. When this succeeds the daemon has
    /// nothing any more, and is asked to stop; when it fails the daemon goes on as before.
    ///
    /// # Errors
    /// `Busy` or `InUse` when somebody would be cut off who need not be, unless forced;
    /// `Unsupported` under a service manager, or when the successor speaks another language; what
    /// kept the successor from opening the store or a disk is in its own log.
    pub fn hand_over(&self, request: &HandOver) -> Result<HandedOver> {
        let go = || -> Result<HandedOver> {
            if std::env::var_os("NOTIFY_SOCKET").is_some() {
                let reason = "a service manager would lose the process that it watches";
                return Err(Error::new(Kind::Unsupported, reason)
                    .hint("restart the service: guests wait and connect again by themselves"));
            }
            let (successor, hello) = greet(&request.socket)?;
            let _changing = self.service.changing.lock();
            self.check_quiet(request.force)?;
            let served = self.table().served.keys().cloned().collect();
            let _closed = self.holds.close(&served)?;
            self.each_door(Door::pause_nbd);
            let ready = self.close_dir().and_then(|()| {
                messages::send(&successor, &Free, &[])?;
                expect(&successor, Progress::Ready)
            });
            if let Err(error) = ready {
                self.reopen_dir();
                self.resume_nbd();
                return Err(error.hint(GOES_ON));
            }
            self.prepare_disks();
            self.hand_over_to(&successor, &hello)
        };
        go().context("hand over", || format!("store {}", self.path.display()))
    }

    /// Refuses to cut off somebody who cannot simply go on at the successor.
    fn check_quiet(&self, force: bool) -> Result<()> {
        if force {
            self.jobs.suspend_all();
            self.end_all_sessions();
            return Ok(());
        }
        let hint = "wait for it, or say --force";
        self.jobs.suspend_resumable();
        if self.jobs.running() > 0 {
            let reason = format!("{} jobs are running", self.jobs.running());
            return Err(Error::new(Kind::Busy, reason).hint(hint));
        }
        let exports = self.exports();
        match exports.iter().find(|e| e.kind == ExportKind::Nbd && e.connected > 0) {
            Some(export) => {
                let reason = format!("an NBD client is connected to {}", export.socket);
                Err(Error::new(Kind::InUse, reason).hint(hint))
            }
            None => Ok(()),
        }
    }

    /// Does what the successor would have to do while guests wait.
    fn prepare_disks(&self) {
        let volumes: Vec<_> =
            self.table().served.values().map(|served| Arc::clone(&served.volume)).collect();
        side_by_side(volumes, |volume| {
            if let Err(error) = volume.disk().prepare_hand_on() {
                // The successor replays more, and syncs.
                tracing::debug!(disk = volume.name(), %error, "not prepared for a handover");
            }
        });
    }

    fn hand_over_to(&self, successor: &UnixStream, hello: &Hello) -> Result<HandedOver> {
        let began = Instant::now();
        let served = std::mem::take(&mut self.table().served);
        let left = side_by_side(served.into_iter().collect(), leave);
        let disks_left = began.elapsed();
        let told = all_left(&left).and_then(|()| self.tell(successor, &left));
        let opened = began.elapsed();
        if let Err(error) = told {
            self.take_back(left);
            return Err(error.hint(GOES_ON));
        }
        // The store is the successor's, whatever comes: no way back.
        self.handed_over.store(true, Ordering::Release); // pairs with `has_handed_over`
        let (disks, front_ends) =
            left.iter().fold((0, 0), |(d, f), l| (d + 1, f + l.handed.front_ends()));
        let serving = messages::receive::<Progress>(successor);
        let blackout = began.elapsed();
        tracing::info!(?disks_left, ?opened, serving = ?blackout, "handed over");
        self.stop();
        match serving {
            Ok((Progress::Serving, _)) => Ok(HandedOver {
                version: hello.version.clone(),
                disks,
                front_ends,
                blackout_us: u64::try_from(blackout.as_micros()).unwrap_or(u64::MAX),
            }),
            _ => Err(Error::new(Kind::Failed, "the successor ended after it had taken the store")
                .hint("start a daemon: guests connect again by themselves")),
        }
    }

    fn each_door(&self, work: impl Fn(&mut Door)) {
        self.table().served.values_mut().flat_map(|s| &mut s.doors).for_each(work);
    }

    /// Closes the store; disks that are open stay so.
    fn close_dir(&self) -> Result<()> {
        let Some(mut dir) = self.dir.write().take() else { return Ok(()) };
        let until = Instant::now() + PATIENCE;
        // Requests that only look at the catalogue hold no name, and are soon done.
        while Instant::now() < until {
            match Arc::try_unwrap(dir) {
                Ok(dir) => {
                    drop(dir);
                    return Ok(());
                }
                Err(shared) => dir = shared,
            }
            std::thread::sleep(PATIENCE / 1000);
        }
        *self.dir.write() = Some(dir);
        Err(Error::new(Kind::Busy, "a request still uses the store"))
    }

    /// Tells the successor what it gets, and waits until it has it.
    fn tell(&self, successor: &UnixStream, left: &[Left]) -> Result<()> {
        let state = State {
            version: env!("CARGO_PKG_VERSION").into(),
            event: *self.events.follow().borrow(),
            disks: left.iter().map(|l| l.handed.describe()).collect(),
        };
        let control = self.control.get();
        let control =
            control.ok_or_else(|| Error::new(Kind::Failed, "nobody serves the control"))?;
        let files: Vec<_> = std::iter::once(control.as_fd())
            .chain(left.iter().flat_map(|l| l.handed.files()))
            .collect();
        messages::send(successor, &state, &files)?;
        expect(successor, Progress::Opened)
    }

    fn reopen_dir(&self) {
        if self.dir.read().is_none() {
            match Daemon::open_dir(&self.path, self.cache) {
                Ok(dir) => *self.dir.write() = Some(Arc::new(dir)),
                Err(error) => tracing::error!(%error, "the store is lost to this daemon"),
            }
        }
        self.events.add(EventKind::Failed, format!("store {}", self.path.display()), GIVEN_BACK);
    }

    fn resume_nbd(&self) {
        let Ok(dir) = self.dir() else { return };
        for (name, served) in &mut self.table().served {
            for door in &mut served.doors {
                let served_before = door.failure().is_none();
                door.resume_nbd(&dir, &served.volume);
                if served_before {
                    self.tell_of_failure(name, door);
                }
            }
        }
    }

    /// Goes on serving: the successor ended before it had the disks.
    fn take_back(&self, left: Vec<Left>) {
        self.reopen_dir();
        for Left { name, hold, handed, .. } in left {
            let HandedDisk { attachment, vouched, doors } = handed;
            let kept = Kept { hold: Some(hold), vouched };
            let served = self.open_again(&name, &attachment, kept);
            self.go_on(&name, served, attachment, doors);
        }
    }
}
