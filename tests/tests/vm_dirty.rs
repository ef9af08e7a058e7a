//! Whoever wrote a page, the next image has it: the guest's processors, whose writes KVM logs, and
//! devices, whose writes it does not see. Among the latter is everything that is read from a disk:
//! blockd delivers it to the arena, and forkd to the guest's pages. (What a migration copies.)

use std::sync::Arc;
use std::time::Duration;

use forkd::boot::linux::LinuxBoot;
use forkd::devices::{DeviceConfig, DeviceSet};
use forkd::machine::{Machine, SizeClass};
use forkd::memory::{Gpa, PAGE};
use forkd::wires::NoDisks;
use offshoot_tests::payload::available;
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::vm::{Console, GUEST, memory_of};
use offshoot_tests::vmdriver::one_disk;

const MEMORY: usize = 16 << 20;
/// Where the guest reads to: see `read_disk` in `src/vm/guest/work.rs`.
const AT: usize = 8 << 20;
const GROUPS: usize = 48;
const GROUP_PAGES: usize = 16;
const COUNTED_PAGES: u64 = 64;
/// Blocks of the disk that hold something.
const BLOCKS: usize = 2048;
const SIZE: usize = 4096;

/// What the disk holds: no two blocks begin alike.
fn content(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..BLOCKS * SIZE / 8).flat_map(|_| rng.any().to_le_bytes()).collect()
}

fn word(memory: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(memory[at..at + 8].try_into().unwrap())
}

/// What was found in an image.
#[derive(Default)]
struct Found {
    /// For each group, the block that it has; one more than that.
    has: Vec<u64>,
    /// Groups whose block had been asked for and was not noted yet.
    on_their_way: usize,
}

/// Compares every page of an image, from [`AT`] on, with what the guest and the disk say.
fn look_at(memory: &[u8], disk: &[u8], what: &str) -> Found {
    let mut found = Found::default();
    for group in 0..GROUPS {
        let [asked, noted] = [0, 8].map(|part| word(memory, AT + group * 16 + part));
        let at = AT + SIZE + group * GROUP_PAGES * SIZE;
        let pages = &memory[at..at + GROUP_PAGES * SIZE];
        // A request is done as a whole before a machine is taken, or not begun.
        let is = |block: u64| match usize::try_from(block) {
            Ok(0) => pages.iter().all(|byte| *byte == 0),
            Ok(n) => *pages == disk[(n - 1) * SIZE..][..pages.len()],
            Err(_) => false,
        };
        let now = if is(asked) { asked } else { noted };
        assert!(is(now), "{what}: group {group}, asked for {asked}, got {noted}, has neither");
        found.on_their_way += usize::from(asked != noted);
        found.has.push(now);
    }
    let counted = AT + SIZE + GROUPS * GROUP_PAGES * SIZE;
    check_counts(memory, counted, what);
    let log_end = AT + GROUPS * 16;
    let rest = counted + usize::try_from(COUNTED_PAGES).unwrap() * SIZE;
    let zero = |from: usize, to: usize| memory[from..to].iter().all(|byte| *byte == 0);
    assert!(zero(log_end, AT + SIZE) && zero(rest, MEMORY), "{what}: something is where none was");
    found
}

/// Every page in which the guest counts has the last number that goes there; the newest may be
/// half written.
fn check_counts(memory: &[u8], counted: usize, what: &str) {
    let place = |page: u64| counted + usize::try_from(page * PAGE).unwrap();
    let newest = (0..COUNTED_PAGES).map(|page| word(memory, place(page))).max().unwrap();
    for page in 0..COUNTED_PAGES {
        let back = (newest + COUNTED_PAGES - page) % COUNTED_PAGES;
        let expected = newest.saturating_sub(back);
        let at = place(page);
        // As the guest mixes it, and 0 where it has not been.
        let mixed = |number: u64| if number == 0 { 0 } else { number ^ at as u64 };
        let (first, last) = (word(memory, at), word(memory, at + SIZE - 8));
        let half = back == 0 && last == mixed(expected.saturating_sub(COUNTED_PAGES));
        assert!(
            first == expected && (last == mixed(expected) || half),
            "{what}: counted page {page} has {first} and {last}, the newest is {newest}"
        );
    }
}

fn machine(disk: &ServedDisk) -> (Machine, Console) {
    let console = disk.path("console.sock");
    let config = DeviceConfig { console: Some(console.clone()), ..one_disk(&disk.socket()) };
    let kernel = disk.path("kernel");
    std::fs::write(&kernel, GUEST).unwrap();
    let virtio_devices = config.virtio_devices();
    let boot = LinuxBoot { kernel, initramfs: None, command_line: String::new(), virtio_devices };
    let size = SizeClass { memory_bytes: MEMORY as u64, vcpus: 1 };
    let mut machine = Machine::shell(&size).expect("a shell");
    machine
        .boot_with(&boot, &mut |ram, wires| Ok(Arc::new(DeviceSet::new(&config, ram, wires)?)))
        .expect("the guest boots");
    machine.resume().expect("the guest runs");
    let mut console = Console::attach(&console, "reader");
    assert_eq!(console.hear("= "), "= ready");
    assert_eq!(console.ask(&format!("q {AT} {GROUPS} {BLOCKS}")), "reading");
    (machine, console)
}

/// A guest reads from its disk to pages that it does not touch itself, and writes to others
/// meanwhile. It is cut again and again, running, and now and then standing: then all of the image
/// is compared with all of memory as well.
#[test]
fn what_processors_and_devices_write_is_in_every_image() {
    let test = "vm_dirty::what_processors_and_devices_write_is_in_every_image";
    if !available(test) {
        return;
    }
    let seed = seed(0xd127);
    eprintln!("to repeat: OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test vm_dirty");
    let mut rng = Rng::new(seed);
    let disk = ServedDisk::new(TestStore::new());
    let content = content(seed);
    disk.write("vm", 0, &content);
    let _daemon = disk.daemon();
    disk.attach();
    let (machines, cuts) = if soak() { (20, 100) } else { (3, 16) };
    let (mut on_their_way, mut changed) = (0, 0);
    for _ in 0..machines {
        let (machine, mut console) = machine(&disk);
        let mut before: Option<Vec<u64>> = None;
        for cut in 0..cuts {
            std::thread::sleep(Duration::from_micros(rng.below(6000)));
            let stands = rng.one_in(4);
            if stands {
                machine.pause().expect("it pauses");
            }
            let image = machine.cut(&mut NoDisks).expect("it is cut");
            let what = format!("seed {seed}, cut {cut}, {} layers", image.layers.len());
            let memory = memory_of(&image, MEMORY);
            if stands {
                let mut own = vec![0; MEMORY];
                machine.ram().read(Gpa(0), &mut own).expect("all of memory");
                let differs = (0..MEMORY / SIZE)
                    .find(|page| own[page * SIZE..][..SIZE] != memory[page * SIZE..][..SIZE]);
                assert_eq!(differs, None, "{what}: a page of the image is another one's");
                machine.resume().expect("it goes on");
            }
            let found = look_at(&memory, &content, &what);
            on_their_way += found.on_their_way;
            changed +=
                before.map_or(0, |b| b.iter().zip(&found.has).filter(|(a, b)| a != b).count());
            before = Some(found.has);
        }
        // What is typed ends it.
        console.say("");
        assert_ne!(console.hear("= "), "= 0", "the guest has read nothing");
    }
    println!("{changed} groups read anew between cuts, {on_their_way} while one was made");
    assert!(changed > 0 && on_their_way > 0, "no read was near a cut");
}
