//! Forks of disks in service, which go on in their successors before they are frozen.
//!
//! Power cuts: children are all there, with exactly what the parents held at the instant, or none
//! is; a parent has what it flushed, on whichever side of the instant. Kills: every completed write
//! is there, and if a guest was told of one after the instant, so are the children. One of the
//! children is served from the instant on, and is written to like its parent. Children get other
//! names at the instant, which they have for good once the fork is confirmed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use blockd::catalogue::ForkRow;
use blockd::disk::{Disk, Options};
use blockd::store::sim::{Bounds, CrashWalk, Image, Op, SimStore, drop_syncs};
use blockd::store::{Access, Store as _};
use blockd::storedir::{Crossing, ForkOf, OpenOptions, StoreDir};
use format::Result;
use offshoot_tests::crash::{Report, no_panic};
use offshoot_tests::inspect::{Violation, Wrong};
use offshoot_tests::kill::memory_dir;
use offshoot_tests::model::Contents;
use offshoot_tests::pattern::SECTOR;
use offshoot_tests::rng::soak;
use offshoot_tests::sim::{BLOCK, EXTENT};
use tempfile::TempDir;
use uuid::Uuid;

use super::fork::change;
use super::storedir::{World, look, new_disk, options, write};

/// How the names begin that children have before the instant.
const BEFORE: &str = "was-";

/// Files of a folder of tails.
type Tails = BTreeMap<String, Vec<u8>>;

/// The run after an operation.
struct Moment {
    what: &'static str,
    /// Operations of the store before and after it.
    log: (usize, usize),
    /// What every disk holds for a client that lives.
    live: BTreeMap<&'static str, Contents>,
    tails: Tails,
}

/// A fork of two disks in service, recorded.
struct Run {
    store: SimStore,
    dir: StoreDir,
    tails: TempDir,
    disks: BTreeMap<&'static str, Arc<Disk>>,
    moments: Vec<Moment>,
    /// Numbers of moments: the instant, the first completed write after it, when the fork was
    /// confirmed, its end.
    instant: usize,
    told: usize,
    confirmed: usize,
    settled: usize,
    /// The moments that flushes of a disk end at.
    flushed: BTreeMap<&'static str, Vec<usize>>,
}

fn tails_in(dir: &Path) -> Tails {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    files
        .map(|f| (f.file_name().into_string().unwrap(), std::fs::read(f.path()).unwrap()))
        .collect()
}

fn live(dir: &StoreDir) -> Options {
    Options { live: true, lanes: 2, ..dir.disk_options() }
}

fn after_power_cut() -> OpenOptions {
    OpenOptions { boot: Uuid::from_u128(6), ..options() }
}

impl Run {
    /// Two disks with durable content, open.
    fn start() -> Self {
        let tails = memory_dir();
        let store = SimStore::new();
        StoreDir::init_in(&store, Some(tails.path().to_owned())).unwrap();
        let dir = StoreDir::open_in(Arc::new(store.clone()), &options()).unwrap();
        for (tag, name) in [(1, "data"), (2, "log")] {
            dir.create(&new_disk(name, None)).unwrap();
            change(&dir, name, tag, 3, 3 * EXTENT);
        }
        drop(dir);
        let store = SimStore::from_image(store.live_image());
        let dir = StoreDir::open_in(Arc::new(store.clone()), &options()).unwrap();
        let open = |name| {
            let disk = dir.open_disk(name, Access::Write, &live(&dir)).unwrap();
            (name, Arc::new(disk))
        };
        let disks = ["data", "log"].map(open).into();
        let (moments, flushed) = (Vec::new(), BTreeMap::from([("data", vec![0])]));
        let (instant, told, confirmed, settled) = (0, 0, 0, 0);
        let mut run =
            Run { store, dir, tails, disks, moments, instant, told, confirmed, settled, flushed };
        run.note("opened", 0);
        run
    }

    /// An operation has ended that began when the store had had `began` operations.
    fn note(&mut self, what: &'static str, began: usize) -> usize {
        let held = |(name, disk): (&&'static str, &Arc<Disk>)| {
            (*name, offshoot_tests::inspect::contents(disk).unwrap())
        };
        let live = self.disks.iter().map(held).collect();
        let (log, tails) = ((began, self.store.log_len()), tails_in(self.tails.path()));
        self.moments.push(Moment { what, log, live, tails });
        self.moments.len() - 1
    }

