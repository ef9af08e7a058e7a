//! `disk read`, `write`, `discard`

use clap::Args;

use super::LostTail;
use crate::size;

/// A part of a disk.
#[derive(Debug, Args)]
pub struct Range {
    /// Name of the disk
    pub name: String,
    /// First byte
    #[arg(long, value_parser = size::parse, default_value = "0", value_name = "BYTES")]
    pub offset: u64,
    /// Number of bytes; without it, to the end of the disk
    #[arg(long, value_parser = size::parse, value_name = "BYTES")]
    pub length: Option<u64>,
    #[command(flatten)]
    pub tail: LostTail,
}

/// `disk write`
#[derive(Debug, Args)]
pub struct Write {
    /// Name of the disk
    pub name: String,
    /// First byte
    #[arg(long, value_parser = size::parse, default_value = "0", value_name = "BYTES")]
    pub offset: u64,
    /// At most this many bytes; without it, to the end of the input
    #[arg(long, value_parser = size::parse, value_name = "BYTES")]
    pub length: Option<u64>,
    #[command(flatten)]
    pub tail: LostTail,
}

/// `disk discard`
#[derive(Debug, Args)]
pub struct Discard {
    /// Name of the disk
    pub name: String,
    /// First byte
    #[arg(long, value_parser = size::parse, value_name = "BYTES")]
    pub offset: u64,
    /// Number of bytes
    #[arg(long, value_parser = size::parse, value_name = "BYTES")]
    pub length: u64,
    #[command(flatten)]
    pub tail: LostTail,
}
