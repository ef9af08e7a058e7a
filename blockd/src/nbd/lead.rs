//! Whose turn it is to read the next request of a connection.
//!
//! The threads of a connection take turns: the one that *leads* holds the input, reads a request,
//! and then either hands the lead to another thread before it serves the request, or, when requests
//! are quick or the client waits for each reply, *parks* the input, serves the request at once, and
//! goes on reading. The first lets a slow request overlap with others; the second costs no switch
//! between threads.
//!
//! Invariants:
//! - The input is in one place: with the thread that leads, or here.
//! - A parked input is taken over when its request takes too long ([`TICK`]): nobody waits long for
//!   a request that turned out slow.
//! - One of the waiting threads watches for that, as long as the connection is busy; on an idle
//!   connection all threads sleep.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// A request under a parked input that takes longer than this, or up to twice as long, loses it.
const TICK: Duration = Duration::from_millis(5);
/// Ticks without a request after which the watching thread sleeps for good.
const QUIET_TICKS: u32 = 20;

struct State<T> {
    /// `None` while a thread leads.
    input: Option<T>,
    /// The number of the request that the input is parked for.
    parked: Option<u64>,
    /// Requests that were parked or handed over so far.
    number: u64,
    ended: bool,
    /// Threads that wait for the lead, and whether one of them watches.
    waiting: usize,
    watched: bool,
    /// Threads of the connection.
    threads: usize,
}

/// The lead of one connection.
pub struct Lead<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    threads_max: usize,
}

/// What the caller must do so that the lead is taken up.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Then {
    /// Nothing.
    Nothing,
    /// Start one more thread that takes the lead; it is counted already.
    Spawn,
}

impl<T> Lead<T> {
    /// The lead over `input`, for one thread at first and `threads_max` at most.
    pub fn new(input: T, threads_max: usize) -> Self {
        let state = State {
            input: Some(input),
            parked: None,
            number: 0,
            ended: false,
            waiting: 0,
            watched: false,
            threads: 1,
        };
        Lead { state: Mutex::new(state), changed: Condvar::new(), threads_max }
    }

    /// Waits for the lead; `None` at the end.
    pub fn take(&self) -> Option<T> {
        let mut state = self.state.lock();
        state.waiting += 1;
        let mut quiet = 0;
        let input = loop {
            if state.ended {
                break None;
            }
            if state.parked.is_none()
                && let Some(input) = state.input.take()
            {
                break Some(input);
            }
            if state.watched || quiet > QUIET_TICKS {
                self.changed.wait(&mut state);
                quiet = 0;
                continue;
            }
            let seen = state.number;
            state.watched = true;
            let quietly = self.changed.wait_for(&mut state, TICK).timed_out();
            state.watched = false;
            if quietly && state.number == seen {
                // Parked since the last look, at least: whoever serves it goes on without.
                state.parked = None;
                quiet += 1;
            } else {
                quiet = 0;
            }
        };
        state.waiting -= 1;
        input
    }

    /// Puts the input where another thread may take it at once. The number is for
    /// [`Lead::number`].
    pub fn hand_over(&self, input: T) -> (u64, Then) {
        let mut state = self.state.lock();
        state.input = Some(input);
        state.number += 1;
        (state.number, self.call(&mut state))
    }

    /// Moves on with each request that is read.
    pub fn number(&self) -> u64 {
        self.state.lock().number
    }

    /// Puts the input where another thread may take it later. The number is for
    /// [`Lead::take_back`].
    pub fn park(&self, input: T) -> (u64, Then) {
        let mut state = self.state.lock();
        state.input = Some(input);
        state.number += 1;
        state.parked = Some(state.number);
        let then = if state.watched { Then::Nothing } else { self.call(&mut state) };
        (state.number, then)
    }

    /// The parked input, unless another thread has it.
    pub fn take_back(&self, number: u64) -> Option<T> {
        let mut state = self.state.lock();
        if state.parked != Some(number) {
            return None;
        }
        state.parked = None;
        state.input.take()
    }

    fn call(&self, state: &mut State<T>) -> Then {
        if state.waiting > 0 {
            self.changed.notify_one();
        } else if state.threads < self.threads_max {
            state.threads += 1;
            return Then::Spawn;
        }
        Then::Nothing
    }

    /// A thread that was to be started could not be.
    pub fn not_spawned(&self) {
        self.state.lock().threads -= 1;
    }

    /// Nobody leads any more: every waiting thread leaves.
    pub fn end(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        state.input = None;
        drop(state);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_slow_request_loses_the_parked_input() {
        let lead = Lead::new("input", 2);
        let input = lead.take().unwrap();
        let (number, then) = lead.park(input);
        assert_eq!(then, Then::Spawn);
        std::thread::scope(|s| {
            let other = s.spawn(|| lead.take());
            let begun = Instant::now();

            assert_eq!(other.join().unwrap(), Some("input"));

            assert!(begun.elapsed() < Duration::from_secs(2), "it took {:?}", begun.elapsed());
        });
        assert_eq!(lead.take_back(number), None);
    }

    #[test]
    fn a_quick_request_keeps_it() {
        let lead = Lead::new("input", 2);
        let mut input = lead.take().unwrap();
        std::thread::scope(|s| {
            let (number, then) = lead.park(input);
            assert_eq!(then, Then::Spawn);
            let other = s.spawn(|| lead.take());
            input = lead.take_back(number).unwrap();
            for _ in 0..1000 {
                let (number, then) = lead.park(input);
                assert_eq!(then, Then::Nothing);
                input = lead.take_back(number).expect("quickly back");
            }
            lead.end();
            assert_eq!(other.join().unwrap(), None);
        });
    }

    /// After a silence no thread wakes up by itself; the next slow request is noticed all the same.
    #[test]
    fn a_slow_request_after_a_silence_loses_it_too() {
        let lead = Lead::new("input", 2);
        let input = lead.take().unwrap();
        std::thread::scope(|s| {
            let other = s.spawn(|| lead.take());
            std::thread::sleep(TICK * (QUIET_TICKS + 10));
            assert!(!lead.state.lock().watched, "nobody watches an idle connection");

            let (number, _) = lead.park(input);

            assert_eq!(other.join().unwrap(), Some("input"));
            assert_eq!(lead.take_back(number), None);
        });
    }

    #[test]
    fn threads_are_bounded() {
        let lead = Lead::new((), 3);
        lead.take().unwrap();
        let spawned = (0..10).filter(|_| lead.hand_over(()).1 == Then::Spawn).count();

        assert_eq!(spawned, 2);
    }
}
