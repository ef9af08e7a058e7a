//! A host that fails: each call of a scripted run in turn returns an error, runs out of space, or
//! is acknowledged and not done.
//!
//! - Every error has a name and an object, nothing panics.
//! - Once the fault is over, the run goes on, on the same open disk unless a sync or a superblock
//!   write failed, and at its end everything is there.
//! - After a failed sync the disk refuses everything until it is opened again; what it holds then
//!   is what a power cut could have left.
//! - A metadata write that was lost or went elsewhere, and any flipped bit in metadata, is noticed
//!   or does no harm: never silently wrong content.

use std::collections::BTreeSet;

use blockd::disk::problem::What;
use blockd::disk::{Disk, Options};
use blockd::segment::{file_name, new_name};
use blockd::store::sim::{Bounds, Fault, Faults, Image, Op, SimStore, When};
use blockd::store::{Access, Store};
use format::entry::BlockState;
use format::limits::{PAGE, SUPERBLOCK_OFFSETS};
use format::units::GuestBlock;
use format::{Error, Kind, Result};
use offshoot_tests::crash::{Plan, Recording, Report, no_panic};
use offshoot_tests::inspect::{Violation, Wrong, open_and_read};
use offshoot_tests::kill::{live, memory_dir};
use offshoot_tests::model::{Action, View};
use offshoot_tests::pattern::{Found, SECTOR, look};
use offshoot_tests::rng::{Rng, soak};
use offshoot_tests::sim::{BLOCK, ByName, EXTENT, LEAF, Script, create};
use uuid::Uuid;

const SECTORS: u64 = LEAF + 32 * EXTENT;

/// One operation of the scripted run.
#[derive(Debug, Clone, Copy)]
enum Step {
    Open,
    Write(u64, u64),
    Discard(u64, u64),
    Flush,
    Checkpoint,
    Resize(u64),
    Close,
}

/// A bit of everything: first writes, overwrites, parts of blocks, both leaves, reuse of space.
fn steps() -> Vec<Step> {
    use Step::{Checkpoint, Close, Discard, Flush, Open, Resize, Write};
    let mut steps = vec![
        Open,
        Write(3, 1),
        Write(4 * EXTENT, 2 * EXTENT),
        Flush,
        Discard(0, EXTENT),
        Write(LEAF - 3, 6),
        Discard(EXTENT + BLOCK, 2 * BLOCK),
        Flush,
        Write(9 * EXTENT, EXTENT),
        Write(EXTENT + BLOCK + 1, 1),
        Checkpoint,
        Resize(SECTORS - 2 * EXTENT - 3),
        Write(SECTORS - 3 * EXTENT, 8),
        Resize(SECTORS + 5),
    ];
    // Enough flushes that the journal makes a checkpoint necessary.
    for i in 0..10 {
        steps.extend([Write((10 + i) * EXTENT + i, 3), Flush]);
    }
    steps.extend([Discard(4 * EXTENT, 4 * EXTENT), Write(30 * EXTENT, 9), Flush, Close]);
    steps
}

fn prepared() -> Script {
    let mut script = Script::empty(SECTORS);
    script.open().unwrap();
    script.write(0, 2 * EXTENT).unwrap();
    script.write(LEAF + EXTENT, 20).unwrap();
    script.close().unwrap();
    script.settled()
}

fn make(script: &mut Script, step: Step) -> Result<()> {
    match step {
        Step::Open => script.open(),
        Step::Write(first, count) => script.write(first, count),
        Step::Discard(first, count) => script.discard(first, count),
        Step::Flush => script.flush(),
        Step::Checkpoint => script.checkpoint(),
        Step::Resize(sectors) => script.resize(sectors),
        Step::Close => script.close(),
    }
}

fn expect_named(error: &Error) {
    let text = error.to_string();
    let object = ["disk disk-", "simulated file", "segment "].iter().any(|o| text.contains(o));
    assert!(object, "it names no object: {text}");
}

