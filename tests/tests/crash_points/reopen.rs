//! Both crash domains in a row: the process is killed at any moment, another one opens the disk and
//! goes on, and then the power is cut. What the killed process wrote and did not sync is in the
//! host's cache when the next one reads it, and a power cut may take any of it still.

use std::sync::Arc;

use blockd::disk::Options;
use blockd::store::sim::{Bounds, drop_syncs};
use format::limits;
use offshoot_tests::crash::{Plan, Recording, Report, no_panic};
use offshoot_tests::inspect::{Content, Violation, Wrong, contents};
use offshoot_tests::kill::{Revived, Watch, memory_dir};
use offshoot_tests::model::View;
use offshoot_tests::rng::{Rng, soak};
use offshoot_tests::sim::{BLOCK, EXTENT, LEAF, Script};

use super::orders::copy;
use super::prepared;

/// What the second process does once it has opened the disk.
type GoOn = fn(&mut Script) -> format::Result<()>;

/// A disk with data, whose process does a little of everything; the kills.
fn killed() -> (Script, Arc<Watch>) {
    let mut script = prepared(|s| {
        s.write(0, 3 * EXTENT).unwrap();
        s.write(LEAF - BLOCK, 2 * BLOCK).unwrap();
    });
    let dir = memory_dir();
    let watch = Watch::over(&mut script, dir.path());
    watch.look();
    script.open().unwrap();
    script.write(5 * EXTENT + 3, 12).unwrap();
    watch.look();
    script.write(2, 3 * BLOCK).unwrap();
    watch.look();
    script.discard(EXTENT, EXTENT).unwrap();
    watch.look();
    script.flush().unwrap();
    script.write(7 * EXTENT, EXTENT).unwrap();
    script.write(LEAF - 1, 2).unwrap();
    script.discard(2 * EXTENT, 2 * BLOCK).unwrap();
    watch.look();
    script.checkpoint().unwrap();
    script.discard(5 * EXTENT, EXTENT).unwrap();
    script.write(9 * EXTENT, 2 * BLOCK).unwrap();
    watch.look();
    script.close().unwrap();
    watch.look();
    (script, watch)
}

/// Opens the disk again: with the tail, it holds what the killed process completed; without one, it
/// holds what a power cut could have left, and from then on that is durable.
fn open(revived: &mut Revived, live: bool) -> Result<(), Violation> {
    let script = &mut revived.script;
    let model = script.model();
    let allowed = if live {
        model.allowed(View::Kill(u64::MAX))
    } else {
        let (lanes, boot) = (script.options.lanes, script.options.boot);
        script.options = Options { lanes, boot, accept_lost_tail: true, ..Options::default() };
        model.allowed(View::PowerCut(revived.killed_at))
    };
    script.open().map_err(|e| Violation::new(Wrong::Error, e))?;
    let tags = contents(script.disk())?;
    let sectors = script.disk().size() / limits::SECTOR;
    let found = Content { sectors, seal: 0, tags };
    found.check(model.sectors(), &allowed)?;
    script.adopt(found.tags);
    if !live {
        script.note_durable();
    }
    Ok(())
}

fn plan() -> Plan {
    let bounds = if soak() {
        Bounds { exhaustive: 8, random: 24, family: 24, ..Bounds::default() }
    } else {
        Bounds { exhaustive: 4, random: 6, family: 4, ..Bounds::default() }
    };
    Plan { bounds, go_on: 0, again: 0 }
}

/// Kills at every moment, goes on, and cuts the power at every moment from the kill on.
fn check(test: &str, go_on: GoOn) {
    let plan = plan();
    let (script, watch) = killed();
    let mut all = Report::default();
    for (at, mut revived) in (0..).zip(watch.revive(&script)) {
        let live = Rng::new(at).one_in(2);
        let with = if live { "with" } else { "without" };
        let kill = format!("killed after {} operations, {with} its tail", revived.killed_at);
        let went = no_panic(|| {
            open(&mut revived, live)?;
            go_on(&mut revived.script).map_err(|e| Violation::new(Wrong::GoesOn, e))
        });
        if let Err(violation) = went {
            all.add(violation, kill);
            continue;
        }
        let report = Recording::from(&revived.script).visit_from(revived.killed_at, &plan);
        all.take(report, &kill);
    }
    all.expect_none(&format!("reopen: {test}"));
}

#[test]
fn first_writes() {
    check("first_writes", |s| {
        s.write(20 * EXTENT, 2 * BLOCK)?;
        s.write(EXTENT + 3, 5)?;
        s.flush()?;
        s.write(LEAF + 3 * EXTENT, EXTENT)
    });
}

#[test]
fn overwrites() {
    check("overwrites", |s| {
        s.write(0, BLOCK)?;
        s.write(3, 2 * BLOCK)?;
        s.flush()?;
        s.write(LEAF - 1, 2)
    });
}

#[test]
fn discards() {
    check("discards", |s| {
        s.discard(0, EXTENT)?;
        s.discard(7 * EXTENT + BLOCK, BLOCK)?;
        s.flush()?;
        // Into the space that was given back, by this process or the one before.
        s.write(30 * EXTENT, 2 * EXTENT)?;
        s.flush()
    });
}

#[test]
fn checkpoints() {
    check("checkpoints", |s| {
        s.write(20 * EXTENT, 1)?;
        s.checkpoint()?;
        s.discard(0, BLOCK)?;
        s.checkpoint()
    });
}

#[test]
fn closing() {
    check("closing", Script::close);
}

/// Negative control. The process is killed between the first pair of superblock copies and its
/// sync; the next one brings the second pair to the same state. Without a sync before that no pair
/// is durable, and a power cut may tear all four copies.
#[test]
fn copies_settled_before_a_sync_are_caught() {
    let (script, watch) = killed();
    let log = script.store.log();
    let between = |r: &Revived| r.killed_at > 0 && copy(&log[r.killed_at - 1]) == Some(1);
    let mut kills = 0;
    for mut revived in watch.revive(&script).filter(between) {
        open(&mut revived, true).unwrap();
        let (run, from) = (Recording::from(&revived.script), revived.killed_at);
        run.visit_from(from, &plan()).expect_none("copies settled after a sync");
        let settled = (from..run.log.len()).find(|at| copy(&run.log[*at]) == Some(2)).unwrap();

        let spoilt = drop_syncs(&run.log, |at, _| (from..settled).contains(&at));
        let report = run.with_log(spoilt, |at| at).visit_from(from, &plan());

        let counts = &report.counts;
        assert!(counts.contains_key(&Wrong::Error), "nobody noticed; found only {counts:?}");
        kills += 1;
    }
    // Opening, checkpoint and close flip once each.
    assert_eq!(kills, 3);
}
