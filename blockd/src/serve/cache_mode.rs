//! The cache mode that a guest chose, remembered where the next process finds it.
//!
//! A guest that switched its disk to write-through sends no flushes and relies on every completed
//! write. Its VMM does not repeat the choice to a daemon that was restarted under it, so the choice
//! lies beside the tail: it survives the death of a process, and goes with the guest at a power
//! cut.
//!
//! Order, and the crash it defends against: write-through is remembered before the guest is told
//! that it holds, and forgotten only after write-back holds. A process killed in between leaves a
//! guest slower than it asked for, never one that loses data.

use std::path::{Path, PathBuf};

use format::{Context, Result};
use parking_lot::Mutex;
use uuid::Uuid;

/// The remembered mode of one volume; in memory only when it has no file.
#[derive(Debug, Default)]
pub(super) struct CacheMode {
    file: Option<PathBuf>,
    write_back: Mutex<Option<bool>>,
}

/// Where the choice for a disk lies.
pub(super) fn path_in(tail_dir: &Path, disk: Uuid) -> PathBuf {
    tail_dir.join(format!("{disk}.write-through"))
}

impl CacheMode {
    /// The mode that `file` tells.
    pub(super) fn in_file(file: PathBuf) -> Self {
        let write_back = Mutex::new(file.exists().then_some(false));
        CacheMode { file: Some(file), write_back }
    }

    /// `Some(true)` for write-back; `None` when no guest has chosen.
    pub(super) fn remembered(&self) -> Option<bool> {
        *self.write_back.lock()
    }

    /// Remembers the mode that holds now.
    ///
    /// # Errors
    /// What the host reports; the guest must then not be told that the mode changed.
    pub(super) fn remember(&self, write_back: bool) -> Result<()> {
        let mut held = self.write_back.lock();
        if let Some(file) = &self.file {
            let object = || format!("cache mode file {}", file.display());
            if write_back {
                match std::fs::remove_file(file) {
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                    outcome => outcome.map_err(format::Error::from).context("remove", object)?,
                }
            } else {
                std::fs::write(file, b"").map_err(format::Error::from).context("write", object)?;
            }
        }
        *held = Some(write_back);
        Ok(())
    }

    /// Another handle on the same file.
    pub(super) fn clone_file(&self) -> Self {
        CacheMode { file: self.file.clone(), write_back: Mutex::default() }
    }

    /// Forgets the choice: the disk was closed in order and its next guest chooses anew.
    pub(super) fn forget(&self) {
        if let Some(file) = &self.file {
            // One that stays makes the next guest slower, no more.
            let _ = std::fs::remove_file(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Story: a guest switched to write-through, the daemon was killed and restarted, and served
    /// the guest write-back, so that a power cut lost what the guest had been told is durable.
    #[test]
    fn write_through_outlives_the_process_that_was_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_in(dir.path(), Uuid::nil());
        assert_eq!(CacheMode::in_file(path.clone()).remembered(), None);

        CacheMode::in_file(path.clone()).remember(false).unwrap();

        let after = CacheMode::in_file(path.clone());
        assert_eq!(after.remembered(), Some(false));
        after.remember(true).unwrap();
        assert_eq!(CacheMode::in_file(path.clone()).remembered(), None);
        after.remember(false).unwrap();
        after.forget();
        assert!(!path.exists());
    }

    #[test]
    fn a_mode_that_cannot_be_remembered_is_not_taken_on() {
        let mode = CacheMode::in_file(PathBuf::from("/nonexistent/x.write-through"));
        assert!(mode.remember(false).is_err());
        assert_eq!(mode.remembered(), None);
    }
}
