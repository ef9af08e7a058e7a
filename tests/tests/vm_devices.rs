//! The devices of `forkd`, with the test as their guest: disks of a real daemon, the console, the
//! identity page.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use forkd::devices::{DeviceConfig, DiskPath, HISTORY, layout};
use forkd::memory::Gpa;
use forkd::wires::{Devices as _, Identity};
use offshoot_tests::daemon::Daemon;
use offshoot_tests::rng::{Rng, seed};
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use offshoot_tests::vmdriver::{Ask, Driver, Rig, line, one_disk, register, set_register};
use offshoot_tests::vmload::Load;

const SIZE: u64 = 64 << 20;
/// Every ring feature that a kernel of today accepts.
const ALL: u64 = !0;

fn served() -> (ServedDisk, Daemon) {
    let disk = ServedDisk::new(TestStore::new());
    let daemon = disk.daemon();
    disk.attach();
    (disk, daemon)
}

/// blockd is killed while requests are at work, twice; the guest sees them complete, each once, and
/// what they read and wrote is right.
#[test]
fn requests_survive_the_death_of_blockd() {
    let seed = seed(0x0fd1);
    println!("repeat with: OFFSHOOT_SEED={seed} cargo test --test vm_devices requests_survive");
    let (disk, daemon) = served();
    let rig = Rig::new(&one_disk(&disk.socket()));
    let mut driver = Driver::new(&rig, ALL);
    let status = &rig.devices.disks()[0];
    assert_eq!((status.path, status.size, status.connected), (DiskPath::Arena, SIZE, true));
    let mut load = Load::new(seed, SIZE);
    load.run(&rig, &mut driver, 400);

    let mut daemon = Some(daemon);
    for _ in 0..2 {
        load.fill(&rig, &mut driver, 40);
        driver.kick(&rig);
        daemon.take().expect("one runs").kill();
        until("the loss is noticed", || !rig.devices.disks()[0].connected);
        // Asked for while nobody is there.
        load.fill(&rig, &mut driver, 44);
        driver.kick(&rig);
        daemon = Some(disk.daemon());
        load.run(&rig, &mut driver, 200);
    }
    load.finish(&rig, &mut driver);
    assert!(line(&rig).get() > 0);
    drop(rig);
    assert!(daemon.expect("one runs").terminate().success());
    assert!(disk.read("vm") == load.model(), "the disk holds something else");
}

fn identity(byte: u8) -> Identity {
    Identity {
        name: format!("child{byte}"),
        id: uuid::Uuid::from_bytes([byte; 16]),
        generation_id: [byte; 16],
        seed: [byte; 32],
        mac: [byte; 6],
    }
}

/// A machine is stopped with its ring full and goes on elsewhere, twice: no request is lost, none
/// is done twice, and the new one has its identity before anything else.
#[test]
fn requests_go_on_where_a_saved_machine_stopped() {
    let seed = seed(0x5a7e);
    println!("repeat with: OFFSHOOT_SEED={seed} cargo test --test vm_devices requests_go_on");
    let (disk, daemon) = served();
    let config = one_disk(&disk.socket());
    let mut rig = Rig::new(&config);
    rig.devices.identify(&identity(1)).unwrap();
    let mut driver = Driver::new(&rig, ALL);
    let mut load = Load::new(seed, SIZE);
    for round in 2..4 {
        load.run(&rig, &mut driver, 150);
        load.fill(&rig, &mut driver, 40);
        driver.kick(&rig);
        rig.devices.quiesce().unwrap();
        assert_eq!(rig.devices.disks()[0].in_work, 0);
        // Asked for after the stop: it waits in the ring.
        load.fill(&rig, &mut driver, 46);
        let state = rig.devices.save().unwrap();
        let ram = rig.ram.clone();
        drop(rig);

        rig = Rig::over(&config, ram);
        rig.devices.restore(&state, &identity(round)).unwrap();
        assert_eq!(rig.devices.save().unwrap(), state, "saved again it is the same");
        let mut id = [0; 16];
        rig.ram.read(layout::GENERATION_ID, &mut id).unwrap();
        assert_eq!(id, [round; 16]);
        let told = || rig.wires.line(layout::GENERATION_GSI).get();
        assert_eq!((told(), line(&rig).get()), (0, 0));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(rig.devices.disks()[0].in_work, 0, "nothing is taken before it runs");
        rig.devices.resume().unwrap();
        assert_eq!(told(), 1);
        assert!(line(&rig).get() >= 1, "an interrupt that was on its way comes again");
    }
    load.run(&rig, &mut driver, 150);
    load.finish(&rig, &mut driver);
    drop(rig);
    assert!(daemon.terminate().success());
    assert!(disk.read("vm") == load.model(), "the disk holds something else");
}

