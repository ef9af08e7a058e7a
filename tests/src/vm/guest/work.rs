//! Work at a pace, and what its clock says of it.

use super::hardware::{
    LOCAL_APIC, clock, listen, load, print, print_number, put32, sleep, store, typed,
};
use super::virtio::Device;
use super::{DISK, DISK_LINE, DISK_QUEUE, FLUSH, GENERATION, GENERATION_LINE, Guest, PAGE, WAKE};

/// Pages that are written between two looks at the clock.
const BETWEEN_LOOKS: u64 = 16;
/// Notes that are kept.
const NOTES: usize = 1024;

/// How many pages were written at which time, and where the next note goes.
static mut NOTED: [(u64, u64); NOTES] = [(0, 0); NOTES];
static mut NEXT: usize = 0;

/// Has the local timer interrupt every `us` microseconds, or not at all for 0.
fn set_timer(us: u64) {
    // Undivided, it counts nanoseconds. Periodic.
    put32(LOCAL_APIC + 0x3e0, 0xb);
    put32(LOCAL_APIC + 0x320, 0x2_0000 | WAKE);
    put32(LOCAL_APIC + 0x380, (us * 1000) as u32);
}

impl Guest {
    /// Uses the disk as drivers of kernels do: what is written is durable when it is flushed, and
    /// the disk's interrupt is waited for.
    fn drive_disk(&mut self) {
        if let Some(disk) = &mut self.disk {
            *disk = Device::start(DISK, &raw mut DISK_QUEUE, FLUSH);
            disk.sleep_on(DISK_LINE, WAKE);
        }
    }

    /// Writes so many numbers, and gives back the last one.
    pub fn write_numbers(&mut self, count: u64) -> u64 {
        self.drive_disk();
        (0..count).for_each(|_| self.write_number());
        self.number
    }

    /// Writes a number every `us` microseconds, until something is typed, and sleeps in between.
    /// Who is woken as another machine notes when that was, and when its first number was written.
    pub fn write_log_slowly(&mut self, us: u64) {
        static NOTHING: u32 = 0;
        self.drive_disk();
        listen(GENERATION_LINE, WAKE);
        set_timer(us);
        while !typed() {
            sleep(&raw const NOTHING, 0);
            let forked = load(GENERATION) != self.generation;
            if forked {
                self.generation = load(GENERATION);
                self.forked[0] = clock();
            }
            self.write_number();
            if forked {
                self.forked[1] = clock();
            }
        }
        set_timer(0);
    }

    /// Reads from the disk until something is typed: see [`read_disk`].
    pub fn read_disk(&mut self, at: u64, groups: u64, blocks: u64) -> u64 {
        print("= reading\n");
        self.disk.as_mut().map_or(0, |disk| read_disk(disk, at, groups, blocks))
    }

    /// Reads `pages` pages of the disk into memory, again and again, until something is typed. Each
    /// page of memory is written before it is read into, and each of the disk has its number in
    /// every word. Tells how often it read, and how many words were or are not what was read.
    pub fn read_into_memory(&mut self, first: u64, pages: u64) {
        let (mut read, mut wrong) = (0, 0);
        while !typed() {
            let page = read % pages;
            let at = first + page * PAGE;
            (0..PAGE / 8).for_each(|word| store(at + word * 8, u64::MAX));
            if let Some(disk) = &mut self.disk {
                disk.page(page * 8, at);
            }
            wrong += wrong_words(at, page);
            read += 1;
        }
        // What was read once is there for good.
        (0..pages.min(read)).for_each(|page| wrong += wrong_words(first + page * PAGE, page));
        print("= read ");
        print_number(read);
        print(" wrong ");
        print_number(wrong);
        print("\n");
    }

    /// Tells the clock, and what it was at the last fork.
    pub fn tell_clock(&self) {
        print("= clock");
        for ticks in [clock(), self.forked[0], self.forked[1]] {
            print(" ");
            print_number(ticks);
        }
        print("\n");
    }
}

/// Pages of one request of [`read_disk`].
const READ_PAGES: u64 = 16;
/// Pages in which [`read_disk`] counts.
const COUNTED_PAGES: u64 = 64;

/// Reads blocks of a disk that has so many to the groups of 16 pages behind the one at `at`,
/// until something is typed; gives back how many requests that were. The page at `at` has two words
/// for each group: one more than the first block that was asked for, and the same when it is there.
/// While the disk works it counts in 64 pages behind the groups: in the first word of each page,
/// and mixed with the page in the last one.
fn read_disk(disk: &mut Device, at: u64, groups: u64, blocks: u64) -> u64 {
    let (mut x, mut requests, mut count) = (1u64, 0, 0u64);
    let counted = at + PAGE + groups * READ_PAGES * PAGE;
    while !typed() {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (group, block) = ((x >> 33) % groups, (x >> 13) % (blocks / READ_PAGES) * READ_PAGES);
        let to = at + PAGE + group * READ_PAGES * PAGE;
        store(at + group * 16, block + 1);
        disk.begin_read(block * 8, to, READ_PAGES * PAGE);
        while !disk.is_done() {
            count += 1;
            let page = counted + count % COUNTED_PAGES * PAGE;
            store(page, count);
            store(page + PAGE - 8, count ^ page);
        }
        disk.check_disk();
        store(at + group * 16 + 8, block + 1);
        requests += 1;
    }
    requests
}

/// Words of a page that are not its number.
fn wrong_words(at: u64, number: u64) -> u64 {
    (0..PAGE / 8).filter(|word| load(at + word * 8) != number).count() as u64
}

fn note(at: u64, written: u64) {
    // SAFETY: this program has one thread, and no interrupt handler touches the notes.
    unsafe {
        NOTED[NEXT % NOTES] = (at, written);
        NEXT += 1;
    }
}

/// Writes `pages` pages from `first` on, again and again, until something is typed; gives back how
/// many it wrote. Notes the number every `ticks`.
pub fn write_memory(first: u64, pages: u64, ticks: u64) -> u64 {
    let (mut written, mut last) = (0, clock());
    note(last, 0);
    loop {
        for _ in 0..BETWEEN_LOOKS {
            store(first + written % pages * PAGE, written);
            written += 1;
        }
        let now = clock();
        if now - last >= ticks {
            note(now, written);
            last = now;
            if typed() {
                return written;
            }
        }
    }
}

/// Pages written between two times, both between the first note that is kept and the last.
pub fn pages_written(from: u64, to: u64) -> u64 {
    written_at(to) - written_at(from)
}

fn written_at(time: u64) -> u64 {
    // SAFETY: as in `note`.
    let next = unsafe { NEXT };
    let mut i = next.saturating_sub(NOTES);
    while i + 1 < next {
        // SAFETY: as in `note`.
        let (before, after) = unsafe { (NOTED[i % NOTES], NOTED[(i + 1) % NOTES]) };
        if before.0 <= time && time < after.0 {
            let part = (after.1 - before.1) * (time - before.0) / (after.0 - before.0);
            return before.1 + part;
        }
        i += 1;
    }
    0
}
