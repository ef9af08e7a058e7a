//! Faults on demand. Every choice depends on the rules and on the calls made, never on time or
//! addresses, so a run with the same calls meets the same faults.
//!
//! What a fault does to the file is the worst that the [`super::super::File`] contract leaves open:
//! a write that fails has written the first half of its sectors; a sync that fails loses what it
//! covered.

use std::fmt;

/// A fault and, by its name, the call it befalls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A read fails with `Io`.
    ReadIo,
    /// A read stops early: `Corrupt`, as at the end of the file.
    ReadShort,
    /// A read succeeds with one bit of its buffer (counted from the start, modulo its size) wrong.
    /// The file stays right.
    ReadFlip {
        /// Which bit.
        bit: u64,
    },
    /// A write fails with `Io` after the first half of its sectors.
    WriteIo,
    /// A write fails with `NoSpace` after the first half of its sectors.
    WriteNoSpace,
    /// A write is acknowledged but not done.
    WriteLost,
    /// A write is acknowledged but lands this many 4 KiB pages further on (or back, not past zero).
    WriteMisdirected {
        /// How far.
        pages: i64,
    },
    /// A length change fails with `Io`; nothing happens.
    SetLenIo,
    /// A length change fails with `NoSpace`; nothing happens.
    SetLenNoSpace,
    /// A punch fails with `Io`; nothing happens.
    PunchIo,
    /// A punch fails with `Unsupported`; nothing happens.
    PunchUnsupported,
    /// A reservation fails with `NoSpace`; nothing happens.
    ReserveNoSpace,
    /// A reservation fails with `Unsupported`; nothing happens.
    ReserveUnsupported,
    /// A sync fails with `Io`. What it covered is gone: later reads show what was durable.
    SyncIo,
    /// A sync fails with `Io`. What it covered will never be durable, not even by a later sync that
    /// succeeds, but reads still show it: pages that the host marked clean after a failed write.
    SyncIoCached,
    /// A creation fails with `Io`; nothing happens.
    CreateIo,
    /// A creation fails with `NoSpace`; nothing happens.
    CreateNoSpace,
    /// A rename fails with `Io`; nothing happens.
    RenameIo,
    /// A removal fails with `Io`; nothing happens.
    RemoveIo,
    /// A sync of the names fails with `Io`; they are as durable as before.
    SyncNamesIo,
}

/// The calls that faults befall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Read,
    Write,
    SetLen,
    Punch,
    Reserve,
    Sync,
    Create,
    Rename,
    Remove,
    SyncNames,
}

impl Fault {
    fn call(self) -> Call {
        match self {
            Fault::ReadIo | Fault::ReadShort | Fault::ReadFlip { .. } => Call::Read,
            Fault::WriteIo
            | Fault::WriteNoSpace
            | Fault::WriteLost
            | Fault::WriteMisdirected { .. } => Call::Write,
            Fault::SetLenIo | Fault::SetLenNoSpace => Call::SetLen,
            Fault::PunchIo | Fault::PunchUnsupported => Call::Punch,
            Fault::ReserveNoSpace | Fault::ReserveUnsupported => Call::Reserve,
            Fault::SyncIo | Fault::SyncIoCached => Call::Sync,
            Fault::CreateIo | Fault::CreateNoSpace => Call::Create,
            Fault::RenameIo => Call::Rename,
            Fault::RemoveIo => Call::Remove,
            Fault::SyncNamesIo => Call::SyncNames,
        }
    }
}

/// Which of the calls that a rule is about it befalls. Counting starts at 0 when the rules are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// That one call.
    Nth(u64),
    /// That call and all after it.
    From(u64),
    /// On average one call in `one_in` (0 and 1 mean every call), chosen by `seed`.
    Seeded {
        /// Same seed, same choice.
        seed: u64,
        /// How rare.
        one_in: u64,
    },
}

impl When {
    fn hits(self, count: u64) -> bool {
        match self {
            When::Nth(n) => count == n,
            When::From(n) => count >= n,
            When::Seeded { seed, one_in } => mix(seed ^ mix(count)).is_multiple_of(one_in.max(1)),
        }
    }
}

/// A fault that happened, for reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    /// What happened.
    pub fault: Fault,
    /// To which file, by the name it was opened (or created, renamed, removed) under; empty for a
    /// sync of the names.
    pub name: String,
    /// Length of the log at that moment.
    pub at: usize,
}

impl fmt::Display for Hit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} on {:?} after {} operations", self.fault, self.name, self.at)
    }
}

#[derive(Debug, Clone)]
struct Rule {
    fault: Fault,
    when: When,
    name: Option<String>,
    /// Calls seen that the rule is about.
    count: u64,
}

/// Rules for faults. The default has none.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    rules: Vec<Rule>,
    capacity: Option<u64>,
}

impl Faults {
    /// No faults.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds a rule for all files. Where several rules hit one call, the first one added counts.
    #[must_use]
    pub fn add(mut self, when: When, fault: Fault) -> Self {
        self.rules.push(Rule { fault, when, name: None, count: 0 });
        self
    }

    /// Adds a rule for files opened under `name`; only their calls are counted.
    #[must_use]
    pub fn add_on(mut self, name: &str, when: When, fault: Fault) -> Self {
        self.rules.push(Rule { fault, when, name: Some(name.to_owned()), count: 0 });
        self
    }

    /// Limits the pages of all named files to `bytes` in sum. A write beyond it does the pages that
    /// still fit and fails with `NoSpace`.
    #[must_use]
    pub fn capacity(mut self, bytes: u64) -> Self {
        self.capacity = Some(bytes);
        self
    }

    pub(super) fn limit(&self) -> Option<u64> {
        self.capacity
    }

    /// Counts a call and says what befalls it.
    pub(super) fn hit(&mut self, call: Call, name: &str) -> Option<Fault> {
        let mut hit = None;
        for rule in &mut self.rules {
            let about = rule.name.as_deref().is_none_or(|wanted| wanted == name);
            if rule.fault.call() != call || !about {
                continue;
            }
            if rule.when.hits(rule.count) && hit.is_none() {
                hit = Some(rule.fault);
            }
            rule.count += 1;
        }
        hit
    }
}

/// A bijection of 64-bit numbers whose output looks random (the finaliser of splitmix64).
pub(super) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
