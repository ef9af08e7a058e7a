//! `events` and `vm events`: what happened to a daemon and to what it has, a line each.

use std::io::Write as _;

use format::{Error, Kind};
use serde::Deserialize;

use super::Session;
use crate::cli::Events;
use crate::client::Client;
use crate::output::{Outcome, Output, Stop, Verdict, utc, wrote};

/// What both daemons say of an event. Kinds are names here: those of a newer daemon are shown, too.
#[derive(Debug, Deserialize)]
struct Event {
    time_ms: u64,
    kind: String,
    object: String,
    detail: String,
}

/// `events`
pub fn of_blockd(s: &Session, args: &Events) -> Outcome {
    tell(&s.need_daemon()?, args, s.out)
}

/// `vm events`
pub fn of_forkd(s: &Session, args: &Events) -> Outcome {
    tell(&s.forkd()?, args, s.out)
}

fn tell(client: &Client, args: &Events, to: Output) -> Outcome {
    let path = format!("/v1/events?since={}&follow={}", args.since, args.follow);
    let mut rest = Vec::new();
    client.stream(path, &mut |bytes| {
        let mut out = std::io::stdout().lock();
        for byte in bytes {
            if *byte != b'\n' {
                rest.push(*byte);
                continue;
            }
            if to.json {
                wrote(out.write_all(&rest).and_then(|()| out.write_all(b"\n")))?;
            } else {
                wrote(writeln!(out, "{}", render(&rest)?))?;
            }
            rest.clear();
        }
        // Whoever follows wants to see them now.
        wrote(out.flush())
    })?;
    Ok(Verdict::Done)
}

fn render(line: &[u8]) -> Outcome<String> {
    let event: Event = serde_json::from_slice(line).map_err(|e| {
        let reason = "it answers something that is not known here";
        let error = Error::new(Kind::Unsupported, reason).caused_by(e);
        Stop::from(error.tried("ask").on("the daemon"))
    })?;
    let time = utc(event.time_ms / 1000);
    let text = format!("{time}  {:<13} {}", event.kind, event.object);
    Ok(if event.detail.is_empty() { text } else { format!("{text}: {}", event.detail) })
}
