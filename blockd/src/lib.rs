//! Delta disks: the store, the disk engine, the catalogue, and the front doors that serve them.

pub mod catalogue;
pub mod check;
pub mod diff;
pub mod disk;
pub mod nbd;
pub mod segment;
pub mod serve;
pub mod store;
pub mod storedir;
