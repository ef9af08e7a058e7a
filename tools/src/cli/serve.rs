//! The arguments of the verbs on disks in service.

use std::path::PathBuf;

use blockd::serve::Limits;
use clap::Args;

use super::LostTail;
use crate::size;

/// `disk attach`
#[derive(Debug, Args)]
pub struct Attach {
    /// Name of the disk
    pub name: String,
    /// The Unix socket to make
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Number of queues
    #[arg(long, value_name = "N", default_value = "1")]
    pub queues: u16,
    /// Refuse writes
    #[arg(long)]
    pub readonly: bool,
    /// Most microseconds that a queue polls before it sleeps; 0 for never
    #[arg(long, value_name = "N")]
    pub poll_us: Option<u32>,
    #[command(flatten)]
    pub limits: LimitValues,
    #[command(flatten)]
    pub tail: LostTail,
}

/// `disk export-nbd`
#[derive(Debug, Args)]
pub struct ExportNbd {
    /// Name of the disk
    pub name: String,
    /// The Unix socket to make
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Refuse writes
    #[arg(long)]
    pub readonly: bool,
    #[command(flatten)]
    pub limits: LimitValues,
    #[command(flatten)]
    pub tail: LostTail,
}

/// What a disk may do at most.
#[derive(Debug, Args)]
pub struct LimitValues {
    /// Requests per second
    #[arg(long, value_name = "N")]
    pub iops: Option<u64>,
    /// Bytes per second, reads and writes together
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    pub bps: Option<u64>,
    /// How much may be used at once after a pause, in milliseconds' worth of the rates; 100 without
    #[arg(long, value_name = "MS")]
    pub burst: Option<u32>,
}

impl LimitValues {
    /// The limits; `None` when there are none.
    #[must_use]
    pub fn named(&self) -> Option<Limits> {
        let named = self.iops.is_some() || self.bps.is_some() || self.burst.is_some();
        named.then(|| Limits {
            iops: self.iops.unwrap_or(0),
            bytes_per_s: self.bps.unwrap_or(0),
            burst_ms: self.burst.unwrap_or(0),
        })
    }
}

/// `disk detach`
#[derive(Debug, Args)]
pub struct Detach {
    /// Name of the disk
    pub name: String,
    /// The socket to end; without it, all
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Also when a front end is connected
    #[arg(long)]
    pub force: bool,
}

/// `disk limits`
#[derive(Debug, Args)]
pub struct Limit {
    /// Name of the disk
    pub name: String,
    #[command(flatten)]
    pub limits: LimitValues,
}
