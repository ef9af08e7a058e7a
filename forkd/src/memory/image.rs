//! A frozen memory: sealed layers, the topmost that covers a page deciding its content.
//!
//! A layer is a memory file as long as RAM, of which only some spans count. What no layer covers
//! is zero.
//!
//! Invariants: every layer is sealed against writing before a child maps it (the kernel grants the
//! seal only when no writable shared mapping of the file is left, so the seal is the proof that
//! nobody can alter the image: `Layer::seal`, checked again by the child in [`Layer::new`]).
//! Memory that no layer covers is mapped anonymously: a private mapping of a hole in a file costs a
//! page of the file and a page of the child. A span may have holes only where it was rounded out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use format::{Error, Kind, Result};
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use serde::{Deserialize, Serialize};

use super::ram::GuestRam;
use super::{HUGE_PAGE, PAGE};

/// Most layers that a child is given; one cut more makes a flat layer instead.
pub const DEPTH_MAX: usize = 4;

/// Most spans of one layer. Each costs a child one `mmap`, about 5 µs; more of them are made
/// fewer by making them longer.
pub const SPANS_MAX: usize = 128;

/// A range of RAM, in bytes from its beginning; start and length are multiples of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Offset of the first byte.
    pub start: u64,
    /// Length.
    pub len: u64,
}

impl Span {
    /// One past the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// One sealed layer of a memory image.
#[derive(Debug, Clone)]
pub struct Layer {
    file: Arc<OwnedFd>,
    spans: Arc<[Span]>,
}

impl Layer {
    /// A layer that another process made: `spans` of `file`, for a guest with `ram_bytes`.
    ///
    /// # Errors
    /// `Invalid` when the file is not sealed against writing (somebody could still alter the
    /// image) or against shrinking, or when the spans are not in order, overlap, or leave RAM.
    pub fn new(file: OwnedFd, spans: Vec<Span>, ram_bytes: u64) -> Result<Layer> {
        let refused = |why: &'static str| Error::invalid(why).tried("take over").on("memory layer");
        let seals = rustix::fs::fcntl_get_seals(&file)
            .map_err(|_| refused("the descriptor is not a memory file"))?;
        if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK) {
            return Err(refused("the file is not sealed"));
        }
        let len = rustix::fs::fstat(&file).map(|stat| u64::try_from(stat.st_size).unwrap_or(0));
        if len.unwrap_or(0) < ram_bytes {
            return Err(refused("the file is shorter than guest memory"));
        }
        let mut at = 0;
        for span in &spans {
            let end = span.start.checked_add(span.len);
            let aligned = span.start.is_multiple_of(PAGE) && span.len.is_multiple_of(PAGE);
            let in_order = span.len > 0 && span.start >= at;
            if !aligned || !in_order || end.is_none_or(|end| end > ram_bytes) {
                return Err(refused("its spans are not ranges of guest memory in order"));
            }
            at = span.end();
        }
        Ok(Layer { file: Arc::new(file), spans: spans.into() })
    }

    /// A layer that is not sealed yet.
    pub(crate) fn unsealed(file: Arc<OwnedFd>, spans: Vec<Span>) -> Layer {
        Layer { file, spans: spans.into() }
    }

    /// Seals the file against every change, for good. Sealing twice is the same as once.
    ///
    /// # Errors
    /// `Busy` when somebody still maps the file shared and writable: the image may be altered.
    pub(crate) fn seal(&self) -> Result<()> {
        let has = rustix::fs::fcntl_get_seals(&*self.file);
        if has.is_ok_and(|seals| seals.contains(SealFlags::WRITE)) {
            return Ok(());
        }
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&*self.file, seals).map_err(|e| {
            let error = if e == rustix::io::Errno::BUSY {
                Error::new(Kind::Busy, "somebody still maps the file for writing")
            } else {
                Error::from(std::io::Error::from(e))
            };
            error.tried("seal").on("memory layer")
        })
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Which ranges of RAM the layer decides, in order.
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    fn covers(&self, offset: u64) -> bool {
        let next = self.spans.partition_point(|span| span.start <= offset);
        next > 0 && offset < self.spans[next - 1].end()
    }
}

