//! Standard output and standard error: tables and objects, notes, and closed pipes.
//!
//! Invariant: a reader that goes away is no failure. A write to a closed pipe comes back as
//! [`Stop::Unread`], and the program ends quietly.

use std::io::{self, BufWriter, Write};

use format::Error;
use serde::Serialize;

/// Why a verb ended early.
#[derive(Debug)]
pub enum Stop {
    /// It failed.
    Failed(Error),
    /// Nobody reads its output any more.
    Unread,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

/// What a verb that ran to its end has to say by its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Done.
    Done,
    /// It looked for differences or problems, and found some.
    Found,
}

/// The end of a verb.
pub type Outcome<T = Verdict> = Result<T, Stop>;

/// How the user wants to be told things.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Objects for programs instead of text for people.
    pub json: bool,
    /// Neither confirmations nor notes nor progress.
    pub quiet: bool,
}

/// The end of a write to standard output.
pub fn wrote<T>(result: io::Result<T>) -> Outcome<T> {
    result.map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => Stop::Unread,
        _ => Stop::Failed(Error::from(e).tried("write to").on("standard output")),
    })
}

impl Output {
    /// Prints `value` as an object when asked to, else what `text` makes.
    pub fn result(self, value: &impl Serialize, text: impl FnOnce() -> String) -> Outcome<()> {
        if self.json { self.object(value) } else { self.text(&text()) }
    }

    /// As [`Output::result`], for a text that says no more than that it is done.
    pub fn confirm(self, value: &impl Serialize, text: impl FnOnce() -> String) -> Outcome<()> {
        if self.quiet && !self.json { Ok(()) } else { self.result(value, text) }
    }

    /// Prints `value` as an object.
    pub fn object(self, value: &impl Serialize) -> Outcome<()> {
        wrote(write_object(io::stdout().lock(), value))
    }

    /// Prints `text`, which ends without a newline.
    pub fn text(self, text: &str) -> Outcome<()> {
        let mut out = io::stdout().lock();
        wrote(out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")))?;
        wrote(out.flush())
    }

    /// Says something that is neither a result nor a failure.
    pub fn note(self, text: &str) {
        if !self.quiet {
            say(text);
        }
    }
}

/// Writes `value` with a newline at the end.
pub fn write_object(to: impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut to = BufWriter::new(to);
    serde_json::to_writer_pretty(&mut to, value)?;
    to.write_all(b"\n")?;
    to.flush()
}

/// One line on standard error, with the program's name. Nobody to read it is no failure.
pub fn say(text: &str) {
    let line = format!("offshoot: {text}\n");
    let _ = io::stderr().lock().write_all(line.as_bytes());
}

/// Keys and values, a line each.
#[must_use]
pub fn fields<'a>(lines: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let lines = lines.into_iter().map(|(key, value)| format!("{key:<12}{value}"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Rows of text in columns; numbers may be put to the right.
pub struct Table {
    right: &'static [usize],
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a head; the columns in `right` hold numbers.
    #[must_use]
    pub fn new(head: &[&str], right: &'static [usize]) -> Self {
        Table { right, rows: vec![head.iter().map(|h| (*h).to_owned()).collect()] }
    }

    /// Adds a row, as long as the head.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table as lines.
    #[must_use]
    pub fn render(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |c: usize| self.rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().enumerate().map(|(c, cell)| {
                let width = widths[c];
                if self.right.contains(&c) {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// Seconds since 1970 as date and time of day, UTC.
#[must_use]
pub fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March, so that the leap day is the last of its year; eras of 400 years.
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, early) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year_of_era + early;
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_704_067_199, "2023-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", "SIZE", ""], &[1]);
        table.row(["a", "1", "x"].map(String::from));
        table.row(["longer", "12345", ""].map(String::from));

        assert_eq!(table.render(), "NAME     SIZE\na           1  x\nlonger  12345");
    }
}