    fn step(&mut self, what: &'static str, run: impl FnOnce(&mut Run)) -> usize {
        let began = self.store.log_len();
        run(self);
        self.note(what, began)
    }

    fn write(&mut self, name: &'static str, tag: u32, first: u64, count: u64) -> usize {
        self.step("write", |run| write(&run.disks[name], tag, first, count))
    }

    fn flush(&mut self, name: &'static str) {
        let flushed = self.step("flush", |run| run.disks[name].flush().unwrap());
        self.flushed.get_mut(name).unwrap().push(flushed);
    }

    /// Opens the child of `data` ahead of the instant.
    fn open_child(&mut self, fork: &ForkRow) -> Crossing {
        let began = self.store.log_len();
        let forked = fork.disks.iter().find(|forked| forked.name == "data").unwrap();
        let (into, old) = (forked.children[0].segment, &self.disks["data"]);
        let options = live(&self.dir);
        let child = self.dir.begin_crossing_into(into, forked, old, &options).unwrap();
        self.note("open the child", began);
        child
    }

    /// The whole story.
    fn whole() -> Self {
        let mut run = Run::start();
        run.write("data", 5, 2 * EXTENT, 2 * EXTENT);
        run.write("log", 6, BLOCK, 3);
        let of =
            |disk: &str, child: &str| ForkOf { disk: disk.into(), children: vec![child.into()] };
        let wanted = [of("data", "was-data-1"), of("log", "was-log-1")];
        let mut fork: Option<ForkRow> = None;
        run.step("begin", |run| fork = Some(run.dir.begin_fork(&wanted).unwrap()));
        let mut fork = fork.unwrap();
        let mut crossings: Vec<Crossing> = Vec::new();
        for forked in &fork.disks {
            run.step("prepare", |run| {
                run.disks[&*forked.name].prepare_freeze().unwrap();
            });
            run.step("open the successor", |run| {
                let old = &run.disks[&*forked.name];
                crossings.push(run.dir.begin_crossing(forked, old, &live(&run.dir)).unwrap());
            });
        }
        let child = run.open_child(&fork);
        // Guests still run.
        run.write("data", 7, EXTENT, BLOCK + 2);
        run.write("log", 8, 20 * EXTENT, 5);
        run.instant = run.step("the instant", |run| {
            for (forked, crossing) in fork.disks.iter().zip(&crossings) {
                crossing.cross();
                let name = *run.disks.keys().find(|name| **name == forked.name).unwrap();
                run.disks.insert(name, Arc::clone(crossing.next()));
            }
            child.cross();
            run.disks.insert("data-1", Arc::clone(child.next()));
        });
        for child in fork.disks.iter_mut().flat_map(|forked| &mut forked.children) {
            child.name = child.name.replace(BEFORE, "");
        }
        run.flushed.insert("data-1", vec![run.instant]);
        run.told = run.write("data-1", 20, EXTENT + 2, BLOCK);
        // Over what was written before the instant, beside it, and in a leaf of its own.
        run.write("data", 9, EXTENT + 1, BLOCK);
        run.write("data", 10, 25 * EXTENT, EXTENT);
        run.step("discard", |run| {
            let (offset, len) = (2 * EXTENT * SECTOR as u64, EXTENT * SECTOR as u64);
            run.disks["data"].discard(0, offset, len).unwrap();
        });
        run.confirmed = run.step("confirm", |run| run.dir.confirm_fork(&fork).unwrap());
        for crossing in &crossings {
            run.step("freeze", |run| crossing.freeze(&run.dir).unwrap());
            run.write("data", 11, 3, 2);
            run.write("data-1", 21, 27 * EXTENT, BLOCK);
        }
        run.settled = run.step("settle", |run| {
            let all: Vec<&Crossing> = crossings.iter().chain([&child]).collect();
            assert!(run.dir.settle_fork(&fork, &all).unwrap());
        });
        drop((crossings, child));
        run.flush("data-1");
        run.write("data", 12, 9 * EXTENT, BLOCK);
        run.write("data-1", 22, 2, 3);
        run.flush("data");
        run.write("data", 13, 0, 2 * BLOCK);
        run.step("checkpoint", |run| run.disks["data"].checkpoint().unwrap());
        run.write("data", 14, EXTENT, EXTENT);
        run
    }

