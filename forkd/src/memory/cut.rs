//! Freezing the memory of a machine at one instant, while it goes on.
//!
//! A machine that was not cut yet has one shared file. At its first cut that file is mapped
//! privately in its own place, a part at a time, while the machine runs: what it writes to a part
//! before goes to the file, what it writes afterwards to pages of its own. The file is then the
//! lowest layer, and nothing of it is copied.
//!
//! From then on, what the machine wrote is in private pages that have no name. They are copied
//! into a new file while the machine runs, then what it wrote meanwhile, until little is left; only
//! that rest is copied in the pause. The machine keeps its pages. What it wrote is known from KVM's
//! log and from the devices' marks; what it ever wrote, from the page tables.
//!
//! Invariants:
//! - [`Top::prepare`] is called when nobody else writes to the shared file any more
//!   (`Devices::take_memory_back`): what another process wrote to a part after it was mapped
//!   privately would be in the file and in the image, but not in front of the machine if that had
//!   written to the page, and no log would have it. The seal that follows is the proof: the kernel
//!   refuses it while anybody maps the file for writing.
//! - [`Top::freeze`] is called while processors are parked and devices quiet, the rest while they
//!   may run.
//! - A part that was mapped privately is never mapped again while the machine runs: its private
//!   pages would be lost. Parts of the file that hold nothing become anonymous memory in the pause
//!   only, after a second look.
//! - Logging is on before the pages to copy are looked up: a write is either in what is copied
//!   first or in the log.
//! - A cut that fails leaves the machine with the content it had, and the next one starts from the
//!   page tables, not from a log of which a part is lost.
//! - No layer is handed out before it is sealed.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use format::{Error, Result};

use super::dirty::PageSet;
use super::image::{
    self, DEPTH_MAX, Layer, Piece, SPANS_MAX, Span, few_data_spans, memory_file, resolve,
};
use super::{GuestRam, HUGE_PAGE, PAGE, index, wide};
use crate::kvm::vm::Vm;

/// What may be left to copy in the pause: 64 pages are about 0.2 ms.
const REST_PAGES: u64 = 64;
/// Most rounds of copying before the pause.
const ROUNDS_MAX: u32 = 8;

/// What guest memory is made of now.
#[derive(Debug, Default)]
pub(crate) enum Top {
    /// Nothing is mapped.
    #[default]
    Empty,
    /// One file, shared from `from` on, private below: 0 until the first cut begins.
    Shared { file: Arc<OwnedFd>, from: u64 },
    /// Private pages over sealed layers.
    Private(PrivateTop),
}

#[derive(Debug)]
pub(crate) struct PrivateTop {
    /// The layers that are mapped.
    mapped: Vec<Layer>,
    /// The layers of the last image.
    published: Vec<Layer>,
    /// Whether KVM's log is on.
    logging: bool,
    /// Whether the log and the devices' marks hold everything since the last image.
    complete: bool,
    /// Parts of the only layer that may hold nothing, and are still mapped from its file.
    holes: Vec<Span>,
}

impl Top {
    /// A fresh shared file under all of RAM.
    pub(crate) fn shared(ram: &GuestRam) -> Result<Top> {
        let file = Arc::new(memory_file("guest-memory", ram.size())?);
        ram.map_shared(&file)?;
        Ok(Top::Shared { file, from: 0 })
    }

    /// The layers of an image, copy-on-write.
    pub(crate) fn over(ram: &GuestRam, layers: &[Layer]) -> Result<Top> {
        image::activate(ram, layers)?;
        Ok(Top::Private(PrivateTop::new(layers.to_vec())))
    }

    /// Does what can be done before the pause.
    pub(crate) fn prepare(&mut self, ram: &GuestRam, vm: &Vm) -> Result<Delta> {
        if let Top::Shared { file, from } = self {
            turn_private(ram, file, from)?;
            let file = Arc::clone(file);
            let spans = few_data_spans(&*file, ram.size())?;
            let holes = gaps(&spans, ram.size());
            let layer = Layer::unsealed(file, spans);
            // Also the proof, before anything stands, that nobody else can write to the file.
            let sealed = layer.seal();
            let mut top = PrivateTop::new(vec![layer]);
            top.holes = holes;
            *self = Top::Private(top);
            sealed?;
        }
        match self {
            Top::Private(top) => top.copy_ahead(ram, vm),
            _ => Err(Error::invalid("it has no memory yet").tried("cut")),
        }
    }

