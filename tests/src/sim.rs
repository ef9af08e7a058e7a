//! Disks on a simulated store: parents, creation, and a script that does operations and records
//! them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use blockd::disk::create::{NewSegment, Parent};
use blockd::disk::{Disk, Options, Vouched};
use blockd::segment::{self, Sealed, Segments, file_name, new_name};
use blockd::store::sim::{Image, Op, SimStore};
use blockd::store::{Access, Store};
use format::superblock::Mode;
use format::units::OwnerEpoch;
use format::{Error, Kind, Result, limits};
use uuid::Uuid;

use crate::around::Wrap;
use crate::model::{Action, Contents, History, Model};
use crate::pattern::{self, SECTOR};

/// Sectors of a block, of an extent, and of a leaf.
pub const BLOCK: u64 = limits::BLOCK / SECTOR as u64;
/// Sectors of an extent.
pub const EXTENT: u64 = limits::EXTENT / SECTOR as u64;
/// Sectors under a leaf of the map.
pub const LEAF: u64 = limits::LEAF_SPAN / SECTOR as u64;

/// Finds parents by the name of their file.
pub struct ByName<'a>(pub &'a dyn Store);

impl Segments for ByName<'_> {
    fn sealed(&self, segment: Uuid) -> Result<Arc<Sealed>> {
        let file = self.0.open(&file_name(segment), Access::Read).map_err(|e| match e.kind() {
            Kind::NotFound => Error::new(Kind::ParentMissing, "no such segment"),
            _ => e,
        })?;
        let superblock = segment::read_superblock(file.as_ref())?.superblock;
        Ok(Arc::new(Sealed { superblock, file }))
    }
}

/// A new segment of `sectors` sectors with the smallest journal.
#[must_use]
pub fn new_segment(segment: Uuid, sectors: u64) -> NewSegment {
    NewSegment {
        store: Uuid::from_u128(1),
        segment,
        disk: segment,
        name: format!("disk-{}", segment.as_u128()),
        virtual_size: sectors * SECTOR as u64,
        journal_extents: 1,
        created: 0,
        owner_epoch: OwnerEpoch(1),
        mode: Mode::Persistent,
        base: Uuid::nil(),
    }
}

/// Makes a disk that stands on nothing, or on the sealed segment `parent`.
///
/// # Errors
/// What the store or the engine report.
pub fn create(store: &dyn Store, segment: Uuid, sectors: u64, parent: Option<Uuid>) -> Result<()> {
    let new = new_segment(segment, sectors);
    match parent {
        None => new.write(store, None)?,
        Some(id) => {
            let sealed = ByName(store).sealed(id)?;
            new.write(store, Some(&Parent { disk: id, sealed: &sealed }))?;
        }
    }
    store.rename(&new_name(segment), &file_name(segment))?;
    store.sync_names()
}

/// Operations on one disk of a simulated store, recorded.
///
/// Any thread may write, discard and flush; each sector must have one thread that changes it.
pub struct Script {
    /// The store.
    pub store: SimStore,
    /// The segment of the disk.
    pub segment: Uuid,
    /// How the disk is opened.
    pub options: Options,
    /// Puts something between the disk and its file.
    pub wrap: Option<Wrap>,
    disk: Option<Disk>,
    history: Arc<Mutex<History>>,
    next_tag: AtomicU32,
}

impl Script {
    /// Continues on a store that holds the disk with this content, all of it durable.
    #[must_use]
    pub fn over(image: Image, segment: Uuid, contents: Contents, sectors: u64) -> Self {
        let tag = contents.values().copied().max().unwrap_or(0) + 1;
        Script {
            store: SimStore::from_image(image),
            segment,
            options: Options { lanes: 4, ..Options::default() },
            wrap: None,
            disk: None,
            history: Arc::new(Mutex::new(History::new(contents, sectors))),
            next_tag: AtomicU32::new(tag),
        }
    }

