//! `disk flatten`, `disk flatten-policy`, `store flatten-policy`.

use blockd::api::types::{FlattenDisk, SetFlattenPolicy};
use blockd::store::Access;

use super::Session;
use crate::cli::{DiskPolicy, Flatten, StorePolicy};
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::size::show;
use crate::store::Flattening;

/// `disk flatten`
pub fn flatten(s: &Session, args: &Flatten) -> Outcome {
    let request = FlattenDisk {
        to: Some(args.to.clone()),
        rate: args.rate,
        accept_lost_tail: args.tail.accept_lost_tail,
    };
    let store = s.open(Access::Write)?;
    let progress = args.wait.then(|| Progress::new(s.out, "flattening"));
    let begun = match &progress {
        Some(progress) => {
            Flattening::Done(Box::new(store.flatten(&args.name, &request, progress)?))
        }
        None => store.begin_flatten(&args.name, &request, &Progress::new(s.out, "flattening"))?,
    };
    drop(progress);
    match begun {
        Flattening::Done(done) => s.out.confirm(&done, || {
            let (name, copied) = (&done.disk.name, show(done.copied));
            let (before, after) = (done.depth_before, done.disk.depth);
            format!(
                "flattened disk {name}: from {before} segments below to {after}, {copied} copied"
            )
        })?,
        Flattening::Job(job) => s.out.confirm(&job, || {
            format!("flattening {}: job {}, `offshoot job watch {}`", job.object, job.id, job.id)
        })?,
    }
    Ok(Verdict::Done)
}

fn told(policy: &SetFlattenPolicy) -> String {
    policy.policy.map_or("default".into(), |p| p.to_string())
}

/// `disk flatten-policy`
pub fn disk_policy(s: &Session, args: &DiskPolicy) -> Outcome {
    let Some(request) = &args.policy else {
        let details = s.open(Access::Read)?.show(&args.name, false)?;
        let policy = SetFlattenPolicy { policy: details.disk.flatten_policy };
        s.out.result(&policy, || told(&policy))?;
        return Ok(Verdict::Done);
    };
    let disk = s.open(Access::Write)?.set_disk_policy(&args.name, request)?;
    s.out.confirm(&disk, || format!("disk {} is flattened: {}", disk.name, told(request)))?;
    Ok(Verdict::Done)
}

/// `store flatten-policy`
pub fn store_policy(s: &Session, args: &StorePolicy) -> Outcome {
    let Some(request) = &args.policy else {
        let policy = s.open(Access::Read)?.store_policy()?;
        s.out.result(&policy, || told(&policy))?;
        return Ok(Verdict::Done);
    };
    let set = s.open(Access::Write)?.set_store_policy(request)?;
    s.out.confirm(&set, || format!("disks are flattened: {}", told(&set)))?;
    Ok(Verdict::Done)
}
