//! The machines, by name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use format::{Error, Kind, Result};
use parking_lot::Mutex;

use super::state::{Description, StateDir};
use crate::api::types::{DiskPath, Vm, VmDisk, VmEnd, VmNet, VmState};
use crate::process::Process;
use crate::process::wire::{Ended, Folder};

/// Bytes of a name at most: names of disks are made of it.
const NAME_MAX: usize = 64;

/// A machine.
pub struct Machine {
    /// Who it is.
    pub is: Description,
    /// Its process; none when it had ended before this daemon started.
    pub process: Option<Arc<Process>>,
    /// Whether its memory was had back from blockd: its disks go through arenas, whatever they did
    /// when it was made.
    memory_is_back: AtomicBool,
    /// Held by who changes it: forks, pauses, ends, removes it.
    pub changing: Mutex<()>,
    live: Mutex<(VmState, Option<VmEnd>)>,
}

/// The machines.
#[derive(Default)]
pub struct Table {
    names: Mutex<Names>,
}

#[derive(Default)]
struct Names {
    machines: BTreeMap<String, Arc<Machine>>,
    reserved: BTreeSet<String>,
}

/// Names that are going to be given; free again when this is dropped.
pub struct Reserved<'a> {
    table: &'a Table,
    names: Vec<String>,
}

impl Machine {
    /// One that has a process.
    #[must_use]
    pub fn living(is: Description, process: Arc<Process>, state: VmState) -> Machine {
        let live = Mutex::new((state, None));
        Machine::of(is, Some(process), live)
    }

    /// One that has ended.
    #[must_use]
    pub fn ended(is: Description, end: Ended) -> Machine {
        let live = Mutex::new((VmState::Ended, Some(end.into())));
        Machine::of(is, None, live)
    }

    fn of(
        is: Description,
        process: Option<Arc<Process>>,
        live: Mutex<(VmState, Option<VmEnd>)>,
    ) -> Machine {
        let memory_is_back = AtomicBool::new(false);
        Machine { is, process, memory_is_back, changing: Mutex::default(), live }
    }

    /// Its disks, as they are now.
    #[must_use]
    pub fn disks(&self) -> Vec<VmDisk> {
        let mut disks = self.is.disks.clone();
        // Pairs with the store below; nothing else goes with it.
        if self.memory_is_back.load(Ordering::Acquire) {
            disks.iter_mut().for_each(|disk| disk.path = DiskPath::Arena);
        }
        disks
    }

    /// Notes that all of its disks go through arenas from now on.
    pub fn note_memory_is_back(&self) {
        self.memory_is_back.store(true, Ordering::Release); // pairs with the load in `disks`
    }

    /// How it is.
    #[must_use]
    pub fn state(&self) -> VmState {
        self.live.lock().0
    }

    /// Notes how it is, unless it has ended: that is the last word.
    pub fn set_state(&self, state: VmState) {
        let mut live = self.live.lock();
        if live.0 != VmState::Ended {
            live.0 = state;
        }
    }

    /// Notes that it has ended. False when that was known.
    pub fn set_ended(&self, end: Ended) -> bool {
        let mut live = self.live.lock();
        let new = live.0 != VmState::Ended;
        if new {
            *live = (VmState::Ended, Some(end.into()));
        }
        new
    }

    /// Its process, while it has not ended.
    ///
    /// # Errors
    /// `Failed` when it has.
    pub fn living_process(&self) -> Result<&Arc<Process>> {
        let process = self.process.as_ref().filter(|_| self.state() != VmState::Ended);
        process.ok_or_else(|| {
            let why = self.live.lock().1.as_ref().map(|end| end.reason.clone());
            let reason = format!("it has ended: {}", why.unwrap_or_default());
            Error::new(Kind::Failed, reason).on(self.object())
        })
    }

    /// What messages call it.
    #[must_use]
    pub fn object(&self) -> String {
        object(&self.is.name)
    }

