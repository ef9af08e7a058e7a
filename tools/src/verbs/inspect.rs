//! `disk ls`, `disk show`.

use blockd::api::types::DiskDetails;
use blockd::store::Access;
use uuid::Uuid;

use super::Session;
use crate::cli::Name;
use crate::output::{Outcome, Table, Verdict, fields, utc};
use crate::size::show as size;

/// The first eight digits of an identity: enough to tell the segments of one store apart.
#[must_use]
pub fn short(id: Uuid) -> String {
    let mut text = id.simple().to_string();
    text.truncate(8);
    text
}

/// `disk ls`
pub fn ls(s: &Session) -> Outcome {
    let disks = s.open(Access::Read)?.list()?;
    let text = || {
        let head = ["NAME", "SIZE", "ALLOCATED", "STATE", "PARENT", "DEPTH"];
        let mut table = Table::new(&head, &[1, 2, 5]);
        for d in &disks {
            table.row([
                d.name.clone(),
                size(d.size),
                d.allocated.map_or("-".into(), size),
                d.state.name().into(),
                d.parent.clone().unwrap_or("-".into()),
                d.depth.to_string(),
            ]);
        }
        table.render()
    };
    s.out.result(&disks, text)?;
    Ok(Verdict::Done)
}

/// `disk show`
pub fn show(s: &Session, args: &Name) -> Outcome {
    let shown = s.open(Access::Read)?.show(&args.name, args.tail.accept_lost_tail)?;
    s.out.result(&shown, || render(&shown))?;
    Ok(Verdict::Done)
}

fn render(d: &DiskDetails) -> String {
    let l = &d.disk;
    let list = |names: &[String]| if names.is_empty() { "-".into() } else { names.join(", ") };
    let attached = match d.attached.as_str() {
        "no" => "closed in order".to_owned(),
        "plain" => "open, or not closed in order: the journal is replayed at opening".to_owned(),
        _ => "open with live clients, or not closed in order".to_owned(),
    };
    let f = &d.features;
    let mut lines = vec![
        ("name", l.name.clone()),
        ("disk", l.disk.to_string()),
        ("size", format!("{} ({} bytes)", size(l.size), l.size)),
        ("state", format!("{}, {attached}", l.state.name())),
        ("mode", d.base.map_or(l.mode.clone(), |base| format!("{}, over {base}", l.mode))),
        ("created", utc(l.created)),
        ("parent", l.parent.clone().unwrap_or("-".into())),
        ("dependents", list(&d.dependents)),
        ("segment", l.segment.to_string()),
        ("allocated", l.allocated.map_or("-".into(), size)),
        ("own extents", format!("{} of 64 KiB", d.own_extents)),
        ("digest", d.digest.clone().unwrap_or("-".into())),
        ("generation", d.generation.to_string()),
        ("epochs", format!("{} openings, owner {}", d.epoch, d.owner_epoch)),
        ("journal", format!("{} used of {}", size(d.journal.used), size(d.journal.size))),
        ("map memory", size(d.map_memory)),
        (
            "features",
            format!(
                "incompat {}, read-only {}, compat {}",
                f.incompat, f.read_only_compat, f.compat
            ),
        ),
        ("problems", list(&d.problems)),
    ];
    for e in &d.exports {
        let under = if e.tls.is_some() { " under TLS" } else { "" };
        let how = format!("{} at {}{under}, {}", e.kind.name(), e.socket, e.state.name());
        let why = e.error.as_ref().map_or_else(String::new, |why| format!(": {why}"));
        lines.push(("served", format!("{how}{why}")));
    }
    for s in &d.segments {
        let digest = s.digest.as_deref().unwrap_or(if s.own { "own" } else { "-" });
        lines.push(("chain", format!("{:>3}  {}  {digest}", s.index, s.segment)));
    }
    fields(lines)
}
