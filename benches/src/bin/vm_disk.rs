//! What the path of a disk costs, through an arena and direct: vm_disk ROUNDS
//!
//! Prints one section of Markdown. Random reads of 4 KiB by a driver that lives in this process and
//! plays the guest over forkd's device, so that nothing of a processor's emulation is in the
//! figures; and reads of a payload guest under KVM. The store is in memory (`/dev/shm`): a device
//! would hide what is compared. Both paths take turns.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use forkd::devices::DiskPath;
use offshoot_benches::Random;
use offshoot_benches::figures::Figures;
use offshoot_tests::daemon::Daemon;
use offshoot_tests::store::TestStore;
use offshoot_tests::vm::{Lab, word};
use offshoot_tests::vmdriver::{Ask, Driver, LEN_MAX, Rig, line, one_disk_by};

/// Bytes of the disk.
const SIZE: u64 = 32 << 20;
const BLOCK: u64 = 4096;
/// How long each figure is measured.
const SPAN: Duration = Duration::from_secs(1);
/// All features but the event index, which the driver here does not keep.
const FEATURES: u64 = !(1 << 29);
const PATHS: [(DiskPath, &str); 2] = [(DiskPath::Arena, "arena"), (DiskPath::Direct, "direct")];

/// What one round showed.
#[derive(Clone, Copy)]
struct Round {
    requests: u64,
    seconds: f64,
    /// Processor time of this process, the driver's included, and of blockd, in seconds.
    cpu: (f64, f64),
}

fn main() {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse::<usize>().ok());
    let Some(rounds) = rounds.filter(|n| *n > 0) else {
        eprintln!("usage: vm_disk ROUNDS");
        std::process::exit(2);
    };
    println!("## The path of a disk: through an arena, and direct\n");
    println!(
        "Random reads of 4 KiB of a disk of 32 MiB that is all written, in a store in memory. A \
         driver in forkd's place of a guest sleeps until the interrupt, and announces requests \
         when blockd or forkd asks for it, as a kernel does. {rounds} rounds of a second each, \
         paths in turns; medians. Processor time: of the driver and forkd's device together, and \
         of blockd.\n"
    );
    println!("| depth | path | reads/s | µs a read | driver and forkd, µs | blockd, µs |");
    println!("|---|---|---|---|---|---|");
    let store = TestStore::at(PathBuf::from(format!("/dev/shm/vm_disk-{}", std::process::id())));
    let daemon = filled(&store);
    for depth in [1, 4, 32] {
        device_rows(&store, &daemon, depth, rounds);
    }
    drop(daemon);
    let _ = std::fs::remove_dir_all(store.store());
    guest_rows(rounds);
}

/// A daemon that serves a disk that is all written, for each path at a socket of its own.
fn filled(store: &TestStore) -> Daemon {
    let file = store.path("filled.raw");
    let bytes: Vec<u8> = (0..SIZE / 8).flat_map(|n| (n + 1).to_le_bytes()).collect();
    std::fs::write(&file, bytes).expect("an image");
    store.done(&["disk", "import", file.to_str().expect("a path"), "vm"]);
    std::fs::remove_file(&file).expect("it is there");
    let daemon = store.daemon();
    let socket = store.path("vm.sock");
    store.done(&["disk", "attach", "vm", "--socket", socket.to_str().expect("a path")]);
    daemon
}

fn device_rows(store: &TestStore, daemon: &Daemon, depth: usize, rounds: usize) {
    let mut seen: [Vec<Round>; 2] = Default::default();
    for _ in 0..rounds {
        for (seen, (path, _)) in seen.iter_mut().zip(PATHS) {
            // One at a time: blockd runs the rings of one front end.
            let rig = Rig::new(&one_disk_by(path, &store.path("vm.sock")));
            seen.push(read(&rig, daemon, depth));
        }
    }
    for (rounds, (_, name)) in seen.iter().zip(PATHS) {
        let of = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure));
        let reads = of(|r| r.requests as f64 / r.seconds);
        println!(
            "| {depth} | {name} | {reads:.0} | {:.1} | {:.1} | {:.1} |",
            1e6 / reads,
            of(|r| r.cpu.0 / r.requests as f64 * 1e6),
            of(|r| r.cpu.1 / r.requests as f64 * 1e6),
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut figures = Figures::default();
    values.for_each(|value| figures.add(value));
    figures.at(50)
}

