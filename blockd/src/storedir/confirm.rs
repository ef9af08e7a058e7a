//! What a fork has made before anybody counts on it: drafts, and a note of them.
//!
//! Who waits for the instant of a fork, with a machine that stands or a guest that is served from
//! then on, does not wait for a sync: until the instant nothing of a fork is made durable. A
//! process that is killed must lose nothing even so, since guests go on in the drafts at the
//! instant.
//!
//! Order, and the crash it defends against:
//! 1. the note is written after the drafts that it names, and before the instant — else a process
//!    that is killed behind the instant leaves drafts in which guests went on, and nobody knows;
//! 2. behind the instant, drafts and their names are durable before the catalogue knows of the
//!    fork, durably — else a power cut leaves a fork without the segments that it stands for;
//! 3. the catalogue knows of the fork before the first disk is frozen — else a power cut leaves a
//!    frozen disk whose children nobody finishes, or only some of the disks frozen, for good.
//!
//! A power cut before 3 leaves any part of drafts and note. Nothing was frozen, and no flush has
//! completed on the far side of the instant: all of it goes. A note that comes back when its fork
//! is confirmed is told by the catalogue, which has that fork, and when it is settled by its disks,
//! which are in other segments by then.
//!
//! Tests: `crash_points::cut`, `crash_points::fork`.

use format::units::crc;
use format::{Context as _, Error, Kind, Result};
use uuid::Uuid;

use super::StoreDir;
use crate::catalogue::{Change, ForkRow, Forked};
use crate::segment::new_name;
use crate::side_by_side::side_by_side;
use crate::store::Access;

/// How the name of a note ends.
const NOTE: &str = "fork";
/// Bytes of the checksum that a note begins with.
const SUM_BYTES: usize = 4;

fn note_name(fork: Uuid) -> String {
    format!("{fork}.{NOTE}")
}

fn encode(fork: &ForkRow) -> Result<Vec<u8>> {
    let text = serde_json::to_vec(fork).map_err(|e| Error::invalid(e.to_string()))?;
    Ok([crc(&text).to_le_bytes().as_slice(), &text].concat())
}

/// `None` for what a crash has left of a note.
fn decode(bytes: &[u8]) -> Option<ForkRow> {
    let (sum, text) = bytes.split_first_chunk::<SUM_BYTES>()?;
    let is_whole = u32::from_le_bytes(*sum) == crc(text);
    is_whole.then(|| serde_json::from_slice(text).ok()).flatten()
}

impl StoreDir {
    /// Has the new segments of a fork written by `write`, and a note of them.
    pub(super) fn begin(
        &self,
        fork: ForkRow,
        write: &dyn Fn(&ForkRow, &Forked) -> Result<()>,
    ) -> Result<ForkRow> {
        let begun = fork.disks.iter().try_for_each(|forked| write(&fork, forked));
        if let Err(e) = begun.and_then(|()| self.write_note(&fork)) {
            // What cannot be removed now goes at the next opening.
            self.drop_note(&fork);
            fork.disks.iter().for_each(|forked| self.drop_drafts(forked));
            return Err(e);
        }
        self.catalogue.foresee(&fork);
        Ok(fork)
    }

    /// Children of a fork that was begun have other names. Its note keeps those of before: a
    /// process that is killed before the fork is confirmed leaves children with these.
    pub(crate) fn foresee_renamed(&self, fork: &ForkRow) {
        self.catalogue.foresee(fork);
    }

    fn write_note(&self, fork: &ForkRow) -> Result<()> {
        let file = self.store.create(&note_name(fork.fork))?;
        file.write_at(0, &encode(fork)?)
    }

    pub(super) fn drop_note(&self, fork: &ForkRow) {
        // Not there, or of no meaning by now: see the head of this file.
        let _ = self.store.remove(&note_name(fork.fork));
    }

    pub(super) fn drop_drafts(&self, forked: &Forked) {
        for segment in forked.new_segments() {
            // Not there, or to be removed at the next opening.
            let _ = self.store.remove(&new_name(segment));
        }
    }

    /// Makes durable what a fork has made so far; disks may be frozen for it then. May be done
    /// again.
    ///
    /// # Errors
    /// `NoSpace`, to be tried again, or what the host reports; nothing is frozen then.
    pub fn confirm_fork(&self, fork: &ForkRow) -> Result<()> {
        let new = fork.disks.iter().flat_map(Forked::new_segments).collect();
        let synced = side_by_side(new, |segment| self.sync_draft(segment));
        synced.into_iter().collect::<Result<()>>()?;
        self.store.sync_names()?;
        self.catalogue.apply(&[Change::PutFork(fork.clone())])?;
        self.drop_note(fork);
        Ok(())
    }

    fn sync_draft(&self, segment: Uuid) -> Result<()> {
        let draft = match self.store.open(&new_name(segment), Access::Write) {
            // It has its final name, and was durable before it got that.
            Err(e) if e.kind() == Kind::NotFound => return Ok(()),
            draft => draft?,
        };
        let object = || format!("segment {segment}");
        match draft.sync() {
            // What the host could not place once is lost: another sync would not tell.
            Err(e) if e.kind().may_pass() => {
                Err(Error::new(Kind::Io, e.to_string())).context("sync", object)
            }
            synced => synced.context("sync", object),
        }
    }

    /// Takes in what killed processes have noted.
    pub(super) fn take_in_notes(&self) -> Result<()> {
        for name in self.store.names()? {
            if name.split_once('.').is_none_or(|(_, suffix)| suffix != NOTE) {
                continue;
            }
            match self.read_note(&name)?.filter(|fork| self.is_to_come(fork)) {
                Some(fork) => self.catalogue.foresee(&fork),
                None if self.writable => self.store.remove(&name)?,
                None => {}
            }
        }
        Ok(())
    }

    fn read_note(&self, name: &str) -> Result<Option<ForkRow>> {
        let file = self.store.open(name, Access::Read)?;
        let mut bytes = vec![0; format::units::index(file.size()?)];
        file.read_at(0, &mut bytes)?;
        Ok(decode(&bytes))
    }

    /// Whether no disk of the fork has gone on for good, and the catalogue does not know better: a
    /// note that comes back when its fork is confirmed may have other names than its children got.
    fn is_to_come(&self, fork: &ForkRow) -> bool {
        if self.catalogue.forks().iter().any(|known| known.fork == fork.fork) {
            return false;
        }
        let is_there = |forked: &Forked| {
            self.catalogue.get(&forked.name).is_some_and(|row| row.segment == forked.segment)
        };
        fork.disks.iter().all(is_there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_notes_are_believed() {
        let forked = Forked {
            name: "data".into(),
            segment: Uuid::from_u128(1),
            successor: Uuid::from_u128(2),
            children: Vec::new(),
        };
        let fork = ForkRow { fork: Uuid::from_u128(3), created: 4, disks: vec![forked] };
        let whole = encode(&fork).unwrap();
        assert_eq!(decode(&whole), Some(fork));
        for len in 0..whole.len() {
            assert_eq!(decode(&whole[..len]), None, "{len} bytes");
            let mut torn = whole.clone();
            torn[len..].fill(0);
            assert_eq!(decode(&torn), None, "zeroes from {len} on");
        }
    }
}
