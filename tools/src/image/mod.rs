//! Foreign disk images: reading them for import, writing them for export.
//!
//! Raw files and block devices are read here. The other formats are read by libraries: qcow2 and
//! flat VMDK by `imago`, sparse and stream-optimised VMDK by `rust-img-vmdk`, VHDX by
//! `rust-img-vhdx`. Nothing in this folder parses a format; where a library does not look at a
//! header field that decides whether its answer is true, the field is vetted before the library
//! is asked (see `qcow2.rs`).
//!
//! Invariants:
//! - A source is opened read-only and never changed, also not to replay a journal.
//! - A file that ends before the data it promises is an error, never zeroes (see `file.rs`).
//! - A panic inside a library that reads is reported as a corrupt image.
//! - A sink appears under its name complete and synced, or not at all (see `staged.rs`).

mod changes;
mod content;
mod file;
mod grains;
mod mapped;
mod origin;
mod qcow2;
mod raw;
mod staged;
#[cfg(test)]
mod tests;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::str::FromStr;

use blockd::content::{Run, RunKind};
use clap::ValueEnum;
use format::{Context, Error, Kind, Result};

pub use changes::Changes;
pub use content::Image;
use file::ImageFile;
pub use origin::{Base, CLUSTER, Origin, without_base};

/// Every image is a whole number of these many bytes.
const SECTOR: u64 = 512;

/// The longest run [`Source::status`] puts together in one call, in bytes.
const RUN_MAX: u64 = 1 << 30;

/// The formats this build knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Format {
    /// The bytes of the disk, and nothing else; also a block device.
    Raw,
    /// QEMU's format, versions 2 and 3.
    Qcow2,
    /// VMware's format: monolithic sparse, stream-optimised, flat.
    Vmdk,
    /// Hyper-V's format: dynamic and fixed.
    Vhdx,
}

impl Format {
    /// The name used on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vhdx => "vhdx",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Format::value_variants();
        known.iter().copied().find(|f| f.name() == name).ok_or_else(|| {
            Error::new(Kind::Unsupported, format!("no image format is called `{name}`"))
                .hint("use raw, qcow2, vmdk or vhdx")
        })
    }
}

/// An image opened for reading. Threads may share it; reads run in parallel where the format's
/// library lets them (raw, qcow2, VHDX; VMDK reads share two small caches).
pub trait Source: Send + Sync {
    /// The size of the disk the image holds, in bytes: a positive multiple of 512.
    fn size(&self) -> u64;

    /// The format the image was opened as.
    fn format(&self) -> Format;

    /// The kind of what starts at `offset`, and for how many bytes, at most `limit`. A neighbour
    /// may be of the same kind. Walking a whole image costs time by its extents, not by its size.
    ///
    /// # Errors
    /// `Invalid` if `offset` is at or past the end or `limit` is 0, `Corrupt`, `Io`.
    fn status(&self, offset: u64, limit: u64) -> Result<Run>;

    /// Fills `buf` from `offset`; holes and zeroes read as zero bytes.
    ///
    /// # Errors
    /// `Invalid` if the range ends past the end, `Corrupt`, `Io`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
}

/// An image being written. It starts out as all zeroes. Threads may share it as long as they
/// write different ranges. Dropping it without [`Sink::finish`] leaves nothing behind.
pub trait Sink: Send + Sync {
    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// `Invalid` if the range ends past the end, `NoSpace`, `Io`.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Makes `len` bytes from `offset` read as zeroes, storing nothing for them where possible.
    ///
    /// # Errors
    /// `Invalid` if the range ends past the end, `NoSpace`, `Io`.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()>;

    /// Has the image say what it was made over.
    ///
    /// # Errors
    /// `Unsupported` for a format that cannot.
    fn set_origin(&mut self, _: Origin) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "an image of this format cannot say what it stands on"))
    }

    /// Syncs the image and gives it its name.
    ///
    /// # Errors
    /// `NoSpace`, `Io`; `Exists` if a file took the name meanwhile and may not be replaced. The
    /// image is gone then.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// Tells an image's format by its first bytes; what has no known mark is raw.
///
/// A guest can write any mark into its raw disk. Whoever imports a disk that a guest has written
/// should name the format instead: a forged header may refer to other files of this host.
///
/// # Errors
/// `NotFound`, `Invalid` for what is neither a file nor a block device or is empty, `Unsupported`
/// for a format that is recognised but cannot be read (importing that as raw would be a mistake).
pub fn detect(path: &Path) -> Result<Format> {
    detect_file(&open_file(path)?)
}

/// Opens the image at `path`, as `format` or as what [`detect`] says.
///
/// # Errors
/// As [`detect`]; `Corrupt` if the image contradicts itself, was cut short or was not closed
/// cleanly, `Unsupported` for a feature of the format that cannot be read, `NotFound` if a file the
/// image refers to is missing, `Invalid` if its size is not a multiple of 512.
pub fn open_source(path: &Path, format: Option<Format>) -> Result<Box<dyn Source>> {
    let file = open_file(path)?;
    let format = match format {
        Some(format) => format,
        None => detect_file(&file)?,
    };
    let object = file.object().to_owned();
    let source = guarded(&object, "open", || match format {
        Format::Raw => Ok(Box::new(raw::RawSource::open(file)?) as Box<dyn Source>),
        Format::Qcow2 => Ok(Box::new(qcow2::open(file)?)),
        Format::Vmdk if file.starts_with(VMDK_TEXT)? => Ok(Box::new(mapped::open_flat_vmdk(file)?)),
        Format::Vmdk => Ok(Box::new(grains::open_vmdk(file)?)),
        Format::Vhdx => Ok(Box::new(grains::open_vhdx(file)?)),
    })?;
    check_size(source.size()).context("open", || object)?;
    Ok(source)
}

