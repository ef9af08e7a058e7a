//! A machine is forked while it runs: its child is the machine of one instant, neither sees what
//! the other does afterwards, and a child forks as its parent did. (D-k for memory, F-l.)

use forkd::machine::Image;
use forkd::memory::PAGE;
use offshoot_tests::payload::{Guest, HEAP, Op, available, identity};
use offshoot_tests::rng::{Rng, seed, soak};

const MIB: u64 = 1 << 20;
/// Where a counting guest looks whether it is to stop.
const STOP: u64 = HEAP;
/// What it counts in.
const PAGES_AT: u64 = HEAP + PAGE;

fn last_word(memory: &[u8], page: u64) -> u64 {
    word(memory, PAGES_AT + (page + 1) * PAGE - 8) ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn word(memory: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_le_bytes(memory[at..at + 8].try_into().unwrap())
}

/// Whether memory is that of one instant of a guest that counts in `pages` pages: up to some page
/// one number, behind it the number before, and only that one page may be half written.
fn check_one_instant(memory: &[u8], pages: u64, what: &str) {
    let firsts: Vec<u64> = (0..pages).map(|page| word(memory, PAGES_AT + page * PAGE)).collect();
    let number = firsts[0];
    let done = firsts.iter().take_while(|n| **n == number).count();
    for (page, first) in (0..).zip(&firsts) {
        let behind = page >= done as u64;
        assert_eq!(*first, number - u64::from(behind), "{what}: page {page}, done {done}");
        let last = last_word(memory, page);
        let at_work = page + 1 == done as u64;
        assert!(
            last == *first || at_work && last == first - 1,
            "{what}: page {page} ends with {last}, begins with {first}, done {done}"
        );
    }
}

fn start_counting(memory_bytes: u64) -> (Guest, u64) {
    let guest = Guest::start(memory_bytes, 1);
    let pages = guest.heap_pages() - 1;
    guest.tell(0, Op::Write, [PAGES_AT, pages, STOP]);
    offshoot_tests::until("the guest counts", || guest.word(PAGES_AT + (pages - 1) * PAGE) > 1);
    (guest, pages)
}

fn child_of(image: &Image, like: &Guest) -> Guest {
    Guest::child(image, like.class(), &identity(1)).expect("a child")
}

/// Stops a counting guest and gives the number that it reached.
fn stop_counting(guest: &Guest) -> u64 {
    guest.set_word(STOP, 1);
    let number = guest.answer(0);
    guest.set_word(STOP, 0);
    number
}

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
    let mut rng = Rng::new(seed);
    let rounds = if soak() { 1000 } else { 24 };
    let (mut guest, mut pages) = start_counting(8 * MIB);
    for round in 0..rounds {
        std::thread::sleep(std::time::Duration::from_micros(rng.below(3000)));
        let image = guest.cut();
        let child = child_of(&image, &guest);
        let what = format!("seed {seed}, round {round}, {} layers", image.layers.len());
        check_one_instant(&child.memory(), pages, &format!("{what}, child"));
        child.machine.resume().expect("the child runs");
        guest.machine.pause().expect("the parent pauses");
        check_one_instant(&guest.memory(), pages, &format!("{what}, parent"));
        guest.machine.resume().expect("the parent goes on");
        std::thread::sleep(std::time::Duration::from_micros(rng.below(2000)));
        child.machine.pause().expect("the child pauses");
        check_one_instant(&child.memory(), pages, &format!("{what}, child that ran on"));
        // Now and then a child takes the place of its parent, or a fresh guest does: every kind of
        // cut gets its turn.
        if rng.one_in(6) {
            (guest, pages) = start_counting(8 * MIB);
        } else if rng.one_in(3) {
            child.machine.resume().expect("the child goes on");
            guest = child;
        }
    }
    stop_counting(&guest);
}

