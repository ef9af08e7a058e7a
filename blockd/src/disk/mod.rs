//! The disk engine: one active segment under one merged map.
//!
//! What holds at all times:
//! - An overwrite of an own block is one data write; nothing else happens.
//! - A first write is published — record in the tail, then entry in the map — only after its data
//!   was written, and completes only after it is published.
//! - A flush makes durable what completed before it was called, or fails; a failed sync is final
//!   and the disk refuses further work until it is opened anew.
//! - Space is used again only when nothing durable names it, nobody can still touch it, and its
//!   punch is done.
//!
//! Lock order: `reclaiming`, `checkpoint`, `commit`, lease, `core`, claim shard. Readers and
//! overwrites take none.
//!
//! The crash argument of every step is in `docs/format.md` §9; `tests/tests/crash_points/`
//! enumerates the crash points.

mod checkpoint;
pub mod claims;
mod commit;
pub mod create;
pub mod gate;
mod hand_on;
mod held;
mod io;
mod leaf;
pub mod leafset;
pub mod load;
pub mod map;
mod open;
pub mod plan;
pub mod problem;
mod pull;
mod reserve;
mod resize;
pub mod seal;
mod space;
pub mod still;
mod succeed;
pub mod tail;
mod zero;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use format::limits::SECTOR;
use format::space::{ExtentRun, SpaceMap};
use format::superblock::{JournalHead, Superblock};
use format::table::SegmentTable;
use format::tree::Tree;
use format::units::{Epoch, ExtentId, GuestBlock, GuestExtent, PageNo};
use format::{Error, Kind, Result};
use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

pub use held::HeldDisk;
pub use open::left_tail;
pub use pull::{Below, Pulled};

use claims::Claims;
use gate::IoGate;
use leafset::LeafSet;
use load::RowFile;
use map::Map;
use open::TAIL_RECORDS_MAX;
use problem::{Problem, Severity};
use succeed::Ground;
use tail::Tail;

use crate::store::File;

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct Options {
    /// Queues that will call in; each gets its own lease and gate counters.
    pub lanes: usize,
    /// Folder (on tmpfs) where tails live; a tail found there is always replayed.
    pub tail_dir: Option<PathBuf>,
    /// Keep a tail in `tail_dir`: completed writes then survive the death of this process. For
    /// clients that outlive the process; a command line's only client dies with it.
    pub live: bool,
    /// Open although a tail is missing that should be there: completed but unflushed writes of the
    /// session before are then lost.
    pub accept_lost_tail: bool,
    /// What the one who had the disk before vouches for.
    pub vouched: Vouched,
    /// Nobody counts on the file yet: whoever made it syncs it, as it is then, before anybody does.
    pub is_draft: bool,
    /// Most records that a new tail holds, each of 48 bytes of memory: when it is full, a commit is
    /// due whether or not the client flushes.
    pub tail_records_max: u64,
    /// Boot of the host.
    pub boot: Uuid,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            lanes: 1,
            tail_dir: None,
            live: false,
            accept_lost_tail: false,
            vouched: Vouched::Nothing,
            is_draft: false,
            tail_records_max: TAIL_RECORDS_MAX,
            boot: Uuid::nil(),
        }
    }
}

/// What a living predecessor, who has left the disk, says of what it left. After a crash nobody can
/// say anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Vouched {
    /// Nothing: the host may cache what no sync will ever bring to the disk.
    #[default]
    Nothing,
    /// What the host caches of the file: no sync ever failed.
    Cache,
    /// That, and its whole opening, of this epoch: nothing in it is half-done, so that a successor
    /// can go on in it.
    Opening(Epoch),
}

/// What publishing changes: held shortly, never during I/O on data.
struct Core {
    tail: Arc<Tail>,
    dirty: LeafSet,
    space: SpaceMap,
    /// Extents whose records are durable, waiting for requests of an epoch to leave.
    limbo: VecDeque<(u64, ExtentId)>,
    /// Zeroed blocks of extents that stay: their host space can go.
    punches: Vec<BlockPunch>,
    /// Extents that the file is long enough for.
    grown: u64,
    /// Extents with host space, for a checkpoint that finds no other.
    spare: Vec<ExtentId>,
}

/// Blocks of one extent whose host space can be given back.
#[derive(Debug, Clone, Copy)]
struct BlockPunch {
    extent: GuestExtent,
    target: ExtentId,
    first: usize,
    count: usize,
}

/// The journal and the state of group commit.
struct Commit {
    cursor: JournalHead,
    /// Ring pages between the head in the superblock and the cursor.
    used_pages: u64,
    /// Sixteenths of the ring whose host space is held, by bit.
    held: u16,
}

/// Tickets of group commit: a caller is served by a commit that began after it came.
#[derive(Default)]
struct Tickets {
    running: bool,
    started: u64,
    finished: u64,
    outcome: Option<(u64, Kind, String)>,
}

/// What a checkpoint changes.
struct Checkpoint {
    superblock: Superblock,
    tree: Tree,
    /// Pages that the last checkpoint replaced: free once the next one is durable.
    graveyard: Vec<(PageNo, u8)>,
}

/// Something that a failing host makes happen again and again, and that is logged once.
#[derive(Debug, Default)]
struct FirstTime(AtomicBool);

impl FirstTime {
    fn is_first(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed) // told once, orders nothing
    }
}

