//! An image file as the content of a disk.

use std::path::Path;

use blockd::content::{Content, Run};
use format::Result;

use super::{Format, Source, detect, open_source};

/// An image file, open.
pub struct Image(Box<dyn Source>);

impl Image {
    /// Opens an image, as `format` or as what its first bytes say.
    ///
    /// # Errors
    /// As [`detect`] and [`open_source`].
    pub fn open(path: &Path, format: Option<Format>) -> Result<Self> {
        let format = format.map_or_else(|| detect(path), Ok)?;
        open_source(path, Some(format)).map(Image)
    }

    /// The name of its format.
    #[must_use]
    pub fn format(&self) -> &'static str {
        self.0.format().name()
    }
}

impl Content for Image {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn status(&self, offset: u64, limit: u64) -> Result<Run> {
        self.0.status(offset, limit)
    }

    fn read_at(&self, _: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buf)
    }
}
