//! A file or block device that holds (a part of) an image, opened read-only: the one way in which
//! this folder and the format libraries below it read.
//!
//! Invariant: bytes past the end of the file are never made up, with one exception. An image's last
//! sector may be cut short (writers do not pad compressed data), so up to 511 bytes past the end
//! read as zeroes where a library asks for them. Without this rule a truncated qcow2 image would
//! read as an intact one with zeroes in it: the library's own file type fills up with zeroes.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use format::{Context, Error, Result};
use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use rustix::fs::{Advice, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::SECTOR;

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Bytes, more than zero.
    pub(super) len: u64,
    /// Whether the file system stores them; otherwise they read as zeroes.
    pub(super) stored: bool,
}

/// An open file of an image.
#[derive(Debug)]
pub(super) struct ImageFile {
    file: File,
    path: PathBuf,
    object: String,
    size: u64,
    id: (u64, u64),
    helper: CommonStorageHelper,
}

impl ImageFile {
    /// Opens `path`, which messages call `object`. Only regular files and block devices that are
    /// not empty are let in.
    pub(super) fn open(path: &Path, object: String) -> Result<Self> {
        // Without NONBLOCK, opening a named pipe would wait for somebody to write to it.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = || -> Result<(File, u64, (u64, u64))> {
            let mut file =
                File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from)?);
            let meta = file.metadata()?;
            if meta.is_dir() {
                return Err(Error::invalid("it is a directory, not a disk image"));
            }
            if !meta.is_file() && !meta.file_type().is_block_device() {
                return Err(Error::invalid("it is neither a regular file nor a block device"));
            }
            let size = file.seek(io::SeekFrom::End(0))?;
            if size == 0 {
                return Err(Error::invalid("it is empty"));
            }
            Ok((file, size, (meta.dev(), meta.ino())))
        };
        let (file, size, id) = opened().context("open", || object.clone())?;
        let (path, helper) = (path.to_owned(), CommonStorageHelper::default());
        Ok(ImageFile { file, path, object, size, id, helper })
    }

    /// The size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Device and inode: equal for two names of one file.
    pub(super) fn id(&self) -> (u64, u64) {
        self.id
    }

    /// What messages call this file.
    pub(super) fn object(&self) -> &str {
        &self.object
    }

    /// The path it was opened by.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// `name` as seen from the folder of this file.
    pub(super) fn sibling(&self, name: &str) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(name)
    }

    /// The first sector; past a shorter file's end, zeroes.
    pub(super) fn head(&self) -> Result<[u8; 512]> {
        let mut head = [0; 512];
        self.read_padded(&mut head, 0).context("read", || self.object.clone())?;
        Ok(head)
    }

    /// Whether the file starts with `mark`.
    pub(super) fn starts_with(&self, mark: &[u8]) -> Result<bool> {
        Ok(self.head()?.starts_with(mark))
    }

    /// Whether the last sector starts with `mark`.
    pub(super) fn ends_with_sector(&self, mark: &[u8]) -> Result<bool> {
        let mut tail = [0; 512];
        let at = self.size.saturating_sub(SECTOR);
        self.read_padded(&mut tail, at).context("read", || self.object.clone())?;
        Ok(tail.starts_with(mark))
    }

    /// Tells the kernel that the file will be read from front to back.
    pub(super) fn expect_sequential(&self) {
        // Advice only: a file system that ignores it costs speed and nothing else.
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::Sequential);
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the file ends before that.
    pub(super) fn read_exact(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// As [`ImageFile::read_exact`], with zeroes for what misses of the last sector.
    fn read_padded(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.covers(offset, buf.len() as u64)?;
        let stored = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (stored, missing) = buf.split_at_mut(stored.min(buf.len()));
        self.read_exact(stored, offset)?;
        missing.fill(0);
        Ok(())
    }

    /// Refuses a range that ends a sector or more past the end of the file.
    fn covers(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end < self.size.saturating_add(SECTOR) => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{len} bytes are expected at {offset}, but it ends at {}", self.size),
            )),
        }
    }

    /// What is at `offset`, for at most `limit` bytes (more than zero).
    ///
    /// # Errors
    /// `UnexpectedEof` if the range ends a sector or more past the end of the file.
    pub(super) fn extent(&self, offset: u64, limit: u64) -> io::Result<Extent> {
        self.covers(offset, limit)?;
        let (end, stored) = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => (data, false),
            Ok(_) => (rustix::fs::seek(&self.file, SeekFrom::Hole(offset))?, true),
            // No data from here on.
            Err(Errno::NXIO) => (u64::MAX, false),
            // A block device, or a file system that does not tell.
            Err(Errno::INVAL) => (u64::MAX, true),
            Err(e) => return Err(e.into()),
        };
        // A hole punched between the two questions gives an end at `offset`; one byte of data is
        // still a true answer then.
        Ok(Extent { len: end.saturating_sub(offset).clamp(1, limit), stored })
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.object)
    }
}

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "images are opened read-only")
}

impl Storage for ImageFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        Ok(self.path.parent().unwrap_or(Path::new("")).join(relative))
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut buf in bufv.into_inner() {
            self.read_padded(&mut buf, offset)?;
            offset = offset.saturating_add(buf.len() as u64);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, _: IoVector<'_>, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

impl fs_core::BlockRead for ImageFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> fs_core::Result<()> {
        Ok(self.read_exact(buf, offset)?)
    }

    fn size_bytes(&self) -> u64 {
        self.size
    }
}

// The defaults say that the device cannot be written. The VHDX library would otherwise replay an
// image's log into the image itself when it is opened.
impl fs_core::BlockDevice for ImageFile {}
