//! What tests write: sectors that say which write they come from and where they belong, so that a
//! torn, lost, misplaced or foreign sector is told apart from an older one.

/// Bytes of a sector.
pub const SECTOR: usize = 512;

const WORDS: usize = SECTOR / 8;

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Zeroes only.
    Zero,
    /// What the write with this tag put here.
    Tag(u32),
    /// What a write put at another sector.
    Foreign {
        /// Of which write.
        tag: u32,
        /// Where it belongs.
        sector: u64,
    },
    /// Nothing that a write made.
    Garbage,
}

fn word(first: u64, i: usize) -> u64 {
    first.wrapping_mul(2 * i as u64 + 1)
}

fn stamp(tag: u32, sector: u64) -> u64 {
    u64::from(tag) << 32 | sector & 0xffff_ffff
}

/// Fills `buf` as the write `tag` (not zero) from sector `first` on.
pub fn fill(tag: u32, first: u64, buf: &mut [u8]) {
    for (sector, bytes) in (first..).zip(buf.chunks_exact_mut(SECTOR)) {
        let stamp = stamp(tag, sector);
        for (i, bytes) in bytes.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(stamp, i).to_le_bytes());
        }
    }
}

/// The bytes that the write `tag` puts into `count` sectors from `first` on.
#[must_use]
pub fn bytes(tag: u32, first: u64, count: u64) -> Vec<u8> {
    let mut buf = vec![0; usize::try_from(count).expect("a count") * SECTOR];
    fill(tag, first, &mut buf);
    buf
}

/// What the bytes of sector `at` are.
///
/// # Panics
/// When `bytes` is not a sector.
#[must_use]
pub fn look(bytes: &[u8], at: u64) -> Found {
    assert_eq!(bytes.len(), SECTOR);
    let read = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("a word"));
    let first = read(0);
    if first == 0 {
        let zero = bytes.iter().all(|b| *b == 0);
        return if zero { Found::Zero } else { Found::Garbage };
    }
    let whole = (1..WORDS).all(|i| read(i) == word(first, i));
    let (tag, sector) = ((first >> 32) as u32, first & 0xffff_ffff);
    match whole && tag != 0 {
        false => Found::Garbage,
        true if sector == at & 0xffff_ffff => Found::Tag(tag),
        true => Found::Foreign { tag, sector },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_say_what_they_are() {
        let mut buf = bytes(7, 100, 2);
        assert_eq!(look(&buf[..512], 100), Found::Tag(7));
        assert_eq!(look(&buf[512..], 101), Found::Tag(7));
        assert_eq!(look(&buf[512..], 100), Found::Foreign { tag: 7, sector: 101 });
        assert_eq!(look(&[0; 512], 5), Found::Zero);
        buf[511] ^= 1;
        assert_eq!(look(&buf[..512], 100), Found::Garbage);
        let mut late = [0; 512];
        late[300] = 1;
        assert_eq!(look(&late, 5), Found::Garbage);
    }
}
