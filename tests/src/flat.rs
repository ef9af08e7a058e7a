//! A whole disk in memory: what a fixture holds, told independently of the engine, and what an
//! engine shows of it.
//!
//! Content is text that says which write it is and where it belongs, so a fixture can be looked at
//! with a pager and compresses to little.

use std::fmt::Write as _;

use blockd::disk::Disk;
use format::Result;
use format::entry::BlockState;
use format::limits::BLOCK;
use format::units::{GuestBlock, index};

/// What a block of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Never written.
    Hole,
    /// Explicitly zero.
    Zero,
    /// Data.
    Data,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Hole => "hole",
            State::Zero => "zero",
            State::Data => "data",
        }
    }
}

/// The bytes of a disk and the states of its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flat {
    bytes: Vec<u8>,
    states: Vec<State>,
}

/// The text that write `tag` puts into `len` bytes at `offset`, both in sectors of 512 bytes.
#[must_use]
pub fn text(tag: u32, offset: u64, len: u64) -> Vec<u8> {
    let sector = |at: u64| {
        let line = format!("write {tag}, sector {at}\n").into_bytes();
        line.into_iter().cycle().take(512)
    };
    (offset / 512..(offset + len) / 512).flat_map(sector).collect()
}

impl Flat {
    /// An empty disk of `size` bytes.
    #[must_use]
    pub fn empty(size: u64) -> Self {
        Flat { bytes: vec![0; index(size)], states: vec![State::Hole; index(size.div_ceil(BLOCK))] }
    }

    /// The same disk with another size, which is not smaller.
    #[must_use]
    pub fn grown(mut self, size: u64) -> Self {
        self.bytes.resize(index(size), 0);
        self.states.resize(index(size.div_ceil(BLOCK)), State::Hole);
        self
    }

    /// Write `tag`, as [`text`] has it.
    pub fn write(&mut self, tag: u32, offset: u64, len: u64) {
        let end = offset + len;
        self.bytes[index(offset)..index(end)].copy_from_slice(&text(tag, offset, len));
        self.states[index(offset / BLOCK)..index(end.div_ceil(BLOCK))].fill(State::Data);
    }

    /// Whole blocks become zero.
    ///
    /// # Panics
    /// When the range does not consist of whole blocks.
    pub fn discard(&mut self, offset: u64, len: u64) {
        assert!(offset.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK), "whole blocks");
        self.bytes[index(offset)..index(offset + len)].fill(0);
        self.states[index(offset / BLOCK)..index((offset + len) / BLOCK)].fill(State::Zero);
    }

    /// What a disk shows, every byte of it read.
    ///
    /// # Errors
    /// What the disk reports.
    pub fn of(disk: &Disk) -> Result<Self> {
        // No power of two: reads begin and end anywhere in extents and leaves.
        const STEP: u64 = 1000 * 512;
        let mut flat = Self::empty(disk.size());
        let mut at = 0;
        for bytes in flat.bytes.chunks_mut(index(STEP)) {
            bytes.fill(0xff); // what is not filled in shows
            disk.read(0, at, bytes)?;
            at += STEP;
        }
        let blocks = disk.size().div_ceil(BLOCK);
        disk.map().resolve(GuestBlock(0), blocks, &mut |piece| {
            let state = match piece.state {
                BlockState::Hole => State::Hole,
                BlockState::Zero => State::Zero,
                BlockState::Data { .. } => State::Data,
            };
            let first = index(piece.block.0);
            flat.states[first..first + index(piece.count)].fill(state);
            Ok(())
        })?;
        Ok(flat)
    }

    /// The ranges of the disk in order, a line for each: offset, length in bytes, state, BLAKE3 of
    /// what is read there.
    #[must_use]
    pub fn describe(&self) -> String {
        let (mut lines, mut first) = (String::new(), 0);
        for run in self.states.chunk_by(|a, b| a == b) {
            let start = first * index(BLOCK);
            first += run.len();
            let bytes = &self.bytes[start..self.bytes.len().min(first * index(BLOCK))];
            let (len, state, sum) = (bytes.len(), run[0].name(), blake3::hash(bytes));
            writeln!(lines, "{start} {len} {state} {sum}").expect("text grows");
        }
        lines
    }
}
