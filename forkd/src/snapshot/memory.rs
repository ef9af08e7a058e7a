//! Guest memory as a file, with a sum for each part of it.
//!
//! Invariants: a page that holds only zeroes is not written, so that what was a hole stays one; a
//! sum covers the zeroes as well, so that a copy without holes is as good. What is read goes into a
//! memory file that is sealed: nothing that happens to the file afterwards reaches a machine.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use blockd::pump::Watch;
use format::{Error, Result};

use crate::memory::image::{data_spans, few_data_spans, memory_file, resolve};
use crate::memory::{Layer, PAGE, Span, index, wide};

/// Bytes of memory under one sum.
pub const CHUNK: u64 = 1 << 20;

/// What came of writing memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The sum of each part.
    pub crc32c: Vec<u32>,
    /// Bytes that are not in holes.
    pub bytes: u64,
}

/// A buffer of one part, and where it belongs.
struct Chunk {
    at: u64,
    bytes: Vec<u8>,
}

impl Chunk {
    fn new() -> Chunk {
        Chunk { at: 0, bytes: Vec::new() }
    }

    /// Makes it the zeroed part at `at`.
    fn begin(&mut self, at: u64, ram_bytes: u64) {
        self.at = at;
        self.bytes.clear();
        self.bytes.resize(index(CHUNK.min(ram_bytes - at)), 0);
    }

    fn end(&self) -> u64 {
        self.at + wide(self.bytes.len())
    }

    /// Reads the bytes of `span` that are in this part.
    fn read(&mut self, file: &File, span: Span) -> Result<()> {
        let (start, end) = (span.start.max(self.at), span.end().min(self.end()));
        let into = &mut self.bytes[index(start - self.at)..index(end - self.at)];
        Ok(file.read_exact_at(into, start)?)
    }

    /// Writes the pages that hold something; gives back how many bytes those are.
    fn write(&self, file: &File) -> Result<u64> {
        let pages: Vec<&[u8]> = self.bytes.chunks(index(PAGE)).collect();
        let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let (mut written, mut first) = (0, 0);
        while first < pages.len() {
            let run = pages[first..].iter().take_while(|page| !is_zero(page)).count();
            if run > 0 {
                let start = first * index(PAGE);
                let end = (start + run * index(PAGE)).min(self.bytes.len());
                file.write_all_at(&self.bytes[start..end], self.at + wide(start))?;
                written += wide(end - start);
            }
            first += run.max(1);
        }
        Ok(written)
    }
}

/// A part of RAM.
enum Part<'a> {
    /// With something in it.
    Data(&'a Chunk),
    /// Nothing but zeroes.
    Hole(Span),
}

/// The sums of parts of zeroes, which are most.
struct ZeroSums(u32, u64);

impl ZeroSums {
    fn new() -> ZeroSums {
        ZeroSums(crc32c::crc32c(&vec![0; index(CHUNK)]), CHUNK)
    }

    fn of(&self, len: u64) -> u32 {
        if len == self.1 { self.0 } else { crc32c::crc32c(&vec![0; index(len)]) }
    }
}

/// Where content may be other than zero: ranges of RAM in order, and which file has each.
type Extents = Vec<(usize, Span)>;

fn extents_of(layers: &[Layer], ram_bytes: u64) -> Result<Extents> {
    let data = layers.iter().map(|layer| data_spans(layer.file(), ram_bytes, PAGE));
    let data = data.collect::<Result<Vec<_>>>()?;
    let mut extents = Extents::new();
    for piece in resolve(layers, ram_bytes) {
        let Some(layer) = piece.layer else { continue };
        let inside = data[layer].iter().filter_map(|span| {
            let start = span.start.max(piece.span.start);
            let end = span.end().min(piece.span.end());
            (start < end).then(|| (layer, Span { start, len: end - start }))
        });
        extents.extend(inside);
    }
    Ok(extents)
}

