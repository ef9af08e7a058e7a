//! `top`: what the disks in service and the machines do, second by second.

mod disks;
mod vms;

use std::io::Write as _;
use std::time::{Duration, Instant};

use forkd::api::types::Health;
use format::{Kind, Result};
use serde::Serialize;

use super::Session;
use crate::cli::Top;
use crate::client::Client;
use crate::output::{Outcome, Verdict, wrote};
use crate::signals;
use crate::terminal::{Keys, Terminal};

/// Cursor to the corner, and what is below it gone.
const REDRAW: &str = "\x1b[H\x1b[J";
const TICK: Duration = Duration::from_millis(100);
/// The key that ends it.
const QUIT: u8 = b'q';

/// Whom to look at.
struct Whom {
    disks: Client,
    /// None when no forkd is there.
    vms: Option<Client>,
}

/// What was seen.
struct Look {
    at: Instant,
    disks: disks::Look,
    vms: Option<vms::Look>,
}

/// A row of either kind.
#[derive(Serialize)]
#[serde(untagged)]
enum Row<'a> {
    Disk(&'a disks::Row),
    Vm(&'a vms::Row),
}

/// `top`
pub fn top(s: &Session, args: &Top) -> Outcome {
    let disks = s.need_daemon()?;
    let whom = Whom { vms: machines(s, &disks)?, disks };
    let screen = if args.once || s.out.json { None } else { Terminal::output() };
    // From here on a signal is looked at, so that the terminal is put back before the end.
    signals::ask_to_be_told();
    let mut keys = screen.and_then(|_| Terminal::input()).and_then(Keys::take);
    let mut before = look(&whom)?;
    loop {
        if wait(Duration::from_secs_f64(args.interval), keys.as_mut())? {
            return Ok(Verdict::Done);
        }
        let now = look(&whom)?;
        let seconds = (now.at - before.at).as_secs_f64();
        let disks = disks::rows(&before.disks, &now.disks, seconds);
        let vms = now.vms.as_ref().zip(before.vms.as_ref());
        let vms = vms.map(|(now, before)| vms::rows(before, now, seconds));
        let text = || {
            let vms = vms.iter().map(|rows| format!("\n\n{}", vms::render(rows)));
            disks::render(&disks) + &vms.collect::<String>()
        };
        let Some(screen) = screen else {
            let machines = vms.iter().flatten().map(Row::Vm);
            let rows: Vec<Row<'_>> = disks.iter().map(Row::Disk).chain(machines).collect();
            s.out.result(&rows, text)?;
            return Ok(Verdict::Done);
        };
        let picture = format!("{REDRAW}{}\n", fitting(&text(), screen.rows()));
        let mut out = std::io::stdout().lock();
        wrote(out.write_all(picture.as_bytes()).and_then(|()| out.flush()))?;
        before = now;
    }
}

/// The daemon of the machines: the one that is named, or the usual one if it answers and its disks
/// are those of this blockd.
fn machines(s: &Session, disks: &Client) -> Result<Option<Client>> {
    let client = match s.forkd() {
        Err(e) if s.global.forkd.is_none() && e.kind() == Kind::NotFound => return Ok(None),
        client => client?,
    };
    let health: Health = client.get("/v1/health".into())?;
    let real = |path: &std::path::Path| path.canonicalize().ok();
    let same = real(&health.blockd) == real(disks.socket());
    Ok((same || s.global.forkd.is_some()).then_some(client))
}

fn look(whom: &Whom) -> Result<Look> {
    let at = Instant::now();
    let vms = whom.vms.as_ref().map(vms::look).transpose()?;
    Ok(Look { at, disks: disks::look(&whom.disks)?, vms })
}

/// Waits, and ends early when a signal came, or with true when somebody wants to leave.
fn wait(time: Duration, mut keys: Option<&mut Keys>) -> Result<bool> {
    let start = Instant::now();
    while start.elapsed() < time {
        signals::check()?;
        let tick = TICK.min(time.saturating_sub(start.elapsed()));
        match keys.as_mut() {
            None => std::thread::sleep(tick),
            Some(keys) => {
                if keys.pressed(tick).contains(&QUIT) {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

/// As many lines as a screen of `rows` has; the last one then says how many are missing.
fn fitting(text: &str, rows: Option<usize>) -> String {
    let lines: Vec<&str> = text.lines().collect();
    // The cursor stands below the last line.
    match rows.map(|rows| rows.saturating_sub(2)) {
        Some(most) if most > 0 && lines.len() > most + 1 => {
            format!("{}\n({} lines more)", lines[..most].join("\n"), lines.len() - most)
        }
        _ => text.to_owned(),
    }
}

/// How much something grew in a second.
#[allow(clippy::cast_precision_loss)] // Rates for people.
fn rate(before: u64, now: u64, seconds: f64) -> f64 {
    now.saturating_sub(before) as f64 / seconds.max(0.001)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_counted() {
        let text = "1\n2\n3\n4\n5";
        assert_eq!(fitting(text, None), text);
        assert_eq!(fitting(text, Some(6)), text);
        assert_eq!(fitting(text, Some(5)), "1\n2\n3\n(2 lines more)");
        assert_eq!(fitting(text, Some(1)), text, "a screen that says nonsense");
    }
}
