//! State of machines that is taken whole and put back whole: registers, timers, interrupts on
//! their way, accesses half done.

use std::time::Duration;

use forkd::kvm::blob::{Reader, Writer};
use forkd::machine::{Image, Pause};

use super::{MIB, Seen};
use crate::payload::{Guest, HEAP, InPause, Op, identity};
use crate::rng::Rng;
use crate::vm::parts;

/// A child of `image` that stands, of the same size as `like`.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn child_of(image: &Image, like: &Guest) -> Guest {
    Guest::child(image, like.class(), &identity(9)).expect("a child")
}

/// The image with another state: `change` is shown each section of it, with tag and number.
///
/// # Panics
/// When the image has no state.
#[must_use]
pub fn altered(image: &Image, change: impl Fn([u8; 4], u32, &mut Vec<u8>)) -> Image {
    let mut out = Writer::default();
    for (tag, number, content) in Reader::new(&image.state).expect("a state").sections() {
        let mut content = content.to_vec();
        change(tag, number, &mut content);
        out.section(tag, number, &content);
    }
    Image { layers: image.layers.clone(), state: out.finish(), pause: Pause::default() }
}

/// How a guest that works is forked.
#[derive(Debug, Clone, Copy)]
pub struct Forks {
    /// How often, at most.
    pub most: usize,
    /// How long it works before each fork, at most, in milliseconds.
    pub every_ms: u64,
}

/// How often a guest begins its work anew when it was done before it could be forked.
const TRIES: u32 = 12;

impl Forks {
    /// Forks a new guest while its first processor does what `begin` tells it: the guest, its
    /// answer, and the children, at least one, which run.
    fn of(self, seed: u64, begin: impl Fn(&Guest)) -> (Guest, u64, Vec<Guest>) {
        let mut rng = Rng::new(seed);
        for tried in 0..TRIES {
            let parent = Guest::start(4 * MIB, 1);
            begin(&parent);
            let mut children = Vec::new();
            let mut answer = None;
            // A host that is busy wakes us late: then there is less time to wait.
            let wait_us = ((self.every_ms * 1000) >> tried).max(1);
            while answer.is_none() && children.len() < self.most {
                std::thread::sleep(Duration::from_micros(rng.below(wait_us)));
                let image = parent.cut();
                // Who has answered by now may have done so before the cut, and its child never
                // will.
                answer = parent.panel.pop(0, Duration::ZERO);
                if answer.is_none() {
                    let child = child_of(&image, &parent);
                    child.machine.resume().expect("the child runs");
                    children.push(child);
                }
            }
            if !children.is_empty() {
                let answer = answer.unwrap_or_else(|| parent.answer(0));
                return (parent, answer, children);
            }
        }
        panic!("the work is too short to be forked");
    }
}

/// Long work in registers or memory, forked in the middle, over and over: parent and children all
/// come to the same end, with the same memory.
///
/// # Panics
/// When one comes to another end.
pub fn work(op: Op, arguments: [u64; 3], forks: Forks) -> Seen {
    let mut seen = Seen::default();
    let (parent, answer, children) = forks.of(1, |parent| {
        parent.ask(Op::Fill, [HEAP, parent.heap_pages(), 0x5eed]);
        parent.tell(0, op, arguments);
    });
    let heap = usize::try_from(HEAP).expect("64 bits");
    let memory = parent.memory().split_off(heap);
    for child in &children {
        assert_eq!(child.answer(0), answer, "a child comes to another end");
        assert!(child.memory()[heap..] == memory, "a child ends with other memory");
    }
    seen.word(answer);
    seen.bytes(&memory);
    seen
}

/// An access that the guest is in the middle of is finished once, in the parent and in the child:
/// the panel gives out numbers, and the guest complains of one that is missing or comes twice.
///
/// # Panics
/// When the guest complains.
pub fn accesses(by_port: u64, count: u64, forks: Forks) -> Seen {
    let mut seen = Seen::default();
    let begin = |parent: &Guest| parent.tell(0, Op::Follow, [count, by_port, 0]);
    let (_parent, answer, children) = forks.of(by_port, begin);
    assert_eq!(answer, count, "by port: {by_port}");
    for child in children {
        assert_eq!(child.answer(0), count, "by port: {by_port}");
    }
    seen.word(answer);
    seen
}

