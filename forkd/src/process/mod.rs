//! A process that holds one machine, and how the daemon speaks with it.
//!
//! A process begins as a *shell*: a machine with everything in place but content. It then becomes
//! a machine that boots, or the child of a fork, and ends with it.
//!
//! Invariants:
//! - A shell lives as long as the connection on which it was started: when the daemon ends, however
//!   it ends, the kernel closes that, and the shell goes. [`Ask::Begin`] cuts this tether:
//!   from then on the process ends with its machine, or when it is told to.
//! - Who ends with a machine leaves [`ENDED_FILE`] in its folder, before anybody can see that the
//!   process is gone. A process that is gone without it was killed.
//! - Nothing of a machine is in a file but what is in its folder: to remove a machine is to end the
//!   process and remove the folder.

mod confine;
mod hardware;
pub mod link;
pub mod serve;
pub mod spawn;
pub mod wire;
pub mod zygote;

pub use link::{Link, Process};
pub use spawn::Spawner;
pub use wire::{Ask, CONTROL_SOCKET, ENDED_FILE};