/// How a run under faults went.
struct Run {
    script: Script,
    /// How often the open disk refused to go on.
    reopened: usize,
}

/// Makes every step until it succeeds; the fault is over after its first error.
fn run(script: Script, faults: Faults) -> Run {
    let mut run = Run { script, reopened: 0 };
    run.script.store.set_faults(faults);
    for step in steps() {
        for attempt in 0.. {
            let Err(error) = make(&mut run.script, step) else { break };
            expect_named(&error);
            assert!(attempt < 3, "{step:?} fails again and again: {error}");
            run.script.store.set_faults(Faults::none());
            run.after(step, &error);
        }
    }
    run
}

impl Run {
    /// Brings the disk to where the failed step can be made again.
    fn after(&mut self, step: Step, error: &Error) {
        let open = !matches!(step, Step::Open | Step::Close);
        if open && self.script.disk().flush().is_ok() {
            return;
        }
        if open {
            expect_dead(self.script.disk(), error);
            self.reopened += 1;
        }
        if !matches!(step, Step::Open) {
            self.reopen();
        }
    }

    /// What the disk holds now is what a power cut might have left.
    fn reopen(&mut self) {
        let script = &mut self.script;
        script.kill();
        let (disk, found) = open_and_read(&script.store, script.segment, &script.options)
            .unwrap_or_else(|v| panic!("{v}"));
        drop(disk);
        let allowed = script.model().allowed(View::PowerCut(script.store.log_len()));
        found.check(script.model().sectors(), &allowed).unwrap_or_else(|v| panic!("{v}"));
        script.adopt(found.tags);
        script.open().unwrap();
    }

    /// At the end everything is there.
    fn expect_all(&self) {
        let script = &self.script;
        let (_, found) = open_and_read(&script.store, script.segment, &Options::default())
            .unwrap_or_else(|v| panic!("{v}"));
        assert!(found.tags == script.model().contents(), "something is missing");
        assert_eq!(found.sectors, SECTORS + 5);
    }

    /// The store's operation at which the first fault hit.
    fn hit(&self) -> Option<Op> {
        let hits = self.script.store.hits();
        Some(self.script.store.log().get(hits.first()?.at)?.clone())
    }
}

/// Nothing works any more, reads neither, and each call says so.
fn expect_dead(disk: &Disk, first: &Error) {
    let refusals = [
        disk.read(0, 0, &mut [0; SECTOR]),
        disk.write(0, 0, &[0; SECTOR]),
        disk.discard(0, 0, SECTOR as u64),
        disk.write_zeroes(0, 0, SECTOR as u64, true),
        disk.flush(),
        disk.checkpoint(),
        disk.resize(disk.size() + SECTOR as u64, false),
    ];
    for (i, refusal) in refusals.into_iter().enumerate() {
        let error = refusal.err().unwrap_or_else(|| panic!("call {i} works after: {first}"));
        assert_eq!(error.kind(), Kind::Failed, "{error}");
        expect_named(&error);
    }
}

/// Lets `fault` befall the calls of the run one after another, until it befalls none. Returns how
/// many runs there were. Of some runs, every power cut is visited as well.
fn each_call(fault: Fault, check: impl Fn(&Run)) -> usize {
    let mut visited = Report::default();
    for n in 0.. {
        // On a new disk the file has yet to grow.
        let script = if n % 2 == 0 { Script::empty(SECTORS) } else { prepared() };
        let run = run(script, Faults::none().add(When::Nth(n), fault));
        if run.script.store.hits().is_empty() {
            visited.expect_none(&format!("{fault:?} at {n} calls in turn"));
            return usize::try_from(n).unwrap();
        }
        check(&run);
        run.expect_all();
        if n % if soak() { 4 } else { 24 } == 3 {
            let bounds = Bounds { exhaustive: 5, random: 4, family: 8, ..Bounds::default() };
            let report = Recording::from(&run.script).visit(&Plan { bounds, go_on: 64, again: 0 });
            visited.take(report, &format!("{fault:?} at call {n}"));
        }
    }
    unreachable!("the run has an end")
}

