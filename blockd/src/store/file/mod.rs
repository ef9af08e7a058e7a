//! A store in a folder of the host.
//!
//! Relied on: Linux, a local file system on which `fsync` of a folder makes its names durable and
//! `rename` is atomic. All names are resolved relative to the folder's descriptor, so a folder that
//! is renamed or mounted over while open stays the same store. Symbolic links inside it are never
//! followed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use format::{Context, Error, Kind, Result};
use parking_lot::{Mutex, RwLock};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use super::{Access, File, Space, Store, name, to_usize};
use handle::FileHandle;
use ring::Rings;

mod bounce;
mod clone;
mod handle;
mod lock;
mod probe;
mod ring;
#[cfg(test)]
mod tests;

pub use lock::{LockGuard, LockKind};

/// What the caller asks of the host's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Past the page cache, or not at all.
    Direct,
    /// Through the page cache.
    Buffered,
    /// Direct where the file system can, else buffered with a warning.
    #[default]
    Auto,
}

impl CacheMode {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            CacheMode::Direct => "direct",
            CacheMode::Buffered => "buffered",
            CacheMode::Auto => "auto",
        }
    }
}

/// How a [`FileStore`] is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileStoreOptions {
    /// Use of the page cache.
    pub cache: CacheMode,
}

/// What came of the [`CacheMode`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effective {
    /// Files are open for direct I/O.
    Direct,
    /// Files go through the page cache.
    Buffered {
        /// Why, as a clause for messages.
        reason: String,
    },
}

/// A [`Store`] in a folder of the host. See the module head.
pub struct FileStore {
    dir: OwnedFd,
    path: PathBuf,
    cache: Effective,
    rings: Arc<Rings>,
}

impl FileStore {
    /// Opens an existing folder as a store.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when it is not a folder; `Unsupported` when direct I/O was asked for
    /// and the file system cannot; else what the host reports.
    pub fn open(dir: &Path, options: FileStoreOptions) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let object = || format!("store folder {}", dir.display());
        let fd = retry_on_intr(|| rustix::fs::open(dir, flags, Mode::empty()))
            .map_err(host)
            .context("open", object)?;
        let cache = effective(&fd, options.cache).context("open", object)?;
        if let (CacheMode::Auto, Effective::Buffered { reason }) = (options.cache, &cache) {
            tracing::warn!(store = %dir.display(), %reason, "no direct I/O; using the page cache");
        }
        Ok(FileStore { dir: fd, path: dir.into(), cache, rings: Arc::new(Rings::new()) })
    }

    /// Whether files bypass the page cache, and why not.
    pub fn cache(&self) -> Effective {
        self.cache.clone()
    }

    /// Locks a file of the store against other processes and against other calls of this function,
    /// without waiting. The lock is on the file, not on its content: it does not stop reads and
    /// writes, only other lockers. It goes when the guard is dropped or the process ends.
    ///
    /// # Errors
    /// `Busy` when it is locked in a conflicting way; `NotFound`; `Unsupported` where the file
    /// system has no locks; `ReadOnly` when it cannot be opened for writing, which an exclusive
    /// lock needs.
    pub fn lock(&self, name: &str, kind: LockKind) -> Result<LockGuard> {
        let path = self.object(name);
        let access = match kind {
            LockKind::Shared => OFlags::RDONLY,
            LockKind::Exclusive => OFlags::RDWR,
        };
        let fd = self.open_file(name, access).map_err(|e| e.tried("lock").on(&*path))?;
        lock::take(fd, kind, &path)
    }

    /// The full path, for messages.
    fn object(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    /// Opens a regular file and nothing else.
    fn open_file(&self, name: &str, flags: OFlags) -> Result<OwnedFd> {
        name::check(name)?;
        // Without NONBLOCK, opening a named pipe would wait for its other end.
        let guard = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let open = || rustix::fs::openat(&self.dir, name, flags | guard, Mode::empty());
        let fd = retry_on_intr(open).map_err(|e| match e {
            Errno::LOOP => Error::invalid("is a symbolic link, not a file").caused_by(e),
            Errno::NXIO => Error::invalid("is not a regular file").caused_by(e),
            // Folders refuse direct I/O too, and that is not what is wrong with them.
            Errno::INVAL if flags.contains(OFlags::DIRECT) => {
                self.check_file(name).err().unwrap_or_else(|| no_direct(e.to_string()))
            }
            e => host(e),
        })?;
        let stat = rustix::fs::fstat(&fd).map_err(host)?;
        regular(stat.st_mode)?;
        let writes = flags.contains(OFlags::RDWR);
        if writes && Mode::from_raw_mode(stat.st_mode) & ANY_WRITE == Mode::empty() {
            // The host lets the administrator write to such a file; a sealed file means it.
            return Err(Error::new(Kind::ReadOnly, "the file is marked read-only"));
        }
        rustix::fs::fcntl_setfl(&fd, flags).map_err(host)?;
        Ok(fd)
    }

    fn handle(&self, fd: OwnedFd, path: String, writable: bool) -> Result<Arc<dyn File>> {
        let direct = match self.cache {
            Effective::Direct => Some(probe::alignment(fd.as_fd()).map_err(no_direct)?),
            Effective::Buffered { .. } => None,
        };
        let (growth, turn) = (RwLock::new(()), Mutex::new(()));
        let rings = Arc::clone(&self.rings);
        Ok(Arc::new(FileHandle { fd, path, writable, direct, growth, turn, rings }))
    }

    fn direct_flag(&self) -> OFlags {
        match self.cache {
            Effective::Direct => OFlags::DIRECT,
            Effective::Buffered { .. } => OFlags::empty(),
        }
    }

    /// Refuses to rename or remove what is not a file.
    fn check_file(&self, name: &str) -> Result<()> {
        name::check(name)?;
        let stat = rustix::fs::statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW);
        regular(stat.map_err(host)?.st_mode)
    }
}

