//! The folder of a snapshot: made beside its place, put there as a whole, read again.
//!
//! The order of making it, and the crash that each step is for:
//! 1. [`Draft::begin`]: the folder is made under a name of its own, and that name is durable before
//!    a disk is forked. While it is there, the snapshot counts as not done (`daemon/undo.rs`): a
//!    power cut which took it away and left the disks would leave disks that nobody knows of;
//! 2. memory and state are written, and synced each: a power cut after the rename would leave the
//!    names of files with nothing behind them;
//! 3. the manifest, which has their sums, and a sync of it;
//! 4. a sync of the folder: files without names would be as good as none;
//! 5. the rename, which is the instant at which the snapshot is there. It replaces nothing. Whoever
//!    is killed before leaves a folder that the next daemon removes, whoever is killed afterwards a
//!    snapshot;
//! 6. a sync of the folder above: until then a power cut may take the snapshot away, so nobody is
//!    told of it, and nothing is forgotten that would be needed to remove its disks.
//!
//! Tests: below, with a host that notes the order; `vm_snapshot`, with kills.

use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use blockd::pump::Watch;
use format::{Context as _, Error, Kind, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use uuid::Uuid;

use super::manifest::BYTES_MAX;
use super::memory::{self, CHUNK, Written};
use super::{FileSum, MANIFEST, MEMORY, Manifest, MemorySums, STATE};
use crate::memory::Layer;

/// Bytes of a state at most.
const STATE_MAX: u64 = 64 << 20;

/// What makes things durable, and gives names. A test notes the order.
pub trait Host {
    /// Makes the content of a file durable.
    ///
    /// # Errors
    /// What the host reports.
    fn sync_file(&self, file: &File, path: &Path) -> Result<()>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// What the host reports.
    fn sync_folder(&self, path: &Path) -> Result<()>;

    /// Gives a folder another name, that nothing has.
    ///
    /// # Errors
    /// `Exists` when something has it; or what the host reports.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;
}

/// The host itself.
#[derive(Debug, Clone, Copy)]
pub struct RealHost;

impl Host for RealHost {
    fn sync_file(&self, file: &File, _path: &Path) -> Result<()> {
        Ok(file.sync_all()?)
    }

    fn sync_folder(&self, path: &Path) -> Result<()> {
        Ok(File::open(path)?.sync_all()?)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let renamed = renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE);
        Ok(renamed.map_err(std::io::Error::from)?)
    }
}

fn named(path: &Path) -> String {
    format!("snapshot {}", path.display())
}

/// A snapshot that is being made.
pub struct Draft<'a> {
    host: &'a dyn Host,
    place: PathBuf,
    above: PathBuf,
    partial: PathBuf,
}

