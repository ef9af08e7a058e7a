//! qcow2: opening an image with its chain of backing files, and writing one.
//!
//! `imago` reads the format. Before it is asked, [`vet`] looks at what `imago` 0.2 passes over and
//! what would make its answer untrue: encryption (it would hand out the ciphertext) and a first
//! level table that is too small for the disk (it would hand out zeroes).
//!
//! Invariants of a chain: every file in it is regular or a block device, none appears twice, there
//! are at most [`CHAIN_MAX`]. A file whose format nobody recorded and that turns out to be qcow2
//! may not refer to further files: it may be the raw disk of a guest that wrote this header into
//! it to get at a file of the host.

use std::io;
use std::path::{Path, PathBuf};

use format::{Context, Error, Kind, Result};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping,
};

use super::file::ImageFile;
use super::mapped::Mapped;
use super::origin::{CLUSTER, Origin};
use super::staged::{BUFFERED_STEP, Staged};
use super::{Format, Sink, check_range, detect_file, library_error};

/// The most files a chain may have.
const CHAIN_MAX: usize = 64;

/// A header of version 3 up to where its extensions may start.
const HEADER_LEN: usize = 104;

/// A reference from one file of a chain to the next.
struct Backing {
    path: PathBuf,
    format: Option<String>,
}

/// Opens `file` and everything below it.
pub(super) fn open(file: ImageFile) -> Result<Mapped> {
    let object = file.object().to_owned();
    let mut seen = vec![file.id()];
    let mut layers = Vec::new();
    let mut base = None;
    let mut next = Some((file, false));
    while let Some((file, guessed)) = next.take() {
        let upper = file.path().display().to_string();
        let (image, backing) = open_layer(file, guessed)?;
        layers.push(image);
        let Some(backing) = backing else { break };
        let file = open_backing(&backing.path, &upper, &mut seen)?;
        let (format, guessed) = backing_format(&backing, &file)?;
        match format {
            Format::Qcow2 => next = Some((file, guessed)),
            Format::Raw => {
                let raw = Raw::open_image(file, false).map_err(library_error)?;
                base = Some(FormatAccess::new(raw));
            }
            Format::Vmdk | Format::Vhdx => {
                return Err(Error::new(Kind::Unsupported, format!("it is a {format} image"))
                    .tried("open")
                    .on(file.object())
                    .hint("flatten the chain first with `qemu-img convert`"));
            }
        }
    }
    let access = layers.into_iter().rev().fold(base, |below, mut image| {
        image.set_backing(below);
        Some(FormatAccess::new(image))
    });
    let access = access.ok_or_else(|| Error::corrupt("it has no layers"))?;
    Ok(Mapped { access, format: Format::Qcow2, object, alone: false })
}

/// Opens a difference, without what it may have been put over meanwhile.
pub(super) fn open_difference(file: ImageFile) -> Result<(Mapped, Origin)> {
    let object = file.object().to_owned();
    let context = || object.clone();
    vet(&file).context("open", context)?;
    let origin = Origin::read(&file).context("open", context)?;
    let origin = origin.ok_or_else(|| {
        Error::new(Kind::Unsupported, "it does not say what it was made from")
            .hint("export it with `--diff-from`, from a sealed disk")
    });
    let origin = origin.context("open", context)?;
    let mut head = [0; HEADER_LEN];
    file.read_exact(&mut head, 0).context("open", context)?;
    let mut image: Qcow2<ImageFile> =
        Qcow2::open_image(file, false).map_err(library_error).context("open", context)?;
    // What is exported has neither: somebody has made something else of it.
    if image.requires_external_data_file() || 1_u64 << be32(&head, 20) != CLUSTER {
        return Err(Error::new(Kind::Unsupported, "it is not as it was exported"))
            .context("open", context);
    }
    image.set_backing(None);
    image.set_data_file(None);
    let access = FormatAccess::new(image);
    Ok((Mapped { access, format: Format::Qcow2, object, alone: true }, origin))
}

