//! An image file as the content of a disk.

use std::path::Path;

use blockd::content::{Content, Run};
use format::{Context as _, Error, Kind, Result};

use super::qcow2::open_difference;
use super::{Format, Origin, Source, check_size, detect, guarded, open_file, open_source};

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

    /// Opens a difference, with what it says about itself. What it does not change is a hole.
    ///
    /// # Errors
    /// As [`open_source`]; `Unsupported` for what is no difference that can be applied.
    pub fn open_difference(path: &Path, format: Option<Format>) -> Result<(Self, Origin)> {
        let file = open_file(path)?;
        let object = file.object().to_owned();
        let format = format.map_or_else(|| detect(path), Ok)?;
        if format != Format::Qcow2 {
            let reason = format!(
                "a {format} image does not tell what became zero from what was not changed"
            );
            return Err(Error::new(Kind::Unsupported, reason)
                .tried("open")
                .on(object)
                .hint("export the difference with `--format qcow2`"));
        }
        let (image, origin) = guarded(&object, "open", || open_difference(file))?;
        check_size(image.size()).context("open", || object)?;
        Ok((Image(Box::new(image)), origin))
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
