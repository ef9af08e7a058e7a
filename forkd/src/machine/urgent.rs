//! Threads that do not wait for their turn while a machine stands.
//!
//! On a host with more to do than processors, a thread that is asked to stop may first have to wait
//! for its turn, some milliseconds for each other thread in the row: a machine with several
//! processors then stands for the longest of these waits. Where the host allows it, the threads
//! that take part in a pause go first for that time.
//!
//! Invariant: no thread runs guest code before its usual turn, but for the moment until it is
//! asked to stop.

/// Threads that go first until the value is dropped.
#[derive(Debug)]
pub(super) struct Urgent(Vec<libc::pid_t>);

impl Urgent {
    /// Lets `threads` go first, as far as the host allows. One that has a policy of its own already
    /// is left alone.
    pub(super) fn new(threads: impl Iterator<Item = libc::pid_t>) -> Urgent {
        let ordinary = |thread: &libc::pid_t| {
            // SAFETY: asks about a thread; touches no memory.
            unsafe { libc::sched_getscheduler(*thread) == libc::SCHED_OTHER }
        };
        Urgent(
            threads
                .filter(|thread| ordinary(thread) && set(*thread, libc::SCHED_FIFO, 1))
                .collect(),
        )
    }

    /// The calling thread goes first.
    pub(super) fn this() -> Urgent {
        // SAFETY: asks for a number; touches no memory.
        Urgent::new(std::iter::once(unsafe { libc::gettid() }))
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        for thread in &self.0 {
            set(*thread, libc::SCHED_OTHER, 0);
        }
    }
}

/// Gives a thread a policy; false when the host does not allow it.
fn set(thread: libc::pid_t, policy: libc::c_int, priority: libc::c_int) -> bool {
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: reads the parameter, which lives until the call is over.
    unsafe { libc::sched_setscheduler(thread, policy, &raw const parameter) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_is_the_usual_one_afterwards() {
        // SAFETY: ask about this thread; touch no memory.
        let policy = || unsafe { libc::sched_getscheduler(libc::gettid()) };
        let before = policy();
        let urgent = Urgent::this();
        assert!(policy() == libc::SCHED_FIFO || urgent.0.is_empty());
        drop(urgent);
        assert_eq!(policy(), before);
    }
}
