//! A file that is written under a temporary name beside its target and gets its name when it is
//! complete.
//!
//! Invariants:
//! - Nothing but a complete, synced file ever carries the target name. A process killed on the way
//!   leaves at most a file called `.offshoot-*.partial`.
//! - Without `overwrite`, nothing that took the name meanwhile is replaced: the rename refuses.
//!
//! The content is synced before the rename, so that a power cut cannot leave the name on an empty
//! file; the folder is synced after it, so that success means the name is on disk.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use format::{Context, Error, Kind, Result};
use tempfile::NamedTempFile;

/// A file without its final name; dropping it removes it.
pub(super) struct Staged {
    temp: NamedTempFile,
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
        Ok(Staged { temp, target: target.to_owned(), overwrite })
    }

    /// The file being written.
    pub(super) fn file(&self) -> &File {
        self.temp.as_file()
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

fn exists() -> Error {
    Error::new(Kind::Exists, "a file has that name already")
        .hint("choose another name, or allow overwriting it")
}

fn folder(target: &Path) -> &Path {
    target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
