//! The state of a machine is taken whole and put back whole: registers, timers, interrupts on
//! their way, accesses half done; and what does not fit is refused by name.

use forkd::kvm::blob::{Reader, Writer};
use forkd::kvm::state::tag;
use forkd::machine::{Image, Pause, SizeClass};
use format::{Error, Kind};
use offshoot_tests::payload::checks::{self, Forks, altered};
use offshoot_tests::payload::{Guest, HEAP, Op, available, identity};
use offshoot_tests::rng::Rng;

const MIB: u64 = 1 << 20;

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
    let forks = Forks { most: 4, every_ms: 10 };
    checks::work(Op::Spin, [50_000_000, 0, 0], forks);
    // Every register, and then memory that decides what comes next.
    checks::work(Op::Live, [2_000_000, 0x5eed, 0], forks);
    checks::work(Op::Churn, [HEAP, 500, 4_000_000], forks);
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
        checks::accesses(by_port, 6000, Forks { most: 8, every_ms: 4 });
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
    checks::interrupts(5, std::time::Duration::from_millis(30));
}

/// A guest that sleeps until its timer ticks is forked: the timer ticks on in both.
#[test]
fn timer_ticks_on() {
    let test = "vm_state::timer_ticks_on";
    if !available(test) {
        return;
    }
    checks::ticks(5, 40);
}

/// A doorbell never reaches the bus, in the child neither; another value at its address does.
#[test]
fn doorbells_ring_without_the_bus() {
    let test = "vm_state::doorbells_ring_without_the_bus";
    if !available(test) {
        return;
    }
    checks::doorbells();
}

/// A child is who it is to be before its first instruction.
#[test]
fn child_has_its_identity_at_once() {
    let test = "vm_state::child_has_its_identity_at_once";
    if !available(test) {
        return;
    }
    checks::identities();
}

/// What is saved, put back and saved again is the same, byte for byte, except for time: the clock,
/// the time stamp counter, what a local timer has left, and counters of the host.
#[test]
fn state_saved_restored_and_saved_is_the_same() {
    let test = "vm_state::state_saved_restored_and_saved_is_the_same";
    if !available(test) {
        return;
    }
    checks::saved_twice(&[1, 3]);
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
            let made = Guest::child(&with_state(&image, out.finish()), guest.class(), &identity(1));
            // States of before there was a frequency in them are none the worse.
            if cut == 0 && left_out.0 == tag::TSC_KHZ {
                made.expect("a state of before");
                continue;
            }
            let e = made.expect_err("a part is missing");
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
        let image = altered(&image, |tag, _, content| {
            if tag == tag::CPUID {
                let row = content.chunks_exact_mut(40).find(|row| row[..4] == leaf.to_le_bytes());
                row.expect("the leaf")[EBX] ^= 0xff;
            }
        });
        let e = Guest::child(&image, guest.class(), &identity(1)).expect_err("unfit processors");
        assert_eq!(e.kind(), Kind::Unsupported, "{e}");
        assert!(e.to_string().contains(says), "{e}");
    }
    assert!(guest.word(HEAP) == 0);
}

/// A guest counts time by the counter of its processor. A state from a host whose counter has
/// another frequency goes on at its own one, or is refused by name before anything is changed.
#[test]
fn a_counter_of_another_frequency_is_scaled_or_refused() {
    let test = "vm_state::a_counter_of_another_frequency_is_scaled_or_refused";
    if !available(test) {
        return;
    }
    let guest = Guest::start(8 * MIB, 2);
    let image = guest.cut();
    let state = Reader::new(&image.state).unwrap();
    let here = state.section(tag::TSC_KHZ, 0).expect("this host knows its frequency");
    let here = u32::from_le_bytes(here.try_into().unwrap());
    let of = |khz: u32| {
        altered(&image, |tag, _, content| {
            if tag == tag::TSC_KHZ {
                content.copy_from_slice(&khz.to_le_bytes());
            }
        })
    };
    // As one host measures it at another boot.
    Guest::child(&of(here + here / 10_000), guest.class(), &identity(1)).expect("as good as same");
    for khz in [here / 2, here + here / 1000] {
        match Guest::child(&of(khz), guest.class(), &identity(1)) {
            Ok(child) => {
                let kept = child.cut();
                let kept = Reader::new(&kept.state).unwrap();
                assert_eq!(kept.section(tag::TSC_KHZ, 0).unwrap(), khz.to_le_bytes());
            }
            Err(e) => {
                assert_eq!(e.kind(), Kind::Unsupported, "{e}");
                assert!(
                    e.to_string().contains(&format!("{khz} kHz, and this host's {here}")),
                    "{e}"
                );
            }
        }
    }
    guest.ask(Op::Spin, [10, 0, 0]);
}