    /// Fixes the content of the image. Processors are parked, devices quiet.
    pub(crate) fn freeze(&mut self, delta: &mut Delta, ram: &GuestRam, vm: &Vm) -> Result<()> {
        let Top::Private(top) = self else {
            return Err(Error::invalid("memory changed between plan and cut").tried("cut"));
        };
        delta.copy_rest(ram, vm)?;
        top.leave_holes(ram)
    }

    /// The layers of the frozen image, sealed. The machine runs again.
    pub(crate) fn publish(&mut self, delta: Delta) -> Result<Vec<Layer>> {
        let Top::Private(top) = self else {
            return Err(Error::invalid("memory was not frozen").tried("cut"));
        };
        top.published = delta.into_layers()?;
        top.complete = true;
        top.published.iter().try_for_each(Layer::seal)?;
        Ok(top.published.clone())
    }
}

/// Maps `file` privately under all of RAM, a part at a time: the host takes the old mapping of a
/// part down while it holds up everybody who touches new memory, which for all of RAM at once takes
/// as long as tens of milliseconds. `from` says how far it came.
fn turn_private(ram: &GuestRam, file: &OwnedFd, from: &mut u64) -> Result<()> {
    while *from < ram.size() {
        let len = HUGE_PAGE.min(ram.size() - *from);
        ram.map_private(*from, len, file)?;
        *from += len;
    }
    Ok(())
}

/// What lies between spans.
fn gaps(spans: &[Span], size: u64) -> Vec<Span> {
    let starts = spans.iter().map(|span| span.start).chain([size]);
    let ends = [0].into_iter().chain(spans.iter().map(Span::end));
    ends.zip(starts)
        .filter(|(end, start)| end < start)
        .map(|(start, end)| Span { start, len: end - start })
        .collect()
}

/// A layer in the making.
#[derive(Debug)]
pub(crate) struct Delta {
    file: OwnedFd,
    /// The layers below it in the image.
    below: Vec<Layer>,
    copied: PageSet,
    rest: PageSet,
    ram_bytes: u64,
}

impl PrivateTop {
    fn new(mapped: Vec<Layer>) -> PrivateTop {
        let published = mapped.clone();
        PrivateTop { mapped, published, logging: false, complete: false, holes: Vec::new() }
    }

    /// Maps anonymous memory where the file holds nothing, so that a page which is first written
    /// from now on costs no page of the file besides. Where the machine was in the meantime, the
    /// file got a page, and stays: what the machine wrote there lies over it.
    fn leave_holes(&mut self, ram: &GuestRam) -> Result<()> {
        for hole in std::mem::take(&mut self.holes) {
            let data = image::next_data(self.mapped[0].file(), hole.start)?;
            if data.is_none_or(|data| data >= hole.end()) {
                ram.map_anonymous(hole.start, hole.len)?;
            }
        }
        ram.keep_out_of_cores();
        Ok(())
    }

    fn copy_ahead(&mut self, ram: &GuestRam, vm: &Vm) -> Result<Delta> {
        let since_last = self.logging && self.complete && self.published.len() < DEPTH_MAX;
        // From here on a part of the log is in this cut only.
        self.complete = false;
        if !self.logging {
            vm.log_dirty(true)?;
            self.logging = true;
        }
        let mut pages = PageSet::new(ram.size());
        take_written(ram, vm, &mut pages)?;
        let below = if since_last {
            self.published.clone()
        } else {
            // What the log says so far is in the page tables as well.
            pages.clear();
            insert_private(ram, &mut pages)?;
            if self.mapped.len() < DEPTH_MAX {
                self.mapped.clone()
            } else {
                insert_covered(&self.mapped, ram.size(), &mut pages);
                Vec::new()
            }
        };
        let mut delta = Delta {
            file: memory_file("guest-memory-delta", ram.size())?,
            below,
            copied: PageSet::new(ram.size()),
            rest: PageSet::new(ram.size()),
            ram_bytes: ram.size(),
        };
        let mut last = u64::MAX;
        for _ in 0..ROUNDS_MAX {
            delta.copy(ram, &pages)?;
            pages.clear();
            take_written(ram, vm, &mut pages)?;
            let left = pages.len();
            // A guest that writes as fast as we copy gains nothing from more rounds.
            if left <= REST_PAGES || left > last / 4 * 3 {
                break;
            }
            last = left;
        }
        delta.rest = pages;
        Ok(delta)
    }
}