/// Keeps `depth` reads in work for a while.
fn read(rig: &Rig, daemon: &Daemon, depth: usize) -> Round {
    const { assert!(BLOCK <= LEN_MAX) };
    let mut driver = Driver::new(rig, FEATURES);
    let (interrupt, room) = (line(rig), vec![0; usize::try_from(BLOCK).expect("a block")]);
    let mut random = Random(0x5eed);
    let mut begin = |driver: &mut Driver| {
        driver.submit(rig, Ask::Read, random.below(SIZE / BLOCK) * BLOCK, &room);
    };
    (0..depth).for_each(|_| begin(&mut driver));
    driver.kick(rig);
    let mut done = 0;
    let mut measured = None;
    let start = Instant::now();
    loop {
        while let Some((_, status)) = driver.poll(rig) {
            assert_eq!(status, 0);
            done += 1;
            begin(&mut driver);
        }
        driver.kick_if_wanted(rig);
        // The first fifth is for warming up.
        if measured.is_none() && start.elapsed() > SPAN / 5 {
            measured =
                Some((Instant::now(), done, cpu_of(std::process::id()), cpu_of(daemon.pid())));
        }
        if let Some((since, before, ours, theirs)) = measured
            && since.elapsed() >= SPAN
        {
            let cpu = (cpu_of(std::process::id()) - ours, cpu_of(daemon.pid()) - theirs);
            return Round { requests: done - before, seconds: since.elapsed().as_secs_f64(), cpu };
        }
        interrupt.wait(Duration::from_millis(100));
    }
}

/// Seconds of processor time that a process had.
fn cpu_of(pid: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
    // Nanoseconds on a processor are the first number.
    let of = |task: std::fs::DirEntry| -> Option<u64> {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse().ok()
    };
    tasks.filter_map(of).sum::<u64>() as f64 / 1e9
}

/// A payload guest reads pages of its disk into its memory, one after the other, and looks at the
/// ring until each is done.
fn guest_rows(rounds: usize) {
    println!(
        "\nThe same from a payload guest under KVM (`vm run --disk NAME` and `NAME:direct`), one \
         read at a time, each of which it checks, with its processor busy all the time:\n"
    );
    let Some(lab) = Lab::new("vm_disk") else { return println!("not measured, there is no KVM.") };
    let file = lab.store.path("numbers.raw");
    let page = |number: u64| number.to_le_bytes().repeat(512);
    std::fs::write(&file, (0..4096).flat_map(page).collect::<Vec<u8>>()).expect("an image");
    let mut seen: [Vec<f64>; 2] = Default::default();
    for (i, (_, name)) in PATHS.iter().enumerate() {
        lab.done(&["disk", "import", file.to_str().expect("a path"), name]);
        let disk = if i == 0 { (*name).to_owned() } else { format!("{name}:direct") };
        lab.run(name, &[&disk]);
    }
    for _ in 0..rounds {
        for (seen, (_, name)) in seen.iter_mut().zip(PATHS) {
            let mut console = lab.console(name);
            console.say("l 8388608 512");
            console.hear("= reading");
            let start = Instant::now();
            std::thread::sleep(SPAN);
            console.say("");
            let told = console.hear("= read ");
            assert_eq!(word(&told, "wrong"), "0", "{told}");
            let reads: f64 = word(&told, "read").parse().expect("a number");
            seen.push(reads / start.elapsed().as_secs_f64());
        }
    }
    println!("| path | reads/s | µs a read |");
    println!("|---|---|---|");
    for (rates, (_, name)) in seen.iter().zip(PATHS) {
        let rate = median(rates.iter().copied());
        println!("| {name} | {rate:.0} | {:.1} |", 1e6 / rate);
    }
}
