//! `disk check`, `disk repair`, `disk scrub`.

use std::sync::Arc;

use blockd::check::{
    Action, CheckOptions, Loss, RepairOptions, RepairReport, Report, ScrubReport, Why,
    check as check_disk, repair as repair_disk, scrub as scrub_disk,
};
use blockd::disk::left_tail;
use blockd::disk::problem::Problem;
use blockd::disk::tail::Tail;
use blockd::segment::read_superblock;
use blockd::store::{Access, File};
use blockd::storedir::StoreDir;
use format::{Context as _, Error, Result};
use serde::Serialize;

use super::{Session, disk_options};
use crate::cli::{Check, LostTail, Name, Repair};
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::signals;
use crate::size::show;

/// A report, with the name that the disk has in the catalogue.
#[derive(Serialize)]
struct Named<'a, T> {
    disk: &'a str,
    #[serde(flatten)]
    report: T,
}

fn found(clean: bool) -> Verdict {
    if clean { Verdict::Done } else { Verdict::Found }
}

/// The file of a disk.
fn file_of(dir: &StoreDir, name: &str, access: Access) -> Result<Arc<dyn File>> {
    let row = dir.disk(name).context("open", || format!("disk {name}"))?;
    dir.segment_file(row.segment, access).context("open", || format!("disk {name}"))
}

/// What a killed process left in memory, if anything.
fn tail_of(dir: &StoreDir, name: &str, lost: LostTail) -> Result<Option<Tail>> {
    let file = file_of(dir, name, Access::Read)?;
    let sb = read_superblock(file.as_ref())?.superblock;
    left_tail(&sb, &disk_options(dir, lost))
}

/// `disk check`
pub fn check(s: &Session, args: &Check) -> Outcome {
    let dir = s.open(Access::Read)?;
    let name = &args.disk.name;
    let object = || format!("disk {name}");
    let run = || -> Result<Report> {
        let file = file_of(&dir, name, Access::Read)?;
        let tail = tail_of(&dir, name, args.disk.tail)?;
        check_disk(&file, &dir, tail.as_ref(), &CheckOptions { data: args.data })
    };
    let report = run().context("check", object)?;
    let clean = report.clean;
    let named = Named { disk: name, report };
    s.out.confirm(&named, || render_report(name, &named.report))?;
    Ok(found(clean))
}

fn render_report(name: &str, report: &Report) -> String {
    let stats = &report.stats;
    let mut lines = vec![format!(
        "disk {name}: {} of data, {} of them its own; {}",
        show(stats.mapped_bytes),
        show(stats.own_data_bytes),
        if report.clean { "nothing is wrong" } else { "something is wrong" }
    )];
    lines.extend(report.problems.iter().map(render_problem));
    if let Some(bytes) = stats.unsummed_bytes.filter(|b| *b > 0) {
        lines.push(format!("{} have no checksum: they are in active segments", show(bytes)));
    }
    if !report.clean && !report.repairable {
        lines.push("a repair cannot mend all of it".into());
    }
    lines.join("\n")
}

fn render_problem(p: &Problem) -> String {
    let cost = p.range.map(|r| format!(" [{} bytes at {}]", r.len, r.offset));
    let (what, cost) = (p.what.name(), cost.unwrap_or_default());
    format!("{what}: {}: {}{cost} ({})", p.object, p.detail, p.remedy.name())
}

/// `disk scrub`
pub fn scrub(s: &Session, args: &Name) -> Outcome {
    let dir = s.open(Access::Read)?;
    let name = &args.name;
    let report = scrub_of(s, &dir, name).context("scrub", || format!("disk {name}"))?;
    let clean = report.clean;
    let named = Named { disk: name, report };
    s.out.confirm(&named, || {
        let r = &named.report;
        let mut lines = vec![format!(
            "disk {name}: {} in {} sealed segments compared with their checksums, {} have none; {}",
            show(r.summed_bytes),
            r.segments,
            show(r.unsummed_bytes),
            if clean { "nothing is wrong" } else { "something is wrong" }
        )];
        lines.extend(r.problems.iter().map(render_problem));
        lines.join("\n")
    })?;
    Ok(found(clean))
}

