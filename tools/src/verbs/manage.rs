//! `disk create`, `fork`, `rm`, `resize`, `seal`, `rename`.

use std::time::Duration;

use blockd::api::types::{
    CreateDisk, Disk, DiskState, ForkAnswer, ForkDisk, ForkDisks, ForkMode, ForkedDisks,
    ReleasedFork, ResizeDisk,
};
use blockd::pump::Unwatched;
use blockd::store::Access;
use format::Result;

use super::Session;
use crate::cli::{Create, Fork, Name, Remove, Rename, Resize};
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::size::show;
use crate::store::Store;

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
    if let Some(token) = args.release {
        let path = format!("/v1/forks/{token}/release");
        let released: ReleasedFork = s.need_daemon()?.post(path, &())?;
        let ms = Duration::from_micros(released.held_us).as_secs_f64() * 1e3;
        s.out.confirm(&released, || format!("released the fork, after {ms:.1} ms"))?;
        return Ok(Verdict::Done);
    }
    let parent = args.parent.expect("required unless something is released");
    let first = ForkDisk { disk: parent, children: args.children, serve: Vec::new() };
    let request = ForkDisks {
        disks: [first].into_iter().chain(args.with).collect(),
        accept_lost_tail: args.tail.accept_lost_tail,
        mode: args.mode.into(),
        base: args.base.map(Into::into),
        copy_threshold: args.copy_threshold,
        hold_ms: args.hold,
        flatten: args.flatten.into(),
        answer: ForkAnswer::Durable,
    };
    let store = s.open(Access::Write)?;
    let forked = match request.mode {
        ForkMode::Live => store.fork(&request, &Unwatched)?,
        ForkMode::Inherit => store.fork(&request, &Progress::new(s.out, "copying"))?,
    };
    s.out.confirm(&forked, || told(&request, &forked))?;
    if forked.mode == ForkMode::Inherit {
        tell_of_pinned(s, &*store, &request)?;
    }
    Ok(Verdict::Done)
}

/// Says which parents have become immutable and have no checksums yet.
fn tell_of_pinned(s: &Session, store: &dyn Store, request: &ForkDisks) -> Result<()> {
    let is_parent = |d: &Disk| request.disks.iter().any(|of| of.disk == d.name);
    for disk in store.list()?.iter().filter(|d| is_parent(d) && d.state == DiskState::Sealing) {
        let name = &disk.name;
        s.out.note(&format!(
            "disk {name} is immutable now, its children stand on it; \
             `offshoot disk seal {name}` makes its checksums"
        ));
    }
    Ok(())
}

fn told(request: &ForkDisks, forked: &ForkedDisks) -> String {
    let parents: Vec<&str> = request.disks.iter().map(|d| d.disk.as_str()).collect();
    let children: Vec<&str> = forked.children.iter().map(|d| d.name.as_str()).collect();
    let ms = |micros: u64| Duration::from_micros(micros).as_secs_f64() * 1e3;
    let waited = |micros| format!(", guests waited for {:.1} ms", ms(micros));
    let held = |token| format!("; held: `offshoot disk fork --release {token}`");
    let pause =
        forked.pause_us.map_or(String::new(), waited) + &forked.token.map_or(String::new(), held);
    let (parents, children) = (parents.join(", "), children.join(", "));
    let took = ms(forked.took_us);
    match (forked.mode, request.mode) {
        (ForkMode::Inherit, _) => {
            let (copied, cloned) = (show(forked.copied), show(forked.cloned));
            let data = format!("{copied} copied, {cloned} shared by the host");
            format!("{children} inherited from {parents} in {took:.1} ms: {data}{pause}")
        }
        (ForkMode::Live, ForkMode::Inherit) => format!(
            "forked {parents} into {children} in {took:.1} ms, live: too much to copy{pause}"
        ),
        (ForkMode::Live, ForkMode::Live) => {
            format!("forked {parents} into {children} in {took:.1} ms{pause}")
        }
    }
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
