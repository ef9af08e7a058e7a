//! What a lab holds of the host, to be compared before and after something.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use super::{Lab, Traces};
use crate::until;

/// What there is of a lab, down to open files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Processes, folders, exports and disks.
    pub traces: Traces,
    /// Records of what is to be undone.
    pub undo: usize,
    /// Open memory files and sockets of the daemons, and open sockets of machines, by name.
    pub open: BTreeMap<String, (usize, usize)>,
}

/// Most memory files of a machine: its memory is a stack of layers, which grows with some forks and
/// shrinks with others.
const LAYERS_MAX: usize = 10;

/// Open memory files and sockets of a process.
fn open_in(pid: u32) -> (usize, usize) {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links: Vec<_> = files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
    let count =
        |begin: &str| links.iter().filter(|link| link.to_string_lossy().starts_with(begin)).count();
    (count("/memfd:"), count("socket:"))
}

impl Lab {
    /// What is held now.
    ///
    /// # Panics
    /// When a daemon is not there.
    #[must_use]
    pub fn held(&self) -> Held {
        let blockd = self.blockd.as_ref().expect("it runs").pid();
        let mut open = BTreeMap::from([
            ("forkd".to_owned(), open_in(self.forkd_pid())),
            ("blockd".to_owned(), open_in(blockd)),
        ]);
        for vm in self.json(&["vm", "ls"]).as_array().expect("a list") {
            let pid = vm["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            let name = vm["name"].as_str().expect("a name");
            if let Some((memory, sockets)) = pid.map(open_in) {
                assert!(memory <= LAYERS_MAX, "{name} has {memory} memory files open");
                open.insert(format!("vm {name}"), (0, sockets));
            }
        }
        let undo = fs::read_dir(self.state().join("undo")).map_or(0, Iterator::count);
        Held { traces: self.traces(), undo, open }
    }

    /// What is held when nothing is unfinished, and who was answered has closed its connection.
    ///
    /// # Panics
    /// When that does not come.
    #[must_use]
    pub fn settled(&self) -> Held {
        self.settle();
        let mut now = self.held();
        until("nothing changes", || {
            std::thread::sleep(Duration::from_millis(20));
            let before = std::mem::replace(&mut now, self.held());
            before == now
        });
        now
    }

    /// Waits until no more is held than `before`.
    ///
    /// # Panics
    /// When that does not come.
    pub fn await_held(&self, before: &Held) {
        let mut now = self.held();
        // A fork in blockd that nobody cuts is given up after ten seconds.
        for _ in 0..2000 {
            if now.is_as(before) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
            now = self.held();
        }
        panic!("held before: {before:#?}\nnow: {now:#?}");
    }
}

impl Held {
    /// The same, however many files somebody has open.
    #[must_use]
    pub fn but_files_of(&self, who: &str) -> Held {
        let mut held = self.clone();
        held.open.insert(who.to_owned(), (usize::MAX, usize::MAX));
        held
    }

    /// Whether there is what there was, with no more files open.
    fn is_as(&self, before: &Held) -> bool {
        let no_more = |(name, open): (&String, &(usize, usize))| {
            let then = before.open.get(name);
            then.is_some_and(|then| open.0 <= then.0 && open.1 <= then.1)
        };
        let same = (&self.traces, self.undo) == (&before.traces, before.undo);
        same && self.open.len() == before.open.len() && self.open.iter().all(no_more)
    }
}