fn scrub_of(s: &Session, dir: &StoreDir, name: &str) -> Result<ScrubReport> {
    let progress = Progress::new(s.out, "verifying");
    let file = file_of(dir, name, Access::Read)?;
    scrub_disk(&file, dir, &mut |done, total| {
        progress.set(done, total);
        signals::check()
    })
}

/// Refuses a disk whose sealed data does not match its checksums.
///
/// # Errors
/// `Corrupt`, naming the first block, or what reading it reports.
pub fn verify(s: &Session, dir: &StoreDir, name: &str) -> Result<()> {
    let report = scrub_of(s, dir, name)?;
    match report.problems.first().filter(|_| !report.clean) {
        None => Ok(()),
        Some(p) => Err(Error::corrupt(format!("{}: {}", p.object, p.detail))
            .hint("`offshoot disk scrub` lists what is damaged")),
    }
}

/// `disk repair`
pub fn repair(s: &Session, args: &Repair) -> Outcome {
    let access = if args.dry_run { Access::Read } else { Access::Write };
    let dir = s.open(access)?;
    let name = &args.disk.name;
    let options = RepairOptions {
        leaks: true,
        older_generation: args.older_generation,
        drop_damaged: args.drop_damaged,
        accept_journal_loss: args.accept_journal_loss,
        unshare: args.unshare,
        dry_run: args.dry_run,
    };
    let run = || -> Result<RepairReport> {
        let tail = tail_of(&dir, name, args.disk.tail)?;
        if args.dry_run {
            let file = file_of(&dir, name, access)?;
            return repair_disk(&file, &dir, tail.as_ref(), &options);
        }
        writing(&dir, name, |file| repair_disk(file, &dir, tail.as_ref(), &options))
    };
    let report = run().context("repair", || format!("disk {name}"))?;
    let clean = report.after.as_ref().unwrap_or(&report.before).clean;
    let named = Named { disk: name, report };
    s.out.confirm(&named, || render_repair(name, &named.report))?;
    Ok(found(clean))
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

fn render_repair(name: &str, report: &RepairReport) -> String {
    let tense = if report.dry_run { "to do" } else { "done" };
    let mut lines: Vec<String> =
        report.actions.iter().map(|a| format!("{tense}: {}", render_action(a))).collect();
    if lines.is_empty() {
        lines.push("nothing to do".into());
    }
    lines.extend(report.lost.iter().map(render_loss));
    lines.extend(report.refused.iter().map(|r| format!("not done: {r}")));
    if let Some(after) = &report.after {
        lines.push(render_report(name, after));
    }
    lines.join("\n")
}

fn render_action(action: &Action) -> String {
    match action {
        Action::RewriteSuperblocks { copies } => format!("rewrite {copies} superblock copies"),
        Action::UseOlderGeneration { newest, older, regained_bytes } => format!(
            "go back from generation {newest} to {older}, {} can be read again",
            show(*regained_bytes)
        ),
        Action::DropDamaged { bytes } => format!("make {} of damaged ranges zero", show(*bytes)),
        Action::AcceptJournalLoss { first_missing, tail_records } => format!(
            "forget the journal from record {first_missing} on, and {tail_records} in memory"
        ),
        Action::Unshare { extents } => format!("give {extents} extents a copy of their own"),
        Action::Checkpoint { records } => format!("take {records} journal records into the map"),
        Action::PunchLeaks { bytes } => format!("give {} of unused space back", show(*bytes)),
    }
}

fn render_loss(loss: &Loss) -> String {
    let why = match loss.why {
        Why::Damaged => "its map was damaged, it reads as zeroes",
        Why::Shared => "its extent was used twice, it may hold other data",
        Why::Differs => "the older state says something else",
    };
    format!("lost: {} bytes at {}: {why}", loss.range.len, loss.range.offset)
}
