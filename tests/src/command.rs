//! The command line on a store of a test's own, with a daemon that has it and without one.

use std::ops::Deref;

use crate::daemon::Daemon;
use crate::store::TestStore;

/// A store, and a daemon if there is to be one, which the command line finds by itself.
pub struct Bench {
    // First: it ends before its store goes.
    daemon: Option<Daemon>,
    /// The store.
    pub store: TestStore,
}

impl Deref for Bench {
    type Target = TestStore;

    fn deref(&self) -> &TestStore {
        &self.store
    }
}

impl Bench {
    /// A new store.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn new(with_daemon: bool) -> Bench {
        let store = TestStore::new();
        let daemon = with_daemon.then(|| store.daemon());
        Bench { daemon, store }
    }

    /// Checks disks.
    ///
    /// # Panics
    /// When one is not sound.
    pub fn is_sound(&self, disks: &[&str]) {
        for disk in disks {
            self.done(&["disk", "check", disk]);
        }
    }
}

/// Runs a test without a daemon and with one.
///
/// # Panics
/// When the test does, or the daemon does not end in order.
pub fn each(test: impl Fn(&Bench)) {
    for with_daemon in [false, true] {
        println!("with a daemon: {with_daemon}");
        let mut bench = Bench::new(with_daemon);
        test(&bench);
        if let Some(daemon) = bench.daemon.take() {
            assert!(daemon.terminate().success());
        }
    }
}
