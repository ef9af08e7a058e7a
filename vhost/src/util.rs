//! The few number conversions that the type system cannot see are lossless.

/// An offset or length as an index.
#[allow(clippy::cast_possible_truncation)] // the crate builds for 64-bit targets only
pub(crate) const fn index(value: u64) -> usize {
    const { assert!(usize::BITS == 64) };
    value as usize
}

/// A length as a `u64`; never loses anything.
pub(crate) const fn wide(value: usize) -> u64 {
    value as u64
}

/// The low 16 bits.
#[allow(clippy::cast_possible_truncation)] // the mask says so
pub(crate) const fn low16(value: u64) -> u16 {
    (value & 0xffff) as u16
}

/// The low 32 bits.
#[allow(clippy::cast_possible_truncation)] // the mask says so
pub(crate) const fn low32(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}
