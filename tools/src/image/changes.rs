//! Digest of what a difference changes: made while it is written and again while it is applied, so
//! that a file that was cut short, damaged or written to is not taken for what was exported.
//!
//! It is the sum of what BLAKE3 makes of each changed cluster and its place. A sum, because threads
//! work on clusters in any order; stored zeroes and explicit ones count the same.

use std::sync::{Mutex, PoisonError};

use blockd::content::is_zero;
use format::units::index;

use super::origin::CLUSTER;

/// The digest in the making. Threads share it.
pub struct Changes(Mutex<u128>);

impl Changes {
    /// No changes, for a disk of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Changes(Mutex::new(hash(size, b"size")))
    }

    /// Adds data at `offset`, where a cluster begins; only at the end of the disk may it end
    /// inside one.
    pub fn add(&self, offset: u64, bytes: &[u8]) {
        let clusters = (offset..).step_by(index(CLUSTER)).zip(bytes.chunks(index(CLUSTER)));
        self.count(clusters.fold(0, |sum, (at, bytes)| {
            let bytes = if is_zero(bytes) { &[] } else { bytes };
            sum.wrapping_add(hash(at, bytes))
        }));
    }

    /// Adds zeroes, as [`Changes::add`].
    pub fn zero(&self, offset: u64, len: u64) {
        let clusters = (offset..offset + len).step_by(index(CLUSTER));
        self.count(clusters.fold(0, |sum, at| sum.wrapping_add(hash(at, &[]))));
    }

    fn count(&self, hashes: u128) {
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *sum = sum.wrapping_add(hashes);
    }

    /// The digest, as 32 hexadecimal digits.
    #[must_use]
    pub fn digest(&self) -> String {
        format!("{:032x}", *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn hash(at: u64, bytes: &[u8]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&at.to_le_bytes()).update(bytes);
    let mut half = [0; 16];
    hasher.finalize_xof().fill(&mut half);
    u128::from_le_bytes(half)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_cuts_do_not_count_but_places_and_zeroes_do() {
        let size = 5 * CLUSTER + 512;
        let of = |work: &dyn Fn(&Changes)| {
            let changes = Changes::new(size);
            work(&changes);
            changes.digest()
        };
        let mut bytes = vec![7; index(2 * CLUSTER)];
        bytes[index(CLUSTER)..].fill(0);
        let whole = of(&|c| c.add(CLUSTER, &bytes));
        let parts = of(&|c| {
            c.zero(2 * CLUSTER, CLUSTER);
            c.add(CLUSTER, &bytes[..index(CLUSTER)]);
        });
        assert_eq!(whole, parts);

        let others = [
            of(&|c| c.add(2 * CLUSTER, &bytes)),
            of(&|c| c.add(CLUSTER, &bytes[..index(CLUSTER)])),
            of(&|c| c.zero(CLUSTER, 2 * CLUSTER)),
            of(&|_| ()),
            Changes::new(size + 512).digest(),
        ];
        for (i, other) in others.iter().enumerate() {
            assert!(!others[..i].contains(other) && *other != whole, "{i}");
        }
    }
}
