//! The tail: records of completed changes that are not in the journal yet, in memory that may
//! outlive the process.
//!
//! Layout: `docs/format.md` §8. Invariants:
//! - A record is whole before the next-word names it (`Release`), so a kill in mid-record leaves a
//!   tail that ends before it.
//! - Sequence numbers are those of the journal: a record leaves the tail only after the journal
//!   page that holds it is durable.
//! - On tmpfs the tail disappears by itself at power loss, so a record never outlives its data.
//!
//! Writers hold the disk's core lock; readers of a dead process's tail are alone.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use format::journal::{RECORD_BYTES, Record};
use format::units::{Epoch, Seq, crc, index};
use format::{Context, Error, Result};
use rustix::mm::{MapFlags, ProtFlags};
use uuid::Uuid;

const MAGIC: u64 = u64::from_le_bytes(*b"OSHTAIL1");
const HEADER_WORDS: usize = 512;
const SLOT_WORDS: usize = 6;
const WORD: usize = 8;
const W_SEGMENT: usize = 1;
const W_CAPACITY: usize = 3;
const W_HEAD: usize = 4;
const W_NEXT: usize = 5;
const W_EPOCH: usize = 6;
const W_VOID: usize = 7;

/// The words of a tail: on the heap, or a shared mapping of a file.
enum Words {
    Heap(Box<[AtomicU64]>),
    Mapped { at: NonNull<AtomicU64>, len: usize, path: PathBuf },
}

// SAFETY: the mapping is plain shared memory that is only touched through atomics; it is unmapped
// once, in `Drop`, by whoever owns it then.
unsafe impl Send for Words {}
// SAFETY: as above; all access is through `&AtomicU64`.
unsafe impl Sync for Words {}

impl Words {
    fn get(&self) -> &[AtomicU64] {
        match self {
            Words::Heap(words) => words,
            // SAFETY: `at` points at `len` words of a mapping that lives as long as `self`, zeroed
            // or written by a tail of the same layout; any bit pattern is a valid `AtomicU64`.
            Words::Mapped { at, len, .. } => unsafe {
                std::slice::from_raw_parts(at.as_ptr(), *len)
            },
        }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if let Words::Mapped { at, len, .. } = self {
            // SAFETY: this is the mapping made in `map_file`, not unmapped before.
            let _ = unsafe { rustix::mm::munmap(at.as_ptr().cast(), *len * WORD) };
        }
    }
}

/// The tail of one disk.
pub struct Tail {
    words: Words,
    capacity: u64,
}

impl std::fmt::Debug for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tail({}..{} of {})", self.head(), self.next(), self.capacity)
    }
}

fn words_for(capacity: u64) -> usize {
    HEADER_WORDS + index(capacity) * SLOT_WORDS
}

/// The file of a segment's tail.
#[must_use]
pub fn path_in(dir: &Path, segment: Uuid) -> PathBuf {
    dir.join(format!("{segment}.tail"))
}

impl Tail {
    /// A tail on the heap: it dies with the process, like its only client.
    #[must_use]
    pub fn on_heap(segment: Uuid, capacity: u64, next: Seq) -> Self {
        let words = (0..words_for(capacity)).map(|_| AtomicU64::new(0)).collect();
        let tail = Tail { words: Words::Heap(words), capacity };
        tail.format(segment, next);
        tail
    }

    /// A new tail of the session `epoch` in a file of `dir`, replacing an old one whole or not at
    /// all: a kill in between must not leave half a tail where a whole one was, nor one of no
    /// session.
    ///
    /// # Errors
    /// What the host reports.
    pub fn create(
        dir: &Path,
        segment: Uuid,
        capacity: u64,
        next: Seq,
        epoch: Epoch,
    ) -> Result<Self> {
        let (path, new_path) = (path_in(dir, segment), dir.join(format!("{segment}.tail.new")));
        let tried = || format!("tail {}", path.display());
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(&new_path);
        let file = file.context("create", tried)?;
        file.set_len((words_for(capacity) * WORD) as u64).context("size", tried)?;
        // Blocks are reserved now: a full tmpfs must be an error here, not a SIGBUS at the first
        // write through the mapping.
        rustix::fs::fallocate(
            &file,
            rustix::fs::FallocateFlags::empty(),
            0,
            (words_for(capacity) * WORD) as u64,
        )
        .map_err(|e| Error::from(std::io::Error::from(e)))
        .context("reserve memory for", tried)?;
        let words = map_file(&file, words_for(capacity), path.clone()).context("map", tried)?;
        let tail = Tail { words, capacity };
        tail.format(segment, next);
        tail.set_epoch(epoch);
        std::fs::rename(&new_path, &path).context("name", tried)?;
        Ok(tail)
    }