/// Goes through RAM part by part, with what `files` have in it.
fn walk(
    (extents, files): (&Extents, &[File]),
    ram_bytes: u64,
    watch: &dyn Watch,
    each: &mut dyn FnMut(Part<'_>) -> Result<()>,
) -> Result<()> {
    watch.expect(extents.iter().map(|(_, span)| span.len).sum());
    let (mut chunk, mut next) = (Chunk::new(), 0);
    for at in (0..ram_bytes).step_by(index(CHUNK)) {
        watch.check()?;
        let len = CHUNK.min(ram_bytes - at);
        if extents.get(next).is_none_or(|(_, span)| span.start >= at + len) {
            each(Part::Hole(Span { start: at, len }))?;
            continue;
        }
        chunk.begin(at, ram_bytes);
        while let Some((file, span)) = extents.get(next).filter(|(_, s)| s.start < chunk.end()) {
            chunk.read(&files[*file], *span)?;
            watch.add(span.end().min(chunk.end()) - span.start.max(at));
            if span.end() > chunk.end() {
                break;
            }
            next += 1;
        }
        each(Part::Data(&chunk))?;
    }
    Ok(())
}

fn opened(file: impl AsFd) -> Result<File> {
    Ok(file.as_fd().try_clone_to_owned()?.into())
}

/// Writes the memory that `layers` are to `file`, which is empty.
///
/// # Errors
/// What the host reports, or `watch`.
pub fn write(layers: &[Layer], ram_bytes: u64, file: &File, watch: &dyn Watch) -> Result<Written> {
    file.set_len(ram_bytes)?;
    let files = layers.iter().map(|layer| opened(layer.file())).collect::<Result<Vec<_>>>()?;
    let (extents, zeroes) = (extents_of(layers, ram_bytes)?, ZeroSums::new());
    let mut written = Written { crc32c: Vec::new(), bytes: 0 };
    walk((&extents, &files), ram_bytes, watch, &mut |part| {
        let sum = match part {
            Part::Hole(hole) => zeroes.of(hole.len),
            Part::Data(chunk) => {
                written.bytes += chunk.write(file)?;
                crc32c::crc32c(&chunk.bytes)
            }
        };
        written.crc32c.push(sum);
        Ok(())
    })?;
    Ok(written)
}

/// Reads memory of `ram_bytes` from `file` into one that nobody can change, and compares each part
/// with its sum.
///
/// # Errors
/// `Corrupt` when the file is shorter or longer, or a part of it was altered; what the host
/// reports, or `watch`.
pub fn read(file: &File, ram_bytes: u64, sums: &[u32], watch: &dyn Watch) -> Result<Layer> {
    let len = file.metadata()?.len();
    if len != ram_bytes {
        let reason = format!("it has {len} bytes, and the memory had {ram_bytes}");
        return Err(Error::corrupt(reason));
    }
    let extents = data_spans(file, ram_bytes, PAGE)?.into_iter().map(|span| (0, span)).collect();
    let copy = File::from(memory_file("restored-memory", ram_bytes)?);
    let (zeroes, files) = (ZeroSums::new(), [file.try_clone()?]);
    walk((&extents, &files), ram_bytes, watch, &mut |part| {
        let (at, sum) = match &part {
            Part::Hole(hole) => (hole.start, zeroes.of(hole.len)),
            Part::Data(chunk) => (chunk.at, crc32c::crc32c(&chunk.bytes)),
        };
        if sums.get(index(at / CHUNK)) != Some(&sum) {
            let reason = format!("its content does not agree with its checksum at byte {at}");
            return Err(Error::corrupt(reason));
        }
        // Compared before it is written, and what was compared is what is written: the file may
        // change at any moment.
        if let Part::Data(chunk) = part {
            chunk.write(&copy)?;
        }
        Ok(())
    })?;
    let spans = few_data_spans(&copy, ram_bytes)?;
    let layer = Layer::unsealed(Arc::new(copy.into()), spans);
    layer.seal()?;
    Ok(layer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockd::pump::Unwatched;
    use format::Kind;
    use std::os::unix::fs::MetadataExt as _;

    const RAM: u64 = 5 * CHUNK + 3 * PAGE;

    /// Two layers: pages of ones here and there, above them some of twos.
    fn layers() -> (Vec<Layer>, Vec<u8>) {
        let mut whole = vec![0u8; index(RAM)];
        let layer = |pages: &[u64], byte: u8, spans: Vec<Span>| {
            let file = File::from(memory_file("test", RAM).unwrap());
            for page in pages {
                file.write_all_at(&[byte; 4096], page * PAGE).unwrap();
            }
            let layer = Layer::unsealed(Arc::new(file.into()), spans);
            layer.seal().unwrap();
            layer
        };
        let last = RAM / PAGE - 1;
        let low = [1, 2, 255, 256, 600, last];
        // Page 600 is in the span of the upper layer, which has nothing there: it is zero.
        let high = [2, 601];
        low.iter().for_each(|p| whole[index(p * PAGE)..index((p + 1) * PAGE)].fill(1));
        high.iter().for_each(|p| whole[index(p * PAGE)..index((p + 1) * PAGE)].fill(2));
        whole[index(600 * PAGE)..index(601 * PAGE)].fill(0);
        let span = |page: u64, pages: u64| Span { start: page * PAGE, len: pages * PAGE };
        let lower = layer(&low, 1, vec![span(0, RAM / PAGE)]);
        let upper = layer(&high, 2, vec![span(2, 1), span(600, 2)]);
        (vec![lower, upper], whole)
    }

    fn content(file: impl AsFd) -> Vec<u8> {
        let mut bytes = vec![0; index(RAM)];
        opened(file).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn memory_comes_back_as_it_was_and_holes_stay_holes() {
        let (layers, whole) = layers();
        let file = tempfile::tempfile().unwrap();
        let written = write(&layers, RAM, &file, &Unwatched).unwrap();
        assert_eq!(content(&file), whole);
        assert_eq!(written.bytes, 6 * PAGE);
        assert!(file.metadata().unwrap().blocks() * 512 < RAM / 4, "it is not sparse");

        let layer = read(&file, RAM, &written.crc32c, &Unwatched).unwrap();

        assert_eq!(content(layer.file()), whole);
        // A copy of it without holes is as good.
        let copy = tempfile::tempfile().unwrap();
        copy.write_all_at(&whole, 0).unwrap();
        let layer = read(&copy, RAM, &written.crc32c, &Unwatched).unwrap();
        assert_eq!(content(layer.file()), whole);
        assert!(opened(layer.file()).unwrap().metadata().unwrap().blocks() * 512 < RAM / 4);
        // And what is done to the file later is not seen.
        copy.write_all_at(&[9; 4096], PAGE).unwrap();
        assert_eq!(content(layer.file()), whole);
        assert!(opened(layer.file()).unwrap().write_all_at(&[9], 0).is_err(), "it is sealed");
    }

    #[test]
    fn any_altered_part_is_found_and_named() {
        let (layers, whole) = layers();
        let file = tempfile::tempfile().unwrap();
        let written = write(&layers, RAM, &file, &Unwatched).unwrap();
        for at in [0, PAGE, CHUNK - 1, CHUNK, 3 * CHUNK + 5, RAM - 1] {
            let was = whole[index(at)];
            file.write_all_at(&[was ^ 0x40], at).unwrap();
            let e = read(&file, RAM, &written.crc32c, &Unwatched).unwrap_err();
            assert_eq!(e.kind(), Kind::Corrupt);
            let byte = format!("at byte {}", at / CHUNK * CHUNK);
            assert!(e.to_string().contains(&byte), "{e}");
            file.write_all_at(&[was], at).unwrap();
        }
        read(&file, RAM, &written.crc32c, &Unwatched).unwrap();
        file.set_len(RAM - PAGE).unwrap();
        let e = read(&file, RAM, &written.crc32c, &Unwatched).unwrap_err();
        assert!(e.kind() == Kind::Corrupt && e.to_string().contains("bytes"), "{e}");
    }
}
