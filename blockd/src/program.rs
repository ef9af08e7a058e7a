//! What the daemons of this project have in common as programs: their log, the signals that end
//! them, what they tell the service manager, and how they end.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use format::{Context as _, Error, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::api::Served;

/// Sends what is logged to standard error.
pub fn log_to_standard_error() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        // A log that cannot be written, on a full host for one, must not end the daemon: to say so
        // on the same stream does.
        .log_internal_errors(false)
        .init();
}

/// Lets this process have as many open files as the host allows it. Without that it has those that
/// programs get which use `select`: 1,024 on most hosts, and a disk in service takes some 18.
pub fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    // A host that refuses it has the daemon say so when files run out.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// The exit code of a program called `name`, which says why if it failed.
#[must_use]
pub fn ended(name: &str, outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody to read it is no reason to fail differently.
            let _ = writeln!(std::io::stderr(), "{name}: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// The first signal asks the daemon to stop, a second one ends the process. Called within the
/// runtime that serves it.
///
/// # Errors
/// What the host reports.
pub fn watch_signals<D: Served>(daemon: &Arc<D>) -> Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).context("handle", || "signals".into())?;
        let daemon = Arc::clone(daemon);
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                if *daemon.stopping().borrow() {
                    std::process::exit(1);
                }
                daemon.stop();
            }
        });
    }
    Ok(())
}

/// Tells systemd how far the daemon is, when it was started by it.
pub fn tell_the_service_manager(state: &str) {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let told = told.and_then(|address| {
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(|_| ())
    });
    if let Err(e) = told {
        let error = Error::from(e).tried("tell").on("the service manager");
        tracing::warn!(%error, "going on without");
    }
}