    /// The tail that a process left behind, or `None` when there is no file.
    ///
    /// # Errors
    /// `Corrupt` when the file is not a tail of this segment, or what the host reports.
    pub fn open(dir: &Path, segment: Uuid) -> Result<Option<Self>> {
        let path = path_in(dir, segment);
        let tried = || format!("tail {}", path.display());
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context("open", tried),
        };
        let bytes = file.metadata().context("look at", tried)?.len();
        let bad = |why: &'static str| Err(Error::corrupt(why)).context("open", tried);
        let words = index(bytes) / WORD;
        if words <= HEADER_WORDS {
            return bad("it is too short for a tail");
        }
        let words = map_file(&file, words, path.clone()).context("map", tried)?;
        let capacity = words.get()[W_CAPACITY].load(Ordering::Acquire);
        if capacity == 0 || capacity > 1 << 32 || words_for(capacity) != words.get().len() {
            return bad("its size and its capacity contradict each other");
        }
        let tail = Tail { words, capacity };
        if tail.word(0) != MAGIC || tail.segment() != segment {
            return bad("it is not the tail of this segment");
        }
        let held = tail.next().0.checked_sub(tail.head().0);
        if held.is_none_or(|n| n > capacity) {
            return bad("its counters contradict each other");
        }
        Ok(Some(tail))
    }

    fn word(&self, i: usize) -> u64 {
        // Acquire pairs with the Release stores in `append` and `release`.
        self.words.get()[i].load(Ordering::Acquire)
    }

    fn set(&self, i: usize, value: u64) {
        // Release pairs with the Acquire load in `word`.
        self.words.get()[i].store(value, Ordering::Release);
    }

    fn format(&self, segment: Uuid, next: Seq) {
        let (high, low) = segment.as_u64_pair();
        self.set(W_SEGMENT, high);
        self.set(W_SEGMENT + 1, low);
        self.set(W_CAPACITY, self.capacity);
        self.set(W_HEAD, next.0);
        self.set(W_NEXT, next.0);
        // Last: without the magic word the file is not a tail.
        self.set(0, MAGIC);
    }

    fn segment(&self) -> Uuid {
        Uuid::from_u64_pair(self.word(W_SEGMENT), self.word(W_SEGMENT + 1))
    }

    /// Sequence number of the oldest record held.
    #[must_use]
    pub fn head(&self) -> Seq {
        Seq(self.word(W_HEAD))
    }

    /// Sequence number that the next record gets.
    #[must_use]
    pub fn next(&self) -> Seq {
        Seq(self.word(W_NEXT))
    }

    /// Records that fit before something must be released. For who does not hold the core lock, an
    /// estimate: the head may pass the `next` that was read.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.capacity.saturating_sub(self.next().0.saturating_sub(self.head().0))
    }

    /// Records that fit in all.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The journal epoch of the session that writes it.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.word(W_EPOCH))
    }

    /// Says which session writes it.
    pub fn set_epoch(&self, epoch: Epoch) {
        self.set(W_EPOCH, epoch.0);
    }

    /// True when its records must not be believed.
    #[must_use]
    pub fn is_void(&self) -> bool {
        self.word(W_VOID) != 0
    }

    /// A sync failed: what the records name may be lost.
    pub fn set_void(&self) {
        self.set(W_VOID, 1);
    }

    fn slot(&self, seq: Seq) -> &[AtomicU64] {
        let at = HEADER_WORDS + index(seq.0 % self.capacity) * SLOT_WORDS;
        &self.words.get()[at..at + SLOT_WORDS]
    }

    /// Adds a record.
    ///
    /// # Panics
    /// When there is no room: callers ask first.
    pub fn append(&self, record: &Record) -> Seq {
        assert!(self.room() > 0, "callers ask for room first");
        let seq = self.next();
        let bytes = record.encode();
        let slot = self.slot(seq);
        slot[0].store(seq.0, Ordering::Relaxed);
        for (word, chunk) in slot[1..].iter().zip(bytes.chunks_exact(WORD)) {
            let value = u64::from_le_bytes(chunk.try_into().expect("eight bytes"));
            word.store(value, Ordering::Relaxed);
        }
        slot[SLOT_WORDS - 1].store(sum(seq, &bytes).into(), Ordering::Relaxed);
        // Release (in `set`): the record is whole before the counter names it, in memory that
        // another process reads after a kill; pairs with the Acquire load in `word`.
        self.set(W_NEXT, seq.next().0);
        seq
    }

    /// The records from `from` up to (not including) `to`.
    ///
    /// # Errors
    /// `Corrupt` when a record does not match its checksum, or is not held.
    pub fn records(&self, from: Seq, to: Seq) -> Result<Vec<Record>> {
        if from < self.head() || to > self.next() {
            return Err(Error::corrupt("the tail does not hold the records the journal lacks"));
        }
        (from.0..to.0).map(|s| self.record(Seq(s))).collect()
    }

    fn record(&self, seq: Seq) -> Result<Record> {
        let slot = self.slot(seq);
        let mut bytes = [0; RECORD_BYTES];
        for (word, chunk) in slot[1..].iter().zip(bytes.chunks_exact_mut(WORD)) {
            chunk.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        let stored = slot[SLOT_WORDS - 1].load(Ordering::Relaxed);
        if slot[0].load(Ordering::Relaxed) != seq.0 || stored != u64::from(sum(seq, &bytes)) {
            return Err(Error::corrupt(format!("tail record {seq} does not match its checksum")));
        }
        Record::decode(&bytes)
    }

    /// Forgets the records before `to`: they are durable in the journal.
    pub fn release(&self, to: Seq) {
        self.set(W_HEAD, to.0);
    }

    /// Removes the file, if there is one: everything is durable elsewhere.
    ///
    /// # Errors
    /// What the host reports.
    pub fn remove(&self) -> Result<()> {
        match &self.words {
            Words::Heap(_) => Ok(()),
            Words::Mapped { path, .. } => {
                std::fs::remove_file(path).context("remove", || format!("tail {}", path.display()))
            }
        }
    }
}

