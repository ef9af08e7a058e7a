//! Snapshots of what a process kill leaves: the live store and the tail, before and after every
//! call that changes the file, and whenever asked.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use blockd::disk::Options;
use blockd::disk::tail::path_in;
use blockd::store::sim::{Image, SimStore};
use format::Result;
use tempfile::TempDir;
use uuid::Uuid;

use crate::around::{Call, around};
use crate::inspect::{Violation, Wrong, open_and_read};
use crate::model::{History, Model, View};
use crate::sim::Script;

/// What a kill leaves at one moment.
struct Moment {
    /// The event before which operations had ended.
    event: u64,
    /// Operations of the store by then.
    log_len: usize,
    image: Image,
    tail: Option<Vec<u8>>,
}

/// A run that was killed and can go on.
pub struct Revived {
    /// The run. Its options are those of a live disk with the tail that was left.
    pub script: Script,
    /// Operations of the store when it was killed.
    pub killed_at: usize,
    /// Holds the tail; removed when this is dropped.
    pub dir: TempDir,
}

/// Takes the snapshots.
pub struct Watch {
    store: SimStore,
    history: Arc<Mutex<History>>,
    tail: PathBuf,
    moments: Mutex<Vec<Moment>>,
}

/// A folder in memory.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn memory_dir() -> TempDir {
    let shm = Path::new("/dev/shm");
    let made = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
    made.expect("a folder for tails")
}

/// Options of a disk whose clients outlive its process.
#[must_use]
pub fn live(dir: &Path) -> Options {
    Options {
        lanes: 4,
        live: true,
        tail_dir: Some(dir.to_owned()),
        boot: Uuid::from_u128(5),
        ..Options::default()
    }
}

impl Watch {
    /// Watches a script, whose disk is not open yet, and makes it keep its tail in `dir`.
    #[must_use]
    pub fn over(script: &mut Script, dir: &Path) -> Arc<Self> {
        script.options = live(dir);
        let watch = Arc::new(Watch {
            store: script.store.clone(),
            history: script.shared_history(),
            tail: path_in(dir, script.segment),
            moments: Mutex::default(),
        });
        let seen = Arc::clone(&watch);
        script.wrap = Some(around(Arc::new(move |_, call| {
            if !matches!(call, Call::Read(_)) {
                seen.look();
            }
        })));
        watch
    }

    /// Takes a snapshot.
    ///
    /// # Panics
    /// When a thread panicked before.
    pub fn look(&self) {
        let event = self.history.lock().expect("no panic").now();
        let (log_len, image) = (self.store.log_len(), self.store.live_image());
        let tail = std::fs::read(&self.tail).ok();
        self.moments.lock().expect("no panic").push(Moment { event, log_len, image, tail });
    }

    /// For each snapshot that differs from the one before, the same run as it can go on after a
    /// kill at that moment.
    ///
    /// # Panics
    /// When the tail cannot be put in place.
    pub fn revive<'a>(&'a self, script: &'a Script) -> impl Iterator<Item = Revived> + use<'a> {
        let mut moments = std::mem::take(&mut *self.moments.lock().expect("no panic"));
        moments.dedup_by(|a, b| (a.event, a.log_len, &a.tail) == (b.event, b.log_len, &b.tail));
        moments.into_iter().map(|moment| moment.revive(script))
    }

    /// Opens the disk as each snapshot left it: every completed operation must be there. Returns
    /// the number of snapshots that differ.
    ///
    /// # Errors
    /// The first violation.
    ///
    /// # Panics
    /// When the tail cannot be put in place.
    pub fn verify(&self, model: &Model, segment: Uuid) -> Result<usize, Violation> {
        let moments = self.moments.lock().expect("no panic");
        let mut visited = 0;
        let mut last = None;
        for moment in moments.iter() {
            let now = (moment.event, moment.image.fingerprint(), moment.tail.clone());
            if last.as_ref() == Some(&now) {
                continue;
            }
            last = Some(now);
            visited += 1;
            let at = |v: Violation| {
                let text = format!("{}\n    killed after event {}", v.text, moment.event);
                Violation::new(v.wrong, text)
            };
            moment.verify(model, segment).map_err(at)?;
        }
        Ok(visited)
    }
}

impl Moment {
    fn revive(&self, script: &Script) -> Revived {
        let dir = memory_dir();
        if let Some(tail) = &self.tail {
            std::fs::write(path_in(dir.path(), script.segment), tail).expect("a tail");
        }
        let mut script = script.killed_at(self.log_len, self.event);
        script.options = live(dir.path());
        Revived { script, killed_at: self.log_len, dir }
    }

    fn verify(&self, model: &Model, segment: Uuid) -> Result<(), Violation> {
        let dir = memory_dir();
        if let Some(tail) = &self.tail {
            std::fs::write(path_in(dir.path(), segment), tail).expect("a tail");
        }
        let store = SimStore::from_image(self.image.clone());
        // Operations that ended at this very event had ended.
        let allowed = model.allowed(View::Kill(self.event + 1));
        let (disk, first) = open_and_read(&store, segment, &live(dir.path()))?;
        first.check(model.sectors(), &allowed)?;
        // Killed again at once: nothing of the tail may be gone.
        drop(disk);
        let (disk, second) = open_and_read(&store, segment, &live(dir.path()))?;
        if first != second {
            return Err(Violation::new(Wrong::Value, "a second kill changed the content"));
        }
        disk.close().map_err(|e| Violation::new(Wrong::GoesOn, e))?;
        let (_, third) = open_and_read(&store, segment, &Options::default())?;
        if first.tags != third.tags {
            return Err(Violation::new(Wrong::Value, "a clean close changed the content"));
        }
        Ok(())
    }
}
