//! Delta disks: the store, the disk engine, the catalogue, and the daemon that serves them.

pub mod api;
pub mod catalogue;
pub mod check;
pub mod clock;
pub mod content;
pub mod daemon;
pub mod diff;
pub mod disk;
pub mod messages;
pub mod nbd;
pub mod program;
pub mod pump;
pub mod segment;
pub mod serve;
mod side_by_side;
mod sockets;
pub mod store;
pub mod storedir;
pub mod verbs;
