//! The panel: the only device of a payload guest, by which a test tells it what to do.
//!
//! A guest that goes on as a child keeps what it is doing; what its parent was told to do next
//! stays with the parent. The sequences are the guest's state and go on in the child where they
//! were: a reading that is done twice, or not at all, shows.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use forkd::memory::{Gpa, GuestRam, PAGE};
use forkd::wires::{Devices, Identity, Interrupt, IoBus, PowerSwitch, Wires};
use format::{Error, Kind, Result};
use parking_lot::{Condvar, Mutex};
use vhost_blk::event::EventFd;

/// Where the panel of the first processor is; each has a page.
const PANEL: u64 = 0xd000_0000;
const FAULT_PORT: u16 = 0x12;
const SEQUENCE_PORT: u16 = 0x120;
/// The interrupt line of the panel.
const LINE: u32 = 5;
/// The doorbell of the first processor's panel.
pub const DOORBELL_AT: Gpa = Gpa(PANEL + 0x50);
/// The value that rings it.
const DOORBELL_VALUE: u32 = 7;

#[derive(Debug, Default)]
struct Side {
    orders: VecDeque<[u64; 4]>,
    current: [u64; 4],
    answers: VecDeque<u64>,
}

#[derive(Debug, Default)]
struct State {
    sides: Vec<Side>,
    /// Read by memory, and by port.
    sequences: [u64; 2],
    identity: u64,
    complaint: Option<String>,
    /// Calls of quiesce less calls of resume.
    quiet: u32,
}

/// The panel of one guest.
pub struct Panel {
    state: Mutex<State>,
    answered: Condvar,
    line: OnceLock<Arc<dyn Interrupt>>,
    power: OnceLock<Arc<dyn PowerSwitch>>,
    bell: OnceLock<EventFd>,
    first_access: OnceLock<Instant>,
}

impl std::fmt::Debug for Panel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.state.lock().fmt(f)
    }
}

impl Panel {
    /// A panel for this many processors.
    #[must_use]
    pub fn new(cpus: u8) -> Arc<Panel> {
        let sides = (0..cpus).map(|_| Side::default()).collect();
        Arc::new(Panel {
            state: Mutex::new(State { sides, ..State::default() }),
            answered: Condvar::new(),
            line: OnceLock::new(),
            power: OnceLock::new(),
            bell: OnceLock::new(),
            first_access: OnceLock::new(),
        })
    }

    /// Connects it with its machine.
    ///
    /// # Errors
    /// What the machine says.
    pub fn wire(
        self: &Arc<Self>,
        _ram: &Arc<GuestRam>,
        wires: &dyn Wires,
    ) -> Result<Arc<dyn Devices>> {
        let once = || Error::invalid("the panel is wired already");
        self.line.set(wires.interrupt(LINE)?).map_err(|_| once())?;
        self.power.set(wires.power()).map_err(|_| once())?;
        let bell = wires.doorbell(DOORBELL_AT, Some(DOORBELL_VALUE))?;
        self.bell.set(bell).map_err(|_| once())?;
        Ok(Arc::<Panel>::clone(self))
    }

    /// Tells a processor what to do next.
    pub fn push(&self, cpu: usize, order: [u64; 4]) {
        self.state.lock().sides[cpu].orders.push_back(order);
    }

    /// Whether a processor has begun with everything it was told.
    #[must_use]
    pub fn is_taken(&self, cpu: usize) -> bool {
        self.state.lock().sides[cpu].orders.is_empty()
    }

    /// The next answer of a processor, if it comes within `time`.
    #[must_use]
    pub fn pop(&self, cpu: usize, time: Duration) -> Option<u64> {
        let mut state = self.state.lock();
        if state.sides[cpu].answers.is_empty() {
            self.answered.wait_for(&mut state, time);
        }
        state.sides[cpu].answers.pop_front()
    }

    /// What the guest complains of, if it does.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        self.state.lock().complaint.clone()
    }

    /// Raises the interrupt line once.
    ///
    /// # Panics
    /// When the panel is not wired.
    pub fn raise(&self) {
        self.line.get().expect("wired").raise().expect("an interrupt");
    }

    /// Whether the doorbell rang since the last call.
    ///
    /// # Panics
    /// When the panel is not wired.
    #[must_use]
    pub fn rang(&self) -> bool {
        self.bell.get().expect("wired").drain()
    }

    /// When the guest first came to the panel.
    #[must_use]
    pub fn first_access(&self) -> Option<Instant> {
        self.first_access.get().copied()
    }

    /// Whether devices stand.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.state.lock().quiet > 0
    }

    fn complain(&self, what: String) {
        self.state.lock().complaint.get_or_insert(what);
        self.answered.notify_all();
    }
}

impl IoBus for Panel {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port == SEQUENCE_PORT && data.len() == 4 {
            let mut state = self.state.lock();
            data.copy_from_slice(&state.sequences[1].to_le_bytes()[..4]);
            state.sequences[1] += 1;
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if port == FAULT_PORT {
            self.complain(format!("fault {data:?}"));
        }
    }

    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        self.first_access.get_or_init(Instant::now);
        let (cpu, register) = place_of(at);
        let mut state = self.state.lock();
        let state = &mut *state;
        let value = match (state.sides.get_mut(cpu), register) {
            (Some(side), 0x00) => {
                side.current = side.orders.pop_front().unwrap_or_default();
                side.current[0]
            }
            (Some(side), 0x08 | 0x10 | 0x18) => side.current[usize::from(register / 8)],
            (Some(_), 0x28) => {
                state.sequences[0] += 1;
                state.sequences[0] - 1
            }
            (Some(_), 0x48) => state.identity,
            _ => u64::MAX,
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        let (cpu, register) = place_of(at);
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match register {
            0x20 => {
                if let Some(side) = self.state.lock().sides.get_mut(cpu) {
                    side.answers.push_back(value);
                }
                self.answered.notify_all();
            }
            0x30 => self.complain(format!("{value:#x}")),
            0x38 => self.power.get().expect("wired").power_off(),
            0x40 => self.power.get().expect("wired").reset(),
            _ => self.complain(format!("a write of {value:#x} at {:#x}", at.0)),
        }
    }
}

fn place_of(at: Gpa) -> (usize, u16) {
    let offset = at.0.wrapping_sub(PANEL);
    let cpu = usize::try_from(offset / PAGE).unwrap_or(usize::MAX);
    (cpu, u16::try_from(offset % PAGE).expect("smaller than a page"))
}

impl Devices for Panel {
    fn bus(&self) -> &dyn IoBus {
        self
    }

    fn quiesce(&self) -> Result<()> {
        self.state.lock().quiet += 1;
        Ok(())
    }

    fn lends_memory(&self) -> bool {
        false
    }

    fn take_memory_back(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = self.state.lock();
        let words = state.sequences.iter().chain(state.sides.iter().flat_map(|s| &s.current));
        Ok(words.flat_map(|word| word.to_le_bytes()).collect())
    }

    fn restore(&self, saved: &[u8], identity: &Identity) -> Result<()> {
        let mut state = self.state.lock();
        let mut words =
            saved.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
        let mut next = || words.next().ok_or_else(|| Error::corrupt("the panel's state is short"));
        state.sequences = [next()?, next()?];
        for side in &mut state.sides {
            side.current = [next()?, next()?, next()?, next()?];
        }
        let id = identity.generation_id[..8].try_into().expect("8 bytes");
        state.identity = u64::from_le_bytes(id);
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.quiet = state.quiet.saturating_sub(1);
        Ok(())
    }

    fn press_power_button(&self) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "the panel has none"))
    }
}