impl<'a> Draft<'a> {
    /// One that is going to be at `place`. Nothing is made yet.
    ///
    /// # Errors
    /// `Invalid` for what is no place for a folder, `Exists` when something is there, `NotFound`
    /// when the folder above is not.
    pub fn plan(place: &Path, id: Uuid, host: &'a dyn Host) -> Result<Draft<'a>> {
        let plan = || -> Result<Draft<'a>> {
            let (above, partial) = beside(place, id)?;
            match fs::symlink_metadata(place) {
                Ok(_) => {
                    return Err(Error::new(Kind::Exists, "something is there already")
                        .hint("choose another place, or remove that first"));
                }
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e.into()),
            }
            if !fs::metadata(&above).context("find", || above.display().to_string())?.is_dir() {
                return Err(Error::invalid("what is above it is no folder"));
            }
            Ok(Draft { host, place: place.to_owned(), above, partial })
        };
        plan().context("write", || named(place))
    }

    /// Where it is going to be.
    #[must_use]
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Where it is while it is not done.
    #[must_use]
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Makes the folder, durably.
    ///
    /// # Errors
    /// What the host reports.
    pub fn begin(&self) -> Result<()> {
        let begin = || -> Result<()> {
            // The memory of a machine is its owner's alone.
            DirBuilder::new().mode(0o700).create(&self.partial)?;
            self.host.sync_folder(&self.above)
        };
        begin().context("write", || named(&self.place))
    }

    fn put(&self, name: &str, write: &mut dyn FnMut(&mut File) -> Result<()>) -> Result<()> {
        let path = self.partial.join(name);
        let mut put = || -> Result<()> {
            let mut options = File::options();
            let mut file = options.create_new(true).write(true).mode(0o600).open(&path)?;
            write(&mut file)?;
            self.host.sync_file(&file, &path)
        };
        put().context("write", || format!("{name} of {}", named(&self.place)))
    }

    /// Writes the memory.
    ///
    /// # Errors
    /// What the host reports, or `watch`.
    pub fn memory(&self, layers: &[Layer], bytes: u64, watch: &dyn Watch) -> Result<Written> {
        let mut written = Written { crc32c: Vec::new(), bytes: 0 };
        self.put(MEMORY, &mut |file| {
            written = memory::write(layers, bytes, file, watch)?;
            Ok(())
        })?;
        Ok(written)
    }

    /// Writes the state.
    ///
    /// # Errors
    /// What the host reports.
    pub fn state(&self, state: &[u8]) -> Result<FileSum> {
        self.put(STATE, &mut |file| Ok(file.write_all(state)?))?;
        Ok(FileSum { bytes: state.len() as u64, crc32c: crc32c::crc32c(state) })
    }

    /// Writes the manifest, and puts the snapshot in its place.
    ///
    /// # Errors
    /// `Exists` when something came there meanwhile, or what the host reports. It is not there
    /// then, unless the host could neither make it durable nor take it back.
    pub fn finish(self, manifest: &Manifest) -> Result<()> {
        let text = manifest.encode()?;
        self.put(MANIFEST, &mut |file| Ok(file.write_all(&text)?))?;
        let place = || -> Result<()> {
            self.host.sync_folder(&self.partial)?;
            self.host.rename(&self.partial, &self.place)?;
            self.host.sync_folder(&self.above).inspect_err(|_| {
                // Under its first name it counts as not done, and is removed with its disks.
                let _ = self.host.rename(&self.place, &self.partial);
            })
        };
        place().context("write", || named(&self.place))
    }
}

/// The folder above a place, and a name beside it.
fn beside(place: &Path, id: Uuid) -> Result<(PathBuf, PathBuf)> {
    let name = place.file_name().filter(|_| place.is_absolute());
    let (Some(name), Some(above)) = (name, place.parent()) else {
        return Err(Error::invalid("it is no absolute path of a folder"));
    };
    let name = format!(".{}.{}.partial", name.display(), id.simple());
    Ok((above.to_owned(), above.join(name)))
}

/// The sums of memory that was written.
impl From<Written> for MemorySums {
    fn from(written: Written) -> MemorySums {
        MemorySums { chunk_bytes: CHUNK, crc32c: written.crc32c }
    }
}

/// Where [`set_aside`] moves a snapshot.
///
/// # Errors
/// `Invalid` for what is no place for a folder.
pub fn aside(place: &Path, id: Uuid) -> Result<PathBuf> {
    Ok(beside(place, id).context("remove", || named(place))?.1)
}

/// Takes a snapshot out of its place, durably: under its new name it counts as not done.
///
/// # Errors
/// What the host reports; it may be in either place then.
pub fn set_aside(place: &Path, id: Uuid, host: &dyn Host) -> Result<()> {
    let set = || -> Result<()> {
        let (above, partial) = beside(place, id)?;
        host.rename(place, &partial)?;
        // Before a disk of it goes: a power cut must not bring back a snapshot that has lost one.
        host.sync_folder(&above)
    };
    set().context("remove", || named(place))
}

/// A snapshot that is there.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// What it says about itself.
    pub manifest: Manifest,
}

