//! The two crash domains, with real processes and real files.
//!
//! - A process that is killed while its clients live loses nothing that it completed: a writer is
//!   killed at random moments, and every operation that it acknowledged is there.
//! - After a power cut (here: a restarted host, which has another boot and no tail) everything up
//!   to the last completed flush is there.
//! - A tail that should be there and is not is an error by name, never silence.
//!
//! The power cut itself, with what it does to files, is simulated: `crash_points`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blockd::disk::problem::What;
use blockd::disk::tail::path_in;
use blockd::disk::{Disk, Options};
use blockd::segment::file_name;
use blockd::store::file::{FileStore, FileStoreOptions};
use blockd::store::{Access, Store};
use format::{Kind as ErrorKind, Result};
use offshoot_tests::inspect::{Content, contents};
use offshoot_tests::kill::memory_dir;
use offshoot_tests::model::{Action, Contents, History, Model, View};
use offshoot_tests::pattern::{SECTOR, bytes};
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::sim::{BLOCK, ByName, EXTENT, create};
use offshoot_tests::wire::{Kind, Message};
use tempfile::TempDir;
use uuid::Uuid;

/// Small enough that everything is written over again and again.
const SECTORS: u64 = 60 * EXTENT;
const SEGMENT: Uuid = Uuid::from_u128(7);
const BOOT: Uuid = Uuid::from_u128(8);
/// How long more kills may go on until enough was acknowledged.
const LIMIT: Duration = Duration::from_secs(120);