/// A range of RAM and the layer that decides it, or `None` for zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) span: Span,
    pub(crate) layer: Option<usize>,
}

/// Cuts RAM into pieces that one layer each decides, in order and without gap.
pub(crate) fn resolve(layers: &[Layer], ram_bytes: u64) -> Vec<Piece> {
    let spans = layers.iter().flat_map(|layer| layer.spans.iter());
    let mut edges: Vec<u64> = spans.flat_map(|span| [span.start, span.end()]).collect();
    edges.extend([0, ram_bytes]);
    edges.sort_unstable();
    edges.dedup();
    let mut pieces: Vec<Piece> = Vec::with_capacity(edges.len());
    for edge in edges.windows(2) {
        let (start, end) = (edge[0], edge[1]);
        let layer = layers.iter().rposition(|layer| layer.covers(start));
        match pieces.last_mut() {
            Some(last) if last.layer == layer => last.span.len += end - start,
            _ => pieces.push(Piece { span: Span { start, len: end - start }, layer }),
        }
    }
    pieces
}

/// Maps an image into `ram`, copy-on-write.
///
/// # Errors
/// The host's error; RAM is then inaccessible.
pub(crate) fn activate(ram: &GuestRam, layers: &[Layer]) -> Result<()> {
    let mapped = map(ram, layers);
    match &mapped {
        Ok(()) => ram.keep_out_of_cores(),
        Err(_) => ram.close(),
    }
    mapped
}

/// Maps an image into `ram`, piece by piece; at a failure some pieces are mapped.
pub(crate) fn map(ram: &GuestRam, layers: &[Layer]) -> Result<()> {
    resolve(layers, ram.size()).iter().try_for_each(|piece| match piece.layer {
        None => ram.map_anonymous(piece.span.start, piece.span.len),
        Some(i) => ram.map_private(piece.span.start, piece.span.len, layers[i].file()),
    })
}

/// A memory file of `size` bytes that can be sealed.
pub(crate) fn memory_file(name: &str, size: u64) -> Result<OwnedFd> {
    let host = |e| Error::from(std::io::Error::from(e)).tried("create").on("memory file");
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(name, flags).map_err(host)?;
    rustix::fs::ftruncate(&file, size).map_err(host)?;
    Ok(file)
}

/// The parts of the first `size` bytes of `file` that hold data, rounded out to `granule` bytes.
pub(crate) fn data_spans(file: impl AsFd, size: u64, granule: u64) -> Result<Vec<Span>> {
    let mut spans: Vec<Span> = Vec::new();
    let mut at = 0;
    while at < size {
        let Some(data) = seek(&file, SeekFrom::Data(at))?.filter(|data| *data < size) else {
            break;
        };
        let hole = seek(&file, SeekFrom::Hole(data))?.unwrap_or(size);
        let start = data / granule * granule;
        let end = hole.next_multiple_of(granule).min(size);
        match spans.last_mut() {
            Some(last) if last.end() >= start => last.len = end - last.start,
            _ => spans.push(Span { start, len: end - start }),
        }
        at = end;
    }
    Ok(spans)
}

/// How many bytes of `span` hold data.
pub(crate) fn data_bytes(file: impl AsFd, span: Span) -> Result<u64> {
    let (mut at, mut bytes) = (span.start, 0);
    while let Some(data) = seek(&file, SeekFrom::Data(at))?.filter(|data| *data < span.end()) {
        at = seek(&file, SeekFrom::Hole(data))?.unwrap_or(span.end()).min(span.end());
        bytes += at - data;
        if at >= span.end() {
            break;
        }
    }
    Ok(bytes)
}

/// [`data_spans`] with the smallest granule that keeps them few.
pub(crate) fn few_data_spans(file: impl AsFd, size: u64) -> Result<Vec<Span>> {
    let fine = data_spans(&file, size, 16 * PAGE)?;
    if fine.len() <= SPANS_MAX { Ok(fine) } else { data_spans(&file, size, HUGE_PAGE) }
}

