//! The NBD handshake and requests.
//!
//! Input: how TLS stands (a byte), the client's flags (4 bytes, little-endian), then options: a
//! number (a byte), a length (2 bytes, little-endian), that much data. Once an option ends the
//! handshake, the rest is request headers.
//!
//! Promised: every answer is a sequence of whole replies to the option that was sent; before TLS
//! nothing is answered but that it is wanted; a request that is accepted lies inside the disk, in
//! whole sectors, and changes nothing on a disk that is read-only.

use std::sync::Arc;

use blockd::nbd::command::{Command, Limits};
use blockd::nbd::negotiate::{Negotiator, Next, Tls};
use blockd::nbd::wire::{
    OPTION_HEADER, OPTION_MAX, OptionHeader, PAYLOAD_MAX, Request, Style, option, reply,
};
use blockd::nbd::{BlockStatus, Export, ExportEntry, Exports, Visit};
use format::{Error, Kind, Result};

use crate::bytes::Input;

const SIZE: u64 = 8 << 30;

/// Two disks, `rw` and `ro`, that are never read.
struct Disks;

struct Disk {
    name: &'static str,
}

impl Exports for Disks {
    fn open(&self, name: &str) -> Result<Arc<dyn Export>> {
        let found = ["rw", "ro"].into_iter().find(|n| *n == name);
        let name = found.ok_or_else(|| Error::new(Kind::NotFound, "no such export"))?;
        Ok(Arc::new(Disk { name }))
    }

    fn list(&self) -> Vec<ExportEntry> {
        let entry = |name: &str| ExportEntry { name: name.to_owned(), description: "x".into() };
        ["rw", "ro"].map(entry).into()
    }
}

impl BlockStatus for Disk {
    fn extents(&self, _: u64, _: u64, _: &mut Visit<'_>) -> Result<()> {
        Ok(())
    }
}

impl Export for Disk {
    fn name(&self) -> &str {
        self.name
    }

    fn description(&self) -> String {
        "a disk".to_owned()
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        self.name == "ro"
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8], _: bool) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool, _: bool) -> Result<()> {
        Ok(())
    }

    fn zeroes_fast(&self, _: u64, _: u64, unmap: bool) -> bool {
        unmap
    }

    fn allocation(&self, _: u64, _: u64, _: &mut Visit<'_>) -> Result<()> {
        Ok(())
    }

    fn ancestors(&self) -> Vec<String> {
        vec!["base".to_owned()]
    }

    fn changed_since(&self, ancestor: &str) -> Result<Arc<dyn BlockStatus>> {
        match ancestor {
            "base" => Ok(Arc::new(Disk { name: "rw" })),
            "locked" => Err(Error::new(Kind::Busy, "it is in use")),
            _ => Err(Error::new(Kind::NotFound, "no such ancestor")),
        }
    }
}

/// Goes through the handshake, then through requests; true when the handshake got there.
pub fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let mut tls = [Tls::Never, Tls::Required, Tls::On][usize::from(input.byte() % 3)];
    let mut negotiator = Negotiator::new(Arc::new(Disks), tls);
    if !negotiator.client_flags(input.u32()) {
        return false;
    }
    while !input.is_empty() {
        let option = u32::from(input.byte());
        let len = usize::from(u16::from_le_bytes(input.array()));
        let data = input.bytes(len.min(OPTION_MAX));
        let mut replies = Vec::new();
        let next = negotiator.option(option, data, &mut replies);
        if option != option::EXPORT_NAME {
            check_replies(option, &replies, tls);
        }
        match next {
            Next::Option => {}
            Next::StartTls => {
                assert_eq!(tls, Tls::Required);
                tls = Tls::On;
                negotiator.secured();
            }
            Next::Close => return false,
            Next::Transmit(agreed) => {
                assert_ne!(tls, Tls::Required, "an export without TLS");
                assert_eq!(agreed.limits.size, agreed.export.size());
                requests(&mut input, &agreed.limits);
                return true;
            }
        }
    }
    false
}

fn check_replies(option: u32, mut replies: &[u8], tls: Tls) {
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    loop {
        assert_eq!(number(&replies[..8]), 0x0003_e889_0455_65a9);
        assert_eq!(number(&replies[8..12]), u64::from(option));
        let kind = u32::try_from(number(&replies[12..16])).expect("four bytes");
        let len = usize::try_from(number(&replies[16..20])).expect("a short reply");
        replies = &replies[20 + len..];
        if tls == Tls::Required {
            let may = kind == reply::ACK || kind >> 31 == 1;
            assert!(may, "{kind} before TLS");
        }
        if kind == reply::ACK || kind >> 31 == 1 {
            assert!(replies.is_empty(), "something follows the last reply");
            return;
        }
    }
}

