//! One machine: processors, memory and devices, and the instants at which they are stopped.
//!
//! A machine begins as a *shell*: everything in place but content. It then boots, or becomes the
//! child of a fork, once. It is run, paused, resumed and cut until it ends; it ends once.
//!
//! Invariants:
//! - Processors park before devices are made quiet, and devices go on before processors do: a
//!   processor never runs into a device that stands.
//! - Every cut ends with the machine running if it ran before, whatever failed.
//! - A shell whose boot or restore failed never runs.
//!
//! Lock order: `control`, then `top`, then a processor's own.

pub mod ending;
mod start;
mod urgent;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use format::{Error, Kind, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vhost_blk::event::EventFd;
use zerocopy::IntoBytes;

use crate::devices::layout::BUTTON_GSI;
use crate::kvm::Host;
use crate::kvm::blob::{Reader, Writer};
use crate::kvm::state::{self, Restored, Shape, tag};
use crate::kvm::vcpu::Cpu;
use crate::kvm::vm::Vm;
use crate::memory::collapse::Collapser;
use crate::memory::cut::Top;
use crate::memory::{Gpa, GuestRam, Layer};
use crate::wires::{Devices, DiskCut, Identity, Interrupt, MakeDevices, PowerSwitch, Wires};
use ending::Ending;
pub use ending::{Exit, Reason};
pub use start::CpuStart;
use start::{place, start_of};
use urgent::Urgent;

/// Most processors of a machine.
pub const VCPUS_MAX: u8 = 8;

/// What a shell is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SizeClass {
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Number of processors, 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
}

/// Puts a program into a machine that boots.
pub trait Loader {
    /// Writes the program into `ram` and says where each processor starts.
    ///
    /// # Errors
    /// When the program cannot be read or does not fit.
    fn load(&self, ram: &GuestRam, cpus: &mut [CpuStart]) -> Result<()>;
}

/// A machine at one instant.
#[derive(Debug)]
pub struct Image {
    /// Its memory, from the lowest layer up. Sealed.
    pub layers: Vec<Layer>,
    /// Everything else.
    pub state: Vec<u8>,
    /// For how long the machine stood, and on what the time went.
    pub pause: Pause,
}

/// The parts of a pause, in order. They add up to `whole` but for a few instructions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pause {
    /// From the first processor that was asked to stop until the last was let go; zero for a
    /// machine that stood.
    pub whole: Duration,
    /// Until all processors stood.
    pub park: Duration,
    /// Until no request was in flight and the cut of the disks was asked for.
    pub quiesce: Duration,
    /// Saving processors and devices.
    pub save: Duration,
    /// Freezing memory.
    pub memory: Duration,
    /// Waiting for the disks after everything else was done.
    pub disks: Duration,
    /// Bytes of memory that were left to copy when the pause began.
    pub rest_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Shell,
    /// A boot or restore began and did not succeed.
    Unfit,
    Standing,
    Running,
}

/// One machine.
pub struct Machine {
    host: &'static Host,
    class: SizeClass,
    vm: Vm,
    ram: Arc<GuestRam>,
    cpus: Vec<Arc<Cpu>>,
    ending: Arc<Ending>,
    devices: OnceLock<Arc<dyn Devices>>,
    control: Mutex<Phase>,
    top: Arc<Mutex<Top>>,
    collapser: OnceLock<Collapser>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine {:?} {:?}", self.class, *self.control.lock())
    }
}

