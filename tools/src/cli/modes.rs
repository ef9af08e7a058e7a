//! `disk mode`

use clap::Args;

use super::LostTail;

/// `disk mode`
#[derive(Debug, Args)]
pub struct Mode {
    /// Name of the disk
    pub name: String,
    /// persistent, nonpersistent, undoable or append
    pub mode: String,
    #[command(flatten)]
    pub tail: LostTail,
}
