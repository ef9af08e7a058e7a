//! `init`, `store rebuild`, `store df`.

use blockd::api::types::Df;
use blockd::store::Access;
use blockd::storedir::{Identity, StoreDir};
use format::{Context as _, Error, Kind};
use serde::Serialize;
use uuid::Uuid;

use super::Session;
use super::place::with_patience;
use crate::cli::Init;
use crate::output::{Outcome, Table, Verdict, say};
use crate::signals;
use crate::size::show;

/// `init`
pub fn init(s: &Session, args: Init) -> Outcome {
    #[derive(Serialize)]
    struct Made<'a> {
        path: &'a std::path::Path,
        #[serde(flatten)]
        identity: Identity,
    }
    signals::ask_to_be_told();
    let path = s.store_path()?;
    let identity = StoreDir::init(path, args.tail_dir);
    let identity = identity.context("create", || format!("store {}", path.display()))?;
    let made = Made { path, identity };
    s.out.confirm(&made, || format!("made store {} in {}", made.identity.store, path.display()))?;
    Ok(Verdict::Done)
}

#[derive(Serialize)]
struct Renamed {
    from: String,
    to: String,
}

#[derive(Serialize)]
struct Unreadable {
    segment: Uuid,
    reason: String,
}

/// `store rebuild`
pub fn rebuild(s: &Session) -> Outcome {
    #[derive(Serialize)]
    struct Rebuilt {
        disks: Vec<String>,
        renamed: Vec<Renamed>,
        unreadable: Vec<Unreadable>,
        missing: Vec<Uuid>,
    }
    signals::ask_to_be_told();
    let path = s.store_path()?;
    if let Some(daemon) = s.daemon()? {
        let reason = format!("the daemon at {} has it", daemon.socket().display());
        let busy = Error::new(Kind::Busy, reason).hint("stop it first: `offshoot daemon stop`");
        return Err(busy.tried("rebuild").on(format!("store {}", path.display())).into());
    }
    let found = with_patience(|| StoreDir::rebuild(path, &s.options(Access::Write)));
    let found = found.context("rebuild", || format!("store {}", path.display()))?;
    let rebuilt = Rebuilt {
        disks: found.disks.into_iter().map(|d| d.name).collect(),
        renamed: found.renamed.into_iter().map(|(from, to)| Renamed { from, to }).collect(),
        unreadable: found
            .unreadable
            .into_iter()
            .map(|(segment, reason)| Unreadable { segment, reason })
            .collect(),
        missing: found.missing,
    };
    s.out.confirm(&rebuilt, || format!("found {} disks", rebuilt.disks.len()))?;
    // Never left out, also for a quiet user: somebody has to do something about these.
    for r in &rebuilt.renamed {
        say(&format!("disk {:?} is now called {}: its name was taken", r.from, r.to));
    }
    for u in &rebuilt.unreadable {
        say(&format!("segment {} was left out: {}", u.segment, u.reason));
    }
    for segment in &rebuilt.missing {
        say(&format!("segment {segment} is missing: disks that stand on it cannot be opened"));
    }
    Ok(Verdict::Done)
}

/// `store df`
pub fn df(s: &Session) -> Outcome {
    let df = s.open(Access::Read)?.df()?;
    s.out.result(&df, || render(&df))?;
    Ok(Verdict::Done)
}

fn render(df: &Df) -> String {
    let mut table = Table::new(&["DISK", "SIZE", "ALLOCATED"], &[1, 2]);
    for d in &df.disks {
        table.row([d.name.clone(), show(d.size), d.allocated.map_or("missing".into(), show)]);
    }
    let used = format!(
        "{} used by {} disks of {} in all; {} of {} left on the file system",
        show(df.used),
        df.disks.len(),
        show(df.virtual_size),
        show(df.free),
        show(df.total)
    );
    if df.disks.is_empty() { used } else { format!("{}\n\n{used}", table.render()) }
}
