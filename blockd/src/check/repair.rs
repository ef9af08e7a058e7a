//! Repair: what a check found is mended, as far as the options allow.
//!
//! Invariants:
//! - Nothing that can be read is given up unless an option says so, and then the exact byte ranges
//!   are listed; what cannot be mended safely is refused with a reason.
//! - Nothing that any state of the segment names is overwritten: new pages go behind the end of the
//!   file, and space is given back only when the map is whole.
//! - At every instant a power cut leaves the state before or the state after (`commit.rs`).
//! - A missing or changed parent forbids every change of the map: what looks damaged is whole again
//!   when the parent is back.

use std::collections::HashSet;
use std::sync::Arc;

use format::entry::BlockState;
use format::limits::{BLOCK, EXTENT_BLOCKS};
use format::superblock::{Attached, State, Superblock};
use format::units::{ExtentId, Generation, GuestExtent, index};
use format::{Error, Kind, Result};

use super::commit::{self, Publish};
use super::outcome::{Action, Loss, RepairOptions, RepairReport, Why};
use super::{Examined, examine, leaks, report};
use crate::disk::load::older::{self, Older};
use crate::disk::load::{How, Loaded, OnDamage, load_state, newest};
use crate::disk::problem::{GuestRange, Problems, Severity, What};
use crate::disk::tail::Tail;
use crate::segment::{self, Segments};
use crate::store::File;
use crate::store::buf::AlignedBuf;

/// Repairs a disk that nobody has open. `file` is open for writing, except for a dry run. The file
/// of a tail is removed when its records are in the map or were given up, and stays when not.
///
/// # Errors
/// As [`super::check`], `Unsupported` when a feature forbids writing, `ReadOnly` when the
/// file is not open for writing, or what the host reports; the disk is then in the state before or
/// after.
pub fn repair(
    file: &Arc<dyn File>,
    segments: &dyn Segments,
    tail: Option<&Tail>,
    options: &RepairOptions,
) -> Result<RepairReport> {
    let (newest_sb, _) = newest(file.as_ref())?;
    newest_sb.check_writable_features()?;
    let before = examine(file, segments, tail)?;
    let mut work = Repair {
        file,
        segments,
        tail,
        options: *options,
        newest: newest_sb,
        actions: Vec::new(),
        lost: Vec::new(),
        refused: Vec::new(),
    };
    work.mend(&before)?;
    work.punch(&before)?;
    let after = if options.dry_run {
        None
    } else {
        let left = work.after_tail();
        if let Some(done) = tail.filter(|_| left.is_none()) {
            done.remove()?;
        }
        Some(report(examine(file, segments, left)?, None)?)
    };
    Ok(RepairReport {
        dry_run: options.dry_run,
        before: report(before, None)?,
        actions: work.actions,
        lost: work.lost,
        refused: work.refused,
        after,
    })
}

struct Repair<'a> {
    file: &'a Arc<dyn File>,
    segments: &'a dyn Segments,
    tail: Option<&'a Tail>,
    options: RepairOptions,
    newest: Superblock,
    actions: Vec<Action>,
    lost: Vec<Loss>,
    refused: Vec<String>,
}