/// A folder with one disk, and one for tails.
struct Place {
    dir: TempDir,
    tails: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let place = Place { dir, tails: memory_dir() };
        create(&place.store(), SEGMENT, SECTORS, None).unwrap();
        place
    }

    fn store(&self) -> FileStore {
        FileStore::open(self.dir.path(), FileStoreOptions::default()).unwrap()
    }

    fn tail(&self) -> PathBuf {
        path_in(self.tails.path(), SEGMENT)
    }

    fn live(&self) -> Options {
        let tail_dir = Some(self.tails.path().to_owned());
        Options { lanes: 4, live: true, tail_dir, boot: BOOT, ..Options::default() }
    }

    fn open(&self, options: &Options) -> Result<Disk> {
        let store = self.store();
        let file = store.open(&file_name(SEGMENT), Access::Write)?;
        Disk::open(file, &ByName(&store), options)
    }

    fn writer(&self, seed: u64, first_tag: u32) -> Child {
        let mut rng = Rng::new(seed);
        let grain = [1, 3, BLOCK, EXTENT][usize::try_from(rng.below(4)).unwrap()];
        let arg = |path: &Path| path.to_str().expect("a path of ours").to_owned();
        Command::new(env!("CARGO_BIN_EXE_live_writer"))
            .args([arg(self.dir.path()), arg(self.tails.path())])
            .args([SEGMENT.to_string(), BOOT.to_string(), seed.to_string()])
            .args([(1 + rng.below(4)).to_string(), grain.to_string(), first_tag.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

/// Everything a writer says until it dies, killed `after` so long (from its start, or from when the
/// disk is open).
fn watch(mut writer: Child, from_start: bool, after: Duration) -> Vec<Message> {
    let mut pipe = writer.stdout.take().expect("a pipe");
    let (opened, wait) = std::sync::mpsc::channel();
    let listener = std::thread::spawn(move || {
        let mut heard = Vec::new();
        while let Some(message) = Message::receive(&mut pipe).unwrap() {
            if message.kind == Kind::Opened {
                // Nobody waits for it when the writer was killed from its start.
                let _ = opened.send(());
            }
            heard.push(message);
        }
        let mut rest = Vec::new();
        pipe.read_to_end(&mut rest).unwrap();
        heard
    });
    if !from_start {
        wait.recv().expect("the writer opened the disk");
    }
    std::thread::sleep(after);
    writer.kill().unwrap();
    let status = writer.wait().unwrap();
    assert_eq!(status.code(), None, "the writer ended by itself");
    listener.join().unwrap()
}

/// The record that the messages make. Log positions are events.
fn history(base: Contents, messages: &[Message]) -> History {
    let mut history = History::new(base, SECTORS);
    let mut open: Vec<(u32, usize)> = Vec::new();
    let mut clock = 0;
    for message in messages.iter().filter(|m| m.kind != Kind::Opened) {
        clock += 1;
        if message.done {
            let at = open.iter().position(|(thread, _)| *thread == message.thread);
            let (_, place) = open.swap_remove(at.expect("it was begun"));
            history.end(place, true, clock);
        } else {
            open.push((message.thread, history.start(message.action(), clock)));
        }
    }
    history
}

fn check(disk: &Disk, model: &Model, view: View) -> Contents {
    // A kill between the two pairs of superblock copies leaves one pair behind.
    let bad = disk.problems.iter().find(|p| p.what != What::SuperblockCopy);
    assert!(bad.is_none(), "{bad:?}");
    let tags = contents(disk).unwrap_or_else(|v| panic!("{v}"));
    let content = Content { sectors: disk.size() / SECTOR as u64, seal: 0, tags };
    let checked = content.check(model.sectors(), &model.allowed(view));
    checked.unwrap_or_else(|v| panic!("{v}"));
    content.tags
}

/// The writer is killed, what it acknowledged is checked, and the next writer goes on from there.
#[test]
fn a_killed_process_loses_nothing_that_it_acknowledged() {
    let (place, first) = (Place::new(), seed(1));
    let (mut known, mut acknowledged) = (Contents::new(), 0);
    let (kills, mut deadline) = (if soak() { 250 } else { 24 }, None);
    for seed in first.. {
        if seed >= first + kills {
            if acknowledged > 1000 {
                break;
            }
            // A starved machine acknowledges less before each kill, and is killed more often.
            let end = *deadline.get_or_insert_with(|| Instant::now() + LIMIT);
            assert!(Instant::now() < end, "only {acknowledged} operations were acknowledged");
        }
        let mut rng = Rng::new(seed);
        // Some die while they open the disk, most while they work.
        let early = rng.one_in(5);
        let after = Duration::from_micros(rng.below(if early { 12_000 } else { 60_000 }));
        let tag = u32::try_from(seed - first + 1).unwrap() * 4_000_000;
        let messages = watch(place.writer(seed, tag), early, after);
        acknowledged += messages.iter().filter(|m| m.done).count();
        let model = Model::new(history(known, &messages));

        let disk =
            place.open(&place.live()).unwrap_or_else(|e| panic!("OFFSHOOT_SEED={seed}: {e}"));
        eprintln!("kill {seed}: {} messages", messages.len());
        known = check(&disk, &model, View::Kill(u64::MAX));
        if rng.one_in(3) {
            disk.close().unwrap();
        }
    }
}

/// The host is started again after the kill: no tail, another boot.
#[test]
fn a_restarted_host_has_what_was_flushed() {
    let first = seed(1);
    for seed in first..first + if soak() { 40 } else { 4 } {
        let place = Place::new();
        let messages = watch(place.writer(seed, 1), false, Duration::from_millis(40));
        let model = Model::new(history(Contents::new(), &messages));
        std::fs::remove_file(place.tail()).unwrap();

        let options = Options { boot: Uuid::from_u128(9), ..place.live() };
        let disk = place.open(&options).unwrap();

        check(&disk, &model, View::PowerCut(usize::MAX));
    }
}

/// A disk with a flushed and an unflushed write, left as a killed process leaves it.
fn killed() -> (Place, Model) {
    let place = Place::new();
    let disk = place.open(&place.live()).unwrap();
    let mut history = History::new(Contents::new(), SECTORS);
    let write = |history: &mut History, first: u64, tag: u32| {
        let at = history.start(Action::Write(first, BLOCK, tag), 0);
        disk.write(0, first * SECTOR as u64, &bytes(tag, first, BLOCK)).unwrap();
        history.end(at, true, 0);
    };
    write(&mut history, 0, 1);
    let at = history.start(Action::Flush, 0);
    disk.flush().unwrap();
    history.end(at, true, 0);
    write(&mut history, EXTENT, 2);
    drop(disk);
    (place, Model::new(history))
}

#[test]
fn a_missing_tail_is_an_error_until_its_loss_is_accepted() {
    let (place, model) = killed();
    std::fs::remove_file(place.tail()).unwrap();

    let error = place.open(&place.live()).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::TailLost, "{error}");
    let nowhere = Options { tail_dir: None, live: false, ..place.live() };
    assert_eq!(place.open(&nowhere).err().expect("refused").kind(), ErrorKind::TailLost);
    let store = place.store();
    let file = store.open(&file_name(SEGMENT), Access::Read).unwrap();
    let reading = Disk::open_read_only(file, &ByName(&store), &place.live());
    assert_eq!(reading.err().expect("refused").kind(), ErrorKind::TailLost);

    let accepting = Options { accept_lost_tail: true, ..place.live() };
    let disk = place.open(&accepting).unwrap();
    let found = check(&disk, &model, View::PowerCut(usize::MAX));
    assert_eq!(found.get(&0), Some(&1), "what was flushed");
    assert_eq!(found.get(&EXTENT), None, "what only the tail knew");
    disk.close().unwrap();
    place.open(&place.live()).unwrap().close().unwrap();
}

#[test]
fn whoever_opens_next_replays_the_tail() {
    let (place, model) = killed();

    let store = place.store();
    let file = store.open(&file_name(SEGMENT), Access::Read).unwrap();
    let reading = Disk::open_read_only(file, &ByName(&store), &place.live()).unwrap();
    check(&reading, &model, View::Kill(u64::MAX));
    drop(reading);

    // A command line, which keeps no tail of its own, and is killed too.
    let command_line = Options { live: false, ..place.live() };
    for _ in 0..2 {
        let disk = place.open(&command_line).unwrap();
        check(&disk, &model, View::Kill(u64::MAX));
    }
    place.open(&command_line).unwrap().close().unwrap();
    assert!(!place.tail().exists());
    check(&place.open(&place.live()).unwrap(), &model, View::Kill(u64::MAX));
}

/// A tail that outlived its boot lies on a disk, not in memory: its records may name data that the
/// power cut took.
#[test]
fn a_tail_of_another_boot_is_not_believed() {
    let (place, model) = killed();
    assert!(place.tail().exists());

    let options = Options { boot: Uuid::from_u128(9), ..place.live() };
    let disk = place.open(&options).unwrap();

    let found = check(&disk, &model, View::PowerCut(usize::MAX));
    assert_eq!(found.get(&EXTENT), None);
}

#[test]
fn a_damaged_or_foreign_tail_is_refused() {
    let (place, _) = killed();
    let whole = std::fs::read(place.tail()).unwrap();
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    // Magic, segment, capacity, the record itself, and cut short.
    let slot = {
        let used = |i: &usize| whole[4096 + i * 48..4096 + i * 48 + 48].iter().any(|b| *b != 0);
        let last = (0..(whole.len() - 4096) / 48).filter(used).max().expect("a record");
        4096 + last * 48
    };
    for (what, bytes) in [
        ("magic", flipped(0)),
        ("segment", flipped(8)),
        ("capacity", flipped(24)),
        ("record", flipped(slot + 20)),
        ("half", whole[..whole.len() / 2].to_vec()),
        ("empty", Vec::new()),
    ] {
        std::fs::write(place.tail(), bytes).unwrap();
        let error = place.open(&place.live()).err().unwrap_or_else(|| panic!("{what}: opened"));
        assert!(
            matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::TailLost),
            "{what}: {error}"
        );
    }
    std::fs::write(place.tail(), &whole).unwrap();
    place.open(&place.live()).unwrap().close().unwrap();
}

/// One process at a time: the second opener is refused while the first lives.
#[test]
fn a_disk_has_one_writer() {
    let place = Place::new();
    let disk = place.open(&place.live()).unwrap();

    let error = place.open(&place.live()).err().expect("refused");

    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    disk.close().unwrap();
    place.open(&place.live()).unwrap().close().unwrap();
}
