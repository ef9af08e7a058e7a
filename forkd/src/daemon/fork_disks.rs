//! The disks of a fork: which ones are forked, what their children are called, and what blockd is
//! asked for.

use std::sync::Arc;

use blockd::api::types::{FlattenWhen, ForkDisk, ForkDisks, ForkMode, MadeChild, ServeChild};
use format::{Error, Kind, Result};

use super::blockd::export;
use super::table::Machine;
use super::undo::{UndoDisk, Which};
use crate::api::types::VmDisk;
use crate::process::Process;

/// A disk that is going to be forked.
pub(super) struct Frozen {
    /// Its number in the machine.
    pub(super) i: usize,
    /// Its name.
    pub(super) disk: String,
}

/// The disks of child number `n` of `count`.
pub(super) fn disks_of(
    parent: &Machine,
    (frozen, made): (&[Frozen], &[MadeChild]),
    (n, count): (usize, usize),
) -> Vec<VmDisk> {
    let mut disks = parent.disks();
    for (k, f) in frozen.iter().enumerate() {
        // blockd answers disk by disk, with the children of each in their order.
        let MadeChild { name, disk } = made[k * count + n].clone();
        disks[f.i] = VmDisk { disk: name, id: disk, own: true, ..disks[f.i].clone() };
    }
    disks
}

/// Checks that blockd makes a disk for each child of each that is forked.
pub(super) fn check_count(
    made: &[MadeChild],
    frozen: &[Frozen],
    shells: &[Arc<Process>],
) -> Result<()> {
    if made.len() == frozen.len() * shells.len() {
        return Ok(());
    }
    Err(Error::new(Kind::Unsupported, "blockd answers with other disks than asked"))
}

/// Gives disks that stood by the names that children of these names have; returns them.
pub(super) fn rename(
    made: &mut [MadeChild],
    children: &[String],
    frozen: &[Frozen],
) -> Vec<String> {
    let of = |f: &Frozen| children.iter().map(|child| disk_name(child, f.i)).collect::<Vec<_>>();
    let names: Vec<String> = frozen.iter().flat_map(of).collect();
    made.iter_mut().zip(&names).for_each(|(made, name)| made.name.clone_from(name));
    names
}

/// The name of the disk that a child gets for disk number `i` of its parent.
fn disk_name(child: &str, i: usize) -> String {
    format!("{child}-disk{i}")
}

pub(super) fn to_undo(made: &MadeChild) -> UndoDisk {
    UndoDisk { name: made.name.clone(), is: Which::Identity(made.disk) }
}

/// The disks of a machine that are going to be forked: those that are its own.
pub(super) fn frozen_of(parent: &Machine) -> Vec<Frozen> {
    let disks = parent.is.disks.iter().enumerate().filter(|(_, disk)| !disk.read_only);
    disks.map(|(i, disk)| Frozen { i, disk: disk.disk.clone() }).collect()
}

/// What blockd is to fork, and where it is to serve the children.
pub(super) fn fork_request(
    children: &[String],
    frozen: &[Frozen],
    shells: &[Arc<Process>],
) -> ForkDisks {
    let disk = |f: &Frozen| {
        let children: Vec<String> = children.iter().map(|child| disk_name(child, f.i)).collect();
        let serve = |(child, shell): (&String, &Arc<Process>)| ServeChild {
            child: child.clone(),
            export: export(&shell.folder().disk(f.i), false),
            limits: None,
        };
        let serve = children.iter().zip(shells).map(serve).collect();
        ForkDisk { disk: f.disk.clone(), children, serve }
    };
    ForkDisks {
        disks: frozen.iter().map(disk).collect(),
        mode: ForkMode::Live,
        flatten: FlattenWhen::Auto,
        ..ForkDisks::default()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn every_disk_of_every_child_is_asked_for_and_can_be_undone() {
        let children = ["a".to_owned(), "b".to_owned()];
        let frozen = [Frozen { i: 0, disk: "root".into() }, Frozen { i: 2, disk: "data".into() }];

        let body = fork_request(&children, &frozen, &[]);

        let names = |d: &ForkDisk| (d.disk.clone(), d.children.join(" "));
        let asked: Vec<_> = body.disks.iter().map(names).collect();
        assert_eq!(
            asked,
            [
                ("root".to_owned(), "a-disk0 b-disk0".to_owned()),
                ("data".to_owned(), "a-disk2 b-disk2".to_owned()),
            ]
        );
        let made = MadeChild { name: "b-disk2".into(), disk: Uuid::from_u128(7) };
        let is = Which::Identity(made.disk);
        assert_eq!(to_undo(&made), UndoDisk { name: "b-disk2".into(), is });
        assert!(fork_request(&children, &[], &[]).disks.is_empty());
    }
}
