//! What a request asks for, checked against what was agreed: a pure function.
//!
//! Invariant: a [`Command`] lies inside the export, in whole units of [`BLOCK_MIN`], has only flags
//! that belong to it, and does not write to an export that is read-only.

use format::Kind;

use super::BLOCK_MIN;
use super::wire::{Errno, PAYLOAD_MAX, Request, Style, command as c};

/// What was agreed in the handshake, as far as requests are concerned.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size of the export in bytes.
    pub size: u64,
    /// No writes.
    pub read_only: bool,
    /// How messages look.
    pub style: Style,
    /// Metadata contexts were selected.
    pub contexts: bool,
}

/// A request that makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read; `whole` wants one chunk.
    Read {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// One content chunk only.
        whole: bool,
    },
    /// Write the payload.
    Write {
        /// Byte offset.
        offset: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Discard.
    Trim {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The space may go.
        unmap: bool,
        /// Fail rather than be slow.
        fast: bool,
        /// Durable before the reply.
        fua: bool,
    },
    /// Extents of the selected contexts.
    BlockStatus {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// One extent per context.
        one: bool,
    },
    /// The client leaves.
    Disconnect,
}

impl Command {
    /// What `request` asks for, or what to answer.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn parse(request: &Request, limits: &Limits) -> Result<Self, Errno> {
        let Request { flags, command, offset, len, .. } = *request;
        let fua = flags & c::FUA != 0;
        let parsed = match command {
            c::READ => Command::Read { offset, len, whole: flags & c::DF != 0 },
            c::WRITE => Command::Write { offset, fua },
            c::DISC => return Ok(Command::Disconnect),
            c::FLUSH => Command::Flush,
            c::TRIM => Command::Trim { offset, len, fua },
            c::WRITE_ZEROES => Command::WriteZeroes {
                offset,
                len,
                unmap: flags & c::NO_HOLE == 0,
                fast: flags & c::FAST_ZERO != 0,
                fua,
            },
            c::BLOCK_STATUS => Command::BlockStatus { offset, len, one: flags & c::REQ_ONE != 0 },
            // CACHE among them: the host's page cache needs no hint, and saying so is honest.
            _ => return Err(Errno::Inval),
        };
        // FUA is allowed everywhere: clients are known to set it on reads.
        if flags & !(parsed.own_flags(limits.style) | c::FUA) != 0 {
            return Err(Errno::Inval);
        }
        parsed.check_range(request, limits)?;
        Ok(parsed)
    }

    fn own_flags(self, style: Style) -> u16 {
        match self {
            // Without structured replies a read is never fragmented, and the flag not offered.
            Command::Read { .. } if style != Style::Simple => c::DF,
            Command::Write { .. } if style == Style::Extended => c::PAYLOAD_LEN,
            Command::WriteZeroes { .. } => c::NO_HOLE | c::FAST_ZERO,
            Command::BlockStatus { .. } => c::REQ_ONE,
            _ => 0,
        }
    }

    fn check_range(self, request: &Request, limits: &Limits) -> Result<(), Errno> {
        let Request { offset, len, .. } = *request;
        let inside = offset.checked_add(len).is_some_and(|end| end <= limits.size);
        let unit = u64::from(BLOCK_MIN);
        let aligned = offset.is_multiple_of(unit) && len.is_multiple_of(unit);
        match self {
            Command::Flush if (offset, len) != (0, 0) => Err(Errno::Inval),
            Command::Flush | Command::Disconnect => Ok(()),
            Command::Write { .. } | Command::WriteZeroes { .. } | Command::Trim { .. }
                if limits.read_only =>
            {
                Err(Errno::Perm)
            }
            Command::Write { .. } | Command::WriteZeroes { .. } if !inside => Err(Errno::NoSpc),
            Command::BlockStatus { .. } if !limits.contexts || len == 0 => Err(Errno::Inval),
            _ if !inside || !aligned => Err(Errno::Inval),
            Command::Read { .. } if len > PAYLOAD_MAX => match limits.style {
                Style::Simple => Err(Errno::Inval),
                _ => Err(Errno::Overflow),
            },
            _ => Ok(()),
        }
    }
}

