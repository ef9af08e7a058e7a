//! Reading a whole disk back and comparing it with what it may hold.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use blockd::disk::map::Piece;
use blockd::disk::problem::What;
use blockd::disk::{Disk, Options};
use blockd::segment::{file_name, read_superblock};
use blockd::store::sim::SimStore;
use blockd::store::{Access, File, Store};
use format::entry::BlockState;
use format::superblock::State;
use format::units::GuestBlock;
use format::{Result, limits};
use uuid::Uuid;

use crate::model::{Allowed, Contents, seal_number};
use crate::pattern::{Found, SECTOR, look};
use crate::sim::ByName;

/// What was found to be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Wrong {
    /// The code panicked.
    Panic,
    /// The disk is not there.
    Missing,
    /// It cannot be opened or read.
    Error,
    /// It opens with problems.
    Problem,
    /// It has a size that it never had or should not have any more.
    Size,
    /// It is sealed and should not be, or the other way round.
    Seal,
    /// A sector holds what belongs to another sector.
    Foreign,
    /// A sector holds what was never written.
    Garbage,
    /// A sector holds an older or newer value than it may.
    Value,
    /// It does not go on working.
    GoesOn,
}

/// Something wrong, with the evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// What.
    pub wrong: Wrong,
    /// The evidence.
    pub text: String,
}

impl Violation {
    /// A violation.
    pub fn new(wrong: Wrong, text: impl fmt::Display) -> Self {
        Violation { wrong, text: text.to_string() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.wrong, self.text)
    }
}

/// What a disk holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Size in sectors.
    pub sectors: u64,
    /// State of sealing, as a number.
    pub seal: u8,
    /// Every sector that is not zero.
    pub tags: Contents,
}

impl Content {
    /// Compares with what the disk may hold; `sectors` are those that `allowed` is about.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, sectors: &[u64], allowed: &Allowed) -> Result<(), Violation> {
        if !allowed.sizes.contains(&self.sectors) {
            let text = format!("{} sectors, allowed: {:?}", self.sectors, allowed.sizes);
            return Err(Violation::new(Wrong::Size, text));
        }
        if !allowed.seals.contains(&self.seal) {
            let text = format!("state of sealing {}, allowed: {:?}", self.seal, allowed.seals);
            return Err(Violation::new(Wrong::Seal, text));
        }
        let mut found = self.tags.iter().peekable();
        for (sector, tags) in sectors.iter().zip(&allowed.tags) {
            if *sector >= self.sectors {
                break;
            }
            let here = found.next_if(|(s, _)| *s <= sector);
            let tag = match here {
                None => 0,
                Some((s, tag)) if s == sector => *tag,
                Some((s, tag)) => return Err(never(*s, *tag)),
            };
            if !tags.contains(&tag) {
                let text = format!("sector {sector} holds write {tag}, allowed: {tags:?}");
                return Err(Violation::new(Wrong::Value, text));
            }
        }
        match found.next() {
            Some((sector, tag)) => Err(never(*sector, *tag)),
            None => Ok(()),
        }
    }
}

fn never(sector: u64, tag: u32) -> Violation {
    Violation::new(Wrong::Garbage, format!("sector {sector} was never written, holds {tag}"))
}

/// An extent of the virtual disk may own one extent of its segment's file, at most.
fn one_place_each(disk: &Disk, pieces: &[Piece]) -> Result<(), Violation> {
    let mut places = BTreeMap::new();
    for piece in pieces {
        let BlockState::Data { segment, block } = piece.state else { continue };
        for i in (0..piece.count).filter(|_| segment == disk.map().own()) {
            let (at, place) = (piece.block.plus(i).extent(), block.plus(i).extent());
            let first = *places.entry(at).or_insert(place);
            if first != place {
                let text = format!("extent {at} of the disk owns both {first} and {place}");
                return Err(Violation::new(Wrong::Problem, text));
            }
        }
    }
    let mut owners = BTreeMap::new();
    for (at, place) in places {
        if let Some(other) = owners.insert(place, at) {
            let text = format!("extents {other} and {at} of the disk both own {place}");
            return Err(Violation::new(Wrong::Problem, text));
        }
    }
    Ok(())
}

