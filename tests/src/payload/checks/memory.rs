//! Forks of memory: of one instant, and apart from then on.

use super::{MIB, Seen, child_of};
use crate::payload::{Guest, HEAP, Op};
use crate::rng::Rng;
use forkd::memory::PAGE;

/// Where a counting guest looks whether it is to stop.
const STOP: u64 = HEAP;
/// What it counts in.
const PAGES_AT: u64 = HEAP + PAGE;

fn last_word(memory: &[u8], page: u64) -> u64 {
    word(memory, PAGES_AT + (page + 1) * PAGE - 8) ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn word(memory: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).expect("64 bits");
    u64::from_le_bytes(memory[at..at + 8].try_into().expect("8 bytes"))
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
    crate::until("the guest counts", || guest.word(PAGES_AT + (pages - 1) * PAGE) > 1);
    (guest, pages)
}

/// Stops a counting guest and gives the number that it reached.
fn stop_counting(guest: &Guest) -> u64 {
    guest.set_word(STOP, 1);
    let number = guest.answer(0);
    guest.set_word(STOP, 0);
    number
}

/// A guest writes page after page as fast as it can while it is forked, `rounds` times. Every page
/// of every child is compared, before the child runs and after it ran on.
///
/// # Panics
/// When a page is not of the instant of the fork.
pub fn one_instant(seed: u64, memory_bytes: u64, rounds: u64) -> Seen {
    let (mut rng, mut seen) = (Rng::new(seed), Seen::default());
    let (mut guest, mut pages) = start_counting(memory_bytes);
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
        seen.word(3 * pages);
        // Now and then a child takes the place of its parent, or a fresh guest does: every kind of
        // cut gets its turn.
        if rng.one_in(6) {
            (guest, pages) = start_counting(memory_bytes);
        } else if rng.one_in(3) {
            child.machine.resume().expect("the child goes on");
            guest = child;
        }
    }
    stop_counting(&guest);
    seen.word(guest.ask(Op::Fill, [PAGES_AT, pages, seed]));
    seen.word(guest.ask(Op::Sum, [PAGES_AT, pages, 0]));
    seen
}

/// Whoever writes what after a cut, the other side keeps what was there at the cut.
///
/// # Panics
/// When one sees what another wrote.
pub fn apart(memory_bytes: u64) -> Seen {
    let mut seen = Seen::default();
    let parent = Guest::start(memory_bytes, 1);
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
        [&parent, &children[0], &children[1], &late].iter().for_each(|g| seen.word(sum(g)));
    }
    assert_ne!(sum(&parent), at_first);
    seen
}

/// A child is forked, and its child, and so on: each generation writes something of its own, and
/// has everything that the generations above it wrote. The stack of layers stays short.
///
/// # Panics
/// When a generation lacks something, or sees what its parent wrote later.
pub fn generations(memory_bytes: u64, depth: u64) -> Seen {
    let mut seen = Seen::default();
    let mut line = vec![Guest::start(memory_bytes, 1)];
    let at = |generation: u64| HEAP + generation * 37 * PAGE;
    for generation in 0..depth {
        let parent = line.last().expect("a parent");
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
    let last = line.pop().expect("the last child");
    for (generation, guest) in (0..).zip(&line) {
        assert_eq!(guest.word(at(generation)), 0xdead_0000, "generation {generation}");
        assert_eq!(guest.ask(Op::Spin, [10, 0, 0]), last.ask(Op::Spin, [10, 0, 0]));
        seen.word(guest.ask(Op::Sum, [HEAP, guest.heap_pages(), 0]));
    }
    seen.word(last.ask(Op::Sum, [HEAP, last.heap_pages(), 0]));
    seen
}

/// Several processors are taken at the same instant, and all go on in the child.
///
/// # Panics
/// When one of them does not, or goes back.
pub fn processors(memory_bytes: u64, vcpus: u8) -> Seen {
    let mut seen = Seen::default();
    let parent = Guest::start(memory_bytes, vcpus);
    let (cpus, share) = (usize::from(vcpus), parent.heap_pages() / u64::from(vcpus));
    let area = |cpu: usize| PAGES_AT + cpu as u64 * share * PAGE;
    for cpu in 0..cpus {
        parent.tell(cpu, Op::Write, [area(cpu), share - 2, STOP]);
    }
    for cpu in 0..cpus {
        crate::until("the guest counts", || parent.word(area(cpu)) > 0);
    }
    for _ in 0..3 {
        let image = parent.cut();
        let child = child_of(&image, &parent);
        let numbers: Vec<u64> = (0..cpus).map(|cpu| child.word(area(cpu))).collect();
        child.machine.resume().expect("the child runs");
        child.set_word(STOP, 1);
        for (cpu, number) in numbers.iter().enumerate() {
            let reached = child.answer(cpu);
            assert!(reached >= *number, "processor {cpu} went back");
        }
        for cpu in 0..cpus {
            child.tell(cpu, Op::Fill, [area(cpu), share - 2, cpu as u64 * MIB]);
            assert_eq!(child.answer(cpu), share - 2);
            child.tell((cpu + 1) % cpus, Op::Sum, [area(cpu), share - 2, 0]);
            seen.word(child.answer((cpu + 1) % cpus));
        }
    }
    parent.set_word(STOP, 1);
    for cpu in 0..cpus {
        assert!(parent.answer(cpu) > 0);
    }
    seen
}
