//! The process that `two_crash_domains` kills: opens a disk as a daemon does for living clients,
//! and writes, discards and flushes from several threads until it dies, telling its standard output
//! what it is about to do and what is done.

use std::io::Write;
use std::path::PathBuf;

use blockd::disk::{Disk, Options};
use blockd::segment::file_name;
use blockd::store::file::{FileStore, FileStoreOptions};
use blockd::store::{Access, Store};
use format::Result;
use offshoot_tests::pattern::{SECTOR, bytes};
use offshoot_tests::rng::Rng;
use offshoot_tests::sim::ByName;
use offshoot_tests::wire::{Kind, Message};
use uuid::Uuid;

/// The command line, in this order.
struct Arguments {
    store: PathBuf,
    tails: PathBuf,
    segment: Uuid,
    boot: Uuid,
    seed: u64,
    threads: u64,
    /// Sectors that one thread owns in a row.
    grain: u64,
    first_tag: u32,
}

fn arguments() -> Option<Arguments> {
    let mut words = std::env::args().skip(1);
    let mut next = || words.next();
    Some(Arguments {
        store: next()?.into(),
        tails: next()?.into(),
        segment: next()?.parse().ok()?,
        boot: next()?.parse().ok()?,
        seed: next()?.parse().ok()?,
        threads: next()?.parse().ok()?,
        grain: next()?.parse().ok()?,
        first_tag: next()?.parse().ok()?,
    })
}

/// Tells the test; who cannot tell has been left alone and ends.
fn tell(message: Message) {
    let mut out = std::io::stdout().lock();
    if message.send(&mut out).is_err() {
        std::process::exit(0);
    }
}

fn work(disk: &Disk, a: &Arguments, thread: u64) -> Result<()> {
    let mut rng = Rng::new(a.seed ^ thread << 32);
    let lane = usize::try_from(thread).unwrap_or(0);
    let sectors = disk.size() / SECTOR as u64;
    let mut tag = a.first_tag + u32::try_from(thread).unwrap_or(0);
    loop {
        let row = rng.below(sectors / a.grain / a.threads) * a.threads + thread;
        let first = row * a.grain + rng.below(a.grain);
        let count = 1 + rng.below((row + 1) * a.grain - first);
        let kind = match rng.below(20) {
            0..=3 => Kind::Discard,
            4 => Kind::Flush,
            _ => Kind::Write,
        };
        let id = u32::try_from(thread).unwrap_or(0);
        let message = Message { kind, done: false, thread: id, first, count, tag };
        tell(message);
        match kind {
            Kind::Write => disk.write(lane, first * SECTOR as u64, &bytes(tag, first, count))?,
            Kind::Discard => disk.discard(lane, first * SECTOR as u64, count * SECTOR as u64)?,
            Kind::Flush => disk.flush()?,
            Kind::Opened => {}
        }
        tell(Message { done: true, ..message });
        tag += u32::try_from(a.threads).unwrap_or(1);
    }
}

fn run(a: &Arguments) -> Result<()> {
    let store = FileStore::open(&a.store, FileStoreOptions::default())?;
    let options = Options {
        lanes: usize::try_from(a.threads).unwrap_or(1),
        tail_dir: Some(a.tails.clone()),
        live: true,
        boot: a.boot,
        ..Options::default()
    };
    let file = store.open(&file_name(a.segment), Access::Write)?;
    let disk = Disk::open(file, &ByName(&store), &options)?;
    let opened = Message { kind: Kind::Opened, done: true, thread: 0, first: 0, count: 0, tag: 0 };
    tell(opened);
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..a.threads)
            .map(|thread| {
                scope.spawn({
                    let disk = &disk;
                    move || work(disk, a, thread)
                })
            })
            .collect();
        started.into_iter().try_for_each(|t| t.join().expect("no panic"))
    })
}

fn main() {
    let Some(arguments) = arguments() else {
        eprintln!("usage: live_writer STORE TAILS SEGMENT BOOT SEED THREADS GRAIN FIRST-TAG");
        std::process::exit(2);
    };
    if let Err(e) = run(&arguments) {
        let _ = writeln!(std::io::stderr(), "{e}");
        std::process::exit(1);
    }
}