fn requests(input: &mut Input<'_>, limits: &Limits) {
    while !input.is_empty() {
        let mut header = input.bytes(limits.style.request_bytes()).to_vec();
        check_request(&header, limits);
        // Behind the magic number as well: it would keep a fuzzer outside.
        let magic: u32 = match limits.style {
            Style::Extended => 0x21e4_1c71,
            _ => 0x2560_9513,
        };
        header.resize(limits.style.request_bytes(), 0);
        header[..4].copy_from_slice(&magic.to_be_bytes());
        check_request(&header, limits);
    }
    let _ = OptionHeader::decode(&input.array::<OPTION_HEADER>());
}

fn check_request(header: &[u8], limits: &Limits) {
    let Some(request) = Request::decode(header, limits.style) else { return };
    assert!(request.payload(limits.style) <= request.len);
    let (offset, len) = match Command::parse(&request, limits) {
        Err(_) | Ok(Command::Disconnect | Command::Flush) => return,
        Ok(Command::Read { offset, len, .. }) => {
            assert!(len <= PAYLOAD_MAX);
            (offset, len)
        }
        Ok(Command::BlockStatus { offset, len, .. }) => {
            assert!(limits.contexts && limits.style != Style::Simple && len > 0);
            (offset, len)
        }
        Ok(Command::Write { offset, .. }) => {
            assert!(!limits.read_only);
            (offset, request.len)
        }
        Ok(Command::Trim { offset, len, .. } | Command::WriteZeroes { offset, len, .. }) => {
            assert!(!limits.read_only);
            (offset, len)
        }
    };
    assert!(offset % 512 == 0 && len % 512 == 0 && offset <= SIZE && len <= SIZE - offset);
}

/// Builds inputs.
struct Script(Vec<u8>);

impl Script {
    fn new(tls: u8, flags: u32) -> Self {
        Script([&[tls][..], &flags.to_le_bytes()].concat())
    }

    fn option(mut self, option: u32, data: &[u8]) -> Self {
        self.0.push(u8::try_from(option).expect("a small number"));
        self.0.extend(u16::try_from(data.len()).expect("short").to_le_bytes());
        self.0.extend(data);
        self
    }

    fn go(self, name: &str, wanted: &[u16]) -> Self {
        let mut data = string(name);
        data.extend(u16::try_from(wanted.len()).expect("few").to_be_bytes());
        data.extend(wanted.iter().flat_map(|w| w.to_be_bytes()));
        self.option(option::GO, &data)
    }

    fn contexts(self, option: u32, name: &str, queries: &[&str]) -> Self {
        let mut data = string(name);
        data.extend(u32::try_from(queries.len()).expect("few").to_be_bytes());
        data.extend(queries.iter().flat_map(|q| string(q)));
        self.option(option, &data)
    }

    fn request(mut self, extended: bool, command: u16, flags: u16, range: (u64, u64)) -> Self {
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        self.0.extend(magic.to_be_bytes());
        self.0.extend(flags.to_be_bytes());
        self.0.extend(command.to_be_bytes());
        self.0.extend(7u64.to_be_bytes());
        self.0.extend(range.0.to_be_bytes());
        let len = range.1.to_be_bytes();
        self.0.extend(if extended { &len[..] } else { &len[4..] });
        self
    }
}

fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("short").to_be_bytes();
    [&len, text.as_bytes()].concat()
}

/// Handshakes of old and new clients, under TLS and without, and every command.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let all = |mut script: Script, extended: bool| {
        for (command, flags) in [(0, 0), (0, 4), (1, 1), (3, 0), (4, 0), (6, 18), (7, 8), (2, 0)] {
            let range = if matches!(command, 2 | 3) { (0, 0) } else { (4096, 8192) };
            script = script.request(extended, command, flags, range);
        }
        script.0
    };
    let base = ["base:allocation", "offshoot:changed-since:base"];
    let structured = Script::new(0, 3)
        .option(option::LIST, &[])
        .option(option::STRUCTURED_REPLY, &[])
        .contexts(option::LIST_META_CONTEXT, "rw", &["base:"])
        .contexts(option::SET_META_CONTEXT, "rw", &base)
        .go("rw", &[1, 2, 3]);
    let extended = Script::new(0, 3)
        .option(option::EXTENDED_HEADERS, &[])
        .contexts(option::SET_META_CONTEXT, "ro", &base)
        .go("ro", &[3]);
    let secured = Script::new(1, 3).option(option::LIST, &[]).option(option::STARTTLS, &[]);
    vec![
        ("old-client", all(Script::new(0, 0).option(option::EXPORT_NAME, b"rw"), false)),
        ("structured", all(structured, false)),
        ("extended", all(extended, true)),
        ("tls", all(secured.go("rw", &[]), false)),
        ("refused-without-tls", Script::new(1, 3).go("rw", &[3]).0),
        ("refused-abort", Script::new(0, 3).option(option::ABORT, &[]).0),
    ]
}
