//! The same one level up: creating, importing, renaming, sealing, resizing and deleting disks of a
//! store. After any crash the store opens, and each disk is there whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use blockd::disk::Disk;
use blockd::segment::file_name;
use blockd::store::file::CacheMode;
use blockd::store::sim::{
    Bounds, CrashState, CrashStats, CrashWalk, Image, Op, SimStore, all_crash_states, drop_syncs,
};
use blockd::store::{Access, Store};
use blockd::storedir::{NewDisk, OpenOptions, StoreDir};
use format::limits::{PAGE, SUPERBLOCK_OFFSETS};
use format::node::NodePtr;
use format::superblock::{Mode, State, Superblock};
use format::{Kind, Result};
use offshoot_tests::crash::{Report, no_panic};
use offshoot_tests::inspect::{Violation, Wrong, contents};
use offshoot_tests::model::Contents;
use offshoot_tests::pattern::{SECTOR, bytes};
use offshoot_tests::rng::soak;
use offshoot_tests::sim::{BLOCK, EXTENT};
use uuid::Uuid;

/// Sectors of the disks: 2 MiB.
pub(super) const SECTORS: u64 = 32 * EXTENT;

/// A disk as its owner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    sectors: u64,
    pub(super) sealed: bool,
    mode: Mode,
    pub(super) contents: Contents,
}

pub(super) type World = BTreeMap<String, Seen>;

pub(super) fn options() -> OpenOptions {
    OpenOptions { access: Access::Write, cache: CacheMode::Auto, boot: Uuid::from_u128(5) }
}

pub(super) fn open(store: &SimStore) -> Result<StoreDir> {
    StoreDir::open_in(Arc::new(store.clone()), &options())
}

pub(super) fn new_disk(name: &str, parent: Option<&str>) -> NewDisk {
    let virtual_size = SECTORS * SECTOR as u64;
    let journal_bytes = EXTENT * SECTOR as u64;
    NewDisk { name: name.into(), virtual_size, parent: parent.map(Into::into), journal_bytes }
}

/// The disks of an open store, with what they hold.
pub(super) fn look(dir: &StoreDir) -> Result<World, Violation> {
    let error = |e| Violation::new(Wrong::Error, e);
    let mut world = World::new();
    for row in dir.disks() {
        let disk = dir.open_disk(&row.name, Access::Read, &dir.disk_options()).map_err(error)?;
        let sectors = disk.size() / SECTOR as u64;
        let sb = disk.facts().map_err(error)?.superblock;
        if sb.mode != row.mode {
            return Err(Violation::new(Wrong::Value, "the catalogue tells another mode"));
        }
        let (sealed, contents) = (sb.state == State::Sealed, contents(&disk)?);
        world.insert(row.name, Seen { sectors, sealed, mode: row.mode, contents });
    }
    Ok(world)
}

/// A store whose operations are recorded, with what it should look like after each.
pub(super) struct Recorder {
    pub(super) store: SimStore,
    /// Log length before, and the world after, each operation; the first is the start.
    steps: Vec<(usize, World)>,
    ends: Vec<usize>,
}

impl Recorder {
    pub(super) fn start() -> Self {
        let store = SimStore::new();
        StoreDir::init_in(&store, None).unwrap();
        Self::over(store.live_image())
    }

    pub(super) fn over(image: Image) -> Self {
        let store = SimStore::from_image(image);
        let world = look(&open(&SimStore::from_image(store.base())).unwrap()).unwrap();
        Recorder { store, steps: vec![(0, world)], ends: vec![0] }
    }

    /// Does one operation, which changes the world in one step.
    pub(super) fn step(&mut self, run: impl FnOnce(&StoreDir)) {
        let before = self.store.log_len();
        let dir = open(&self.store).unwrap();
        run(&dir);
        drop(dir);
        self.ends.push(self.store.log_len());
        let after = look(&open(&SimStore::from_image(self.store.live_image())).unwrap()).unwrap();
        self.steps.push((before, after));
    }

