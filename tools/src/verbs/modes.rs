//! `disk mode`, `commit`, `undo`.

use blockd::api::types::SetMode;
use blockd::store::Access;

use super::Session;
use crate::cli::{Mode, Name, Remove};
use crate::output::{Outcome, Verdict};

/// `disk mode`
pub fn mode(s: &Session, args: Mode) -> Outcome {
    let request = SetMode { mode: args.mode, accept_lost_tail: args.tail.accept_lost_tail };
    let disk = s.open(Access::Write)?.set_mode(&args.name, &request)?;
    s.out.confirm(&disk, || format!("disk {} is {} now", disk.name, disk.mode))?;
    Ok(Verdict::Done)
}

/// `disk commit`
pub fn commit(s: &Session, args: &Name) -> Outcome {
    let disk = s.open(Access::Write)?.commit(&args.name, args.tail.accept_lost_tail)?;
    s.out.confirm(&disk, || format!("committed what was written to disk {}", disk.name))?;
    Ok(Verdict::Done)
}

/// `disk undo`
pub fn undo(s: &Session, args: &Remove) -> Outcome {
    let disk = s.open(Access::Write)?.undo(&args.name)?;
    s.out.confirm(&disk, || format!("dropped what was written to disk {}", disk.name))?;
    Ok(Verdict::Done)
}
