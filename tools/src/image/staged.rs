//! A file that is written under a temporary name beside its target and gets its name when it is
//! complete.
//!
//! Invariants:
//! - Nothing but a complete, synced file ever carries the target name. A process killed on the way
//!   leaves at most a file called `.offshoot-*.partial`.
//! - Without `overwrite`, nothing that took the name meanwhile is replaced: the rename refuses.
//!
//! Aligned writes go past the page cache where the file system can: the file is synced at the end
//! in any case, and so the device works while the next bytes are made.
//!
//! The content is synced before the rename, so that a power cut cannot leave the name on an empty
//! file; the folder is synced after it, so that success means the name is on disk.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use blockd::store::buf::ALIGN;
use format::{Context, Error, Kind, Result};
use rustix::fs::{Mode, OFlags};
use tempfile::NamedTempFile;

/// Bytes of one write through the page cache. Larger ones make it look for larger pieces of memory
/// than it finds at once: 1 GiB took 0.6 s in steps of 128 KiB, and 0.6 to 2.5 s in steps of 2 MiB.
pub(super) const BUFFERED_STEP: usize = 128 << 10;

/// A file without its final name; dropping it removes it.
pub(super) struct Staged {
    temp: NamedTempFile,
    /// The same file, open for direct I/O.
    direct: Option<File>,
    target: PathBuf,
    overwrite: bool,
}

impl Staged {
    /// Starts a file for `target`.
    pub(super) fn create(target: &Path, overwrite: bool) -> Result<Self> {
        let object = || format!("image {}", target.display());
        match target.symlink_metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).context("create", object),
            Ok(_) if !overwrite => return Err(exists()).context("create", object),
            Ok(meta) if !meta.is_file() => {
                return Err(Error::invalid("something other than a regular file has that name"))
                    .context("create", object);
            }
            Ok(_) => {}
        }
        let folder = folder(target);
        let temp = tempfile::Builder::new()
            .prefix(".offshoot-")
            .suffix(".partial")
            // The usual mode of a new file, subject to the umask; the default would be 0600.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .context("create", || format!("a file in {}", folder.display()))?;
        let direct = open_direct(temp.path());
        Ok(Staged { temp, direct, target: target.to_owned(), overwrite })
    }

    /// The file being written.
    pub(super) fn file(&self) -> &File {
        self.temp.as_file()
    }

    /// The file, open for direct I/O, if the file system can.
    pub(super) fn direct(&self) -> Option<&File> {
        self.direct.as_ref()
    }

    /// Writes `buf` at `offset`, past the page cache if it can be done.
    pub(super) fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let align = ALIGN as u64;
        let aligned = buf.as_ptr().addr().is_multiple_of(ALIGN)
            && buf.len().is_multiple_of(ALIGN)
            && offset.is_multiple_of(align);
        if let Some(direct) = self.direct.as_ref().filter(|_| aligned) {
            match direct.write_all_at(buf, offset) {
                // The device asks for more than any that was met so far.
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
                done => return done,
            }
        }
        let mut steps = (offset..).step_by(BUFFERED_STEP).zip(buf.chunks(BUFFERED_STEP));
        steps.try_for_each(|(at, step)| self.file().write_all_at(step, at))
    }

    /// What messages call it.
    pub(super) fn object(&self) -> String {
        format!("image {}", self.target.display())
    }

    /// Syncs the file and gives it its name.
    pub(super) fn publish(self) -> Result<()> {
        let object = self.object();
        let publish = || -> Result<()> {
            self.temp.as_file().sync_all()?;
            if self.overwrite {
                self.temp.persist(&self.target).map_err(|e| e.error)?;
            } else {
                self.temp.persist_noclobber(&self.target).map_err(|e| match e.error.kind() {
                    io::ErrorKind::AlreadyExists => exists(),
                    _ => e.error.into(),
                })?;
            }
            File::open(folder(&self.target))?.sync_all()?;
            Ok(())
        };
        publish().context("finish", || object)
    }
}

fn open_direct(path: &Path) -> Option<File> {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::empty()).ok().map(File::from)
}

fn exists() -> Error {
    Error::new(Kind::Exists, "a file has that name already")
        .hint("choose another name, or allow overwriting it")
}

fn folder(target: &Path) -> &Path {
    target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
