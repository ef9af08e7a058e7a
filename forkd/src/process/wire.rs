//! What the daemon and a VM process say to each other.
//!
//! Each message is one JSON value with open files beside it (`blockd::messages`). A connection
//! carries one question at a time; after [`Ask::Watch`] it carries [`Told`] until the end.

use std::path::PathBuf;

use blockd::api::types::Failure;
use format::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::devices::{DiskConfig, LinkWhen};
use crate::memory::Span;
use crate::wires::Identity;

/// The socket of a VM process in its folder.
pub const CONTROL_SOCKET: &str = "control";
/// How the machine ended, in its folder.
pub const ENDED_FILE: &str = "ended.json";

/// What the daemon asks a VM process for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// Boot a machine in the shell; it is paused afterwards. Files: its kernel, then its first file
    /// system and its tap interface, if it has them.
    Boot(Box<BootVm>),
    /// Have these devices, for the child that the shell is to become. Its disks are connected now,
    /// so that nothing of that is left to do when the machine is cut. File: its tap interface, if
    /// it has one.
    Equip(Hardware),
    /// Become the child of a fork, equipped before; it is paused afterwards, unless it is to begin.
    /// Files: the layers of its memory, then its state.
    Become(Box<BecomeChild>),
    /// Stay when the daemon goes, and begin to run unless it is to stay paused.
    Begin(Begin),
    /// Stop between two instructions.
    Pause,
    /// Go on.
    Resume,
    /// Take its memory back from blockd, for good: a disk that shares it goes through an arena from
    /// then on. The answer names those that changed.
    TakeMemoryBack,
    /// Say whether blockd has its memory: it does not any more after a [`Ask::TakeMemoryBack`].
    LendsMemory,
    /// Take memory, processors, devices and disks at one instant, and go on. File: a connection to
    /// blockd, if there is something to ask it.
    Cut(CutVm),
    /// Say how it is.
    Status,
    /// Say how often its processors came out of the guest.
    Exits,
    /// Say how its network card is, if it has one.
    Net,
    /// Press the power button, if the guest listens to it. The answer says whether it does.
    PressPowerButton,
    /// End, as if the power was cut.
    Stop,
    /// Tell of every change until the end.
    Watch,
}

/// A machine to boot.
#[derive(Debug, Serialize, Deserialize)]
pub struct BootVm {
    /// What it boots.
    pub program: Program,
    /// What it consists of besides processors and memory.
    pub hardware: Hardware,
    /// Who it is.
    pub identity: Identity,
}

/// What a machine boots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The command line of the kernel; without it, what suits most.
    pub cmdline: Option<String>,
}

/// What a machine consists of besides processors and memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// Its disks, in the order in which the guest sees them.
    pub disks: Vec<DiskConfig>,
    /// Its network card.
    #[serde(default)]
    pub net: Option<NetHardware>,
}

/// A network card of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetHardware {
    /// The interface that it is connected to, which comes as a file beside the message.
    pub tap: Option<String>,
    /// When the link comes up after the machine became another one.
    pub link: LinkWhen,
}

/// A child to become.
#[derive(Debug, Serialize, Deserialize)]
pub struct BecomeChild {
    /// What of its memory is in which layer.
    pub layers: Vec<Vec<Span>>,
    /// Who it is from now on.
    pub identity: Identity,
    /// What to do behind that, as [`Ask::Begin`] has it, if it needs to wait for nobody else.
    #[serde(default)]
    pub begin: Option<Begin>,
}

/// How to begin.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Begin {
    /// Do not run yet.
    pub paused: bool,
}

/// A machine to cut.
#[derive(Debug, Serialize, Deserialize)]
pub struct CutVm {
    /// The end of the request to blockd that cuts the disks, as bytes of HTTP: the rest was sent
    /// on the connection that comes with this.
    pub request: Option<String>,
}

/// The parts of a pause. Microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseUs {
    /// All of it.
    pub whole: u64,
    /// Until all processors stood.
    pub park: u64,
    /// Until no request was in flight.
    pub quiesce: u64,
    /// Saving processors and devices.
    pub save: u64,
    /// Freezing memory.
    pub memory: u64,
    /// Waiting for the disks after everything else was done.
    pub disks: u64,
}

/// What came of a cut. Files: the layers of the memory, then the state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WasCut {
    /// What of its memory is in which layer.
    pub layers: Vec<Vec<Span>>,
    /// For how long it did not run, and why.
    pub pause: PauseUs,
    /// Status and body of blockd's answer, if it was asked.
    pub disks: Option<(u16, String)>,
}

/// What became of a cut.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cutting {
    /// It was made. The machine goes on.
    Cut(WasCut),
    /// It was not. The machine goes on as if nobody had asked.
    Failed {
        /// Why.
        failure: Failure,
        /// What became of the disks.
        disks: DisksAre,
    },
}

/// What became of the disks of a cut that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DisksAre {
    /// They were not forked.
    Untouched,
    /// They may have been forked: there may be children that nobody wants.
    Unknown,
}

/// What a shell says when it is ready.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ready {
    /// What confines it.
    pub sandbox: Vec<String>,
}

/// How a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It has no content yet.
    Shell,
    /// It does not run.
    Paused,
    /// It runs.
    Running,
}

/// What a watcher is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// How it is from now on.
    Is(Phase),
}

/// How a machine ended, as [`ENDED_FILE`] has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The stable name of the reason.
    pub reason: String,
    /// What else there is to say.
    pub detail: String,
    /// Seconds since 1970.
    pub at: u64,
}

/// The answer to a question.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer<T> {
    /// It is done.
    Done(T),
    /// It is not.
    Failed(Failure),
}

impl<T> Answer<T> {
    /// As it goes over the wire.
    pub fn of(outcome: Result<T>) -> Self {
        match outcome {
            Ok(value) => Answer::Done(value),
            Err(e) => Answer::Failed(Failure::from(&e)),
        }
    }

    /// # Errors
    /// The failure that was told of.
    pub fn outcome(self) -> Result<T> {
        match self {
            Answer::Done(value) => Ok(value),
            Answer::Failed(failure) => Err(Error::from(failure)),
        }
    }
}

/// The folder of a VM process, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder(pub PathBuf);

impl Folder {
    /// Where the process listens.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.0.join(CONTROL_SOCKET)
    }

    /// Where the console is.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.0.join("console")
    }

    /// Where blockd serves disk number `i`.
    #[must_use]
    pub fn disk(&self, i: usize) -> PathBuf {
        self.0.join(format!("disk{i}"))
    }

    /// What the process has to say to people.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// How it ended.
    #[must_use]
    pub fn ended(&self) -> PathBuf {
        self.0.join(ENDED_FILE)
    }
}