impl Delta {
    /// Bytes that are copied in the pause at least.
    pub(crate) fn rest_bytes(&self) -> u64 {
        self.rest.len() * PAGE
    }

    fn copy(&mut self, ram: &GuestRam, pages: &PageSet) -> Result<()> {
        for (first, count) in pages.runs() {
            // A set is a multiple of 64 pages long, RAM need not be.
            let start = first * PAGE;
            let end = ((first + count) * PAGE).min(ram.size());
            let mut at = start;
            while at < end {
                let from = ram.at_offset(at).as_ptr();
                let (fd, len) = (self.file.as_raw_fd(), index(end - at));
                let to = i64::try_from(at).map_err(|_| Error::invalid("offset too large"))?;
                // SAFETY: `len` bytes from `from` are inside RAM; the kernel copies them, so that
                // the guest may write at the same time.
                let n = unsafe { libc::pwrite(fd, from.cast(), len, to) };
                match u64::try_from(n) {
                    Ok(n) if n > 0 => at += n,
                    _ => {
                        let e = std::io::Error::last_os_error();
                        return Err(Error::from(e).tried("copy").on("guest memory"));
                    }
                }
            }
        }
        self.copied.insert_all(pages);
        Ok(())
    }

    fn copy_rest(&mut self, ram: &GuestRam, vm: &Vm) -> Result<()> {
        let mut rest = std::mem::replace(&mut self.rest, PageSet::new(0));
        take_written(ram, vm, &mut rest)?;
        self.copy(ram, &rest)
    }

    /// The layers of the image: those below and this one, if there is anything in it.
    fn into_layers(mut self) -> Result<Vec<Layer>> {
        let mut layers = std::mem::take(&mut self.below);
        if self.copied.is_empty() && !layers.is_empty() {
            return Ok(layers);
        }
        let spans = few_spans(&self.copied, self.ram_bytes);
        self.fill(&layers, &spans)?;
        layers.push(Layer::unsealed(Arc::new(self.file), spans));
        Ok(layers)
    }

    /// Gives the pages between the copied ones the content that the layers below have there, which
    /// is what the machine saw at the cut: it had not written them.
    fn fill(&self, below: &[Layer], spans: &[Span]) -> Result<()> {
        let pieces = resolve(below, self.ram_bytes);
        let mut buffer = vec![0; index(64 * PAGE)];
        for span in spans {
            let flags = rustix::fs::FallocateFlags::empty();
            rustix::fs::fallocate(&self.file, flags, span.start, span.len).map_err(|e| {
                Error::from(std::io::Error::from(e)).tried("fill").on("memory layer")
            })?;
            let (mut page, end) = (span.start / PAGE, span.end() / PAGE);
            while page < end {
                let gap = (page..end).take_while(|page| !self.copied.contains(*page)).count();
                let gap = Span { start: page * PAGE, len: wide(gap) * PAGE };
                self.copy_up(below, &pieces, gap, &mut buffer)?;
                page = gap.end() / PAGE + 1;
            }
        }
        Ok(())
    }

    fn copy_up(
        &self,
        below: &[Layer],
        pieces: &[Piece],
        gap: Span,
        buffer: &mut [u8],
    ) -> Result<()> {
        let first = pieces.partition_point(|piece| piece.span.end() <= gap.start);
        for piece in pieces[first..].iter().take_while(|piece| piece.span.start < gap.end()) {
            let Some(layer) = piece.layer else { continue };
            let (mut at, end) = (gap.start.max(piece.span.start), gap.end().min(piece.span.end()));
            while at < end {
                let part = &mut buffer[..index((end - at).min(64 * PAGE))];
                let copied = rustix::io::pread(below[layer].file(), &mut *part, at)
                    .and_then(|n| rustix::io::pwrite(&self.file, &part[..n], at));
                let n = copied.map_err(|e| Error::from(std::io::Error::from(e)))?;
                if n == 0 {
                    return Err(Error::corrupt("a memory layer ends early"));
                }
                at += wide(n);
            }
        }
        Ok(())
    }
}

/// Adds what processors and devices wrote since the last call.
fn take_written(ram: &GuestRam, vm: &Vm, into: &mut PageSet) -> Result<()> {
    vm.take_dirty(into)?;
    ram.device_dirty().take_into(into);
    Ok(())
}

