//! The superblock: four copies at spread offsets, each a page, each naming its own copy number.
//!
//! Layout: `docs/format.md` §3. Invariants:
//! - Of two valid copies the one with the higher generation is the newer state of the segment.
//! - At every instant the pair of copies {0, 1} or the pair {2, 3} is durable and whole (§9.4).
//! - Nothing in a superblock names a host path: parents are identities, resolved by the catalogue.

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::array::{ArrayRef, RawArrayRef};
use crate::limits::{
    HEADER_EXTENTS, JOURNAL_EXTENTS_MAX, JOURNAL_EXTENTS_MIN, NAME_MAX, PAGE, SEGMENT_EXTENTS_MAX,
    SUPERBLOCK_COPIES,
};
use crate::node::{NodePtr, RawNodePtr};
use crate::units::{
    Epoch, ExtentId, Generation, OwnerEpoch, SegmentIdx, Seq, check_virtual_size, crc,
};
use crate::{Error, Kind, Result};

/// First eight bytes of every superblock copy.
pub const MAGIC: [u8; 8] = *b"OFFSHOOT";
/// The format version this build writes.
pub const VERSION: u32 = 1;

/// Counters stay below this, so that adding to them never overflows: at a million steps a second it
/// is reached after 146,000 years.
const COUNTER_END: u64 = 1 << 62;

/// Feature bits this build understands, by class. Version 1 defines none.
pub const KNOWN_FEATURES: Features = Features { incompat: 0, read_only_compat: 0, compat: 0 };

/// The three classes of feature bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// A build that does not know one of these must not open the segment at all.
    pub incompat: u64,
    /// A build that does not know one of these may read, but not write.
    pub read_only_compat: u64,
    /// A build that does not know one of these may ignore it.
    pub compat: u64,
}

/// Life of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// One writer; belongs to one disk.
    Active,
    /// Immutable for ever; may be shared.
    Sealed,
}

/// What happens to a disk's delta at power-off. Version 1 serves `Persistent`; the others are
/// reserved so that a later version needs no new layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Writes stay.
    #[default]
    Persistent,
    /// The delta is dropped at power-off.
    NonPersistent,
    /// The user commits or undoes the delta.
    Undoable,
    /// Changes pile up in the delta until told otherwise.
    Append,
}

/// How far the data checksums and the digest of a sealed segment are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seal {
    /// Not sealed.
    #[default]
    None,
    /// Sealed; sums and digest not made yet.
    Pending,
    /// Sealed; sums and digest present.
    Done,
}

macro_rules! byte_enum {
    ($name:ident, $what:literal, $($variant:ident = $n:literal),+) => {
        impl $name {
            fn to_byte(self) -> u8 {
                match self { $($name::$variant => $n),+ }
            }
            fn from_byte(b: u8) -> Result<Self> {
                match b {
                    $($n => Ok($name::$variant),)+
                    _ => Err(Error::corrupt(format!(concat!("unknown ", $what, " {}"), b))),
                }
            }
        }
    };
}
/// Whether a writer has the segment open, and what it may have left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Attached {
    /// Closed in order: the map holds everything, the journal nothing.
    #[default]
    No,
    /// Open for writing without live clients: what was not flushed may be forgotten.
    Plain,
    /// Open for writing with live clients: completed records may be in a tail in memory.
    WithTail,
}

byte_enum!(Attached, "attach state", No = 0, Plain = 1, WithTail = 2);
byte_enum!(State, "segment state", Active = 1, Sealed = 2);
byte_enum!(Mode, "persistence mode", Persistent = 0, NonPersistent = 1, Undoable = 2, Append = 3);
byte_enum!(Seal, "seal state", None = 0, Pending = 1, Done = 2);

/// Where replay of the journal starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JournalHead {
    /// Epoch of the page before `position`: replay accepts no page of an earlier one.
    pub epoch: Epoch,
    /// Page of the ring that holds record `seq`, if it was written.
    pub position: u64,
    /// First record that the map does not hold yet.
    pub seq: Seq,
    /// Checksum of the page before `position`, zero for a new journal.
    pub prev_crc: u32,
}

