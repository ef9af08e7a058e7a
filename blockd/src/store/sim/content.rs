//! The bytes of one simulated file.

use std::sync::Arc;

use super::super::{range_end, to_usize};
use super::pages::{PAGE, Page, Pages, digest};

/// Length, pages and permission of one file. Cloning is cheap. Pages that were never written, or
/// were punched, read as zeroes and take no space.
#[derive(Debug, Clone, Default)]
pub struct Content {
    len: u64,
    pages: Pages,
    read_only: bool,
}

impl PartialEq for Content {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint() == other.fingerprint()
    }
}

impl Eq for Content {}

/// A part of a range that lies in one page: page number, first byte in it, length.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let start = to_usize(at % PAGE as u64);
        let take = (PAGE - start).min(len - done);
        done += take;
        (take > 0).then_some((at / PAGE as u64, start, take))
    })
}

impl Content {
    /// A file that holds `bytes`.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut content = Content::default();
        content.write(0, bytes);
        content
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a length of zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the pages that are present.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.pages.count() * PAGE as u64
    }

    /// The next range of present pages from byte `from` on: first byte, and the byte behind the
    /// last.
    #[must_use]
    pub fn next_data(&self, from: u64) -> Option<(u64, u64)> {
        let page = PAGE as u64;
        let first = self.pages.first_from(from / page)?;
        let mut end = first + 1;
        while self.pages.get(end).is_some() {
            end += 1;
        }
        let range = (from.max(first * page), self.len.min(end * page));
        (range.0 < range.1).then_some(range)
    }

    /// True when the permission bits forbid writing.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The bytes of a range; fewer than `len` where the file ends.
    #[must_use]
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let there = self.len.saturating_sub(offset).min(len as u64);
        let mut bytes = vec![0; to_usize(there)];
        self.copy_to(offset, &mut bytes);
        bytes
    }

    /// Fills `out`; false, with `out` untouched, when the file ends before that.
    pub(super) fn read_exact(&self, offset: u64, out: &mut [u8]) -> bool {
        let inside = range_end(offset, out.len() as u64).is_ok_and(|end| end <= self.len);
        if inside {
            self.copy_to(offset, out);
        }
        inside || out.is_empty()
    }

    fn copy_to(&self, offset: u64, out: &mut [u8]) {
        let mut rest = out;
        for (number, start, take) in pieces(offset, rest.len()) {
            let (piece, after) = rest.split_at_mut(take);
            match self.pages.get(number) {
                Some(page) => piece.copy_from_slice(&page.bytes()[start..start + take]),
                None => piece.fill(0),
            }
            rest = after;
        }
    }

    /// Writes, growing the file where needed.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let mut rest = data;
        for (number, start, take) in pieces(offset, data.len()) {
            let (piece, after) = rest.split_at(take);
            match <&[u8; PAGE]>::try_from(piece) {
                Ok(whole) => self.pages.set(number, Page::new(whole)),
                Err(_) => self.pages.change(number)[start..start + take].copy_from_slice(piece),
            }
            rest = after;
        }
        if !data.is_empty() {
            self.len = self.len.max(offset + data.len() as u64);
        }
    }

    /// [`Content::write`] with the whole pages made before, so that many contents share them.
    pub(super) fn write_shared(&mut self, offset: u64, data: &[u8], whole: &[Arc<Page>]) {
        let Some(first) = whole_start(offset, data.len()) else { return self.write(offset, data) };
        let end = first + whole.len() * PAGE;
        self.write(offset, &data[..first]);
        let number = (offset + first as u64) / PAGE as u64;
        for (number, page) in (number..).zip(whole) {
            self.pages.set(number, Arc::clone(page));
        }
        self.len = self.len.max(offset + end as u64);
        self.write(offset + end as u64, &data[end..]);
    }

    /// Grows with zeroes or cuts.
    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len);
        }
        self.len = len;
    }

    /// Zeroes a range, giving back whole pages. The length stays.
    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        if offset < end {
            self.zero(offset, end);
        }
    }

    /// `end` at or past the length stands for the end of the last page.
    fn zero(&mut self, start: u64, end: u64) {
        let page = PAGE as u64;
        let end = if end >= self.len { end.next_multiple_of(page) } else { end };
        let whole = start.div_ceil(page)..end / page;
        self.pages.remove(whole.clone());
        if whole.start > whole.end {
            self.zero_part(start, to_usize(end - start));
        } else {
            self.zero_part(start, to_usize(whole.start * page - start));
            self.zero_part(whole.end * page, to_usize(end - whole.end * page));
        }
    }

    fn zero_part(&mut self, offset: u64, len: usize) {
        for (number, start, take) in pieces(offset, len) {
            if self.pages.get(number).is_some() {
                self.pages.change(number)[start..start + take].fill(0);
            }
        }
    }

    pub(super) fn set_read_only(&mut self, read_only: bool) {
        self.read_only = read_only;
    }

    /// True when a page takes space.
    pub(super) fn has_page(&self, number: u64) -> bool {
        self.pages.get(number).is_some()
    }

    /// Equal for files with equal length, bytes, holes and permission, and only then (as far as 128
    /// bits of a strong hash go).
    #[must_use]
    pub fn fingerprint(&self) -> u128 {
        let len = self.len.to_le_bytes();
        let pages = self.pages.fingerprint().to_le_bytes();
        digest([len.as_slice(), &pages, &[u8::from(self.read_only)]])
    }
}

/// Where in a write its whole pages begin, if it has any.
fn whole_start(offset: u64, len: usize) -> Option<usize> {
    let first = to_usize(offset.next_multiple_of(PAGE as u64) - offset);
    (len >= first + PAGE).then_some(first)
}

/// The whole pages of a write, for [`Content::write_shared`].
pub(super) fn whole_pages(offset: u64, data: &[u8]) -> Vec<Arc<Page>> {
    match whole_start(offset, data.len()) {
        Some(first) => data[first..].as_chunks::<PAGE>().0.iter().map(Page::new).collect(),
        None => Vec::new(),
    }
}