/// An interrupt that is raised after the processors stopped and before the state is taken reaches
/// the parent and the child, each once. One that is raised later is the parent's alone. KVM
/// delivers from a worker of its own, which has done so after `settle`; what has not arrived when
/// the state is taken is for the devices to raise again.
///
/// # Panics
/// When one is missing or comes twice.
pub fn interrupts(rounds: u64, settle: Duration) -> Seen {
    let mut seen = Seen::default();
    let parent = Guest::start(8 * MIB, 1);
    parent.ask(Op::OpenLine, [5, 0, 0]);
    parent.panel.raise();
    assert_eq!(parent.ask(Op::WaitLines, [1, 0, 0]), 1);
    let raise = || {
        parent.panel.raise();
        std::thread::sleep(settle);
    };
    for round in 1..=rounds {
        let image = parent
            .cut_with(&mut InPause { before: &mut || raise(), after: &mut || Ok(()) })
            .expect("the guest is cut");
        let child = child_of(&image, &parent);
        child.machine.resume().expect("the child runs");
        assert_eq!(child.ask(Op::WaitLines, [round + 1, 0, 0]), round + 1);
        assert_eq!(parent.ask(Op::WaitLines, [round + 1, 0, 0]), round + 1);
        for guest in [&child, &parent] {
            let lines = guest.ask(Op::Lines, [0; 3]);
            assert_eq!(lines, round + 1, "an interrupt came twice");
            seen.word(lines);
        }
    }
    let image = parent
        .cut_with(&mut InPause {
            before: &mut || (),
            after: &mut || {
                raise();
                Ok(())
            },
        })
        .expect("the guest is cut");
    let child = child_of(&image, &parent);
    child.machine.resume().expect("the child runs");
    let (now, next) = (rounds + 1, rounds + 2);
    assert_eq!(parent.ask(Op::WaitLines, [next, 0, 0]), next);
    assert_eq!(child.ask(Op::Lines, [0; 3]), now, "the child has its parent's later interrupt");
    child.panel.raise();
    assert_eq!(child.ask(Op::WaitLines, [next, 0, 0]), next, "the child's own line is dead");
    seen.word(next);
    seen
}

/// A guest that sleeps until its timer ticked so often is forked: the timer ticks on in both.
///
/// # Panics
/// When one is not woken.
pub fn ticks(forks: u64, count: u64) -> Seen {
    let mut seen = Seen::default();
    let parent = Guest::start(8 * MIB, 1);
    parent.ask(Op::StartTimer, [2_000_000, 0, 0]);
    let mut ticks = parent.ask(Op::WaitTicks, [3, 0, 0]);
    let mut woken = 0;
    while woken < forks {
        parent.tell(0, Op::WaitTicks, [ticks + count, 0, 0]);
        let image = parent.cut();
        let late = parent.panel.pop(0, Duration::ZERO);
        // As in `Forks`: who was not asleep any more at the cut wakes nobody.
        if late.is_none() {
            let child = child_of(&image, &parent);
            child.machine.resume().expect("the child runs");
            assert!(child.answer(0) >= ticks + count);
            woken += 1;
            seen.word(count);
        }
        ticks = late.unwrap_or_else(|| parent.answer(0));
    }
    seen
}

/// A doorbell never reaches the bus, in the child neither; another value at its address does.
///
/// # Panics
/// When one rings, or does not, that should have been otherwise.
pub fn doorbells() -> Seen {
    let mut seen = Seen::default();
    let parent = Guest::start(8 * MIB, 1);
    let child = parent.fork(3);
    child.machine.resume().expect("the child runs");
    parent.ask(Op::Ring, [7, 0, 0]);
    assert!(parent.panel.rang() && !child.panel.rang());
    child.ask(Op::Ring, [7, 0, 0]);
    assert!(child.panel.rang() && !parent.panel.rang());
    assert_eq!(child.panel.complaint(), None);
    child.tell(0, Op::Ring, [8, 0, 0]);
    crate::until("the other value arrives", || child.panel.complaint().is_some());
    assert!(!child.panel.rang());
    seen.text(&child.panel.complaint().unwrap_or_default());
    seen
}

/// A child is who it is to be before its first instruction.
///
/// # Panics
/// When it is somebody else.
pub fn identities() -> Seen {
    let mut seen = Seen::default();
    let parent = Guest::start(8 * MIB, 1);
    let image = parent.cut();
    for n in [5, 6] {
        let child = Guest::child(&image, parent.class(), &identity(n)).expect("a child");
        child.machine.resume().expect("the child runs");
        let own = child.ask(Op::Identity, [0; 3]);
        assert_eq!(own, u64::from_le_bytes([n; 8]));
        seen.word(own);
    }
    assert_eq!(parent.ask(Op::Identity, [0; 3]), 0);
    seen
}

/// What is saved, put back and saved again is the same, byte for byte, except for time: the clock,
/// the time stamp counter, what a local timer has left, and counters of the host. For machines
/// with so many processors each.
///
/// # Panics
/// When a section differs.
pub fn saved_twice(sizes: &[u8]) -> Seen {
    let mut seen = Seen::default();
    for vcpus in sizes {
        let guest = Guest::start(8 * MIB, *vcpus);
        guest.ask(Op::OpenLine, [5, 0, 0]);
        guest.ask(Op::StartTimer, [50_000_000, 0, 0]);
        guest.tell(0, Op::Live, [u64::MAX, 1, 0]);
        std::thread::sleep(Duration::from_millis(3));
        guest.machine.pause().expect("it pauses");
        let first = guest.cut();
        let second = child_of(&first, &guest).cut();
        let (first, second) = (parts(&first.state), parts(&second.state));
        let names: Vec<_> = first.iter().map(|part| part.0.clone()).collect();
        assert_eq!(names, second.iter().map(|part| part.0.clone()).collect::<Vec<_>>());
        for ((name, first), (_, second)) in first.iter().zip(&second) {
            assert_eq!(first, second, "section {name} of a machine with {vcpus} processors");
            seen.text(name);
        }
    }
    seen
}
