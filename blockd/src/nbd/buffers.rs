//! Memory of a connection: page-aligned buffers, used again, within a bound.
//!
//! Invariant: the buffers that a connection has out at one time take at most `bytes_max` in all, or
//! are one buffer. Who asks for more waits until others are given back.

use std::ops::{Deref, DerefMut};

use parking_lot::{Condvar, Mutex};

use crate::store::buf::AlignedBuf;

/// Sizes that are kept for the next request; larger buffers are given back to the system.
const CLASSES: [usize; 3] = [64 << 10, 1 << 20, 4 << 20];
/// Buffers of each class that are kept.
const KEPT_MAX: [usize; CLASSES.len()] = [16, 8, 2];

#[derive(Default)]
struct State {
    out: usize,
    kept: [Vec<AlignedBuf>; CLASSES.len()],
}

/// The buffers of one connection.
pub struct Buffers {
    bytes_max: usize,
    state: Mutex<State>,
    given_back: Condvar,
}

/// A buffer; goes back when dropped. Its content is whatever the last user left.
pub struct Buffer<'a> {
    from: &'a Buffers,
    buf: AlignedBuf,
    len: usize,
}

impl Buffers {
    pub fn new(bytes_max: usize) -> Self {
        Buffers { bytes_max, state: Mutex::default(), given_back: Condvar::new() }
    }

    /// A buffer of `len` bytes; waits while the connection has too much out.
    pub fn take(&self, len: usize) -> Buffer<'_> {
        let class = CLASSES.iter().position(|&size| len <= size);
        let size = class.map_or(len, |c| CLASSES[c]);
        let mut state = self.state.lock();
        while state.out > 0 && state.out + size > self.bytes_max {
            self.given_back.wait(&mut state);
        }
        state.out += size;
        let kept = class.and_then(|c| state.kept[c].pop());
        drop(state);
        let buf = kept.unwrap_or_else(|| AlignedBuf::zeroed(size));
        Buffer { from: self, buf, len }
    }
}

impl Deref for Buffer<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buf[..self.len]
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buf[..self.len]
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let size = self.buf.len();
        let buf = std::mem::replace(&mut self.buf, AlignedBuf::zeroed(0));
        let mut state = self.from.state.lock();
        state.out -= size;
        if let Some(class) = CLASSES.iter().position(|&c| c == size)
            && state.kept[class].len() < KEPT_MAX[class]
        {
            state.kept[class].push(buf);
        }
        drop(state);
        self.from.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn who_asks_for_too_much_waits() {
        let buffers = Buffers::new(2 << 20);
        let first = buffers.take(3 << 20);
        std::thread::scope(|s| {
            let second = s.spawn(|| buffers.take(512).len());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!second.is_finished());

            drop(first);

            assert_eq!(second.join().unwrap(), 512);
        });
        assert_eq!(buffers.state.lock().out, 0);
    }
}
