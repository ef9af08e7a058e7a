//! Random operations against a flat model.
//!
//! One to four threads write, discard, zero, read and flush on queues of their own. Each thread
//! owns sectors that lie between those of the others (in the same blocks, or in the same extents),
//! so that a read-modify-write that loses a neighbour's sector, a discard that brings back old
//! content or an extent that is given away twice shows. Between rounds the disk is closed, dropped,
//! killed with its tail, resized, sealed under a child, or loses power; then all of it is compared.
//!
//! A failure prints the seed and the command that repeats it.

use std::collections::BTreeMap;

use blockd::store::file::{CacheMode, FileStore, FileStoreOptions};
use blockd::store::sim::{Bounds, CrashWalk, Image};
use blockd::store::{Access, Store};
use blockd::{disk::Disk, segment::file_name};
use offshoot_tests::around::slow;
use offshoot_tests::crash::Recording;
use offshoot_tests::inspect::{Content, contents, open_and_read, read_all};
use offshoot_tests::kill::{live, memory_dir};
use offshoot_tests::model::{Contents, View};
use offshoot_tests::pattern::{Found, SECTOR, look};
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::sim::{BLOCK, ByName, EXTENT, LEAF, Script, create};
use uuid::Uuid;

const SECTORS: u64 = LEAF + 24 * EXTENT;

/// A virtual extent behind those that the threads use, for [`Script::fragment`].
const FRAGMENTS: u64 = 200;

/// Prints how to repeat the run when a test panics.
struct Repeat(u64, &'static str);

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Repeat(seed, test) = self;
            let command = "cargo test -p offshoot-tests --test flat_model";
            eprintln!("to repeat: OFFSHOOT_SEED={seed} {command} {test}");
        }
    }
}

/// Runs `run` with `count` seeds.
fn with_seeds(test: &'static str, count: u64, run: impl Fn(u64)) {
    let first = seed(1);
    let only = std::env::var_os("OFFSHOOT_SEED").is_some();
    for seed in first..first + if only { 1 } else { count } {
        let _repeat = Repeat(seed, test);
        run(seed);
    }
}

/// Which sectors a thread owns: every `threads`-th run of `grain` sectors.
#[derive(Clone, Copy)]
struct Owned {
    thread: u64,
    threads: u64,
    grain: u64,
}

impl Owned {
    fn has(&self, sector: u64) -> bool {
        sector / self.grain % self.threads == self.thread
    }

    /// A range of own sectors, somewhere in a few extents that everybody meets in.
    fn range(&self, rng: &mut Rng, sectors: u64) -> (u64, u64) {
        let near = if rng.one_in(4) { LEAF - 4 * EXTENT } else { 0 };
        let place = near + rng.below(10 * EXTENT);
        let run = place / self.grain / self.threads * self.threads + self.thread;
        let first = run * self.grain + rng.below(self.grain);
        let end = ((run + 1) * self.grain).min(sectors);
        if first >= end {
            let last = self.thread * self.grain;
            return (last, 1);
        }
        let count = match rng.below(3) {
            0 => 1,
            1 => 1 + rng.below(end - first),
            _ => end - first,
        };
        (first, count)
    }
}

/// What one thread does in one round; `mine` is what its sectors hold.
fn work(script: &Script, owned: Owned, seed: u64, mine: &mut Contents) {
    let (mut rng, lane) = (Rng::new(seed), usize::try_from(owned.thread).unwrap());
    let sectors = script.disk().size() / SECTOR as u64;
    for _ in 0..if soak() { 60 } else { 30 } {
        let (first, count) = owned.range(&mut rng, sectors);
        let range = first..first + count;
        match rng.below(20) {
            0..=7 => {
                let tag = script.write_on(lane, first, count).unwrap();
                range.for_each(|s| _ = mine.insert(s, tag));
            }
            8..=10 => {
                script.discard_on(lane, first, count).unwrap();
                mine.retain(|s, _| !range.contains(s));
            }
            11 => {
                script.write_zeroes(first, count, rng.one_in(2)).unwrap();
                mine.retain(|s, _| !range.contains(s));
            }
            12..=13 => script.flush().unwrap(),
            14 if rng.one_in(4) => script.checkpoint().unwrap(),
            _ => look_around(script.disk(), lane, owned, first, mine),
        }
    }
}

