//! `disk diff`.

use blockd::api::types::SessionUse;
use blockd::content::RunKind;
use blockd::pump::{Piece, Walk};
use blockd::store::Access;
use format::limits::BLOCK;
use format::{Context as _, Result};
use serde::Serialize;

use super::Session;
use crate::cli::Diff;
use crate::output::{Outcome, Verdict};
use crate::signals;

/// A range that differs, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Changed {
    offset: u64,
    length: u64,
    kind: &'static str,
}

/// `disk diff`
pub fn diff(s: &Session, args: &Diff) -> Outcome {
    let store = s.open(Access::Read)?;
    signals::ask_to_be_told();
    let lost_tail = args.tail.accept_lost_tail;
    let find = || -> Result<Vec<Changed>> {
        let disk = store.open(&args.name, SessionUse::Read, lost_tail)?;
        let ranges = store.diff(&args.name, &args.from, lost_tail)?;
        let ranges = ranges.iter().map(|r| (r.offset, r.offset + r.length)).collect();
        let (mut walk, mut found) = (Walk::over(&*disk, BLOCK, ranges), Vec::new());
        while let Some(piece) = walk.next_piece()? {
            add(&mut found, &piece);
            signals::check()?;
        }
        Ok(found)
    };
    let found = find().context("compare", || format!("disk {} with {}", args.name, args.from))?;
    // One line per range: no range, no line.
    if s.out.json || !found.is_empty() {
        s.out.result(&found, || {
            let line = |c: &Changed| format!("{} {} {}", c.offset, c.length, c.kind);
            found.iter().map(line).collect::<Vec<_>>().join("\n")
        })?;
    }
    Ok(Verdict::Done)
}

/// Adds a piece, joined with the one before where they are one range.
fn add(found: &mut Vec<Changed>, piece: &Piece) {
    let kind = if piece.kind == RunKind::Data { "data" } else { "zero" };
    match found.last_mut() {
        Some(last) if last.kind == kind && last.offset + last.length == piece.offset => {
            last.length += piece.len;
        }
        _ => found.push(Changed { offset: piece.offset, length: piece.len, kind }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_one_kind_are_one_range() {
        let piece = |offset, len, kind| Piece { offset, len, kind };
        let mut found = Vec::new();
        let kinds = [RunKind::Data, RunKind::Data, RunKind::Hole, RunKind::Zero, RunKind::Data];
        for (i, kind) in (0..).zip(kinds) {
            add(&mut found, &piece(i * 4096, 4096, kind));
        }
        add(&mut found, &piece(40_960, 512, RunKind::Data));

        let found: Vec<_> = found.iter().map(|c| (c.offset, c.length, c.kind)).collect();
        let last = [(16_384, 4096, "data"), (40_960, 512, "data")];
        assert_eq!(found, [&[(0, 8192, "data"), (8192, 8192, "zero")], &last[..]].concat());
    }
}
