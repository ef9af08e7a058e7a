//! What can be asked of the disks of a store, with the answers as people and programs read them.
//!
//! The command line calls these functions when it has the store itself, the daemon when somebody
//! asks it over its socket: so both say the same. Nothing here opens a disk by name for itself:
//! whether a disk is open already, and who may have it, is the caller's to know.

mod bytes;
mod check;
mod compare;
mod digest;
mod disks;
mod flatten;
mod inherit;
mod map;
mod modes;

use format::{Context as _, Result};

use crate::api::types::{ByteRange, Moved};
use crate::disk::{Disk, Options};
use crate::pump;
use crate::storedir::StoreDir;

pub use bytes::{check_end, write_bytes, zero};
pub use check::{check, repair, scrub, verify};
pub use compare::{Contents, compare, content_ranges, disk_ranges};
pub use digest::digest;
use disks::hex;
pub(crate) use disks::take_tail;
pub use disks::{
    create, details, df, fork, forked, forks, freed, list, named, resize, resize_open, seal,
    summary,
};
pub use flatten::{
    flatten, flattened, flattening, set_disk_policy, set_store_policy, store_policy,
};
pub(crate) use inherit::{check_asked, inherited, options};
pub use map::walk as walk_map;
pub use modes::{commit, mode, set_mode, undo};

/// Notes about one disk that are passed on; a disk can have thousands of problems.
const NOTES_MAX: usize = 30;

/// Options to open a disk with, for verbs.
#[must_use]
pub fn disk_options(dir: &StoreDir, accept_lost_tail: bool) -> Options {
    Options { lanes: pump::lanes(), accept_lost_tail, ..dir.disk_options() }
}

/// What is wrong with a disk that could be opened, for whoever opened it.
#[must_use]
pub fn warnings(name: &str, disk: &Disk) -> Vec<String> {
    let problems = disk.problems.iter();
    let lines = problems.map(|p| format!("warning: disk {name}: {}: {}", p.object, p.detail));
    let mut notes: Vec<String> = lines.take(NOTES_MAX).collect();
    if disk.problems.len() > notes.len() {
        let more = disk.problems.len() - notes.len();
        notes.push(format!("warning: disk {name}: {more} more problems"));
    }
    if !notes.is_empty() {
        notes.push("`offshoot disk check` lists them, with what mends each".into());
    }
    notes
}

/// The ranges of the disk `name` that may differ from `from`. `each` is called between two of them,
/// and may stop the walk.
///
/// # Errors
/// `Corrupt` in a damaged range of either disk, or what `each` reports.
pub fn changed(
    name: &str,
    disk: &Disk,
    from: &Disk,
    each: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<ByteRange>> {
    let mut ranges = Vec::new();
    let size = disk.size();
    let walked = crate::diff::changed(disk, from, &mut |range| {
        // What only the other disk has lies past the end of this one.
        let end = (range.offset + range.len).min(size);
        if range.offset < end {
            ranges.push(ByteRange { offset: range.offset, length: end - range.offset });
        }
        each()
    });
    walked.context("compare", || format!("disk {name}"))?;
    Ok(ranges)
}

/// Makes a part of a disk read as zeroes, and closes the disk.
///
/// # Errors
/// As [`Disk::discard`].
pub fn discard(name: &str, disk: Disk, range: ByteRange) -> Result<Moved> {
    let object = || format!("disk {name}");
    let ByteRange { offset, length } = range;
    let done = disk.discard(0, offset, length).context("discard", object);
    let closed = disk.close().context("discard", object);
    done.and(closed)?;
    Ok(Moved { disk: name.into(), offset, length })
}
