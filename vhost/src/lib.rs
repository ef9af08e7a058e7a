//! vhost-user-blk, both sides.
//!
//! Device side: a [`session::Session`] speaks the protocol with a front end (a VMM) and hands each
//! ring to the daemon as a [`session::ActiveQueue`], which one worker thread owns. Driver side: a
//! [`client::Client`], a small front end used by tests, benchmarks and VMMs that copy through a
//! private arena. Nothing here knows what a disk is made of: the daemon says what its disk can do
//! ([`blk::Capabilities`]) and answers requests ([`blk::Request`]).
//!
//! Trust: everything that arrives from the other side is a claim. A front end that breaks the
//! protocol ends its own session with a named error; a guest that breaks a ring stops that ring.
//! Neither can stop the process.

pub mod blk;
pub mod client;
pub mod dirty_log;
pub mod event;
pub mod inflight;
pub mod memory;
pub mod proto;
pub mod queue;
pub mod session;

mod socket;
mod util;
