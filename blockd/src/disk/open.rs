//! Opening and closing.
//!
//! Order of an opening for writing, and the crash it defends against:
//! 1. the tail's file exists before the superblock says that there is one — else a kill in between
//!    looks like a lost tail;
//! 2. all superblock copies hold the present state and are synced — else the flip could tear the
//!    only durable pair;
//! 3. the superblock flips to the next epoch before any journal page of that epoch is written —
//!    else replay would refuse pages whose flush completed.
//!
//! A draft of a fork is opened without the syncs of 2 and 3: the fork syncs it before it counts
//! (`storedir/confirm.rs`).
//!
//! Test: `crash_points` (operation `open`, and `cut`), `two_crash_domains`.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use arc_swap::ArcSwap;
use format::journal::RECORDS_PER_PAGE;
use format::space::ExtentRun;
use format::superblock::{Attached, JournalHead, State, Superblock};
use format::units::ExtentId;
use format::{Context, Error, Kind, Result};
use parking_lot::{Condvar, Mutex};

use super::claims::Claims;
use super::gate::IoGate;
use super::load::{Loaded, load, older};
use super::problem::Severity;
use super::succeed::Ground;
use super::tail::Tail;
use super::{Checkpoint, Commit, Core, Disk, FirstTime, Options, Tickets, Vouched};
use crate::segment::{self, Pair, Segments};
use crate::store::File;

/// Most records a tail holds: 6 MiB of memory. A little more than a quarter of the usual ring, so
/// that a guest that does not flush is left alone as long as can be.
pub(super) const TAIL_RECORDS_MAX: u64 = 131_072;

/// Records that a tail holds for a journal of `ring_pages` pages: a quarter of the ring, so that
/// what is in the tail always fits behind a checkpoint.
pub(super) fn tail_capacity(ring_pages: u64) -> u64 {
    (ring_pages * RECORDS_PER_PAGE as u64 / 4).min(TAIL_RECORDS_MAX)
}

impl Disk {
    /// Opens a disk for reading. Nothing is written; what a crash left is replayed in memory.
    ///
    /// # Errors
    /// When the content cannot be used, a parent is missing, or the host reports an error.
    pub fn open_read_only(
        file: Arc<dyn File>,
        segments: &dyn Segments,
        options: &Options,
    ) -> Result<Self> {
        let sb = segment::read_superblock(file.as_ref())?.superblock;
        let tail = left_tail(&sb, options)?;
        let loaded = load(&file, segments, tail.as_ref())?;
        let fatal = |p: &&super::Problem| {
            use super::problem::What;
            matches!(p.what, What::ParentMissing | What::ParentChanged | What::JournalLoss)
        };
        if let Some(problem) = loaded.problems.iter().find(fatal) {
            return Err(problem.to_error());
        }
        let tail = Tail::on_heap(sb.segment, 1, loaded.cursor.seq);
        Ok(Disk::assemble(file, loaded, tail, options, false))
    }

