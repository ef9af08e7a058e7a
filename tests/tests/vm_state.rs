//! The state of a machine is taken whole and put back whole: registers, timers, interrupts on
//! their way, accesses half done; and what does not fit is refused by name.

use forkd::kvm::blob::{Reader, Writer};
use forkd::kvm::state::tag;
use forkd::machine::{Image, Pause, SizeClass};
use format::{Error, Kind};
use offshoot_tests::payload::{Guest, HEAP, InPause, Op, available, identity};
use offshoot_tests::rng::Rng;
use offshoot_tests::vm::parts;

const MIB: u64 = 1 << 20;

fn child_of(image: &Image, like: &Guest) -> Guest {
    Guest::child(image, like.class(), &identity(9)).expect("a child")
}

/// The image with another state.
fn with_state(image: &Image, state: Vec<u8>) -> Image {
    Image { layers: image.layers.clone(), state, pause: Pause::default() }
}

/// Long arithmetic in general and vector registers, forked in the middle, over and over: parent
/// and children all come to the same end.
#[test]
fn registers_go_on_where_they_were() {
    let test = "vm_state::registers_go_on_where_they_were";
    if !available(test) {
        return;
    }
    let rounds = 100_000_000;
    let guest = Guest::start(8 * MIB, 1);
    guest.tell(0, Op::Spin, [rounds, 0, 0]);
    let children: Vec<Guest> = (0..4)
        .map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let child = child_of(&guest.cut(), &guest);
            child.machine.resume().expect("the child runs");
            child
        })
        .collect();
    let expected = guest.answer(0);
    for child in &children {
        assert_eq!(child.answer(0), expected);
    }
}

/// An access that the guest is in the middle of is finished once, in the parent and in the child:
/// the panel gives out numbers, and the guest complains of one that is missing or comes twice.
#[test]
fn half_done_accesses_are_finished_once() {
    let test = "vm_state::half_done_accesses_are_finished_once";
    if !available(test) {
        return;
    }
    for by_port in [0, 1] {
        let parent = Guest::start(8 * MIB, 1);
        let mut rng = Rng::new(by_port);
        let count = 6_000;
        parent.tell(0, Op::Follow, [count, by_port, 0]);
        let mut children = Vec::new();
        for _ in 0..8 {
            std::thread::sleep(std::time::Duration::from_micros(rng.below(4000)));
            let child = child_of(&parent.cut(), &parent);
            child.machine.resume().expect("the child runs");
            children.push(child);
        }
        assert_eq!(parent.answer(0), count, "by port: {by_port}");
        for child in children {
            assert_eq!(child.answer(0), count, "by port: {by_port}");
        }
    }
}

