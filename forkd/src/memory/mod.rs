//! Guest memory: a reservation of address space, what is mapped into it, and how it is frozen.
//!
//! Guest-physical layout: RAM from 0 up to [`LOW_END`], then a hole for devices, then the rest of
//! RAM from [`HIGH_START`]. Inside this crate RAM is one range of *offsets* without a hole; layers
//! and bitmaps are in offsets, devices and guests speak in [`Gpa`].

pub(crate) mod collapse;
pub(crate) mod cut;
pub mod dirty;
pub mod image;
pub mod ram;

pub(crate) use format::units::{index, wide};
pub use image::{Layer, Span};
pub use ram::GuestRam;

/// Bytes of a page, the unit of everything that is frozen, copied or marked.
pub const PAGE: u64 = 4096;

/// Bytes of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Where low RAM ends at the latest and the hole for devices begins: 3 GiB.
pub const LOW_END: u64 = 3 << 30;

/// Where high RAM begins: 4 GiB.
pub const HIGH_START: u64 = 4 << 30;

/// A guest-physical address, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);