impl Machine {
    /// A machine with everything in place but content.
    ///
    /// # Errors
    /// `Unsupported` when this host gives no virtual machines, `Invalid` for an impossible size,
    /// and the host's error.
    pub fn shell(class: &SizeClass) -> Result<Machine> {
        if !(1..=VCPUS_MAX).contains(&class.vcpus) {
            return Err(Error::invalid("a machine has 1 to 8 processors")
                .tried("make")
                .on(format!("a machine with {} processors", class.vcpus)));
        }
        let host = Host::get()?;
        let ram = Arc::new(GuestRam::reserve(class.memory_bytes)?);
        let vm = Vm::new(host, &ram)?;
        let ending = Arc::new(Ending::default());
        let mut cpus = Vec::with_capacity(class.vcpus.into());
        for index in 0..class.vcpus {
            let fd = vm.processor(host, index, class.vcpus)?;
            cpus.push(Cpu::start(index, fd, &ending)?);
        }
        ending.watch(&cpus);
        Ok(Machine {
            host,
            class: *class,
            vm,
            ram,
            cpus,
            ending,
            devices: OnceLock::new(),
            control: Mutex::new(Phase::Shell),
            top: Arc::default(),
            collapser: OnceLock::new(),
        })
    }

    /// Makes the shell a machine that is about to boot.
    ///
    /// # Errors
    /// When the devices or the program cannot be had; the shell is then of no use any more.
    pub fn boot_with(&mut self, loader: &dyn Loader, devices: MakeDevices<'_>) -> Result<()> {
        self.fill(|machine| {
            *machine.top.lock() = Top::shared(&machine.ram)?;
            machine.make_devices(devices)?;
            let mut starts =
                machine.cpus.iter().map(|cpu| start_of(cpu)).collect::<Result<Vec<_>>>()?;
            loader.load(&machine.ram, &mut starts)?;
            let collapser = Collapser::start(&machine.ram, &machine.top)?;
            machine.collapser.get_or_init(|| collapser);
            machine.cpus.iter().zip(&starts).try_for_each(|(cpu, start)| place(cpu, start))
        })
    }

    /// Gives the shell the devices of what it is going to become.
    ///
    /// # Errors
    /// When they cannot be had; the shell is then of no use any more.
    pub fn equip(&mut self, devices: MakeDevices<'_>) -> Result<()> {
        if *self.control.lock() != Phase::Shell {
            return Err(Error::invalid("it is no shell any more").tried("equip").on("machine"));
        }
        self.make_devices(devices).map(drop)
    }

    /// Makes the shell the child of a fork, called `identity` from before its first instruction.
    ///
    /// # Errors
    /// `Unsupported` when this host, or a machine of this size, cannot go on with the image;
    /// `Corrupt` when the image is not whole. The shell is then of no use any more.
    pub fn become_with(
        &mut self,
        image: &Image,
        identity: &Identity,
        devices: MakeDevices<'_>,
    ) -> Result<Restored> {
        self.fill(|machine| {
            let state = Reader::new(&image.state)?;
            machine.check_shape(&state)?;
            *machine.top.lock() = Top::over(&machine.ram, &image.layers)?;
            let devices = machine.make_devices(devices)?;
            let restored = state::restore(machine.host, &machine.vm, &machine.cpus, &state)?;
            devices.restore(state.section(tag::DEVICES, 0)?, identity)?;
            Ok(restored)
        })
    }

    /// Does `work` on a shell; it stands afterwards, or is unfit for good.
    fn fill<T>(&mut self, work: impl FnOnce(&Machine) -> Result<T>) -> Result<T> {
        {
            let mut phase = self.control.lock();
            if *phase != Phase::Shell {
                return Err(Error::invalid("it is no shell any more").tried("fill").on("machine"));
            }
            *phase = Phase::Unfit;
        }
        let done = work(self)?;
        *self.control.lock() = Phase::Standing;
        Ok(done)
    }

    /// The devices: those that it was equipped with, or new ones.
    fn make_devices(&self, make: MakeDevices<'_>) -> Result<Arc<dyn Devices>> {
        if let Some(devices) = self.devices.get() {
            return Ok(Arc::clone(devices));
        }
        let devices = make(&self.ram, self)?;
        self.cpus.iter().for_each(|cpu| cpu.attach(&devices));
        Ok(Arc::clone(self.devices.get_or_init(|| devices)))
    }

