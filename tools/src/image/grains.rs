//! VMDK (sparse, stream-optimised) and VHDX through libraries that read, but do not tell which
//! parts of the disk are stored.
//!
//! That is found out with a second reader on top of a [`Tripwire`], a device that hands out the
//! image's tables and refuses everything else. One byte is asked for in every allocation unit: if
//! the library can answer from its tables, nothing is stored there and the byte is a zero; if it
//! reaches for the data, it trips. The error is on the safe side: a reader that never got to see
//! any data cannot have an answer other than zero, and one that reads its tables in an unforeseen
//! way turns holes into data.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use format::{Error, Kind, Result};
use fs_core::{BlockDevice, BlockRead};
use img_vhdx::VhdxReader;
use img_vmdk::VmdkReader;

use super::file::ImageFile;
use super::{
    Format, Run, RunKind, Source, check_range, check_status, coalesce, guarded, library_error,
};

/// The shortest grain table that is told from data: longer than the head of a compressed grain.
const TABLE_MIN: usize = 64;

/// An image read through a library without an allocation map.
pub(super) struct Grains {
    object: String,
    format: Format,
    data: Box<dyn BlockRead>,
    probe: Mutex<Probe>,
}

/// A reader that says where data is.
struct Probe {
    reader: Box<dyn BlockRead>,
    wire: Arc<Tripwire>,
    /// Bytes that are stored or not stored as a whole.
    unit: u64,
}

/// The image's file, without its data once `tables` is set.
struct Tripwire {
    file: Arc<ImageFile>,
    /// The length of a table that may still be read.
    tables: OnceLock<Option<usize>>,
    tripped: AtomicBool,
}

impl Tripwire {
    fn new(file: &Arc<ImageFile>) -> Arc<Self> {
        let (tables, tripped) = (OnceLock::new(), AtomicBool::new(false));
        Arc::new(Tripwire { file: Arc::clone(file), tables, tripped })
    }

    /// From now on, lets through only reads of `tables` bytes.
    fn arm(&self, tables: Option<usize>) {
        self.tables.get_or_init(|| tables);
    }

    // Relaxed, with itself as the partner: one thread at a time uses a probe, under its lock, and
    // sets and reads the mark within one call.
    fn reset(&self) {
        self.tripped.store(false, Ordering::Relaxed);
    }

    fn tripped(&self) -> bool {
        self.tripped.load(Ordering::Relaxed)
    }
}

impl BlockRead for Tripwire {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> fs_core::Result<()> {
        if self.tables.get().is_none_or(|tables| *tables == Some(buf.len())) {
            return self.file.read_at(offset, buf);
        }
        self.tripped.store(true, Ordering::Relaxed);
        Err(fs_core::Error::Custom("data was asked for".to_owned()))
    }

    fn size_bytes(&self) -> u64 {
        self.file.size()
    }
}

impl BlockDevice for Tripwire {}

impl Probe {
    fn step(&self, offset: u64, limit: u64) -> Result<Run> {
        let len = (self.unit - offset % self.unit).min(limit);
        self.wire.reset();
        let mut byte = [0];
        let kind = match self.reader.read_at(offset, &mut byte) {
            Ok(()) => RunKind::Hole,
            Err(_) if self.wire.tripped() => RunKind::Data,
            Err(e) => return Err(reader_error(e)),
        };
        Ok(Run { len, kind })
    }
}

impl Source for Grains {
    fn size(&self) -> u64 {
        self.data.size_bytes()
    }

    fn format(&self) -> Format {
        self.format
    }

    fn status(&self, offset: u64, limit: u64) -> Result<Run> {
        guarded(&self.object, "map", || {
            let limit = check_status(self.size(), offset, limit)?;
            // A panic under the lock cannot have left the probe half changed: the wire is reset
            // before each use.
            let probe = self.probe.lock().unwrap_or_else(PoisonError::into_inner);
            coalesce(offset, limit, |at, left| probe.step(at, left))
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        guarded(&self.object, "read", || {
            check_range(self.size(), offset, buf.len() as u64)?;
            self.data.read_at(offset, buf).map_err(reader_error)
        })
    }
}

/// Opens a VMDK image that is one file with a binary header.
pub(super) fn open_vmdk(file: ImageFile) -> Result<Grains> {
    let file = Arc::new(file);
    let wire = Tripwire::new(&file);
    let object = file.object().to_owned();
    let data = VmdkReader::open_on_device(file).map_err(vmdk_error)?;
    let reader = VmdkReader::open_on_device(wire.clone()).map_err(vmdk_error)?;
    let tables = usize::try_from(reader.header().num_gtes_per_gt)
        .ok()
        .and_then(|entries| entries.checked_mul(4))
        .filter(|len| *len >= TABLE_MIN);
    wire.arm(tables);
    let unit = reader.grain_size_bytes();
    let probe = Mutex::new(Probe { reader: Box::new(reader), wire, unit });
    Ok(Grains { object, format: Format::Vmdk, data: Box::new(data), probe })
}

/// Opens a VHDX image.
pub(super) fn open_vhdx(file: ImageFile) -> Result<Grains> {
    let file = Arc::new(file);
    let wire = Tripwire::new(&file);
    let object = file.object().to_owned();
    let data = VhdxReader::open_on_device(file).map_err(vhdx_error)?;
    let reader = VhdxReader::open_on_device(wire.clone()).map_err(vhdx_error)?;
    // Its tables are all in memory by now.
    wire.arm(None);
    let unit = u64::from(reader.block_size());
    let probe = Mutex::new(Probe { reader: Box::new(reader), wire, unit });
    Ok(Grains { object, format: Format::Vhdx, data: Box::new(data), probe })
}

fn unsupported(what: &'static str) -> Error {
    Error::new(Kind::Unsupported, what).hint("`qemu-img convert -O qcow2` may be able to read it")
}

fn vmdk_error(e: img_vmdk::Error) -> Error {
    match e {
        img_vmdk::Error::Io(e) => library_error(e),
        img_vmdk::Error::Unsupported(what) => unsupported(what),
        e => Error::corrupt(e.to_string()),
    }
}

fn vhdx_error(e: img_vhdx::Error) -> Error {
    match e {
        img_vhdx::Error::Io(e) => library_error(e),
        img_vhdx::Error::Unsupported(what) => unsupported(what),
        img_vhdx::Error::LogNeedsReplay | img_vhdx::Error::LogUnassembled(_) => {
            Error::corrupt("it was not closed cleanly, or is in use")
                .hint("repair it with `qemu-img check -r all`")
        }
        e => Error::corrupt(e.to_string()),
    }
}

fn reader_error(e: fs_core::Error) -> Error {
    match e {
        fs_core::Error::Io(e) => library_error(e),
        e => Error::corrupt(e.to_string()),
    }
}