fn is_superblock(op: &Op) -> bool {
    matches!(op, Op::Write { offset, .. } if SUPERBLOCK_OFFSETS.contains(offset))
}

#[test]
fn each_write_without_space() {
    let runs = each_call(Fault::WriteNoSpace, |run| {
        let hit = run.hit().expect("half of the write is done");
        assert!(run.reopened == 0 || is_superblock(&hit), "{hit}: the disk had to be opened again");
    });
    assert!(runs > 60, "only {runs} writes");
}

#[test]
fn each_write_with_an_error() {
    let runs = each_call(Fault::WriteIo, |_| ());
    assert!(runs > 60, "only {runs} writes");
}

#[test]
fn each_sync_with_an_error() {
    let runs = each_call(Fault::SyncIo, |run| {
        // While it is opened, or at its close, there is no disk to refuse.
        assert!(run.reopened <= 1);
    });
    assert!(runs > 30, "only {runs} syncs");
}

/// The host keeps showing what the failed sync covered. The disk refuses all the same; what the
/// next opening sees is allowed, and the power cut right after it, too.
#[test]
fn each_sync_with_an_error_that_only_the_cache_survives() {
    let mut visited = Report::default();
    for n in 0.. {
        let mut script = prepared();
        script.store.set_faults(Faults::none().add(When::Nth(n), Fault::SyncIoCached));
        let failed = steps().into_iter().find_map(|step| {
            let error = make(&mut script, step).err()?;
            if !matches!(step, Step::Open | Step::Close) {
                expect_dead(script.disk(), &error);
            }
            Some(error)
        });
        let Some(error) = failed else {
            assert!(n > 30, "only {n} syncs");
            visited.expect_none("SyncIoCached at each sync in turn");
            return;
        };
        expect_named(&error);
        script.kill();
        let recording = Recording::from(&script);
        let (_, found) = open_and_read(&script.store, script.segment, &script.options)
            .unwrap_or_else(|v| panic!("sync {n}: {v}"));
        let allowed = recording.model.allowed(View::PowerCut(recording.log.len()));
        found.check(recording.model.sectors(), &allowed).unwrap_or_else(|v| panic!("{v}"));
        if n % if soak() { 1 } else { 12 } == 5 {
            let bounds = Bounds { exhaustive: 4, random: 2, family: 4, ..Bounds::default() };
            let report = recording.visit(&Plan { bounds, go_on: 0, again: 0 });
            visited.take(report, &format!("sync {n}"));
        }
    }
}

#[test]
fn each_punch_with_an_error() {
    for fault in [Fault::PunchIo, Fault::PunchUnsupported] {
        let runs = each_call(fault, |run| assert_eq!(run.reopened, 0));
        assert!(runs > 3, "only {runs} punches");
    }
}

#[test]
fn each_change_of_length_with_an_error() {
    for fault in [Fault::SetLenIo, Fault::SetLenNoSpace] {
        let runs = each_call(fault, |run| assert_eq!(run.reopened, 0));
        assert!(runs > 0, "the file never grew: {runs}");
    }
}

/// A host that cannot hold space ahead costs nothing but the promise.
#[test]
fn each_reservation_with_an_error() {
    for fault in [Fault::ReserveNoSpace, Fault::ReserveUnsupported] {
        let runs = each_call(fault, |run| assert_eq!(run.reopened, 0));
        assert!(runs > 10, "only {runs} reservations");
    }
}

#[test]
fn each_read_with_an_error() {
    for fault in [Fault::ReadIo, Fault::ReadShort] {
        let runs = each_call(fault, |run| assert_eq!(run.reopened, 0));
        assert!(runs > 10, "only {runs} reads");
    }
}

