//! Raw images: the bytes of the disk in a file or on a block device.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use format::{Context, Result};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::file::ImageFile;
use super::staged::Staged;
use super::{Format, Run, RunKind, SECTOR, Sink, Source, check_range, check_size, check_status};

/// A raw image being read.
pub(super) struct RawSource {
    file: ImageFile,
}

impl RawSource {
    /// Takes `file` as the bytes of a disk.
    pub(super) fn open(file: ImageFile) -> Result<Self> {
        let size = file.size();
        check_size(size).map_err(|e| {
            let whole = size.next_multiple_of(SECTOR);
            e.hint(format!(
                "if its tail is missing, `truncate -s {whole}` fills up the last sector"
            ))
        })?;
        file.expect_sequential();
        Ok(RawSource { file })
    }
}

impl Source for RawSource {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn status(&self, offset: u64, limit: u64) -> Result<Run> {
        check_status(self.size(), offset, limit)
            .and_then(|limit| Ok(self.file.extent(offset, limit)?))
            .map(|extent| Run {
                len: extent.len,
                kind: if extent.stored { RunKind::Data } else { RunKind::Hole },
            })
            .context("map", || self.file.object().to_owned())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size(), offset, buf.len() as u64)
            .and_then(|()| Ok(self.file.read_exact(buf, offset)?))
            .context("read", || self.file.object().to_owned())
    }
}

/// A raw image being written.
pub(super) struct RawSink {
    staged: Staged,
    size: u64,
}

impl RawSink {
    /// Starts an image of `size` bytes for `path`.
    pub(super) fn create(path: &Path, size: u64, overwrite: bool) -> Result<Self> {
        let staged = Staged::create(path, overwrite)?;
        staged.file().set_len(size).context("create", || staged.object())?;
        Ok(RawSink { staged, size })
    }
}

impl Sink for RawSink {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)
            .and_then(|()| Ok(self.staged.write_at(offset, buf)?))
            .context("write", || self.staged.object())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        check_range(self.size, offset, len)
            .and_then(|()| Ok(zero(self.staged.file(), offset, len)?))
            .context("write", || self.staged.object())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.staged.publish()
    }
}

fn zero(file: &File, offset: u64, len: u64) -> std::io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, punch, offset, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeroes(file, offset, len),
        done => Ok(done?),
    }
}

/// For file systems without holes.
fn write_zeroes(file: &File, offset: u64, len: u64) -> std::io::Result<()> {
    let zeroes = [0; 64 << 10];
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeroes.len());
        file.write_all_at(&zeroes[..part], at)?;
        at += part as u64;
    }
    Ok(())
}