/// Reads around `at`: own sectors hold what was written last, others something that belongs there.
fn look_around(disk: &Disk, lane: usize, owned: Owned, at: u64, mine: &Contents) {
    let first = at.saturating_sub(BLOCK);
    let count = (3 * BLOCK).min(disk.size() / SECTOR as u64 - first);
    let mut bytes = vec![0; usize::try_from(count).unwrap() * SECTOR];
    disk.read(lane, first * SECTOR as u64, &mut bytes).unwrap();
    for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
        let found = look(bytes, sector);
        if owned.has(sector) {
            let want = mine.get(&sector).map_or(Found::Zero, |tag| Found::Tag(*tag));
            assert_eq!(found, want, "sector {sector}, which thread {} owns", owned.thread);
        } else {
            assert!(matches!(found, Found::Zero | Found::Tag(_)), "sector {sector}: {found:?}");
        }
    }
}

/// All threads at once, until each has done its share.
fn round(script: &Script, rng: &mut Rng) {
    let threads = 1 + rng.below(4);
    let grain = [1, 3, BLOCK, 2 * BLOCK, EXTENT][usize::try_from(rng.below(5)).unwrap()];
    let now = script.model().contents();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (owned, seed) = (Owned { thread, threads, grain }, rng.any());
            let mine = now.iter().filter(|(s, _)| owned.has(**s));
            let mut mine: Contents = mine.map(|(s, tag)| (*s, *tag)).collect();
            scope.spawn(move || work(script, owned, seed, &mut mine));
        }
    });
}

/// The disk is what the model says, exactly.
fn compare(script: &Script) {
    let want = script.model().contents();
    let found = contents(script.disk()).unwrap_or_else(|v| panic!("{v}"));
    assert_eq!(differences(&found, &want), [], "sector, found, wanted");
    read_all(script.disk(), &want).unwrap_or_else(|v| panic!("{v}"));
}

fn differences(found: &Contents, want: &Contents) -> Vec<(u64, u32, u32)> {
    let tag = |c: &Contents, s: &u64| c.get(s).copied().unwrap_or(0);
    let all: BTreeMap<u64, ()> = found.keys().chain(want.keys()).map(|s| (*s, ())).collect();
    let all = all.keys().map(|s| (*s, tag(found, s), tag(want, s)));
    all.filter(|(_, a, b)| a != b).take(8).collect()
}

/// One of the images that a power cut in the last round may leave.
fn power_cut(script: &Script, rng: &mut Rng) -> (Image, Content) {
    let recording = Recording::from(script);
    let point = usize::try_from(rng.below(recording.log.len() as u64 + 1)).unwrap();
    let mut walk = CrashWalk::new(&recording.base, &recording.log);
    while walk.point() < point {
        assert!(walk.advance());
    }
    let bounds = Bounds { exhaustive: 3, random: 8, seed: rng.any(), family: 8 };
    let (mut images, mut states) = (Vec::new(), Vec::new());
    walk.visit(&bounds, &mut |state, image| {
        images.push(image);
        states.push(state.to_string());
    });
    let allowed = recording.model.allowed(View::PowerCut(point));
    let mut contents = Vec::new();
    for (image, state) in images.iter().zip(&states) {
        let content = recording.recover(image.clone()).and_then(|content| {
            content.check(recording.model.sectors(), &allowed)?;
            Ok(content)
        });
        contents.push(content.unwrap_or_else(|v| panic!("{v}\n{state}")));
    }
    let at = usize::try_from(rng.below(images.len() as u64)).unwrap();
    (images.swap_remove(at), contents.swap_remove(at))
}

/// What happens between two rounds. Returns the script to go on with; its disk is open.
fn between(mut script: Script, rng: &mut Rng) -> Script {
    let (options, wrap) = (script.options.clone(), script.wrap.clone());
    match rng.below(8) {
        0 => {}
        1 => {
            script.close().unwrap();
            script = script.settled();
            script.open().unwrap();
        }
        2 if options.live => {
            script.kill();
            script.open().unwrap();
        }
        2 => {
            // Without a tail: as after a power cut, except that the page cache is there.
            script.kill();
            let (_, found) = open_and_read(&script.store, script.segment, &options)
                .unwrap_or_else(|v| panic!("{v}"));
            let allowed = script.model().allowed(View::PowerCut(script.store.log_len()));
            found.check(script.model().sectors(), &allowed).unwrap_or_else(|v| panic!("{v}"));
            script.adopt(found.tags);
            script.open().unwrap();
        }
        3 => {
            let size = LEAF / 2 + rng.below(LEAF);
            script.resize(size.max(12 * EXTENT)).unwrap();
        }
        4 => {
            script = script.child();
            script.open().unwrap();
            script.fragment(FRAGMENTS, 20).unwrap();
        }
        5 | 6 => {
            let (image, content) = power_cut(&script, rng);
            let segment = script.segment;
            script.kill();
            script = Script::over(image, segment, content.tags, content.sectors);
            // The host was started again.
            let boot = Uuid::from_u128(options.boot.as_u128() + 1);
            script.options = blockd::disk::Options { boot, ..options };
            script.wrap = wrap;
            script.open().unwrap();
        }
        _ => script.checkpoint().unwrap(),
    }
    script
}