/// A decoded superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Feature bits of the segment.
    pub features: Features,
    /// Number of this state; grows by one at every flip.
    pub generation: Generation,
    /// The store the segment was made in.
    pub store: Uuid,
    /// Identity of the segment.
    pub segment: Uuid,
    /// Identity of the disk (volume) the segment belongs or belonged to.
    pub disk: Uuid,
    /// Identity of the disk this one was created over; nil for none.
    pub parent_disk: Uuid,
    /// Ownership epoch of the volume.
    pub owner_epoch: OwnerEpoch,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Active or sealed.
    pub state: State,
    /// Persistence mode of the disk.
    pub mode: Mode,
    /// Progress of the seal.
    pub seal: Seal,
    /// Row of the segment table that means this segment.
    pub own_index: SegmentIdx,
    /// Extents of the journal ring; the ring starts after the header extents.
    pub journal_extents: u64,
    /// Where replay starts.
    pub journal: JournalHead,
    /// Epoch of the last opening for writing: replay accepts no page of a later one.
    pub epoch: Epoch,
    /// Whether a writer has it open.
    pub attached: Attached,
    /// Boot of the host at the last opening for writing.
    pub boot: Uuid,
    /// Root of the map (level 3).
    pub root: NodePtr,
    /// The segment table.
    pub table: ArrayRef,
    /// Data checksums of a sealed segment; empty until the seal is done.
    pub sums: ArrayRef,
    /// Extents from which on the file holds nothing the map, table or sums name.
    pub extents_end: ExtentId,
    /// BLAKE3 content digest; zero until the seal is done.
    pub digest: [u8; 32],
    /// Seconds since 1970 at creation.
    pub created: u64,
    /// Name of the disk, so that a lost catalogue can be rebuilt.
    pub name: String,
    /// The segment in which the disk goes on since a fork sealed this one; nil for none.
    pub successor: Uuid,
    /// The segment that an undo goes back to; nil when the mode is `persistent`.
    pub base: Uuid,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U32,
    copy: U32,
    generation: U64,
    incompat: U64,
    read_only_compat: U64,
    compat: U64,
    store: [u8; 16],
    segment: [u8; 16],
    disk: [u8; 16],
    parent_disk: [u8; 16],
    owner_epoch: U64,
    virtual_size: U64,
    state: u8,
    mode: u8,
    seal: u8,
    attached: u8,
    own_index: U16,
    name_len: U16,
    journal_extents: U64,
    journal_epoch: U64,
    epoch: U64,
    journal_position: U64,
    journal_seq: U64,
    journal_prev_crc: U32,
    reserved0: U32,
    boot: [u8; 16],
    root: RawNodePtr,
    table: RawArrayRef,
    sums: RawArrayRef,
    extents_end: U64,
    digest: [u8; 32],
    created: U64,
    name: [u8; NAME_MAX],
    successor: [u8; 16],
    base: [u8; 16],
    reserved: [u8; PAGE - 488 - 4],
    crc: U32,
}

const _: () = assert!(size_of::<Raw>() == PAGE);

/// Checks a disk name: 1–128 bytes, letters, digits, `.`, `_`, `-`, `@`, `+`, not starting with `.`
/// or `-`.
///
/// # Errors
/// `Invalid`, saying what is wrong.
pub fn check_name(name: &str) -> Result<()> {
    let ok = |c: char| c.is_ascii_alphanumeric() || "._-@+".contains(c);
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(Error::invalid("a disk name has 1 to 128 bytes").on(format!("name {name:?}")));
    }
    if !name.chars().all(ok) || name.starts_with(['.', '-']) {
        return Err(Error::invalid("a disk name has letters, digits and . _ - @ + only")
            .hint("and starts with neither . nor -")
            .on(format!("name {name:?}")));
    }
    Ok(())
}

