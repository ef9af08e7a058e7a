//! The device alone, with the test as its guest.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd::devices::{DeviceSet, DiskPath, layout};
use forkd::memory::{Gpa, GuestRam, PAGE};
use forkd::wires::Devices as _;
use format::Kind;
use offshoot_tests::daemon::{Daemon, program};
use offshoot_tests::rng::{Rng, seed};
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use offshoot_tests::vm::{kill, stop};
use offshoot_tests::vmdriver::{
    Ask, DATA, Driver, LEN_MAX, Rig, TestWires, line, one_disk_by, register, set_register,
};
use offshoot_tests::vmload::Load;
use rustix::process::Signal;
use vhost_blk::client::FrontEnd;
use vhost_blk::proto::{feature, request};

const SIZE: u64 = 64 << 20;
/// Every ring feature that a kernel of today accepts.
const ALL: u64 = !0;
/// The switch of the cache mode.
const CONFIG_WCE: u64 = 1 << 11;

fn served() -> (ServedDisk, Daemon) {
    let disk = ServedDisk::new(TestStore::new());
    let daemon = disk.daemon();
    disk.attach();
    (disk, daemon)
}

fn rig(disk: &ServedDisk) -> Rig {
    Rig::new(&one_disk_by(DiskPath::Direct, &disk.socket()))
}

fn path(rig: &Rig) -> DiskPath {
    rig.devices.disks()[0].path
}

fn told_seed(default: u64, test: &str) -> u64 {
    let seed = seed(default);
    println!("repeat with: OFFSHOOT_SEED={seed} cargo test --test vm_direct {test}");
    seed
}

/// Whether a process maps the memory of a guest.
fn maps_guest_memory(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().contains("memfd:guest-memory")
}

/// Ends the daemon in order, and compares the disk with what a load wrote.
fn compare(rig: Rig, daemon: Daemon, disk: &ServedDisk, load: &Load) {
    drop(rig);
    assert!(daemon.terminate().success());
    assert!(disk.read("vm") == load.model(), "the disk holds something else");
}

/// blockd has the memory and the ring, and the interrupt comes with its cause. When the machine
/// goes, blockd lets go.
#[test]
fn blockd_works_in_guest_memory() {
    let (disk, daemon) = served();
    let rig = rig(&disk);
    let mut driver = Driver::new(&rig, ALL);
    assert_eq!(path(&rig), DiskPath::Direct);
    assert!(maps_guest_memory(daemon.pid()) && rig.devices.lends_memory());
    let mut load = Load::new(told_seed(0xd1, "blockd_works"), SIZE);
    load.run(&rig, &mut driver, 300);
    load.finish(&rig, &mut driver);
    assert!(line(&rig).get() > 0);
    assert_eq!(register(&rig, 0x60) & 1, 1, "a driver is told what the interrupt was for");
    let (status, serial) = driver.run(&rig, Ask::Id, 0, &[0; 20]);
    assert!(status == 0 && serial.starts_with(b"vm"), "{status} {serial:?}");
    assert_eq!(driver.run(&rig, Ask::Read, SIZE, &[0; 512]).0, 1);
    drop(rig);
    until("blockd has let go", || !maps_guest_memory(daemon.pid()));
    assert!(daemon.terminate().success());
    assert!(disk.read("vm") == load.model(), "the disk holds something else");
}

/// blockd is killed while requests are at work, twice: the guest waits, each request is done once,
/// and nothing else takes over meanwhile.
#[test]
fn requests_survive_the_death_of_blockd() {
    let (disk, daemon) = served();
    let rig = rig(&disk);
    let mut driver = Driver::new(&rig, ALL);
    let mut load = Load::new(told_seed(0xd2, "requests_survive"), SIZE);
    load.run(&rig, &mut driver, 300);
    let mut daemon = Some(daemon);
    for _ in 0..3 {
        load.fill(&rig, &mut driver, 40);
        driver.kick(&rig);
        daemon.take().expect("one runs").kill();
        until("the loss is noticed", || !rig.devices.disks()[0].connected);
        assert_eq!(path(&rig), DiskPath::Direct);
        // Asked for while nobody is there.
        load.fill(&rig, &mut driver, 44);
        driver.kick(&rig);
        daemon = Some(disk.daemon());
        load.run(&rig, &mut driver, 200);
    }
    load.finish(&rig, &mut driver);
    compare(rig, daemon.expect("one runs"), &disk, &load);
}

