//! `disk ls`, `disk show`.

use blockd::catalogue::DiskRow;
use blockd::disk::Facts;
use blockd::segment::read_superblock;
use blockd::store::Access;
use blockd::storedir::StoreDir;
use format::superblock::{Attached, Mode, Seal, State, Superblock};
use format::{Kind, Result};
use serde::Serialize;
use uuid::Uuid;

use super::Session;
use crate::cli::Name;
use crate::output::{Outcome, Table, Verdict, utc};
use crate::size::show as size;

/// The first eight digits of an identity: enough to tell the segments of one store apart.
#[must_use]
pub fn short(id: Uuid) -> String {
    let mut text = id.simple().to_string();
    text.truncate(8);
    text
}

/// Bytes as lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// One disk of a listing.
#[derive(Debug, Serialize)]
pub struct Listed {
    name: String,
    disk: Uuid,
    segment: Uuid,
    size: u64,
    allocated: Option<u64>,
    state: &'static str,
    parent: Option<String>,
    depth: usize,
    created: u64,
}

impl Listed {
    /// What is known about a row without opening the disk.
    ///
    /// # Errors
    /// What the host reports.
    pub fn new(dir: &StoreDir, row: &DiskRow) -> Result<Self> {
        let file = match dir.segment_file(row.segment, Access::Read) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == Kind::NotFound => None,
            Err(e) => return Err(e),
        };
        let state = match file.as_deref().map(read_superblock) {
            None => "missing",
            Some(Err(e)) if e.kind() == Kind::Io => return Err(e),
            Some(Err(_)) => "unreadable",
            Some(Ok(chosen)) => state_name(&chosen.superblock),
        };
        Ok(Listed {
            name: row.name.clone(),
            disk: row.disk,
            segment: row.segment,
            size: row.virtual_size,
            allocated: file.map(|f| f.allocated()).transpose()?,
            state,
            parent: parent_name(dir, row),
            depth: row.parents.len(),
            created: row.created,
        })
    }
}

/// The name of the disk that this one was created over, or its identity when it has no name here.
fn parent_name(dir: &StoreDir, row: &DiskRow) -> Option<String> {
    let parent = row.parent_disk?;
    let found = dir.disks().into_iter().find(|d| d.disk == parent);
    Some(found.map_or_else(|| parent.to_string(), |d| d.name))
}

fn state_name(sb: &Superblock) -> &'static str {
    match (sb.state, sb.seal) {
        (State::Active, _) => "active",
        (State::Sealed, Seal::Done) => "sealed",
        (State::Sealed, _) => "sealing",
    }
}

/// `disk ls`
pub fn ls(s: &Session) -> Outcome {
    let dir = s.open(Access::Read)?;
    let disks: Result<Vec<Listed>> = dir.disks().iter().map(|d| Listed::new(&dir, d)).collect();
    let disks = disks?;
    let text = || {
        let head = ["NAME", "SIZE", "ALLOCATED", "STATE", "PARENT", "DEPTH"];
        let mut table = Table::new(&head, &[1, 2, 5]);
        for d in &disks {
            table.row([
                d.name.clone(),
                size(d.size),
                d.allocated.map_or("-".into(), size),
                d.state.into(),
                d.parent.clone().unwrap_or("-".into()),
                d.depth.to_string(),
            ]);
        }
        table.render()
    };
    s.out.result(&disks, text)?;
    Ok(Verdict::Done)
}

#[derive(Debug, Serialize)]
struct ShownSegment {
    index: u16,
    segment: Uuid,
    own: bool,
    digest: Option<String>,
}

#[derive(Debug, Serialize)]
struct Journal {
    size: u64,
    used: u64,
}

#[derive(Debug, Serialize)]
struct Features {
    incompat: String,
    read_only_compat: String,
    compat: String,
}

#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    listed: Listed,
    mode: &'static str,
    attached: &'static str,
    digest: Option<String>,
    segments: Vec<ShownSegment>,
    dependents: Vec<String>,
    own_extents: u64,
    generation: u64,
    epoch: u64,
    owner_epoch: u64,
    journal: Journal,
    map_memory: usize,
    features: Features,
    problems: Vec<String>,
}

/// `disk show`
pub fn show(s: &Session, args: &Name) -> Outcome {
    let dir = s.open(Access::Read)?;
    let disk = s.disk(&dir, &args.name, args.tail)?;
    let row = dir.disk(&args.name)?;
    let facts = disk.facts()?;
    let problems = disk.problems.iter().map(|p| format!("{}: {}", p.object, p.detail)).collect();
    let shown = shown(Listed::new(&dir, &row)?, dir.dependents(row.segment), &facts, problems);
    s.out.result(&shown, || render(&shown))?;
    Ok(Verdict::Done)
}

fn shown(listed: Listed, dependents: Vec<String>, facts: &Facts, problems: Vec<String>) -> Shown {
    let sb = &facts.superblock;
    let page = format::limits::BLOCK;
    let segments = facts.table.iter().map(|(index, row)| ShownSegment {
        index: index.get(),
        segment: row.segment,
        own: row.segment == sb.segment,
        digest: row.digest.map(|d| hex(&d)),
    });
    Shown {
        listed,
        mode: match sb.mode {
            Mode::Persistent => "persistent",
            Mode::NonPersistent => "nonpersistent",
            Mode::Undoable => "undoable",
            Mode::Append => "append",
        },
        attached: match sb.attached {
            Attached::No => "no",
            Attached::Plain => "plain",
            Attached::WithTail => "with-tail",
        },
        digest: (sb.seal == Seal::Done).then(|| hex(&sb.digest)),
        segments: segments.collect(),
        dependents,
        own_extents: facts.extents_used,
        generation: sb.generation.0,
        epoch: sb.epoch.0,
        owner_epoch: sb.owner_epoch.0,
        journal: Journal { size: facts.journal_pages.1 * page, used: facts.journal_pages.0 * page },
        map_memory: facts.map_bytes,
        features: Features {
            incompat: format!("{:#x}", sb.features.incompat),
            read_only_compat: format!("{:#x}", sb.features.read_only_compat),
            compat: format!("{:#x}", sb.features.compat),
        },
        problems,
    }
}

fn render(d: &Shown) -> String {
    let l = &d.listed;
    let list = |names: &[String]| if names.is_empty() { "-".into() } else { names.join(", ") };
    let attached = match d.attached {
        "no" => "closed in order".to_owned(),
        "plain" => "open, or not closed in order: the journal is replayed at opening".to_owned(),
        _ => "open with live clients, or not closed in order".to_owned(),
    };
    let f = &d.features;
    let mut lines = vec![
        ("name", l.name.clone()),
        ("disk", l.disk.to_string()),
        ("size", format!("{} ({} bytes)", size(l.size), l.size)),
        ("state", format!("{}, {attached}", l.state)),
        ("mode", d.mode.into()),
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
        ("map memory", size(d.map_memory as u64)),
        (
            "features",
            format!(
                "incompat {}, read-only {}, compat {}",
                f.incompat, f.read_only_compat, f.compat
            ),
        ),
        ("problems", list(&d.problems)),
    ];
    for s in &d.segments {
        let digest = s.digest.as_deref().unwrap_or(if s.own { "own" } else { "-" });
        lines.push(("chain", format!("{:>3}  {}  {digest}", s.index, s.segment)));
    }
    let lines = lines.into_iter().map(|(key, value)| format!("{key:<12}{value}"));
    lines.collect::<Vec<_>>().join("\n")
}