impl Superblock {
    /// The page of copy number `copy`.
    ///
    /// # Panics
    /// When `copy` is not below four, or the name is longer than [`NAME_MAX`]: callers check names.
    #[must_use]
    pub fn encode(&self, copy: usize) -> [u8; PAGE] {
        assert!(copy < SUPERBLOCK_COPIES);
        let mut raw = Raw::read_from_bytes(&[0; PAGE]).expect("a page is a superblock's size");
        raw.magic = MAGIC;
        raw.version = VERSION.into();
        raw.copy = u32::try_from(copy).expect("below four").into();
        raw.generation = self.generation.0.into();
        raw.incompat = self.features.incompat.into();
        raw.read_only_compat = self.features.read_only_compat.into();
        raw.compat = self.features.compat.into();
        raw.store = self.store.into_bytes();
        raw.segment = self.segment.into_bytes();
        raw.disk = self.disk.into_bytes();
        raw.parent_disk = self.parent_disk.into_bytes();
        raw.owner_epoch = self.owner_epoch.0.into();
        raw.virtual_size = self.virtual_size.into();
        raw.state = self.state.to_byte();
        raw.mode = self.mode.to_byte();
        raw.seal = self.seal.to_byte();
        raw.attached = self.attached.to_byte();
        raw.own_index = self.own_index.get().into();
        raw.name_len = u16::try_from(self.name.len()).expect("names are checked").into();
        raw.journal_extents = self.journal_extents.into();
        raw.journal_epoch = self.journal.epoch.0.into();
        raw.epoch = self.epoch.0.into();
        raw.journal_position = self.journal.position.into();
        raw.journal_seq = self.journal.seq.0.into();
        raw.journal_prev_crc = self.journal.prev_crc.into();
        raw.boot = self.boot.into_bytes();
        raw.root = self.root.encode();
        raw.table = self.table.encode();
        raw.sums = self.sums.encode();
        raw.extents_end = self.extents_end.0.into();
        raw.digest = self.digest;
        raw.created = self.created.into();
        raw.name[..self.name.len()].copy_from_slice(self.name.as_bytes());
        raw.successor = self.successor.into_bytes();
        raw.base = self.base.into_bytes();
        raw.crc = crc(&raw.as_bytes()[..PAGE - 4]).into();
        raw.as_bytes().try_into().expect("a superblock is a page")
    }

    /// The one decode point of superblock copies.
    ///
    /// # Errors `Corrupt` for wrong magic, checksum, copy number or any impossible field;
    /// `Unsupported` for a newer version or an unknown feature that forbids opening.
    pub fn decode(page: &[u8; PAGE], copy: usize) -> Result<Self> {
        let raw = Raw::ref_from_bytes(page).expect("a page is a superblock's size");
        raw.check(page, copy)?;
        let sb = Superblock {
            features: Features {
                incompat: raw.incompat.get(),
                read_only_compat: raw.read_only_compat.get(),
                compat: raw.compat.get(),
            },
            generation: Generation(raw.generation.get()),
            store: Uuid::from_bytes(raw.store),
            segment: Uuid::from_bytes(raw.segment),
            disk: Uuid::from_bytes(raw.disk),
            parent_disk: Uuid::from_bytes(raw.parent_disk),
            owner_epoch: OwnerEpoch(raw.owner_epoch.get()),
            virtual_size: raw.virtual_size.get(),
            state: State::from_byte(raw.state)?,
            mode: Mode::from_byte(raw.mode)?,
            seal: Seal::from_byte(raw.seal)?,
            own_index: SegmentIdx::new(raw.own_index.get().into())?,
            journal_extents: raw.journal_extents.get(),
            journal: JournalHead {
                epoch: Epoch(raw.journal_epoch.get()),
                position: raw.journal_position.get(),
                seq: Seq(raw.journal_seq.get()),
                prev_crc: raw.journal_prev_crc.get(),
            },
            epoch: Epoch(raw.epoch.get()),
            attached: Attached::from_byte(raw.attached)?,
            boot: Uuid::from_bytes(raw.boot),
            root: NodePtr::decode(&raw.root)?,
            table: ArrayRef::decode(&raw.table)?,
            sums: ArrayRef::decode(&raw.sums)?,
            extents_end: ExtentId(raw.extents_end.get()),
            digest: raw.digest,
            created: raw.created.get(),
            name: raw.name()?,
            successor: Uuid::from_bytes(raw.successor),
            base: Uuid::from_bytes(raw.base),
        };
        sb.check_ranges()?;
        Ok(sb)
    }