    /// Opens a disk for reading and writing.
    ///
    /// # Errors
    /// As [`Disk::open_read_only`], and `ReadOnly` for a sealed disk, `TailLost` when completed
    /// writes of a living client may be missing, `Corrupt` when writing would make damage worse or
    /// overwrite an older state that shows more.
    pub fn open(file: Arc<dyn File>, segments: &dyn Segments, options: &Options) -> Result<Self> {
        // A sealed file may be open for reading only, and then there is no lock to be had.
        refuse_sealed(&segment::read_superblock(file.as_ref())?.superblock)?;
        // Before anything else is read: a killed writer's last writes may still be on their way.
        file.lock()?;
        let sb = segment::read_superblock(file.as_ref())?.superblock;
        refuse_sealed(&sb)?;
        sb.check_writable_features()?;
        if let Vouched::Opening(epoch) = options.vouched
            && let Some(disk) = Disk::go_on(&file, segments, options, (&sb, epoch))?
        {
            return Ok(disk);
        }
        if sb.attached != Attached::No {
            // What the last writer left unsynced is made durable or fails here; then the cache
            // goes, because after a failed sync it shows what the disk does not have.
            file.sync().context("sync what the last writer left of", || sb.name.clone())?;
            if options.vouched == Vouched::Nothing {
                file.forget_cached()?;
            }
        }
        let left = left_tail(&sb, options)?;
        let loaded = load(&file, segments, left.as_ref())?;
        let worst = loaded.problems.iter().find(|p| p.what.severity() == Severity::NoWrite);
        if let Some(problem) = worst {
            return Err(problem.to_error());
        }
        older::keep(&file, segments, left.as_ref(), &loaded)?;
        let next = loaded.cursor.seq;
        let capacity = tail_capacity(sb.journal_pages()).min(options.tail_records_max);
        // Records that only the tail of a killed process holds stay in that tail until they are in
        // the journal, whoever opens the disk.
        let (tail, attached) = match (left.filter(|t| t.next() > next), &options.tail_dir) {
            (Some(left), _) => (left, Attached::WithTail),
            (None, Some(dir)) if options.live => {
                make_dir(dir)?;
                let epoch = sb.epoch.next();
                (Tail::create(dir, sb.segment, capacity, next, epoch)?, Attached::WithTail)
            }
            _ => (Tail::on_heap(sb.segment, capacity, next), Attached::Plain),
        };
        let disk = Disk::assemble(file, loaded, tail, options, true);
        disk.attach(attached, options)?;
        disk.hold_ring(&mut disk.commit.lock());
        disk.hold_spare();
        if !disk.has_room() {
            // The last writer ended between the commit and the flip of a checkpoint.
            disk.run_checkpoint(|_| ())?;
            disk.reclaim();
        }
        Ok(disk)
    }

    /// Opens a segment that is sealed but has no sums yet, to make them.
    pub(super) fn open_pending(
        file: Arc<dyn File>,
        segments: &dyn Segments,
        options: &Options,
    ) -> Result<Self> {
        let loaded = load(&file, segments, None)?;
        let tail = Tail::on_heap(loaded.superblock.segment, 1, loaded.cursor.seq);
        let disk = Disk::assemble(file, loaded, tail, options, true);
        disk.check_undamaged()?;
        segment::settle(disk.file.as_ref()).map_err(|e| disk.fail(e))?;
        Ok(disk)
    }

    fn attach(&self, attached: Attached, options: &Options) -> Result<()> {
        let is_draft = options.is_draft;
        if !is_draft {
            segment::settle(self.file.as_ref()).map_err(|e| self.fail(e))?;
        }
        let mut state = self.checkpoint.lock();
        let mut commit = self.commit.lock();
        let present = state.superblock.clone();
        let epoch = present.epoch.next();
        // Before the flip: a tail may be one epoch ahead of its superblock, never behind.
        self.core.lock().tail.set_epoch(epoch);
        let sb = Superblock {
            generation: present.generation.next(),
            epoch,
            attached,
            boot: options.boot,
            ..present
        };
        if is_draft {
            for pair in [Pair::First, Pair::Second] {
                segment::write_pair(self.file.as_ref(), &sb, pair)?;
            }
            state.superblock = sb;
        } else {
            self.flip(&mut state, sb)?;
        }
        commit.cursor = JournalHead { epoch, ..commit.cursor };
        Ok(())
    }

