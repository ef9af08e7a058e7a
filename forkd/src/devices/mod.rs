//! The devices of a machine.
//!
//! [`DeviceSet`] has them all: disks, a network card and the random number device over virtio, the
//! console, the generation id, the identity page and the power device. What they have in common
//! with the rest of the machine is in `crate::wires`; where they are is in [`layout`].
//!
//! Threads: one per disk, one for the network card and one for the console's socket. Everything
//! else is done by the vCPU that touches a register.
//!
//! Order of a stop: processors stand, [`DeviceSet::quiesce`] (no disk takes a request and no frame
//! passes, then every disk waits for its own), then the state is saved. Order of a start: guest
//! memory and interrupt controllers have their content, [`DeviceSet::restore`],
//! [`DeviceSet::resume`], processors run.

pub mod block;
pub mod bus;
pub mod layout;

mod console;
mod meta;
mod mmio;
mod net;
mod power;
mod rng;
mod serial;
mod view;
mod vmgenid;

pub use block::{DiskConfig, DiskPath, DiskStatus};
pub use bus::{Bus, MmioDevice, PioDevice};
pub use console::HISTORY;
pub use net::{LinkState, LinkWhen, NetConfig, NetCounts, NetStatus};
pub use power::{RESET_VALUE, SLEEP_TYPE_OFF};

use std::path::PathBuf;
use std::sync::Arc;

use format::{Error, Kind, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::memory::GuestRam;
use crate::wires::{Devices, Identity, Interrupt, IoBus, Wires};
use block::{Disk, Lent};
use console::{Console, Output};
use layout::{
    BUTTON_GSI, GENERATION_GSI, IDENTITY_MMIO, KEYBOARD_PORT, POWER_PORT, SERIAL_GSI, SERIAL_PORT,
    VIRTIO_LEN, VIRTIO_MAX, virtio_gsi, virtio_mmio,
};
use meta::IdentityPage;
use mmio::{Notifier, QUEUE_NOTIFY, VirtioDevice, VirtioMmio, VirtioState};
use net::Nic;
use power::{KeyboardReset, Power};
use rng::Rng;
use serial::{PortState, SerialPort};
use view::GuestView;
use vmgenid::GenerationId;

/// Version of the saved state of devices.
const VERSION: u32 = 1;

/// Most disks of a machine; one less for a machine with a network card.
pub const DISKS_MAX: usize = VIRTIO_MAX - 1;

/// What devices a machine has.
#[derive(Debug, Clone, Default)]
pub struct DeviceConfig {
    /// Its disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Its network card, which the guest finds after the disks.
    pub net: Option<NetConfig>,
    /// Where its console can be attached to. The console is there without it as well.
    pub console: Option<PathBuf>,
}

impl DeviceConfig {
    /// Number of virtio devices, which the firmware announces.
    #[must_use]
    pub fn virtio_devices(&self) -> usize {
        1 + self.disks.len() + usize::from(self.net.is_some())
    }
}

/// All devices of one machine.
pub struct DeviceSet {
    // Before what they reach into: their threads end first.
    _console: Option<Console>,
    disks: Vec<Disk>,
    nic: Option<Nic>,
    bus: Bus,
    /// The random number device, the disks, the network card.
    virtio: Vec<Arc<Mutex<VirtioMmio>>>,
    serial: Arc<Mutex<SerialPort>>,
    output: Arc<Output>,
    generation: GenerationId,
    identity: Arc<Mutex<IdentityPage>>,
    button: Arc<dyn Interrupt>,
}

impl std::fmt::Debug for DeviceSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceSet {{ {} disks, {:?} }}", self.disks.len(), self.bus)
    }
}

/// A disk's thread, or none, and the registers of one virtio device.
struct Maker<'a> {
    view: Arc<GuestView>,
    ram: &'a GuestRam,
    wires: &'a dyn Wires,
    bus: Bus,
    virtio: Vec<Arc<Mutex<VirtioMmio>>>,
}

