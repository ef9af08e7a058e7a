//! Children that inherit: after any crash all of them are there, with what their parents held, or
//! none is, and the parents go on: a root that was to be sealed is sealed if, and only if, its
//! children are there (D-b, D-c, D-n).

use blockd::pump::Unwatched;
use blockd::store::Access;
use blockd::store::sim::{Op, drop_syncs};
use blockd::storedir::{BaseRule, ForkOf, InheritOptions, StoreDir};
use offshoot_tests::sim::{BLOCK, EXTENT};

use super::storedir::{Recorder, SECTORS, new_disk, write, wrong_states};

fn inherit(dir: &StoreDir, wanted: &[(&str, &[&str])], base: BaseRule) -> u64 {
    let of = |(disk, children): &(&str, &[&str])| ForkOf {
        disk: (*disk).into(),
        children: children.iter().map(|name| (*name).into()).collect(),
    };
    let wanted: Vec<_> = wanted.iter().map(of).collect();
    let options = InheritOptions { base, below: None };
    dir.inherit(&wanted, &options, &Unwatched).unwrap().expect("no threshold").copied
}

fn change(dir: &StoreDir, name: &str, work: impl FnOnce(&blockd::disk::Disk)) {
    let disk = dir.open_disk(name, Access::Write, &dir.disk_options()).unwrap();
    work(&disk);
    disk.close().unwrap();
}

/// A store with a root, `vm` over it with writes and zeroes of its own, and another root, `data`.
fn a_clone_and_a_root() -> Recorder {
    let mut recorder = Recorder::start();
    recorder.step(|dir| {
        dir.create(&new_disk("golden", None)).unwrap();
        change(dir, "golden", |disk| write(disk, 1, 3, 3 * EXTENT));
        dir.seal("golden", &mut |_, _| Ok(())).unwrap();
        dir.create(&new_disk("vm", Some("golden"))).unwrap();
        change(dir, "vm", |disk| {
            write(disk, 2, EXTENT, EXTENT + BLOCK);
            write(disk, 3, SECTORS - BLOCK, BLOCK);
            disk.discard(0, 0, 5 * BLOCK * 512).unwrap();
        });
        dir.create(&new_disk("data", None)).unwrap();
        change(dir, "data", |disk| write(disk, 4, 7, EXTENT));
    });
    Recorder::over(recorder.store.live_image())
}

#[test]
fn of_a_clone() {
    let mut recorder = a_clone_and_a_root();
    recorder.step(|dir| {
        let copied = inherit(dir, &[("vm", &["one", "two"])], BaseRule::FirstNonempty);
        assert_eq!(copied, 2 * (EXTENT + 2 * BLOCK) * 512);
    });
    recorder.step(|dir| change(dir, "one", |disk| write(disk, 6, 10 * EXTENT, BLOCK)));
    recorder.visit("inherit: two children of a clone");
}

#[test]
fn of_a_clone_and_a_root_together() {
    let mut recorder = a_clone_and_a_root();
    recorder.step(|dir| {
        let wanted: [(&str, &[&str]); 2] = [("data", &["data-1", "data-2"]), ("vm", &["vm-1"])];
        inherit(dir, &wanted, BaseRule::RootMerged);
    });
    recorder.visit("inherit: a group of a clone and a root");
}

#[test]
fn and_deletion_of_base_and_children() {
    let mut recorder = a_clone_and_a_root();
    recorder.step(|dir| _ = inherit(dir, &[("data", &["one"])], BaseRule::FirstNonempty));
    let mut recorder = Recorder::over(recorder.store.live_image());
    recorder.step(|dir| {
        assert!(dir.remove("data").is_err(), "a child stands on it");
        dir.remove("one").unwrap();
    });
    recorder.step(|dir| dir.remove("data").unwrap());
    recorder.visit("inherit: deletion of the child, then of its base");
}

/// Negative control: children whose drafts have no durable names when the catalogue tells of them
/// are lost in a power cut, and the root was sealed for nothing.
#[test]
fn a_transaction_before_the_names_is_caught() {
    let mut recorder = a_clone_and_a_root();
    recorder.step(|dir| _ = inherit(dir, &[("data", &["one"])], BaseRule::FirstNonempty));
    let log = recorder.store.log();
    let first = log.iter().position(|op| matches!(op, Op::SyncNames)).unwrap();
    let spoilt = drop_syncs(&log, |at, _| at == first);
    let lost = wrong_states(&recorder, &spoilt, &|found| match found {
        Ok(world) => world["data"].sealed != world.contains_key("one"),
        Err(_) => true,
    });
    assert!(lost > 0, "nobody noticed");
}
