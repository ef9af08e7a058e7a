//! How a failure is told: one line on standard error, an object on standard output for programs,
//! and an exit code that scripts may count on.
//!
//! Invariant: codes are never given another meaning. They are listed in the help of the program and
//! in `docs/command-line.md`; a test compares both with the codes of `Kind`.

use format::Error;
use serde::Serialize;

/// A difference or a problem was found: an answer of `compare`, `check`, `scrub` and `repair`, not
/// a failure.
pub const EXIT_FOUND: u8 = 1;
/// The command line makes no sense (`invalid`).
pub const EXIT_USAGE: u8 = 2;
/// A bug of this program.
pub const EXIT_BUG: u8 = 14;

/// A failure as programs read it.
#[derive(Debug, Serialize)]
pub struct Told<'a> {
    /// The class of failure, by its stable name.
    pub kind: &'a str,
    /// The object it was about.
    pub object: Option<&'a str>,
    /// Why it failed, as a clause.
    pub reason: &'a str,
    /// What to do next.
    pub next: Option<&'a str>,
    /// All of it as one line for people.
    pub message: &'a str,
}

/// The envelope of [`Told`].
#[derive(Debug, Serialize)]
pub struct Envelope<'a> {
    /// The failure.
    pub error: Told<'a>,
}

/// `error` as one line.
#[must_use]
pub fn line(error: &Error) -> String {
    error.to_string().lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

impl<'a> Envelope<'a> {
    /// The failure `error`, whose [`line()`] is `message`.
    #[must_use]
    pub fn new(error: &'a Error, message: &'a str) -> Self {
        let told = Told {
            kind: error.kind().name(),
            object: error.object(),
            reason: error.reason(),
            next: error.next_step(),
            message,
        };
        Envelope { error: told }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use format::Kind;

    use super::*;

    /// Code and kind names of the rows `| code | kinds | … |` of the document.
    fn documented() -> Vec<(u8, String)> {
        let text = include_str!("../../docs/command-line.md");
        let rows = text.lines().filter_map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let code = cells.next()?.parse().ok()?;
            Some((code, cells.next()?.to_owned()))
        });
        rows.collect()
    }

    #[test]
    fn every_code_is_in_the_document_and_in_the_help() {
        let help = crate::cli::Cli::command().render_long_help().to_string();
        let rows = documented();
        for kind in Kind::ALL {
            let code = kind.exit_code();
            let named = |kinds: &str| kinds.split(',').any(|k| k.trim() == kind.name());
            assert!(rows.iter().any(|(c, k)| *c == code && named(k)), "document: {kind:?}");
        }
        for (code, _) in rows {
            let start = format!("{code:>5}  ");
            assert!(help.lines().any(|l| l.starts_with(&start)), "help: {code}\n{help}");
        }
    }

    #[test]
    fn a_message_is_one_line() {
        let error = Error::corrupt("first\n  second").tried("open").on("disk a");

        assert_eq!(line(&error), "cannot open disk a: first second");
    }
}