/// Starts an image of `size` bytes that will appear at `path` in [`Sink::finish`]: raw (sparse) or
/// qcow2 (version 3, clusters of 64 KiB, nothing preallocated). `overwrite` allows replacing a
/// regular file.
///
/// # Errors
/// `Exists` if there is something at `path` and `overwrite` is not set; `Invalid` if `size` is not
/// a positive multiple of 512, or `path` is something other than a regular file; `Unsupported` for
/// another format; `NotFound` if the folder is missing; `NoSpace`; `Io`.
pub fn create_sink(
    path: &Path,
    format: Format,
    size: u64,
    overwrite: bool,
) -> Result<Box<dyn Sink>> {
    let object = || format!("image {}", path.display());
    check_size(size).context("create", object)?;
    match format {
        Format::Raw => Ok(Box::new(raw::RawSink::create(path, size, overwrite)?)),
        Format::Qcow2 => Ok(Box::new(qcow2::Qcow2Sink::create(path, size, overwrite)?)),
        Format::Vmdk | Format::Vhdx => {
            Err(Error::new(Kind::Unsupported, format!("{format} images can be read, not written"))
                .tried("create")
                .on(object())
                .hint("export as qcow2 or raw and convert that"))
        }
    }
}

fn open_file(path: &Path) -> Result<ImageFile> {
    ImageFile::open(path, format!("image {}", path.display()))
}

/// The first line of a VMDK descriptor that is a file of its own.
const VMDK_TEXT: &[u8] = b"# Disk DescriptorFile";

/// Marks at the start of a file, and the format they stand for.
const KNOWN: [(&[u8], Format); 5] = [
    (b"QFI\xfb", Format::Qcow2),
    (b"KDMV", Format::Vmdk),
    (b"COWD", Format::Vmdk),
    (VMDK_TEXT, Format::Vmdk),
    (b"vhdxfile", Format::Vhdx),
];

/// Offsets and marks of what would be a damaged disk if it were taken for a raw image.
const FOREIGN: [(usize, &[u8], &str); 9] = [
    (0, b"conectix", "a dynamic VHD image"),
    (64, b"\x7f\x10\xda\xbe", "a VDI image"),
    (0, b"QED\0", "a QED image"),
    (0, b"WithoutFreeSpace", "a Parallels image"),
    (0, b"WithouFreSpacExt", "a Parallels image"),
    (0, b"\x1f\x8b\x08", "compressed with gzip"),
    (0, b"\xfd7zXZ\0", "compressed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (0, b"BZh", "compressed with bzip2"),
];

fn detect_file(file: &ImageFile) -> Result<Format> {
    let head = file.head()?;
    if let Some((_, format)) = KNOWN.iter().find(|(mark, _)| head.starts_with(mark)) {
        return Ok(*format);
    }
    let foreign = FOREIGN.iter().find(|(at, mark, _)| head[*at..].starts_with(mark));
    let what = match foreign {
        Some((_, _, what)) => what,
        None if file.ends_with_sector(b"conectix")? => "a fixed VHD image",
        None => return Ok(Format::Raw),
    };
    Err(Error::new(Kind::Unsupported, format!("the file looks like {what}"))
        .tried("open")
        .on(file.object())
        .hint("unpack or convert it first, or name the format raw if it really is a raw disk"))
}

fn check_size(size: u64) -> Result<()> {
    if size == 0 {
        return Err(Error::invalid("the disk size is 0"));
    }
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::invalid(format!("the disk size, {size}, is not a multiple of 512")));
    }
    Ok(())
}

fn check_range(size: u64, offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::invalid(format!("{len} bytes from {offset} pass its end, at {size}"))),
    }
}

/// The length that [`Source::status`] may report on.
fn check_status(size: u64, offset: u64, limit: u64) -> Result<u64> {
    if offset >= size || limit == 0 {
        return Err(Error::invalid(format!("no range of {limit} bytes starts at {offset}")));
    }
    Ok(limit.min(size - offset))
}

/// The longest run of one kind from `offset` (at most `limit` and [`RUN_MAX`]), put together from
/// runs of `step(offset, limit)`.
fn coalesce(offset: u64, limit: u64, mut step: impl FnMut(u64, u64) -> Result<Run>) -> Result<Run> {
    let limit = limit.min(RUN_MAX);
    let mut run = step(offset, limit)?;
    while run.len < limit {
        let next = step(offset + run.len, limit - run.len)?;
        if next.kind != run.kind {
            break;
        }
        run.len += next.len;
    }
    Ok(run)
}

/// Runs a call into a format library. Image content decides what happens inside, so a panic there
/// is a finding about the image and not about this program. (Needs panics that unwind.)
fn guarded<T>(object: &str, tried: &'static str, call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err(Error::corrupt("its content made the format library fail")))
        .context(tried, || object.to_owned())
}

/// An error of a format library. What the host reported keeps its meaning; what the library
/// made up itself is about the image.
fn library_error(e: std::io::Error) -> Error {
    use std::io::ErrorKind as E;
    let kind = match e.kind() {
        _ if e.raw_os_error().is_some() => return e.into(),
        E::Unsupported => Kind::Unsupported,
        E::InvalidData | E::InvalidInput | E::Other => Kind::Corrupt,
        _ => return e.into(),
    };
    Error::new(kind, e.to_string())
}
