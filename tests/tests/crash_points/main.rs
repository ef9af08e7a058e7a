//! Every crash point of every operation, visited.
//!
//! A script of operations runs on a disk over the simulated store, which records what reaches it.
//! For each prefix of that record, and for every subset (up to a stated bound) of what was not
//! durable by then, torn and reordered, the disk is opened, read back whole and compared with what
//! `docs/format.md` §10 promises. The fault model is in the head of `blockd::store::sim`.
//!
//! - `scenarios`: one test per operation.
//! - `chains`: crash after crash after crash.
//! - `orders`: the same check on records whose order was spoilt; it must fail there.
//! - `kill`: the process dies, the host lives, the tail is there.
//! - `reopen`: the process dies, another one goes on, and then the power is cut.
//! - `storedir`: the same for the disks of a store: create, import, rename, seal, resize, delete.
//! - `fork`, `cut`, `undo`: the same for forks, of disks in service, and for persistence modes.
//!
//! `OFFSHOOT_SOAK=1` visits several hundred thousand states instead of tens of thousands.

mod chains;
mod cut;
mod flatten;
mod fork;
mod hand_on;
mod inherit;
mod kill;
mod orders;
mod reopen;
mod scenarios;
mod storedir;
mod undo;

use blockd::store::sim::Bounds;
use offshoot_tests::crash::{Plan, Recording};
use offshoot_tests::rng::soak;
use offshoot_tests::sim::{EXTENT, LEAF, Script};

/// Sectors of the disks: two leaves of the map, the second one short.
const SECTORS: u64 = LEAF + 32 * EXTENT;

fn plan() -> Plan {
    if soak() {
        let bounds = Bounds { exhaustive: 10, random: 64, ..Bounds::default() };
        Plan { bounds, go_on: 16, again: 8 }
    } else {
        let bounds = Bounds { exhaustive: 7, random: 24, family: 48, ..Bounds::default() };
        Plan { bounds, go_on: 20, again: 20 }
    }
}

/// A virtual extent behind those that the scripts use: `2 * 24` extents that make free space come
/// in single extents.
const FRAGMENTS: u64 = 400;

/// Prepares a disk with `before`, runs `during` on it and visits every crash of the second part.
fn check(test: &str, before: impl FnOnce(&mut Script), during: impl FnOnce(&mut Script)) {
    check_over(test, prepared(before), during);
}

/// A closed disk with what `before` puts on it, and with free space in single extents.
fn prepared(before: impl FnOnce(&mut Script)) -> Script {
    let mut script = Script::empty(SECTORS);
    script.open().expect("a new disk opens");
    script.fragment(FRAGMENTS, 24).expect("written");
    before(&mut script);
    script.close().expect("closes");
    script.settled()
}

/// The same with a disk that is prepared already.
fn check_over(test: &str, mut script: Script, during: impl FnOnce(&mut Script)) {
    during(&mut script);
    Recording::from(&script).visit(&plan()).expect_none(test);
}
