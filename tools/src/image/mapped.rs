//! Images that `imago` maps: a qcow2 chain, and flat VMDK.
//!
//! Relied on: `imago` resolves a range through all layers and names the file and the place where
//! its bytes are, so a hole in that file is a hole of the image.

use std::io;
use std::path::Path;

use format::{Error, Kind, Result};
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, Mapping, StorageOpenOptions};

use super::file::ImageFile;
use super::{
    Format, Run, RunKind, Source, check_range, check_status, coalesce, guarded, library_error,
};

/// An image read through `imago`.
pub(super) struct Mapped {
    pub(super) access: FormatAccess<ImageFile>,
    pub(super) format: Format,
    pub(super) object: String,
    /// It is one layer, without those below: what the file system has no blocks for are zeroes of
    /// this layer then, and no hole in it.
    pub(super) alone: bool,
}

impl Mapped {
    fn step(&self, offset: u64, limit: u64) -> Result<Run> {
        let (mapping, len) = self.access.get_mapping(offset, limit).map_err(library_error)?;
        if len == 0 {
            return Err(Error::corrupt(format!("its map has no entry for offset {offset}")));
        }
        let kind = match mapping {
            Mapping::Raw { .. } if self.alone => RunKind::Data,
            Mapping::Raw { storage, offset, .. } => {
                let extent = storage.extent(offset, len)?;
                let kind = if extent.stored { RunKind::Data } else { RunKind::Hole };
                return Ok(Run { len: extent.len, kind });
            }
            Mapping::Zero { explicit: true, .. } => RunKind::Zero,
            Mapping::Zero { .. } => RunKind::Hole,
            // Compressed, or something newer: reading it will tell.
            _ => RunKind::Data,
        };
        Ok(Run { len, kind })
    }
}

impl Source for Mapped {
    fn size(&self) -> u64 {
        self.access.size()
    }

    fn format(&self) -> Format {
        self.format
    }

    fn status(&self, offset: u64, limit: u64) -> Result<Run> {
        guarded(&self.object, "map", || {
            let limit = check_status(self.size(), offset, limit)?;
            coalesce(offset, limit, |at, left| self.step(at, left))
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        guarded(&self.object, "read", || {
            check_range(self.size(), offset, buf.len() as u64)?;
            self.access.read(buf, offset).map_err(library_error)
        })
    }
}

/// Opens a VMDK image whose descriptor is a text file of its own.
pub(super) fn open_flat_vmdk(file: ImageFile) -> Result<Mapped> {
    let object = file.object().to_owned();
    let mut refused = None;
    let folder = file.sibling("");
    let gate = BesideOnly { folder: &folder, object: &object, refused: &mut refused };
    match Vmdk::<ImageFile>::builder(file).open(gate) {
        Ok(vmdk) => Ok(Mapped {
            access: FormatAccess::new(vmdk),
            format: Format::Vmdk,
            object,
            alone: false,
        }),
        Err(e) => Err(refused.unwrap_or_else(|| not_understood(e))),
    }
}

/// `imago` refuses every line that it does not know, so that a healthy descriptor of VMware's can
/// look damaged to it: that is not to be called corrupt.
fn not_understood(e: io::Error) -> Error {
    let error = library_error(e);
    if !matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) {
        return error;
    }
    Error::new(Kind::Unsupported, format!("its descriptor is not understood: {}", error.reason()))
        .hint("`qemu-img convert -O qcow2` reads more kinds of VMDK images")
}

/// Lets a descriptor name files of its own folder only, as every writer does: an image from
/// elsewhere must not pull other files of this host into an import.
struct BesideOnly<'a> {
    folder: &'a Path,
    object: &'a str,
    /// Why a file was refused; `imago` passes on no more than a text.
    refused: &'a mut Option<Error>,
}

impl BesideOnly<'_> {
    fn open_extent(&self, path: &Path) -> Result<ImageFile> {
        let object = format!("extent {} of {}", path.display(), self.object);
        if path.file_name().is_none_or(|name| self.folder.join(name) != path) {
            return Err(Error::invalid("it is not in the folder of the image")
                .tried("open")
                .on(object)
                .hint("put the extent beside its descriptor and name it without a path"));
        }
        ImageFile::open(path, object)
    }
}

impl ImplicitOpenGate<ImageFile> for BesideOnly<'_> {
    fn open_format<F: FormatDriverBuilder<ImageFile>>(
        &mut self,
        _: F,
    ) -> io::Result<FormatAccess<ImageFile>> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "an extent in another format"))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<ImageFile> {
        self.open_extent(options.get_filename().unwrap_or(Path::new(""))).map_err(|e| {
            let text = e.to_string();
            *self.refused = Some(e);
            io::Error::other(text)
        })
    }
}
