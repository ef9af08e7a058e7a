//! Making a new segment: an empty root disk, or a child over a sealed parent.
//!
//! Order, and the crash it defends against: the content is durable under the `.new` name before it
//! is renamed, so that a segment under its final name is always whole.

use std::sync::Arc;

use format::array;
use format::limits::{EXTENT, JOURNAL_EXTENTS_MAX, JOURNAL_EXTENTS_MIN};
use format::node::NodePtr;
use format::space::{SpaceMap, extents_for_pages};
use format::superblock::{
    Attached, Features, JournalHead, Mode, Seal, State, Superblock, check_name,
};
use format::table::{Row, SegmentTable};
use format::units::{Epoch, ExtentId, Generation, OwnerEpoch, Seq, check_virtual_size};
use format::{Context, Error, Kind, Result};
use uuid::Uuid;

use crate::segment::{self, Pair, Sealed};
use crate::store::buf::AlignedBuf;
use crate::store::{File, Store};

/// What a new segment is to be.
#[derive(Debug, Clone)]
pub struct NewSegment {
    /// The store.
    pub store: Uuid,
    /// Identity of the new segment.
    pub segment: Uuid,
    /// Identity of its disk.
    pub disk: Uuid,
    /// Name of its disk.
    pub name: String,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Extents of the journal.
    pub journal_extents: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// Ownership epoch of the volume.
    pub owner_epoch: OwnerEpoch,
    /// Persistence mode of its disk.
    pub mode: Mode,
    /// What an undo goes back to; nil for mode `persistent`.
    pub base: Uuid,
}

/// A sealed segment to stand on. Its sums may be pending: the row of the new segment then has no
/// digest to compare it with.
pub struct Parent<'a> {
    /// Identity of the disk that the new one is said to be created over; nil for none.
    pub disk: Uuid,
    /// Its segment.
    pub sealed: &'a Sealed,
}

impl NewSegment {
    /// Writes the segment under its `.new` name, durable; renaming is the caller's.
    ///
    /// # Errors
    /// As [`NewSegment::draft`].
    pub fn write(&self, store: &dyn Store, parent: Option<&Parent<'_>>) -> Result<()> {
        let file = self.draft(store, parent)?;
        let synced = file.sync().context("create", || self.name.clone());
        if synced.is_err() {
            // The error that counts is the first one.
            let _ = store.remove(&segment::new_name(self.segment));
        }
        synced
    }

    /// Writes the segment under its `.new` name; to make it durable is the caller's.
    ///
    /// # Errors
    /// `Invalid` for an impossible name or size, `Exists`, `NoSpace`, or what the host reports;
    /// what was made by then is removed.
    pub fn draft(&self, store: &dyn Store, parent: Option<&Parent<'_>>) -> Result<Arc<dyn File>> {
        check_name(&self.name)?;
        check_virtual_size(self.virtual_size)?;
        if !(JOURNAL_EXTENTS_MIN..=JOURNAL_EXTENTS_MAX).contains(&self.journal_extents) {
            return Err(Error::invalid("a journal has 64 KiB to 1 GiB"));
        }
        let name = segment::new_name(self.segment);
        let file = store.create(&name)?;
        let written = self.fill(file.as_ref(), parent).context("create", || self.name.clone());
        if written.is_err() {
            // As above.
            let _ = store.remove(&name);
        }
        written.map(|()| file)
    }

    fn fill(&self, file: &dyn File, parent: Option<&Parent<'_>>) -> Result<()> {
        let (mut table, root) = match parent {
            None => (SegmentTable::default(), NodePtr::Hole),
            Some(p) => {
                let sb = &p.sealed.superblock;
                if self.virtual_size < sb.virtual_size {
                    let reason = format!("its parent has {} bytes", sb.virtual_size);
                    return Err(Error::new(Kind::Invalid, reason).hint("make it as large"));
                }
                if sb.state != State::Sealed {
                    return Err(Error::invalid("its parent is not sealed"));
                }
                let mut table = segment::read_table(p.sealed.file.as_ref(), sb)?;
                if sb.seal == Seal::Done {
                    table.set_digest(sb.segment, sb.digest);
                }
                (table, sb.root)
            }
        };
        let own = Row { segment: self.segment, digest: None, base: ExtentId(0) };
        let own_index = table.add(own)?;
        let mut sb = Superblock {
            features: Features::default(),
            generation: Generation(1),
            store: self.store,
            segment: self.segment,
            disk: self.disk,
            parent_disk: parent.map_or(Uuid::nil(), |p| p.disk),
            owner_epoch: self.owner_epoch,
            virtual_size: self.virtual_size,
            state: State::Active,
            mode: self.mode,
            seal: Seal::None,
            own_index,
            journal_extents: self.journal_extents,
            journal: JournalHead { epoch: Epoch(1), position: 0, seq: Seq(1), prev_crc: 0 },
            epoch: Epoch(1),
            attached: Attached::No,
            boot: Uuid::nil(),
            root,
            table: array::ArrayRef::default(),
            sums: array::ArrayRef::default(),
            extents_end: ExtentId(0),
            digest: [0; 32],
            created: self.created,
            name: self.name.clone(),
            successor: Uuid::nil(),
            base: self.base,
        };
        let content = table.encode();
        let mut space = SpaceMap::new(sb.data_start());
        let pages = array::pages_for(content.len() as u64);
        let run = space.take_run(extents_for_pages(pages))?;
        let (bytes, at) = array::encode(&content, run.first.first_page());
        sb.table = at;
        sb.extents_end = space.end();
        file.set_len(space.end().0 * EXTENT)?;
        file.write_at(at.page.file_offset(), &AlignedBuf::from_slice(&bytes))?;
        segment::write_pair(file, &sb, Pair::First)?;
        segment::write_pair(file, &sb, Pair::Second)
    }
}
