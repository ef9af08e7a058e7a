//! The few number conversions that the type system cannot see are lossless.

pub(crate) use format::units::{index, wide};

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
