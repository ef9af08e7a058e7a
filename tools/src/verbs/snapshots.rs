//! `vm snapshot`, `restore`, `snapshot-rm`: machines as files, by the daemon that has them.

use std::path::absolute;
use std::time::Duration;

use forkd::api::types::{
    RemoveSnapshot, RemovedSnapshot, RestoreVm, SnapshotTaken, TakeSnapshot, Vm,
};

use super::Session;
use super::vm::{path, pid};
use crate::cli;
use crate::output::{Outcome, Verdict};
use crate::progress::Progress;
use crate::signals;
use crate::size::show;

/// `vm snapshot`
pub fn take(s: &Session, args: &cli::Snapshot) -> Outcome {
    let request = TakeSnapshot { path: absolute(&args.dest).map_err(format::Error::from)? };
    // A signal cancels it: there is no snapshot then.
    signals::ask_to_be_told();
    let progress = Progress::new(s.out, "writing");
    let taken: SnapshotTaken =
        s.forkd()?.job(&path(&args.name, "/snapshot"), &request, &progress)?;
    drop(progress);
    s.out.confirm(&taken, || {
        let ms = Duration::from_micros(taken.pause_us).as_secs_f64() * 1e3;
        let made = taken.disks.iter().filter(|disk| !disk.read_only);
        let mut lines: Vec<String> = made.map(|disk| format!("disk {}", disk.disk)).collect();
        lines.push(format!(
            "wrote vm {} to {}: {} of memory; it stood for {ms:.2} ms",
            taken.vm.name,
            taken.path.display(),
            show(taken.memory_bytes)
        ));
        lines.join("\n")
    })?;
    Ok(Verdict::Done)
}

/// `vm restore`
pub fn restore(s: &Session, args: &cli::Restore) -> Outcome {
    let request = RestoreVm {
        path: absolute(&args.dest).map_err(format::Error::from)?,
        name: args.name.clone(),
        disks: args.disks.clone(),
        paused: args.paused,
        net: args.net.clone(),
    };
    signals::ask_to_be_told();
    let progress = Progress::new(s.out, "reading");
    let vm: Vm = s.forkd()?.job("/v1/snapshots/restore", &request, &progress)?;
    drop(progress);
    s.out
        .confirm(&vm, || format!("vm {} is {}: process {}", vm.name, vm.state.name(), pid(&vm)))?;
    Ok(Verdict::Done)
}

/// `vm snapshot-rm`
pub fn rm(s: &Session, args: &cli::SnapshotRm) -> Outcome {
    let request = RemoveSnapshot { path: absolute(&args.dest).map_err(format::Error::from)? };
    let removed: RemovedSnapshot = s.forkd()?.post("/v1/snapshots/remove".into(), &request)?;
    s.out.confirm(&removed, || {
        let place = removed.removed.display();
        match removed.disks.is_empty() {
            true => format!("removed snapshot {place}"),
            false => format!("removed snapshot {place}, and {}", removed.disks.join(", ")),
        }
    })?;
    Ok(Verdict::Done)
}
