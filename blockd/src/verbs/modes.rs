//! Persistence modes: what becomes of what is written to a disk.

use format::superblock::Mode;
use format::{Context as _, Result};

use super::{summary, take_tail};
use crate::api::types::{Disk as Summary, SetMode};
use crate::storedir::{Keep, StoreDir};

/// What a request asks for.
///
/// # Errors
/// As [`Mode::named`].
pub fn mode(request: &SetMode) -> Result<Keep> {
    Mode::named(&request.mode).map(Keep::As)
}

/// Gives a disk that nobody has open another mode.
///
/// # Errors
/// As [`StoreDir::keep`], or `Unsupported` for a mode that there is not.
pub fn set_mode(dir: &StoreDir, name: &str, request: &SetMode) -> Result<Summary> {
    let set = || {
        let keep = mode(request)?;
        take_tail(dir, name, request.accept_lost_tail)?;
        dir.keep(name, keep)
    };
    let row = set().context("set the mode of", || format!("disk {name}"))?;
    summary(dir, &row)
}

/// Makes what a disk that nobody has open holds its base.
///
/// # Errors
/// As [`StoreDir::keep`].
pub fn commit(dir: &StoreDir, name: &str, accept_lost_tail: bool) -> Result<Summary> {
    let commit = || {
        take_tail(dir, name, accept_lost_tail)?;
        dir.keep(name, Keep::Committed)
    };
    let row = commit().context("commit", || format!("disk {name}"))?;
    summary(dir, &row)
}

/// Lets a disk that nobody has open go back to its base.
///
/// # Errors
/// As [`StoreDir::undo`].
pub fn undo(dir: &StoreDir, name: &str) -> Result<Summary> {
    let row = dir.undo(name).context("undo", || format!("disk {name}"))?;
    summary(dir, &row)
}
