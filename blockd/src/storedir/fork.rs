//! Forks: a disk goes on in a new segment, and its children stand on the same frozen one.
//!
//! Order, and the crash it defends against:
//! 1. the files of all new segments exist, with all the space that they need, under names that end
//!    in `.new` — else a full host is met when the disks are frozen already; with a note of them;
//! 2. the catalogue knows of the fork (`confirm.rs`) — else a crash after step 3 leaves children
//!    that nobody finishes, or finishes one and not the other;
//! 3. each disk is frozen: a checkpoint, and one flip of its superblock to sealed, which names the
//!    successor. When the last of these flips is durable the children exist; before, they do not;
//! 4. the new segments get the frozen map's root, durably, and then their final names — else a name
//!    stands for a segment that shows something else;
//! 5. one transaction of the catalogue tells of all of it, and forgets the fork.
//!
//! [`StoreDir::settle_fork`] does 4 and 5 from whatever a crash left of 3, and so also goes back: a
//! fork that did not freeze all of its disks has no children, and those that it froze go on.
//!
//! Tests: `crash_points::fork`, `fork`, `fork_under_load`.

use std::collections::HashSet;
use std::sync::Arc;

use format::limits::SEGMENTS_MAX;
use format::node::NodePtr;
use format::superblock::{Mode, Seal, State, Superblock, check_name};
use format::units::OwnerEpoch;
use format::{Context, Error, Kind, Result};
use uuid::Uuid;

use super::StoreDir;
use super::cut::{Crossing, not_all_frozen};
use crate::catalogue::{Change, Child, DiskRow, ForkRow, Forked, FrozenRow};
use crate::clock;
use crate::disk::create::{NewSegment, Parent};
use crate::disk::{Disk, Options, tail};
use crate::segment::{self, Sealed, deleted_name, file_name, new_name};
use crate::side_by_side::side_by_side;
use crate::store::{Access, File};

/// A disk to fork, and the names of its children.
#[derive(Debug, Clone)]
pub struct ForkOf {
    /// The disk.
    pub disk: String,
    /// Its children.
    pub children: Vec<String>,
}

/// The segment in which a frozen disk goes on.
pub(super) fn successor(frozen: &Superblock, segment: Uuid) -> NewSegment {
    NewSegment {
        store: frozen.store,
        segment,
        disk: frozen.disk,
        name: frozen.name.clone(),
        virtual_size: frozen.virtual_size,
        journal_extents: frozen.journal_extents,
        created: frozen.created,
        owner_epoch: frozen.owner_epoch,
        mode: frozen.mode,
        base: frozen.base,
    }
}

/// The segment of a child of a frozen disk: what is pending there is for good here.
pub(super) fn child(frozen: &Superblock, child: &Child, created: u64) -> NewSegment {
    NewSegment {
        segment: child.segment,
        disk: child.disk,
        name: child.name.clone(),
        created,
        owner_epoch: OwnerEpoch(1),
        mode: Mode::Persistent,
        base: Uuid::nil(),
        ..successor(frozen, child.segment)
    }
}

/// Whether there may be one more segment below a disk.
pub(super) fn check_room(row: &DiskRow) -> Result<()> {
    if row.parents.len() + 2 <= SEGMENTS_MAX {
        return Ok(());
    }
    let reason = format!("it stands on {SEGMENTS_MAX} segments, the most there may be");
    Err(Error::invalid(reason).on(format!("disk {}", row.name)))
}

impl StoreDir {
    /// Forks disks that nobody has open, all at one instant, or none. Returns the children.
    ///
    /// # Errors
    /// `NotFound`; `Exists` or `Invalid` for the name of a child; `Invalid` for a disk that is
    /// sealed or stands on too many segments; `NoSpace`; as [`StoreDir::open_disk`]; or what the
    /// host reports. There are no children then, and the disks are as before.
    pub fn fork(&self, wanted: &[ForkOf]) -> Result<Vec<DiskRow>> {
        let (fork, options) = (self.begin_fork(wanted)?, self.disk_options());
        let frozen = self
            .confirm_fork(&fork)
            .and_then(|()| fork.disks.iter().try_for_each(|forked| self.freeze(forked, &options)));
        self.settled(&fork, frozen)?;
        self.children(&fork)
    }

