//! What a disk holds while nobody writes to it, and taking parts of it over into another disk.
//!
//! A disk in service stands still while its gate is closed ([`Disk::pause`]), and reads that enter
//! the gate would wait for ever: [`Still`] reads below it. A disk that is open for reading only
//! stands still anyway.
//!
//! Taking over copies bytes, or has the host share whole extents between the two files where it can
//! (a *clone*). A clone is a write like any other: its bytes are there when it returns, durable
//! after the next sync, and recorded only then ([`Disk::publish_plan`]). Test: `inherit`.

use std::sync::atomic::{AtomicBool, Ordering};

use format::Result;
use format::limits::EXTENT;

use super::Disk;
use super::gate::Closed;
use super::plan::{Place, Plan, Planned};
use crate::content::{Content, Run};

/// A disk that nobody writes to.
pub struct Still<'a> {
    disk: &'a Disk,
}

impl<'a> Still<'a> {
    /// A disk whose gate is closed for as long as this lives.
    #[must_use]
    pub fn paused(disk: &'a Disk, _gate: &'a Closed<'_>) -> Self {
        Still { disk }
    }

    /// A disk that is open for reading only, and that nobody else has open for writing.
    ///
    /// # Panics
    /// When it is open for writing: that would be a bug.
    #[must_use]
    pub fn unwritten(disk: &'a Disk) -> Self {
        assert!(!disk.is_writable(), "a disk that is open for writing does not stand still");
        Still { disk }
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &'a Disk {
        self.disk
    }
}

impl Content for Still<'_> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn status(&self, offset: u64, limit: u64) -> Result<Run> {
        Content::status(self.disk, offset, limit)
    }

    fn read_at(&self, _: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.check_alive()?;
        self.disk.check_range(offset, buf.len() as u64)?;
        self.disk.read_unchecked(offset, buf).map_err(|e| e.within("read", self.disk.object()))
    }
}

/// Whether the host shares space between files, as far as is known.
#[derive(Debug)]
pub struct Cloning(AtomicBool);

impl Default for Cloning {
    fn default() -> Self {
        Cloning(AtomicBool::new(true))
    }
}

impl Cloning {
    /// True until the host has refused once.
    fn may(&self) -> bool {
        self.0.load(Ordering::Relaxed) // seeing a refusal late costs one more of it
    }

    fn refused(&self) {
        self.0.store(false, Ordering::Relaxed); // as in `may`
    }
}

impl Disk {
    /// Has whole extents of this disk share the host's space of what another disk of the same size
    /// and store holds there; nothing of them lies in the own segment yet. `offset` and `len` are
    /// multiples of 64 KiB, all of it is data of `from`, and nobody else writes here meanwhile.
    /// False, with nothing changed that matters, when the host cannot: copy it then.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn clone_extents(
        &self,
        lane: usize,
        from: &Still<'_>,
        (offset, len): (u64, u64),
        cloning: &Cloning,
    ) -> Result<bool> {
        debug_assert!(offset.is_multiple_of(EXTENT) && len.is_multiple_of(EXTENT));
        if !cloning.may() {
            return Ok(false);
        }
        let (mut source, mut target) = (Plan::default(), Plan::default());
        let mut at = offset;
        while at < offset + len {
            from.disk.plan_read(at, offset + len - at, &mut source)?;
            // Plans of fragmented extents are cut anywhere; what is published is whole extents.
            let whole = source.bytes() / EXTENT * EXTENT;
            if whole == 0 {
                return Ok(false);
            }
            if !self.clone_window(lane, from.disk, (at, whole), (&source, &mut target))? {
                cloning.refused();
                return Ok(false);
            }
            at += whole;
        }
        Ok(true)
    }

    /// Clones what `source` plans of one window.
    fn clone_window(
        &self,
        lane: usize,
        from: &Disk,
        (offset, len): (u64, u64),
        (source, target): (&Plan, &mut Plan),
    ) -> Result<bool> {
        self.check_writable()?;
        let _inside = self.inside(lane)?;
        if self.plan_write(lane, offset, len, target)? == Planned::Slow || target.bytes() != len {
            self.abandon(target);
            return Ok(false);
        }
        match self.clone_transfers(from, len, (source, target)) {
            Ok(true) => {}
            refused => {
                self.abandon(target);
                return refused.map_err(|e| e.within("write", self.object()));
            }
        }
        while !self.publish_plan(target)? {
            self.flush()?;
        }
        Ok(true)
    }

    /// Walks two plans of the same bytes side by side.
    fn clone_transfers(&self, from: &Disk, len: u64, (a, b): (&Plan, &Plan)) -> Result<bool> {
        let (mut sources, mut targets) = (a.transfers().iter(), b.transfers().iter());
        let (mut source, mut target) = (sources.next().copied(), targets.next().copied());
        let mut done = 0;
        while done < len {
            let (Some(s), Some(t)) = (&mut source, &mut target) else { return Ok(false) };
            let Place::File { row: source_row, offset: source_at } = s.place else {
                return Ok(false);
            };
            let Place::File { offset: target_at, .. } = t.place else { return Ok(false) };
            let step = s.len.min(t.len).min(len - done);
            let file = &from.row(source_row)?.file;
            if !self.file.clone_range(file.as_ref(), source_at, target_at, step)? {
                return Ok(false);
            }
            done += step;
            for (transfer, rest) in [(&mut source, &mut sources), (&mut target, &mut targets)] {
                *transfer = transfer.take().and_then(|t| match t.len - step {
                    0 => rest.next().copied(),
                    left => Some(t.after(left)),
                });
            }
        }
        Ok(true)
    }

    /// The part of `offset..offset + len` that is whole extents: first byte, bytes.
    #[must_use]
    pub fn whole_extents(offset: u64, len: u64) -> (u64, u64) {
        let (first, end) = (offset.next_multiple_of(EXTENT), (offset + len) / EXTENT * EXTENT);
        (first, end.saturating_sub(first))
    }
}
