//! Fuzz targets: code that reads bytes from a disk, or from a client, must neither panic nor
//! contradict itself.
//!
//! A target takes any bytes. It goes through the public decode points only, and asserts what must
//! hold for whatever they accept (for example: what was decoded, encoded and decoded again is the
//! same). Checksums would keep a fuzzer outside for ever, so a target also tries the same bytes
//! with correct checksums and magic numbers: what is behind the checksum must stand on its own.
//!
//! Invariant: targets and seeds are deterministic; an input that fails once fails always.

mod bytes;
mod targets;

pub use targets::{TARGETS, Target, target};