#[test]
fn on_the_simulated_store() {
    with_seeds("on_the_simulated_store", if soak() { 600 } else { 40 }, |seed| {
        let mut rng = Rng::new(seed);
        let dir = memory_dir();
        let mut script = Script::empty(SECTORS);
        if rng.one_in(2) {
            script.options = live(dir.path());
        }
        script.wrap = Some(slow(seed));
        script.open().unwrap();
        script.fragment(FRAGMENTS, 20).unwrap();
        script.close().unwrap();
        script.open().unwrap();
        for _ in 0..6 {
            round(&script, &mut rng);
            compare(&script);
            script = between(script, &mut rng);
            compare(&script);
        }
        script.close().unwrap();
    });
}

/// Replay applies the records of neighbouring extents together. Those of one extent keep their
/// order, also around a discard of several extents.
#[test]
fn records_of_one_extent_are_replayed_in_order() {
    with_seeds("records_of_one_extent_are_replayed_in_order", 10, |seed| {
        let mut rng = Rng::new(seed);
        let mut script = Script::empty(SECTORS);
        script.open().unwrap();
        for _ in 0..400 {
            let first = rng.below(6 * EXTENT / BLOCK) * BLOCK;
            match rng.below(8) {
                0 => script.discard(first, 3 * EXTENT).unwrap(),
                1..=3 => script.discard(first, BLOCK).unwrap(),
                _ => {
                    script.write(first, BLOCK).unwrap();
                }
            }
        }
        script.flush().unwrap();
        script.kill();
        script.open().unwrap();
        compare(&script);
    });
}

/// A child over a parent full of data, on slow calls, with free space in single extents.
fn raced(seed: u64) -> Script {
    let mut parent = Script::empty(SECTORS);
    parent.open().unwrap();
    parent.write(0, 64 * EXTENT).unwrap();
    let mut script = parent.child();
    script.open().unwrap();
    script.fragment(FRAGMENTS, 20).unwrap();
    script.close().unwrap();
    let mut script = script.settled();
    script.wrap = Some(slow(seed));
    script.open().unwrap();
    script
}

fn found(disk: &Disk, first: u64, count: u64) -> Vec<Found> {
    let mut bytes = vec![0; usize::try_from(count).unwrap() * SECTOR];
    disk.read(0, first * SECTOR as u64, &mut bytes).unwrap();
    (first..).zip(bytes.chunks_exact(SECTOR)).map(|(at, bytes)| look(bytes, at)).collect()
}

/// Story: a write to one sector read the rest of its block from the parent, a discard of the whole
/// block came and completed, and the write then published the block: the parent's data was back.
#[test]
fn a_discard_beside_a_write_in_one_block() {
    with_seeds("a_discard_beside_a_write_in_one_block", if soak() { 60 } else { 3 }, |seed| {
        let script = &raced(seed);
        for block in (0..60 * EXTENT).step_by(usize::try_from(3 * BLOCK).unwrap()) {
            let tag = std::thread::scope(|scope| {
                scope.spawn(move || script.discard_on(1, block, BLOCK).unwrap());
                script.write_on(0, block, 1).unwrap()
            });
            let found = found(script.disk(), block, BLOCK);
            assert!(matches!(found[0], Found::Zero) || found[0] == Found::Tag(tag), "{block}");
            assert!(found[1..].iter().all(|f| *f == Found::Zero), "sectors at {block}: {found:?}");
        }
    });
}

