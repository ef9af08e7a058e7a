//! Delta disks: the store, the disk engine and the catalogue.

pub mod store;