    /// The last moment whose operation had ended when the store had had `point` operations, and the
    /// last whose operation had begun.
    fn around(&self, point: usize) -> (usize, usize) {
        let ended = self.moments.iter().rposition(|m| m.log.1 <= point).unwrap_or(0);
        let begun = self.moments.iter().rposition(|m| m.log.0 <= point).unwrap_or(0);
        (ended, begun.max(ended))
    }

    /// The tails as they may be at `point`: a record leaves a tail, and a tail goes, when an
    /// operation ends; a tail comes when one begins.
    fn tails_at(&self, point: usize) -> Tails {
        let (ended, begun) = self.around(point);
        let mut tails = self.moments[begun].tails.clone();
        tails.extend(self.moments[ended].tails.clone());
        tails
    }

    fn at_instant(&self, name: &str) -> &Contents {
        &self.moments[self.instant].live[name]
    }

    /// Checks children, and that `data`, and its child if there is one, hold in each sector what
    /// they held at some moment up to `to`, and not before those of `from`.
    fn check(
        &self,
        world: &World,
        (from, to): (&dyn Fn(&str) -> usize, usize),
    ) -> Result<(), Violation> {
        let children: BTreeSet<&str> =
            world.keys().map(String::as_str).filter(|name| name.ends_with("-1")).collect();
        let bad = |text: String| Err(Violation::new(Wrong::Value, text));
        if !children.is_empty() && children.len() != 2 {
            return bad(format!("there are only {children:?}"));
        }
        if let Some(child) = world.get("log-1")
            && child.contents != *self.at_instant("log")
        {
            return bad("log-1 is not what its parent was".into());
        }
        for name in ["data", "data-1"] {
            let Some(disk) = world.get(name) else { continue };
            // What is frozen is durable.
            let from = from(name);
            let from = if children.is_empty() { from } else { from.max(self.instant) };
            if let Err(text) = self.check_written(name, &disk.contents, (from, to)) {
                return bad(text);
            }
        }
        Ok(())
    }

    fn check_written(
        &self,
        name: &str,
        found: &Contents,
        (from, to): (usize, usize),
    ) -> Result<(), String> {
        // A fork that began to exist in recovery is what it was at the instant.
        let held = |i: usize| &self.moments[i.max(from)].live[name];
        let sectors: BTreeSet<u64> = (from..=to.max(from))
            .flat_map(|i| held(i).keys())
            .chain(found.keys())
            .copied()
            .collect();
        for sector in sectors {
            let tag = found.get(&sector);
            if !(from..=to.max(from)).any(|i| held(i).get(&sector) == tag) {
                let (first, last) = (self.moments[from].what, self.moments[to].what);
                let between = format!("between {first} and {last}");
                return Err(format!("{name}, sector {sector}: {tag:?}, {between}"));
            }
        }
        Ok(())
    }

    /// What is there, by the names that children got.
    fn by_name(&self, point: usize, world: &World) -> Result<World, Violation> {
        let before = world.keys().filter(|name| name.starts_with(BEFORE)).count();
        let confirmed = self.around(point).0 >= self.confirmed;
        if before > 0 && (confirmed || before < 2) {
            let names: Vec<&String> = world.keys().collect();
            return Err(Violation::new(Wrong::Value, format!("names of before: {names:?}")));
        }
        let now = |name: &String| name.strip_prefix(BEFORE).unwrap_or(name).to_owned();
        Ok(world.iter().map(|(name, disk)| (now(name), disk.clone())).collect())
    }

    fn check_power_cut(&self, point: usize, world: &World) -> Result<(), Violation> {
        let (ended, begun) = self.around(point);
        let world = &self.by_name(point, world)?;
        let flushed = |name: &str| {
            let last = self.flushed[name].iter().rfind(|i| **i <= ended);
            last.copied().unwrap_or(self.instant)
        };
        self.check(world, (&flushed, begun))?;
        if ended >= self.settled && !world.contains_key("data-1") {
            return Err(Violation::new(Wrong::Missing, "the children are gone"));
        }
        Ok(())
    }