fn open_backing(path: &Path, upper: &str, seen: &mut Vec<(u64, u64)>) -> Result<ImageFile> {
    let object = format!("backing file {} of image {upper}", path.display());
    let file = ImageFile::open(path, object).map_err(|e| match e.kind() {
        Kind::NotFound => e.hint("put it back, or name another with `qemu-img rebase -u`"),
        _ => e,
    })?;
    if seen.contains(&file.id()) {
        return Err(Error::corrupt("the chain of backing files is a loop")
            .tried("open")
            .on(file.object()));
    }
    if seen.len() >= CHAIN_MAX {
        let reason = format!("the chain of backing files is longer than {CHAIN_MAX}");
        return Err(Error::new(Kind::Unsupported, reason)
            .tried("open")
            .on(file.object())
            .hint("flatten the chain first with `qemu-img convert`"));
    }
    seen.push(file.id());
    Ok(file)
}

/// The format of a backing file, and whether it is a guess by its first bytes.
fn backing_format(backing: &Backing, file: &ImageFile) -> Result<(Format, bool)> {
    match backing.format.as_deref() {
        Some("qcow2") => Ok((Format::Qcow2, false)),
        Some("raw" | "file" | "host_device") => Ok((Format::Raw, false)),
        Some("vmdk") => Ok((Format::Vmdk, false)),
        Some("vhdx") => Ok((Format::Vhdx, false)),
        Some(other) => Err(Error::new(Kind::Unsupported, format!("its format is `{other}`"))
            .tried("open")
            .on(file.object())),
        None => Ok((detect_file(file)?, true)),
    }
}

/// Opens one file of a chain: the image without what it refers to, and the reference to the next.
fn open_layer(file: ImageFile, guessed: bool) -> Result<(Qcow2<ImageFile>, Option<Backing>)> {
    let object = file.object().to_owned();
    let context = || object.clone();
    vet(&file).context("open", context)?;
    let folder = file.sibling("");
    let mut image: Qcow2<ImageFile> =
        Qcow2::open_image(file, false).map_err(library_error).context("open", context)?;

    let backing = image.implicit_backing_file().filter(|name| !name.is_empty());
    if guessed && (backing.is_some() || image.requires_external_data_file()) {
        return Err(Error::invalid(
            "it refers to another file, and that it is qcow2 is only a guess by its first bytes",
        )
        .tried("open")
        .on(object)
        .hint(
            "record the format in the image above it with `qemu-img rebase -u -F qcow2 -b ...`; \
             for an image of version 2, `qemu-img amend -o compat=1.1` does it",
        ));
    }
    let backing = match backing {
        None => None,
        Some(name) => Some(Backing {
            path: folder.join(local_name(name).context("open", context)?),
            format: image.implicit_backing_format().cloned(),
        }),
    };
    let data = if image.requires_external_data_file() {
        let name = image.implicit_external_data_file().map_or("", String::as_str);
        let path = folder.join(local_name(name).context("open", context)?);
        Some(ImageFile::open(&path, format!("data file {} of {object}", path.display()))?)
    } else {
        None
    };
    image.set_data_file(data);
    Ok((image, backing))
}

/// The file name in a reference, which may also be an address of something that is not a file.
fn local_name(name: &str) -> Result<&str> {
    let local = name.strip_prefix("file:").unwrap_or(name);
    let protocol = local.split('/').next().is_some_and(|first| first.contains(':'));
    if protocol {
        let reason = format!("it refers to `{name}`, which is not a file");
        return Err(Error::new(Kind::Unsupported, reason));
    }
    if local.is_empty() {
        return Err(Error::corrupt("it refers to a file and does not name it"));
    }
    Ok(local)
}

fn be32(head: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
}

fn be64(head: &[u8; HEADER_LEN], at: usize) -> u64 {
    u64::from(be32(head, at)) << 32 | u64::from(be32(head, at + 4))
}

