//! The host's end of the serial line: a Unix socket to attach to and detach from.
//!
//! What the guest prints goes to a buffer of [`HISTORY`] bytes, and from there to whoever is
//! attached; a new listener first gets what the buffer still has. A vCPU thread only ever puts a
//! byte into the buffer: a guest that floods its console fills no memory and waits for nobody, and
//! a listener that is too slow misses bytes and is told how many. Nothing is written to disk.
//!
//! One listener at a time; a new one takes over.
//!
//! Lock order: the serial port, then the buffer. The console's thread never has both.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use format::{Context, Result};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use vhost_blk::event::EventFd;

/// Bytes of output that are kept.
pub const HISTORY: usize = 64 << 10;
/// Bytes of input that wait for the guest; whoever types more waits.
const INPUT: usize = 4 << 10;

/// Output of the guest, the newest [`HISTORY`] bytes.
pub(super) struct Output {
    state: Mutex<History>,
    /// Rung when there is something for the console's thread.
    wake: EventFd,
    /// Whether the thread waits for output.
    wanted: AtomicBool,
}

struct History {
    bytes: Vec<u8>,
    /// Bytes ever printed.
    total: u64,
}

impl Output {
    pub(super) fn new() -> Result<Output> {
        let state = Mutex::new(History { bytes: Vec::new(), total: 0 });
        Ok(Output { state, wake: EventFd::new()?, wanted: AtomicBool::new(false) })
    }

    /// Takes one byte from the guest.
    pub(super) fn put(&self, byte: u8) {
        self.state.lock().put(byte);
        // Pairs with the store in `Console::serve`, which looks at the buffer once more after it.
        if self.wanted.swap(false, Ordering::SeqCst) {
            self.wake.signal();
        }
    }

    /// Has the console's thread look at everything again.
    pub(super) fn wake(&self) {
        self.wake.signal();
    }

    /// Everything that is kept.
    pub(super) fn history(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.state.lock().read(0, HISTORY, &mut bytes);
        bytes
    }

    /// Bytes ever printed.
    pub(super) fn total(&self) -> u64 {
        self.state.lock().total
    }
}

impl History {
    fn put(&mut self, byte: u8) {
        if self.bytes.len() < HISTORY {
            self.bytes.push(byte);
        } else {
            let at = self.total % HISTORY as u64;
            self.bytes[usize::try_from(at).unwrap_or(0)] = byte;
        }
        self.total += 1;
    }

    /// Appends up to `most` bytes from position `from`, or from the oldest that is kept; returns
    /// how many were missed and the position after the last one.
    fn read(&self, from: u64, most: usize, into: &mut Vec<u8>) -> (u64, u64) {
        let oldest = self.total - self.bytes.len() as u64;
        let start = from.max(oldest);
        let end = self.total.min(start + most as u64);
        into.extend(
            (start..end).map(|at| self.bytes[usize::try_from(at % HISTORY as u64).unwrap_or(0)]),
        );
        (start - from, end)
    }
}

/// Takes typed bytes for the guest; returns how many had room.
pub(super) type Typed = Box<dyn Fn(&[u8]) -> usize + Send>;

/// The socket and its thread. Dropping it ends both.
pub(super) struct Console {
    output: Arc<Output>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl Console {
    /// Listens at `path`, where nothing must be.
    pub(super) fn listen(path: &Path, output: &Arc<Output>, typed: Typed) -> Result<Console> {
        let listener = UnixListener::bind(path)
            .and_then(|l| l.set_nonblocking(true).map(|()| l))
            .context("listen for consoles at", || path.display().to_string())?;
        let ending = Arc::new(AtomicBool::new(false));
        let server = Server {
            listener,
            output: output.clone(),
            ending: ending.clone(),
            typed,
            listening: None,
            input: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || server.serve())
            .context("start a thread for", || "the console".to_owned())?;
        let (output, path) = (output.clone(), path.to_owned());
        Ok(Console { output, ending, thread: Some(thread), path })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release); // pairs with the load in `serve`
        self.output.wake();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked said so; there is nothing to add.
            let _ = thread.join();
        }
        // It is the machine's own folder; what stays there goes with it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whoever is attached.
struct Attached {
    stream: UnixStream,
    /// Position in the output up to which it was sent, and what of that the socket did not take.
    position: u64,
    unsent: Vec<u8>,
}

struct Server {
    listener: UnixListener,
    output: Arc<Output>,
    ending: Arc<AtomicBool>,
    typed: Typed,
    listening: Option<Attached>,
    /// Typed, and not taken by the guest yet.
    input: Vec<u8>,
}

impl Server {
    fn serve(mut self) {
        // Pairs with the store in `Console::drop`.
        while !self.ending.load(Ordering::Acquire) {
            self.accept();
            if !self.receive() || !self.send() {
                self.listening = None;
            }
            self.pass_on();
            // Pairs with the swap in `Output::put`: a byte that came before the store is seen by
            // the look after it, and a later one rings.
            self.output.wanted.store(self.listening.is_some(), Ordering::SeqCst);
            if !self.has_output() {
                self.sleep();
            }
            self.output.wake.drain();
        }
    }

