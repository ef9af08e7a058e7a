//! Crash after crash: each opening finds what the crash before left.

use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};

use blockd::disk::Disk;
use blockd::disk::tail::path_in;
use blockd::segment::file_name;
use blockd::store::sim::{Bounds, CrashWalk, Image, Op, SimStore};
use blockd::store::{Access, Store};
use format::limits::{self, SUPERBLOCK_OFFSETS};
use offshoot_tests::around::{Call, When, around};
use offshoot_tests::crash::{Recording, no_panic};
use offshoot_tests::inspect::{Content, open_and_read};
use offshoot_tests::kill::{live, memory_dir};
use offshoot_tests::model::View;
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::sim::{BLOCK, ByName, EXTENT, LEAF, Script};
use uuid::Uuid;

use super::{SECTORS, prepared};

/// True for a write of a superblock copy.
fn is_superblock(op: &Op) -> bool {
    matches!(op, Op::Write { offset, .. } if SUPERBLOCK_OFFSETS.contains(offset))
}

fn start() -> (Script, Content) {
    let script = prepared(|_| {});
    let tags = script.model().contents();
    (script, Content { sectors: SECTORS, seal: 0, tags })
}

/// One of the images that a power cut at `point` may leave, with what it holds.
///
/// # Errors
///
/// What recovery or the comparison says, with the state's description.
fn cut(recording: &Recording, point: usize, rng: &mut Rng) -> Result<(Image, Content), String> {
    let mut walk = CrashWalk::new(&recording.base, &recording.log);
    while walk.point() < point {
        assert!(walk.advance());
    }
    let bounds = Bounds { exhaustive: 4, random: 6, seed: rng.any(), family: 4 };
    let (mut images, mut texts) = (Vec::new(), Vec::new());
    walk.visit(&bounds, &mut |state, image| {
        images.push(image);
        texts.push(state.to_string());
    });
    let at = usize::try_from(rng.below(images.len() as u64)).unwrap();
    let image = images.swap_remove(at);
    let allowed = recording.model.allowed(View::PowerCut(point));
    let content = no_panic(|| {
        let content = recording.recover(image.clone())?;
        content.check(recording.model.sectors(), &allowed)?;
        Ok(content)
    });
    let content = content.map_err(|v| format!("{v}\n{}", texts.swap_remove(at)))?;
    Ok((image, content))
}

/// Twelve crashes in a row at random moments, half of them in the middle of a superblock flip.
#[test]
fn of_crashes_at_random_moments() {
    let first = seed(1);
    for seed in first..first + if soak() { 300 } else { 12 } {
        let mut rng = Rng::new(seed);
        let (script, mut content) = start();
        let mut image = script.store.live_image();
        for depth in 0..12 {
            let tags = content.tags.clone();
            let mut script = Script::over(image, script.segment, tags, content.sectors);
            work(&mut script, &mut rng)
                .unwrap_or_else(|e| panic!("OFFSHOOT_SEED={seed}, crash {depth}: {e}"));
            let recording = Recording::from(&script);
            let flips: Vec<usize> =
                (0..recording.log.len()).filter(|at| is_superblock(&recording.log[*at])).collect();
            let point = if rng.one_in(2) {
                flips[usize::try_from(rng.below(flips.len() as u64)).unwrap()]
            } else {
                usize::try_from(rng.below(recording.log.len() as u64 + 1)).unwrap()
            };
            (image, content) = cut(&recording, point, &mut rng)
                .unwrap_or_else(|e| panic!("OFFSHOOT_SEED={seed}, crash {depth}: {e}"));
        }
    }
}

fn work(script: &mut Script, rng: &mut Rng) -> format::Result<()> {
    script.open()?;
    for _ in 0..2 + rng.below(4) {
        for _ in 0..rng.below(400) {
            script.discard((40 + rng.below(300)) * EXTENT, BLOCK)?;
        }
        script.write(rng.below(16 * EXTENT), 1 + rng.below(EXTENT))?;
        script.discard(rng.below(16) * EXTENT, EXTENT)?;
        script.write(LEAF + rng.below(16 * EXTENT), 1 + rng.below(8))?;
        if !rng.one_in(4) {
            script.flush()?;
        }
    }
    if rng.one_in(4) { script.close() } else { Ok(()) }
}