impl Maker<'_> {
    fn notifier(&self) -> Result<Arc<Notifier>> {
        let interrupt = self.wires.interrupt(virtio_gsi(self.virtio.len()))?;
        Ok(Arc::new(Notifier::new(interrupt)))
    }

    fn add(&mut self, device: Box<dyn VirtioDevice>, notifier: Arc<Notifier>) -> Result<()> {
        let at = virtio_mmio(self.virtio.len());
        let registers = Arc::new(Mutex::new(VirtioMmio::new(device, notifier, self.view.clone())));
        self.bus.insert_mmio(at, VIRTIO_LEN, registers.clone())?;
        self.virtio.push(registers);
        Ok(())
    }

    fn disk(&mut self, config: &DiskConfig) -> Result<Disk> {
        let at = virtio_mmio(self.virtio.len());
        let doorbell = self.wires.doorbell(crate::memory::Gpa(at.0 + QUEUE_NOTIFY), Some(0))?;
        let notifier = self.notifier()?;
        let lent = match config.path {
            DiskPath::Arena => None,
            DiskPath::Direct => Some(self.lend(config, &notifier)?),
        };
        let disk = Disk::new(config, doorbell, lent, notifier.clone())?;
        self.add(disk.device(), notifier)?;
        Ok(disk)
    }

    fn nic(&mut self, config: &NetConfig) -> Result<Nic> {
        let at = crate::memory::Gpa(virtio_mmio(self.virtio.len()).0 + QUEUE_NOTIFY);
        let doorbells = [self.wires.doorbell(at, Some(0))?, self.wires.doorbell(at, Some(1))?];
        let notifier = self.notifier()?;
        let nic = Nic::new(config, doorbells, notifier.clone())?;
        self.add(nic.device(), notifier)?;
        Ok(nic)
    }

    /// What a disk needs for which blockd is to have the guest's ring.
    fn lend(&self, config: &DiskConfig, notifier: &Notifier) -> Result<Lent> {
        let memory = self.ram.lend().ok_or_else(|| {
            Error::new(
                Kind::Unsupported,
                "the memory of a machine that was forked or restored is its own, and cannot be \
                 shared with blockd",
            )
            .tried("use directly")
            .on(format!("disk {}", config.name))
            .hint("use it without `direct`")
        })?;
        Ok(Lent { memory, call: notifier.bell()? })
    }
}

impl DeviceSet {
    /// Makes the devices of a machine that does not run yet, and connects its disks.
    ///
    /// # Errors
    /// `Invalid` for too many disks; whatever keeps a disk from being connected.
    pub fn new(config: &DeviceConfig, ram: &Arc<GuestRam>, wires: &dyn Wires) -> Result<DeviceSet> {
        if config.virtio_devices() > VIRTIO_MAX {
            let reason = format!("a machine has at most {DISKS_MAX} disks and network cards");
            return Err(Error::invalid(reason));
        }
        let view = Arc::new(GuestView::new(ram)?);
        let mut maker =
            Maker { view: view.clone(), ram, wires, bus: Bus::default(), virtio: Vec::new() };
        let notifier = maker.notifier()?;
        maker.add(Box::new(Rng::new(notifier.clone())), notifier)?;
        let disks = config.disks.iter().map(|d| maker.disk(d)).collect::<Result<Vec<_>>>()?;
        let nic = config.net.as_ref().map(|net| maker.nic(net)).transpose()?;
        let Maker { mut bus, virtio, .. } = maker;

        let output = Arc::new(Output::new()?);
        let port = SerialPort::new(wires.interrupt(SERIAL_GSI)?, output.clone());
        let serial = Arc::new(Mutex::new(port));
        let taken = nic.as_ref().map_or_else(|| Box::new(|| ()) as _, Nic::when_identified);
        let identity = Arc::new(Mutex::new(IdentityPage::new(taken)));
        let power = wires.power();
        bus.insert_pio(SERIAL_PORT.0, SERIAL_PORT.1, serial.clone())?;
        bus.insert_pio(POWER_PORT.0, POWER_PORT.1, Arc::new(Mutex::new(Power(power.clone()))))?;
        let keyboard = Arc::new(Mutex::new(KeyboardReset(power)));
        bus.insert_pio(KEYBOARD_PORT.0, KEYBOARD_PORT.1, keyboard)?;
        bus.insert_mmio(IDENTITY_MMIO.0, IDENTITY_MMIO.1, identity.clone())?;

        let console = config.console.as_ref().map(|path| {
            let port = serial.clone();
            Console::listen(path, &output, Box::new(move |bytes| port.lock().typed(bytes)))
        });
        Ok(DeviceSet {
            _console: console.transpose()?,
            disks,
            nic,
            bus,
            virtio,
            serial,
            output,
            generation: GenerationId::new(ram.clone(), wires.interrupt(GENERATION_GSI)?),
            identity,
            button: wires.interrupt(BUTTON_GSI)?,
        })
    }