    fn check_shape(&self, state: &Reader<'_>) -> Result<()> {
        let saved: Shape = state::one(state, tag::SHAPE, 0)?;
        let own = self.shape();
        if saved != own {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "it was a machine with {} bytes of memory and {} processors, this one has {} \
                     and {}",
                    saved.memory_bytes, saved.vcpus, own.memory_bytes, own.vcpus
                ),
            )
            .tried("continue")
            .on("the saved machine"));
        }
        Ok(())
    }

    fn shape(&self) -> Shape {
        state::shape_of(self.ram.size(), self.cpus.len())
    }

    /// What it was made for.
    #[must_use]
    pub fn class(&self) -> SizeClass {
        self.class
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Runs it, first or again.
    ///
    /// # Errors
    /// `Invalid` when it has no content, `Failed` when it has ended, and what devices say.
    pub fn resume(&self) -> Result<()> {
        let mut phase = self.control.lock();
        let devices = self.filled(*phase)?;
        self.check_not_ended()?;
        if *phase == Phase::Standing {
            devices.resume()?;
            self.cpus.iter().for_each(|cpu| cpu.run());
            *phase = Phase::Running;
        }
        Ok(())
    }

    /// Stops it between two instructions, with no request in flight.
    ///
    /// # Errors
    /// `Invalid` when it has no content; `Busy` when a processor or a device does not stop, and it
    /// then goes on.
    pub fn pause(&self) -> Result<()> {
        let mut phase = self.control.lock();
        let devices = self.filled(*phase)?;
        if *phase == Phase::Running {
            if let Err(e) = self.park().and_then(|()| devices.quiesce()) {
                self.go_on(devices)?;
                return Err(e);
            }
            *phase = Phase::Standing;
        }
        Ok(())
    }

    /// Presses the power button, if the guest listens to it; says whether it does.
    ///
    /// # Errors
    /// `Invalid` when it does not run, and so cannot listen; the host's error.
    pub fn press_power_button(&self) -> Result<bool> {
        let phase = self.control.lock();
        let devices = self.filled(*phase)?;
        if *phase != Phase::Running {
            return Err(Error::invalid("it does not run").tried("turn off").on("machine"));
        }
        let listens = self.vm.is_heard(BUTTON_GSI)?;
        if listens {
            devices.press_power_button()?;
        }
        Ok(listens)
    }

    /// Whether blockd has its memory.
    #[must_use]
    pub fn lends_memory(&self) -> bool {
        self.devices.get().is_some_and(|devices| devices.lends_memory())
    }

    /// Has its disks go on without blockd in its memory, as every cut does first. Gives back the
    /// names of those that changed.
    ///
    /// # Errors
    /// `Invalid` when it has no content; what a disk says, and all are then as they were.
    pub fn take_memory_back(&self) -> Result<Vec<String>> {
        let phase = self.control.lock();
        self.filled(*phase)?.take_memory_back()
    }

    /// Takes memory, processors, devices and disks at one instant. A machine that runs goes on.
    ///
    /// # Errors
    /// When any of them fails; the machine is as it was.
    pub fn cut(&self, disks: &mut dyn DiskCut) -> Result<Image> {
        let phase = self.control.lock();
        let devices = self.filled(*phase)?;
        let runs = *phase == Phase::Running;
        // First of all: what others write to memory is in no log, and is in this image only while
        // it goes to the file that becomes its lowest layer.
        devices.take_memory_back()?;
        let mut top = self.top.lock();
        let mut delta = top.prepare(&self.ram, &self.vm)?;

        let mut pause = Pause { rest_bytes: delta.rest_bytes(), ..Pause::default() };
        // The processors' threads are ordinary again before they run again.
        let own_thread = runs.then(Urgent::this);
        let threads = runs.then(|| Urgent::new(self.cpus.iter().map(|cpu| cpu.tid())));
        let began = Instant::now();
        let mut clock = Lap(began);
        let mut instant = || -> Result<Vec<u8>> {
            if runs {
                self.park()?;
                pause.park = clock.lap();
                devices.quiesce()?;
            }
            self.check_not_ended()?;
            disks.begin()?;
            pause.quiesce = clock.lap();
            let state = self.save(&**devices)?;
            pause.save = clock.lap();
            top.freeze(&mut delta, &self.ram, &self.vm)?;
            pause.memory = clock.lap();
            disks.finish()?;
            pause.disks = clock.lap();
            Ok(state)
        };
        let state = instant();
        drop(threads);
        let gone_on = if runs { self.go_on(devices) } else { Ok(()) };
        drop(own_thread);
        gone_on?;
        let let_go = self.cpus.iter().filter_map(|cpu| cpu.let_go_at()).max();
        pause.whole = let_go.map_or(Duration::ZERO, |at| at.duration_since(began));
        let state = state?;
        Ok(Image { layers: top.publish(delta)?, state, pause })
    }

    fn save(&self, devices: &dyn Devices) -> Result<Vec<u8>> {
        let mut out = Writer::default();
        out.section(tag::SHAPE, 0, self.shape().as_bytes());
        state::save(self.host, &self.vm, &self.cpus, &mut out)?;
        out.section(tag::DEVICES, 0, &devices.save()?);
        Ok(out.finish())
    }

    fn park(&self) -> Result<()> {
        self.cpus.iter().for_each(|cpu| cpu.ask_to_park());
        self.cpus.iter().try_for_each(|cpu| cpu.wait_parked())
    }

    /// Lets devices and processors go on that were stopped. One that ended stays so.
    fn go_on(&self, devices: &Arc<dyn Devices>) -> Result<()> {
        if self.ending.exit().is_some() {
            return Ok(());
        }
        let resumed = devices.resume();
        self.cpus.iter().for_each(|cpu| cpu.run());
        resumed
    }

    fn filled(&self, phase: Phase) -> Result<&Arc<dyn Devices>> {
        let empty = || Error::invalid("it has no content").tried("run").on("machine");
        match phase {
            Phase::Standing | Phase::Running => self.devices.get().ok_or_else(empty),
            Phase::Shell | Phase::Unfit => Err(empty()),
        }
    }

    fn check_not_ended(&self) -> Result<()> {
        match self.ending.exit() {
            None => Ok(()),
            Some(exit) => Err(Error::new(Kind::Failed, format!("it has ended: {exit}"))
                .tried("go on with")
                .on("machine")),
        }
    }

    /// Bytes of its memory that were made huge pages before its first cut.
    #[must_use]
    pub fn huge_bytes(&self) -> u64 {
        self.collapser.get().map_or(0, Collapser::huge_bytes)
    }

    /// Times that its processors came out of the guest to have something done.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.cpus.iter().map(|cpu| cpu.exits()).sum()
    }

    /// How it ended, if it did.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.ending.exit()
    }

    /// Waits until it ends.
    #[must_use]
    pub fn wait(&self) -> Exit {
        self.ending.wait()
    }

    /// Waits until it ends, but not longer than `time`.
    #[must_use]
    pub fn wait_for(&self, time: Duration) -> Option<Exit> {
        self.ending.wait_for(time)
    }
}

impl Wires for Machine {
    fn interrupt(&self, gsi: u32) -> Result<Arc<dyn Interrupt>> {
        self.vm.interrupt(gsi)
    }

    fn doorbell(&self, at: Gpa, value: Option<u32>) -> Result<EventFd> {
        self.vm.doorbell(at, value)
    }

    fn power(&self) -> Arc<dyn PowerSwitch> {
        Arc::<Ending>::clone(&self.ending)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.cpus.iter().for_each(|cpu| cpu.ask_to_park());
        self.cpus.iter().for_each(|cpu| cpu.quit());
    }
}

/// A stopwatch that tells the time since it was last asked.
struct Lap(Instant);

impl Lap {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}
