//! What a fork of a running machine costs, without disks: vm_fork MEMORY_MIB ROUNDS.
//!
//! A payload guest that has written all of its memory is cut while it runs, and a child is made of
//! the image in a shell that is ready. Prints one section of Markdown.
//!
//! *Pause*: from the first processor that is asked to stop until the last is let go. *Child*: from
//! the complete image to the first access of the child to its panel, so it has run by then.

use std::time::{Duration, Instant};

use forkd::machine::{Machine, Pause};
use offshoot_benches::figures::Figures;
use offshoot_tests::payload::{Guest, HEAP, Op, identity};

const MIB: u64 = 1 << 20;
/// How long to wait for huge pages.
const HUGE_MAX: Duration = Duration::from_secs(60);

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The parts of pauses.
#[derive(Default)]
struct Pauses {
    whole: Figures,
    park: Figures,
    save: Figures,
    memory: Figures,
}

impl Pauses {
    fn add(&mut self, pause: &Pause) {
        self.whole.add(ms(pause.whole));
        self.park.add(ms(pause.park));
        self.save.add(ms(pause.save));
        self.memory.add(ms(pause.memory));
    }

    fn rows(&self, what: &str) {
        self.whole.row(&format!("pause, {what}"));
        self.park.row("… stop the processor");
        self.save.row("… save its state");
        self.memory.row("… freeze memory");
    }
}

fn main() {
    let mut numbers = std::env::args().skip(1).map(|word| word.parse::<u64>());
    let mut number = |default| numbers.next().and_then(Result::ok).unwrap_or(default);
    let (memory_mib, rounds) = (number(512), number(20));
    let (mut small, mut huge, mut next) = (Pauses::default(), Pauses::default(), Pauses::default());
    let (mut child, mut later) = (Figures::default(), Figures::default());
    let (mut first, mut cut, mut idle) =
        (Figures::default(), Figures::default(), Figures::default());
    for round in 0..rounds {
        for wait in [false, true] {
            let parent = Guest::start(memory_mib * MIB, 1);
            let pages = parent.heap_pages();
            parent.ask(Op::Fill, [HEAP, pages, 1]);
            if wait {
                wait_for_huge_pages(&parent);
            }
            let shell = Machine::shell(&parent.class()).expect("a shell");
            let began = Instant::now();
            let image = parent.cut();
            if wait {
                first.add(ms(began.elapsed()));
            }
            if wait { &mut huge } else { &mut small }.add(&image.pause);
            child.add(ms(time_to_run(shell, &image)));
            if !wait {
                continue;
            }
            for share in 0..4 {
                // One page in a hundred, somewhere else each time.
                let first = HEAP + share * (pages / 4) * 4096;
                parent.ask(Op::Fill, [first, pages / 100, round]);
                let shell = Machine::shell(&parent.class()).expect("a shell");
                let began = Instant::now();
                let image = parent.cut();
                cut.add(ms(began.elapsed()));
                next.add(&image.pause);
                later.add(ms(time_to_run(shell, &image)));
                let began = Instant::now();
                drop(parent.cut());
                idle.add(ms(began.elapsed()));
            }
        }
    }
    println!(
        "## Fork of a machine with {memory_mib} MiB, all of it written, 1 processor, no disk\n"
    );
    println!("| what | N | p50 ms | p90 ms | p99 ms |");
    println!("|---|---|---|---|---|");
    small.rows("first cut, ordinary pages");
    huge.rows("first cut, huge pages");
    next.rows("later cuts, 1 % written since");
    first.row("first cut, huge pages, whole call");
    cut.row("later cuts, 1 % written since, whole call");
    idle.row("later cuts, nothing written since, whole call");
    child.row("child of a first cut: image to first access");
    later.row("child of a later cut: image to first access");
}

fn wait_for_huge_pages(guest: &Guest) {
    let until = Instant::now() + HUGE_MAX;
    let all = guest.machine.ram().size() * 9 / 10;
    while guest.machine.huge_bytes() < all && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn time_to_run(shell: Machine, image: &forkd::machine::Image) -> Duration {
    let began = Instant::now();
    let child = Guest::child_in(shell, image, &identity(1)).expect("a child");
    child.machine.resume().expect("the child runs");
    loop {
        if let Some(first) = child.panel.first_access() {
            return first - began;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
