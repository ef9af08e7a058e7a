//! Extents of an answer to `BLOCK_STATUS`: joined, bounded, never past what was asked for.

use std::ops::ControlFlow;

use format::Result;

use super::{BlockStatus, Extent};

/// Extents of one context in one reply, at most; the client asks again for the rest.
const EXTENTS_MAX: usize = 1 << 15;

/// The extents from `offset` on: consecutive, neighbours different, `len` bytes or fewer, one at
/// least; exactly one with `one`.
///
/// # Errors
/// What prevents an answer at `offset` itself; an error further on only ends the answer early.
pub fn collect(status: &dyn BlockStatus, offset: u64, len: u64, one: bool) -> Result<Vec<Extent>> {
    let mut found: Vec<Extent> = Vec::new();
    let most = if one { 1 } else { EXTENTS_MAX };
    let mut left = len;
    let outcome = status.extents(offset, len, &mut |next| {
        let next = Extent { len: next.len.min(left), ..next };
        let count = found.len();
        match found.last_mut() {
            Some(last) if last.flags == next.flags => last.len += next.len,
            _ if count == most => return ControlFlow::Break(()),
            _ if next.len > 0 => found.push(next),
            _ => {}
        }
        left -= next.len;
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    match outcome {
        Err(e) if found.is_empty() => Err(e),
        _ => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::Visit;
    use format::Error;

    struct Given(Vec<(u64, u32)>, bool);

    impl BlockStatus for Given {
        fn extents(&self, _: u64, _: u64, visit: &mut Visit<'_>) -> Result<()> {
            for (len, flags) in self.0.iter().copied() {
                if visit(Extent { len, flags }).is_break() {
                    return Ok(());
                }
            }
            if self.1 { Err(Error::corrupt("damaged")) } else { Ok(()) }
        }
    }

    fn collected(given: &Given, len: u64, one: bool) -> Option<Vec<(u64, u32)>> {
        let found = collect(given, 0, len, one).ok()?;
        Some(found.iter().map(|e| (e.len, e.flags)).collect())
    }

    #[test]
    fn neighbours_are_joined_and_the_end_is_cut() {
        let given = Given(vec![(512, 0), (512, 0), (1024, 3), (4096, 3)], false);

        assert_eq!(collected(&given, 4096, false), Some(vec![(1024, 0), (3072, 3)]));
        assert_eq!(collected(&given, 4096, true), Some(vec![(1024, 0)]));
        assert_eq!(collected(&given, 512, true), Some(vec![(512, 0)]));
    }

    #[test]
    fn damage_ends_an_answer_and_is_an_error_only_at_its_start() {
        assert_eq!(collected(&Given(vec![(512, 0)], true), 4096, false), Some(vec![(512, 0)]));
        assert_eq!(collected(&Given(vec![], true), 4096, false), None);
    }

    #[test]
    fn an_answer_is_bounded() {
        let given = Given((0..70_000).map(|i| (512, i % 2)).collect(), false);

        let found = collected(&given, 70_000 * 512, false).unwrap();

        assert_eq!(found.len(), EXTENTS_MAX);
    }
}