/// Every sector of a disk that is not zero, read through the disk.
///
/// # Errors
/// What reading reports, a sector that no write of a test made, or space that is used twice.
pub fn contents(disk: &Disk) -> Result<Contents, Violation> {
    let error = |e| Violation::new(Wrong::Error, e);
    let mut pieces = Vec::new();
    let blocks = disk.size().div_ceil(limits::BLOCK);
    disk.map()
        .resolve(GuestBlock(0), blocks, &mut |piece| {
            if !piece.state.reads_zero() {
                pieces.push(piece);
            }
            Ok(())
        })
        .map_err(error)?;
    one_place_each(disk, &pieces)?;
    let mut found = Contents::new();
    for piece in pieces {
        let offset = piece.block.offset().0;
        let len = (piece.count * limits::BLOCK).min(disk.size() - offset);
        let mut bytes = vec![0; usize::try_from(len).expect("a length")];
        disk.read(0, offset, &mut bytes).map_err(error)?;
        for (at, sector) in (offset / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            match look(sector, at) {
                Found::Zero => {}
                Found::Tag(tag) => _ = found.insert(at, tag),
                Found::Foreign { tag, sector } => {
                    let text = format!("sector {at} holds sector {sector} of write {tag}");
                    return Err(Violation::new(Wrong::Foreign, text));
                }
                Found::Garbage => {
                    let text = format!("sector {at} holds what was never written");
                    return Err(Violation::new(Wrong::Garbage, text));
                }
            }
        }
    }
    Ok(found)
}

/// Opens the disk for writing (or for reading, when it is sealed) and says what it holds.
///
/// # Errors
/// When it does not open, opens with problems other than superblock copies, or cannot be read.
pub fn open_and_read(
    store: &SimStore,
    segment: Uuid,
    options: &Options,
) -> Result<(Disk, Content), Violation> {
    let error = |e| Violation::new(Wrong::Error, e);
    let name = file_name(segment);
    if !store.names().map_err(error)?.contains(&name) {
        return Err(Violation::new(Wrong::Missing, format!("{name} is not there")));
    }
    let file = store.open(&name, Access::Read).map_err(error)?;
    let sb = read_superblock(file.as_ref()).map_err(error)?.superblock;
    let parents = ByName(store);
    let opened = if sb.state == State::Sealed {
        Disk::open_read_only(file, &parents, options)
    } else {
        let file: Arc<dyn File> = store.open(&name, Access::Write).map_err(error)?;
        Disk::open(file, &parents, options)
    };
    let disk = opened.map_err(error)?;
    let bad = disk.problems.iter().find(|p| p.what != What::SuperblockCopy);
    if let Some(problem) = bad {
        return Err(Violation::new(Wrong::Problem, format!("{problem:?}")));
    }
    let tags = contents(&disk)?;
    let content =
        Content { sectors: disk.size() / SECTOR as u64, seal: seal_number(sb.seal), tags };
    Ok((disk, content))
}

/// Reads every byte of a disk through [`Disk::read`] and compares with `tags`: the map that
/// [`contents`] relies on agrees with what readers see.
///
/// # Errors
/// The first difference.
pub fn read_all(disk: &Disk, tags: &Contents) -> Result<(), Violation> {
    const CHUNK: u64 = 1 << 20;
    let mut offset = 0;
    while offset < disk.size() {
        let len = CHUNK.min(disk.size() - offset);
        let mut bytes = vec![1; usize::try_from(len).expect("a length")];
        disk.read(0, offset, &mut bytes).map_err(|e| Violation::new(Wrong::Error, e))?;
        for (at, sector) in (offset / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            let want = tags.get(&at).map_or(Found::Zero, |tag| Found::Tag(*tag));
            let found = look(sector, at);
            if found != want {
                let text = format!("sector {at}: {found:?} is read, {want:?} was found before");
                return Err(Violation::new(Wrong::Value, text));
            }
        }
        offset += len;
    }
    Ok(())
}