/// Whoever writes what after a cut, the other side keeps what was there at the cut.
#[test]
fn neither_side_sees_what_the_other_writes() {
    let test = "vm_fork::neither_side_sees_what_the_other_writes";
    if !available(test) {
        return;
    }
    let parent = Guest::start(16 * MIB, 1);
    let pages = parent.heap_pages();
    let fill = |guest: &Guest, value: u64| {
        assert_eq!(guest.ask(Op::Fill, [HEAP, pages, value]), pages);
    };
    let sum = |guest: &Guest| guest.ask(Op::Sum, [HEAP, pages, 0]);
    fill(&parent, 1_000_000);
    let at_first = sum(&parent);
    // Twice: the first cut gives away the parent's file, the second copies its private pages.
    for cut in 1..=2u8 {
        let before = sum(&parent);
        let image = parent.cut();
        let children = [1, 2].map(|_| child_of(&image, &parent));
        // The no-leak case: the parent rewrites every page while no child has touched any.
        fill(&parent, u64::from(cut) * 7_000_000);
        children.iter().for_each(|child| child.machine.resume().expect("the child runs"));
        assert_eq!(sum(&children[0]), before, "cut {cut}: the child sees what its parent wrote");
        fill(&children[0], 3_000_000);
        assert_eq!(sum(&children[1]), before, "cut {cut}: a child sees what its sibling wrote");
        fill(&children[1], 4_000_000);
        let late = child_of(&image, &parent);
        late.machine.resume().expect("the child runs");
        assert_eq!(sum(&late), before, "cut {cut}: the image was written");
        for page in [0, 1, pages / 2, pages - 1] {
            let word = parent.word(HEAP + page * PAGE);
            assert_eq!(word, u64::from(cut) * 7_000_000 + page, "cut {cut}");
        }
    }
    assert_ne!(sum(&parent), at_first);
}

/// A child is forked, and its child, and so on: each generation writes something of its own, and
/// has everything that the generations above it wrote. The stack of layers stays short.
#[test]
fn fork_of_fork_to_depth_eight() {
    let test = "vm_fork::fork_of_fork_to_depth_eight";
    if !available(test) {
        return;
    }
    let mut line = vec![Guest::start(16 * MIB, 1)];
    let at = |generation: u64| HEAP + generation * 37 * PAGE;
    for generation in 0..8u64 {
        let parent = line.last().unwrap();
        parent.ask(Op::Fill, [at(generation), 30, 1000 * generation]);
        let image = parent.cut();
        assert!(image.layers.len() <= 4, "{} layers", image.layers.len());
        let child = child_of(&image, parent);
        child.machine.resume().expect("the child runs");
        // What the parent writes now belongs to it alone.
        parent.ask(Op::Fill, [at(generation), 30, 0xdead_0000]);
        for above in 0..=generation {
            for page in 0..30 {
                let word = child.word(at(above) + page * PAGE);
                assert_eq!(word, 1000 * above + page, "generation {generation}, from {above}");
            }
        }
        line.push(child);
    }
    // All of the line still runs, each with its own memory.
    for (generation, guest) in line.iter().enumerate().take(8) {
        let own = guest.word(at(generation as u64));
        assert_eq!(own, 0xdead_0000, "generation {generation}");
        assert_eq!(guest.ask(Op::Spin, [10, 0, 0]), line[8].ask(Op::Spin, [10, 0, 0]));
    }
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
    let parent = Guest::start(16 * MIB, 4);
    let share = parent.heap_pages() / 4;
    let area = |cpu: u64| PAGES_AT + cpu * share * PAGE;
    for cpu in 0..4u64 {
        let pages = share - 2;
        parent.tell(usize::try_from(cpu).unwrap(), Op::Write, [area(cpu), pages, STOP]);
    }
    for cpu in 0..4 {
        offshoot_tests::until("the guest counts", || parent.word(area(cpu)) > 0);
    }
    for _ in 0..3 {
        let image = parent.cut();
        let child = child_of(&image, &parent);
        let numbers: Vec<u64> = (0..4).map(|cpu| child.word(area(cpu))).collect();
        child.machine.resume().expect("the child runs");
        child.set_word(STOP, 1);
        for (cpu, number) in numbers.iter().enumerate() {
            let reached = child.answer(cpu);
            assert!(reached >= *number, "processor {cpu} went back");
        }
    }
    parent.set_word(STOP, 1);
    for cpu in 0..4 {
        assert!(parent.answer(cpu) > 0);
    }
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
