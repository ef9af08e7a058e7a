//! NBD: disks served to any client that speaks the Network Block Device protocol.
//!
//! What holds at all times:
//! - A client is served through [`Export`] and nothing else; the front door knows no disks.
//! - A slow or hostile client hurts its own connection only: a handshake has a deadline, an option
//!   a length, a connection a number of threads and of bytes in flight, a server a number of
//!   connections.
//! - Plain text never leaves the machine: a TCP listener cannot be made without TLS ([`Listener`]).
//! - Bytes from the peer are decoded in `wire.rs`, `command.rs` and `negotiate.rs` only, by code
//!   that does no I/O.
//!
//! One request, through the code: `connection.rs` (whose thread reads next) → `wire.rs`,
//! `command.rs` (decode, check) → `execute.rs` (the export's call, the reply) → `stream.rs`.

mod buffers;
pub mod command;
mod connection;
mod contexts;
mod execute;
mod lead;
pub mod negotiate;
mod server;
mod status;
mod stream;
mod tls;
mod volume_export;
pub mod wire;

use std::ops::ControlFlow;
use std::sync::Arc;

use format::Result;

pub use server::{ConnectionStatus, NbdServer, ServerOptions, ServerStatus};
pub use stream::Listener;
pub use tls::TlsConfig;
pub use volume_export::{
    Ancestors, NoAncestors, StoreAncestors, VolumeExport, allocation, changes,
};

/// Smallest unit of a request, in bytes.
pub const BLOCK_MIN: u32 = 512;
/// Unit below which a write costs a read, in bytes.
pub const BLOCK_PREFERRED: u32 = 4096;

/// Flag of [`Extent`] for allocation: no space is allocated.
pub const STATE_HOLE: u32 = 1;
/// Flag of [`Extent`] for allocation: it reads as zeroes.
pub const STATE_ZERO: u32 = 2;
/// Flag of [`Extent`] for changes: it differs from the ancestor.
pub const STATE_CHANGED: u32 = 1;

/// A stretch of an export with one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// `STATE_…` flags.
    pub flags: u32,
}

/// Takes extents in order; may say that it has enough.
pub type Visit<'a> = dyn FnMut(Extent) -> ControlFlow<()> + 'a;

/// Something that knows the status of every block of an export.
pub trait BlockStatus: Send + Sync {
    /// Calls `visit` with consecutive extents from `offset` on until `len` bytes are covered or it
    /// breaks off. Neighbours may have the same flags.
    ///
    /// # Errors
    /// What prevents an answer at the first offset not covered.
    fn extents(&self, offset: u64, len: u64, visit: &mut Visit<'_>) -> Result<()>;
}

/// A disk as an NBD client sees it. All offsets and lengths are bytes, multiples of [`BLOCK_MIN`],
/// and inside the size that was told to the client; calls block until done and come from many
/// threads at once.
///
/// A flush makes durable what completed before it began, by whichever connection it came: clients
/// are told that they may use several.
pub trait Export: Send + Sync {
    /// The name that clients ask for.
    fn name(&self) -> &str;

    /// A line for people; may be empty.
    fn description(&self) -> String;

    /// Size in bytes.
    fn size(&self) -> u64;

    /// True when writes are to be refused.
    fn read_only(&self) -> bool;

    /// Fills `buf`.
    ///
    /// # Errors
    /// Any; `Kind` decides what the client is told.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes; with `fua` it is durable on return.
    ///
    /// # Errors
    /// As [`Export::read`].
    fn write(&self, offset: u64, buf: &[u8], fua: bool) -> Result<()>;

    /// Makes what completed durable.
    ///
    /// # Errors
    /// As [`Export::read`].
    fn flush(&self) -> Result<()>;

    /// Gives the space of a range back; its content is then whatever the export says.
    ///
    /// # Errors
    /// As [`Export::read`].
    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<()>;

    /// Makes a range read as zeroes; with `unmap` its space may be given back, without it stays.
    ///
    /// # Errors
    /// As [`Export::read`].
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, fua: bool) -> Result<()>;

    /// True when [`Export::write_zeroes`] with these values is surely quicker than writing bytes.
    fn zeroes_fast(&self, offset: u64, len: u64, unmap: bool) -> bool;

    /// Allocation: extents with [`STATE_HOLE`] and [`STATE_ZERO`].
    ///
    /// # Errors
    /// As [`BlockStatus::extents`].
    fn allocation(&self, offset: u64, len: u64, visit: &mut Visit<'_>) -> Result<()>;

    /// Names of the ancestors that changes can be asked against.
    fn ancestors(&self) -> Vec<String>;

    /// What changed since this export and the ancestor had the same content: extents with
    /// [`STATE_CHANGED`]. It is kept for as long as the connection lasts.
    ///
    /// # Errors
    /// `NotFound` for a name that is no ancestor's, or what opening it reports.
    fn changed_since(&self, ancestor: &str) -> Result<Arc<dyn BlockStatus>>;
}

/// What the list of exports says about one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportEntry {
    /// Its name.
    pub name: String,
    /// A line for people; may be empty.
    pub description: String,
}

/// The exports of a server.
pub trait Exports: Send + Sync {
    /// The export that a client names; the empty name asks for the default one.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    fn open(&self, name: &str) -> Result<Arc<dyn Export>>;

    /// All of them.
    fn list(&self) -> Vec<ExportEntry>;

    /// Told when a client has chosen an export; `peer` is what to call the client.
    fn client_came(&self, export: &str, peer: &str) {
        let _ = (export, peer);
    }

    /// Told when that client is gone, and why if it was not in order. Its requests have ended.
    fn client_went(&self, export: &str, peer: &str, why: Option<&str>) {
        let _ = (export, peer, why);
    }
}