impl Folder {
    /// The one at `path`.
    ///
    /// # Errors
    /// `NotFound` when there is none; as [`Manifest::decode`]; or what the host reports.
    pub fn open(path: &Path) -> Result<Folder> {
        let file = path.join(MANIFEST);
        let read = || -> Result<Vec<u8>> {
            match read_at_most(&file, BYTES_MAX) {
                Err(e) if e.kind() == Kind::NotFound => {
                    Err(Error::new(Kind::NotFound, "there is no snapshot").caused_by(e))
                }
                read => read,
            }
        };
        let text = read().context("read", || named(path))?;
        Ok(Folder { path: path.to_owned(), manifest: Manifest::decode(&text, &file)? })
    }

    /// Its processors and devices.
    ///
    /// # Errors
    /// `Corrupt` when it was altered or cut short, `Unsupported` when it is of another version; or
    /// what the host reports.
    pub fn state(&self) -> Result<Vec<u8>> {
        let path = self.path.join(STATE);
        let read = || -> Result<Vec<u8>> {
            let state = read_at_most(&path, STATE_MAX)?;
            let sum = FileSum { bytes: state.len() as u64, crc32c: crc32c::crc32c(&state) };
            if sum != self.manifest.state {
                let reason = "its content does not agree with its checksum in the manifest";
                return Err(Error::corrupt(reason));
            }
            Ok(state)
        };
        read().context("read", || path.display().to_string())
    }

    /// Its memory, as a copy that nobody can change.
    ///
    /// # Errors
    /// `Corrupt` when it was cut short or altered; what the host reports, or `watch`.
    pub fn memory(&self, watch: &dyn Watch) -> Result<Layer> {
        let path = self.path.join(MEMORY);
        let read = || -> Result<Layer> {
            let file = File::open(&path)?;
            memory::read(&file, self.manifest.memory_bytes, &self.manifest.memory.crc32c, watch)
        };
        read().context("read", || path.display().to_string())
    }
}

