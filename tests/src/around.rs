//! Watching the calls that a disk makes to its file.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blockd::store::File;
use format::Result;

use crate::rng::Rng;

/// Makes another file out of the file that a disk is opened on.
pub type Wrap = Arc<dyn Fn(Arc<dyn File>) -> Arc<dyn File> + Send + Sync>;

/// A call to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// A read from this offset.
    Read(u64),
    /// A write at this offset.
    Write(u64),
    /// A sync.
    Sync,
    /// Anything else that changes the file.
    Change,
}

/// When, with regard to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// It is about to be made.
    Before,
    /// It is done, well or not.
    After,
}

/// What is told about calls.
pub type Hook = Arc<dyn Fn(When, Call) + Send + Sync>;

/// Calls `hook` before and after each call that reads, changes or syncs the file, in the thread
/// that makes it.
#[must_use]
pub fn around(hook: Hook) -> Wrap {
    Arc::new(move |file| Arc::new(Around { file, hook: Arc::clone(&hook) }))
}

/// Lets calls wait for other threads now and then, so that threads meet in the middle of what they
/// do; `seed` chooses where.
#[must_use]
pub fn slow(seed: u64) -> Wrap {
    let calls = AtomicU64::new(0);
    around(Arc::new(move |_, _| {
        let call = calls.fetch_add(1, Ordering::Relaxed);
        match Rng::new(seed ^ call.wrapping_mul(0x9e37_79b9)).below(128) {
            0 => std::thread::sleep(Duration::from_micros(800)),
            1..=8 => std::thread::sleep(Duration::from_micros(50)),
            9..=50 => std::thread::yield_now(),
            _ => {}
        }
    }))
}

struct Around {
    file: Arc<dyn File>,
    hook: Hook,
}

impl Around {
    fn call<T>(&self, call: Call, make: impl FnOnce(&dyn File) -> T) -> T {
        (self.hook)(When::Before, call);
        let outcome = make(self.file.as_ref());
        (self.hook)(When::After, call);
        outcome
    }
}

impl File for Around {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.call(Call::Read(offset), |file| file.read_at(offset, buf))
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.call(Call::Write(offset), |file| file.write_at(offset, buf))
    }

    fn sync(&self) -> Result<()> {
        self.call(Call::Sync, |file| file.sync())
    }

    fn size(&self) -> Result<u64> {
        self.file.size()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.call(Call::Change, |file| file.set_len(len))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.call(Call::Change, |file| file.punch(offset, len))
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.file.reserve(offset, len)
    }

    fn allocated(&self) -> Result<u64> {
        self.file.allocated()
    }

    fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        self.file.next_data(from)
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        self.call(Call::Change, |file| file.set_read_only(read_only))
    }

    fn lock(&self) -> Result<()> {
        self.file.lock()
    }

    fn forget_cached(&self) -> Result<()> {
        self.file.forget_cached()
    }

    fn is_direct(&self) -> bool {
        self.file.is_direct()
    }
}
