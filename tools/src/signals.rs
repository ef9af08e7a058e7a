//! What SIGINT, SIGTERM and SIGHUP do.
//!
//! Two moods: at rest, a signal ends the process at once with exit code 130, which is safe at any
//! instant by the crash rules of the store. A verb that has something to tidy up (a partial export,
//! an unfinished import, unflushed writes) asks to be told instead; it looks at [`check`] between
//! two pieces of work. A second signal always ends the process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use format::{Error, Kind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// The exit code of a verb that a signal ended (`Kind::Cancelled` has the same).
const EXIT_CANCELLED: u8 = 130;

struct Moods {
    /// A signal ends the process at once.
    at_once: Arc<AtomicBool>,
    /// A signal came.
    came: Arc<AtomicBool>,
}

static MOODS: OnceLock<Moods> = OnceLock::new();

/// Takes over the signals; the first mood is "at rest".
///
/// # Errors
/// What the host reports.
pub fn install() -> Result<()> {
    let at_once = Arc::new(AtomicBool::new(true));
    let came = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        use signal_hook::flag;
        let code = EXIT_CANCELLED.into();
        // In this order: the first signal sets the flag that makes the second one final.
        flag::register_conditional_shutdown(signal, code, Arc::clone(&at_once))?;
        flag::register(signal, Arc::clone(&at_once))?;
        flag::register(signal, Arc::clone(&came))?;
    }
    MOODS.get_or_init(|| Moods { at_once, came });
    Ok(())
}

/// From now on the first signal is reported by [`check`] and does nothing else.
pub fn ask_to_be_told() {
    if let Some(moods) = MOODS.get() {
        // SeqCst on both flags, as in the handlers of the library, which are the other side: a
        // signal comes once, and no cheaper ordering is worth an argument.
        moods.at_once.store(false, Ordering::SeqCst);
    }
}

/// `Cancelled` once a signal came.
///
/// # Errors
/// `Cancelled`.
pub fn check() -> Result<()> {
    // SeqCst: see `ask_to_be_told`.
    match MOODS.get() {
        Some(moods) if moods.came.load(Ordering::SeqCst) => {
            Err(Error::new(Kind::Cancelled, "a signal stopped it"))
        }
        _ => Ok(()),
    }
}