/// A state that is not whole, of another version or of another machine is refused by name.
#[test]
fn a_state_that_does_not_fit_is_refused() {
    let (disk, _daemon) = served();
    let rig = Rig::new(&one_disk(&disk.socket()));
    rig.devices.quiesce().unwrap();
    let state = rig.devices.save().unwrap();
    drop(rig);
    let none = Rig::new(&DeviceConfig::default());
    let refused = |bytes: &[u8]| none.devices.restore(bytes, &identity(9)).unwrap_err().to_string();
    assert!(refused(&state).contains("1 disks and network cards and this one has 0"));
    assert!(refused(&state[..state.len() / 2]).contains("cannot be read"));
    let newer = String::from_utf8(state).unwrap().replace("\"version\":1", "\"version\":2");
    assert!(refused(newer.as_bytes()).contains("version 2"));
}

/// Size, serial number, resize under the guest, reads past the end, and an unknown request.
#[test]
fn the_guest_sees_the_disk_as_blockd_has_it() {
    let (disk, _daemon) = served();
    let rig = Rig::new(&one_disk(&disk.socket()));
    let mut driver = Driver::new(&rig, ALL);
    let sectors = || u64::from(register(&rig, 0x100)) | u64::from(register(&rig, 0x104)) << 32;
    assert_eq!(sectors(), SIZE / 512);
    let (status, serial) = driver.run(&rig, Ask::Id, 0, &[0; 20]);
    assert!(status == 0 && serial.iter().any(|b| *b != 0), "{status} {serial:?}");
    assert_eq!(driver.run(&rig, Ask::Read, SIZE, &[0; 512]).0, 1);
    let generation = register(&rig, 0xfc);
    disk.done(&["disk", "resize", "vm", "128M"]);
    until("the guest is told", || register(&rig, 0x60) & 2 != 0);
    assert_eq!(sectors(), 2 * SIZE / 512);
    assert_ne!(register(&rig, 0xfc), generation);
    assert_eq!(driver.run(&rig, Ask::Write, SIZE, &[7; 512]).0, 0);
    assert_eq!(driver.run(&rig, Ask::Read, SIZE, &[0; 512]), (0, vec![7; 512]));
}

/// A driver that lies about its ring breaks its own device, is told so, and can start again.
#[test]
fn a_lying_driver_breaks_only_its_own_device() {
    let seed = seed(0x11e5);
    println!("repeat with: OFFSHOOT_SEED={seed} cargo test --test vm_devices a_lying_driver");
    let (disk, _daemon) = served();
    let rig = Rig::new(&one_disk(&disk.socket()));
    let mut rng = Rng::new(seed);
    let mut broken = 0;
    for _ in 0..200 {
        let mut driver = Driver::new(&rig, rng.any());
        for _ in 0..4 {
            driver.submit(&rig, Ask::Write, 512 * rng.below(1000), &[1; 4096]);
        }
        // Some of ring, tables and headers, replaced by anything.
        for _ in 0..1 + rng.below(6) {
            let at = 0x10_0000 + 2 * rng.below(0x8_8000 / 2);
            rig.ram.write(Gpa(at), &rng.any().to_le_bytes()).unwrap();
            let near = 0x10_4000 + 2 * rng.below(8);
            rig.ram.write(Gpa(near), &rng.any().to_le_bytes()[..2]).unwrap();
        }
        driver.kick(&rig);
        for _ in 0..8 {
            set_register(&rig, 4 * rng.below(0x60), u32::try_from(rng.below(1 << 32)).unwrap());
        }
        std::thread::sleep(Duration::from_micros(200));
        broken += u32::from(register(&rig, 0x70) & 64 != 0);
    }
    assert!(broken > 0, "no ring was ever broken");
    let mut driver = Driver::new(&rig, ALL);
    let data = vec![0x5a; 8192];
    assert_eq!(driver.run(&rig, Ask::Write, 1 << 20, &data).0, 0);
    assert_eq!(driver.run(&rig, Ask::Read, 1 << 20, &vec![0; 8192]), (0, data));
}