    /// Settles a fork; `frozen` tells how the freezing went.
    pub(super) fn settled(&self, fork: &ForkRow, frozen: Result<()>) -> Result<()> {
        // Also when a disk could not be frozen: those that were must go on. Whatever was reported,
        // what is durable counts.
        if self.settle_fork(fork, &[])? {
            return Ok(());
        }
        frozen.and_then(|()| Err(not_all_frozen()))
    }

    /// The disks that a fork has made.
    ///
    /// # Errors
    /// `NotFound` when it made none.
    pub fn children(&self, fork: &ForkRow) -> Result<Vec<DiskRow>> {
        let children = fork.disks.iter().flat_map(|forked| &forked.children);
        children.map(|child| self.disk(&child.name)).collect()
    }

    /// Step 3 for a disk that nobody has open.
    pub(crate) fn freeze(&self, forked: &Forked, options: &Options) -> Result<()> {
        self.open_own(&forked.name, options)?.freeze(forked.successor)
    }

    /// Step 1. Whatever happens next, [`StoreDir::settle_fork`] must follow;
    /// [`StoreDir::confirm_fork`] is step 2.
    ///
    /// # Errors
    /// As [`StoreDir::fork`].
    pub fn begin_fork(&self, wanted: &[ForkOf]) -> Result<ForkRow> {
        self.check_writable()?;
        self.check_fork(wanted)?;
        let disks = wanted.iter().map(|of| {
            let row = self.disk(&of.disk)?;
            let child = |name: &String| Child {
                name: name.clone(),
                disk: Uuid::new_v4(),
                segment: Uuid::new_v4(),
            };
            Ok(Forked {
                name: row.name,
                segment: row.segment,
                successor: Uuid::new_v4(),
                children: of.children.iter().map(child).collect(),
            })
        });
        let disks = disks.collect::<Result<Vec<_>>>()?;
        let fork = ForkRow { fork: Uuid::new_v4(), created: clock::now(), disks };
        self.begin(fork, &|fork, forked| self.write_drafts(fork, forked))
    }

    fn check_fork(&self, wanted: &[ForkOf]) -> Result<()> {
        for of in wanted {
            let row = self.disk(&of.disk)?;
            let object = || format!("disk {}", row.name);
            if row.sealed {
                return Err(Error::invalid("it is sealed: there is nothing to fork")
                    .on(object())
                    .hint("create disks over it: `offshoot disk create NEW --parent NAME`"));
            }
            check_room(&row)?;
        }
        self.check_children(wanted)
    }

    /// Checks the names of disks and children: known, free, and each given once.
    pub(super) fn check_children(&self, wanted: &[ForkOf]) -> Result<()> {
        let mut names = HashSet::new();
        for of in wanted {
            let row = self.disk(&of.disk)?;
            let object = || format!("disk {}", row.name);
            if of.children.is_empty() {
                return Err(Error::invalid("a fork needs the name of a child").on(object()));
            }
            for name in of.children.iter().chain([&of.disk]) {
                check_name(name)?;
                if !names.insert(name) {
                    let reason = format!("the name {name} is given twice");
                    return Err(Error::invalid(reason).on(object()));
                }
            }
            of.children.iter().try_for_each(|name| self.check_name_free(name))?;
        }
        Ok(())
    }

    /// Writes the new segments of one disk as far as they can be known: all but the map.
    fn write_drafts(&self, fork: &ForkRow, forked: &Forked) -> Result<()> {
        let sealed = self.as_frozen(forked)?;
        // By its row: the label of the segment may be behind.
        let name = forked.name.clone();
        let next = NewSegment { name, ..successor(&sealed.superblock, forked.successor) };
        self.draft_over(&sealed, &next)?;
        forked.children.iter().try_for_each(|made| {
            self.draft_over(&sealed, &child(&sealed.superblock, made, fork.created)).map(drop)
        })
    }

