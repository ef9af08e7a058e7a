//! Small seeded random numbers: the same seed gives the same run, on every machine.

/// A generator (splitmix64). Not for anything secret.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator that `seed` decides.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Rng(seed ^ 0x5bf0_3635_dcf9_8a6d)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.any() % end
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The seed of a random test: what `OFFSHOOT_SEED` says, else `default`. Tests print it, with the
/// command that repeats the run.
///
/// # Panics
/// When the variable is set and is not a number.
#[must_use]
pub fn seed(default: u64) -> u64 {
    match std::env::var("OFFSHOOT_SEED") {
        Ok(text) => text.parse().expect("OFFSHOOT_SEED is a number"),
        Err(_) => default,
    }
}

/// True for the long variants of tests: `OFFSHOOT_SOAK` is set.
#[must_use]
pub fn soak() -> bool {
    std::env::var_os("OFFSHOOT_SOAK").is_some()
}