    fn has_output(&self) -> bool {
        self.listening
            .as_ref()
            .is_some_and(|a| a.unsent.is_empty() && a.position < self.output.total())
    }

    fn sleep(&self) {
        let (wake, listener) = (self.output.wake.as_fd(), self.listener.as_fd());
        let (stream, wish) = match &self.listening {
            None => (wake, PollFlags::empty()),
            Some(a) => {
                let mut wish = PollFlags::empty();
                wish.set(PollFlags::OUT, !a.unsent.is_empty());
                wish.set(PollFlags::IN, self.input.len() < INPUT);
                (a.stream.as_fd(), wish)
            }
        };
        let mut fds = [
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
            PollFd::from_borrowed_fd(listener, PollFlags::IN),
            PollFd::from_borrowed_fd(stream, wish),
        ];
        // An interrupted call is a wake-up for nothing.
        let _ = poll(&mut fds, None);
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                // What the one before typed to the end reaches the guest, whoever takes over.
                self.receive();
                self.listening = Some(Attached { stream, position: 0, unsent: Vec::new() });
            }
        }
    }

    /// Sends what there is; `false` when the listener is gone.
    fn send(&mut self) -> bool {
        let Some(attached) = &mut self.listening else { return true };
        loop {
            if attached.unsent.is_empty() {
                let from = attached.position;
                let mut bytes = Vec::new();
                let (missed, position) = self.output.state.lock().read(from, 4096, &mut bytes);
                if bytes.is_empty() {
                    return true;
                }
                // A listener that has just come has missed nothing that it was there for.
                if missed > 0 && from > 0 {
                    attached.unsent = format!("\r\n[{missed} bytes missed]\r\n").into_bytes();
                }
                attached.unsent.extend(bytes);
                attached.position = position;
            }
            match attached.stream.write(&attached.unsent) {
                Ok(0) => return false,
                Ok(n) => drop(attached.unsent.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    /// Takes what was typed, as far as there is room; `false` when the listener is gone.
    fn receive(&mut self) -> bool {
        let Some(attached) = &mut self.listening else { return true };
        let mut bytes = [0; 512];
        while self.input.len() < INPUT {
            match attached.stream.read(&mut bytes) {
                Ok(0) => return false,
                Ok(n) => self.input.extend_from_slice(&bytes[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Gives the guest what was typed, also by somebody who is gone.
    fn pass_on(&mut self) {
        if !self.input.is_empty() {
            let taken = (self.typed)(&self.input);
            self.input.drain(..taken);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_bytes_are_kept_and_the_missed_ones_counted() {
        let mut history = History { bytes: Vec::new(), total: 0 };
        let printed: Vec<u8> = (0..=250).cycle().take(HISTORY + 1000).collect();
        printed.iter().for_each(|b| history.put(*b));
        let mut seen = Vec::new();
        assert_eq!(history.read(600, 10, &mut seen), (400, 1010));
        assert_eq!(seen, printed[1000..1010]);
        seen.clear();
        let end = printed.len() as u64;
        assert_eq!(history.read(end - 5, HISTORY, &mut seen), (0, end));
        assert_eq!(seen, printed[printed.len() - 5..]);
        assert_eq!(history.bytes.len(), HISTORY);
    }
}
