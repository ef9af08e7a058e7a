//! Children that inherit, of disks in service and of others.
//!
//! The parent's running point stays, so what is copied must not change meanwhile: the gate of a
//! disk in service is closed for as long as the copy takes, and its guest waits. That is for small
//! amounts only: at most [`COPY_MAX_IN_SERVICE`], unless the caller says how much is acceptable.
//! Nothing of the parent is written, so a process that is killed meanwhile leaves it as any killed
//! process does; children are there or not as `storedir/inherit.rs` says.
//!
//! Tests: `inherit`.

use std::sync::Arc;
use std::time::Instant;

use format::{Context as _, Error, Kind, Result};

use super::Daemon;
use super::cut::{DRAIN_MAX, Volumes};
use super::jobs::Running;
use crate::api::types::{ForkDisks, ForkMode, ForkedDisks};
use crate::disk::Disk;
use crate::disk::gate::Closed;
use crate::disk::still::Still;
use crate::store::Access;
use crate::storedir::{Bequest, ForkOf, InheritOptions, Inherited, StoreDir};
use crate::verbs;

/// Bytes that guests wait for while they are copied, unless more is asked for.
const COPY_MAX_IN_SERVICE: u64 = 64 << 20;

/// A disk that is inherited from, and how it is open; `None` for a root.
type Parent = Option<Arc<Disk>>;

impl Daemon {
    /// Lets children inherit, or forks when there is more to copy than is asked for.
    ///
    /// # Errors
    /// As [`verbs::fork`]; `Busy` when somebody reads one of the disks beside its front ends, when
    /// requests in work do not end in time, and for a disk in service that would have to be sealed
    /// or has too much to copy.
    pub fn inherit(self: &Arc<Self>, request: &ForkDisks, job: &Running) -> Result<ForkedDisks> {
        let began = Instant::now();
        let inherit = || -> Result<Option<ForkedDisks>> {
            let changing = self.service.changing.lock();
            let (volumes, _holds) = self.hold_all(request)?;
            // Disks that are not in service are held by their names.
            let _changing = (!volumes.is_empty()).then_some(changing);
            let dir = self.dir()?;
            for of in request.disks.iter().filter(|of| !volumes.contains_key(&of.disk)) {
                verbs::take_tail(&dir, &of.disk, request.accept_lost_tail)?;
            }
            inherit_held(&dir, request, (&volumes, began), job)
        };
        let Some(inherited) = inherit().context("fork", || verbs::named(request))? else {
            return self.fork(&ForkDisks {
                mode: ForkMode::Live,
                base: None,
                copy_threshold: None,
                ..request.clone()
            });
        };
        self.tell_of_fork(request);
        Ok(inherited)
    }
}

/// Opens what is not in service.
fn open(dir: &StoreDir, of: &ForkOf, volumes: &Volumes) -> Result<Parent> {
    let served = volumes.get(&of.disk).map(|volume| volume.disk());
    match (dir.is_root(&of.disk)?, served) {
        (true, Some(_)) => {
            let reason = "it stands on nothing, so it would be sealed, and it is in service";
            Err(Error::new(Kind::Busy, reason)
                .on(format!("disk {}", of.disk))
                .hint("take it out of service first (`offshoot disk detach`), or fork it live"))
        }
        (true, None) => Ok(None),
        (false, Some(disk)) => Ok(Some(disk)),
        (false, None) => {
            let disk = dir.open_disk(&of.disk, Access::Read, &dir.disk_options())?;
            Ok(Some(Arc::new(disk)))
        }
    }
}

fn inherit_held(
    dir: &StoreDir,
    request: &ForkDisks,
    (volumes, began): (&Volumes, Instant),
    job: &Running,
) -> Result<Option<ForkedDisks>> {
    let (wanted, asked) = (verbs::forks(request), verbs::options(request));
    dir.check_inherit(&wanted)?;
    let parents = wanted.iter().map(|of| open(dir, of, volumes)).collect::<Result<Vec<_>>>()?;
    let waits = |disk: &Disk| disk.is_writable();
    let waiting = parents.iter().flatten().any(|disk| waits(disk));
    let most = if waiting { Some(COPY_MAX_IN_SERVICE) } else { None };
    let options = InheritOptions { below: asked.below.or(most), ..asked };
    // Looked at before guests wait, and once more when nothing changes any more.
    if waiting && too_much(dir, (&wanted, &parents), &options)? {
        return refuse_or_share(request);
    }
    let paused_at = Instant::now();
    let gates = parents.iter().map(|parent| match parent.as_deref() {
        Some(disk) if waits(disk) => disk.pause(DRAIN_MAX).map(Some),
        _ => Ok(None),
    });
    let gates = gates.collect::<Result<Vec<_>>>()?;
    let inherited = inherit_still(dir, (&wanted, &parents, &gates), &options, job);
    drop(gates);
    let pause = waiting.then(|| paused_at.elapsed());
    match inherited? {
        Some(made) => verbs::inherited(dir, &made, (began.elapsed(), pause)).map(Some),
        None => refuse_or_share(request),
    }
}

fn inherit_still(
    dir: &StoreDir,
    (wanted, parents, gates): (&[ForkOf], &[Parent], &[Option<Closed<'_>>]),
    options: &InheritOptions,
    job: &Running,
) -> Result<Option<Inherited>> {
    let bequest = |((of, parent), gate)| -> Bequest<'_> {
        let (parent, gate): (&Parent, &Option<Closed<'_>>) = (parent, gate);
        let still = parent.as_deref().map(|disk| match gate {
            Some(gate) => Still::paused(disk, gate),
            None => Still::unwritten(disk),
        });
        Bequest { of, still }
    };
    let bequests: Vec<_> = wanted.iter().zip(parents).zip(gates).map(bequest).collect();
    dir.inherit_from(&bequests, options, job)
}

fn too_much(
    dir: &StoreDir,
    (wanted, parents): (&[ForkOf], &[Parent]),
    options: &InheritOptions,
) -> Result<bool> {
    let mut bytes = 0;
    for (of, parent) in wanted.iter().zip(parents) {
        if let Some(disk) = parent {
            bytes += dir.to_inherit(disk, of, options.base)?;
        }
    }
    Ok(options.below.is_some_and(|below| bytes >= below))
}

/// What becomes of a request that has too much to copy.
fn refuse_or_share(request: &ForkDisks) -> Result<Option<ForkedDisks>> {
    if request.copy_threshold.is_some() {
        return Ok(None);
    }
    let reason = format!(
        "it is in service, and would have to wait until {} MiB or more are copied",
        COPY_MAX_IN_SERVICE >> 20
    );
    Err(Error::new(Kind::Busy, reason)
        .hint("set --copy-threshold (above it, the fork is live), or take the disk out of service"))
}