    fn check_ranges(&self) -> Result<()> {
        check_virtual_size(self.virtual_size).map_err(|e| Error::corrupt(e.reason().to_owned()))?;
        if !(JOURNAL_EXTENTS_MIN..=JOURNAL_EXTENTS_MAX).contains(&self.journal_extents) {
            return Err(Error::corrupt("the journal size is out of range"));
        }
        if self.journal.position >= self.journal_pages() {
            return Err(Error::corrupt("the journal head lies outside the journal"));
        }
        let ends = self.data_start()..=ExtentId(SEGMENT_EXTENTS_MAX);
        if !ends.contains(&self.extents_end) {
            return Err(Error::corrupt("the end of the segment is out of range"));
        }
        let counters = [self.generation.0, self.owner_epoch.0, self.epoch.0, self.journal.seq.0];
        if counters.into_iter().any(|c| c >= COUNTER_END) || self.journal.epoch > self.epoch {
            return Err(Error::corrupt("a counter is out of range"));
        }
        if (self.state == State::Active) != (self.seal == Seal::None) {
            return Err(Error::corrupt("segment state and seal state contradict each other"));
        }
        if !self.successor.is_nil()
            && (self.state == State::Active || self.successor == self.segment)
        {
            return Err(Error::corrupt("a segment that is no frozen one has a successor"));
        }
        let strange = self.mode == Mode::Persistent || self.base == self.segment;
        if strange && !self.base.is_nil() {
            return Err(Error::corrupt("persistence mode and base contradict each other"));
        }
        Ok(())
    }

    /// Pages of the journal ring.
    #[must_use]
    pub fn journal_pages(&self) -> u64 {
        self.journal_extents * crate::limits::BLOCKS_PER_EXTENT
    }

    /// File offset, in bytes, of page `position` of the journal ring.
    #[must_use]
    pub fn journal_offset(&self, position: u64) -> u64 {
        ExtentId(HEADER_EXTENTS).file_offset() + position * PAGE as u64
    }

    /// First extent that may hold data or map pages.
    #[must_use]
    pub fn data_start(&self) -> ExtentId {
        ExtentId(HEADER_EXTENTS + self.journal_extents)
    }

    /// Whether this build may write the segment.
    ///
    /// # Errors
    /// `Unsupported` when an unknown feature allows reading only, or when the disk has a
    /// persistence mode without a base: nothing says what it would go back to.
    pub fn check_writable_features(&self) -> Result<()> {
        let hint = "open it read-only, or use a newer version";
        if self.mode != Mode::Persistent && self.base.is_nil() {
            let reason = format!("its mode is {}, and it has no base", self.mode.name());
            return Err(Error::new(Kind::Unsupported, reason).hint(hint));
        }
        let unknown = self.features.read_only_compat & !KNOWN_FEATURES.read_only_compat;
        if unknown == 0 {
            return Ok(());
        }
        let reason = format!("features {unknown:#x} are unknown to this version; it may only read");
        Err(Error::new(Kind::Unsupported, reason).hint(hint))
    }
}

impl Raw {
    fn check(&self, page: &[u8; PAGE], copy: usize) -> Result<()> {
        if self.magic != MAGIC {
            return Err(Error::corrupt("wrong magic: not an Offshoot segment"));
        }
        // Before the version: a newer version keeps magic, checksum and copy number in place.
        if self.crc.get() != crc(&page[..PAGE - 4]) {
            return Err(Error::corrupt("checksum mismatch in a superblock"));
        }
        if u64::from(self.copy.get()) != copy as u64 {
            return Err(Error::corrupt("a superblock copy lies where another belongs"));
        }
        let newer = |what: String| {
            Err(Error::new(Kind::Unsupported, what).hint("use a newer version of offshoot"))
        };
        if self.version.get() != VERSION {
            return newer(format!("format version {} is not known here", self.version));
        }
        match self.incompat.get() & !KNOWN_FEATURES.incompat {
            0 => Ok(()),
            unknown => newer(format!("features {unknown:#x} are unknown to this version")),
        }
    }

    fn name(&self) -> Result<String> {
        let name = self.name.get(..usize::from(self.name_len.get()));
        let name = name.and_then(|n| std::str::from_utf8(n).ok());
        match name {
            Some("") => Ok(String::new()),
            Some(n) if check_name(n).is_ok() => Ok(n.to_owned()),
            _ => Err(Error::corrupt("the disk name in a superblock is not a name")),
        }
    }
}

/// The outcome of reading the four copies.
#[derive(Debug)]
pub struct Chosen {
    /// The newest valid state.
    pub superblock: Superblock,
    /// Why each copy that does not hold that state does not; `None` for those that do.
    pub complaints: [Option<Error>; SUPERBLOCK_COPIES],
}

