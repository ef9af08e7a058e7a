//! The clock of the processor, on which guest and host agree.
//!
//! A guest reads it at the instant that is asked for, and says later what it read: nothing of the
//! host has to watch. Where a guest's clock is the host's own, as it is when KVM passes it through,
//! nothing is added. Elsewhere the difference is taken from the shortest of some exchanges, and is
//! wrong by half of its time at most.

use std::time::{Duration, Instant};

use offshoot_tests::vm::Console;

/// Exchanges from which the difference of two clocks is taken.
const EXCHANGES: usize = 5;

/// The clock, and how fast it goes.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    began: (Instant, u64),
}

/// What a guest says of its clock.
pub struct GuestClock {
    /// What to add to a reading of the guest to have one of the host.
    offset: i64,
    /// When the guest last found itself another machine, by its clock; 0 for never.
    woke: u64,
    /// When the first number that it wrote after that was on its disk.
    wrote: u64,
}

/// The clock now.
pub fn now() -> u64 {
    // SAFETY: every processor that this program is made for has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

impl Clock {
    /// Begins to measure how fast it goes, for long enough.
    pub fn start() -> Clock {
        let clock = Clock { began: (Instant::now(), now()) };
        std::thread::sleep(Duration::from_millis(200));
        clock
    }

    /// Ticks of so much time.
    pub fn ticks(&self, time: Duration) -> u64 {
        let ticks = u128::from(now() - self.began.1) * time.as_nanos();
        u64::try_from(ticks / self.began.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Milliseconds from one reading to a later one.
    pub fn between(&self, from: u64, to: u64) -> f64 {
        (to as f64 - from as f64) / self.ticks(Duration::from_millis(1)) as f64
    }
}

impl GuestClock {
    /// Asks a guest, which stops what it did.
    pub fn ask(console: &mut Console) -> GuestClock {
        let exchange = |_| {
            let before = now();
            console.say("k");
            let line = console.hear("= clock");
            let after = now();
            let numbers = line.split(' ').skip(2).map(|n| n.parse().expect("a number"));
            (before, after, numbers.collect::<Vec<u64>>())
        };
        let exchanges: Vec<_> = (0..EXCHANGES).map(exchange).collect();
        let same = exchanges.iter().all(|(from, to, told)| (*from..=*to).contains(&told[0]));
        let best = exchanges.iter().min_by_key(|(from, to, _)| to - from).expect("some");
        let middle = best.0.midpoint(best.1);
        let offset = if same { 0 } else { middle.wrapping_sub(best.2[0]).cast_signed() };
        GuestClock { offset, woke: best.2[1], wrote: best.2[2] }
    }

    /// A reading of the host's clock, as the guest would have read it.
    pub fn of_guest(&self, host: u64) -> u64 {
        host.wrapping_add_signed(-self.offset)
    }

    /// When it woke as another machine, and had written its first number, by the host's clock.
    pub fn fork(&self) -> Option<(u64, u64)> {
        let host = |guest: u64| guest.wrapping_add_signed(self.offset);
        (self.woke != 0 && self.wrote != 0).then(|| (host(self.woke), host(self.wrote)))
    }
}
