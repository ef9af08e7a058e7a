//! Guests for tests of virtual machines: a small program that does what its panel says.
//!
//! The program (`guest/main.rs`) runs in ring 3 of long mode, in 4 GiB of identity-mapped memory.
//! It needs no disk and no kernel, so a fork takes milliseconds and every byte of it is known.

pub mod checks;
mod loader;
mod panel;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd::machine::{Exit, Image, Machine, SizeClass};
use forkd::memory::{Gpa, PAGE};
use forkd::wires::{Devices, DiskCut, Identity, NoDisks};
use format::Result;
use uuid::Uuid;

pub use loader::{GATES, HEAP, Payload};
pub use panel::{DOORBELL_AT, Panel};

/// How long an answer of a guest may take.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// What the program can be told to do. The arguments are in `guest/main.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Op {
    /// Address, pages, value: writes `value + i` into page `i`.
    Fill = 1,
    /// Address, pages: a sum over all pages.
    Sum = 2,
    /// Address, pages, stop: counts in every page until the word at `stop` is not zero.
    Write = 3,
    /// Count, by port: follows the sequence of the panel.
    Follow = 4,
    /// Rounds of arithmetic in general and vector registers.
    Spin = 5,
    /// Counts between two ticks of the local timer.
    StartTimer = 6,
    /// Sleeps until there were this many ticks.
    WaitTicks = 7,
    /// Opens an interrupt line.
    OpenLine = 8,
    /// Sleeps until there were this many interrupts of lines.
    WaitLines = 9,
    /// How many interrupts of lines there were.
    Lines = 10,
    /// The first 8 bytes of the generation id.
    Identity = 11,
    /// Address and words of the interrupt table: wipes it and faults.
    TripleFault = 12,
    /// Turns the machine off.
    PowerOff = 13,
    /// Resets the machine.
    Reset = 14,
    /// Rings the doorbell with this value.
    Ring = 15,
    /// Rounds, start: a sum over all registers after that many rounds of work in them.
    Live = 16,
    /// Address, pages, rounds: changes words that the words before decide; a sum of them.
    Churn = 17,
    /// Vector, one of 0, 6, 13 and 14: does what raises it.
    Fault = 18,
    /// Leaf, part, register: what the processor says about itself.
    Processor = 19,
    /// The time stamp counter.
    Time = 20,
}

/// A machine with the program in it, and its panel.
#[derive(Debug)]
pub struct Guest {
    /// The machine.
    pub machine: Machine,
    /// Its only device.
    pub panel: Arc<Panel>,
}

/// True when there is a KVM to run guests; else the test is counted as skipped.
#[must_use]
pub fn available(test: &str) -> bool {
    if !Path::new("/dev/kvm").exists() {
        crate::skip(test, "this machine has no /dev/kvm");
        return false;
    }
    true
}

/// An identity that `n` decides.
#[must_use]
pub fn identity(n: u8) -> Identity {
    Identity {
        name: format!("guest{n}"),
        id: Uuid::from_bytes([n; 16]),
        generation_id: [n; 16],
        seed: [n; 32],
        mac: [2, 0, 0, 0, 0, n],
    }
}

