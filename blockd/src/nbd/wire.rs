//! The messages of the protocol, byte for byte: one decode point per structure, pure functions on
//! byte slices, numbers in network order.
//!
//! Invariant: nothing here trusts a length. A structure whose lengths do not add up is refused as a
//! whole, and no memory is taken by a number that the peer chose.
//!
//! The protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

/// Largest payload of a request or of one data chunk, in bytes.
pub const PAYLOAD_MAX: u64 = 32 << 20;
/// Largest data of an option, in bytes: a name, and more queries than anyone has use for.
pub const OPTION_MAX: usize = 64 << 10;
/// Longest string (export name, context name), in bytes.
pub const STRING_MAX: usize = 4096;

/// Bytes of an option header.
pub const OPTION_HEADER: usize = 16;
/// Bytes of a request header.
pub const COMPACT_REQUEST: usize = 28;
/// Bytes of a request header when extended headers are in use.
pub const EXTENDED_REQUEST: usize = 32;

const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake and client flag: the fixed newstyle handshake.
pub const FLAG_FIXED_NEWSTYLE: u32 = 1;
/// Handshake and client flag: no padding after the reply to `EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u32 = 2;

/// Options that a client may send.
pub mod option {
    /// Choose an export and begin, without a way to answer with an error.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Continue under TLS.
    pub const STARTTLS: u32 = 5;
    /// Facts about an export.
    pub const INFO: u32 = 6;
    /// Facts about an export, and begin.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known here.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// It is known and not allowed.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// It makes no sense.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The server is stopping.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// Too much is asked for.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    /// Extended headers are in use already.
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Kinds of facts in `INFO` and `GO`.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The name of the export.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The flag `FUA` works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` works.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag `DF` works.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush covers what completed on any connection.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// The flag `FAST_ZERO` works.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// End the session.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Block status.
    pub const BLOCK_STATUS: u16 = 7;

    /// Flag: durable before the reply.
    pub const FUA: u16 = 1;
    /// Flag of `WRITE_ZEROES`: keep the space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Flag of `READ`: one content chunk.
    pub const DF: u16 = 1 << 2;
    /// Flag of `BLOCK_STATUS`: one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Flag of `WRITE_ZEROES`: fail rather than be slow.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// With extended headers: a payload follows.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of reply chunks.
pub mod chunk {
    /// Nothing more.
    pub const NONE: u16 = 0;
    /// Data.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents of a metadata context, in 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;

    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1;
}

/// Error numbers of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Cannot allocate memory.
    NoMem = 12,
    /// Invalid argument.
    Inval = 22,
    /// No space left on device.
    NoSpc = 28,
    /// Value too large.
    Overflow = 75,
    /// Operation not supported.
    NotSup = 95,
    /// The server is stopping.
    Shutdown = 108,
}

/// Reads numbers and strings from a slice; every call fails past its end.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    /// The next 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string behind its 32-bit length.
    pub fn string(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok()?;
        text(self.bytes(len)?)
    }
}

/// The bytes as a string of the protocol: UTF-8, without NUL, not too long.
#[must_use]
pub fn text(bytes: &[u8]) -> Option<&str> {
    let good = bytes.len() <= STRING_MAX && !bytes.contains(&0);
    std::str::from_utf8(bytes).ok().filter(|_| good)
}

/// What the server says first.
#[must_use]
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[17] = 3; // FLAG_FIXED_NEWSTYLE and FLAG_NO_ZEROES.
    bytes
}

/// Header of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub option: u32,
    /// Bytes of its data.
    pub len: u32,
}

impl OptionHeader {
    /// `None` unless the magic number is right.
    #[must_use]
    pub fn decode(bytes: &[u8; OPTION_HEADER]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u64()? != OPTION_MAGIC {
            return None;
        }
        Some(OptionHeader { option: fields.u32()?, len: fields.u32()? })
    }
}

/// Appends a reply to `option` with the concatenation of `parts` as its data.
pub fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    let len: usize = parts.iter().map(|p| p.len()).sum();
    out.extend(u32::try_from(len).expect("replies are short").to_be_bytes());
    parts.iter().for_each(|p| out.extend(*p));
}

/// Data of `INFO` and `GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Name of the export.
    pub name: &'a str,
    /// Facts asked for.
    pub wanted: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// `None` unless every length adds up.
    #[must_use]
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u16()?;
        let wanted = (0..count).map(|_| fields.u16()).collect::<Option<Vec<u16>>>()?;
        fields.0.is_empty().then_some(InfoRequest { name, wanted })
    }
}

