//! Disks in service: what stands between the engine and its front doors (vhost-user, NBD).
//!
//! A [`Volume`] is an open disk with everything that serving needs: limits, counters, holding of
//! requests that the host cannot do now, and threads for what must not be waited for on a queue
//! worker. Each queue of a vhost-user device has a worker thread with a ring of its own
//! ([`queue`]); [`vhost`] listens, speaks the protocol, and starts and stops workers.
//!
//! Fault domains: nothing is shared between volumes but the process. A damaged, full or failed disk
//! answers, holds or fails its own requests only.

pub mod limits;
pub mod queue;
pub mod stats;
pub mod vhost;
pub mod volume;

mod budget;
mod cache_mode;
mod current;
mod hold;
mod slow;

pub use hold::HeldInfo;
pub use limits::Limits;
pub use stats::{Histogram, KindStats, VolumeStats};
pub use volume::{Observer, Volume, VolumeEvent, VolumeOptions};