/// A file system that is full from some page on, until somebody makes room.
#[test]
fn every_degree_of_fullness() {
    let used =
        prepared().store.live_image().get(&file_name(Uuid::from_u128(100))).unwrap().allocated();
    let (mut full, mut visited) = (0, Report::default());
    for pages in 0..200 {
        let run = run(prepared(), Faults::none().capacity(used + pages * PAGE as u64));
        run.expect_all();
        full += usize::from(run.script.history().records.iter().any(|r| !r.ok));
        if pages % 50 == 7 {
            let bounds = Bounds { exhaustive: 4, random: 4, family: 8, ..Bounds::default() };
            let report = Recording::from(&run.script).visit(&Plan { bounds, go_on: 64, again: 0 });
            visited.take(report, &format!("{pages} free pages"));
        }
    }
    visited.expect_none("every_degree_of_fullness");
    assert!(full > 20, "it was full in {full} runs only");
}

/// An error while a disk is made leaves no disk, and it can be made again.
#[test]
fn each_call_of_a_creation_with_an_error() {
    let faults = [
        Fault::CreateIo,
        Fault::CreateNoSpace,
        Fault::WriteIo,
        Fault::WriteNoSpace,
        Fault::SetLenNoSpace,
        Fault::SyncIo,
        Fault::RenameIo,
        Fault::SyncNamesIo,
    ];
    for fault in faults {
        for n in 0.. {
            let (store, segment) = (SimStore::new(), Uuid::from_u128(100));
            store.set_faults(Faults::none().add(When::Nth(n), fault));
            let Err(error) = create(&store, segment, SECTORS, None) else {
                assert!(n > 0, "{fault:?} befell nothing");
                break;
            };
            expect_named_or_store(&error);
            store.set_faults(Faults::none());
            // Where the rename was made, the disk is there and whole; else it can be made anew.
            if store.names().unwrap().contains(&file_name(segment)) {
                assert_eq!(fault, Fault::SyncNamesIo);
            } else {
                let _ = store.remove(&new_name(segment));
                create(&store, segment, SECTORS, None).unwrap();
            }
            open_and_read(&store, segment, &Options::default()).unwrap_or_else(|v| panic!("{v}"));
        }
    }
}

fn expect_named_or_store(error: &Error) {
    let text = error.to_string();
    assert!(text.contains("simulated store") || text.contains("simulated file"), "{text}");
}

/// Sealing that stops anywhere leaves an active disk or a sealed one whose sums can be made.
#[test]
fn each_call_of_a_seal_with_an_error() {
    for fault in [Fault::WriteIo, Fault::WriteNoSpace, Fault::SyncIo, Fault::ReadIo] {
        for n in 0.. {
            let mut script = prepared();
            script.open().unwrap();
            script.write(20 * EXTENT, 9).unwrap();
            script.store.set_faults(Faults::none().add(When::Nth(n), fault));
            let Err(error) = script.seal() else {
                assert!(n > 0, "{fault:?} befell nothing");
                break;
            };
            expect_named(&error);
            script.store.set_faults(Faults::none());
            seal_again(&mut script, &format!("{fault:?} at call {n}"));
        }
    }
}

