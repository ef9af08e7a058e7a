//! The Offshoot delta-disk format as a pure core: no I/O, no threads, no clocks, no unsafe.
//!
//! The byte-exact description, the invariants and the crash argument for every step are in
//! `docs/format.md`; the modules follow its sections. Whoever holds the bytes calls in here: the
//! disk engine, the checker, the fuzz targets and the crash enumeration all use the same decode
//! points.
#![forbid(unsafe_code)]

pub mod array;
pub mod entry;
pub mod error;
pub mod journal;
pub mod limits;
pub mod mode;
pub mod node;
pub mod space;
pub mod superblock;
pub mod table;
pub mod tree;
pub mod units;

pub use error::{Context, Error, Kind, Result};
