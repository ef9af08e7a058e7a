//! Who has which disk: inside one process, what the lock of the store is between processes.
//!
//! Invariants:
//! - A disk has any number of readers or one writer. Whoever opens, changes or makes a disk holds
//!   its name; a name that no disk has yet can be held, too.
//! - While the table is closed nobody gets a hold; those who have one keep it.
//! - Whoever waits ends a fork that stands by (`standing.rs`), which may have what is waited for.
//! - Whoever waits gives up after [`PATIENCE`]: nobody waits for ever, in whatever order names are
//!   taken.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use parking_lot::{Condvar, Mutex};

use super::standing::Standing;
use crate::store::Access;

/// How long a request waits for another one to let go of a disk.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// How often work in the background looks whether it may go on.
const IDLE_LOOK: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, Copy)]
enum Held {
    Readers(usize),
    Writer,
}

#[derive(Debug, Default)]
struct Table {
    names: HashMap<String, Held>,
    /// Names that somebody waits for, and how many.
    wanted: HashMap<String, usize>,
    closed: bool,
}

impl Table {
    fn no_longer_wants(&mut self, name: &str) {
        match self.wanted.get_mut(name) {
            Some(n) if *n > 1 => *n -= 1,
            _ => _ = self.wanted.remove(name),
        }
    }
}

/// The names that are held.
#[derive(Debug, Default)]
pub struct Holds {
    table: Mutex<Table>,
    freed: Condvar,
    standing: Arc<Standing>,
}

/// Nobody gets a hold until this is dropped.
#[derive(Debug)]
pub struct Closed(Arc<Holds>);

/// A name, held until this is dropped.
#[derive(Debug)]
pub struct Hold {
    holds: Arc<Holds>,
    name: String,
}

impl Hold {
    /// What is held.
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn others_have(name: &str) -> Error {
    Error::new(Kind::Busy, "another request has it open")
        .on(format!("disk {name}"))
        .hint("wait for it; `offshoot job ls` lists what is running")
}

impl Holds {
    /// Who stands by, and ends when somebody waits for a name.
    pub(super) fn standing(&self) -> &Arc<Standing> {
        &self.standing
    }

    /// Holds a name, alone for writing.
    ///
    /// # Errors
    /// `Busy` when others hold it and do not let go for [`PATIENCE`].
    pub fn take(self: &Arc<Self>, name: &str, access: Access) -> Result<Hold> {
        if let Some(hold) = self.try_take(&mut self.table.lock(), name, access) {
            return Ok(hold);
        }
        let _waiting = self.standing.wait();
        let deadline = Instant::now() + PATIENCE;
        let mut table = self.table.lock();
        loop {
            if let Some(hold) = self.try_take(&mut table, name, access) {
                return Ok(hold);
            }
            *table.wanted.entry(name.to_owned()).or_default() += 1;
            let late = self.freed.wait_until(&mut table, deadline).timed_out();
            table.no_longer_wants(name);
            if late {
                return Err(others_have(name));
            }
        }
    }

    /// As [`Holds::take`], for who does not wait.
    ///
    /// # Errors
    /// `Busy` when others hold it.
    pub(super) fn take_now(self: &Arc<Self>, name: &str, access: Access) -> Result<Hold> {
        self.try_take(&mut self.table.lock(), name, access).ok_or_else(|| others_have(name))
    }

    fn try_take(self: &Arc<Self>, table: &mut Table, name: &str, access: Access) -> Option<Hold> {
        let next = match (table.names.get(name), access) {
            _ if table.closed => None,
            (None, Access::Read) => Some(Held::Readers(1)),
            (Some(Held::Readers(n)), Access::Read) => Some(Held::Readers(n + 1)),
            (None, Access::Write) => Some(Held::Writer),
            _ => None,
        };
        table.names.insert(name.to_owned(), next?);
        Some(Hold { holds: Arc::clone(self), name: name.to_owned() })
    }

    /// Holds a name for reading, after everybody who waits for it: for work in the background that
    /// holds it again and again.
    ///
    /// # Errors
    /// As [`Holds::take`].
    pub fn take_when_idle(self: &Arc<Self>, name: &str) -> Result<Hold> {
        let deadline = Instant::now() + PATIENCE;
        let wanted = || self.table.lock().wanted.contains_key(name);
        while wanted() && Instant::now() < deadline {
            std::thread::sleep(IDLE_LOOK);
        }
        self.take(name, Access::Read)
    }

    /// Gives no holds any more, and waits until only those of `names` are left.
    ///
    /// # Errors
    /// `Busy` when others do not let go for [`PATIENCE`].
    pub fn close(self: &Arc<Self>, names: &HashSet<String>) -> Result<Closed> {
        let _waiting = self.standing.wait();
        let deadline = Instant::now() + PATIENCE;
        let mut table = self.table.lock();
        if std::mem::replace(&mut table.closed, true) {
            return Err(Error::new(Kind::Busy, "somebody else does the same just now"));
        }
        let closed = Closed(Arc::clone(self));
        loop {
            let Some(other) = table.names.keys().find(|held| !names.contains(*held)).cloned()
            else {
                return Ok(closed);
            };
            if self.freed.wait_until(&mut table, deadline).timed_out() {
                drop(table);
                return Err(Error::new(Kind::Busy, "a request has it open")
                    .on(format!("disk {other}"))
                    .hint("wait for it; `offshoot job ls` lists what is running"));
            }
        }
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.table.lock().closed = false;
        self.0.freed.notify_all();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut table = self.holds.table.lock();
        match table.names.get_mut(&self.name) {
            Some(Held::Readers(n)) if *n > 1 => *n -= 1,
            _ => {
                table.names.remove(&self.name);
            }
        }
        self.holds.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_many_readers_or_one_writer() {
        let holds = Arc::new(Holds::default());
        let first = holds.take("a", Access::Read).unwrap();
        let second = holds.take("a", Access::Read).unwrap();
        let refused = holds.take("a", Access::Write).unwrap_err();
        assert_eq!((refused.kind(), refused.object()), (Kind::Busy, Some("disk a")));
        drop((first, holds.take("b", Access::Write).unwrap()));
        assert!(holds.take("a", Access::Write).is_err());
        drop(second);

        let writer = holds.take("a", Access::Write).unwrap();

        assert!(holds.take("a", Access::Read).is_err());
        drop(writer);
        assert!(holds.take("a", Access::Write).is_ok());
        assert!(holds.table.lock().names.is_empty());
    }

    #[test]
    fn a_closed_table_gives_nothing_and_waits_for_those_who_have() {
        let holds = Arc::new(Holds::default());
        let known = HashSet::from(["served".to_owned()]);
        let _served = holds.take("served", Access::Write).unwrap();
        let other = holds.take("other", Access::Read).unwrap();
        assert_eq!(holds.close(&known).unwrap_err().object(), Some("disk other"));
        drop(other);

        let closed = holds.close(&known).unwrap();

        assert!(holds.close(&known).is_err());
        assert!(holds.take("other", Access::Read).is_err());
        drop(closed);
        assert!(holds.take("other", Access::Read).is_ok());
    }

    #[test]
    fn who_waits_gets_what_is_let_go() {
        let holds = Arc::new(Holds::default());
        let writer = holds.take("a", Access::Write).unwrap();
        let waiting = std::thread::spawn({
            let holds = Arc::clone(&holds);
            move || holds.take("a", Access::Read).map(drop)
        });
        std::thread::sleep(PATIENCE / 10);
        drop(writer);

        assert!(waiting.join().unwrap().is_ok());
    }
}