/// A machine stands and goes on, with its ring full: nothing is in work while it stands, blockd
/// writes nothing to its memory, and what was asked for meanwhile is done afterwards. Also when
/// blockd dies while it stands.
#[test]
fn a_machine_that_stands_has_no_request_in_work() {
    let (disk, daemon) = served();
    let rig = rig(&disk);
    let mut driver = Driver::new(&rig, ALL);
    let mut load = Load::new(told_seed(0xd3, "a_machine_that_stands"), SIZE);
    let mut daemon = Some(daemon);
    for round in 0..12 {
        load.run(&rig, &mut driver, 40);
        load.fill(&rig, &mut driver, 40);
        driver.kick(&rig);
        rig.devices.quiesce().unwrap();
        assert_eq!(rig.devices.disks()[0].in_work, 0);
        let whole = |rig: &Rig| {
            let mut bytes = vec![0; usize::try_from(rig.ram.size()).unwrap()];
            rig.ram.read(Gpa(0), &mut bytes).unwrap();
            bytes
        };
        load.fill(&rig, &mut driver, 46);
        driver.kick(&rig);
        let before = whole(&rig);
        if round % 4 == 3 {
            daemon.take().expect("one runs").kill();
            daemon = Some(disk.daemon());
        }
        std::thread::sleep(Duration::from_millis(5));
        assert!(before == whole(&rig), "somebody writes while the machine stands");
        rig.devices.resume().unwrap();
    }
    load.run(&rig, &mut driver, 100);
    load.finish(&rig, &mut driver);
    compare(rig, daemon.expect("one runs"), &disk, &load);
}

/// blockd is replaced under load, again and again.
#[test]
fn blockd_is_upgraded_in_place() {
    let (disk, daemon) = served();
    let rig = rig(&disk);
    let mut driver = Driver::new(&rig, ALL);
    let mut load = Load::new(told_seed(0xd4, "blockd_is_upgraded"), SIZE);
    let program = program("blockd");
    let args = ["daemon", "upgrade", "--program", program.to_str().unwrap()];
    for _ in 0..3 {
        load.run(&rig, &mut driver, 100);
        load.fill(&rig, &mut driver, 40);
        driver.kick(&rig);
        std::thread::scope(|s| {
            let upgrade = s.spawn(|| disk.done(&args));
            while !upgrade.is_finished() {
                load.run(&rig, &mut driver, 10);
            }
        });
        load.run(&rig, &mut driver, 100);
    }
    // Also right after one, when the old process may still be about to end.
    assert_eq!(rig.devices.take_memory_back().unwrap(), ["vm"]);
    load.run(&rig, &mut driver, 100);
    load.finish(&rig, &mut driver);
    drop((rig, daemon));
    disk.done(&["daemon", "stop"]);
    assert!(disk.read("vm") == load.model(), "the disk holds something else");
}

/// Memory is had back under load: every request is done once, in front of a guest that sees nothing
/// but a pause, and blockd maps nothing afterwards. Paused, running, idle, and with blockd killed
/// right before or after.
#[test]
fn a_disk_changes_to_an_arena_under_load() {
    let seed = told_seed(0xd5, "a_disk_changes");
    let mut rng = Rng::new(seed);
    for round in 0..8 {
        let (disk, daemon) = served();
        let rig = rig(&disk);
        let mut driver = Driver::new(&rig, ALL);
        let mut load = Load::new(seed + round, SIZE);
        load.run(&rig, &mut driver, 100);
        let mut daemon = Some(daemon);
        if round == 5 {
            load.fill(&rig, &mut driver, 40);
            driver.kick(&rig);
            daemon.take().expect("one runs").kill();
            daemon = Some(disk.daemon());
        }
        if round == 6 {
            rig.devices.quiesce().unwrap();
            load.fill(&rig, &mut driver, 40);
        }
        let after = Duration::from_micros(rng.below(3000));
        let took = std::thread::scope(|s| {
            let back = s.spawn(|| {
                std::thread::sleep(after);
                let start = Instant::now();
                assert_eq!(rig.devices.take_memory_back().unwrap(), ["vm"]);
                start.elapsed()
            });
            while round != 6 && !back.is_finished() {
                load.run(&rig, &mut driver, 1);
            }
            back.join().unwrap()
        });
        println!("round {round}: {took:?}");
        assert_eq!(path(&rig), DiskPath::Arena);
        let pid = daemon.as_ref().expect("one runs").pid();
        assert!(!maps_guest_memory(pid), "blockd still maps guest memory");
        assert!(!rig.devices.lends_memory());
        assert_eq!(rig.devices.take_memory_back().unwrap(), [""; 0], "once is enough");
        if round == 6 {
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(rig.devices.disks()[0].in_work, 0, "it stands as before");
            rig.devices.resume().unwrap();
        }
        if round == 7 {
            daemon.take().expect("one runs").kill();
            daemon = Some(disk.daemon());
        }
        load.run(&rig, &mut driver, 200);
        load.finish(&rig, &mut driver);
        compare(rig, daemon.expect("one runs"), &disk, &load);
    }
}