fn sum(seq: Seq, record: &[u8; RECORD_BYTES]) -> u32 {
    let mut bytes = [0; WORD + RECORD_BYTES];
    bytes[..WORD].copy_from_slice(&seq.0.to_le_bytes());
    bytes[WORD..].copy_from_slice(record);
    crc(&bytes)
}

fn map_file(file: &std::fs::File, words: usize, path: PathBuf) -> std::io::Result<Words> {
    // SAFETY: a fresh shared mapping at an address the kernel chooses; nothing else refers to it.
    // The file is at least this long and its blocks are reserved, so access does not fault.
    let at = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            words * WORD,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            file,
            0,
        )
    }?;
    let at = NonNull::new(at.cast()).ok_or(std::io::ErrorKind::InvalidData)?;
    Ok(Words::Mapped { at, len: words, path })
}

#[cfg(test)]
mod tests {
    use format::units::{BlockId, GuestBlock};

    use super::*;

    const SEGMENT: Uuid = Uuid::from_u128(5);

    fn record(n: u64) -> Record {
        Record::Map { block: GuestBlock(n), count: 1, target: BlockId(n + 320) }
    }

    #[test]
    fn records_wrap_around_and_leave_when_released() {
        let tail = Tail::on_heap(SEGMENT, 4, Seq(100));
        for n in 0..4 {
            assert_eq!(tail.append(&record(n)), Seq(100 + n));
        }
        assert_eq!(tail.room(), 0);

        tail.release(Seq(102));
        tail.append(&record(9));

        let held = tail.records(Seq(102), tail.next()).unwrap();
        assert_eq!(held, vec![record(2), record(3), record(9)]);
        assert!(tail.records(Seq(101), tail.next()).is_err());
    }

    #[test]
    fn a_file_outlives_its_writer_and_belongs_to_one_segment() {
        let dir = tempfile::tempdir().unwrap();
        let tail = Tail::create(dir.path(), SEGMENT, 8, Seq(7), Epoch(1)).unwrap();
        tail.append(&record(1));
        drop(tail);

        let again = Tail::open(dir.path(), SEGMENT).unwrap().unwrap();

        assert_eq!(again.records(Seq(7), again.next()).unwrap(), vec![record(1)]);
        assert!(Tail::open(dir.path(), Uuid::from_u128(6)).unwrap().is_none());
        let other = path_in(dir.path(), Uuid::from_u128(6));
        std::fs::copy(path_in(dir.path(), SEGMENT), other).unwrap();
        assert!(Tail::open(dir.path(), Uuid::from_u128(6)).is_err());
        again.remove().unwrap();
        assert!(Tail::open(dir.path(), SEGMENT).unwrap().is_none());
    }

    #[test]
    fn damaged_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(Tail::create(dir.path(), SEGMENT, 8, Seq(7), Epoch(1)).unwrap());
        let path = path_in(dir.path(), SEGMENT);
        let whole = std::fs::read(&path).unwrap();
        for len in [0, 8, 4096, whole.len() - 8] {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(Tail::open(dir.path(), SEGMENT).is_err(), "length {len}");
        }
        let mut bad = whole.clone();
        bad[W_NEXT * WORD] = 200;
        std::fs::write(&path, &bad).unwrap();
        assert!(Tail::open(dir.path(), SEGMENT).is_err());
    }
}