    /// Every image that a power cut may leave, with what it is.
    pub(super) fn each(&self, visit: &mut dyn FnMut(&CrashState<'_>, Image)) -> CrashStats {
        let bounds = if soak() {
            Bounds { exhaustive: 10, random: 64, ..Bounds::default() }
        } else {
            Bounds { exhaustive: 6, random: 16, family: 24, ..Bounds::default() }
        };
        all_crash_states(&self.store.base(), &self.store.log(), &bounds, visit)
    }

    /// What the store may look like after a crash at `point`.
    fn allowed(&self, point: usize) -> Vec<&World> {
        let done = self.ends.iter().rposition(|end| *end <= point).unwrap_or(0);
        let begun = self.steps.iter().rposition(|(start, _)| *start < point).unwrap_or(0);
        (done..=begun.max(done)).map(|i| &self.steps[i].1).collect()
    }

    pub(super) fn visit(&self, test: &str) {
        let (mut report, mut seen) = (Report::default(), HashMap::new());
        let stats = self.each(&mut |state, image| {
            let print = image.fingerprint();
            let found = seen.entry(print).or_insert_with(|| {
                report.images += 1;
                no_panic(|| recovered(image, print))
            });
            let allowed = self.allowed(state.point);
            let wrong = match found {
                Err(violation) => violation.clone(),
                Ok(world) if allowed.contains(&&*world) => return,
                Ok(world) => Violation::new(Wrong::Value, differences(world, &allowed)),
            };
            report.add(wrong, state.to_string());
        });
        report.stats += stats;
        report.expect_none(test);
    }
}

fn differences(found: &World, allowed: &[&World]) -> String {
    let short = |world: &World| -> Vec<String> {
        let disk = |(name, seen): (&String, &Seen)| {
            let Seen { sectors, sealed, mode, contents } = seen;
            let mode = mode.name();
            let data = contents.len();
            format!("{name} ({sectors} sectors, sealed: {sealed}, {mode}, {data} with data)")
        };
        world.iter().map(disk).collect()
    };
    let allowed: Vec<_> = allowed.iter().map(|w| short(w)).collect();
    format!("found {:?}, allowed {allowed:?}", short(found))
}

/// Opens the store as a crash left it and says what is in it. Of a sample, the store then goes on:
/// a disk is made, and the catalogue is rebuilt from the segments.
pub(super) fn recovered(image: Image, print: u128) -> Result<World, Violation> {
    let error = |e| Violation::new(Wrong::Error, e);
    let store = SimStore::without_log(image);
    let dir = open(&store).map_err(error)?;
    let world = look(&dir)?;
    let unfinished = |n: &String| n.ends_with(".new") || n.ends_with(".del");
    let names = store.names().map_err(error)?;
    if let Some(name) = names.iter().find(|n| unfinished(n)) {
        return Err(Violation::new(Wrong::Garbage, format!("{name} is left over")));
    }
    let (segments, frozen) = (names.iter().filter(|n| n.ends_with(".seg")).count(), dir.frozen());
    if segments != world.len() + frozen {
        let text = format!("{segments} segments, {} disks, {frozen} frozen", world.len());
        return Err(Violation::new(Wrong::Missing, text));
    }
    if world.is_empty() && frozen > 0 {
        let text = format!("{frozen} frozen segments on which nobody stands");
        return Err(Violation::new(Wrong::Garbage, text));
    }
    if print.is_multiple_of(16) {
        let fails = |e| Violation::new(Wrong::GoesOn, e);
        dir.create(&new_disk("afterwards", None)).map_err(fails)?;
        drop(dir);
        StoreDir::rebuild_in(Arc::new(store.clone()), &options()).map_err(fails)?;
        let mut later = look(&open(&store).map_err(fails)?)?;
        if later.remove("afterwards").is_none() || later != world {
            let text = differences(&later, &[&world]);
            return Err(Violation::new(Wrong::GoesOn, format!("after a rebuild: {text}")));
        }
    }
    Ok(world)
}

/// Number of crash states of a log, from the start of a recording on, that `is_wrong` says yes to.
pub(super) fn wrong_states(
    recorder: &Recorder,
    log: &[Op],
    is_wrong: &dyn Fn(Result<World, Violation>) -> bool,
) -> usize {
    let mut walk = CrashWalk::new(&recorder.store.base(), log);
    let (mut wrong, bounds) = (0, Bounds { exhaustive: 6, ..Bounds::default() });
    loop {
        walk.visit(&bounds, &mut |_, image| {
            wrong += usize::from(is_wrong(no_panic(|| recovered(image, 1))));
        });
        if !walk.advance() {
            return wrong;
        }
    }
}

fn in_bytes(sectors: u64) -> usize {
    usize::try_from(sectors).unwrap() * SECTOR
}

pub(super) fn write(disk: &Disk, tag: u32, first: u64, count: u64) {
    disk.write(0, first * SECTOR as u64, &bytes(tag, first, count)).unwrap();
}

/// A store that is not there, or is there and empty.
#[test]
fn init() {
    let store = SimStore::new();
    StoreDir::init_in(&store, None).unwrap();
    let log = store.log();
    let bounds = Bounds::default();
    let stats = all_crash_states(&store.base(), &log, &bounds, &mut |state, image| {
        let store = SimStore::from_image(image);
        match open(&store) {
            Ok(dir) => assert!(dir.disks().is_empty()),
            // What was left can be made into a store.
            Err(e) => {
                assert!(state.point < log.len(), "{state}: {e}");
                StoreDir::init_in(&store, None).unwrap_or_else(|e| panic!("{state}: {e}"));
                open(&store).unwrap_or_else(|e| panic!("{state}: {e}"));
            }
        }
    });
    Report { stats, images: stats.states, ..Report::default() }.print("storedir: init");
}

#[test]
fn create_rename_delete() {
    let mut recorder = Recorder::start();
    recorder.step(|dir| _ = dir.create(&new_disk("one", None)).unwrap());
    recorder.step(|dir| _ = dir.create(&new_disk("two", None)).unwrap());
    recorder.step(|dir| _ = dir.rename("one", "three").unwrap());
    recorder.step(|dir| dir.remove("two").unwrap());
    recorder.visit("storedir: create, rename, delete");
}

#[test]
fn import() {
    let mut recorder = Recorder::start();
    recorder.step(|dir| {
        let import = dir.import(&new_disk("imported", None), 1).unwrap();
        write(import.disk(), 1, 0, 3 * EXTENT);
        write(import.disk(), 2, 9 * EXTENT + 3, 5);
        import.finish().unwrap();
    });
    // As the command line and the daemon do it: pieces with zeroes in them.
    recorder.step(|dir| {
        let import = dir.import(&new_disk("in-pieces", None), 1).unwrap();
        for first in [0, 5 * EXTENT] {
            let mut piece = bytes(4, first, 3 * BLOCK);
            piece[in_bytes(BLOCK)..in_bytes(2 * BLOCK)].fill(0);
            let stored = import.store(0, first * SECTOR as u64, &piece).unwrap();
            assert_eq!(stored, 2 * BLOCK * SECTOR as u64);
        }
        import.finish().unwrap();
    });
    // One that is given up leaves nothing.
    recorder.step(|dir| {
        let import = dir.import(&new_disk("given-up", None), 1).unwrap();
        write(import.disk(), 3, 0, BLOCK);
        import.disk().flush().unwrap();
    });
    recorder.visit("storedir: import");
}

#[test]
fn seal_and_child() {
    let mut recorder = Recorder::start();
    recorder.step(|dir| {
        let import = dir.import(&new_disk("parent", None), 1).unwrap();
        write(import.disk(), 1, 0, EXTENT);
        import.finish().unwrap();
    });
    let mut recorder = Recorder::over(recorder.store.live_image());
    recorder.step(|dir| _ = dir.seal("parent", &mut |_, _| Ok(())).unwrap());
    recorder.step(|dir| _ = dir.create(&new_disk("child", Some("parent"))).unwrap());
    recorder.step(|dir| {
        let import = dir.import(&new_disk("grown", Some("parent")), 1).unwrap();
        write(import.disk(), 4, 3, 2);
        import.finish().unwrap();
    });
    recorder.step(|dir| _ = dir.rename("parent", "base").unwrap());
    recorder.step(|dir| dir.remove("child").unwrap());
    recorder.visit("storedir: seal, child, rename of a parent, delete");
}

#[test]
fn resize() {
    let mut recorder = Recorder::start();
    recorder.step(|dir| {
        let import = dir.import(&new_disk("disk", None), 1).unwrap();
        write(import.disk(), 1, 0, 2 * EXTENT);
        write(import.disk(), 1, SECTORS - EXTENT, EXTENT);
        import.finish().unwrap();
    });
    let mut recorder = Recorder::over(recorder.store.live_image());
    let bytes = |sectors: u64| sectors * SECTOR as u64;
    recorder.step(|dir| _ = dir.resize("disk", bytes(SECTORS + 5), false).unwrap());
    recorder.step(|dir| _ = dir.resize("disk", bytes(17 * EXTENT - 3), true).unwrap());
    recorder.visit("storedir: resize");
}

/// Story: a crash came after a resize or a seal had changed the segment and before the catalogue
/// heard of it. `disk ls` then showed the old size, or an open disk where there was a sealed one,
/// until somebody rebuilt the catalogue.
#[test]
fn the_catalogue_catches_up_after_a_crash() {
    let mut recorder = Recorder::start();
    recorder.step(|dir| _ = dir.create(&new_disk("disk", None)).unwrap());
    let mut recorder = Recorder::over(recorder.store.live_image());
    recorder.step(|dir| _ = dir.resize("disk", 2 * SECTORS * SECTOR as u64, false).unwrap());
    recorder.step(|dir| _ = dir.seal("disk", &mut |_, _| Ok(())).unwrap());
    recorder.each(&mut |state, image| {
        let dir = open(&SimStore::from_image(image)).unwrap();
        let row = dir.disk("disk").unwrap();
        let disk = dir.open_disk("disk", Access::Read, &dir.disk_options()).unwrap();
        let sealed = disk.facts().unwrap().superblock.state == State::Sealed;
        assert_eq!((row.virtual_size, row.sealed), (disk.size(), sealed), "{state}");
    });
}

/// The control: a catalogue transaction and a name that are not made durable lose a disk.
#[test]
fn a_name_that_is_not_made_durable_is_caught() {
    let mut recorder = Recorder::start();
    recorder.step(|dir| _ = dir.create(&new_disk("one", None)).unwrap());
    let log = recorder.store.log();
    let spoilt = drop_syncs(&log, |_, op| matches!(op, Op::SyncNames));
    let mut walk = CrashWalk::new(&recorder.store.base(), &spoilt);
    while walk.advance() {}
    let mut lost = 0;
    walk.visit(&Bounds { exhaustive: 6, ..Bounds::default() }, &mut |_, image| {
        let found = no_panic(|| recovered(image, 1));
        lost += usize::from(found.is_err() || found.is_ok_and(|world| world.is_empty()));
    });
    assert!(lost > 0, "nobody noticed");
}

/// A store with the disk `one`, whose segment `spoil` changed, and what the change left.
fn spoilt(spoil: impl FnOnce(&mut Image, &str)) -> (SimStore, String, Image) {
    let store = SimStore::new();
    StoreDir::init_in(&store, None).unwrap();
    let dir = open(&store).unwrap();
    let row = dir.create(&new_disk("one", None)).unwrap();
    let disk = dir.open_disk("one", Access::Write, &dir.disk_options()).unwrap();
    write(&disk, 1, 0, EXTENT);
    disk.checkpoint().unwrap();
    drop((disk, dir));
    let (mut image, name) = (store.live_image(), file_name(row.segment));
    spoil(&mut image, &name);
    (SimStore::from_image(image.clone()), name, image)
}

fn superblock_of(image: &Image, name: &str, copy: usize) -> Superblock {
    let page = image.get(name).unwrap().read(SUPERBLOCK_OFFSETS[copy], PAGE);
    Superblock::decode(page[..].try_into().unwrap(), copy).unwrap()
}

/// A rename is refused before anything was changed: the disk has its old name, and the store opens.
fn rename_is_refused(spoilt: &(SimStore, String, Image), kind: Kind, said: &str) {
    let (store, name, image) = spoilt;
    for _ in 0..2 {
        let dir = open(store).unwrap();
        let e = dir.rename("one", "two").unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(said), "{e}");
        assert_eq!(dir.disks().len(), 1);
        assert_eq!(dir.disk("one").unwrap().name, "one");
    }
    assert_eq!(store.live_image().get(name), image.get(name));
}