    /// Gives a machine that boots its identity. One that is restored gets it with its state.
    ///
    /// # Errors
    /// `Invalid` when guest memory has no room for it.
    pub fn identify(&self, identity: &Identity) -> Result<()> {
        self.take_identity(identity, false)
    }

    fn take_identity(&self, identity: &Identity, notify: bool) -> Result<()> {
        self.generation.set(&identity.generation_id, notify)?;
        self.identity.lock().set(identity);
        if let Some(nic) = &self.nic {
            nic.set_mac(identity.mac);
        }
        Ok(())
    }

    /// Whether the guest said that it has taken its present identity.
    #[must_use]
    pub fn is_identity_taken(&self) -> bool {
        self.identity.lock().is_acknowledged()
    }

    /// The disks as they are now.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskStatus> {
        self.disks.iter().map(Disk::status).collect()
    }

    /// The network card as it is now, if there is one.
    #[must_use]
    pub fn net(&self) -> Option<NetStatus> {
        self.nic.as_ref().map(Nic::status)
    }

    /// What the guest printed lately, at most [`HISTORY`] bytes.
    #[must_use]
    pub fn printed(&self) -> Vec<u8> {
        self.output.history()
    }

    /// Accesses of the guest so far that reached no device.
    #[must_use]
    pub fn unclaimed(&self) -> u64 {
        self.bus.unclaimed()
    }
}

/// Everything, saved.
#[derive(Serialize, Deserialize)]
struct SetState {
    version: u32,
    virtio: Vec<VirtioState>,
    serial: PortState,
}

impl Devices for DeviceSet {
    fn bus(&self) -> &dyn IoBus {
        &self.bus
    }

    fn quiesce(&self) -> Result<()> {
        // All first: while one drains, the others shall not take more.
        self.disks.iter().for_each(Disk::pause);
        self.nic.iter().for_each(Nic::pause);
        self.disks.iter().try_for_each(Disk::drain)
    }

    fn lends_memory(&self) -> bool {
        self.disks.iter().any(Disk::is_direct)
    }

    fn take_memory_back(&self) -> Result<Vec<String>> {
        block::take_memory_back(&self.disks)
    }

    fn save(&self) -> Result<Vec<u8>> {
        let virtio = self.virtio.iter().map(|v| v.lock().save()).collect();
        let state = SetState { version: VERSION, virtio, serial: self.serial.lock().save() };
        serde_json::to_vec(&state)
            .map_err(|e| Error::invalid("the state of the devices cannot be written").caused_by(e))
    }

    fn restore(&self, state: &[u8], identity: &Identity) -> Result<()> {
        /// Read first: what else there is depends on it.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let damaged = |e| Error::corrupt("the state of the devices cannot be read").caused_by(e);
        let version = serde_json::from_slice::<Version>(state).map_err(damaged)?.version;
        if version != VERSION {
            let reason = format!("the state of the devices has version {version}, not {VERSION}");
            return Err(Error::new(Kind::Unsupported, reason));
        }
        let state: SetState = serde_json::from_slice(state).map_err(damaged)?;
        if state.virtio.len() != self.virtio.len() {
            return Err(Error::invalid(format!(
                "the saved machine has {} disks and network cards and this one has {}",
                state.virtio.len().saturating_sub(1),
                self.virtio.len() - 1
            )));
        }
        for (device, state) in self.virtio.iter().zip(&state.virtio) {
            device.lock().restore(state)?;
        }
        self.serial.lock().restore(&state.serial)?;
        self.take_identity(identity, true)
    }

    fn resume(&self) -> Result<()> {
        self.generation.announce()?;
        self.virtio.iter().for_each(|v| v.lock().raise_again());
        self.disks.iter().for_each(Disk::resume);
        self.nic.iter().for_each(Nic::resume);
        Ok(())
    }

    fn press_power_button(&self) -> Result<()> {
        self.button.raise()
    }
}