/// Refuses what `imago` would misread, and names what it would refuse without a reason.
fn vet(file: &ImageFile) -> Result<()> {
    let mut head = [0; HEADER_LEN];
    file.read_exact(&mut head, 0).map_err(|_| Error::corrupt("it is too short for a header"))?;
    if !head.starts_with(b"QFI\xfb") {
        return Err(Error::corrupt("it is not a qcow2 image"));
    }
    let unsupported = |what: String| {
        Error::new(Kind::Unsupported, what)
            .hint("`qemu-img convert -O qcow2` writes an image without it")
    };
    let version = be32(&head, 4);
    if !(2..=3).contains(&version) {
        return Err(unsupported(format!("it has qcow version {version}")));
    }
    if be32(&head, 32) != 0 {
        return Err(unsupported("it is encrypted".to_owned()));
    }
    let cluster_bits = be32(&head, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(Error::corrupt(format!("its clusters have 2^{cluster_bits} bytes")));
    }
    // A table of the second level fills one cluster with entries of 8 bytes.
    let mapped_by_entry = 1_u64 << (2 * cluster_bits - 3);
    let entries = u64::from(be32(&head, 36));
    if be64(&head, 24).div_ceil(mapped_by_entry) > entries {
        return Err(Error::corrupt("its first level table is too small for its size"));
    }
    let features = if version == 3 { be64(&head, 72) } else { 0 };
    let unclean = match features & 3 {
        0 => None,
        1 => Some("it was not closed cleanly, or is in use"),
        _ => Some("it is marked as corrupt"),
    };
    if let Some(reason) = unclean {
        return Err(Error::corrupt(reason).hint("repair it with `qemu-img check -r all`"));
    }
    // Bit 2, data in another file, is the one that can be read.
    match features & !4 {
        0 => Ok(()),
        8 => Err(unsupported("it is not compressed with zlib".to_owned())),
        16 => Err(unsupported("it has extended L2 entries".to_owned())),
        bits => Err(unsupported(format!("it needs unknown features, bits {bits:#x}"))),
    }
}

/// A qcow2 image being written.
pub(super) struct Qcow2Sink {
    // Dropped before the staged file: it writes back its tables then.
    access: FormatAccess<imago::file::File>,
    staged: Staged,
    size: u64,
    origin: Option<Origin>,
}

impl Qcow2Sink {
    /// Starts an image of `size` bytes for `path`.
    pub(super) fn create(path: &Path, size: u64, overwrite: bool) -> Result<Self> {
        let staged = Staged::create(path, overwrite)?;
        let created = || -> Result<_> {
            let file = staged.direct().unwrap_or(staged.file()).try_clone()?;
            let storage = imago::file::File::try_from(file)?;
            let image: Qcow2<imago::file::File> = Qcow2::create_builder(storage)
                .size(size)
                .create_open(DenyImplicitOpenGate::default(), |storage| {
                    Ok(Qcow2::builder(storage).backing(None).write(true))
                })
                .map_err(library_error)?;
            Ok(FormatAccess::new(image))
        };
        let access = created().context("create", || staged.object())?;
        Ok(Qcow2Sink { access, staged, size, origin: None })
    }

    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        if self.staged.direct().is_some() {
            return self.access.write(buf, offset);
        }
        let mut steps = (offset..).step_by(BUFFERED_STEP).zip(buf.chunks(BUFFERED_STEP));
        steps.try_for_each(|(at, step)| self.access.write(step, at))
    }

    fn zero(&self, mut offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        while offset < end {
            let (mapping, len) =
                self.access.get_mapping(offset, end - offset).map_err(library_error)?;
            if len == 0 {
                return Err(Error::new(Kind::Failed, format!("no map entry for offset {offset}")));
            }
            // A fresh cluster reads as zeroes already; marking it would only grow the tables.
            if !matches!(mapping, Mapping::Zero { .. }) {
                self.access.write_zeroes(offset, len).map_err(library_error)?;
            }
            offset += len;
        }
        Ok(())
    }
}

impl Sink for Qcow2Sink {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)
            .and_then(|()| self.write(offset, buf).map_err(library_error))
            .context("write", || self.staged.object())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        check_range(self.size, offset, len)
            .and_then(|()| self.zero(offset, len))
            .context("write", || self.staged.object())
    }

    fn set_origin(&mut self, origin: Origin) -> Result<()> {
        self.origin = Some(origin);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let Qcow2Sink { access, staged, origin, .. } = *self;
        access.flush().map_err(library_error).context("write", || staged.object())?;
        drop(access);
        if let Some(origin) = origin {
            // The library writes its header once, when it makes the image.
            origin.write(staged.file()).context("write", || staged.object())?;
        }
        staged.publish()
    }
}