/// Story: a discard emptied an extent while a first write to another of its blocks was under way.
/// The extent was given back, the write published into it, and it was given away a second time.
#[test]
fn an_extent_emptied_under_a_first_write() {
    with_seeds("an_extent_emptied_under_a_first_write", if soak() { 60 } else { 3 }, |seed| {
        let mut script = raced(seed);
        let shared = &script;
        for extent in (100..180).map(|e| e * EXTENT) {
            shared.write(extent, BLOCK).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(move || shared.write_on(1, extent + BLOCK, BLOCK).unwrap());
                shared.discard(extent, BLOCK).unwrap();
                (0..2).for_each(|_| shared.flush().unwrap());
                shared.write(extent + 256 * EXTENT, 3).unwrap();
            });
        }
        compare(&script);
        script.close().unwrap();
        script.open().unwrap();
        compare(&script);
    });
}

/// A read or an overwrite that takes its time, while what it looked up is discarded, flushed and
/// given to somebody else: neither sees nor destroys the next owner's data.
#[test]
fn slow_requests_and_space_that_is_used_again() {
    with_seeds("slow_requests_and_space", if soak() { 60 } else { 3 }, |seed| {
        let script = &raced(seed);
        let (old, new) = (100 * EXTENT, 140 * EXTENT);
        for round in 0..40 {
            let next = new + round * EXTENT;
            script.write(old, EXTENT).unwrap();
            let tag = std::thread::scope(|scope| {
                scope.spawn(move || {
                    for found in found(script.disk(), old, EXTENT) {
                        assert!(matches!(found, Found::Zero | Found::Tag(_)), "{found:?}");
                    }
                });
                scope.spawn(move || script.write_on(2, old + 5, 2).unwrap());
                script.discard_on(3, old, EXTENT).unwrap();
                script.flush().unwrap();
                script.write_on(3, next, EXTENT).unwrap()
            });
            let found = found(script.disk(), next, EXTENT);
            assert!(found.iter().all(|f| *f == Found::Tag(tag)), "round {round}: {found:?}");
            script.discard(old, EXTENT).unwrap();
        }
    });
}

/// The same bytes in a vector and on a disk in a real folder, with and without the page cache.
#[test]
fn on_a_real_folder() {
    const SIZE: usize = 9 << 20;
    with_seeds("on_a_real_folder", if soak() { 60 } else { 4 }, |seed| {
        let mut rng = Rng::new(seed);
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let cache = if seed.is_multiple_of(2) { CacheMode::Auto } else { CacheMode::Buffered };
        let store = FileStore::open(dir.path(), FileStoreOptions { cache }).unwrap();
        let segment = Uuid::from_u128(u128::from(seed));
        create(&store, segment, (SIZE / SECTOR) as u64, None).unwrap();
        let open = || {
            let file = store.open(&file_name(segment), Access::Write).unwrap();
            Disk::open(file, &ByName(&store), &Default::default()).unwrap()
        };
        let (mut disk, mut flat) = (open(), vec![0u8; SIZE]);
        for tag in 1..200 {
            step(&disk, &mut flat, tag, &mut rng);
            if rng.one_in(20) {
                if rng.one_in(2) {
                    disk.close().unwrap();
                } else {
                    disk.flush().unwrap();
                    drop(disk);
                }
                disk = open();
            }
        }
        let mut found = vec![1; SIZE];
        disk.read(0, 0, &mut found).unwrap();
        assert!(found == flat, "the disk differs at byte {:?}", first_difference(&found, &flat));
        disk.close().unwrap();
    });
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// One random operation on both.
fn step(disk: &Disk, flat: &mut [u8], tag: u32, rng: &mut Rng) {
    let sectors = (flat.len() / SECTOR) as u64;
    let first = rng.below(sectors);
    let longest = [1, 2 * BLOCK, 3 * EXTENT][usize::try_from(rng.below(3)).unwrap()];
    let count = (1 + rng.below(longest)).min(sectors - first);
    let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
    let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
    match rng.below(10) {
        0..=4 => {
            let bytes = offshoot_tests::pattern::bytes(tag, first, count);
            disk.write(0, offset, &bytes).unwrap();
            flat[range].copy_from_slice(&bytes);
        }
        5..=6 => {
            disk.discard(0, offset, len).unwrap();
            flat[range].fill(0);
        }
        7 => {
            disk.write_zeroes(0, offset, len, rng.one_in(2)).unwrap();
            flat[range].fill(0);
        }
        8 => disk.flush().unwrap(),
        _ => {
            let mut bytes = vec![1; range.len()];
            disk.read(0, offset, &mut bytes).unwrap();
            assert!(bytes == flat[range], "at sector {first}");
        }
    }
}