fn seal_again(script: &mut Script, what: &str) {
    let (store, segment, none) = (script.store.clone(), script.segment, Options::default());
    let state = |v: &str| {
        open_and_read(&store, segment, &none).unwrap_or_else(|e| panic!("{what}, {v}: {e}")).1
    };
    let found = state("after the error");
    let allowed = script.model().allowed(View::PowerCut(store.log_len()));
    found.check(script.model().sectors(), &allowed).unwrap_or_else(|v| panic!("{what}: {v}"));
    match found.seal {
        0 => {
            script.adopt(found.tags.clone());
            script.open().unwrap();
            script.seal().unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        1 => {
            let file = store.open(&file_name(segment), Access::Write).unwrap();
            Disk::finish_seal(file, &ByName(&store), &none, &mut |_, _| Ok(()))
                .unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        _ => {}
    }
    let sealed = state("sealed");
    assert_eq!((sealed.seal, &sealed.tags), (2, &found.tags), "{what}");
}

/// Records of the tail may name data that the failed sync lost: they are not believed any more, and
/// that completed writes may be missing is said.
#[test]
fn a_failed_sync_voids_the_tail() {
    let dir = memory_dir();
    let mut script = prepared();
    script.options = live(dir.path());
    script.open().unwrap();
    script.write(20 * EXTENT, 8).unwrap();
    script.flush().unwrap();
    script.write(21 * EXTENT, 8).unwrap();
    script.store.set_faults(Faults::none().add(When::Nth(0), Fault::SyncIo));
    expect_dead(script.disk(), &script.flush().unwrap_err());
    script.kill();

    let error = script.open().unwrap_err();

    assert_eq!(error.kind(), Kind::TailLost, "{error}");
    script.options.accept_lost_tail = true;
    let (disk, found) = open_and_read(&script.store, script.segment, &script.options).unwrap();
    let allowed = script.model().allowed(View::PowerCut(script.store.log_len()));
    found.check(script.model().sectors(), &allowed).unwrap_or_else(|v| panic!("{v}"));
    disk.close().unwrap();
}

/// A run on a host that acknowledges, with what its log would have been on a good one.
struct Sly {
    script: Script,
    /// A page of the file that holds what was meant for another.
    clobbered: Option<u64>,
}

/// The scripted run with `fault` at write number `n`; `closed` says whether it ends in a clean
/// close or in a kill behind the last flush.
fn sly_run(n: u64, fault: Fault, closed: bool) -> Sly {
    let mut script = prepared();
    script.store.set_faults(Faults::none().add(When::Nth(n), fault));
    for step in steps() {
        if closed || !matches!(step, Step::Close) {
            make(&mut script, step).unwrap_or_else(|e| panic!("write {n}, {step:?}: {e}"));
        }
    }
    script.kill();
    script.store.set_faults(Faults::none());
    Sly { script, clobbered: None }
}

/// The writes of metadata in the run: number among all writes, and file offset. The pages of the
/// last commit are left out when no checkpoint followed: losing them looks like a power cut.
fn metadata_writes(closed: bool) -> Vec<(u64, u64)> {
    let script = sly_run(u64::MAX, Fault::WriteLost, closed).script;
    let history = script.history();
    let flushed = history.records.iter().rfind(|r| r.action == Action::Flush).unwrap();
    let last_commit =
        if closed { usize::MAX..usize::MAX } else { flushed.log_start..flushed.log_end.unwrap() };
    let log = script.store.log();
    let writes = log.iter().enumerate().filter_map(|(at, op)| match op {
        Op::Write { offset, data, .. } => Some((at, *offset, data)),
        _ => None,
    });
    (0..)
        .zip(writes)
        .filter(|(_, (at, offset, data))| {
            let journal = (1 << 20..(1 << 20) + EXTENT * SECTOR as u64).contains(offset);
            let tagged = |s: &[u8]| matches!(look(s, 0), Found::Tag(_) | Found::Foreign { .. });
            let empty = data.iter().all(|b| *b == 0);
            let content = empty || data.chunks_exact(SECTOR).any(tagged);
            !(content || journal && last_commit.contains(at))
        })
        .map(|(n, (_, offset, _))| (n, offset))
        .collect()
}

/// The damage is noticed, or nothing is wrong. Returns true when it was noticed.
fn expect_noticed_or_harmless(image: Image, run: &Sly) -> Result<bool, Violation> {
    let store = SimStore::without_log(image);
    let file = store.open(&file_name(run.script.segment), Access::Write).unwrap();
    let Ok(disk) = Disk::open(file, &ByName(&store), &Options::default()) else { return Ok(true) };
    let noticed = disk.problems.iter().any(|p| p.what != What::SuperblockCopy);
    let model = run.script.model();
    let want = model.contents();
    let size = disk.size() / SECTOR as u64;
    if size != model.size() {
        return Err(Violation::new(Wrong::Size, size));
    }
    // Every block that a write of the run touched, through the disk.
    for block in model.sectors().iter().map(|s| s / BLOCK * BLOCK) {
        let offset = block * SECTOR as u64;
        let place = disk.map().block(GuestBlock(block / BLOCK)).ok();
        let place = place.and_then(|state| match state {
            BlockState::Data { block, .. } => Some(block.0),
            _ => None,
        });
        if place.is_some() && place == run.clobbered {
            continue;
        }
        let sectors = BLOCK.min(size.saturating_sub(block));
        let mut bytes = vec![0; usize::try_from(sectors).unwrap() * SECTOR];
        match disk.read(0, offset, &mut bytes) {
            Ok(()) => {}
            Err(e) if noticed && e.kind() == Kind::Corrupt => continue,
            Err(e) => return Err(Violation::new(Wrong::Error, e)),
        }
        for (at, bytes) in (block..).zip(bytes.chunks_exact(SECTOR)) {
            let expected = want.get(&at).map_or(Found::Zero, |tag| Found::Tag(*tag));
            let found = look(bytes, at);
            if found != expected {
                let text = format!("sector {at}: {found:?}, should be {expected:?}");
                return Err(Violation::new(Wrong::Value, text));
            }
        }
    }
    Ok(noticed)
}

/// Tries every metadata write and returns how many were noticed.
fn each_metadata_write(fault: Fault, shift: i64) -> usize {
    let mut noticed = 0;
    for closed in [true, false] {
        for (n, offset) in metadata_writes(closed) {
            let mut run = sly_run(n, fault, closed);
            let page = offset / PAGE as u64;
            run.clobbered = page.checked_add_signed(shift).filter(|_| shift != 0);
            let image = run.script.store.live_image();
            let outcome = no_panic(|| expect_noticed_or_harmless(image, &run));
            noticed += usize::from(outcome.unwrap_or_else(|v| {
                panic!("{fault:?} of write {n} at offset {offset}, closed {closed}: {v}")
            }));
        }
    }
    noticed
}

#[test]
fn each_lost_write_of_metadata_is_noticed_or_harmless() {
    let noticed = each_metadata_write(Fault::WriteLost, 0);
    assert!(noticed > 0, "nothing was ever noticed");
}

#[test]
fn each_misdirected_write_of_metadata_is_noticed_or_harmless() {
    for pages in [-1, 1, 3, 16] {
        let noticed = each_metadata_write(Fault::WriteMisdirected { pages }, pages);
        assert!(noticed > 0, "nothing was ever noticed");
    }
}

#[test]
fn each_flipped_bit_in_metadata_is_noticed_or_harmless() {
    let (mut rng, mut noticed) = (Rng::new(1), 0);
    for closed in [true, false] {
        let run = sly_run(u64::MAX, Fault::WriteLost, closed);
        let (image, name) = (run.script.store.live_image(), file_name(run.script.segment));
        let pages: BTreeSet<u64> = metadata_writes(closed).iter().map(|(_, at)| *at).collect();
        for page in pages {
            for round in 0..if soak() { 64 } else { 6 } {
                let byte = if round == 0 { 0 } else { rng.below(PAGE as u64) };
                let mut image = image.clone();
                image.flip_bit(&name, page + byte, u32::try_from(rng.below(8)).unwrap()).unwrap();
                let outcome = no_panic(|| expect_noticed_or_harmless(image, &run));
                noticed += usize::from(outcome.unwrap_or_else(|v| {
                    panic!("a bit in byte {byte} of the page at {page}, closed {closed}: {v}")
                }));
            }
        }
    }
    assert!(noticed > 0, "nothing was ever noticed");
}