/// Adds the pages that are the process's own, from its page tables.
fn insert_private(ram: &GuestRam, into: &mut PageSet) -> Result<()> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;
    let base = ram.at_offset(0).as_ptr() as u64 / PAGE;
    let pages = ram.size() / PAGE;
    let mut entries = vec![0; 64 << 10];
    let mut page = 0;
    while page < pages {
        let want = index((pages - page) * 8).min(entries.len());
        let n = rustix::io::pread(ram.page_tables(), &mut entries[..want], (base + page) * 8)
            .map_err(|e| Error::from(std::io::Error::from(e)).tried("read").on("page table"))?;
        if n < 8 {
            return Err(Error::corrupt("the page table ends early"));
        }
        for entry in entries[..n].chunks_exact(8) {
            let entry = u64::from_ne_bytes(entry.try_into().expect("8 bytes"));
            if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                into.insert(page);
            }
            page += 1;
        }
    }
    Ok(())
}

/// Adds the pages that any layer decides.
fn insert_covered(layers: &[Layer], ram_bytes: u64, into: &mut PageSet) {
    for piece in resolve(layers, ram_bytes).iter().filter(|piece| piece.layer.is_some()) {
        (piece.span.start / PAGE..piece.span.end() / PAGE).for_each(|page| into.insert(page));
    }
}

/// The pages as spans: exact if they are few, else with gaps filled until they are.
fn few_spans(pages: &PageSet, ram_bytes: u64) -> Vec<Span> {
    let mut granule = PAGE;
    loop {
        let mut spans: Vec<Span> = Vec::new();
        for (first, count) in pages.runs() {
            let start = first * PAGE / granule * granule;
            let end = ((first + count) * PAGE).next_multiple_of(granule).min(ram_bytes);
            match spans.last_mut() {
                Some(last) if last.end() >= start => last.len = end - last.start,
                _ => spans.push(Span { start, len: end - start }),
            }
        }
        if spans.len() <= SPANS_MAX || granule >= HUGE_PAGE {
            return spans;
        }
        granule *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_pages_become_few_spans_that_hold_them_all() {
        let bytes = 64 * HUGE_PAGE;
        let mut pages = PageSet::new(bytes);
        (0..bytes / PAGE).step_by(7).for_each(|page| pages.insert(page));
        let spans = few_spans(&pages, bytes);
        assert!(spans.len() <= SPANS_MAX, "{}", spans.len());
        let held = |page: u64| {
            spans.iter().any(|s| s.start <= page * PAGE && (page + 1) * PAGE <= s.end())
        };
        assert!((0..bytes / PAGE).step_by(7).all(held));
        let mut few = PageSet::new(bytes);
        few.insert(3);
        few.insert(9);
        let exact = few_spans(&few, bytes);
        assert_eq!(exact, [3, 9].map(|page| Span { start: page * PAGE, len: PAGE }));
    }

    #[test]
    fn gaps_and_spans_are_all_of_memory() {
        let span = |start, len| Span { start, len };
        assert_eq!(gaps(&[], 10), [span(0, 10)]);
        assert_eq!(gaps(&[span(0, 10)], 10), []);
        assert_eq!(gaps(&[span(2, 3), span(7, 1)], 10), [span(0, 2), span(5, 2), span(8, 2)]);
        assert_eq!(gaps(&[span(0, 3), span(3, 1)], 4), []);
    }

    #[test]
    fn only_written_pages_are_private() {
        let ram = GuestRam::reserve(32 * PAGE).unwrap();
        let file = memory_file("test", ram.size()).unwrap();
        rustix::io::pwrite(&file, &vec![1; index(16 * PAGE)], 0).unwrap();
        let layer = Layer::unsealed(Arc::new(file), vec![Span { start: 0, len: 16 * PAGE }]);
        image::activate(&ram, &[layer]).unwrap();
        let mut byte = [0];
        ram.read(crate::memory::Gpa(4 * PAGE), &mut byte).unwrap();
        for page in [2, 15, 20] {
            ram.write(crate::memory::Gpa(page * PAGE), &[9]).unwrap();
        }
        let mut found = PageSet::new(ram.size());
        insert_private(&ram, &mut found).unwrap();
        assert_eq!(found.runs().collect::<Vec<_>>(), [(2, 1), (15, 1), (20, 1)]);
    }
}
