//! The other crash domain: the process is killed at any moment, the host and the client live on.
//! Every completed operation must be there, flushed or not.

use offshoot_tests::crash::{Recording, no_panic};
use offshoot_tests::kill::{Watch, memory_dir};
use offshoot_tests::sim::{BLOCK, EXTENT, LEAF, Script};

use super::{SECTORS, plan, prepared};

/// Runs a script on a live disk and kills it around every call that changes the file.
fn check(test: &str, before: impl FnOnce(&mut Script), during: impl FnOnce(&mut Script, &Watch)) {
    let (mut script, dir) = (prepared(before), memory_dir());
    let watch = Watch::over(&mut script, dir.path());
    during(&mut script, &watch);
    watch.look();
    let model = script.model();
    match no_panic(|| watch.verify(&model, script.segment)) {
        Ok(moments) => eprintln!("{test}: moments of a kill visited: {moments}"),
        Err(violation) => panic!("{test}: {violation}"),
    }
}

fn some_data(script: &mut Script) {
    script.write(0, 2 * EXTENT).unwrap();
    script.write(LEAF - BLOCK, 2 * BLOCK).unwrap();
}

#[test]
fn completed_writes_and_discards_survive() {
    check("writes_and_discards", some_data, |s, watch| {
        s.open().unwrap();
        watch.look();
        for round in 0..12 {
            s.write(round * 5 * BLOCK, 3 * BLOCK).unwrap();
            watch.look();
            s.write(round * 7 + 3, 2).unwrap();
            watch.look();
            s.discard(round * 3 * BLOCK, 2 * BLOCK).unwrap();
            watch.look();
            s.write(LEAF + round * EXTENT - 1, 2).unwrap();
            watch.look();
            match round % 3 {
                0 => s.flush().unwrap(),
                1 => s.write_zeroes(round * EXTENT, EXTENT, round % 2 == 0).unwrap(),
                _ => {}
            }
            watch.look();
        }
    });
}

#[test]
fn checkpoints_and_a_wrapping_journal_keep_the_tail_right() {
    check("checkpoints", some_data, |s, watch| {
        s.open().unwrap();
        for round in 0..25 {
            s.write((3 + round) * EXTENT, 1).unwrap();
            s.discard(round * BLOCK, BLOCK).unwrap();
            watch.look();
            s.flush().unwrap();
            s.write((3 + round) * EXTENT + BLOCK, 1).unwrap();
            watch.look();
            if round % 5 == 4 {
                s.checkpoint().unwrap();
            }
        }
    });
}

/// The tail holds a limited number of records: the one that finds it full commits first.
#[test]
fn a_full_tail_is_committed_and_goes_on() {
    check("full_tail", some_data, |s, watch| {
        s.open().unwrap();
        for i in 0..1100 {
            s.discard((100 + i % 300) * EXTENT, BLOCK).unwrap();
            if i % 100 == 0 {
                s.write(i % 7 * BLOCK, 1).unwrap();
                s.discard((8 + i % 9) * BLOCK, BLOCK).unwrap();
                watch.look();
            }
        }
    });
}

#[test]
fn opening_closing_and_resizing() {
    check("open_close_resize", some_data, |s, watch| {
        for round in 0..3 {
            s.open().unwrap();
            s.write((3 + round) * EXTENT, 9).unwrap();
            watch.look();
            s.resize(SECTORS + round * EXTENT + 3).unwrap();
            s.write(SECTORS + round * EXTENT, 3).unwrap();
            watch.look();
            s.close().unwrap();
        }
    });
}

#[test]
fn killed_again_and_again() {
    check("again_and_again", some_data, |s, watch| {
        for round in 0..6 {
            s.open().unwrap();
            watch.look();
            s.write((3 + round) * EXTENT, 9).unwrap();
            s.discard(round * BLOCK, BLOCK).unwrap();
            watch.look();
            if round == 3 {
                s.flush().unwrap();
            }
            s.kill();
        }
        s.open().unwrap();
    });
}

/// Story: a discard completed and was not flushed; the process was killed, and the next one
/// replayed the discard from the tail. The space is free in memory now, but the durable map still
/// names it. Written again before the discard is in the journal, a power cut would show one block's
/// data under another's address.
#[test]
fn space_freed_by_a_replayed_tail_waits_for_the_journal() {
    let mut script = Script::empty(SECTORS);
    script.open().unwrap();
    script.write(0, 8 * EXTENT).unwrap();
    script.close().unwrap();
    let (mut script, dir) = (script.settled(), memory_dir());
    script.options = offshoot_tests::kill::live(dir.path());
    script.open().unwrap();
    script.write(20 * EXTENT, 1).unwrap();
    script.discard(0, 6 * EXTENT).unwrap();
    script.kill();
    script.open().unwrap();
    script.write(LEAF, 4 * EXTENT).unwrap();
    script.write(30 * EXTENT, 4 * EXTENT).unwrap();
    script.flush().unwrap();
    script.write(40 * EXTENT, EXTENT).unwrap();

    let report = Recording::from(&script).visit(&plan());

    report.expect_none("space_freed_by_a_replayed_tail_waits_for_the_journal");
}
