//! Shared helpers of the end-to-end tests.
//!
//! A test that needs something this machine does not have (a tool, root, a kernel feature) calls
//! [`skip`] and returns. `make test` counts what was skipped and says why, so that a green run
//! never hides a promise that was not tried.

pub mod around;
pub mod command;
pub mod crash;
pub mod daemon;
pub mod flat;
pub mod guest;
pub mod inject;
pub mod inspect;
pub mod kill;
pub mod lab;
pub mod load;
pub mod log;
pub mod model;
pub mod mount;
pub mod nbd;
pub mod netdriver;
pub mod netns;
pub mod pattern;
pub mod payload;
pub mod rng;
pub mod served;
pub mod sim;
pub mod store;
pub mod tls;
pub mod trace;
pub mod vm;
pub mod vmdriver;
pub mod vmload;
pub mod watch;
pub mod wire;

use std::env;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The environment variable that names the file which collects skipped tests.
pub const SKIP_LOG: &str = "OFFSHOOT_SKIP_LOG";

/// Says that `test` did not run, and why: one line `SKIPPED: <test>: <reason>` on standard error
/// and, when [`SKIP_LOG`] is set, appended to that file.
///
/// # Panics
/// When the log is named but cannot be written: a skip nobody sees must not pass.
pub fn skip(test: &str, reason: &str) {
    log(&format!("SKIPPED: {test}: {reason}\n"));
}

/// Says that `test` begins anew, and why: a line `RETRIED: <test>: <reason>` where [`skip`] has
/// its own. For what is known to be no fault of the programs under test.
///
/// # Panics
/// As [`skip`].
pub fn retried(test: &str, reason: &str) {
    log(&format!("RETRIED: {test}: {reason}\n"));
}

fn log(line: &str) {
    eprint!("{line}");
    let Some(log) = env::var_os(SKIP_LOG) else { return };
    // One write on an append-only descriptor: test processes that run side by side do not mix.
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(&log)
        .and_then(|mut file| file.write_all(line.as_bytes()))
        .unwrap_or_else(|e| panic!("cannot append to the skip log {}: {e}", log.display()));
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not within a minute.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Where the program `name` is, looked up in `PATH` and in the administrator's directories (which
/// a plain user's `PATH` often lacks); `None` when this machine does not have it.
#[must_use]
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}
