//! Checking, scrubbing and repairing a disk that nobody has open for writing.

use std::sync::Arc;

use format::{Context as _, Error, Result};

use super::disk_options;
use crate::api::types::{CheckDisk, Checked, RepairDisk, Repaired, Scrubbed};
use crate::check::{
    self, CheckOptions, RepairOptions, RepairReport, Report, ScrubReport, check_watched,
};
use crate::disk::left_tail;
use crate::disk::tail::Tail;
use crate::pump::Watch;
use crate::segment::read_superblock;
use crate::store::{Access, File};
use crate::storedir::StoreDir;

/// The file of a disk.
fn file_of(dir: &StoreDir, name: &str, access: Access) -> Result<Arc<dyn File>> {
    let row = dir.disk(name).context("open", || format!("disk {name}"))?;
    dir.segment_file(row.segment, access).context("open", || format!("disk {name}"))
}

/// What a killed process left in memory, if anything.
fn tail_of(dir: &StoreDir, name: &str, accept_lost_tail: bool) -> Result<Option<Tail>> {
    let file = file_of(dir, name, Access::Read)?;
    let sb = read_superblock(file.as_ref())?.superblock;
    left_tail(&sb, &disk_options(dir, accept_lost_tail))
}

/// Tells whoever watches how far it is, and asks whether to go on.
fn report_to(watch: &dyn Watch) -> impl FnMut(u64, u64) -> Result<()> {
    |done, total| {
        watch.set(done, total);
        watch.check()
    }
}

/// Checks the structure of a disk, and its sealed data if asked to.
///
/// # Errors
/// As [`check::check`], or what `watch` reports.
pub fn check(dir: &StoreDir, name: &str, request: CheckDisk, watch: &dyn Watch) -> Result<Checked> {
    let run = || -> Result<Report> {
        let file = file_of(dir, name, Access::Read)?;
        let tail = tail_of(dir, name, request.accept_lost_tail)?;
        let options = CheckOptions { data: request.data };
        check_watched(&file, dir, tail.as_ref(), &options, &mut report_to(watch))
    };
    let report = run().context("check", || format!("disk {name}"))?;
    Ok(Checked { disk: name.into(), report })
}

/// Compares the sealed data of a disk with its checksums.
///
/// # Errors
/// As [`check::scrub`], or what `watch` reports.
pub fn scrub(dir: &StoreDir, name: &str, watch: &dyn Watch) -> Result<Scrubbed> {
    let report = scrub_of(dir, name, watch).context("scrub", || format!("disk {name}"))?;
    Ok(Scrubbed { disk: name.into(), report })
}

fn scrub_of(dir: &StoreDir, name: &str, watch: &dyn Watch) -> Result<ScrubReport> {
    let file = file_of(dir, name, Access::Read)?;
    check::scrub(&file, dir, &mut report_to(watch))
}

/// Refuses a report that found something.
///
/// # Errors
/// `Corrupt`, naming the first problem.
pub fn verify(report: &ScrubReport) -> Result<()> {
    match report.problems.first().filter(|_| !report.clean) {
        None => Ok(()),
        Some(p) => Err(Error::corrupt(format!("{}: {}", p.object, p.detail))
            .hint("`offshoot disk scrub` lists what is damaged")),
    }
}

/// Repairs a disk.
///
/// # Errors
/// As [`check::repair`].
pub fn repair(dir: &StoreDir, name: &str, request: RepairDisk) -> Result<Repaired> {
    let options = RepairOptions {
        leaks: true,
        older_generation: request.older_generation,
        drop_damaged: request.drop_damaged,
        accept_journal_loss: request.accept_journal_loss,
        unshare: request.unshare,
        dry_run: request.dry_run,
    };
    let run = || -> Result<RepairReport> {
        let tail = tail_of(dir, name, request.accept_lost_tail)?;
        if request.dry_run {
            let file = file_of(dir, name, Access::Read)?;
            return check::repair(&file, dir, tail.as_ref(), &options);
        }
        writing(dir, name, |file| check::repair(file, dir, tail.as_ref(), &options))
    };
    let report = run().context("repair", || format!("disk {name}"))?;
    Ok(Repaired { disk: name.into(), report })
}

/// Runs `work` on the file of a disk, which nobody else writes to meanwhile.
fn writing<T>(
    dir: &StoreDir,
    name: &str,
    work: impl FnOnce(&Arc<dyn File>) -> Result<T>,
) -> Result<T> {
    let sealed = dir.disk(name)?.sealed;
    if sealed {
        // Its superblock copies may need to be rewritten. What makes it immutable is what they say.
        file_of(dir, name, Access::Read)?.set_read_only(false)?;
    }
    let file = file_of(dir, name, Access::Write)?;
    let done = file.lock().and_then(|()| work(&file));
    let closed = if sealed { file.set_read_only(true) } else { Ok(()) };
    let done = done?;
    closed.map(|()| done)
}
