//! Delta disks: the store, the disk engine and the catalogue.

pub mod catalogue;
pub mod check;
pub mod diff;
pub mod disk;
pub mod segment;
pub mod serve;
pub mod store;
pub mod storedir;