fn read_at_most(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(Error::corrupt(format!("it has more than {most} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::manifest::tests::manifest;
    use blockd::pump::Unwatched;
    use parking_lot::Mutex;
    use std::collections::BTreeSet;

    /// Notes what was done, and fails at the step with this number.
    #[derive(Default)]
    struct Noting {
        done: Mutex<Vec<String>>,
        fails_at: Option<usize>,
    }

    impl Noting {
        fn note(&self, what: &str, path: &Path) -> Result<()> {
            let mut done = self.done.lock();
            let name = path.file_name().unwrap().to_string_lossy();
            let name = if name.ends_with(".partial") { "partial" } else { &*name };
            done.push(format!("{what} {name}"));
            match self.fails_at {
                Some(at) if at + 1 == done.len() => {
                    Err(Error::new(Kind::Io, "it was told to fail"))
                }
                _ => Ok(()),
            }
        }
    }

    impl Host for Noting {
        fn sync_file(&self, file: &File, path: &Path) -> Result<()> {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let len = file.metadata()?.len();
            assert!(len > 0, "{name} is synced before it is written");
            self.note("sync", path)
        }
        fn sync_folder(&self, path: &Path) -> Result<()> {
            self.note("sync", path)
        }
        fn rename(&self, from: &Path, to: &Path) -> Result<()> {
            self.note("rename", to)?;
            RealHost.rename(from, to)
        }
    }

    fn make(place: &Path, host: &dyn Host) -> Result<()> {
        let draft = Draft::plan(place, Uuid::from_u128(7), host)?;
        draft.begin()?;
        let written = draft.memory(&[], manifest().memory_bytes, &Unwatched)?;
        let state = draft.state(b"state")?;
        draft.finish(&Manifest { state, memory: written.into(), ..manifest() })
    }

    fn names(folder: &Path) -> BTreeSet<String> {
        let entries = fs::read_dir(folder).unwrap().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }

    /// At the rename everything is durable that it shows; before the first step that makes
    /// something elsewhere, and before anybody is told, so is the name.
    #[test]
    fn nothing_has_its_name_before_it_is_durable() {
        let dir = tempfile::tempdir().unwrap();
        let (above, host) = (dir.path().join("above"), Noting::default());
        fs::create_dir(&above).unwrap();
        make(&above.join("snap"), &host).unwrap();
        let done = host.done.lock().clone();
        assert_eq!(done[0], "sync above", "the mark of what is not done");
        let at = |what: &str| done.iter().position(|d| d == what).expect(what);
        let renamed = at("rename snap");
        for before in ["sync memory", "sync state", "sync manifest.json"] {
            assert!(at(before) < at("sync partial"), "{done:?}");
        }
        assert!(at("sync partial") < renamed);
        assert_eq!(done[renamed + 1..], ["sync above"]);
        assert_eq!(names(&above), BTreeSet::from(["snap".to_owned()]));
        let files = [MANIFEST, MEMORY, STATE].map(str::to_owned);
        assert_eq!(names(&above.join("snap")), BTreeSet::from(files));
    }

    /// Whichever step fails: the snapshot is not there, and what is there counts as not done.
    #[test]
    fn a_failed_step_leaves_no_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        for step in 0.. {
            let above = dir.path().join(step.to_string());
            fs::create_dir(&above).unwrap();
            let host = Noting { fails_at: Some(step), ..Noting::default() };
            let made = make(&above.join("snap"), &host);
            if made.is_ok() {
                assert_eq!(step, 7, "all steps were tried");
                break;
            }
            assert!(made.unwrap_err().to_string().contains("told to fail"));
            assert!(names(&above).iter().all(|name| name.ends_with(".partial")), "step {step}");
        }
    }

    #[test]
    fn nothing_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("snap");
        let draft = Draft::plan(&place, Uuid::from_u128(7), &RealHost).unwrap();
        draft.begin().unwrap();
        let written = draft.memory(&[], manifest().memory_bytes, &Unwatched).unwrap();
        let state = draft.state(b"state").unwrap();
        // Somebody else was faster. An empty folder is what a plain rename would replace.
        fs::create_dir(&place).unwrap();
        let finished = draft.finish(&Manifest { state, memory: written.into(), ..manifest() });
        assert_eq!(finished.unwrap_err().kind(), Kind::Exists);
        assert!(names(&place).is_empty());
        let nowhere = dir.path().join("no");
        for (path, kind, named) in [
            (place.as_path(), Kind::Exists, place.as_path()),
            (Path::new("relative"), Kind::Invalid, Path::new("relative")),
            (Path::new("/"), Kind::Invalid, Path::new("/")),
            (&nowhere.join("where"), Kind::NotFound, &nowhere),
        ] {
            let refused = Draft::plan(path, Uuid::nil(), &RealHost).err().unwrap();
            assert_eq!(refused.kind(), kind, "{}", path.display());
            assert!(refused.to_string().contains(&named.display().to_string()), "{refused}");
        }
    }

    #[test]
    fn what_was_written_is_read_and_what_was_altered_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("snap");
        make(&place, &RealHost).unwrap();
        let folder = Folder::open(&place).unwrap();
        assert_eq!(folder.manifest.id, manifest().id);
        assert_eq!(folder.state().unwrap(), b"state");
        folder.memory(&Unwatched).unwrap();
        for altered in ["stat", "state2", "stbte"] {
            fs::write(place.join(STATE), altered).unwrap();
            let e = folder.state().unwrap_err();
            assert!(e.kind() == Kind::Corrupt && e.to_string().contains("snap/state"), "{e}");
        }
        fs::remove_file(place.join(STATE)).unwrap();
        assert_eq!(folder.state().unwrap_err().kind(), Kind::NotFound);

        set_aside(&place, Uuid::from_u128(9), &RealHost).unwrap();
        let gone = Folder::open(&place).unwrap_err();
        assert!(
            gone.kind() == Kind::NotFound && gone.to_string().contains("no snapshot"),
            "{gone}"
        );
        assert!(aside(&place, Uuid::from_u128(9)).unwrap().is_dir());
    }
}
