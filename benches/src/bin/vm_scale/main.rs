//! What forks of a running machine with a disk cost through the daemons: vm_scale MEMORY_MIB ROUNDS
//! PARTS CHILDREN…
//!
//! PARTS is `all`, or some of `many,single,peer,after,row`.
//!
//! A payload guest that has written all of its memory is forked through forkd's interface; its disk
//! is forked by blockd at the same instant. Prints one section of Markdown.
//!
//! *Pause*: as the parent's process measures it, from the first processor that is asked to stop
//! until the last is let go, the cut of its disk included. *Child runs*: from the request until the
//! child runs. *Durable*: from the request until everything is, which is when the request is
//! answered. What a child does first is told by its own clock (`clock.rs`).
//!
//! Stores are on a disk; forkd's folder is in memory, as its usual one below `/run` is.

mod aims;
mod clock;
mod host;
mod many;
mod peer;
mod rate;
mod singles;
mod slowdown;

use aims::{Aims, Bound};
use clock::Clock;
use host::{POOL, Ready};
use peer::Peer;
use singles::Singles;

/// Rounds of a kind that take seconds each, at most.
const SLOW_ROUNDS: u64 = 10;

/// What can be measured alone.
const PARTS: [&str; 5] = ["many", "single", "peer", "after", "row"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let parts = arguments.get(2).map_or("", String::as_str);
    let wanted: Vec<&str> =
        if parts == "all" { PARTS.to_vec() } else { parts.split(',').collect() };
    let numbers = arguments.iter().enumerate().filter(|(i, _)| *i != 2).map(|(_, n)| n.parse());
    let numbers: Result<Vec<u64>, _> = numbers.collect();
    let known = wanted.iter().all(|part| PARTS.contains(part));
    let (Ok(numbers), true, true) = (numbers, known, arguments.len() > 2) else {
        eprintln!("usage: vm_scale MEMORY_MIB ROUNDS all|{} CHILDREN…", PARTS.join(","));
        std::process::exit(2);
    };
    let (memory_mib, rounds, counts) = (numbers[0], numbers[1], &numbers[2..]);
    let (slow_rounds, wants) = (rounds.min(SLOW_ROUNDS), |part| wanted.contains(&part));
    println!(
        "## Forks of a machine with a disk through the daemons: {memory_mib} MiB, all of it \
         written, 1 processor\n"
    );
    let _stores = host::stores();
    let mut aims = Aims::default();
    if wants("many") {
        many_children(memory_mib, counts, &mut aims);
    }
    let clock = Clock::start();
    let ours = wants("single").then(|| one_child(memory_mib, rounds, &clock, &mut aims));
    if wants("peer") {
        beside_qemu(memory_mib, slow_rounds, ours.as_ref());
    }
    if wants("after") {
        parent_after(memory_mib, slow_rounds, &clock);
    }
    if wants("row") {
        in_a_row(memory_mib, &mut aims);
    }
    aims.print();
}

fn one_child(memory_mib: u64, rounds: u64, clock: &Clock, aims: &mut Aims) -> Singles {
    let slow_rounds = rounds.min(SLOW_ROUNDS);
    println!(
        "\nOne child. The parent writes a block to its disk each millisecond and sleeps in \
         between, and so does the child. All but the pause is from the request on; \
         \"first cut\" is one fork of each of several parents. *It stood by*: the child was \
         connected to its disk before the request, as forkd does for a machine that was forked \
         before when there is time between two forks. *Warm pool*: nothing but a shell was ready; \
         *cold pool*: not even that.\n"
    );
    println!("| what, in ms | N | p50 | p90 | p99 |");
    println!("|---|---|---|---|---|");
    let first = singles::first_cuts(memory_mib, slow_rounds);
    aims.note("pause in ms, first cut, p50", first.at(50), Bound::Most(0.5));
    aims.note("pause in ms, first cut, p99", first.at(99), Bound::Most(3.0));
    let stood_by = singles::later_cuts(memory_mib, rounds, Ready::Children, clock);
    singles::later_cuts(memory_mib, rounds, Ready::Shells(POOL), clock);
    singles::later_cuts(memory_mib, slow_rounds, Ready::Shells(0), clock);
    aims.note("child runs in ms, it stood by, p50", stood_by.runs.at(50), Bound::Most(1.5));
    aims.note("child runs in ms, it stood by, p90", stood_by.runs.at(90), Bound::Most(5.0));
    stood_by
}

