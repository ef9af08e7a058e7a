//! Visiting everything that a power cut may leave of a recorded run.
//!
//! Every state is opened for writing, read back whole, and compared with what the model allows. Of
//! a sample, the recovered disk then goes on working (and is read back again), and of a smaller
//! sample every power cut during that second run is visited too: crashes inside recovery.

use std::collections::HashMap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockd::disk::{Disk, Options};
use blockd::segment::file_name;
use blockd::store::sim::{Bounds, CrashStats, CrashWalk, Image, Op, SimStore};
use blockd::store::{Access, Store};
use format::Result;
use uuid::Uuid;

use crate::inspect::{Content, Violation, Wrong, contents, open_and_read, read_all};
use crate::model::{Model, View};
use crate::rng::Rng;
use crate::sim::{ByName, EXTENT, Script};

/// Violations kept for the report; more are only counted.
const KEPT: usize = 8;
/// Images whose content is remembered: neighbouring crash points leave the same ones.
const REMEMBERED: usize = 10_000;

static VISITED: AtomicUsize = AtomicUsize::new(0);

/// How much to visit.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Which subsets of un-synced operations survive.
    pub bounds: Bounds,
    /// One in so many distinct images goes on working.
    pub go_on: u64,
    /// One in so many of those has the crashes of its second run visited.
    pub again: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Plan { bounds: Bounds::default(), go_on: 16, again: 16 }
    }
}

/// A run: where it started, what was done, and what that means.
pub struct Recording {
    /// The store at the start.
    pub base: Image,
    /// The operations of the store.
    pub log: Vec<Op>,
    /// What was done to the disk.
    pub model: Model,
    /// The segment of the disk.
    pub segment: Uuid,
    /// How to open it.
    pub options: Options,
}

impl From<&Script> for Recording {
    fn from(script: &Script) -> Self {
        let (base, log) = script.recording();
        // After a power cut the host has another boot, and no tail.
        let boot = Uuid::from_u128(!script.options.boot.as_u128());
        let options = Options { live: false, tail_dir: None, boot, ..script.options.clone() };
        Recording { base, log, model: script.model(), segment: script.segment, options }
    }
}

/// What a visit found.
#[derive(Debug, Default)]
pub struct Report {
    /// How much was visited.
    pub stats: CrashStats,
    /// Images that were opened, each once.
    pub images: usize,
    /// The first violations, with the crash state.
    pub violations: Vec<(Violation, String)>,
    /// All violations, by kind.
    pub counts: HashMap<Wrong, usize>,
}

impl Report {
    /// Prints the number of states, past the capture of the test harness, so that every run shows
    /// what it covered.
    ///
    /// # Panics
    /// When there is a violation, with the first ones.
    pub fn expect_none(&self, test: &str) {
        self.print(test);
        let list: Vec<String> =
            self.violations.iter().map(|(v, state)| format!("{v}\n    {state}")).collect();
        let counts = &self.counts;
        assert!(list.is_empty(), "{test}: violations {counts:?}, the first:\n{}", list.join("\n"));
    }

    /// Prints the number of states, if any crash point was visited.
    pub fn print(&self, test: &str) {
        let states = self.stats.states;
        if self.stats.points == 0 {
            return;
        }
        let all = VISITED.fetch_add(states, Ordering::Relaxed) + states;
        let line = format!(
            "{test}: crash states visited: {states} at {} points, {} distinct images (all so far: \
             {all})\n",
            self.stats.points, self.images
        );
        // A number that cannot be shown is no reason to fail.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    /// Adds a violation found in a crash state.
    pub fn add(&mut self, violation: Violation, state: String) {
        *self.counts.entry(violation.wrong).or_default() += 1;
        if self.violations.len() < KEPT {
            self.violations.push((violation, state));
        }
    }

    /// Adds what another visit found; `prefix` says which.
    pub fn take(&mut self, other: Report, prefix: &str) {
        self.stats += other.stats;
        self.images += other.images;
        for (wrong, count) in other.counts {
            *self.counts.entry(wrong).or_default() += count;
        }
        let room = KEPT.saturating_sub(self.violations.len());
        let more = other.violations.into_iter().take(room);
        self.violations.extend(more.map(|(v, state)| (v, format!("{prefix}\n    then {state}"))));
    }
}

impl Recording {
    /// The run with another log; `map` says for each position of the old log where it is in the
    /// new one.
    #[must_use]
    pub fn with_log(&self, log: Vec<Op>, map: impl Fn(usize) -> usize) -> Recording {
        let mut history = self.model.history().clone();
        for record in &mut history.records {
            record.log_start = map(record.log_start);
            record.log_end = record.log_end.map(&map);
        }
        Recording {
            base: self.base.clone(),
            log,
            model: Model::new(history),
            segment: self.segment,
            options: self.options.clone(),
        }
    }

    /// Visits every crash point of the run.
    #[must_use]
    pub fn visit(&self, plan: &Plan) -> Report {
        self.visit_from(0, plan)
    }

    /// Visits the crash points from `first` on. What was not durable by then may be lost at each.
    ///
    /// # Panics
    /// When the log is shorter.
    #[must_use]
    pub fn visit_from(&self, first: usize, plan: &Plan) -> Report {
        let mut visit = Visit { run: self, plan, report: Report::default(), seen: HashMap::new() };
        let mut walk = CrashWalk::new(&self.base, &self.log);
        while walk.point() < first {
            assert!(walk.advance(), "the log is shorter than the crash point");
        }
        loop {
            visit.point(&walk);
            if !walk.advance() {
                return visit.report;
            }
        }
    }

