//! The configuration space of a block device (`struct virtio_blk_config`), byte by byte.
//!
//! Front ends count its bytes from 0; older ones from 0x100, where a PCI device has them. Both
//! are understood: no block device has 256 bytes of configuration. Reads past the known fields
//! give zeros, so a front end may ask for the size of a newer structure.

use super::{Capabilities, RANGES_MAX, RangeLimits};
use crate::util::index;

/// Bytes of configuration space that can be read.
pub const CONFIG_SIZE: u32 = 256;

/// Where older front ends see the space begin.
const PCI_BASE: u32 = 0x100;
/// Offset of the cache mode, the one byte that a driver may write.
const WRITEBACK: usize = 32;

fn place<const N: usize>(space: &mut [u8], at: usize, bytes: [u8; N]) {
    space[at..at + N].copy_from_slice(&bytes);
}

fn space(caps: &Capabilities, write_back: bool) -> [u8; CONFIG_SIZE as usize] {
    let none = RangeLimits { sectors_max: 0, ranges_max: 0, alignment: 0 };
    let discard = caps.discard.unwrap_or(none);
    let zeroes = caps.write_zeroes.unwrap_or(none);
    let ranges_max = u32::try_from(RANGES_MAX).unwrap_or(u32::MAX);
    let mut s = [0; index(CONFIG_SIZE as u64)];
    place(&mut s, 0, caps.sectors.to_le_bytes());
    place(&mut s, 8, caps.size_max.to_le_bytes());
    place(&mut s, 12, caps.seg_max.to_le_bytes());
    place(&mut s, 20, caps.block_size.to_le_bytes());
    place(&mut s, 24, [caps.physical_block_exp]);
    place(&mut s, 26, caps.min_io_blocks.to_le_bytes());
    place(&mut s, 28, caps.opt_io_blocks.to_le_bytes());
    place(&mut s, WRITEBACK, [u8::from(write_back)]);
    place(&mut s, 34, caps.queues.to_le_bytes());
    place(&mut s, 36, discard.sectors_max.to_le_bytes());
    place(&mut s, 40, discard.ranges_max.min(ranges_max).to_le_bytes());
    place(&mut s, 44, discard.alignment.to_le_bytes());
    place(&mut s, 48, zeroes.sectors_max.to_le_bytes());
    place(&mut s, 52, zeroes.ranges_max.min(ranges_max).to_le_bytes());
    place(&mut s, 56, [u8::from(caps.write_zeroes_unmaps)]);
    s
}

fn locate(offset: u32, len: usize) -> Option<usize> {
    let at = index(u64::from(if offset >= PCI_BASE { offset - PCI_BASE } else { offset }));
    (at.checked_add(len)? <= index(u64::from(CONFIG_SIZE))).then_some(at)
}

/// Copies configuration bytes from `offset` into `dst`; `false` when they are not all there.
#[must_use]
pub fn read_config(caps: &Capabilities, write_back: bool, offset: u32, dst: &mut [u8]) -> bool {
    let Some(at) = locate(offset, dst.len()) else { return false };
    dst.copy_from_slice(&space(caps, write_back)[at..at + dst.len()]);
    true
}

/// The cache mode that a write of `src` at `offset` asks for: `Some(true)` for write-back. `None`
/// when the write touches anything else or is not 0 or 1; nothing else can be written.
#[must_use]
pub fn write_cache_byte(offset: u32, src: &[u8]) -> Option<bool> {
    match (locate(offset, src.len())?, src) {
        (WRITEBACK, [0]) => Some(false),
        (WRITEBACK, [1]) => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps() -> Capabilities {
        let ranges = RangeLimits { sectors_max: 0x1122_3344, ranges_max: 99, alignment: 8 };
        Capabilities {
            sectors: 0x0102_0304_0506_0708,
            queues: 7,
            discard: Some(ranges),
            write_zeroes: Some(ranges),
            write_zeroes_unmaps: true,
            ..Capabilities::default()
        }
    }

    #[test]
    fn both_bases_read_the_same_bytes() {
        let (mut a, mut b) = ([0; 60], [0; 60]);
        assert!(read_config(&caps(), true, 0, &mut a));
        assert!(read_config(&caps(), true, 0x100, &mut b));
        assert_eq!(a, b);
        assert_eq!(a[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!((a[32], a[34], a[40], a[56]), (1, 7, 16, 1));
    }

    #[test]
    fn reads_end_with_the_space() {
        let mut all = [1; 256];
        assert!(read_config(&caps(), false, 0, &mut all));
        assert!(all[60..].iter().all(|b| *b == 0));
        assert!(!read_config(&caps(), false, 1, &mut all));
        assert!(!read_config(&caps(), false, u32::MAX, &mut [0; 1]));
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        assert_eq!(write_cache_byte(32, &[0]), Some(false));
        assert_eq!(write_cache_byte(0x120, &[1]), Some(true));
        assert_eq!(write_cache_byte(32, &[2]), None);
        assert_eq!(write_cache_byte(0, &[1]), None);
        assert_eq!(write_cache_byte(32, &[1, 0]), None);
        assert_eq!(write_cache_byte(32, &[]), None);
    }
}