    /// As the interface describes it.
    #[must_use]
    pub fn describe(&self, dir: &StateDir) -> Vm {
        let (state, end) = self.live.lock().clone();
        let process = self.process.as_ref().filter(|_| state != VmState::Ended);
        let d = &self.is;
        Vm {
            name: d.name.clone(),
            id: d.id,
            state,
            end,
            pid: process.map(|p| p.pid),
            memory_bytes: d.memory_bytes,
            vcpus: d.vcpus,
            disks: self.disks(),
            net: d.net.as_ref().map(|net| VmNet {
                tap: net.tap.clone(),
                link_when: net.link,
                status: None,
            }),
            generation_id: d.generation_id,
            mac: d.mac.map(|byte| format!("{byte:02x}")).join(":"),
            parent: d.parent.clone(),
            layers: d.layers,
            created: d.created,
            console: Folder(dir.vm(d.id)).console(),
        }
    }
}

impl From<Ended> for VmEnd {
    fn from(Ended { reason, detail, at }: Ended) -> Self {
        VmEnd { reason, detail, at }
    }
}

/// What messages call a machine.
#[must_use]
pub fn object(name: &str) -> String {
    format!("vm {name}")
}

/// Refuses what is no name.
///
/// # Errors
/// `Invalid`, saying what is wrong.
pub fn check_name(name: &str) -> Result<()> {
    let ok = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && name.len() <= NAME_MAX && name.chars().all(ok) {
        return Ok(());
    }
    Err(Error::invalid(
        "a name has 1 to 64 letters, digits and . _ - and begins with one of the \
        first two",
    )
    .on(format!("name {name:?}")))
}

impl Table {
    /// The machine called `name`.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, name: &str) -> Result<Arc<Machine>> {
        let found = self.names.lock().machines.get(name).cloned();
        found.ok_or_else(|| {
            Error::new(Kind::NotFound, "there is no such machine")
                .on(object(name))
                .hint("`offshoot vm ls` lists them")
        })
    }

    /// All of them, by name.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Machine>> {
        self.names.lock().machines.values().cloned().collect()
    }

    /// Keeps names for machines to be made.
    ///
    /// # Errors
    /// `Invalid` for what is no name, or is named twice; `Exists` when one is taken.
    pub fn reserve(&self, wanted: &[String]) -> Result<Reserved<'_>> {
        wanted.iter().try_for_each(|name| check_name(name))?;
        let mut names = self.names.lock();
        let mut reserved = Reserved { table: self, names: Vec::new() };
        for name in wanted {
            if names.machines.contains_key(name) {
                drop(names);
                return Err(Error::new(Kind::Exists, "a machine of this name exists already")
                    .on(object(name))
                    .hint("choose another name, or remove that machine first"));
            }
            if !names.reserved.insert(name.clone()) {
                let twice = reserved.names.contains(name);
                drop(names);
                return Err(match twice {
                    true => Error::invalid("it is named twice"),
                    false => Error::new(Kind::Busy, "a machine of this name is being made"),
                }
                .on(object(name)));
            }
            reserved.names.push(name.clone());
        }
        drop(names);
        Ok(reserved)
    }

    /// Adds a machine under its name, which was reserved or is known to be free.
    pub fn add(&self, machine: Arc<Machine>) {
        self.names.lock().machines.insert(machine.is.name.clone(), machine);
    }

    /// Takes a machine out.
    pub fn remove(&self, machine: &Arc<Machine>) {
        let mut names = self.names.lock();
        if names.machines.get(&machine.is.name).is_some_and(|other| Arc::ptr_eq(other, machine)) {
            names.machines.remove(&machine.is.name);
        }
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut names = self.table.names.lock();
        for name in &self.names {
            names.reserved.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reserve(table: &Table, names: &[&str]) -> Result<(), Kind> {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        table.reserve(&names).map(drop).map_err(|e| e.kind())
    }

    #[test]
    fn a_name_is_kept_until_it_is_given_up() {
        let table = Table::default();
        let held = table.reserve(&["a".to_owned(), "b".to_owned()]).unwrap();
        assert_eq!(reserve(&table, &["b"]), Err(Kind::Busy));
        assert_eq!(reserve(&table, &["c", "c"]), Err(Kind::Invalid));
        assert_eq!(reserve(&table, &["c"]), Ok(()), "a failure keeps nothing");
        drop(held);

        assert_eq!(reserve(&table, &["a", "b"]), Ok(()));
    }

    #[test]
    fn names_are_plain_words() {
        for name in ["a", "web-1.example_2", "0", &"x".repeat(64)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", ".", "-a", "a b", "a/b", "\u{e4}", "..", &"x".repeat(65)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