    /// What a disk of this image holds. A panic is a violation like any other.
    ///
    /// # Errors
    /// Whatever is wrong.
    pub fn recover(&self, image: Image) -> Result<Content, Violation> {
        no_panic(|| {
            let store = SimStore::without_log(image);
            let (disk, content) = open_and_read(&store, self.segment, &self.options)?;
            drop(disk);
            Ok(content)
        })
    }
}

/// Runs `run`; a panic becomes a violation.
///
/// # Errors
/// As `run`, or `Panic`.
pub fn no_panic<T>(run: impl FnOnce() -> Result<T, Violation>) -> Result<T, Violation> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(Violation::new(Wrong::Panic, text.unwrap_or_default()))
    })
}

struct Visit<'a> {
    run: &'a Recording,
    plan: &'a Plan,
    report: Report,
    seen: HashMap<u128, Arc<Result<Content, Violation>>>,
}

impl Visit<'_> {
    fn point(&mut self, walk: &CrashWalk<'_>) {
        let allowed = self.run.model.allowed(View::PowerCut(walk.point()));
        let stats = walk.visit(&self.plan.bounds, &mut |state, image| {
            let print = image.fingerprint();
            let (found, fresh) = self.content(print, &image);
            let checked = found.as_ref().as_ref().map_err(Clone::clone);
            let checked = checked.and_then(|c| c.check(self.run.model.sectors(), &allowed));
            if let Err(violation) = checked {
                self.report.add(violation, state.to_string());
            } else if let (true, Ok(content)) = (fresh, found.as_ref()) {
                self.go_on(print, image, content, &state.to_string());
            }
        });
        self.report.stats += stats;
    }

    fn content(&mut self, print: u128, image: &Image) -> (Arc<Result<Content, Violation>>, bool) {
        if let Some(found) = self.seen.get(&print) {
            return (Arc::clone(found), false);
        }
        self.report.images += 1;
        if self.seen.len() >= REMEMBERED {
            self.seen.clear();
        }
        let found = Arc::new(self.run.recover(image.clone()));
        self.seen.insert(print, Arc::clone(&found));
        (found, true)
    }

    fn go_on(&mut self, print: u128, image: Image, content: &Content, state: &str) {
        let mut rng = Rng::new(u64::try_from(print >> 64).expect("64 bits"));
        if self.plan.go_on == 0 || content.seal != 0 || !rng.one_in(self.plan.go_on) {
            return;
        }
        let run = self.run;
        let went = no_panic(|| {
            read_only(&image, run.segment, &run.options, content)?;
            let script = Script::over(image, run.segment, content.tags.clone(), content.sectors);
            go_on(script, content.sectors, &mut rng)
        });
        match went {
            Err(violation) => self.report.add(violation, state.to_string()),
            Ok(script) if self.plan.again > 0 && rng.one_in(self.plan.again) => {
                let bounds = Bounds { exhaustive: 5, random: 4, family: 8, ..self.plan.bounds };
                let plan = Plan { bounds, go_on: 0, again: 0 };
                self.report.take(Recording::from(&script).visit(&plan), state);
            }
            Ok(_) => {}
        }
    }
}

/// Opens for reading: the content is the same and nothing is written.
fn read_only(
    image: &Image,
    segment: Uuid,
    options: &Options,
    content: &Content,
) -> Result<(), Violation> {
    let error = |e| Violation::new(Wrong::Error, e);
    let store = SimStore::from_image(image.clone());
    let file = store.open(&file_name(segment), Access::Read).map_err(error)?;
    let disk = Disk::open_read_only(file, &ByName(&store), options).map_err(error)?;
    if contents(&disk)? != content.tags {
        return Err(Violation::new(Wrong::Value, "opened for reading, it holds something else"));
    }
    if store.log_len() > 0 {
        return Err(Violation::new(Wrong::GoesOn, "opened for reading, it writes"));
    }
    read_all(&disk, &content.tags)
}

/// Lets a recovered disk work: overwrites, first writes, discards, flushes, a checkpoint, a clean
/// close; then reads it back.
fn go_on(mut script: Script, sectors: u64, rng: &mut Rng) -> Result<Script, Violation> {
    let error = |e| Violation::new(Wrong::GoesOn, e);
    script.open().map_err(error)?;
    let old = script.history().base.keys().copied().nth(rng.below(64).try_into().unwrap_or(0));
    if let Some(at) = old {
        script.write(at, 1).map_err(error)?;
    }
    for step in 0..4 {
        let at = rng.below(sectors - 2 * EXTENT);
        script.write(at, 1 + rng.below(24)).map_err(error)?;
        let at = rng.below(sectors / EXTENT) * EXTENT;
        script.discard(at, EXTENT.min(sectors - at)).map_err(error)?;
        match step {
            0 | 1 => script.flush().map_err(error)?,
            2 => script.checkpoint().map_err(error)?,
            _ => {}
        }
    }
    script.close().map_err(error)?;
    let (_, content) = open_and_read(&script.store, script.segment, &script.options)?;
    let model = script.model();
    if content.tags != model.contents() {
        let allowed = model.allowed(View::Kill(u64::MAX));
        content.check(model.sectors(), &allowed)?;
    }
    Ok(script)
}
