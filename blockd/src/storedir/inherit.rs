//! Inheriting: children that hold what their parents hold, and the parents stay as they are.
//!
//! The parent's own segment goes on being its own. If it stands on others, what it has of its own
//! is copied into each child, which points directly at a base below the parent. If it stands on
//! nothing, it is a root: it is sealed where it is, and its children stand on it.
//!
//! What is copied is the difference of two merged maps, the parent's and the base's: whatever lies
//! between them, and whatever was resized or zeroed there, the child reads as its parent does. The
//! base only decides how much that is.
//!
//! Order, and the crash it defends against:
//! 1. each child is filled through the engine under a name that ends in `.new`, and closed; the
//!    names are made durable — else step 2 names segments that a power cut takes away;
//! 2. one transaction of the catalogue tells of all children: from here on they come into being.
//!    Before, a crash leaves `.new` files that the next opening removes;
//! 3. roots are sealed (a flip; made ready by a checkpoint before 2, so that a full host is met
//!    there), and their children get the sealed map — swapped with 2, a crash leaves a root that
//!    nobody may write to any more, and no child to show for it;
//! 4. the children get their final names, durably; 5. one transaction tells of the disks, and
//!    forgets step 2.
//!
//! [`StoreDir::settle_inherit`] does 3 to 5, from whatever a crash left of them.
//!
//! Tests: `crash_points::inherit`, `inherit`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use format::limits::BLOCK;
use format::node::NodePtr;
use format::superblock::{Mode, Seal, State, Superblock};
use format::units::index;
use format::{Context, Kind, Result};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::fork::child;
use super::{ForkOf, Import, StoreDir};
use crate::catalogue::{Change, Child, DiskRow, Heir, InheritRow};
use crate::clock;
use crate::content::{Content, RunKind};
use crate::diff;
use crate::disk::Disk;
use crate::disk::create::{NewSegment, Parent};
use crate::disk::still::{Cloning, Still};
use crate::pump::{PIECE, Piece, Walk, Watch, lanes, part, pump};
use crate::segment::{self, Sealed, Segments, file_name, new_name};
use crate::store::Access;
use crate::store::buf::AlignedBuf;

/// On which segment below the parent its children are to stand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BaseRule {
    /// The first one above the parent's own whose map differs from that of the one above it, or
    /// the root.
    #[default]
    FirstNonempty,
    /// The root: what all segments between hold is copied, and the children need none of them.
    RootMerged,
}

/// How to inherit.
#[derive(Debug, Clone, Copy, Default)]
pub struct InheritOptions {
    /// The base of the children.
    pub base: BaseRule,
    /// Inherit only if fewer bytes than this are to be copied in all.
    pub below: Option<u64>,
}

/// Children that were made.
#[derive(Debug)]
pub struct Inherited {
    /// The children, in the order in which they were asked for.
    pub children: Vec<DiskRow>,
    /// Bytes of data that were copied.
    pub copied: u64,
    /// Bytes of data that the host shares between files instead.
    pub cloned: u64,
}

/// A disk that is inherited from, and its children.
pub struct Bequest<'a> {
    /// The disk and its children.
    pub of: &'a ForkOf,
    /// What it holds; `None` for a root that nobody has open.
    pub still: Option<Still<'a>>,
}

/// What children of one disk get.
struct Estate {
    base: Arc<Sealed>,
    /// Where parent and base differ: first byte, end.
    ranges: Vec<(u64, u64)>,
    /// Bytes of data in them.
    bytes: u64,
}

/// Roots that are about to be sealed; those that are not are closed.
struct Roots(Vec<Disk>);

impl Drop for Roots {
    fn drop(&mut self) {
        // What does not close now is as after a crash.
        self.0.drain(..).for_each(|root| _ = root.close());
    }
}

/// Bytes by what became of them.
#[derive(Default)]
struct Counts {
    copied: AtomicU64,
    cloned: AtomicU64,
}

impl StoreDir {
    /// Makes children of disks that nobody has open, all or none. `None` when there would be too
    /// much to copy.
    ///
    /// # Errors
    /// `NotFound`; `Exists` or `Invalid` for the name of a child; `NoSpace`; `Corrupt` where a map
    /// is damaged; as [`StoreDir::open_disk`]; or what the host or `watch` reports. There are no
    /// children then, and the disks are as before.
    pub fn inherit(
        &self,
        wanted: &[ForkOf],
        options: &InheritOptions,
        watch: &dyn Watch,
    ) -> Result<Option<Inherited>> {
        self.check_inherit(wanted)?;
        let open = |of: &ForkOf| -> Result<Option<Disk>> {
            match self.is_root(&of.disk)? {
                true => Ok(None),
                false => self.open_disk(&of.disk, Access::Read, &self.disk_options()).map(Some),
            }
        };
        let disks = wanted.iter().map(open).collect::<Result<Vec<_>>>()?;
        let still = disks.iter().map(|disk| disk.as_ref().map(Still::unwritten));
        let bequests = wanted.iter().zip(still).map(|(of, still)| Bequest { of, still });
        self.inherit_from(&bequests.collect::<Vec<_>>(), options, watch)
    }