/// Story: the catalogue was changed first, and then the segment refused to be written. Each later
/// opening of the store tried to finish the rename, failed, and so no disk of it could be used.
#[test]
fn a_rename_that_the_segment_refuses_leaves_the_store_as_it_was() {
    let read_only = spoilt(|image, name| {
        let sb = Superblock { mode: Mode::Undoable, ..superblock_of(image, name, 0) };
        for (copy, offset) in SUPERBLOCK_OFFSETS.into_iter().enumerate() {
            image.overwrite(name, offset, &sb.encode(copy)).unwrap();
        }
    });

    rename_is_refused(&read_only, Kind::Unsupported, "mode");
}

/// Nor does a rename overwrite an older superblock copy that is needed to mend the map.
#[test]
fn a_rename_keeps_an_older_state_that_is_better() {
    let half_flipped = spoilt(|image, name| {
        let newest = superblock_of(image, name, 0);
        let before = image.clone();
        let store = SimStore::from_image(before.clone());
        let dir = open(&store).unwrap();
        let disk = dir.open_disk("one", Access::Write, &dir.disk_options()).unwrap();
        write(&disk, 2, 2 * EXTENT, EXTENT);
        disk.checkpoint().unwrap();
        let opened = superblock_of(&store.live_image(), name, 2);
        assert_ne!(opened.root, newest.root);
        drop((disk, dir));
        *image = store.live_image();
        let older = Superblock { epoch: opened.epoch, ..newest };
        for (copy, offset) in SUPERBLOCK_OFFSETS.into_iter().enumerate().skip(2) {
            image.overwrite(name, offset, &older.encode(copy)).unwrap();
        }
        let NodePtr::Page(root) = opened.root else { panic!("a root") };
        image.flip_bit(name, root.page.file_offset() + 1, 1).unwrap();
    });

    rename_is_refused(&half_flipped, Kind::Corrupt, "--older-generation");
}
