//! Disks in service: where they are served, how much they may do, what they did.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{SocketName, TlsFiles};
use crate::serve::vhost::VhostOptions;
use crate::serve::{Limits, VolumeStats};

/// How a disk is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ExportKind {
    /// A vhost-user-blk socket, for a virtual machine.
    VhostUser,
    /// An NBD socket, for tools that read and write disks.
    Nbd,
}

impl ExportKind {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ExportKind::VhostUser => "vhost-user",
            ExportKind::Nbd => "nbd",
        }
    }
}

/// A socket on which a disk is served. It is remembered: a daemon that starts serves it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportSpec {
    /// How.
    pub kind: ExportKind,
    /// Absolute path of the Unix socket; or, for NBD under TLS, the address and port of a TCP
    /// socket, as in `192.0.2.7:10809` or `[2001:db8::7]:10809`.
    #[schema(value_type = String)]
    pub socket: SocketName,
    /// What TLS needs. TCP has to have it, a Unix socket cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Number of queues, for vhost-user.
    #[serde(default = "one")]
    pub queues: u16,
    /// For vhost-user: most microseconds that a queue polls before it sleeps, 0 for never; without
    /// it, what suits most.
    #[serde(default)]
    pub poll_us_max: Option<u32>,
    /// For vhost-user: let the driver choose packed rings.
    #[serde(default = "yes")]
    pub packed: bool,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

impl ExportSpec {
    /// The options of the server.
    #[must_use]
    pub fn vhost_options(&self) -> VhostOptions {
        let usual = VhostOptions::default();
        VhostOptions {
            queues: self.queues,
            read_only: self.read_only,
            packed: self.packed,
            poll_us_max: self.poll_us_max.unwrap_or(usual.poll_us_max),
            ..usual
        }
    }
}

/// A disk to be served.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachDisk {
    /// Where, and how.
    pub export: ExportSpec,
    /// What the disk may do at most; without it, what it may do already.
    #[serde(default)]
    pub limits: Option<Limits>,
    /// Go on although completed writes of a live session are missing.
    #[serde(default)]
    pub accept_lost_tail: bool,
}

/// Which exports of a disk to end.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DetachDisk {
    /// The one at this socket; without it, all.
    #[schema(value_type = Option<String>)]
    pub socket: Option<SocketName>,
    /// Also when a front end is connected.
    pub force: bool,
}

/// How an export is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExportState {
    /// Nobody is connected.
    Listening,
    /// A front end is.
    Connected,
    /// It could not be made again when the daemon started.
    Failed,
}

impl ExportState {
    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ExportState::Listening => "listening",
            ExportState::Connected => "connected",
            ExportState::Failed => "failed",
        }
    }
}

/// An export of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Export {
    /// Name of the disk.
    pub disk: String,
    /// How it is served.
    pub kind: ExportKind,
    /// Where: an absolute path, or an address and a port.
    #[schema(value_type = String)]
    pub socket: SocketName,
    /// What TLS was made from, where there is TLS.
    pub tls: Option<TlsFiles>,
    /// Writes are refused.
    pub read_only: bool,
    /// Queues that a driver may use.
    pub queues: u16,
    /// How it is.
    pub state: ExportState,
    /// Front ends that are connected.
    pub connected: u64,
    /// Their processes, where the host tells.
    pub peers: Vec<u32>,
    /// Queues that run.
    pub queues_running: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// What a disk in service did since it was taken into it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskStats {
    /// Name of the disk.
    pub disk: String,
    /// Bytes of the disk.
    pub size: u64,
    /// Where it is served.
    pub exports: Vec<Export>,
    /// What it may do at most.
    pub limits: Limits,
    /// What it did.
    pub stats: VolumeStats,
}
