//! The connection of one disk to blockd.
//!
//! A connection that breaks is made again for as long as the machine runs. Requests stay in the
//! ring meanwhile, and the in-flight area tells the next blockd which of them the last one had
//! begun: nothing is lost and nothing is answered twice.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Context, Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost_blk::blk::F_CONFIG_WCE;
use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};
use vhost_blk::proto::feature;
use vhost_blk::queue::F_INDIRECT_DESC;

use super::arena::{CHUNK, CHUNKS};
use crate::http::SEE_BLOCKD;

/// Requests that blockd can have at once.
pub(super) const DEPTH: u16 = CHUNKS;
/// Bytes of configuration space that matter: up to the limits of write zeroes.
pub(super) const SPACE: usize = 60;

/// How long to wait before the next attempt to connect: at first, and at most.
pub(super) const RETRY: (Duration, Duration) =
    (Duration::from_millis(5), Duration::from_millis(200));

/// What to sleep on besides doorbells.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) socket: OwnedFd,
    pub(super) channel: Option<OwnedFd>,
}

/// What became of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tended {
    /// Nothing new.
    Same,
    /// blockd says that the configuration changed, or may have because it was away.
    Changed,
}

/// Control and queue of one disk.
pub(super) struct Link {
    path: PathBuf,
    client: Client,
    pub(super) queue: ClientQueue,
    sources: Arc<Sources>,
    /// When to try again, and how long to wait after that; `None` while connected.
    down: Option<(Instant, Duration)>,
    problem: Option<Error>,
}

impl Link {
    /// Connects.
    ///
    /// # Errors
    /// When nobody serves the disk there, or not as needed.
    pub(super) fn connect(path: &Path) -> Result<Link> {
        let connect = || -> Result<Link> {
            let options = Options {
                queue_size: DEPTH,
                data_size: u64::from(CHUNKS) * u64::from(CHUNK),
                first_config: SPACE,
                ..Options::default()
            };
            let (client, mut queues) = Client::connect(path, options)?;
            let survives = client.protocol() & feature::INFLIGHT_SHMFD != 0;
            let (1, true, true) =
                (queues.len(), survives, client.features() & F_INDIRECT_DESC != 0)
            else {
                let reason = "it lacks the in-flight area or indirect descriptors";
                return Err(Error::new(Kind::Unsupported, reason));
            };
            let (socket, channel) = client.sources()?;
            Ok(Link {
                path: path.to_owned(),
                client,
                queue: queues.remove(0),
                sources: Arc::new(Sources { socket, channel }),
                down: None,
                problem: None,
            })
        };
        let connected = connect().context("connect to the disk at", || path.display().to_string());
        connected.map_err(|e| if e.kind() == Kind::Io { e.hint(SEE_BLOCKD) } else { e })
    }

    /// Negotiated features: what the disk can do.
    pub(super) fn features(&self) -> u64 {
        self.client.features()
    }

    /// The configuration space as blockd had it when this connected.
    pub(super) fn first_space(&self) -> [u8; SPACE] {
        self.client.first_config().try_into().expect("as many bytes as were asked for")
    }

    /// The configuration space as blockd has it now.
    pub(super) fn space(&mut self) -> Result<[u8; SPACE]> {
        let mut space = [0; SPACE];
        self.client.config(0, &mut space)?;
        Ok(space)
    }

    /// Has blockd run in write-back mode, whatever an earlier guest of this disk has chosen.
    pub(super) fn use_write_back(&mut self) -> Result<()> {
        let switch = self.features() & F_CONFIG_WCE != 0;
        if switch { self.client.set_write_cache(true) } else { Ok(()) }
    }

    pub(super) fn is_up(&self) -> bool {
        self.down.is_none()
    }

    /// Why there is no connection, if there is none.
    pub(super) fn problem(&self) -> Option<&Error> {
        self.problem.as_ref().filter(|_| self.down.is_some())
    }

    /// What to sleep on, if connected; else, until when.
    pub(super) fn sleep_on(&self) -> (Option<Arc<Sources>>, Option<Instant>) {
        match self.down {
            None => (Some(self.sources.clone()), None),
            Some((next, _)) => (None, Some(next)),
        }
    }

    /// Puts a request into the ring; `false` when it is full.
    pub(super) fn submit(&mut self, op: Op<'_>, offset: u64, spans: &[Span], token: u64) -> bool {
        self.queue.submit(op, offset, spans, token).is_ok()
    }

    /// Looks after the connection: notices that blockd is gone, connects again when it is time.
    pub(super) fn tend(&mut self) -> Tended {
        match self.down {
            None if readable(&self.sources.socket) => {
                self.down = Some((Instant::now(), RETRY.0));
                self.tend()
            }
            None => self.announced(),
            Some((next, _)) if Instant::now() < next => Tended::Same,
            Some((_, wait)) => match self.connect_again() {
                Ok(()) => Tended::Changed,
                Err(e) => {
                    self.problem = Some(e);
                    self.down = Some((Instant::now() + wait, (wait * 2).min(RETRY.1)));
                    Tended::Same
                }
            },
        }
    }

    fn connect_again(&mut self) -> Result<()> {
        self.client.reconnect(&self.path)?;
        let (socket, channel) = self.client.sources()?;
        self.sources = Arc::new(Sources { socket, channel });
        (self.down, self.problem) = (None, None);
        Ok(())
    }

    fn announced(&mut self) -> Tended {
        if !self.sources.channel.as_ref().is_some_and(readable) {
            return Tended::Same;
        }
        match self.client.config_changed(0) {
            Ok(true) => Tended::Changed,
            // Half a message is not worth a connection, but a channel that is at its end, or where
            // something else arrives, would wake us for ever.
            Ok(false) | Err(_) => {
                if let Ok((socket, _)) = self.client.sources() {
                    self.sources = Arc::new(Sources { socket, channel: None });
                }
                Tended::Same
            }
        }
    }
}

/// Whether there is something to read from `fd`, or its other end is gone.
pub(super) fn readable(fd: &OwnedFd) -> bool {
    is_readable_in(fd, Duration::ZERO)
}

/// As [`readable`], within some time.
pub(super) fn is_readable_in(fd: &OwnedFd, time: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let Ok(time) = Timespec::try_from(time) else { return false };
    matches!(poll(&mut fds, Some(&time)), Ok(n) if n > 0)
}