    fn check_kill(&self, point: usize, world: &World) -> Result<(), Violation> {
        let (ended, begun) = self.around(point);
        let world = &self.by_name(point, world)?;
        self.check(world, (&|_| ended, begun))?;
        if ended >= self.told && !world.contains_key("data-1") {
            return Err(Violation::new(
                Wrong::Missing,
                "a guest was told, and the children are gone",
            ));
        }
        if ended < self.instant && world.contains_key("data-1") {
            return Err(Violation::new(Wrong::Garbage, "children before the instant"));
        }
        Ok(())
    }
}

/// What is in a store, opened for writing.
fn open_and_look(store: &SimStore, options: &OpenOptions) -> Result<World, Violation> {
    let error = |e| Violation::new(Wrong::Error, e);
    let dir = StoreDir::open_in(Arc::new(store.clone()), options).map_err(error)?;
    // As whoever serves them does it.
    for row in dir.disks() {
        dir.open_disk(&row.name, Access::Write, &live(&dir)).map_err(error)?;
    }
    if let Some(note) = dir.notes.iter().find(|note| note.contains("could not")) {
        return Err(Violation::new(Wrong::Error, note));
    }
    look(&dir)
}

/// Every power cut of the run with this log, from `first` on.
fn power_cuts(run: &Run, base: &Image, log: &[Op], first: usize) -> Report {
    let bounds = if soak() {
        Bounds { exhaustive: 9, random: 48, ..Bounds::default() }
    } else {
        Bounds { exhaustive: 4, random: 6, family: 8, ..Bounds::default() }
    };
    let (mut report, mut seen) = (Report::default(), BTreeMap::new());
    let mut walk = CrashWalk::new(base, log);
    loop {
        if walk.point() >= first {
            let point = walk.point();
            let stats = walk.visit(&bounds, &mut |state, image| {
                let found = seen.entry(image.fingerprint()).or_insert_with(|| {
                    report.images += 1;
                    no_panic(|| open_and_look(&SimStore::without_log(image), &after_power_cut()))
                });
                let checked = found.clone().and_then(|world| run.check_power_cut(point, &world));
                if let Err(violation) = checked {
                    report.add(violation, state.to_string());
                }
            });
            report.stats += stats;
        }
        if !walk.advance() {
            return report;
        }
    }
}

/// The folder of tails holds these and no others.
fn put_tails(run: &Run, tails: &Tails) {
    for name in tails_in(run.tails.path()).keys() {
        std::fs::remove_file(run.tails.path().join(name)).unwrap();
    }
    for (name, bytes) in tails {
        std::fs::write(run.tails.path().join(name), bytes).unwrap();
    }
}

fn recorded() -> (Run, Image, Vec<Op>) {
    let run = Run::whole();
    let (base, log) = (run.store.base(), run.store.log());
    put_tails(&run, &Tails::new());
    (run, base, log)
}

#[test]
fn power_cuts_around_the_instant() {
    let (run, base, log) = recorded();
    power_cuts(&run, &base, &log, 0).expect_none("cut: power cuts");
}

/// The process is killed at each operation, opened, killed again at once, and opened once more.
#[test]
fn kills_around_the_instant() {
    let (run, base, log) = recorded();
    let mut report = Report::default();
    for point in 0..=log.len() {
        let image = SimStore::from_log(base.clone(), log[..point].to_vec()).live_image();
        put_tails(&run, &run.tails_at(point));
        let store = SimStore::without_log(image);
        for again in ["", ", and again"] {
            report.images += 1;
            let found = no_panic(|| open_and_look(&store, &options()));
            if let Err(violation) = found.and_then(|world| run.check_kill(point, &world)) {
                report.add(violation, format!("killed at {point}{again}"));
            }
        }
    }
    report.expect_none("cut: kills");
}