    /// The own segment of a disk as it will be when it is frozen, as far as that can be known.
    pub(super) fn as_frozen(&self, forked: &Forked) -> Result<Sealed> {
        let file = self.segment_file(forked.segment, Access::Read)?;
        let sb = segment::read_superblock(file.as_ref())?.superblock;
        sb.check_writable_features()?;
        let superblock = Superblock {
            state: State::Sealed,
            seal: Seal::Pending,
            root: NodePtr::Hole,
            successor: forked.successor,
            ..sb
        };
        Ok(Sealed { superblock, file })
    }

    /// Writes a new segment over a frozen one; nothing of it is durable.
    pub(super) fn draft_over(&self, frozen: &Sealed, new: &NewSegment) -> Result<Arc<dyn File>> {
        let sb = &frozen.superblock;
        // A disk that goes on was not created over itself.
        let disk = if new.disk == sb.disk { sb.parent_disk } else { sb.disk };
        new.draft(self.store.as_ref(), Some(&Parent { disk, sealed: frozen }))
    }

    /// Steps 4 and 5, from whatever there is of step 3. `crossings` are the disks that went on in
    /// their successors already, which are frozen, and children that have begun. Returns whether
    /// the children exist.
    ///
    /// # Errors
    /// `NoSpace`, or what the host reports; to be done again then.
    pub fn settle_fork(&self, fork: &ForkRow, crossings: &[&Crossing]) -> Result<bool> {
        let frozen = fork.disks.iter().map(|forked| {
            let file = self.segment_file(forked.segment, Access::Read)?;
            let superblock = segment::read_superblock(file.as_ref())?.superblock;
            Ok(Some(superblock).filter(|sb| sb.successor == forked.successor))
        });
        let frozen = frozen.collect::<Result<Vec<_>>>()?;
        for (forked, _) in fork.disks.iter().zip(&frozen).filter(|(_, frozen)| frozen.is_none()) {
            // Guests were told of writes there.
            if crossings.iter().any(|crossing| crossing.is_into(forked.successor)) {
                return Err(not_all_frozen().on(format!("disk {}", forked.name)));
            }
        }
        let whole = frozen.iter().all(Option::is_some);
        let mut changes = vec![Change::RemoveFork(fork.fork)];
        let mut made = Vec::new();
        for (forked, frozen) in fork.disks.iter().zip(&frozen) {
            let Some(sb) = frozen else { continue };
            let children = forked.children.iter().filter(|_| whole).map(|child| child.segment);
            let new: Vec<Uuid> = [forked.successor].into_iter().chain(children).collect();
            // A child may have got another name since its draft was written.
            let label = |new| forked.children.iter().find(|c| c.segment == new).map(|c| &*c.name);
            let finish = |new| match crossings.iter().find(|crossing| crossing.is_into(new)) {
                Some(crossing) => crossing.settle(label(new)).and_then(|()| self.name_finally(new)),
                None => self.complete(sb, new, label(new)),
            };
            side_by_side(new.clone(), finish).into_iter().collect::<Result<()>>()?;
            made.extend(new);
            let row = FrozenRow { segment: sb.segment, disk: sb.disk, summing: false };
            changes.push(Change::PutFrozen(row));
        }
        self.store.sync_names()?;
        for segment in &made {
            let row = self.row_of(*segment)?;
            // The row of a disk that goes on tells more than its segment.
            let before = self.catalogue.get(&row.name);
            changes.push(Change::Put(before.map_or(row.clone(), |before| before.with(row))));
        }
        let new = fork.disks.iter().flat_map(Forked::new_segments);
        for segment in new.filter(|segment| !made.contains(segment)) {
            // Nobody went on in it.
            let _ = std::fs::remove_file(tail::path_in(&self.identity.tail_dir, segment));
        }
        fork.disks.iter().for_each(|forked| self.drop_drafts(forked));
        self.drop_note(fork);
        self.catalogue.apply(&changes)?;
        let settled = crossings.iter().filter(|c| made.iter().any(|segment| c.is_into(*segment)));
        settled.for_each(|crossing| crossing.settled());
        let mut cached = self.sealed.lock();
        fork.disks.iter().for_each(|forked| _ = cached.remove(&forked.segment));
        Ok(whole)
    }