impl Errno {
    /// What a client is told about an error of this kind.
    #[must_use]
    pub fn of(kind: Kind) -> Self {
        match kind {
            Kind::NoSpace => Errno::NoSpc,
            Kind::NoMemory => Errno::NoMem,
            Kind::ReadOnly => Errno::Perm,
            Kind::Invalid => Errno::Inval,
            Kind::Cancelled => Errno::Shutdown,
            _ => Errno::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { size: 1 << 20, read_only: false, style: Style::Structured, contexts: true };

    fn parse(command: u16, flags: u16, range: (u64, u64), limits: &Limits) -> Result<(), Errno> {
        let (offset, len) = range;
        Command::parse(&Request { flags, command, cookie: 0, offset, len }, limits).map(|_| ())
    }

    #[test]
    fn ranges_past_the_end_are_told_apart() {
        for range in [(1 << 20, 512), ((1 << 20) - 512, 1024), (u64::MAX - 511, 512)] {
            assert_eq!(parse(c::READ, 0, range, &LIMITS), Err(Errno::Inval));
            assert_eq!(parse(c::TRIM, 0, range, &LIMITS), Err(Errno::Inval));
            assert_eq!(parse(c::BLOCK_STATUS, 0, range, &LIMITS), Err(Errno::Inval));
            assert_eq!(parse(c::WRITE, 0, range, &LIMITS), Err(Errno::NoSpc));
            assert_eq!(parse(c::WRITE_ZEROES, 0, range, &LIMITS), Err(Errno::NoSpc));
        }
        assert_eq!(parse(c::READ, 0, (0, 1 << 20), &LIMITS), Ok(()));
    }

    #[test]
    fn ranges_that_are_not_in_sectors_are_refused() {
        for command in [c::READ, c::WRITE, c::TRIM, c::WRITE_ZEROES, c::BLOCK_STATUS] {
            assert_eq!(parse(command, 0, (1, 512), &LIMITS), Err(Errno::Inval));
            assert_eq!(parse(command, 0, (0, 513), &LIMITS), Err(Errno::Inval));
        }
    }

    #[test]
    fn flags_belong_to_commands() {
        for command in [c::READ, c::WRITE, c::FLUSH, c::TRIM, c::WRITE_ZEROES, c::BLOCK_STATUS] {
            let range = if command == c::FLUSH { (0, 0) } else { (0, 512) };
            let taken: u16 = (0..16)
                .map(|bit| 1 << bit)
                .filter(|flag| parse(command, *flag, range, &LIMITS).is_ok())
                .sum();
            let own = match command {
                c::READ => c::DF,
                c::WRITE_ZEROES => c::NO_HOLE | c::FAST_ZERO,
                c::BLOCK_STATUS => c::REQ_ONE,
                _ => 0,
            };
            assert_eq!(taken, own | c::FUA, "command {command}");
        }
    }

    #[test]
    fn a_read_only_export_refuses_every_change() {
        let limits = Limits { read_only: true, ..LIMITS };
        for command in [c::WRITE, c::TRIM, c::WRITE_ZEROES] {
            assert_eq!(parse(command, 0, (0, 512), &limits), Err(Errno::Perm));
        }
        assert_eq!(parse(c::READ, 0, (0, 512), &limits), Ok(()));
        assert_eq!(parse(c::FLUSH, 0, (0, 0), &limits), Ok(()));
    }

    #[test]
    fn unknown_commands_are_refused() {
        for command in [5, 8, 9, u16::MAX] {
            assert_eq!(parse(command, 0, (0, 512), &LIMITS), Err(Errno::Inval));
        }
    }
}
