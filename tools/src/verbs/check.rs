//! `disk check`, `disk repair`, `disk scrub`.

use blockd::api::types::{CheckDisk, RepairDisk};
use blockd::check::{Action, Loss, RepairReport, Report, Why};
use blockd::disk::problem::Problem;
use blockd::store::Access;

use super::Session;
use crate::cli::{Check, Name, Repair};
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::size::show;

fn found(clean: bool) -> Verdict {
    if clean { Verdict::Done } else { Verdict::Found }
}

/// `disk check`
pub fn check(s: &Session, args: &Check) -> Outcome {
    let store = s.open(Access::Read)?;
    let name = &args.disk.name;
    let accept_lost_tail = args.disk.tail.accept_lost_tail;
    let progress = Progress::new(s.out, "checking");
    let request = CheckDisk { data: args.data, accept_lost_tail };
    let checked = store.check(name, request, &progress)?;
    drop(progress);
    s.out.confirm(&checked, || render_report(name, &checked.report))?;
    Ok(found(checked.report.clean))
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
    let store = s.open(Access::Read)?;
    let name = &args.name;
    let progress = Progress::new(s.out, "verifying");
    let scrubbed = store.scrub(name, &progress)?;
    drop(progress);
    let clean = scrubbed.report.clean;
    s.out.confirm(&scrubbed, || {
        let r = &scrubbed.report;
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

/// `disk repair`
pub fn repair(s: &Session, args: &Repair) -> Outcome {
    let access = if args.dry_run { Access::Read } else { Access::Write };
    let store = s.open(access)?;
    let name = &args.disk.name;
    let request = RepairDisk {
        drop_damaged: args.drop_damaged,
        older_generation: args.older_generation,
        accept_journal_loss: args.accept_journal_loss,
        unshare: args.unshare,
        dry_run: args.dry_run,
        accept_lost_tail: args.disk.tail.accept_lost_tail,
    };
    let progress = Progress::new(s.out, "repairing");
    let repaired = store.repair(name, request, &progress)?;
    drop(progress);
    let report = &repaired.report;
    s.out.confirm(&repaired, || render_repair(name, report))?;
    Ok(found(report.after.as_ref().unwrap_or(&report.before).clean))
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