    /// Whether a disk is a root that can still be written to: its own segment stands on nothing.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn is_root(&self, name: &str) -> Result<bool> {
        let row = self.disk(name)?;
        // One that an undo was to bring back would be sealed with its delta.
        Ok(row.parents.is_empty() && !row.sealed && row.base.is_none())
    }

    /// Checks what [`StoreDir::inherit`] is asked for.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn check_inherit(&self, wanted: &[ForkOf]) -> Result<()> {
        self.check_writable()?;
        self.check_children(wanted)
    }

    /// Bytes of data that the children of an open disk would get in all.
    ///
    /// # Errors
    /// As [`StoreDir::inherit`].
    pub(crate) fn to_inherit(&self, disk: &Disk, of: &ForkOf, rule: BaseRule) -> Result<u64> {
        Ok(self.estate(disk, rule)?.bytes * of.children.len() as u64)
    }

    /// As [`StoreDir::inherit`], of disks that stand still.
    ///
    /// # Errors
    /// As [`StoreDir::inherit`].
    pub(crate) fn inherit_from(
        &self,
        bequests: &[Bequest<'_>],
        options: &InheritOptions,
        watch: &dyn Watch,
    ) -> Result<Option<Inherited>> {
        let estate = |b: &Bequest<'_>| {
            b.still.as_ref().map(|still| self.estate(still.disk(), options.base)).transpose()
        };
        let estates = bequests.iter().map(estate).collect::<Result<Vec<_>>>()?;
        let bytes = |(estate, b): (&Option<Estate>, &Bequest<'_>)| {
            estate.as_ref().map_or(0, |e| e.bytes * b.of.children.len() as u64)
        };
        let total = estates.iter().zip(bequests).map(bytes).sum();
        if options.below.is_some_and(|below| total >= below) {
            return Ok(None);
        }
        watch.expect(total);
        let (counts, mut heirs, mut roots) = (Counts::default(), Vec::new(), Roots(Vec::new()));
        for (b, estate) in bequests.iter().zip(&estates) {
            match (&b.still, estate) {
                (Some(still), Some(estate)) => {
                    for name in &b.of.children {
                        let filled = self.fill_heir(name, still, estate, (&counts, watch));
                        heirs.push((filled.context("fork", || format!("disk {name}"))?, None));
                    }
                }
                _ => self.draft_over_root(b.of, &mut heirs, &mut roots.0)?,
            }
        }
        let children = self.appear(heirs, roots)?;
        // Relaxed: the threads that counted were joined.
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let (copied, cloned) = (count(&counts.copied), count(&counts.cloned));
        Ok(Some(Inherited { children, copied, cloned }))
    }

    /// The base of the children of a disk, and what they need besides.
    fn estate(&self, disk: &Disk, rule: BaseRule) -> Result<Estate> {
        let base = self.base_of(disk, rule)?;
        let segment = base.superblock.segment;
        if segment == disk.segment() {
            return Ok(Estate { base, ranges: Vec::new(), bytes: 0 });
        }
        let file = self.segment_file(segment, Access::Read)?;
        let below = Disk::open_read_only(file, self, &self.disk_options())?;
        let (size, mut ranges) = (disk.size(), Vec::new());
        diff::changed(disk, &below, &mut |range| {
            let end = (range.offset + range.len).min(size);
            if range.offset < end {
                ranges.push((range.offset, end));
            }
            Ok(())
        })?;
        let mut walk = Walk::over(disk, BLOCK, ranges.clone());
        let mut bytes = 0;
        while let Some(piece) = walk.next_piece()? {
            bytes += if piece.kind == RunKind::Data { piece.len } else { 0 };
        }
        Ok(Estate { base, ranges, bytes })
    }

    /// The segment that children of a disk are to stand on: its own, of a sealed root.
    fn base_of(&self, disk: &Disk, rule: BaseRule) -> Result<Arc<Sealed>> {
        let above = self.chain(disk)?;
        let mut at = match rule {
            BaseRule::RootMerged => 0,
            BaseRule::FirstNonempty => above.len().saturating_sub(1),
        };
        let mut base = self.sealed(above.get(at).copied().unwrap_or(disk.segment()))?;
        // A segment without an entry of its own shows the very pages that the one above it shows.
        while at > 0 {
            let next = self.sealed(above[at - 1])?;
            if next.superblock.root != base.superblock.root {
                break;
            }
            (at, base) = (at - 1, next);
        }
        Ok(base)
    }

    /// Makes a child over a base and fills it: complete and durable, under its `.new` name.
    fn fill_heir(
        &self,
        name: &str,
        parent: &Still<'_>,
        estate: &Estate,
        (counts, watch): (&Counts, &dyn Watch),
    ) -> Result<Import<&StoreDir>> {
        let base = &estate.base.superblock;
        let new = NewSegment {
            store: self.identity.store,
            segment: Uuid::new_v4(),
            disk: Uuid::new_v4(),
            name: name.to_owned(),
            virtual_size: base.virtual_size,
            journal_extents: parent.disk().facts()?.superblock.journal_extents,
            created: clock::now(),
            owner_epoch: format::units::OwnerEpoch(1),
            mode: Mode::Persistent,
            base: Uuid::nil(),
        };
        new.write(self.store.as_ref(), Some(&Parent { disk: base.disk, sealed: &estate.base }))?;
        let mut heir = Import::fill(self, new.segment, lanes())?;
        if parent.size() != base.virtual_size {
            heir.disk().resize(parent.size(), true)?;
        }
        let cloning = Cloning::default();
        let mut walk = Walk::over(parent, BLOCK, estate.ranges.clone());
        pump(
            watch,
            index(PIECE),
            || walk.next_piece(),
            |lane, piece, buf| {
                let taken = take_over(lane, (parent, &piece), (&heir, &cloning), buf)?;
                // Relaxed: only sums, read when the threads were joined.
                counts.copied.fetch_add(taken.0, Ordering::Relaxed);
                counts.cloned.fetch_add(taken.1, Ordering::Relaxed);
                watch.add(taken.0 + taken.1);
                Ok(())
            },
        )?;
        heir.close()?;
        Ok(heir)
    }

    /// Writes the children of a root as far as they can be known before it is sealed, and opens it,
    /// ready to be sealed.
    fn draft_over_root<'a>(
        &'a self,
        of: &ForkOf,
        heirs: &mut Vec<(Import<&'a StoreDir>, Option<Uuid>)>,
        roots: &mut Vec<Disk>,
    ) -> Result<()> {
        let root = self.open_disk(&of.disk, Access::Write, &self.disk_options())?;
        root.checkpoint()?;
        let superblock = Superblock {
            state: State::Sealed,
            seal: Seal::Pending,
            root: NodePtr::Hole,
            ..root.facts()?.superblock
        };
        let file = self.segment_file(root.segment(), Access::Read)?;
        let sealed = Sealed { superblock, file };
        for name in &of.children {
            let made = Child { name: name.clone(), disk: Uuid::new_v4(), segment: Uuid::new_v4() };
            let draft =
                self.draft_over(&sealed, &child(&sealed.superblock, &made, clock::now()))?;
            heirs.push((Import::draft(self, made.segment), Some(root.segment())));
            // Before the catalogue tells of it, as what the engine writes over a base.
            draft.sync()?;
        }
        roots.push(root);
        Ok(())
    }

    /// Steps 2 to 5.
    fn appear(
        &self,
        heirs: Vec<(Import<&StoreDir>, Option<Uuid>)>,
        mut roots: Roots,
    ) -> Result<Vec<DiskRow>> {
        let heir = |(import, root): &(Import<&StoreDir>, Option<Uuid>)| Heir {
            segment: import.segment(),
            root: *root,
        };
        let row = InheritRow { inherit: Uuid::new_v4(), heirs: heirs.iter().map(heir).collect() };
        self.store.sync_names()?;
        self.catalogue.apply(&[Change::PutInherit(row.clone())])?;
        let heirs: Vec<Import<_>> = heirs.into_iter().map(|(import, _)| import).collect();
        let roots = std::mem::take(&mut roots.0);
        let pinned = roots.iter().try_for_each(Disk::pin);
        let segments: Vec<Uuid> = roots.iter().map(Disk::segment).collect();
        // Not closed: they are sealed, or what failed says that they cannot be.
        drop(roots);
        if let Err(e) = pinned {
            let sealed = |segment: &Uuid| self.state_of(*segment).is_ok_and(|s| s == State::Sealed);
            if segments.iter().any(sealed) {
                heirs.into_iter().for_each(|heir| _ = heir.leave());
                return Err(e.hint("the children appear when the store is opened again"));
            }
            // Nothing has happened yet: it is taken back, and the drafts go.
            self.catalogue.apply(&[Change::RemoveInherit(row.inherit)])?;
            return Err(e);
        }
        heirs.into_iter().for_each(|heir| _ = heir.leave());
        self.settle_inherit(&row)?;
        row.heirs.iter().map(|heir| self.row_of(heir.segment)).collect()
    }

    fn state_of(&self, segment: Uuid) -> Result<State> {
        let file = self.segment_file(segment, Access::Read)?;
        Ok(segment::read_superblock(file.as_ref())?.superblock.state)
    }

    /// Steps 3 to 5, from whatever there is of them. Returns whether the children exist: they do
    /// not when a transaction that was reported as failed turns out to have been made, after its
    /// drafts were removed.
    fn settle_inherit(&self, row: &InheritRow) -> Result<bool> {
        let names = self.store.names()?;
        let is_there = |heir: &Heir| {
            [new_name(heir.segment), file_name(heir.segment)].iter().any(|n| names.contains(n))
        };
        if !row.heirs.iter().all(is_there) {
            self.catalogue.apply(&[Change::RemoveInherit(row.inherit)])?;
            return Ok(false);
        }
        let mut changes = vec![Change::RemoveInherit(row.inherit)];
        for heir in &row.heirs {
            if let Some(root) = heir.root {
                let sealed = self.pin_root(root)?;
                self.complete(&sealed, heir.segment, None)?;
                let rows = self.disks().into_iter().filter(|r| r.segment == root);
                changes.extend(rows.map(|r| Change::Put(DiskRow { sealed: true, ..r })));
            } else {
                self.name_heir(heir.segment)?;
            }
        }
        self.store.sync_names()?;
        for heir in &row.heirs {
            changes.push(Change::Put(self.row_of(heir.segment)?));
        }
        self.catalogue.apply(&changes)?;
        Ok(true)
    }

    /// Seals a root where it is, if that is still to be done.
    fn pin_root(&self, root: Uuid) -> Result<Superblock> {
        if self.state_of(root)? == State::Active {
            let file = self.segment_file(root, Access::Write)?;
            Disk::open(file, self, &self.disk_options())?.pin()?;
        }
        self.sealed.lock().remove(&root);
        let file = self.segment_file(root, Access::Write)?;
        segment::settle(file.as_ref())
    }

    /// Gives a finished child its final name.
    fn name_heir(&self, segment: Uuid) -> Result<()> {
        match self.store.rename(&new_name(segment), &file_name(segment)) {
            // It has its name already.
            Err(e) if e.kind() == Kind::NotFound => {
                self.store.open(&file_name(segment), Access::Read).map(drop)
            }
            renamed => renamed,
        }
    }

    /// Settles what a crash left.
    pub(super) fn settle_inherits(&self) -> Vec<String> {
        let settle = |row: InheritRow| match self.settle_inherit(&row) {
            Ok(true) => format!("finished {} disks that inherit from others", row.heirs.len()),
            Ok(false) => "gave up disks that were to inherit from others".into(),
            Err(e) => format!("disks that inherit from others could not be finished: {e}"),
        };
        self.catalogue.inherits().into_iter().map(settle).collect()
    }
}

/// Takes a piece of the parent over into a child; gives back the bytes copied and cloned.
fn take_over(
    lane: usize,
    (parent, piece): (&Still<'_>, &Piece),
    (heir, cloning): (&Import<&StoreDir>, &Cloning),
    buf: &mut AlignedBuf,
) -> Result<(u64, u64)> {
    let (offset, end) = (piece.offset, piece.offset + piece.len);
    if piece.kind != RunKind::Data {
        // Whatever the base has there: the parent reads zeroes.
        heir.disk().write_zeroes(lane, offset, piece.len, true)?;
        return Ok((0, 0));
    }
    let mut copy = |from: u64, to: u64| -> Result<u64> {
        if from < to {
            let bytes = part(buf, to - from);
            parent.read_at(lane, from, bytes)?;
            heir.store(lane, from, bytes)?;
        }
        Ok(to - from)
    };
    let (first, len) = Disk::whole_extents(offset, piece.len);
    if len == 0 || !heir.disk().clone_extents(lane, parent, (first, len), cloning)? {
        return Ok((copy(offset, end)?, 0));
    }
    Ok((copy(offset, first)? + copy(first + len, end)?, len))
}