    /// Gives a new segment its final name, if it has not got it.
    fn name_finally(&self, new: Uuid) -> Result<()> {
        match self.store.rename(&new_name(new), &file_name(new)) {
            Err(e) if e.kind() == Kind::NotFound => {
                self.store.open(&file_name(new), Access::Read).map(drop)
            }
            renamed => renamed,
        }
    }

    /// Gives a new segment the frozen map, the name of its disk if that has another one by now, and
    /// its final name.
    pub(super) fn complete(
        &self,
        frozen: &Superblock,
        new: Uuid,
        label: Option<&str>,
    ) -> Result<()> {
        let (draft, name) = (new_name(new), file_name(new));
        let file = match self.store.open(&draft, Access::Write) {
            // It has its name already.
            Err(e) if e.kind() == Kind::NotFound => return self.name_finally(new),
            file => file?,
        };
        // A flip, and not just new copies: a cut in the middle must leave a draft that can be read.
        let draft_sb = segment::settle(file.as_ref())?;
        let table = segment::read_table(file.as_ref(), &draft_sb)?;
        if table.iter().all(|(_, row)| row.segment != frozen.segment) {
            // An undo: it stands on what the frozen one stood on, and is whole.
            return self.store.rename(&draft, &name);
        }
        let sb = Superblock {
            generation: draft_sb.generation.next(),
            root: frozen.root,
            virtual_size: frozen.virtual_size,
            name: label.map_or_else(|| draft_sb.name.clone(), str::to_owned),
            ..draft_sb
        };
        segment::flip(file.as_ref(), &sb)?;
        file.sync()?;
        self.store.rename(&draft, &name)
    }

    /// Removes frozen segments that no disk stands on any more.
    pub(super) fn drop_frozen(&self) -> Result<()> {
        // In this order: a fork beside it tells of its frozen segment and of who stands on it at
        // once, and what is frozen later is not looked at. The other way round, a segment that was
        // frozen in between is needed by nobody.
        // Test: `persistence_modes::removals_and_undos_beside_forks_take_nothing`.
        let frozen = self.catalogue.frozen();
        let needed = self.needed()?;
        for row in frozen {
            if needed.contains(&row.segment) || self.stranger_over(row.segment)?.is_some() {
                continue;
            }
            match self.store.rename(&file_name(row.segment), &deleted_name(row.segment)) {
                Err(e) if e.kind() == Kind::NotFound => {}
                renamed => renamed.context("remove", || format!("segment {}", row.segment))?,
            }
            self.sealed.lock().remove(&row.segment);
            self.summed.lock().remove(&row.segment);
            // The deletion is decided, durably, before the catalogue forgets the segment.
            self.store.sync_names()?;
            self.catalogue.apply(&[Change::RemoveFrozen(row.segment)])?;
            // Who stood on it may have it open for long, and would keep its space. Nobody reads it:
            // the row of a disk forgets a segment after the last request to it has ended.
            let _ = self.cut(&deleted_name(row.segment));
            match self.store.remove(&deleted_name(row.segment)) {
                Err(e) if e.kind() == Kind::NotFound => {}
                removed => removed?,
            }
        }
        Ok(())
    }

    /// Segments on which disks stand, or would stand after an undo.
    fn needed(&self) -> Result<HashSet<Uuid>> {
        let rows = self.disks();
        let bases: HashSet<Uuid> = rows.iter().filter_map(|row| row.base).collect();
        let mut needed: HashSet<Uuid> = rows.into_iter().flat_map(|row| row.parents).collect();
        for base in bases {
            match self.row_of(base) {
                // It is lost; what it stood on is of no use to anybody.
                Err(e) if e.kind() == Kind::NotFound => {}
                row => needed.extend(row?.parents),
            }
            needed.insert(base);
        }
        Ok(needed)
    }