/// A guest that prints for ever fills no memory and waits for nobody; who attaches sees the end of
/// it, may type, and may go.
#[test]
fn a_flood_on_the_console_is_bounded() {
    let store = TestStore::new();
    let path = store.path("console.sock");
    let config = DeviceConfig { console: Some(path.clone()), ..DeviceConfig::default() };
    let rig = Rig::new(&config);
    let print = |byte| rig.set_port(layout::SERIAL_PORT.0, byte);
    // One is attached, and does not read.
    let idle = UnixStream::connect(&path).unwrap();
    for i in 0..4_000_000u32 {
        print(b'a' + u8::try_from(i % 23).unwrap());
    }
    "the end\n".bytes().for_each(print);
    assert_eq!(rig.devices.printed().len(), HISTORY);
    assert!(rig.devices.printed().ends_with(b"the end\n"));

    let mut listener = UnixStream::connect(&path).unwrap();
    let mut seen = vec![0; HISTORY];
    listener.read_exact(&mut seen).unwrap();
    assert!(seen == rig.devices.printed(), "a new listener gets what is kept");
    "more".bytes().for_each(print);
    listener.read_exact(&mut seen[..4]).unwrap();
    assert_eq!(&seen[..4], b"more");
    drop(idle);

    listener.write_all(&[b'x'; 1000]).unwrap();
    let mut typed = 0;
    until("all that was typed arrives", || {
        while rig.port(layout::SERIAL_PORT.0 + 5) & 1 != 0 {
            assert_eq!(rig.port(layout::SERIAL_PORT.0), b'x');
            typed += 1;
        }
        typed == 1000
    });
    drop(listener);
    "gone".bytes().for_each(print);
    assert!(rig.devices.printed().ends_with(b"gone"));
    drop(rig);
    assert!(!path.exists(), "the socket goes with the machine");
}

/// Identity, power and everything else that is no virtio device.
#[test]
fn a_guest_finds_its_identity_and_can_turn_itself_off() {
    let rig = Rig::new(&DeviceConfig::default());
    rig.devices.identify(&identity(7)).unwrap();
    let mut page = [0; 8];
    rig.devices.bus().mmio_read(layout::IDENTITY_MMIO.0, &mut page);
    assert_eq!(&page, b"OFFSHID1");
    rig.devices.resume().unwrap();
    assert_eq!(rig.wires.line(layout::GENERATION_GSI).get(), 0, "nothing changed for a new guest");
    assert!(!rig.devices.is_identity_taken());
    rig.devices.bus().mmio_write(Gpa(layout::IDENTITY_MMIO.0.0 + 8), &[7; 8]);
    assert!(rig.devices.is_identity_taken());
    rig.devices.press_power_button().unwrap();
    assert_eq!(rig.wires.line(layout::BUTTON_GSI).get(), 1);
    rig.set_port(layout::POWER_PORT.0, 0x34);
    rig.set_port(layout::POWER_PORT.0 + 2, 1);
    rig.set_port(layout::KEYBOARD_PORT.0, 0xfe);
    assert_eq!(rig.wires.switch.get(), (1, 2));
    assert_eq!((rig.port(0x70), rig.devices.unclaimed()), (0xff, 1));
}
