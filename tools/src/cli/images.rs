//! The verbs that read and write image files, and what goes into them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::LostTail;
use crate::image::Format;
use crate::size;

/// `disk import`
#[derive(Debug, Args)]
pub struct Import {
    /// The image file or block device
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// Name of the new disk
    pub name: String,
    /// Format of the image
    #[arg(long, default_value = "auto")]
    pub format: SourceFormat,
    /// Make the disk this large; not smaller than the image
    #[arg(long, value_parser = size::parse)]
    pub size: Option<u64>,
    /// The image is a difference: apply it to what this sealed disk holds
    #[arg(long, value_name = "BASE", conflicts_with = "size")]
    pub over: Option<String>,
}

/// The format of an image that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SourceFormat {
    /// Told by its first bytes
    Auto,
    /// The bytes of the disk
    Raw,
    /// QEMU's format
    Qcow2,
    /// VMware's format
    Vmdk,
    /// Hyper-V's format
    Vhdx,
}

impl SourceFormat {
    /// The format that was named.
    #[must_use]
    pub fn named(self) -> Option<Format> {
        match self {
            SourceFormat::Auto => None,
            SourceFormat::Raw => Some(Format::Raw),
            SourceFormat::Qcow2 => Some(Format::Qcow2),
            SourceFormat::Vmdk => Some(Format::Vmdk),
            SourceFormat::Vhdx => Some(Format::Vhdx),
        }
    }
}

/// `disk export`
#[derive(Debug, Args)]
pub struct Export {
    /// Name of the disk
    pub name: String,
    /// The file to make
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// Format of the file
    #[arg(long, default_value = "raw")]
    pub format: SinkFormat,
    /// Write only what was changed since this disk
    #[arg(long, value_name = "NAME")]
    pub diff_from: Option<String>,
    /// Replace the file if there is one
    #[arg(long)]
    pub overwrite: bool,
    /// Verify the checksums of sealed data first
    #[arg(long)]
    pub verify: bool,
    #[command(flatten)]
    pub tail: LostTail,
}

/// The format of an image that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SinkFormat {
    /// The bytes of the disk, sparse
    Raw,
    /// QEMU's format, version 3
    Qcow2,
}

impl SinkFormat {
    /// The format.
    #[must_use]
    pub fn format(self) -> Format {
        match self {
            SinkFormat::Raw => Format::Raw,
            SinkFormat::Qcow2 => Format::Qcow2,
        }
    }
}

/// `disk diff`
#[derive(Debug, Args)]
pub struct Diff {
    /// Name of the disk
    pub name: String,
    /// Name of the disk that it is compared with
    pub from: String,
    #[command(flatten)]
    pub tail: LostTail,
}
