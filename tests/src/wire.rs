//! What a writer process tells the test that will kill it: one fixed-size message before and after
//! each operation, written to a pipe in one call, so that the order in the pipe is an order in
//! which things happened.

use std::io::{self, Read, Write};

use crate::model::Action;

/// Bytes of a message.
pub const MESSAGE: usize = 32;

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The disk is open.
    Opened = 1,
    /// A write of the pattern `tag`.
    Write = 2,
    /// A discard.
    Discard = 3,
    /// A flush.
    Flush = 4,
}

/// A message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// What.
    pub kind: Kind,
    /// False before, true after.
    pub done: bool,
    /// Which thread.
    pub thread: u32,
    /// First sector.
    pub first: u64,
    /// Number of sectors.
    pub count: u64,
    /// Tag of a write.
    pub tag: u32,
}

impl Message {
    /// Sends it.
    ///
    /// # Errors
    /// What the pipe reports.
    pub fn send(&self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = [0; MESSAGE];
        bytes[0] = self.kind as u8;
        bytes[1] = u8::from(self.done);
        bytes[4..8].copy_from_slice(&self.thread.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.first.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.count.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.tag.to_le_bytes());
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Receives the next one; `None` at the end of the pipe.
    ///
    /// # Errors
    /// What the pipe reports, or a message that is none.
    pub fn receive(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut bytes = [0; MESSAGE];
        match from.read_exact(&mut bytes) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let kind = match bytes[0] {
            1 => Kind::Opened,
            2 => Kind::Write,
            3 => Kind::Discard,
            4 => Kind::Flush,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        Ok(Some(Message {
            kind,
            done: bytes[1] != 0,
            thread: half(4),
            first: word(8),
            count: word(16),
            tag: half(24),
        }))
    }

    /// The operation it is about.
    #[must_use]
    pub fn action(&self) -> Action {
        match self.kind {
            Kind::Opened => Action::Open,
            Kind::Write => Action::Write(self.first, self.count, self.tag),
            Kind::Discard => Action::Zero(self.first, self.count),
            Kind::Flush => Action::Flush,
        }
    }
}
