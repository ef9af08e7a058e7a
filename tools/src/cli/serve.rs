//! The arguments of the verbs on disks in service.

use std::net::SocketAddr;
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
    #[arg(long, value_name = "PATH", required_unless_present = "tcp")]
    pub socket: Option<PathBuf>,
    /// The TCP socket to make instead; needs a certificate and its key
    #[arg(long, value_name = "ADDR:PORT", value_parser = address, conflicts_with = "socket")]
    pub tcp: Option<SocketAddr>,
    /// The server's certificate, and those that lead from it to its authority
    #[arg(long, value_name = "PEM", requires_all = ["tcp", "tls_key"])]
    pub tls_cert: Option<PathBuf>,
    /// The private key of the certificate
    #[arg(long, value_name = "PEM", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Let in only clients that show a certificate of one of these authorities
    #[arg(long, value_name = "PEM", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Refuse writes
    #[arg(long)]
    pub readonly: bool,
    #[command(flatten)]
    pub limits: LimitValues,
    #[command(flatten)]
    pub tail: LostTail,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let needed = "an address and a port are needed, as in 192.0.2.7:10809 or [::]:10809";
    text.parse().map_err(|_| needed.to_owned())
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
    /// The socket to end, a path or an address and a port; without it, all
    #[arg(long, value_name = "SOCKET")]
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