/// Story: a checkpoint commits and then flips. When the power went between the two, again and
/// again, each attempt left its commit in the ring, until the ring was full: the checkpoint that
/// would have emptied it needed a page for its own commit, and no flush succeeded ever again.
#[test]
fn of_checkpoints_that_never_finish() {
    let (script, mut content) = start();
    let (mut image, mut rng) = (script.store.live_image(), Rng::new(1));
    for depth in 0..12 {
        let tags = content.tags.clone();
        let mut script = Script::over(image, script.segment, tags, content.sectors);
        script.open().unwrap();
        let opened = script.store.log_len();
        // Until a flush makes a checkpoint, with as many records as the tail takes.
        loop {
            for i in 0..400 {
                script.discard((40 + i) * EXTENT, BLOCK).unwrap();
            }
            script.write(depth * EXTENT, 3).unwrap();
            script.flush().unwrap_or_else(|e| panic!("crash {depth}: {e}"));
            if script.store.log()[opened..].iter().any(is_superblock) {
                break;
            }
        }
        let recording = Recording::from(&script);
        let flip = recording.log[opened..].iter().position(is_superblock).unwrap();
        (image, content) = cut(&recording, opened + flip, &mut rng)
            .unwrap_or_else(|e| panic!("crash {depth}: {e}"));
    }
}

/// The same with a process that is killed in the middle of a flip, while its clients have filled
/// the tail again behind the checkpoint's commit.
#[test]
fn of_kills_in_checkpoints_with_a_full_tail() {
    let store = SimStore::from_image(start().0.store.live_image());
    let (segment, dir) = (Uuid::from_u128(100), memory_dir());
    let mut image = store.live_image();
    for depth in 0..12 {
        let store = SimStore::without_log(image);
        let left = fill_and_kill(&store, segment, dir.path())
            .unwrap_or_else(|e| panic!("kill {depth}: {e}"));
        std::fs::write(path_in(dir.path(), segment), left.1).unwrap();
        image = left.0;
    }
    let store = SimStore::without_log(image);
    let (disk, _) = open_and_read(&store, segment, &live(dir.path())).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
}

/// Works until a checkpoint flips, with clients that fill the tail whenever there is room. Returns
/// what a kill leaves at that moment: files and tail.
fn fill_and_kill(store: &SimStore, segment: Uuid, dir: &Path) -> format::Result<(Image, Vec<u8>)> {
    let disk: Arc<OnceLock<Weak<Disk>>> = Arc::default();
    let left: Arc<OnceLock<(Image, Vec<u8>)>> = Arc::default();
    let (seen, kept, path, files) =
        (Arc::clone(&disk), Arc::clone(&left), path_in(dir, segment), store.clone());
    let hook = move |when, call| {
        let Some(disk) = seen.get().and_then(Weak::upgrade) else { return };
        if when == When::After || matches!(call, Call::Read(_)) || kept.get().is_some() {
            return;
        }
        // One slot stays free: whoever finds none waits for a flush.
        (1..room(&path)).for_each(|_| fill(&disk).expect("room in the tail"));
        if call == Call::Write(SUPERBLOCK_OFFSETS[0]) {
            let tail = std::fs::read(&path).expect("a tail");
            kept.set((files.live_image(), tail)).expect("the first flip");
        }
    };
    let file = store.open(&file_name(segment), Access::Write)?;
    let opened = Disk::open(around(Arc::new(hook))(file), &ByName(store), &live(dir))?;
    let opened = Arc::new(opened);
    disk.set(Arc::downgrade(&opened)).expect("one disk");
    while left.get().is_none() {
        opened.flush()?;
    }
    Ok(left.get().cloned().expect("just looked"))
}

/// Free slots of a tail: its capacity, less what lies between head and next.
fn room(path: &Path) -> u64 {
    let bytes = std::fs::read(path).expect("a tail");
    let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("a word"));
    word(3) - (word(5) - word(4))
}

/// A record that costs no space.
fn fill(disk: &Disk) -> format::Result<()> {
    disk.discard(0, limits::EXTENT, limits::BLOCK)
}