/// Where data begins at `at` or later.
pub(crate) fn next_data(file: impl AsFd, at: u64) -> Result<Option<u64>> {
    seek(&file, SeekFrom::Data(at))
}

fn seek(file: &impl AsFd, to: SeekFrom) -> Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(e) => {
            Err(Error::from(std::io::Error::from(e)).tried("look for holes in").on("memory file"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Gpa;

    fn layer(spans: &[(u64, u64)], byte: u8, pages: u64) -> Layer {
        let file = memory_file("test", pages * PAGE).unwrap();
        let spans: Vec<Span> =
            spans.iter().map(|(at, len)| Span { start: at * PAGE, len: len * PAGE }).collect();
        for span in &spans {
            let content = vec![byte; usize::try_from(span.len).unwrap()];
            rustix::io::pwrite(&file, &content, span.start).unwrap();
        }
        let layer = Layer::unsealed(Arc::new(file), spans);
        layer.seal().unwrap();
        layer
    }

    #[test]
    fn topmost_layer_decides_and_the_rest_is_zero() {
        let layers = [layer(&[(0, 8)], 1, 20), layer(&[(2, 2), (6, 6)], 2, 20)];
        let ram = GuestRam::reserve(20 * PAGE).unwrap();
        activate(&ram, &layers).unwrap();
        let page = |n: u64| {
            let mut byte = [9];
            ram.read(Gpa(n * PAGE), &mut byte).unwrap();
            byte[0]
        };
        let seen: Vec<u8> = (0..20).map(page).collect();
        assert_eq!(seen, [1, 1, 2, 2, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
        ram.write(Gpa(0), &[7]).unwrap();
        let mut below = [0];
        rustix::io::pread(layers[0].file(), &mut below, 0).unwrap();
        assert_eq!(below, [1], "a write of the child is in the shared layer");
    }

    #[test]
    fn file_that_is_still_mapped_for_writing_cannot_be_sealed() {
        let file = Arc::new(memory_file("test", 4 * PAGE).unwrap());
        let ram = GuestRam::reserve(4 * PAGE).unwrap();
        ram.map_shared(&file).unwrap();
        let layer = Layer::unsealed(file, Vec::new());
        assert_eq!(layer.seal().unwrap_err().kind(), Kind::Busy);
        drop(ram);
        layer.seal().unwrap();
    }

    #[test]
    fn layers_from_outside_are_checked() {
        let sealed = || layer(&[(0, 4)], 1, 4).file.try_clone().unwrap();
        let span = |start: u64, len: u64| Span { start: start * PAGE, len: len * PAGE };
        let refused = |file, spans| Layer::new(file, spans, 4 * PAGE).unwrap_err().to_string();
        let unsealed = memory_file("test", 4 * PAGE).unwrap();
        assert!(refused(unsealed, vec![span(0, 1)]).contains("not sealed"));
        for bad in [
            vec![span(0, 5)],
            vec![span(2, 1), span(1, 1)],
            vec![span(0, 2), span(1, 1)],
            vec![span(0, 0)],
            vec![Span { start: 1, len: PAGE }],
            vec![Span { start: u64::MAX - PAGE + 1, len: PAGE }],
        ] {
            assert!(refused(sealed(), bad).contains("spans"));
        }
        assert!(Layer::new(sealed(), vec![span(0, 4)], 8 * PAGE).is_err());
        assert!(Layer::new(sealed(), vec![span(0, 2), span(2, 2)], 4 * PAGE).is_ok());
    }

    #[test]
    fn data_spans_round_out_and_join() {
        let file = memory_file("test", 64 * PAGE).unwrap();
        for page in [3, 4, 21, 60] {
            rustix::io::pwrite(&file, &[1], page * PAGE).unwrap();
        }
        let found = data_spans(&file, 64 * PAGE, 4 * PAGE).unwrap();
        let found: Vec<(u64, u64)> =
            found.iter().map(|span| (span.start / PAGE, span.len / PAGE)).collect();
        assert_eq!(found, [(0, 8), (20, 4), (60, 4)]);
    }
}