fn beside_qemu(memory_mib: u64, rounds: u64, ours: Option<&Singles>) {
    println!("\nThe same with QEMU:");
    match peer::measure(memory_mib, rounds) {
        Err(why) => println!("not measured, {why}."),
        Ok(Peer { pause, copy, runs, version: (major, minor), filled_mib }) => {
            println!(
                "version {major}.{minor}, `-accel tcg` (memory, files and processes are what is \
                 measured, not the speed of the guest), a Linux guest that has filled \
                 {filled_mib} MiB. Stop; overlays made before; device state to a file with \
                 `x-ignore-shared`; copy of the memory file in /dev/shm, which the parent goes on \
                 writing; go on; then a new process that maps the copy privately.\n"
            );
            println!("| what, in ms | N | p50 | p90 | p99 |");
            println!("|---|---|---|---|---|");
            pause.row("QEMU: pause of the parent");
            copy.row("… of which the copy of the memory");
            runs.row("QEMU: child runs");
            let Some(ours) = ours else { return };
            println!("\n| p50 in ms | offshoot | QEMU | ratio |");
            println!("|---|---|---|---|");
            for (what, ours, theirs) in
                [("pause", &ours.pause, &pause), ("child runs", &ours.runs, &runs)]
            {
                let (ours, theirs) = (ours.at(50), theirs.at(50));
                println!("| {what} | {ours:.2} | {theirs:.1} | {:.0} × |", theirs / ours);
            }
        }
    }
}

fn many_children(memory_mib: u64, counts: &[u64], aims: &mut Aims) {
    println!(
        "One fork into many, with as many shells ready. The parent sleeps, and so do the \
         children. Memory in MiB for each child, with the pool full again: *private* to its \
         process, its *proportional* share of all that it maps, and what the *host* has less, \
         with all that the kernel and the daemons keep for it. *Work*: each child rewrites 1 % of \
         its memory and {} blocks of its disk, 50 children at a time, and sleeps again.\n",
        many::BLOCKS
    );
    println!(
        "| children | pause, ms | all run, ms | durable, ms | … for each, ms | idle: private | \
         proportional | host | after work: private | proportional | host | work, s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for count in counts {
        let idle_mib = many::row(memory_mib, *count);
        let what = format!("proportional MiB of an idle child, {count} of them");
        aims.note(what, idle_mib, Bound::Most(2.0));
    }
}

fn parent_after(memory_mib: u64, rounds: u64, clock: &Clock) {
    println!(
        "\nA parent that writes a part of its memory again and again, as fast as it can: pages \
         written in the second after the request of a fork, compared with the second before, by \
         the guest's own clock.\n"
    );
    println!("| memory written | N | pages a µs before | after, % of before: p50 | least | most |");
    println!("|---|---|---|---|---|---|");
    slowdown::row(memory_mib, rounds, 10, true, clock);
    slowdown::row(memory_mib, rounds, 100, true, clock);
    slowdown::row(memory_mib, rounds, 100, false, clock);
}

fn in_a_row(memory_mib: u64, aims: &mut Aims) {
    println!(
        "\nForks in a row for {} s, or until there are {} children, of a parent that sleeps. None \
         is removed meanwhile; some are afterwards, one after the other, with the host as full.\n",
        rate::SPAN.as_secs(),
        rate::CHILDREN_MAX
    );
    println!("| children at once | made | made a second | removed a second, afterwards |");
    println!("|---|---|---|---|");
    for at_once in [1, 10] {
        let rate = rate::row(memory_mib, at_once);
        aims.note(format!("children a second, {at_once} at once"), rate, Bound::Least(200.0));
    }
}