/// An interrupt that is raised after the processors stopped and before the state is taken reaches
/// the parent and the child, each once. One that is raised later is the parent's alone.
#[test]
fn pending_interrupts_arrive_once() {
    let test = "vm_state::pending_interrupts_arrive_once";
    if !available(test) {
        return;
    }
    let parent = Guest::start(8 * MIB, 1);
    parent.ask(Op::OpenLine, [5, 0, 0]);
    parent.panel.raise();
    assert_eq!(parent.ask(Op::WaitLines, [1, 0, 0]), 1);
    // KVM delivers from a worker of its own; what has not arrived when the state is taken is for
    // the devices to raise again.
    let raise = || {
        parent.panel.raise();
        std::thread::sleep(std::time::Duration::from_millis(30));
    };
    for round in 1..=5 {
        let image = parent
            .cut_with(&mut InPause { before: &mut || raise(), after: &mut || Ok(()) })
            .expect("the guest is cut");
        let child = child_of(&image, &parent);
        child.machine.resume().expect("the child runs");
        assert_eq!(child.ask(Op::WaitLines, [round + 1, 0, 0]), round + 1);
        assert_eq!(parent.ask(Op::WaitLines, [round + 1, 0, 0]), round + 1);
        for guest in [&child, &parent] {
            assert_eq!(guest.ask(Op::Lines, [0; 3]), round + 1, "an interrupt came twice");
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
    assert_eq!(parent.ask(Op::WaitLines, [7, 0, 0]), 7);
    assert_eq!(child.ask(Op::Lines, [0; 3]), 6, "the child has its parent's later interrupt");
    child.panel.raise();
    assert_eq!(child.ask(Op::WaitLines, [7, 0, 0]), 7, "the child's own line is dead");
}

/// A guest that sleeps until its timer ticks is forked: the timer ticks on in both.
#[test]
fn timer_ticks_on() {
    let test = "vm_state::timer_ticks_on";
    if !available(test) {
        return;
    }
    let parent = Guest::start(8 * MIB, 1);
    parent.ask(Op::StartTimer, [2_000_000, 0, 0]);
    let mut ticks = parent.ask(Op::WaitTicks, [3, 0, 0]);
    for _ in 0..5 {
        // Long enough that the parent is still asleep when it is cut.
        parent.tell(0, Op::WaitTicks, [ticks + 40, 0, 0]);
        let child = child_of(&parent.cut(), &parent);
        child.machine.resume().expect("the child runs");
        assert!(child.answer(0) >= ticks + 40);
        ticks = parent.answer(0);
    }
}

/// A doorbell never reaches the bus, in the child neither; another value at its address does.
#[test]
fn doorbells_ring_without_the_bus() {
    let test = "vm_state::doorbells_ring_without_the_bus";
    if !available(test) {
        return;
    }
    let parent = Guest::start(8 * MIB, 1);
    let child = parent.fork(3);
    child.machine.resume().expect("the child runs");
    parent.ask(Op::Ring, [7, 0, 0]);
    assert!(parent.panel.rang() && !child.panel.rang());
    child.ask(Op::Ring, [7, 0, 0]);
    assert!(child.panel.rang() && !parent.panel.rang());
    assert_eq!(child.panel.complaint(), None);
    child.tell(0, Op::Ring, [8, 0, 0]);
    offshoot_tests::until("the other value arrives", || child.panel.complaint().is_some());
    assert!(!child.panel.rang());
}

/// A child is who it is to be before its first instruction.
#[test]
fn child_has_its_identity_at_once() {
    let test = "vm_state::child_has_its_identity_at_once";
    if !available(test) {
        return;
    }
    let parent = Guest::start(8 * MIB, 1);
    let image = parent.cut();
    for n in [5, 6] {
        let child = Guest::child(&image, parent.class(), &identity(n)).expect("a child");
        child.machine.resume().expect("the child runs");
        assert_eq!(child.ask(Op::Identity, [0; 3]), u64::from_le_bytes([n; 8]));
    }
    assert_eq!(parent.ask(Op::Identity, [0; 3]), 0);
}

/// What is saved, put back and saved again is the same, byte for byte, except for time: the clock,
/// the time stamp counter, what a local timer has left, and counters of the host.
#[test]
fn state_saved_restored_and_saved_is_the_same() {
    let test = "vm_state::state_saved_restored_and_saved_is_the_same";
    if !available(test) {
        return;
    }
    for vcpus in [1, 3] {
        let guest = Guest::start(8 * MIB, vcpus);
        guest.ask(Op::OpenLine, [5, 0, 0]);
        guest.ask(Op::StartTimer, [50_000_000, 0, 0]);
        guest.tell(0, Op::Spin, [u64::MAX, 0, 0]);
        std::thread::sleep(std::time::Duration::from_millis(3));
        guest.machine.pause().expect("it pauses");
        let first = guest.cut();
        let second = child_of(&first, &guest).cut();
        let (first, second) = (parts(&first.state), parts(&second.state));
        let names: Vec<_> = first.iter().map(|part| part.0.clone()).collect();
        assert_eq!(names, second.iter().map(|part| part.0.clone()).collect::<Vec<_>>());
        for ((name, first), (_, second)) in first.iter().zip(&second) {
            assert_eq!(first, second, "section {name} of a machine with {vcpus} processors");
        }
    }
}

/// A state that was altered or cut short anywhere, or lacks a part, makes no machine.
#[test]
fn broken_state_is_refused() {
    let test = "vm_state::broken_state_is_refused";
    if !available(test) {
        return;
    }
    let guest = Guest::new(8 * MIB, 1);
    let image = guest.cut();
    let refused = |state: Vec<u8>| -> Error {
        let class = guest.class();
        Guest::child(&with_state(&image, state), class, &identity(1)).expect_err("a broken state")
    };
    let mut rng = Rng::new(3);
    for _ in 0..20 {
        let mut state = image.state.clone();
        let at = usize::try_from(rng.below(state.len() as u64)).unwrap();
        state[at] ^= 1 << rng.below(8);
        assert_eq!(refused(state).kind(), Kind::Corrupt, "byte {at}");
        assert_eq!(refused(image.state[..at].to_vec()).kind(), Kind::Corrupt, "cut at {at}");
    }
    // Whole, but a section is missing or of a wrong size.
    let all: Vec<_> = Reader::new(&image.state).unwrap().sections().collect();
    for (left_out, name) in all.iter().map(|s| (*s, String::from_utf8_lossy(&s.0).into_owned())) {
        for cut in [0, 1] {
            let mut out = Writer::default();
            for (tag, number, content) in &all {
                if (*tag, *number) != (left_out.0, left_out.1) {
                    out.section(*tag, *number, content);
                } else if cut == 1 {
                    out.section(*tag, *number, &content[..content.len() - 1]);
                }
            }
            let e = refused(out.finish());
            assert_eq!(e.kind(), Kind::Corrupt, "{name}: {e}");
        }
    }
}

/// A state from a machine of another size, or from processors that can more than these, is refused
/// by name.
#[test]
fn unfit_state_is_refused_by_name() {
    let test = "vm_state::unfit_state_is_refused_by_name";
    if !available(test) {
        return;
    }
    let guest = Guest::new(8 * MIB, 1);
    let image = guest.cut();
    for class in [
        SizeClass { memory_bytes: 16 * MIB, vcpus: 1 },
        SizeClass { memory_bytes: 8 * MIB, vcpus: 2 },
    ] {
        let e = Guest::child(&image, class, &identity(1)).expect_err("another size");
        assert_eq!(e.kind(), Kind::Unsupported);
        assert!(e.to_string().contains("8388608 bytes of memory and 1 processors"), "{e}");
    }
    /// Where a row of the processor's features has its second register.
    const EBX: usize = 16;
    // Eight features turned over: those of them that the processor lacks are now asked for.
    for (leaf, says) in [(7u32, "lacks features: leaf 0x7.0 EBX bits"), (0, "another vendor")] {
        let mut out = Writer::default();
        for (tag, number, content) in Reader::new(&image.state).unwrap().sections() {
            let mut content = content.to_vec();
            if tag == tag::CPUID {
                let row = content.chunks_exact_mut(40).find(|row| row[..4] == leaf.to_le_bytes());
                row.expect("the leaf")[EBX] ^= 0xff;
            }
            out.section(tag, number, &content);
        }
        let image = with_state(&image, out.finish());
        let e = Guest::child(&image, guest.class(), &identity(1)).expect_err("unfit processors");
        assert_eq!(e.kind(), Kind::Unsupported, "{e}");
        assert!(e.to_string().contains(says), "{e}");
    }
    assert!(guest.word(HEAP) == 0);
}