    /// Number of frozen segments.
    #[must_use]
    pub fn frozen(&self) -> usize {
        self.catalogue.frozen().len()
    }

    /// A frozen segment that has no sums yet, for people.
    #[must_use]
    pub fn next_to_sum(&self) -> Option<String> {
        let (needed, mut rows) = (self.needed().ok()?, self.catalogue.frozen().into_iter());
        let row = rows
            .find(|row| needed.contains(&row.segment) && self.has_no_sums(row).unwrap_or(false))?;
        Some(format!("segment {}", row.segment))
    }

    /// Whether the sums of a frozen segment are still to be made.
    fn has_no_sums(&self, row: &FrozenRow) -> Result<bool> {
        if self.summed.lock().contains(&row.segment) {
            return Ok(false);
        }
        let file = match self.segment_file(row.segment, Access::Read) {
            // Nobody stands on it any more, and it went.
            Err(e) if e.kind() == Kind::NotFound => return Ok(false),
            file => file?,
        };
        let has_none = segment::read_superblock(file.as_ref())?.superblock.seal == Seal::Pending;
        if !has_none {
            self.summed.lock().insert(row.segment);
        }
        Ok(has_none)
    }

    /// Makes the sums of frozen segments that have none yet. `progress` gets the bytes done and in
    /// all of one segment after the other; returns how many were summed.
    ///
    /// # Errors
    /// As [`Disk::finish_seal`].
    pub fn sum_frozen(&self, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<usize> {
        let (needed, mut summed) = (self.needed()?, 0);
        for row in self.catalogue.frozen() {
            // One that nobody needs is about to go: an undo leaves such.
            if !needed.contains(&row.segment) || !self.has_no_sums(&row)? {
                continue;
            }
            // Marked first: nobody opens a frozen segment for writing again, which would settle its
            // superblock after a crash.
            self.catalogue
                .apply(&[Change::PutFrozen(FrozenRow { summing: true, ..row.clone() })])?;
            let file = self.segment_file(row.segment, Access::Write)?;
            Disk::finish_seal(file, self, &self.disk_options(), progress)?;
            self.catalogue
                .apply(&[Change::PutFrozen(FrozenRow { summing: false, ..row.clone() })])?;
            self.sealed.lock().remove(&row.segment);
            summed += 1;
        }
        Ok(summed)
    }

    /// Settles the superblock of a frozen segment whose sums were being made at a crash.
    pub(super) fn settle_frozen(&self, row: &FrozenRow) -> Result<()> {
        self.segment_file(row.segment, Access::Read)?.set_read_only(false)?;
        let file = self.segment_file(row.segment, Access::Write)?;
        if segment::settle(file.as_ref())?.seal == Seal::Done {
            file.set_read_only(true)?;
        }
        self.catalogue.apply(&[Change::PutFrozen(FrozenRow { summing: false, ..row.clone() })])
    }

    /// Settles the forks that a crash left.
    pub(super) fn settle_forks(&self) -> Vec<String> {
        let settle = |fork: ForkRow| {
            let names: Vec<&str> = fork.disks.iter().map(|d| d.name.as_str()).collect();
            let of = names.join(", ");
            match self.recover_fork(&fork, &self.disk_options()) {
                Ok(true) => format!("finished a fork of disk {of}"),
                Ok(false) => format!("gave up a fork of disk {of}, which was not finished"),
                Err(e) => format!("a fork of disk {of} could not be settled: {e}"),
            }
        };
        self.catalogue.forks().into_iter().map(settle).collect()
    }

    /// New segments of forks, of either kind, that are not settled.
    pub(super) fn unsettled(&self) -> HashSet<Uuid> {
        let forks = self.catalogue.forks();
        let disks = forks.iter().flat_map(|fork| &fork.disks);
        let segments =
            disks.flat_map(|d| d.children.iter().map(|child| child.segment).chain([d.successor]));
        let heirs = self.catalogue.inherits().into_iter().flat_map(|row| row.heirs);
        segments.chain(heirs.map(|heir| heir.segment)).collect()
    }
}