impl Guest {
    /// A guest that stands at its first instruction.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(memory_bytes: u64, vcpus: u8) -> Guest {
        let mut machine = Machine::shell(&SizeClass { memory_bytes, vcpus }).expect("a shell");
        let panel = Panel::new(vcpus);
        let made = Arc::clone(&panel);
        machine
            .boot_with(&Payload, &mut |ram, wires| made.wire(ram, wires))
            .expect("the payload boots");
        Guest { machine, panel }
    }

    /// A guest that runs.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn start(memory_bytes: u64, vcpus: u8) -> Guest {
        let guest = Guest::new(memory_bytes, vcpus);
        guest.machine.resume().expect("the guest runs");
        guest
    }

    /// A child of `image`, standing.
    ///
    /// # Errors
    /// What the machine says.
    pub fn child(image: &Image, class: SizeClass, identity: &Identity) -> Result<Guest> {
        Guest::child_in(Machine::shell(&class)?, image, identity)
    }

    /// A child of `image` in a shell that is there already, standing.
    ///
    /// # Errors
    /// What the machine says.
    pub fn child_in(mut machine: Machine, image: &Image, identity: &Identity) -> Result<Guest> {
        let panel = Panel::new(machine.class().vcpus);
        let made = Arc::clone(&panel);
        machine.become_with(image, identity, &mut |ram, wires| made.wire(ram, wires))?;
        Ok(Guest { machine, panel })
    }

    /// What the machine was made for.
    #[must_use]
    pub fn class(&self) -> SizeClass {
        self.machine.class()
    }

    /// Takes the guest at one instant.
    ///
    /// # Panics
    /// When it cannot be taken.
    #[must_use]
    pub fn cut(&self) -> Image {
        self.cut_with(&mut NoDisks).expect("the guest is cut")
    }

    /// Takes the guest at one instant.
    ///
    /// # Errors
    /// What the machine says.
    pub fn cut_with(&self, disks: &mut dyn DiskCut) -> Result<Image> {
        self.machine.cut(disks)
    }

    /// A child of this guest, standing.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn fork(&self, n: u8) -> Guest {
        Guest::child(&self.cut(), self.class(), &identity(n)).expect("a child")
    }

    /// Tells processor `cpu` to do something, and waits until it has begun.
    ///
    /// # Panics
    /// When it does not begin.
    pub fn tell(&self, cpu: usize, op: Op, arguments: [u64; 3]) {
        self.panel.push(cpu, [op as u64, arguments[0], arguments[1], arguments[2]]);
        crate::until("the order is taken", || {
            // Looked at first: what is taken may be the order to end.
            let trouble = self.trouble();
            let taken = self.panel.is_taken(cpu);
            assert!(taken || trouble.is_none(), "{}", trouble.unwrap_or_default());
            taken
        });
    }

    fn trouble(&self) -> Option<String> {
        let complaint = self.panel.complaint().map(|c| format!("the guest complains: {c}"));
        complaint.or_else(|| self.machine.exit().map(|exit| format!("the guest ended: {exit}")))
    }

    /// The next answer of processor `cpu`.
    ///
    /// # Panics
    /// When there is none: the guest ended, complains, or takes too long.
    pub fn answer(&self, cpu: usize) -> u64 {
        let until = Instant::now() + ANSWER_MAX;
        loop {
            if let Some(answer) = self.panel.pop(cpu, Duration::from_millis(20)) {
                return answer;
            }
            if let Some(trouble) = self.trouble() {
                panic!("{trouble}");
            }
            assert!(Instant::now() < until, "processor {cpu} does not answer");
        }
    }

    /// Tells the first processor to do something and waits for its answer.
    ///
    /// # Panics
    /// As [`Guest::answer`].
    pub fn ask(&self, op: Op, arguments: [u64; 3]) -> u64 {
        self.tell(0, op, arguments);
        self.answer(0)
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When it does not come.
    #[must_use]
    pub fn ended(&self) -> Exit {
        self.machine.wait_for(ANSWER_MAX).expect("the guest ends")
    }

    /// A word of memory.
    ///
    /// # Panics
    /// When the address is not in memory.
    #[must_use]
    pub fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.machine.ram().read(Gpa(at), &mut bytes).expect("an address of RAM");
        u64::from_le_bytes(bytes)
    }

    /// Writes a word of memory, as a device does.
    ///
    /// # Panics
    /// When the address is not in memory.
    pub fn set_word(&self, at: u64, value: u64) {
        self.machine.ram().write(Gpa(at), &value.to_le_bytes()).expect("an address of RAM");
    }

    /// All of memory.
    ///
    /// # Panics
    /// Never: RAM is readable.
    #[must_use]
    pub fn memory(&self) -> Vec<u8> {
        let ram = self.machine.ram();
        let mut all = vec![0; usize::try_from(ram.size()).expect("64 bits")];
        for bank in ram.banks() {
            let from = usize::try_from(bank.offset).expect("64 bits");
            let part = &mut all[from..from + usize::try_from(bank.len).expect("64 bits")];
            ram.read(bank.start, part).expect("RAM is readable");
        }
        all
    }

    /// Pages from [`HEAP`] to the end of memory.
    #[must_use]
    pub fn heap_pages(&self) -> u64 {
        (self.machine.ram().size() - HEAP) / PAGE
    }
}

/// Something that is done in the middle of a cut, in place of disks.
pub struct InPause<'a> {
    /// Before the state is saved, with no request in flight.
    pub before: &'a mut dyn FnMut(),
    /// After state and memory were taken.
    pub after: &'a mut dyn FnMut() -> Result<()>,
}

impl DiskCut for InPause<'_> {
    fn begin(&mut self) -> Result<()> {
        (self.before)();
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        (self.after)()
    }
}

/// The panel as devices, for whoever makes a machine by hand.
#[must_use]
pub fn devices_of(panel: &Arc<Panel>) -> Arc<dyn Devices> {
    Arc::<Panel>::clone(panel)
}