impl Store for FileStore {
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>> {
        let (flags, tried) = match access {
            Access::Read => (OFlags::RDONLY, "open"),
            Access::Write => (OFlags::RDWR, "open for writing"),
        };
        self.open_file(name, flags | self.direct_flag())
            .and_then(|fd| self.handle(fd, self.object(name), access == Access::Write))
            .context(tried, || self.object(name))
    }

    fn create(&self, name: &str) -> Result<Arc<dyn File>> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let create = || {
            name::check(name)?;
            let open = || rustix::fs::openat(&self.dir, name, flags | self.direct_flag(), mode);
            let fd = retry_on_intr(open).map_err(host)?;
            self.handle(fd, self.object(name), true)
        };
        create().context("create", || self.object(name))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        name::check(to)
            .and_then(|()| self.check_file(from))
            .and_then(|()| rustix::fs::renameat(&self.dir, from, &self.dir, to).map_err(host))
            .map_err(|e| e.tried(format!("rename to {to:?} the file")).on(self.object(from)))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.check_file(name)
            .and_then(|()| rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()).map_err(host))
            .context("remove", || self.object(name))
    }

    /// Regular files only. A name that is not UTF-8 cannot be one of ours and is left out.
    fn names(&self) -> Result<Vec<String>> {
        let list = || -> Result<Vec<String>, Errno> {
            let mut names = Vec::new();
            for entry in Dir::read_from(&self.dir)? {
                let entry = entry?;
                let Ok(name) = entry.file_name().to_str() else { continue };
                let kind = match entry.file_type() {
                    // Some file systems do not say it in the listing.
                    FileType::Unknown => {
                        match rustix::fs::statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                            Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                            Err(Errno::NOENT) => continue,
                            Err(e) => return Err(e),
                        }
                    }
                    kind => kind,
                };
                if kind == FileType::RegularFile {
                    names.push(name.to_owned());
                }
            }
            names.sort_unstable();
            Ok(names)
        };
        list().map_err(host).context("list", || self.describe())
    }

    fn sync_names(&self) -> Result<()> {
        let synced = retry_on_intr(|| rustix::fs::fsync(&self.dir));
        synced.map_err(host).context("sync the names of", || self.describe())
    }

    fn space(&self) -> Result<Space> {
        let stat = retry_on_intr(|| rustix::fs::fstatvfs(&self.dir));
        let stat = stat.map_err(host).context("read the free space of", || self.describe())?;
        Ok(Space {
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }

    fn describe(&self) -> String {
        format!("store folder {}", self.path.display())
    }
}

const ANY_WRITE: Mode = Mode::WUSR.union(Mode::WGRP).union(Mode::WOTH);

fn effective(dir: &OwnedFd, asked: CacheMode) -> Result<Effective> {
    if asked == CacheMode::Buffered {
        return Ok(Effective::Buffered { reason: "it was asked for".into() });
    }
    match (probe::direct(dir.as_fd()), asked) {
        (Ok(()), _) => Ok(Effective::Direct),
        (Err(reason), CacheMode::Direct) => Err(no_direct(reason)),
        (Err(reason), _) => Ok(Effective::Buffered { reason }),
    }
}

fn no_direct(reason: String) -> Error {
    Error::new(Kind::Unsupported, "direct I/O is not possible here")
        .caused_by(reason)
        .hint("open the store with the page cache (buffered)")
}

fn regular(mode: u32) -> Result<()> {
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Error::invalid("is a directory, not a file")),
        FileType::Symlink => Err(Error::invalid("is a symbolic link, not a file")),
        _ => Err(Error::invalid("is not a regular file")),
    }
}

/// The error for an answer of the host.
fn host(e: Errno) -> Error {
    let io = std::io::Error::from(e);
    match e {
        Errno::OPNOTSUPP | Errno::NOSYS => {
            Error::new(Kind::Unsupported, "the file system cannot do this").caused_by(io)
        }
        _ => io.into(),
    }
}