/// The process is killed, and the power is cut while the next one settles the fork.
#[test]
fn power_cuts_while_a_killed_fork_is_settled() {
    let (run, base, log) = recorded();
    let mut report = Report::default();
    let bounds = Bounds { exhaustive: 2, random: 3, family: 3, ..Bounds::default() };
    let points = (run.moments[run.instant].log.1..=run.moments[run.settled].log.1)
        .step_by(if soak() { 1 } else { 9 });
    for point in points {
        put_tails(&run, &run.tails_at(point));
        let store = SimStore::from_log(base.clone(), log[..point].to_vec());
        let dir = StoreDir::open_in(Arc::new(store.clone()), &options()).unwrap();
        drop(dir.open_disk("data", Access::Write, &live(&dir)).unwrap());
        drop(dir);
        put_tails(&run, &Tails::new());
        // What was promised by then is promised still; nothing was flushed since.
        let promised = |world: &World| {
            let (_, begun) = run.around(point);
            run.check(&run.by_name(point, world)?, (&|_| 0, begun))
        };
        let (log, mut seen) = (store.log(), HashSet::new());
        let mut walk = CrashWalk::new(&base, &log);
        loop {
            if walk.point() >= point {
                let stats = walk.visit(&bounds, &mut |state, image| {
                    if !seen.insert(image.fingerprint()) {
                        return;
                    }
                    report.images += 1;
                    let found = no_panic(|| {
                        open_and_look(&SimStore::without_log(image), &after_power_cut())
                    });
                    if let Err(violation) = found.and_then(|world| promised(&world)) {
                        report.add(violation, format!("killed at {point}, then {state}"));
                    }
                });
                report.stats += stats;
            }
            if !walk.advance() {
                break;
            }
        }
    }
    report.expect_none("cut: power cuts in recovery");
}

/// Negative control: a successor whose flush does not wait until the old disk is frozen. What was
/// written before the instant, and flushed after it, is lost.
#[test]
fn a_flush_that_does_not_wait_for_the_freeze_is_caught() {
    let (run, base, log) = recorded();
    let freezing = run.moments[run.instant].log.1..run.moments[run.settled].log.1;
    let spoilt = drop_syncs(&log, |at, _| freezing.contains(&at));
    let report = power_cuts(&run, &base, &spoilt, freezing.start);
    assert!(report.counts.contains_key(&Wrong::Value), "found only {:?}", report.counts);
}

/// Negative control: drafts that are not durable when the catalogue knows of the fork. A power cut
/// leaves frozen disks that cannot go on.
#[test]
fn drafts_that_are_not_durable_when_disks_are_frozen_are_caught() {
    let (run, base, log) = recorded();
    let (began, ended) = run.moments[run.confirmed].log;
    let spoilt = drop_syncs(&log, |at, _| (began..ended).contains(&at));
    let report = power_cuts(&run, &base, &spoilt, began);
    assert!(!report.counts.is_empty(), "nobody noticed");
}

/// Negative control: a fork that nobody has noted before its instant. Guests were told of writes to
/// drafts that the next process removes.
#[test]
fn a_killed_fork_without_its_note_is_caught() {
    let (run, base, log) = recorded();
    let point = run.moments[run.told].log.1;
    put_tails(&run, &run.tails_at(point));
    let store = SimStore::from_log(base, log[..point].to_vec());
    let notes: Vec<String> =
        store.names().unwrap().into_iter().filter(|name| name.ends_with(".fork")).collect();
    assert_eq!(notes.len(), 1);
    store.remove(&notes[0]).unwrap();

    let found = no_panic(|| open_and_look(&store, &options()));

    assert!(found.and_then(|world| run.check_kill(point, &world)).is_err(), "nobody noticed");
}

/// Negative control: tails of what goes on that are forgotten. Guests were told of what is lost.
#[test]
fn a_killed_fork_without_the_tails_of_successors_is_caught() {
    let (run, base, log) = recorded();
    let point = run.moments[run.told + 2].log.1;
    let mut tails = run.tails_at(point);
    let before = &run.moments[0].tails;
    tails.retain(|name, _| before.contains_key(name));
    put_tails(&run, &tails);
    let image = SimStore::from_log(base, log[..point].to_vec()).live_image();

    let found = no_panic(|| open_and_look(&SimStore::without_log(image), &options()));

    assert!(found.and_then(|world| run.check_kill(point, &world)).is_err(), "nobody noticed");
}
