//! Keeps memory tables alive while chains point into them.
//!
//! Invariant: a table is dropped only when no chain that was taken under it is outstanding. If
//! the keeper itself goes while chains are out, the tables are leaked: the kernel may still be
//! writing through the chains' pointers.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use crate::memory::Memory;

#[derive(Debug)]
struct Held {
    memory: ManuallyDrop<Arc<Memory>>,
    generation: u32,
    outstanding: u32,
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.outstanding == 0 {
            // SAFETY: dropped once, here.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}

/// The table in use, and earlier ones that chains still need.
#[derive(Debug)]
pub(super) struct Keeper {
    current: Held,
    retired: Vec<Held>,
    /// Chains that were set aside.
    aside: u32,
}

impl Keeper {
    pub(super) fn new(memory: Arc<Memory>) -> Keeper {
        Keeper { current: hold(memory, 0), retired: Vec::new(), aside: 0 }
    }

    /// The table in use.
    pub(super) fn memory(&self) -> &Memory {
        &self.current.memory
    }

    /// Counts a chain out; returns the mark to give to [`Keeper::give_back`].
    pub(super) fn take(&mut self) -> u32 {
        self.current.outstanding += 1;
        self.current.generation
    }

    /// Counts a chain back in.
    pub(super) fn give_back(&mut self, generation: u32) {
        if generation == self.current.generation {
            self.current.outstanding -= 1;
            return;
        }
        let held = self.retired.iter_mut().find(|h| h.generation == generation);
        held.expect("a chain is completed in the queue it came from").outstanding -= 1;
        self.retired.retain(|h| h.outstanding > 0);
    }

    /// Counts a chain in that nobody reads or writes any more, though it is not done: it still
    /// counts as outstanding, but needs no memory.
    pub(super) fn set_aside(&mut self, generation: u32) {
        self.give_back(generation);
        self.aside += 1;
    }

    /// Makes `memory` the table in use.
    pub(super) fn replace(&mut self, memory: Arc<Memory>) {
        let next = hold(memory, self.current.generation.wrapping_add(1));
        let old = std::mem::replace(&mut self.current, next);
        if old.outstanding > 0 {
            self.retired.push(old);
        }
    }

    /// Chains that are out, or were set aside.
    pub(super) fn outstanding(&self) -> u32 {
        let retired: u32 = self.retired.iter().map(|h| h.outstanding).sum();
        self.current.outstanding + retired + self.aside
    }
}

fn hold(memory: Arc<Memory>, generation: u32) -> Held {
    Held { memory: ManuallyDrop::new(memory), generation, outstanding: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_table_lives_exactly_as_long_as_its_chains() {
        let (a, b) = (Arc::new(Memory::default()), Arc::new(Memory::default()));
        let mut keeper = Keeper::new(a.clone());
        let (first, second) = (keeper.take(), keeper.take());
        keeper.replace(b.clone());
        let third = keeper.take();
        keeper.give_back(second);
        assert_eq!((Arc::strong_count(&a), keeper.outstanding()), (2, 2));
        keeper.give_back(first);
        assert_eq!(Arc::strong_count(&a), 1);
        keeper.give_back(third);
        drop(keeper);
        assert_eq!(Arc::strong_count(&b), 1);
    }

    #[test]
    fn chain_that_was_set_aside_counts_and_keeps_no_table() {
        let a = Arc::new(Memory::default());
        let mut keeper = Keeper::new(a.clone());
        let mark = keeper.take();
        keeper.set_aside(mark);
        assert_eq!(keeper.outstanding(), 1);
        drop(keeper);
        assert_eq!(Arc::strong_count(&a), 1);
    }

    #[test]
    fn table_of_a_lost_chain_is_leaked_not_unmapped() {
        let a = Arc::new(Memory::default());
        let mut keeper = Keeper::new(a.clone());
        keeper.take();
        drop(keeper);
        assert_eq!(Arc::strong_count(&a), 2);
    }
}
