//! What a store holds at one instant, with the means to damage it.

use std::collections::BTreeMap;
use std::sync::Arc;

use format::{Error, Kind, Result};

use super::super::range_end;
use super::content::Content;
use super::pages::digest;

/// File names and contents of a store. Cloning is cheap (one counter per file).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    pub(super) files: BTreeMap<Arc<str>, Content>,
}

impl Image {
    /// An image without files.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The content of a file.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Content> {
        self.files.get(name)
    }

    /// File names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(AsRef::as_ref)
    }

    /// Puts a file, replacing one of that name.
    pub fn put(&mut self, name: &str, content: Content) {
        self.files.insert(name.into(), content);
    }

    /// Takes a file out.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn remove(&mut self, name: &str) -> Result<Content> {
        self.files.remove(name).ok_or_else(|| missing("remove", name))
    }

    /// Flips bit `bit` (0 to 7) of the byte at `offset`.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when the file has no such bit.
    pub fn flip_bit(&mut self, name: &str, offset: u64, bit: u32) -> Result<()> {
        let content = self.change("damage", name)?;
        match (content.read(offset, 1).first(), 1_u8.checked_shl(bit)) {
            (Some(byte), Some(mask)) => content.write(offset, &[byte ^ mask]),
            _ => return Err(Error::invalid("there is no such bit").tried("damage").on(name)),
        }
        Ok(())
    }

    /// Cuts a file, or grows it with zeroes, to `len` bytes.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` beyond the largest possible file.
    pub fn truncate(&mut self, name: &str, len: u64) -> Result<()> {
        range_end(0, len)?;
        self.change("truncate", name)?.set_len(len);
        Ok(())
    }

    /// Puts `data` at `offset`, growing the file where needed.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` beyond the largest possible file.
    pub fn overwrite(&mut self, name: &str, offset: u64, data: &[u8]) -> Result<()> {
        range_end(offset, data.len() as u64)?;
        self.change("overwrite", name)?.write(offset, data);
        Ok(())
    }

    /// Equal for equal images, and only then (as far as 128 bits of a strong hash go). Cheap after
    /// a small change: only what changed is hashed again.
    #[must_use]
    pub fn fingerprint(&self) -> u128 {
        let parts: Vec<_> = self
            .files
            .iter()
            .map(|(name, content)| {
                (name.as_bytes(), name.len().to_le_bytes(), content.fingerprint().to_le_bytes())
            })
            .collect();
        digest(
            parts.iter().flat_map(|(name, len, print)| [len.as_slice(), *name, print.as_slice()]),
        )
    }

    fn change(&mut self, tried: &'static str, name: &str) -> Result<&mut Content> {
        self.files.get_mut(name).ok_or_else(|| missing(tried, name))
    }
}

fn missing(tried: &'static str, name: &str) -> Error {
    Error::new(Kind::NotFound, "no such file").tried(tried).on(name)
}
