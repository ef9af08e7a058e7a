//! `disk flatten` and `disk fork --flatten now`.

use std::time::{Duration, Instant};

use format::{Context as _, Result};

use super::{summary, take_tail};
use crate::api::types::{Disk, FlattenDisk, Flattened, SetFlattenPolicy};
use crate::catalogue::Flattening;
use crate::pump::Watch;
use crate::storedir::{StoreDir, TO_BASE};

/// What is asked for, in the words of the store.
#[must_use]
pub fn flattening(request: &FlattenDisk) -> Flattening {
    let to = request.to.clone().unwrap_or_else(|| TO_BASE.into());
    Flattening { to, rate: request.rate }
}

/// Flattens a disk that nobody has open.
///
/// # Errors
/// As [`StoreDir::flatten`].
pub fn flatten(
    dir: &StoreDir,
    name: &str,
    request: &FlattenDisk,
    watch: &dyn Watch,
) -> Result<Flattened> {
    let began = Instant::now();
    let object = || format!("disk {name}");
    take_tail(dir, name, request.accept_lost_tail).context("flatten", object)?;
    let before = dir.disk(name)?.parents.len() as u64;
    let copied = dir.flatten(name, &flattening(request), watch)?;
    flattened(dir, name, (before, copied, began.elapsed()))
}

/// What came of it: segments below the disk before, bytes copied, and how long it took.
///
/// # Errors
/// What the host reports.
pub fn flattened(
    dir: &StoreDir,
    name: &str,
    (depth_before, copied, took): (u64, u64, Duration),
) -> Result<Flattened> {
    let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    Ok(Flattened { disk: summary(dir, &dir.disk(name)?)?, depth_before, copied, took_ms })
}

/// Sets when a daemon flattens a disk by itself.
///
/// # Errors
/// `NotFound`, or what the host reports.
pub fn set_disk_policy(dir: &StoreDir, name: &str, to: &SetFlattenPolicy) -> Result<Disk> {
    let set = dir.set_flatten_policy(Some(name), to.policy);
    set.context("set the flatten policy of", || format!("disk {name}"))?;
    summary(dir, &dir.disk(name)?)
}

/// When a daemon flattens disks by itself that say nothing of their own.
#[must_use]
pub fn store_policy(dir: &StoreDir) -> SetFlattenPolicy {
    SetFlattenPolicy { policy: Some(dir.flatten_policy()) }
}

/// Sets that.
///
/// # Errors
/// What the host reports.
pub fn set_store_policy(dir: &StoreDir, to: &SetFlattenPolicy) -> Result<SetFlattenPolicy> {
    dir.set_flatten_policy(None, to.policy)
        .context("set the flatten policy of", || "the store".into())?;
    Ok(store_policy(dir))
}
