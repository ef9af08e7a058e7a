//! A saved state as bytes: a head, then sections, then a checksum over all of it.
//!
//! ```text
//! magic "OFFSHVM\0" | version u32 | sections u32
//! each section: tag u32 | number u32 | bytes u64 | content, padded with zeroes to 8 bytes
//! crc32c of everything before, u32 | zero u32
//! ```
//! Numbers are little-endian. Invariant: nothing of a blob is used before its checksum agreed.

use format::{Error, Kind, Result};

const MAGIC: &[u8; 8] = b"OFFSHVM\0";
/// Version of the layout and of the content of every section.
const VERSION: u32 = 1;
const HEAD: usize = 16;
const SECTION_HEAD: usize = 16;
const TAIL: usize = 8;

/// Writes a blob.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    sections: u32,
}

impl Default for Writer {
    fn default() -> Self {
        let mut bytes = Vec::with_capacity(16 << 10);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        Writer { bytes, sections: 0 }
    }
}

impl Writer {
    /// Adds a section. `number` tells sections with the same tag apart.
    pub fn section(&mut self, tag: [u8; 4], number: u32, content: &[u8]) {
        self.bytes.extend_from_slice(&tag);
        self.bytes.extend_from_slice(&number.to_le_bytes());
        self.bytes.extend_from_slice(&(content.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.sections += 1;
    }

    /// The blob.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes[12..HEAD].copy_from_slice(&self.sections.to_le_bytes());
        let sum = crc32c::crc32c(&self.bytes);
        self.bytes.extend_from_slice(&sum.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes
    }
}

/// A blob that was checked.
#[derive(Debug)]
pub struct Reader<'a> {
    sections: Vec<([u8; 4], u32, &'a [u8])>,
}

impl<'a> Reader<'a> {
    /// Checks `bytes` and finds the sections.
    ///
    /// # Errors
    /// `Corrupt` when it is no blob, is cut short or altered; `Unsupported` when it is of another
    /// version.
    pub fn new(bytes: &'a [u8]) -> Result<Reader<'a>> {
        let corrupt = |why: &'static str| Error::corrupt(why).tried("read").on("saved state");
        if bytes.len() < HEAD + TAIL || &bytes[..8] != MAGIC {
            return Err(corrupt("it does not begin as one"));
        }
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let (content, tail) = bytes.split_at(bytes.len() - TAIL);
        if tail[..4] != crc32c::crc32c(content).to_le_bytes() || tail[4..] != [0; 4] {
            return Err(corrupt("its checksum does not agree"));
        }
        if word(8) != VERSION {
            let what = format!("it has version {}, not {VERSION}", word(8));
            return Err(Error::new(Kind::Unsupported, what).tried("read").on("saved state"));
        }
        let mut sections = Vec::new();
        let mut at = HEAD;
        while at < content.len() {
            let head = content.get(at..at + SECTION_HEAD);
            let head = head.ok_or_else(|| corrupt("a section is cut short"))?;
            let len = u64::from_le_bytes(head[8..].try_into().expect("8 bytes"));
            let start = at + SECTION_HEAD;
            let end = usize::try_from(len).ok().and_then(|len| start.checked_add(len));
            let section = end.and_then(|end| content.get(start..end));
            let section = section.ok_or_else(|| corrupt("a section is cut short"))?;
            let tag = head[..4].try_into().expect("4 bytes");
            let number = u32::from_le_bytes(head[4..8].try_into().expect("4 bytes"));
            sections.push((tag, number, section));
            at = (start + section.len()).next_multiple_of(8);
        }
        if at != content.len() || u32::try_from(sections.len()) != Ok(word(12)) {
            return Err(corrupt("it has not the sections it speaks of"));
        }
        Ok(Reader { sections })
    }

    /// The content of a section.
    ///
    /// # Errors
    /// `Corrupt` when it is not there.
    pub fn section(&self, tag: [u8; 4], number: u32) -> Result<&'a [u8]> {
        self.find(tag, number).ok_or_else(|| {
            let name = String::from_utf8_lossy(&tag).into_owned();
            Error::corrupt(format!("section {name} {number} is missing"))
                .tried("read")
                .on("saved state")
        })
    }

    /// The content of a section, if it is there.
    #[must_use]
    pub fn find(&self, tag: [u8; 4], number: u32) -> Option<&'a [u8]> {
        self.sections.iter().find(|s| s.0 == tag && s.1 == number).map(|s| s.2)
    }

    /// Tag, number and content of every section, in order.
    pub fn sections(&self) -> impl Iterator<Item = ([u8; 4], u32, &'a [u8])> + '_ {
        self.sections.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob() -> Vec<u8> {
        let mut writer = Writer::default();
        writer.section(*b"ONE ", 0, b"content");
        writer.section(*b"ONE ", 1, b"");
        writer.section(*b"TWO ", 0, &[7; 64]);
        writer.finish()
    }

    #[test]
    fn sections_come_back() {
        let blob = blob();
        let reader = Reader::new(&blob).unwrap();
        assert_eq!(reader.section(*b"ONE ", 0).unwrap(), b"content");
        assert_eq!(reader.section(*b"ONE ", 1).unwrap(), b"");
        assert_eq!(reader.section(*b"TWO ", 0).unwrap(), [7; 64]);
        let e = reader.section(*b"TWO ", 1).unwrap_err();
        assert!(e.to_string().contains("section TWO  1 is missing"), "{e}");
        assert_eq!(reader.sections().count(), 3);
    }

    #[test]
    fn any_altered_byte_and_any_cut_is_refused() {
        let blob = blob();
        for at in 0..blob.len() {
            let mut bad = blob.clone();
            bad[at] ^= 0x10;
            assert_eq!(Reader::new(&bad).unwrap_err().kind(), Kind::Corrupt, "byte {at}");
            assert_eq!(Reader::new(&blob[..at]).unwrap_err().kind(), Kind::Corrupt, "cut {at}");
        }
    }

    #[test]
    fn other_version_is_named() {
        let mut blob = blob();
        blob[8] = 2;
        let sum = crc32c::crc32c(&blob[..blob.len() - TAIL]);
        let at = blob.len() - TAIL;
        blob[at..at + 4].copy_from_slice(&sum.to_le_bytes());
        let e = Reader::new(&blob).unwrap_err();
        assert_eq!(e.kind(), Kind::Unsupported);
        assert!(e.to_string().contains("version 2"), "{e}");
    }
}
