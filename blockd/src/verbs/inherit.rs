//! Forks whose children inherit: the parents stay as they are.

use std::time::Duration;

use format::{Context as _, Error, Result};

use super::{forked, forks, named, take_tail};
use crate::api::types::{ForkAnswer, ForkDisks, ForkMode, ForkedDisks};
use crate::pump::Watch;
use crate::storedir::{InheritOptions, Inherited, StoreDir};

/// Refuses what only children that inherit can be asked for.
///
/// # Errors
/// `Invalid`.
pub fn check_asked(request: &ForkDisks) -> Result<()> {
    let asked = request.base.is_some() || request.copy_threshold.is_some();
    if request.mode == ForkMode::Live && asked {
        return Err(Error::invalid("a base and a threshold are for children that inherit")
            .hint("ask for the mode `inherit`"));
    }
    if request.mode == ForkMode::Inherit && request.hold_ms.is_some() {
        return Err(Error::invalid("only a live fork can be held"));
    }
    if request.mode == ForkMode::Inherit && request.answer != ForkAnswer::Durable {
        return Err(Error::invalid("only a live fork can be answered before it is durable"));
    }
    Ok(())
}

/// What is asked for, in the words of the store.
#[must_use]
pub fn options(request: &ForkDisks) -> InheritOptions {
    InheritOptions { base: request.base.unwrap_or_default(), below: request.copy_threshold }
}

/// Lets children inherit from disks that nobody has open. `None` when that is not asked for, or
/// when there is more to copy than is asked for.
///
/// # Errors
/// As [`StoreDir::inherit`].
pub fn inherit(
    dir: &StoreDir,
    request: &ForkDisks,
    watch: &dyn Watch,
) -> Result<Option<Inherited>> {
    let inherit = || -> Result<Option<Inherited>> {
        check_asked(request)?;
        if request.mode == ForkMode::Live {
            return Ok(None);
        }
        for of in &request.disks {
            take_tail(dir, &of.disk, request.accept_lost_tail)?;
        }
        dir.inherit(&forks(request), &options(request), watch)
    };
    inherit().context("fork", || named(request))
}

/// What came of it: how long it took, and how long guests waited.
///
/// # Errors
/// What the host reports.
pub fn inherited(
    dir: &StoreDir,
    inherited: &Inherited,
    took: (Duration, Option<Duration>),
) -> Result<ForkedDisks> {
    let (copied, cloned) = (inherited.copied, inherited.cloned);
    let forked = forked(dir, &inherited.children, took)?;
    Ok(ForkedDisks { mode: ForkMode::Inherit, copied, cloned, ..forked })
}
