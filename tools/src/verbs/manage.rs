//! `disk create`, `rm`, `resize`, `seal`, `rename`.

use blockd::catalogue::DiskRow;
use blockd::store::Access;
use blockd::storedir::{NewDisk, StoreDir};
use format::{Context as _, Error, Result};
use serde::Serialize;

use super::Session;
use super::inspect::Listed;
use crate::cli::{Create, LostTail, Name, Remove, Rename, Resize};
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::signals;
use crate::size::show;

fn object(name: &str) -> impl FnOnce() -> String {
    let name = name.to_owned();
    move || format!("disk {name}")
}

/// Says what a disk is like now.
fn confirm(s: &Session, dir: &StoreDir, row: &DiskRow, text: impl FnOnce() -> String) -> Outcome {
    s.out.confirm(&Listed::new(dir, row)?, text)?;
    Ok(Verdict::Done)
}

/// `disk create`
pub fn create(s: &Session, args: Create) -> Outcome {
    let dir = s.open(Access::Write)?;
    let new = NewDisk {
        name: args.name,
        virtual_size: args.size.unwrap_or(0),
        parent: args.parent,
        journal_bytes: args.journal,
    };
    let row = dir.create(&new).context("create", object(&new.name))?;
    confirm(s, &dir, &row, || format!("created disk {}, {}", row.name, show(row.virtual_size)))
}

/// `disk rm`
pub fn rm(s: &Session, args: &Remove) -> Outcome {
    #[derive(Serialize)]
    struct Removed<'a> {
        removed: &'a str,
        freed: u64,
    }
    let dir = s.open(Access::Write)?;
    let row = dir.disk(&args.name).context("remove", object(&args.name))?;
    // A file that is gone or cannot be read frees nothing that we know of.
    let file = dir.segment_file(row.segment, Access::Read);
    let freed = file.and_then(|f| f.allocated()).unwrap_or(0);
    dir.remove(&args.name).context("remove", object(&args.name))?;
    let removed = Removed { removed: &args.name, freed };
    s.out.confirm(&removed, || format!("removed disk {}, {} freed", args.name, show(freed)))?;
    Ok(Verdict::Done)
}

/// `disk resize`
pub fn resize(s: &Session, args: &Resize) -> Outcome {
    let dir = s.open(Access::Write)?;
    let name = &args.name;
    let resize = || -> Result<DiskRow> {
        let present = dir.disk(name)?.virtual_size;
        let size = args.size.of(present).ok_or_else(|| {
            Error::invalid(format!("there is no such size: it has {present} bytes now"))
        })?;
        take_tail(&dir, name, args.tail)?;
        dir.resize(name, size, args.drop_data)
    };
    let row = resize().context("resize", object(name))?;
    confirm(s, &dir, &row, || format!("disk {name} has {} now", show(row.virtual_size)))
}

/// Opens and closes a disk whose tail is lost, so that what follows finds it in order.
fn take_tail(dir: &StoreDir, name: &str, tail: LostTail) -> Result<()> {
    if !tail.accept_lost_tail {
        return Ok(());
    }
    dir.open_disk(name, Access::Write, &super::disk_options(dir, tail))?.close()
}

/// `disk seal`
pub fn seal(s: &Session, args: &Name) -> Outcome {
    let dir = s.open(Access::Write)?;
    let name = &args.name;
    let progress = Progress::new(s.out, "sealing");
    let seal = || -> Result<DiskRow> {
        take_tail(&dir, name, args.tail)?;
        dir.seal(name, &mut |done, total| {
            progress.set(done, total);
            signals::check().map_err(|e| e.hint("seal it again to finish its checksums"))
        })
    };
    let row = seal().context("seal", object(name))?;
    drop(progress);
    confirm(s, &dir, &row, || format!("sealed disk {name}"))
}

/// `disk rename`
pub fn rename(s: &Session, args: &Rename) -> Outcome {
    let dir = s.open(Access::Write)?;
    let row = dir.rename(&args.name, &args.to).context("rename", object(&args.name))?;
    confirm(s, &dir, &row, || format!("disk {} is called {} now", args.name, args.to))
}
