//! `disk create`, `fork`, `rm`, `resize`, `seal`, `rename`.

use std::time::Duration;

use blockd::api::types::{CreateDisk, ForkDisk, ForkDisks, ResizeDisk};
use blockd::store::Access;

use super::Session;
use crate::cli::{Create, Fork, Name, Remove, Rename, Resize};
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::size::show;

/// `disk create`
pub fn create(s: &Session, args: Create) -> Outcome {
    let new = CreateDisk {
        name: args.name,
        size: args.size,
        parent: args.parent,
        journal: Some(args.journal),
    };
    let disk = s.open(Access::Write)?.create(&new)?;
    s.out.confirm(&disk, || format!("created disk {}, {}", disk.name, show(disk.size)))?;
    Ok(Verdict::Done)
}

/// `disk fork`
pub fn fork(s: &Session, args: Fork) -> Outcome {
    let first = ForkDisk { disk: args.parent, children: args.children };
    let request = ForkDisks {
        disks: [first].into_iter().chain(args.with).collect(),
        accept_lost_tail: args.tail.accept_lost_tail,
    };
    let forked = s.open(Access::Write)?.fork(&request)?;
    s.out.confirm(&forked, || {
        let parents: Vec<&str> = request.disks.iter().map(|d| d.disk.as_str()).collect();
        let children: Vec<&str> = forked.children.iter().map(|d| d.name.as_str()).collect();
        let ms = |micros: u64| Duration::from_micros(micros).as_secs_f64() * 1e3;
        let waited = |micros| format!(", guests waited for {:.1} ms", ms(micros));
        let pause = forked.pause_us.map_or(String::new(), waited);
        let (parents, children) = (parents.join(", "), children.join(", "));
        format!("forked {parents} into {children} in {:.1} ms{pause}", ms(forked.took_us))
    })?;
    Ok(Verdict::Done)
}

/// `disk rm`
pub fn rm(s: &Session, args: &Remove) -> Outcome {
    let removed = s.open(Access::Write)?.remove(&args.name)?;
    s.out.confirm(&removed, || {
        format!("removed disk {}, {} freed", removed.removed, show(removed.freed))
    })?;
    Ok(Verdict::Done)
}

/// `disk resize`
pub fn resize(s: &Session, args: &Resize) -> Outcome {
    let request = ResizeDisk {
        size: args.size,
        drop_data: args.drop_data,
        accept_lost_tail: args.tail.accept_lost_tail,
    };
    let disk = s.open(Access::Write)?.resize(&args.name, &request)?;
    s.out.confirm(&disk, || format!("disk {} has {} now", disk.name, show(disk.size)))?;
    Ok(Verdict::Done)
}

/// `disk seal`
pub fn seal(s: &Session, args: &Name) -> Outcome {
    let store = s.open(Access::Write)?;
    let progress = Progress::new(s.out, "sealing");
    let disk = store.seal(&args.name, args.tail.accept_lost_tail, &progress)?;
    drop(progress);
    s.out.confirm(&disk, || format!("sealed disk {}", disk.name))?;
    Ok(Verdict::Done)
}

/// `disk rename`
pub fn rename(s: &Session, args: &Rename) -> Outcome {
    let disk = s.open(Access::Write)?.rename(&args.name, &args.to)?;
    s.out.confirm(&disk, || format!("disk {} is called {} now", args.name, disk.name))?;
    Ok(Verdict::Done)
}
