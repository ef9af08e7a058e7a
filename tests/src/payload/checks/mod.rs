//! What payload guests show, as functions, so that it can be shown under every KVM there is.
//!
//! A check panics when something is wrong. What it returns has no part of the time that things
//! took: the same program comes to the same [`Seen`] on every machine, however forks and guests
//! raced. Tests call checks in full length; [`ALL`] has them in a length that an emulated
//! processor can do as well, for the program `lab_payload`.

mod ends;
mod exact;
mod memory;
mod state;

use std::fmt;
use std::time::Duration;

pub use ends::{every_end, faults};
pub use exact::EXACT;
pub use memory::{apart, generations, one_instant, processors};
pub use state::{
    Forks, accesses, altered, child_of, doorbells, identities, interrupts, saved_twice, ticks, work,
};

use super::Op;

const MIB: u64 = 1 << 20;
/// How long a worker of KVM may take to deliver an interrupt where everything is emulated.
const SETTLE: Duration = Duration::from_millis(300);
/// Forks of a guest that works.
const FORKS: Forks = Forks { most: 3, every_ms: 6 };

/// A sum of what a check saw.
#[derive(Debug, Default)]
pub struct Seen(blake3::Hasher);

impl Seen {
    /// Adds a number.
    pub fn word(&mut self, word: u64) {
        self.0.update(&word.to_le_bytes());
    }

    /// Adds a text.
    pub fn text(&mut self, text: &str) {
        self.word(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    /// Adds bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        self.0.update(bytes);
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.finalize().to_hex()[..16])
    }
}

/// A check and its name.
pub type Check = (&'static str, fn() -> Seen);

/// All checks that come to the same under every KVM, with small guests and in few rounds.
pub const ALL: [Check; 15] = [
    ("one-instant", || one_instant(0x5eed_1ab0, 4 * MIB, 10)),
    ("apart", || apart(3 * MIB)),
    ("generations", || generations(4 * MIB, 5)),
    ("processors", || processors(4 * MIB, 2)),
    ("registers", || work(Op::Live, [3_000_000, 0x5eed_1ab1, 0], FORKS)),
    ("memory", || work(Op::Churn, [super::HEAP, 128, 3_000_000], FORKS)),
    ("accesses-by-memory", || accesses(0, 1500, FORKS)),
    ("accesses-by-port", || accesses(1, 1500, FORKS)),
    ("interrupts", || interrupts(2, SETTLE)),
    ("ticks", || ticks(2, 200)),
    ("doorbells", doorbells),
    ("identities", identities),
    ("saved-twice", || saved_twice(&[1, 2])),
    ("ends", || every_end(|_| ())),
    ("faults", faults),
];
