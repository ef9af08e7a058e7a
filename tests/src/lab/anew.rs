//! Beginning anew in another lab, when one was spoiled by what is no fault of what it was to show.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::{retried, skip};

/// Labs that a scenario may spoil, the last one included.
const LABS: u32 = 5;

/// Plays `scenario` in a lab that `start` makes, and in another one when the first was spoiled:
/// machines that nobody forked triple-fault there too now and then, and the emulator has ended
/// (`docs/decisions.md`). `spoiled` says how, if it was. Every such lab is counted. Where `start`
/// says that this machine lacks something, the test is counted as skipped.
///
/// # Panics
/// When the scenario fails in a lab that was not spoiled, or in the last one.
pub fn play<L>(
    test: &str,
    start: impl Fn() -> Result<L, String>,
    spoiled: impl Fn(&mut L) -> Option<String>,
    scenario: impl Fn(&mut L),
) {
    for number in 1.. {
        let mut lab = match start() {
            Ok(lab) => lab,
            Err(reason) => return skip(test, &reason),
        };
        let Err(failure) = catch_unwind(AssertUnwindSafe(|| scenario(&mut lab))) else { return };
        match catch_unwind(AssertUnwindSafe(|| spoiled(&mut lab))) {
            Ok(Some(how)) if number < LABS => retried(test, &how),
            _ => resume_unwind(failure),
        }
    }
}