/// When memory cannot be had back, that is said by name, and the disk goes on as it was.
#[test]
fn a_disk_that_cannot_change_stays_as_it_is() {
    let (disk, daemon) = served();
    let rig = rig(&disk);
    let mut driver = Driver::new(&rig, ALL);
    let mut load = Load::new(told_seed(0xd6, "a_disk_that_cannot_change"), SIZE);
    load.run(&rig, &mut driver, 50);
    // blockd is there and does not answer.
    stop(daemon.pid());
    load.fill(&rig, &mut driver, 40);
    driver.kick(&rig);
    let refused = rig.devices.take_memory_back().unwrap_err();
    assert_eq!(refused.kind(), Kind::Busy);
    assert!(refused.to_string().contains("disk vm"), "{refused}");
    assert_eq!(path(&rig), DiskPath::Direct);
    kill(daemon.pid(), Signal::CONT);
    load.run(&rig, &mut driver, 100);
    // blockd is not there.
    load.fill(&rig, &mut driver, 40);
    driver.kick(&rig);
    daemon.kill();
    rig.devices.take_memory_back().unwrap_err();
    assert_eq!(path(&rig), DiskPath::Direct);
    let daemon = disk.daemon();
    load.run(&rig, &mut driver, 100);
    assert_eq!(rig.devices.take_memory_back().unwrap(), ["vm"]);
    load.run(&rig, &mut driver, 100);
    load.finish(&rig, &mut driver);
    compare(rig, daemon, &disk, &load);
}

/// A driver that resets its device finds nobody in its memory, and its successor's requests are
/// not disturbed by those before: also when blockd is killed around it.
#[test]
fn a_reset_waits_until_blockd_is_out_of_memory() {
    let (disk, daemon) = served();
    let rig = rig(&disk);
    let mut daemon = Some(daemon);
    let mut load = Load::new(told_seed(0xd7, "a_reset_waits"), SIZE);
    for round in 0..12 {
        let mut driver = Driver::new(&rig, ALL);
        load.run(&rig, &mut driver, 20);
        load.fill(&rig, &mut driver, 40);
        driver.kick(&rig);
        if round % 4 == 3 {
            daemon.take().expect("one runs").kill();
        }
        set_register(&rig, 0x70, 0);
        let len = usize::try_from(LEN_MAX * 48).unwrap();
        rig.ram.write(Gpa(DATA), &vec![0xa5; len]).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let mut now = vec![0; len];
        rig.ram.read(Gpa(DATA), &mut now).unwrap();
        assert!(now.iter().all(|b| *b == 0xa5), "round {round}: written after the reset");
        if daemon.is_none() {
            daemon = Some(disk.daemon());
        }
        // What the lost writes left is not known; it is written again.
        let mut driver = Driver::new(&rig, ALL);
        for (offset, len) in load.forget() {
            let at = usize::try_from(offset).unwrap();
            let data = load.model()[at..at + len].to_vec();
            assert_eq!(driver.run(&rig, Ask::Write, offset, &data).0, 0);
        }
    }
    let mut driver = Driver::new(&rig, ALL);
    load.run(&rig, &mut driver, 50);
    load.finish(&rig, &mut driver);
    compare(rig, daemon.expect("one runs"), &disk, &load);
}

/// The cache mode that blockd shows to who asks before anything is negotiated.
fn mode_at_blockd(disk: &ServedDisk) -> u8 {
    let mut front = FrontEnd::connect(&disk.socket()).unwrap();
    front.tell(request::SET_OWNER, &[0u8; 0], &[]).unwrap();
    front.tell(request::SET_PROTOCOL_FEATURES, &feature::CONFIG, &[]).unwrap();
    // Offset, number of bytes, flags, and room for one byte.
    let asked = [&[32u32, 1, 0].map(u32::to_ne_bytes).concat()[..], &[0]].concat();
    *front.ask_bytes(request::GET_CONFIG, &asked).unwrap().last().unwrap()
}