/// A disk, open.
pub struct Disk {
    file: Arc<dyn File>,
    rows: Vec<Option<RowFile>>,
    /// Rows that a flatten has let go of are gone here; their files stay open in `rows`.
    table: ArcSwap<SegmentTable>,
    segment: Uuid,
    name: String,
    journal_pages: u64,
    data_start: ExtentId,
    size: AtomicU64,
    map: Map,
    gate: IoGate,
    claims: Claims,
    leases: Box<[Mutex<ExtentRun>]>,
    /// The same as in `core`, for a failure that comes while others hold that lock.
    tail: Arc<Tail>,
    core: Mutex<Core>,
    commit: Mutex<Commit>,
    tickets: Mutex<Tickets>,
    ticket_done: Condvar,
    checkpoint: Mutex<Checkpoint>,
    ground: Ground,
    /// Held by the one who moves space along its way back.
    reclaiming: Mutex<()>,
    writable: bool,
    /// Clients outlive this process.
    live: bool,
    /// Damage hides which extents are in use.
    hidden: bool,
    punch_failed: FirstTime,
    hold_failed: FirstTime,
    failed: AtomicBool,
    failure: Mutex<Option<String>>,
    /// What was wrong at open and did not prevent it.
    pub problems: Vec<Problem>,
}

/// Facts about an open disk.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Its superblock as of the last checkpoint.
    pub superblock: Superblock,
    /// The segments its map may point into.
    pub table: Arc<SegmentTable>,
    /// Extents in use in the own segment.
    pub extents_used: u64,
    /// Bytes of the own file that the host has allocated.
    pub allocated: u64,
    /// Bytes of memory that the map takes.
    pub map_bytes: usize,
    /// Journal pages in use, and in all.
    pub journal_pages: (u64, u64),
}

impl Disk {
    /// Size of the virtual disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        // Acquire pairs with the Release store of a resize.
        self.size.load(Ordering::Acquire)
    }

    /// Identity of the own segment.
    #[must_use]
    pub fn segment(&self) -> Uuid {
        self.segment
    }

    /// The segment that an undo goes back to; nil for none.
    #[must_use]
    pub fn base(&self) -> Uuid {
        self.checkpoint.lock().superblock.base
    }

    /// The map: for comparing, listing and serving.
    #[must_use]
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// What the segment indices of the map mean.
    #[must_use]
    pub fn table(&self) -> Arc<SegmentTable> {
        self.table.load_full()
    }

    /// Facts for `show` and for metrics.
    ///
    /// # Errors
    /// What the host reports.
    pub fn facts(&self) -> Result<Facts> {
        // One lock at a time: a guard in the middle of an expression lives until its end.
        let superblock = self.checkpoint.lock().superblock.clone();
        let extents_used = self.core.lock().space.used_count();
        let journal_pages = self.journal_use();
        Ok(Facts {
            superblock,
            table: self.table(),
            extents_used,
            allocated: self.file.allocated()?,
            map_bytes: self.map.memory_bytes(),
            journal_pages,
        })
    }

    /// Journal pages in use, and in all.
    #[must_use]
    pub fn journal_use(&self) -> (u64, u64) {
        (self.commit.lock().used_pages, self.journal_pages)
    }

    /// Checks a byte range of a request: in sectors, inside the disk.
    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            let reason = format!("offset {offset} and length {len} must be multiples of 512");
            return Err(Error::invalid(reason).on(self.object()));
        }
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            let size = self.size();
            let reason = format!("offset {offset} plus length {len} lies past the end ({size})");
            return Err(Error::invalid(reason).on(self.object()));
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<()> {
        if !self.writable {
            return Err(Error::new(Kind::ReadOnly, "it is open for reading only").on(self.object()));
        }
        self.check_alive()
    }

    /// Refuses a disk with more than minor damage.
    pub(crate) fn check_undamaged(&self) -> Result<()> {
        let worst = self.problems.iter().find(|p| p.what.severity() > Severity::Minor);
        worst.map_or(Ok(()), |problem| Err(problem.to_error()))
    }

    fn check_alive(&self) -> Result<()> {
        // Acquire pairs with the Release store in `fail`.
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let why = self.failure.lock().clone().unwrap_or_default();
        Err(Error::new(Kind::Failed, format!("it failed before: {why}"))
            .on(self.object())
            .hint("open it again: what was flushed is safe"))
    }

    /// Ends this opening of the disk for good: after a failed sync nothing that the host says about
    /// the data it covered can be trusted.
    fn fail(&self, error: Error) -> Error {
        let error = error.on(self.object());
        // Whoever holds requests that may succeed later must not take it for one of those.
        let error = match error.kind().may_pass() {
            true => Error::new(Kind::Failed, error.to_string()),
            false => error,
        };
        self.failure.lock().get_or_insert_with(|| error.to_string());
        // Records in the tail may name data that the failed sync lost: nobody may replay them.
        self.tail.set_void();
        // Release pairs with the Acquire load in `check_alive`.
        self.failed.store(true, Ordering::Release);
        self.ground.wake();
        error
    }

    fn object(&self) -> String {
        if self.name.is_empty() {
            format!("segment {}", self.segment)
        } else {
            format!("disk {}", self.name)
        }
    }

    fn lane(&self, lane: usize) -> &Mutex<ExtentRun> {
        &self.leases[lane % self.leases.len()]
    }
}

fn blocks_of(offset: u64, len: u64) -> (GuestBlock, u64) {
    use format::limits::BLOCK;
    let first = offset / BLOCK;
    (GuestBlock(first), (offset + len).div_ceil(BLOCK) - first)
}