/// Data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// Name of the export.
    pub name: &'a str,
    /// Queries.
    pub queries: Vec<&'a str>,
}

impl<'a> MetaRequest<'a> {
    /// `None` unless every length adds up.
    #[must_use]
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u32()?;
        // Each query takes four bytes at least: a count beyond the data ends the loop early.
        let queries = (0..count).map(|_| fields.string()).collect::<Option<Vec<&str>>>()?;
        fields.0.is_empty().then_some(MetaRequest { name, queries })
    }
}

/// How requests and replies look, as agreed in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

impl Style {
    /// Bytes of a request header.
    #[must_use]
    pub fn request_bytes(self) -> usize {
        if self == Style::Extended { EXTENDED_REQUEST } else { COMPACT_REQUEST }
    }
}

/// Header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Command.
    pub command: u16,
    /// What the reply is to be labelled with.
    pub cookie: u64,
    /// Byte offset on the export.
    pub offset: u64,
    /// Bytes of the payload, or of the range.
    pub len: u64,
}

impl Request {
    /// `None` when the magic number is wrong or bytes are missing.
    #[must_use]
    pub fn decode(bytes: &[u8], style: Style) -> Option<Self> {
        let extended = style == Style::Extended;
        let mut fields = Fields(bytes);
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if fields.u32()? != magic {
            return None;
        }
        Some(Request {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: if extended { fields.u64()? } else { fields.u32()?.into() },
        })
    }

    /// Bytes of payload that follow the header. Those of a write follow in any case: clients exist
    /// (QEMU 10) that leave `PAYLOAD_LEN` out where extended headers ask for it.
    #[must_use]
    pub fn payload(&self, style: Style) -> u64 {
        let said = style == Style::Extended && self.flags & command::PAYLOAD_LEN != 0;
        if said || self.command == command::WRITE { self.len } else { 0 }
    }
}

/// Appends a simple reply; `error` 0 is success.
pub fn simple_reply(out: &mut Vec<u8>, cookie: u64, error: u32) {
    out.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend(error.to_be_bytes());
    out.extend(cookie.to_be_bytes());
}

/// Appends the header of a reply chunk with `len` bytes of payload.
pub fn chunk_header(out: &mut Vec<u8>, to: &Request, extended: bool, kind: (u16, u16), len: u64) {
    let (kind, flags) = kind;
    let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
    out.extend(magic.to_be_bytes());
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(to.cookie.to_be_bytes());
    if extended {
        out.extend(to.offset.to_be_bytes());
        out.extend(len.to_be_bytes());
    } else {
        out.extend(u32::try_from(len).expect("chunks are short").to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_do_not_add_up_are_refused() {
        let good = [&4u32.to_be_bytes()[..], b"disk", &1u16.to_be_bytes(), &3u16.to_be_bytes()];
        let good = good.concat();
        let decoded = InfoRequest::decode(&good).unwrap();
        assert_eq!((decoded.name, &decoded.wanted[..]), ("disk", &[3][..]));
        for cut in 0..good.len() {
            assert_eq!(InfoRequest::decode(&good[..cut]), None, "cut at {cut}");
        }
        assert_eq!(InfoRequest::decode(&[good, vec![0]].concat()), None, "a byte too many");
    }

    #[test]
    fn a_count_of_queries_takes_no_memory_by_itself() {
        let data = [&0u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();

        assert_eq!(MetaRequest::decode(&data), None);
    }

    #[test]
    fn strings_are_short_utf8_without_nul() {
        assert_eq!(text("gr\u{fc}n".as_bytes()), Some("gr\u{fc}n"));
        assert_eq!(text(b"a\0b"), None);
        assert_eq!(text(&[0xff]), None);
        assert_eq!(text(&[b'a'; STRING_MAX + 1]), None);
    }
}