/// The guest's flushes reach blockd, and so does its choice of the cache mode, before the access
/// ends with which it was made; it outlives blockd.
#[test]
fn flushes_and_the_cache_mode_reach_blockd() {
    let (disk, daemon) = served();
    let rig = rig(&disk);
    let mut driver = Driver::new(&rig, ALL);
    assert_ne!(driver.features & CONFIG_WCE, 0);
    let flushes = |daemon: &Daemon| {
        let text = String::from_utf8(daemon.ask("GET", "/metrics", b"").body).unwrap();
        let line = text
            .lines()
            .find(|l| l.starts_with("offshoot_disk_requests_total{") && l.contains("flush"));
        let count = line.and_then(|l| l.rsplit(' ').next()?.parse::<u64>().ok());
        count.unwrap_or_else(|| panic!("no flushes are counted: {text}"))
    };
    let before = flushes(&daemon);
    for _ in 0..3 {
        assert_eq!(driver.run(&rig, Ask::Write, 0, &[1; 4096]).0, 0);
        assert_eq!(driver.run(&rig, Ask::Flush, 0, &[]).0, 0);
    }
    assert_eq!(flushes(&daemon), before + 3);

    let set_mode = |mode: u8| {
        let at = Gpa(layout::virtio_mmio(1).0 + 0x100 + 32);
        rig.devices.bus().mmio_write(at, &[mode]);
    };
    assert_eq!(mode_at_blockd(&disk), 1);
    set_mode(0);
    assert_eq!(mode_at_blockd(&disk), 0);
    assert_eq!(driver.run(&rig, Ask::Write, 0, &[2; 4096]).0, 0);
    daemon.kill();
    let daemon = disk.daemon();
    assert_eq!(driver.run(&rig, Ask::Write, 0, &[3; 4096]).0, 0);
    assert_eq!(mode_at_blockd(&disk), 0);
    // Switched while nobody is there: it goes with the ring.
    daemon.kill();
    until("the loss is noticed", || !rig.devices.disks()[0].connected);
    set_mode(1);
    let daemon = disk.daemon();
    assert_eq!(driver.run(&rig, Ask::Write, 0, &[4; 4096]).0, 0);
    assert_eq!(mode_at_blockd(&disk), 1);
    // An arena flushes by itself, and blockd is left in write-back mode.
    set_mode(0);
    assert_eq!(rig.devices.take_memory_back().unwrap(), ["vm"]);
    assert_eq!(mode_at_blockd(&disk), 1);
    let before = flushes(&daemon);
    assert_eq!(driver.run(&rig, Ask::Write, 0, &[5; 4096]).0, 0);
    assert_eq!(flushes(&daemon), before + 1);
}

/// A resize shows under the guest.
#[test]
fn a_resize_shows() {
    let (disk, _daemon) = served();
    let rig = rig(&disk);
    let mut driver = Driver::new(&rig, ALL);
    disk.done(&["disk", "resize", "vm", "128M"]);
    until("the guest is told", || register(&rig, 0x60) & 2 != 0);
    assert_eq!(u64::from(register(&rig, 0x100)), 2 * SIZE / 512);
    assert_eq!(driver.run(&rig, Ask::Write, SIZE, &[7; 512]).0, 0);
    assert_eq!(driver.run(&rig, Ask::Read, SIZE, &[0; 512]), (0, vec![7; 512]));
}

/// A driver that lies about its ring breaks its own device, is told so, and can start again.
#[test]
fn a_lying_driver_breaks_only_its_own_device() {
    let mut rng = Rng::new(told_seed(0xd8, "a_lying_driver"));
    let (disk, _daemon) = served();
    let rig = rig(&disk);
    let mut broken = 0;
    for _ in 0..100 {
        let mut driver = Driver::new(&rig, rng.any());
        for _ in 0..4 {
            driver.submit(&rig, Ask::Write, 512 * rng.below(1000), &[1; 4096]);
        }
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
        std::thread::sleep(Duration::from_millis(2));
        broken += u32::from(register(&rig, 0x70) & 64 != 0);
    }
    assert!(broken > 0, "no ring was ever broken");
    let mut driver = Driver::new(&rig, ALL);
    let data = vec![0x5a; 8192];
    assert_eq!(driver.run(&rig, Ask::Write, 1 << 20, &data).0, 0);
    // A broken ring can be left behind as well.
    rig.ram.write(Gpa(0x10_4002), &[0xff; 2]).unwrap();
    driver.kick(&rig);
    until("it is told", || register(&rig, 0x70) & 64 != 0);
    assert_eq!(rig.devices.take_memory_back().unwrap(), ["vm"]);
    let mut driver = Driver::new(&rig, ALL);
    assert_eq!(driver.run(&rig, Ask::Read, 1 << 20, &vec![0; 8192]), (0, data));
}

/// Memory that is not one shared file, and a disk that only forkd could keep a guest from writing,
/// are refused by name: nothing else takes the place of what was asked for.
#[test]
fn what_cannot_be_direct_is_refused() {
    let (disk, _daemon) = served();
    let mut config = one_disk_by(DiskPath::Direct, &disk.socket());
    let wires = TestWires::default();
    let own = Arc::new(GuestRam::reserve(64 * PAGE).unwrap());
    let refused = DeviceSet::new(&config, &own, &wires).unwrap_err();
    assert_eq!(refused.kind(), Kind::Unsupported);
    let text = refused.to_string();
    assert!(text.contains("disk vm") && text.contains("without `direct`"), "{text}");

    config.disks[0].read_only = true;
    let shared = Arc::new(GuestRam::new(64 * PAGE).unwrap());
    let refused = DeviceSet::new(&config, &shared, &wires).unwrap_err();
    assert!(refused.to_string().contains("served for writing"), "{refused}");
}
