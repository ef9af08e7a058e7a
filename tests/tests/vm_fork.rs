//! A machine is forked while it runs: its child is the machine of one instant, neither sees what
//! the other does afterwards, and a child forks as its parent did. (D-k for memory, F-l.)

use forkd::machine::Image;
use forkd::memory::PAGE;
use offshoot_tests::payload::checks::{self, child_of};
use offshoot_tests::payload::{Guest, HEAP, Op, available};
use offshoot_tests::rng::{Rng, seed, soak};

const MIB: u64 = 1 << 20;

/// A guest writes page after page as fast as it can while it is forked, again and again. Every
/// page of every child is compared, before the child runs and after it ran on.
#[test]
fn child_is_the_parent_at_one_instant() {
    let test = "vm_fork::child_is_the_parent_at_one_instant";
    if !available(test) {
        return;
    }
    let seed = seed(0x5eed_f04c);
    eprintln!("to repeat: OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test vm_fork");
    let rounds = if soak() { 1000 } else { 24 };
    checks::one_instant(seed, 8 * MIB, rounds);
    println!("rounds of the race: {rounds}");
}

/// Whoever writes what after a cut, the other side keeps what was there at the cut.
#[test]
fn neither_side_sees_what_the_other_writes() {
    let test = "vm_fork::neither_side_sees_what_the_other_writes";
    if !available(test) {
        return;
    }
    checks::apart(16 * MIB);
}

/// A child is forked, and its child, and so on: each generation writes something of its own, and
/// has everything that the generations above it wrote. The stack of layers stays short.
#[test]
fn fork_of_fork_to_depth_eight() {
    let test = "vm_fork::fork_of_fork_to_depth_eight";
    if !available(test) {
        return;
    }
    checks::generations(16 * MIB, 8);
}

/// A parent that is forked many times, and writes little in between, gives each child exactly what
/// it has, though each cut copies only what was written since the one before.
#[test]
fn many_cuts_of_one_parent() {
    let test = "vm_fork::many_cuts_of_one_parent";
    if !available(test) {
        return;
    }
    let parent = Guest::start(16 * MIB, 1);
    let pages = parent.heap_pages();
    parent.ask(Op::Fill, [HEAP, pages, 5]);
    let mut rng = Rng::new(7);
    let mut kept = Vec::new();
    for cut in 0..12u64 {
        for _ in 0..rng.below(40) {
            parent.ask(Op::Fill, [HEAP + rng.below(pages) * PAGE, 1, cut << 32]);
        }
        // Devices write as well, which the log of the processors does not have.
        parent.set_word(HEAP + rng.below(pages) * PAGE, rng.any());
        let image = parent.cut();
        let child = child_of(&image, &parent);
        parent.machine.pause().expect("the parent pauses");
        let same = child.memory() == parent.memory();
        assert!(same, "cut {cut}, {} layers: the child differs", image.layers.len());
        parent.machine.resume().expect("the parent goes on");
        kept.push((child, parent.ask(Op::Sum, [HEAP, pages, 0])));
    }
    for (cut, (child, sum)) in kept.iter().enumerate() {
        child.machine.resume().expect("the child runs");
        assert_eq!(child.ask(Op::Sum, [HEAP, pages, 0]), *sum, "cut {cut}");
    }
}

/// A machine that stands can be forked, any number of times, and stands afterwards.
#[test]
fn paused_machine_is_a_template() {
    let test = "vm_fork::paused_machine_is_a_template";
    if !available(test) {
        return;
    }
    let template = Guest::start(8 * MIB, 1);
    template.ask(Op::Fill, [HEAP, 100, 42]);
    template.machine.pause().expect("it pauses");
    for _ in 0..3 {
        let image = template.cut();
        assert_eq!(image.layers.len(), 1, "nothing was written in between");
        let child = child_of(&image, &template);
        child.machine.resume().expect("the child runs");
        child.ask(Op::Fill, [HEAP, 100, 43]);
        assert!(template.panel.is_quiet());
        assert_eq!(template.word(HEAP + PAGE), 43);
    }
    template.machine.resume().expect("it goes on");
    assert_eq!(template.ask(Op::Spin, [0, 0, 0]), 1);
}

/// Several processors are taken at the same instant, and all go on in the child.
#[test]
fn processors_stop_together() {
    let test = "vm_fork::processors_stop_together";
    if !available(test) {
        return;
    }
    checks::processors(16 * MIB, 4);
}

/// What nobody wrote costs nothing: a child that writes where its parent never did has one page
/// for it, not one of its own and one in the image.
#[test]
fn holes_do_not_cost_double() {
    let test = "vm_fork::holes_do_not_cost_double";
    if !available(test) {
        return;
    }
    let parent = Guest::start(64 * MIB, 1);
    parent.ask(Op::Fill, [HEAP, 1, 1]);
    let image = parent.cut();
    let blocks = |image: &Image| -> i64 {
        image.layers.iter().map(|l| rustix::fs::fstat(l.file()).unwrap().st_blocks * 512).sum()
    };
    let before = blocks(&image);
    let child = child_of(&image, &parent);
    child.machine.resume().expect("the child runs");
    child.ask(Op::Fill, [HEAP + 8 * MIB, 4096, 1]);
    child.ask(Op::Sum, [HEAP, 2048, 0]);
    // Spans are rounded out to 64 KiB, so the image may still get what is between its own pages.
    let rounded: u64 = image.layers.iter().flat_map(|l| l.spans()).map(|span| span.len).sum();
    assert!(
        blocks(&image) <= i64::try_from(rounded).unwrap(),
        "the image grew by what was written"
    );
    assert!(rounded < MIB, "{rounded} bytes for a parent that wrote almost nothing ({before})");
}