    /// A new, empty disk.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn empty(sectors: u64) -> Self {
        let (store, segment) = (SimStore::new(), Uuid::from_u128(100));
        create(&store, segment, sectors, None).expect("a disk");
        Self::over(store.live_image(), segment, Contents::new(), sectors)
    }

    /// Goes on after a kill of this script's process, when the log had `log_len` operations and the
    /// history `event` events. What was not durable then is not durable now.
    #[must_use]
    pub fn killed_at(&self, log_len: usize, event: u64) -> Self {
        let (base, mut log) = self.recording();
        log.truncate(log_len);
        let history = self.history().killed_at(event);
        Script {
            store: SimStore::from_log(base, log),
            segment: self.segment,
            options: self.options.clone(),
            wrap: None,
            disk: None,
            history: Arc::new(Mutex::new(history)),
            next_tag: AtomicU32::new(self.next_tag.load(Ordering::Relaxed)),
        }
    }

    /// Starts anew: what was done so far is the content at the start, all of it durable, and the
    /// log is empty. The disk must be closed.
    ///
    /// # Panics
    /// When the disk is open.
    #[must_use]
    pub fn settled(self) -> Self {
        assert!(self.disk.is_none(), "the disk is open");
        let model = self.model();
        let (contents, sectors) = (model.contents(), model.size());
        let next = self.next_tag.load(Ordering::Relaxed);
        let fresh = Self::over(self.store.live_image(), self.segment, contents, sectors);
        fresh.next_tag.store(next, Ordering::Relaxed);
        Script { options: self.options, wrap: self.wrap, ..fresh }
    }

    /// Seals the disk and makes an empty child over it, with the same content.
    ///
    /// # Panics
    /// When that fails, or the disk is not open.
    #[must_use]
    pub fn child(mut self) -> Self {
        self.seal().expect("sealed");
        let model = self.model();
        let child = Uuid::from_u128(self.segment.as_u128() + 1);
        create(&self.store, child, model.size(), Some(self.segment)).expect("a child");
        self.segment = child;
        self.settled()
    }

    /// The model of everything done so far.
    #[must_use]
    pub fn model(&self) -> Model {
        Model::new(self.history().clone())
    }

    /// The image and the log that the record is about.
    #[must_use]
    pub fn recording(&self) -> (Image, Vec<Op>) {
        (self.store.base(), self.store.log())
    }

    /// The record so far.
    ///
    /// # Panics
    /// When a thread panicked while it held the record.
    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("no thread panicked")
    }

    /// The record itself, for those who watch it.
    #[must_use]
    pub fn shared_history(&self) -> Arc<Mutex<History>> {
        Arc::clone(&self.history)
    }

    /// The open disk.
    ///
    /// # Panics
    /// When it is not open.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("the disk is open")
    }

    fn start(&self, action: Action) -> usize {
        let log = self.store.log_len();
        self.history().start(action, log)
    }

    fn end<T>(&self, at: usize, outcome: &Result<T>) {
        let log = self.store.log_len();
        self.history().end(at, outcome.is_ok(), log);
    }

    fn run<T>(&self, action: Action, run: impl FnOnce(&Disk) -> Result<T>) -> Result<T> {
        let at = self.start(action);
        let outcome = run(self.disk());
        self.end(at, &outcome);
        outcome
    }

    /// A tag that no write had so far.
    pub fn tag(&self) -> u32 {
        self.next_tag.fetch_add(1, Ordering::Relaxed)
    }

    /// Writes `count` sectors from `first` on through lane `lane`; returns the tag they have.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_on(&self, lane: usize, first: u64, count: u64) -> Result<u32> {
        let tag = self.tag();
        let bytes = pattern::bytes(tag, first, count);
        self.run(Action::Write(first, count, tag), |disk| {
            disk.write(lane, first * SECTOR as u64, &bytes)
        })
        .map(|()| tag)
    }

    /// Writes `count` sectors from `first` on.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write(&self, first: u64, count: u64) -> Result<()> {
        self.write_on(0, first, count).map(|_| ())
    }

    /// Discards a range through lane `lane`.
    ///
    /// # Errors
    /// As [`Disk::discard`].
    pub fn discard_on(&self, lane: usize, first: u64, count: u64) -> Result<()> {
        self.run(Action::Zero(first, count), |disk| {
            disk.discard(lane, first * SECTOR as u64, count * SECTOR as u64)
        })
    }

    /// Discards a range.
    ///
    /// # Errors
    /// As [`Disk::discard`].
    pub fn discard(&self, first: u64, count: u64) -> Result<()> {
        self.discard_on(0, first, count)
    }

    /// Writes zeroes.
    ///
    /// # Errors
    /// As [`Disk::write_zeroes`].
    pub fn write_zeroes(&self, first: u64, count: u64, unmap: bool) -> Result<()> {
        self.run(Action::Zero(first, count), |disk| {
            disk.write_zeroes(0, first * SECTOR as u64, count * SECTOR as u64, unmap)
        })
    }

    /// Flushes.
    ///
    /// # Errors
    /// As [`Disk::flush`].
    pub fn flush(&self) -> Result<()> {
        self.run(Action::Flush, Disk::flush)
    }

    /// Makes a checkpoint.
    ///
    /// # Errors
    /// As [`Disk::checkpoint`].
    pub fn checkpoint(&self) -> Result<()> {
        self.run(Action::Flush, Disk::checkpoint)
    }

    /// Changes the size, dropping data where needed.
    ///
    /// # Errors
    /// As [`Disk::resize`].
    pub fn resize(&self, sectors: u64) -> Result<()> {
        self.run(Action::Resize(sectors), |disk| disk.resize(sectors * SECTOR as u64, true))
    }

    /// Opens the disk for writing.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open(&mut self) -> Result<()> {
        let at = self.start(Action::Open);
        let opened = self.store.open(&file_name(self.segment), Access::Write).and_then(|file| {
            let file = self.wrap.as_ref().map_or(Arc::clone(&file), |wrap| wrap(file));
            Disk::open(file, &ByName(&self.store), &self.options)
        });
        self.end(at, &opened);
        self.disk = Some(opened?);
        Ok(())
    }

    /// Closes the disk in order.
    ///
    /// # Errors
    /// As [`Disk::close`].
    ///
    /// # Panics
    /// When it is not open.
    pub fn close(&mut self) -> Result<()> {
        let disk = self.disk.take().expect("the disk is open");
        let at = self.start(Action::Flush);
        let closed = disk.close();
        self.end(at, &closed);
        closed
    }

    /// Seals the disk.
    ///
    /// # Errors
    /// As [`Disk::seal`].
    ///
    /// # Panics
    /// When it is not open.
    pub fn seal(&mut self) -> Result<()> {
        let disk = self.disk.take().expect("the disk is open");
        let at = self.start(Action::Seal);
        let sealed = disk.seal(&mut |_, _| Ok(()));
        self.end(at, &sealed);
        sealed.map(|_| ())
    }

    /// Leaves free extents one by one between used ones, below virtual extent `first`: leases are
    /// then short, and what is given back is soon used again. Uses `2 * count` virtual extents; the
    /// disk must be closed and opened afterwards, since leases last.
    ///
    /// # Errors
    /// As [`Disk::write`], [`Disk::discard`] and [`Disk::flush`].
    pub fn fragment(&self, first: u64, count: u64) -> Result<()> {
        (0..2 * count).try_for_each(|i| self.write((first + i) * EXTENT, 1))?;
        (0..count).try_for_each(|i| self.discard((first + 2 * i) * EXTENT, EXTENT))?;
        self.flush()
    }

    /// Leaves the disk to a successor, which opens it with what is vouched for. No flush is noted:
    /// what was not durable is not.
    ///
    /// # Errors
    /// As [`Disk::hand_on`] and [`Disk::open`].
    ///
    /// # Panics
    /// When it is not open.
    pub fn hand_on(&mut self) -> Result<Vouched> {
        let vouched = self.disk.take().expect("the disk is open").hand_on()?;
        let options = Options { vouched, ..self.options.clone() };
        let file = self.store.open(&file_name(self.segment), Access::Write)?;
        let file = self.wrap.as_ref().map_or(Arc::clone(&file), |wrap| wrap(file));
        self.disk = Some(Disk::open(file, &ByName(&self.store), &options)?);
        Ok(vouched)
    }

    /// Prepares the disk for [`Script::hand_on`].
    ///
    /// # Errors
    /// As [`Disk::prepare_hand_on`].
    pub fn prepare_hand_on(&self) -> Result<()> {
        self.run(Action::Flush, Disk::prepare_hand_on)
    }

    /// Lets go of the disk without closing it, as a killed process would.
    pub fn kill(&mut self) {
        self.disk = None;
    }

    /// Notes that an opening found this content in place of what the record says.
    pub fn adopt(&self, contents: Contents) {
        let at = self.start(Action::Adopt(contents));
        self.end(at, &Ok(()));
    }

    /// Notes that all that was done so far is durable, though nobody asked for it.
    pub fn note_durable(&self) {
        let at = self.start(Action::Flush);
        self.end(at, &Ok(()));
    }
}