impl Repair<'_> {
    /// Mends superblock copies and the map.
    fn mend(&mut self, before: &Examined) -> Result<()> {
        if let Some(why) = self.forbids_changes(before) {
            self.refuse_wishes(before, why);
            return self.rewrite_copies(before);
        }
        let Some(mut loaded) = self.choose(before)? else {
            return self.rewrite_copies(before);
        };
        let lossy = loaded.missing.is_some();
        if lossy && !self.options.accept_journal_loss {
            let seq = loaded.missing.map_or(0, |seq| seq.0);
            self.refused.push(format!(
                "journal records from number {seq} on are missing: nothing else is changed unless \
                 their loss is accepted"
            ));
            return self.rewrite_copies(before);
        }
        if has(&loaded, What::JournalWaits) {
            self.refused.push(
                "journal records for a damaged range wait: nothing else is changed unless damaged \
                 ranges are dropped, which brings back what the records tell"
                    .into(),
            );
            return self.rewrite_copies(before);
        }
        let dropped = loaded.dropped.in_bytes(self.newest.virtual_size);
        self.note_dropped(&loaded, dropped);
        if let Some(seq) = loaded.missing {
            let held = self.tail.map_or(0, |t| t.next().0.saturating_sub(seq.0));
            let action = Action::AcceptJournalLoss { first_missing: seq.0, tail_records: held };
            self.actions.push(action);
        }
        let shared = self.note_shared(&mut loaded)?;
        let records = loaded.replayed.0 + loaded.replayed.1;
        let leaks = before.leaks.as_deref().map_or(0, leaks::bytes);
        if self.options.leaks && leaks > 0 && records > 0 {
            self.actions.push(Action::Checkpoint { records });
        }
        if self.actions.is_empty() {
            return self.rewrite_copies(before);
        }
        if self.options.dry_run {
            return Ok(());
        }
        self.file.sync()?;
        match self.write(&mut loaded, &shared) {
            Err(e) if e.kind() == Kind::NoSpace && self.gives_space_first(before) => {
                let runs = before.leaks.as_deref().unwrap_or_default();
                if !leaks::punch(self.file.as_ref(), runs)? {
                    return Err(e);
                }
                self.actions.push(Action::PunchLeaks { bytes: leaks::bytes(runs) });
                loaded = self.load(self.newest.clone())?;
                self.write(&mut loaded, &[])?;
            }
            outcome => outcome?,
        }
        let publish = Publish { wipe_ring: lossy, tail_done: self.tail.is_some() };
        commit::publish(&loaded, &self.newest, publish)
    }

    /// Writes what the new state of the map names and the present one does not. What fails leaves
    /// the disk as it was: a full file system gets back what was taken.
    fn write(&self, loaded: &mut Loaded, shared: &[(GuestExtent, ExtentId)]) -> Result<()> {
        loaded.reserve_file();
        let len = self.file.size()?;
        let copied = self.unshare(loaded, shared);
        copied.and_then(|()| commit::write(loaded, self.newest.generation.next())).map_err(|e| {
            // Nothing names what lies behind the end that the file had. Where it cannot be cut, a
            // later repair finds it as a leak.
            let _ = self.file.set_len(len);
            match e.kind() {
                Kind::NoSpace => e.hint("the disk is as it was: free space on the host and repeat"),
                _ => e,
            }
        })
    }

    /// True when leaks may be given back before the journal is taken into the map: on a full host
    /// that makes the space which the map needs. What records of the journal let go stays unnamed
    /// whatever happens, since they are durable; records that only a tail holds are not.
    fn gives_space_first(&self, before: &Examined) -> bool {
        matches!(self.actions[..], [Action::Checkpoint { .. }])
            && before.worst() < Some(Severity::Range)
            && before.loaded.replayed.1 == 0
    }

    /// Why the map of this disk must not be changed, if it must not.
    fn forbids_changes(&self, before: &Examined) -> Option<&'static str> {
        let any = |what: What| before.problems.any(what);
        if before.loaded.too_long() {
            return Some("the file is longer than a segment's can be: cut it back first");
        }
        if before.loaded.superblock.state == State::Sealed {
            return Some("the segment is sealed: its map never changes; restore it from a copy");
        }
        if any(What::ParentMissing) || any(What::ParentChanged) || any(What::ParentLoop) {
            return Some("a parent is missing or changed: bring it back first");
        }
        any(What::SuperblockSplit).then_some(
            "two superblock copies of one generation differ: nothing tells which one is right",
        )
    }

    /// Says what of the options could not be followed.
    fn refuse_wishes(&mut self, before: &Examined, why: &str) {
        let o = self.options;
        let wishes = [
            (o.older_generation, "going back to an older generation"),
            (o.drop_damaged, "dropping damaged ranges"),
            (o.accept_journal_loss, "accepting the loss of journal records"),
            (o.unshare, "unsharing extents"),
        ];
        let wrong = before.worst() >= Some(Severity::Range);
        for (_, what) in wishes.iter().filter(|(wished, _)| *wished && wrong) {
            self.refused.push(format!("{what}: {why}"));
        }
    }

    /// The state to go on from; `None` when nothing is to change.
    fn choose(&mut self, before: &Examined) -> Result<Option<Loaded>> {
        if self.options.older_generation
            && let Some(older) = self.choose_older(&before.loaded)?
        {
            return Ok(Some(older));
        }
        // Without the option an older copy is not touched while it may be worth something.
        if self.keeps_older(before)? {
            self.refused.push(
                "a superblock copy holds an older generation, which may be whole: it is kept until \
                 it is used (older generation) or given up (drop damaged ranges)"
                    .into(),
            );
            return Ok(None);
        }
        self.load(self.newest.clone()).map(Some)
    }

    fn load(&self, sb: Superblock) -> Result<Loaded> {
        let how = How { on_damage: on_damage(&self.options), search_ring: true };
        load_state(self.file, sb, self.segments, self.tail, (how, Problems::default()))
    }

    /// True when a copy of an older generation may still be worth something.
    fn keeps_older(&self, before: &Examined) -> Result<bool> {
        let damaged = !before.loaded.damaged.is_empty();
        Ok(damaged && !self.options.drop_damaged && older::any(self.file.as_ref(), &self.newest)?)
    }

    fn choose_older(&mut self, newest: &Loaded) -> Result<Option<Loaded>> {
        let refused = &mut self.refused;
        if newest.damaged.in_bytes(self.newest.virtual_size).is_empty() {
            let why = "the newest generation can be read: there is nothing to gain";
            refused.push(format!("going back to an older generation: {why}"));
            return Ok(None);
        }
        let on_damage = on_damage(&self.options);
        let mut refuse = |generation: Generation, e: &Error| {
            refused.push(format!("going back to generation {generation}: {}", e.reason()));
        };
        let from = (newest, on_damage);
        let found = older::find(self.file, self.segments, self.tail, from, &mut refuse)?;
        let Some(Older { loaded, regained_bytes }) = found else {
            if !older::any(self.file.as_ref(), &self.newest)? {
                let why = "no superblock copy holds one";
                self.refused.push(format!("going back to an older generation: {why}"));
            }
            return Ok(None);
        };
        for range in older::differences(&loaded, newest).in_bytes(self.newest.virtual_size) {
            self.lost.push(Loss { range, why: Why::Differs });
        }
        self.actions.push(Action::UseOlderGeneration {
            newest: self.newest.generation.0,
            older: loaded.superblock.generation.0,
            regained_bytes,
        });
        Ok(Some(loaded))
    }

    fn note_dropped(&mut self, loaded: &Loaded, dropped: Vec<GuestRange>) {
        // Entries past the end of the disk cost no byte, but must be written over, too.
        if !loaded.mended {
            return;
        }
        let bytes = dropped.iter().map(|r| r.len).sum();
        self.actions.push(Action::DropDamaged { bytes });
        let lost = dropped.into_iter().map(|range| Loss { range, why: Why::Damaged });
        self.lost.extend(lost);
    }

    /// Notes what shares its extent and will get one of its own; gives that back.
    fn note_shared(&mut self, loaded: &mut Loaded) -> Result<Vec<(GuestExtent, ExtentId)>> {
        if !self.options.unshare || loaded.shared.is_empty() {
            return Ok(Vec::new());
        }
        let changes = |v: &GuestExtent| loaded.map.check_changes(v.first_block(), 1).is_ok();
        let (shared, stuck): (Vec<_>, Vec<_>) =
            std::mem::take(&mut loaded.shared).into_iter().partition(|(v, _)| changes(v));
        if !stuck.is_empty() {
            self.refused.push(format!(
                "unsharing {} extents under damaged map pages: drop damaged ranges as well",
                stuck.len()
            ));
        }
        if shared.is_empty() {
            return Ok(shared);
        }
        let extents: HashSet<_> = shared.iter().map(|(_, e)| *e).collect();
        for range in loaded.users(&extents)?.in_bytes(self.newest.virtual_size) {
            self.lost.push(Loss { range, why: Why::Shared });
        }
        self.actions.push(Action::Unshare { extents: shared.len() as u64 });
        Ok(shared)
    }

    /// Copies what shares its extent to an extent of its own, in memory and in unused space.
    fn unshare(&self, loaded: &mut Loaded, shared: &[(GuestExtent, ExtentId)]) -> Result<()> {
        let own = loaded.superblock.own_index;
        let mut buf = AlignedBuf::zeroed(index(BLOCK));
        for &(virtual_extent, from) in shared {
            let to = loaded.space.take_run(1)?.first;
            let mut vector = loaded.map.vector(virtual_extent)?;
            for (i, state) in vector.iter_mut().enumerate() {
                if matches!(*state, BlockState::Data { segment, block }
                    if segment == own && block.extent() == from)
                {
                    self.file.read_at(from.block(i).file_offset(), &mut buf)?;
                    self.file.write_at(to.block(i).file_offset(), &buf)?;
                    *state = BlockState::Data { segment: own, block: to.block(i) };
                }
            }
            let first = virtual_extent.first_block();
            loaded.map.set_blocks(first, EXTENT_BLOCKS, &mut |b| vector[b])?;
            loaded.dirty.insert(virtual_extent.leaf());
        }
        Ok(())
    }

    /// Brings all superblock copies to the newest state.
    fn rewrite_copies(&mut self, before: &Examined) -> Result<()> {
        let copies = before.count(What::SuperblockCopy);
        if copies == 0 || before.problems.any(What::SuperblockSplit) {
            return Ok(());
        }
        if self.keeps_older(before)? {
            return Ok(());
        }
        self.actions.push(Action::RewriteSuperblocks { copies });
        if !self.options.dry_run {
            segment::settle(self.file.as_ref())?;
        }
        Ok(())
    }

    /// Gives unused host space back.
    fn punch(&mut self, before: &Examined) -> Result<()> {
        if !self.options.leaks {
            return Ok(());
        }
        let now;
        let found = if self.options.dry_run {
            before
        } else {
            now = examine(self.file, self.segments, self.after_tail())?;
            &now
        };
        if found.worst() >= Some(Severity::Range) {
            let why = match self.options.dry_run && !self.actions.is_empty() {
                true => "how much there is will be known when the map is whole",
                false => "what looks unused may belong to what is damaged",
            };
            self.refused.push(format!("giving host space back: {why}"));
            return Ok(());
        }
        let runs = found.leaks.as_deref().unwrap_or_default();
        let bytes = leaks::bytes(runs);
        if bytes == 0 {
            return Ok(());
        }
        if self.options.dry_run || leaks::punch(self.file.as_ref(), runs)? {
            self.actions.push(Action::PunchLeaks { bytes });
        } else {
            self.refused.push("giving host space back: the file system cannot do it".into());
        }
        Ok(())
    }

    /// The tail as it is to be looked at after a commit: a superblock that says that the disk is
    /// closed has none.
    fn after_tail(&self) -> Option<&Tail> {
        let (sb, _) = newest(self.file.as_ref()).ok()?;
        self.tail.filter(|_| sb.attached == Attached::WithTail)
    }
}

fn on_damage(options: &RepairOptions) -> OnDamage {
    if options.drop_damaged { OnDamage::Zero } else { OnDamage::Keep }
}

fn has(loaded: &Loaded, what: What) -> bool {
    loaded.problems.iter().any(|p| p.what == what)
}

impl Examined {
    /// How much the worst problem hurts.
    fn worst(&self) -> Option<Severity> {
        self.problems.iter().map(|p| p.what.severity()).max()
    }

    fn count(&self, what: What) -> usize {
        self.problems.iter().filter(|p| p.what == what).count()
    }
}