/// Picks the newest valid copy.
///
/// # Errors
/// `Unsupported` if any copy is of a newer version; the error of the first copy when none is valid.
pub fn choose(pages: &[[u8; PAGE]; SUPERBLOCK_COPIES]) -> Result<Chosen> {
    let decoded: [_; SUPERBLOCK_COPIES] =
        std::array::from_fn(|copy| Superblock::decode(&pages[copy], copy));
    // A copy of a newer version, whole by its checksum, is a newer state than any this build can
    // read: to go on with an older copy would throw that state away.
    let is_newer =
        |d: &Result<Superblock>| d.as_ref().is_err_and(|e| e.kind() == Kind::Unsupported);
    if let Some(at) = decoded.iter().position(is_newer) {
        let newer = decoded.into_iter().nth(at).and_then(Result::err);
        return Err(newer.expect("just seen"));
    }
    let newest = decoded.iter().flatten().max_by_key(|sb| sb.generation).cloned();
    let Some(newest) = newest else {
        let [first, ..] = decoded;
        return Err(first.expect_err("no copy is valid"));
    };
    let complaints = decoded.map(|d| match d {
        Ok(sb) if sb == newest => None,
        Ok(sb) => Some(Error::corrupt(format!(
            "superblock copy has generation {}, the newest has {}",
            sb.generation, newest.generation
        ))),
        Err(e) => Some(e),
    });
    Ok(Chosen { superblock: newest, complaints })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Superblock {
        Superblock {
            features: Features::default(),
            generation: Generation(7),
            store: Uuid::from_u128(1),
            segment: Uuid::from_u128(2),
            disk: Uuid::from_u128(3),
            parent_disk: Uuid::nil(),
            owner_epoch: OwnerEpoch(1),
            virtual_size: 10 << 30,
            state: State::Active,
            mode: Mode::Persistent,
            seal: Seal::None,
            own_index: SegmentIdx::new(0).unwrap(),
            journal_extents: 4,
            journal: JournalHead { epoch: Epoch(1), position: 3, seq: Seq(900), prev_crc: 5 },
            epoch: Epoch(1),
            attached: Attached::WithTail,
            boot: Uuid::from_u128(4),
            root: NodePtr::Hole,
            table: ArrayRef::default(),
            sums: ArrayRef::default(),
            extents_end: ExtentId(40),
            digest: [0; 32],
            created: 1_700_000_000,
            name: "vm1".into(),
            successor: Uuid::nil(),
            base: Uuid::nil(),
        }
    }

    #[test]
    fn copies_survive_a_round_trip_and_know_their_place() {
        let sb = sample();
        for copy in 0..4 {
            assert_eq!(Superblock::decode(&sb.encode(copy), copy).unwrap(), sb);
            assert!(Superblock::decode(&sb.encode(copy), (copy + 1) % 4).is_err());
        }
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let page = sample().encode(0);
        for bit in 0..PAGE * 8 {
            let mut bad = page;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&bad, 0).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_version_from_the_future_is_unsupported_not_corrupt() {
        let mut page = sample().encode(0);
        page[8] = 2;
        let sum = crc(&page[..PAGE - 4]);
        page[PAGE - 4..].copy_from_slice(&sum.to_le_bytes());

        let err = Superblock::decode(&page, 0).unwrap_err();

        assert_eq!(err.kind(), Kind::Unsupported);
        assert!(err.to_string().contains("format version 2"), "{err}");
    }

    #[test]
    fn the_newest_valid_copy_wins_and_the_others_are_named() {
        let old = sample();
        let new = Superblock { generation: Generation(8), ..sample() };
        let mut pages = [new.encode(0), new.encode(1), old.encode(2), old.encode(3)];
        pages[1][200] ^= 1;

        let chosen = choose(&pages).unwrap();

        assert_eq!(chosen.superblock.generation, Generation(8));
        assert!(chosen.complaints[0].is_none());
        assert!(chosen.complaints[1].as_ref().unwrap().to_string().contains("checksum"));
        assert!(chosen.complaints[2].as_ref().unwrap().to_string().contains("generation 7"));
    }

    #[test]
    fn names_are_checked() {
        assert!(check_name("vm-1.disk_0@x").is_ok());
        for bad in ["", ".hidden", "-x", "a/b", "a b", "ä"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name(&"x".repeat(129)).is_err());
    }
}
