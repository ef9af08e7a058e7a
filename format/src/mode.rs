//! Persistence modes: what becomes of what is written to a disk.
//!
//! A disk of another mode than `persistent` has a *base*, a frozen segment, and a *delta*: all that
//! was written since. What the modes mean is in `docs/format.md` §9.21.

use crate::superblock::Mode;
use crate::{Error, Kind, Result};

/// Modes that other systems have and that a disk here cannot have, with the reason.
const REFUSED: [(&str, &str); 5] = [
    ("shared", SEVERAL_WRITERS),
    ("multi-writer", SEVERAL_WRITERS),
    ("multiwriter", SEVERAL_WRITERS),
    ("independent_persistent", INDEPENDENT),
    ("independent_nonpersistent", INDEPENDENT),
];
const SEVERAL_WRITERS: &str = "a disk has one writer: two would destroy its file system";
const INDEPENDENT: &str = "no disk is kept out of forks";

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 4] =
        [Mode::Persistent, Mode::NonPersistent, Mode::Undoable, Mode::Append];

    /// The name that people and programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Mode::Persistent => "persistent",
            Mode::NonPersistent => "nonpersistent",
            Mode::Undoable => "undoable",
            Mode::Append => "append",
        }
    }

    /// The mode of a name.
    ///
    /// # Errors
    /// `Unsupported`, with the reason, for a mode that other systems have; `Invalid` for what is
    /// none.
    pub fn named(name: &str) -> Result<Mode> {
        if let Some(mode) = Mode::ALL.into_iter().find(|mode| mode.name() == name) {
            return Ok(mode);
        }
        let modes = "the modes are persistent, nonpersistent, undoable and append";
        Err(match REFUSED.iter().find(|(refused, _)| *refused == name) {
            Some((_, why)) => {
                let hint = "sealed disks can be read by any number of machines: attach them with \
                            --readonly";
                let error = Error::new(Kind::Unsupported, format!("mode {name}: {why}"));
                if *why == SEVERAL_WRITERS { error.hint(hint) } else { error.hint(modes) }
            }
            None => Error::invalid(format!("there is no mode {name:?}")).hint(modes),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_modes_and_others_are_refused() {
        for mode in Mode::ALL {
            assert_eq!(Mode::named(mode.name()).unwrap(), mode);
        }
        for (name, _) in REFUSED {
            let e = Mode::named(name).unwrap_err();
            assert!(e.kind() == Kind::Unsupported && e.to_string().contains(name), "{e}");
        }
        assert_eq!(Mode::named("Persistent").unwrap_err().kind(), Kind::Invalid);
    }
}
