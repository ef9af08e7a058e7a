//! The NBD server against clients that ask for everything it offers, that make mistakes, that lie,
//! that wait, and that die: each gets the answer of the protocol, and only its own connection
//! suffers.

// Offsets on small disks, and bytes made from numbers.
#![allow(clippy::cast_possible_truncation)]

mod haggling;
mod map;
mod requests;
mod stop;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use blockd::nbd::wire::{Style, command as c};
use blockd::nbd::{BlockStatus, Export, Extent, ServerOptions, Visit};
use format::{Error, Kind, Result};
use offshoot_tests::nbd::{PATIENCE, Served};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

/// Memory that is served, with writes that can be held, and errors that can be asked for.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// Offset at which writes wait, if any.
    held: Mutex<Option<u64>>,
    released: Condvar,
    waiting: AtomicU64,
    flushes: AtomicU64,
    /// How long a flush takes, in microseconds.
    flush_us: AtomicU64,
    /// Threads that flushed, one after the other.
    flushed_by: Mutex<Vec<thread::ThreadId>>,
    fail: Mutex<Option<Kind>>,
    read_only: bool,
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Memory { bytes: Mutex::new(vec![0; SIZE as usize]), ..Memory::default() })
    }

    fn hold(&self, at: Option<u64>) {
        *self.held.lock().unwrap() = at;
        self.released.notify_all();
    }

    fn wait_for_held(&self, count: u64) {
        let begun = Instant::now();
        while self.waiting.load(Ordering::SeqCst) < count {
            assert!(begun.elapsed() < PATIENCE, "fewer than {count} writes arrived");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn outcome(&self) -> Result<()> {
        let kind = *self.fail.lock().unwrap();
        kind.map_or(Ok(()), |kind| Err(Error::new(kind, "asked for by the test")))
    }
}

impl Export for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn description(&self) -> String {
        String::new()
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.outcome()?;
        let at = offset as usize;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, buf: &[u8], fua: bool) -> Result<()> {
        self.outcome()?;
        let mut held = self.held.lock().unwrap();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        while *held == Some(offset) {
            held = self.released.wait(held).unwrap();
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        drop(held);
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + buf.len()].copy_from_slice(buf);
        if fua { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.flushed_by.lock().unwrap().push(thread::current().id());
        thread::sleep(Duration::from_micros(self.flush_us.load(Ordering::SeqCst)));
        self.outcome()
    }

    fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        self.write_zeroes(offset, len, true, fua)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool, fua: bool) -> Result<()> {
        self.write(offset, &vec![0; len as usize], fua)
    }

    fn zeroes_fast(&self, _: u64, _: u64, unmap: bool) -> bool {
        unmap
    }

    fn allocation(&self, _: u64, len: u64, visit: &mut Visit<'_>) -> Result<()> {
        let _: ControlFlow<()> = visit(Extent { len, flags: 0 });
        Ok(())
    }

    fn ancestors(&self) -> Vec<String> {
        Vec::new()
    }

    fn changed_since(&self, _: &str) -> Result<Arc<dyn BlockStatus>> {
        Err(Error::new(Kind::NotFound, "no ancestors"))
    }
}

fn serve(export: Arc<dyn Export>) -> Served {
    Served::new(vec![export], ServerOptions::default())
}

/// The server still serves: a fresh client reads.
fn assert_serves(served: &Served) {
    let mut client = served.transmitting("memory", Style::Structured);
    assert_eq!(client.errno((c::READ, 0), (0, 4096), &[]), 0);
}

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];
