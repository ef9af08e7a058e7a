//! Counting what is logged.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// A log that keeps nothing but the number of its events, of any level.
#[derive(Debug, Clone, Default)]
pub struct LogCount(Arc<AtomicU64>);

impl LogCount {
    /// Events so far.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.0.load(Ordering::Relaxed) // a count of its own, orders nothing
    }

    /// Counts what the whole process logs from now on.
    ///
    /// # Panics
    /// When something else collects the log already.
    pub fn everywhere(&self) {
        tracing::subscriber::set_global_default(self.clone()).expect("nobody else collects it");
    }

    /// Counts what this thread logs during `work`.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        tracing::subscriber::with_default(self.clone(), work)
    }
}

impl Subscriber for LogCount {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed); // as in `events`
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