    pub(super) fn assemble(
        file: Arc<dyn File>,
        loaded: Loaded,
        tail: Tail,
        options: &Options,
        writable: bool,
    ) -> Self {
        let lanes = options.lanes.max(1);
        let (tail, grown) = (Arc::new(tail), loaded.own_file().extents);
        let sb = loaded.superblock;
        let ring = sb.journal_pages();
        let no_lease = || Mutex::new(ExtentRun { first: ExtentId(0), count: 0 });
        Disk {
            segment: sb.segment,
            name: sb.name.clone(),
            journal_pages: ring,
            data_start: sb.data_start(),
            size: AtomicU64::new(sb.virtual_size),
            map: loaded.map,
            gate: IoGate::new(lanes),
            claims: Claims::default(),
            leases: (0..lanes).map(|_| no_lease()).collect(),
            tail: Arc::clone(&tail),
            core: Mutex::new(Core {
                tail,
                dirty: loaded.dirty,
                space: loaded.space,
                limbo: VecDeque::new(),
                punches: Vec::new(),
                grown,
                spare: Vec::new(),
            }),
            commit: Mutex::new(Commit {
                cursor: loaded.cursor,
                used_pages: (loaded.cursor.position + ring - sb.journal.position) % ring,
                held: 0,
            }),
            tickets: Mutex::new(Tickets::default()),
            ticket_done: Condvar::new(),
            checkpoint: Mutex::new(Checkpoint {
                superblock: sb,
                tree: loaded.tree,
                graveyard: Vec::new(),
            }),
            ground: Ground::default(),
            reclaiming: Mutex::new(()),
            file,
            rows: loaded.rows,
            table: ArcSwap::from_pointee(loaded.table),
            writable,
            live: options.live,
            hidden: loaded.hidden,
            punch_failed: FirstTime::default(),
            hold_failed: FirstTime::default(),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            problems: loaded.problems,
        }
    }

    /// Closes in order: everything durable, the journal empty, the tail gone. On a full host file
    /// system the journal may stay, to be replayed by the next opening.
    ///
    /// # Errors
    /// As [`Disk::flush`]; the disk is then closed as a crash would have closed it.
    pub fn close(self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.flush()?;
        match self.finish(|_| ()) {
            Err(e) if e.kind().may_pass() => {
                tracing::warn!(disk = %self.object(), error = %e, "closed with its journal");
                self.leave_journal()?;
            }
            outcome => outcome?,
        }
        self.tail.remove()
    }

    /// The last checkpoint of an opening, with further changes to its superblock.
    pub(super) fn finish(&self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        self.flush()?;
        self.finish_flushed(change)
    }

    /// As [`Disk::finish`], after the flush.
    pub(super) fn finish_flushed(&self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        // The head of a checkpoint is the cursor before it; a clean disk needs head and cursor
        // equal, which they are after the flush, since nobody writes any more.
        self.run_checkpoint(|sb| {
            sb.attached = Attached::No;
            change(sb);
        })?;
        self.reclaim();
        self.release_spare();
        // The second pair of superblock copies, too, and what was punched.
        self.sync()
    }
}

fn refuse_sealed(sb: &Superblock) -> Result<()> {
    if sb.state == State::Active {
        return Ok(());
    }
    Err(Error::new(Kind::ReadOnly, "it is sealed: immutable for ever")
        .hint("create a disk over it: `offshoot disk create NEW --parent NAME`"))
}

fn make_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).context("create", || format!("tail folder {}", dir.display()))
}

/// The tail that the last opening left and that is to be replayed, by the rule of `docs/format.md`
/// §10; `None` when none is to be. Whoever looks at a disk asks this, and nothing else.
///
/// # Errors
/// `TailLost` when there should be one and is not, unless that is accepted, or what the host
/// reports.
pub fn left_tail(sb: &Superblock, options: &Options) -> Result<Option<Tail>> {
    if sb.attached != Attached::WithTail {
        return Ok(None);
    }
    if sb.boot != options.boot {
        // The host was restarted: the clients are gone, and data that a tail names may be, too.
        return Ok(None);
    }
    let found = match &options.tail_dir {
        Some(dir) => Tail::open(dir, sb.segment),
        None => Ok(None),
    };
    let lost = match found {
        Err(e) if e.kind() == Kind::Corrupt => e.to_string(),
        Err(e) => return Err(e),
        Ok(None) => "the tail is gone, but the host was not restarted".into(),
        Ok(Some(tail)) if tail.is_void() => "a sync failed in that session".into(),
        Ok(Some(tail)) if tail.epoch() != sb.epoch && tail.epoch() != sb.epoch.next() => {
            "the tail is of another session".into()
        }
        Ok(Some(tail)) => return Ok(Some(tail)),
    };
    if options.accept_lost_tail {
        return Ok(None);
    }
    let reason = format!("completed writes of its last session may be missing: {lost}");
    Err(Error::new(Kind::TailLost, reason)
        .hint("if its clients are gone, repeat with --accept-lost-tail"))
}
