//! What a difference says of itself: which content it was made over, and what its own must be.
//!
//! It is text in a header extension of the qcow2 file. Programs that do not know an extension leave
//! it alone (QEMU keeps it when it names a backing file), so the file is an overlay like any other.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use format::units::index;
use format::{Context as _, Error, Kind, Result};
use serde::{Deserialize, Serialize};

use super::file::ImageFile;

/// The type of the extension.
const TYPE: u32 = 0x4f66_6644;
/// Bytes of a cluster of the images that carry one, the first of which holds all extensions.
pub const CLUSTER: u64 = 64 << 10;
/// The version of what is written here.
const VERSION: u32 = 1;
/// Types and lengths of extensions begin at multiples of these many bytes.
const ALIGN: usize = 8;

/// The content that a difference was made over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The name that the disk with this content had.
    pub name: String,
    /// Bytes of the disk.
    pub size: u64,
    /// The digest of its content.
    pub digest: String,
}

/// What is read first.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// What a difference says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    version: u32,
    /// The name of the disk that it makes of its base.
    pub disk: String,
    /// What it was made over.
    pub base: Base,
    /// The digest of what it changes.
    pub changes: String,
}

impl Origin {
    /// A difference that makes the disk of this name of `base`, and whose changes have a digest.
    #[must_use]
    pub fn new(disk: &str, base: Base, changes: String) -> Self {
        Origin { version: VERSION, disk: disk.to_owned(), base, changes }
    }

    /// Writes it into a qcow2 file that was just made, and has nothing behind its extensions.
    pub(super) fn write(&self, file: &File) -> Result<()> {
        let mut head = vec![0; index(CLUSTER)];
        file.read_exact_at(&mut head, 0)?;
        let at = find(&head)?.1;
        let text = serde_json::to_vec(self).map_err(std::io::Error::from)?;
        let mut bytes = TYPE.to_be_bytes().to_vec();
        let len =
            u32::try_from(text.len()).map_err(|_| Error::invalid("its names are too long"))?;
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(&text);
        // The extension that ends the list is zeroes.
        bytes.resize(bytes.len().next_multiple_of(ALIGN) + ALIGN, 0);
        if at + bytes.len() > head.len() {
            return Err(Error::invalid("its names are too long for the header"));
        }
        Ok(file.write_all_at(&bytes, at as u64)?)
    }

    /// Reads it out of a qcow2 file; `None` when there is none.
    pub(super) fn read(file: &ImageFile) -> Result<Option<Self>> {
        let mut head = vec![0; index(CLUSTER.min(file.size()))];
        file.read_exact(&mut head, 0)?;
        if head.len() < 104 || word(&head, 4)? < 3 {
            return Ok(None);
        }
        let Some(text) = find(&head)?.0 else { return Ok(None) };
        let damaged = |e| Error::corrupt("what it says about its base cannot be read").caused_by(e);
        let Versioned { version } = serde_json::from_slice(text).map_err(damaged)?;
        if version != VERSION {
            let reason = format!("it is a difference of version {version}, not known here");
            return Err(
                Error::new(Kind::Unsupported, reason).hint("use a newer version of offshoot")
            );
        }
        serde_json::from_slice(text).map(Some).map_err(damaged)
    }
}

/// What the image at `path` says, if it is a difference of ours that names no backing file: alone
/// it is not the content of a disk.
///
/// # Errors
/// As opening the image.
pub fn without_base(path: &Path) -> Result<Option<Origin>> {
    let file = super::open_file(path)?;
    let mut head = [0; 16];
    let mut read = || -> Result<Option<Origin>> {
        if file.size() < CLUSTER || !file.starts_with(b"QFI\xfb")? {
            return Ok(None);
        }
        file.read_exact(&mut head, 0)?;
        if head[8..] != [0; 8] {
            return Ok(None);
        }
        Origin::read(&file)
    };
    read().context("open", || file.object().to_owned())
}

fn word(head: &[u8], at: usize) -> Result<u32> {
    let bytes = head.get(at..at + 4).and_then(|b| b.try_into().ok());
    bytes.map(u32::from_be_bytes).ok_or_else(|| Error::corrupt("its header extensions have no end"))
}

/// The extension, and where the one lies that ends the list.
fn find(head: &[u8]) -> Result<(Option<&[u8]>, usize)> {
    let mut at = index(word(head, 100)?.into());
    let mut found = None;
    loop {
        let (kind, len) = (word(head, at)?, index(word(head, at + 4)?.into()));
        if kind == 0 {
            return Ok((found, at));
        }
        let data = head.get(at + 8..).and_then(|rest| rest.get(..len));
        let data = data.ok_or_else(|| Error::corrupt("a header extension has no end"))?;
        if kind == TYPE {
            found = Some(data);
        }
        at += 8 + len.next_multiple_of(ALIGN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(extensions: &[(u32, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; 104];
        head[100..].copy_from_slice(&104_u32.to_be_bytes());
        for (kind, data) in extensions {
            head.extend_from_slice(&kind.to_be_bytes());
            head.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
            head.extend_from_slice(data);
            head.resize(head.len().next_multiple_of(ALIGN), 0);
        }
        head
    }

    #[test]
    fn extensions_are_found_between_others_and_never_behind_the_header() {
        let mut whole = head(&[(7, b"seven"), (TYPE, b"ours"), (8, b"")]);
        let end = whole.len();
        let open = find(&whole).unwrap_err();
        assert_eq!(open.kind(), Kind::Corrupt);
        whole.resize(end + 8, 0);
        assert_eq!(find(&whole).unwrap(), (Some(&b"ours"[..]), end));

        // A length and a place that point far away.
        whole[104 + 4..104 + 8].fill(0xff);
        assert_eq!(find(&whole).unwrap_err().kind(), Kind::Corrupt);
        whole[100..104].fill(0xff);
        assert_eq!(find(&whole).unwrap_err().kind(), Kind::Corrupt);
    }
}
