//! The card itself, with the test as its driver and real tap interfaces at the other end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd::devices::{DeviceConfig, LinkState, LinkWhen, NetConfig, NetStatus, layout};
use forkd::memory::Gpa;
use forkd::tap::Tap;
use forkd::wires::{Devices as _, Identity};
use offshoot_tests::netdriver::{HEADER, MERGE, NetDriver, PLAIN, RING, RINGS};
use offshoot_tests::netns::{Net, Wire, frame};
use offshoot_tests::rng::{Rng, seed};
use offshoot_tests::until;
use offshoot_tests::vmdriver::Rig;

/// The card: the device before it is the random number generator.
const CARD: usize = 1;
const HOST: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
const NO_HEADER: [u8; HEADER] = [0; HEADER];
/// For what must not come.
const A_WHILE: Duration = Duration::from_millis(100);

fn config(tap: Option<&str>, link: LinkWhen) -> DeviceConfig {
    let tap = tap.map(|name| Arc::new(Tap::open(name).expect("a tap")));
    DeviceConfig { net: Some(NetConfig { tap, link }), ..DeviceConfig::default() }
}

fn identity(byte: u8) -> Identity {
    Identity {
        name: format!("vm{byte}"),
        id: uuid::Uuid::from_bytes([byte; 16]),
        generation_id: [byte; 16],
        seed: [byte; 32],
        mac: [2, 0, 0, 0, 0, byte],
    }
}

/// A machine that booted, on an interface `tap` that is made.
fn booted(net: &Net, tap: &str) -> (Rig, Wire) {
    net.tap(tap);
    let rig = Rig::new(&config(Some(tap), LinkWhen::default()));
    rig.devices.identify(&identity(1)).unwrap();
    until("the link is up", || status(&rig).link == LinkState::Up);
    (rig, net.wire(tap))
}

fn status(rig: &Rig) -> NetStatus {
    rig.devices.net().expect("it has a card")
}

/// One frame in each direction arrives as it was.
fn passes(rig: &Rig, driver: &mut NetDriver, wire: &Wire, number: u64) {
    let to = frame([1; 6], HOST, number, 200);
    assert!(wire.send(&to));
    let (came, heads) = driver.expect(rig, "from the host");
    assert!(came == to, "{came:?}");
    heads.iter().for_each(|head| driver.offer(rig, 0, *head));
    let from = frame(HOST, [1; 6], number, 200);
    driver.send(rig, NO_HEADER, &from, 2);
    driver.sent(rig);
    assert!(wire.expect("from the guest") == from);
}

/// Frames of every size arrive whole, in both directions: in one buffer or in several, in one
/// piece or in many; and are counted.
#[test]
fn frames_of_every_size_arrive_whole() {
    let Some(net) = Net::new("frames_of_every_size_arrive_whole") else { return };
    let (rig, wire) = booted(&net, "t0");
    let mut sizes = vec![22, 23, 60, 1514, 2036, 2037, 4083, 4084, 4085, 8999, 9014];
    let mut bytes = 0;
    for (features, buffer) in [(PLAIN, 0x4000), (MERGE, 2048), (!0, 2048)] {
        let mut driver = NetDriver::new(&rig, CARD, features);
        assert_eq!(driver.address(&rig), identity(1).mac);
        assert!(driver.is_up(&rig));
        driver.give(&rig, 0, 24, buffer);
        for (number, len) in (0..).zip(&sizes) {
            let to = frame(identity(1).mac, HOST, number, *len);
            assert!(wire.send(&to));
            let (came, heads) = driver.expect(&rig, "from the host");
            assert!(came == to, "{len} bytes in {heads:?}");
            let wanted = (len + HEADER).div_ceil(usize::try_from(buffer).unwrap());
            assert_eq!(heads.len(), wanted, "{len} bytes");
            heads.iter().for_each(|head| driver.offer(&rig, 0, *head));

            for pieces in [1, 2, 5, 100].into_iter().filter(|p| *p < len + HEADER) {
                let from = frame(HOST, identity(1).mac, number, *len);
                driver.send(&rig, NO_HEADER, &from, u16::try_from(pieces).unwrap());
                driver.sent(&rig);
                assert!(wire.expect("from the guest") == from, "{len} bytes in {pieces}");
                bytes += len;
            }
        }
        sizes.reverse();
    }
    let counts = status(&rig).counts;
    let frames = u64::try_from(3 * sizes.len()).unwrap();
    assert_eq!((counts.received_frames, counts.dropped, counts.broken), (frames, 0, 0));
    let received: usize = sizes.iter().sum();
    assert_eq!(counts.received_bytes, 3 * u64::try_from(received).unwrap());
    assert_eq!(counts.sent_bytes, u64::try_from(bytes).unwrap());
    assert!(rig.wires.line(layout::virtio_gsi(CARD)).get() > 0, "the driver is told");
}

/// A frame that finds too few buffers waits for more, also over a stop, and stays whole; one that
/// can never fit is dropped, and the next one passes.
#[test]
fn a_frame_waits_for_buffers_and_is_not_cut() {
    let Some(net) = Net::new("a_frame_waits_for_buffers_and_is_not_cut") else { return };
    let (rig, wire) = booted(&net, "t0");
    let mut driver = NetDriver::new(&rig, CARD, MERGE);
    driver.give(&rig, 0, 2, 2048);
    let large = frame([1; 6], HOST, 7, 9000);
    assert!(wire.send(&large));
    std::thread::sleep(A_WHILE);
    assert!(driver.receive(&rig).is_none());
    // What is saved now has the buffers in the ring, and the machine goes on with the frame.
    rig.devices.quiesce().unwrap();
    let saved = String::from_utf8(rig.devices.save().unwrap()).unwrap();
    assert!(saved.contains("\"base\":0") && !saved.contains("\"base\":2"), "{saved}");
    rig.devices.resume().unwrap();
    driver.give(&rig, 2, 2, 2048);
    std::thread::sleep(A_WHILE);
    assert!(driver.receive(&rig).is_none());
    driver.give(&rig, 4, 1, 2048);
    let (came, heads) = driver.expect(&rig, "the large one");
    assert!(came == large && heads == [0, 1, 2, 3, 4], "{heads:?}");

    let mut plain = NetDriver::new(&rig, CARD, PLAIN);
    plain.give(&rig, 0, 4, 2048);
    assert!(wire.send(&large) && wire.send(&frame([1; 6], HOST, 8, 300)));
    let (came, heads) = plain.expect(&rig, "the small one");
    assert!(came == frame([1; 6], HOST, 8, 300) && heads == [0], "{heads:?}");
    assert_eq!(status(&rig).counts.dropped, 1);
}

/// What a driver may not ask for is not passed on, and harms nobody.
#[test]
fn frames_that_ask_for_too_much_are_dropped() {
    let Some(net) = Net::new("frames_that_ask_for_too_much_are_dropped") else { return };
    let (rig, wire) = booted(&net, "t0");
    let mut driver = NetDriver::new(&rig, CARD, MERGE);
    driver.give(&rig, 0, 8, 2048);
    let whole = frame(HOST, [1; 6], 1, 100);
    let mut sums = NO_HEADER;
    sums[0] = 1;
    let mut segments = NO_HEADER;
    segments[1] = 1;
    let mut unknown = NO_HEADER;
    unknown[1] = 0x77;
    for (i, header) in (1..).zip([sums, segments, unknown]) {
        driver.send(&rig, header, &whole, 2);
        driver.sent(&rig);
        assert_eq!(status(&rig).counts.dropped, i);
    }
    // Shorter than any frame, and longer than any.
    driver.send(&rig, NO_HEADER, &[0; 5], 1);
    driver.sent(&rig);
    driver.describe(&rig, 1, 0, (0x20_0000, 70_000), 0);
    driver.offer(&rig, 1, 0);
    driver.sent(&rig);
    let counts = status(&rig).counts;
    assert_eq!((counts.dropped, counts.broken, counts.sent_frames), (5, 0, 0));
    assert!(wire.receive(A_WHILE).is_none());
    passes(&rig, &mut driver, &wire, 2);
}

/// Each way to break a ring stops this card, is counted, and is over when the driver starts anew.
#[test]
fn a_lying_driver_breaks_its_own_card_only() {
    let Some(net) = Net::new("a_lying_driver_breaks_its_own_card_only") else { return };
    let (rig, wire) = booted(&net, "t0");
    type Lie = fn(&mut NetDriver, &Rig);
    let lies: [(&str, Lie); 8] = [
        ("a loop to send", |d, rig| {
            (0..RING - 1).for_each(|i| d.describe(rig, 1, i, (0x20_0000, 1), 1));
            d.describe(rig, 1, RING - 1, (0x20_0000, 1), 1);
            rig.ram.write(Gpa(RINGS[1] + 16 * u64::from(RING - 1) + 14), &[0; 2]).unwrap();
            d.offer(rig, 1, 0);
        }),
        ("less than a header", |d, rig| {
            d.describe(rig, 1, 0, (0x20_0000, 11), 0);
            d.offer(rig, 1, 0);
        }),
        ("nothing to send", |d, rig| {
            d.describe(rig, 1, 0, (0x20_0000, 2000), 2);
            d.offer(rig, 1, 0);
        }),
        ("not in memory", |d, rig| {
            d.describe(rig, 1, 0, (u64::MAX - 4, 100), 0);
            d.offer(rig, 1, 0);
        }),
        ("a head outside the ring", |d, rig| d.offer(rig, 1, RING)),
        ("a buffer for less than a header", |d, rig| d.give(rig, 0, 1, 11)),
        ("a buffer that cannot be written", |d, rig| {
            d.describe(rig, 0, 0, (0x20_0000, 2000), 0);
            d.offer(rig, 0, 0);
        }),
        ("a buffer outside memory", |d, rig| {
            d.describe(rig, 0, 0, (0x8000_0000, 2000), 2);
            d.offer(rig, 0, 0);
        }),
    ];
    for (i, (name, lie)) in (1..).zip(lies) {
        let mut driver = NetDriver::new(&rig, CARD, MERGE);
        lie(&mut driver, &rig);
        until(name, || {
            wire.send(&frame([1; 6], HOST, 1, 100));
            driver.is_broken(&rig)
        });
        assert_eq!(status(&rig).counts.broken, i, "{name}");
        let mut again = NetDriver::new(&rig, CARD, MERGE);
        again.give(&rig, 0, 8, 2048);
        // What the host sent meanwhile comes first.
        let mark = frame([1; 6], HOST, u64::MAX, 64);
        assert!(wire.send(&mark));
        until(name, || {
            again.receive(&rig).is_some_and(|(bytes, heads)| {
                heads.iter().for_each(|head| again.offer(&rig, 0, *head));
                bytes[HEADER..] == mark
            })
        });
        passes(&rig, &mut again, &wire, 3);
    }
}

/// A driver that writes anything anywhere breaks at most its own card.
#[test]
fn a_driver_gone_mad_harms_nobody() {
    let Some(net) = Net::new("a_driver_gone_mad_harms_nobody") else { return };
    let seed = seed(0x0e7);
    println!("repeat with: OFFSHOOT_SEED={seed} cargo test --test vm_net a_driver_gone_mad");
    let (rig, wire) = booted(&net, "t0");
    let mut rng = Rng::new(seed);
    let mut broken = 0;
    for _ in 0..200 {
        let mut driver = NetDriver::new(&rig, CARD, rng.any());
        driver.give(&rig, 0, 16, 2048);
        for _ in 0..2 + rng.below(8) {
            let at = 0x10_0000 + 2 * rng.below(0x2_0000);
            rig.ram.write(Gpa(at), &rng.any().to_le_bytes()).unwrap();
            let near = RINGS[usize::from(rng.one_in(2))] + 0x4000 + 2 * rng.below(8);
            rig.ram.write(Gpa(near), &rng.any().to_le_bytes()[..2]).unwrap();
        }
        wire.send(&frame([1; 6], HOST, 1, 3000));
        for _ in 0..8 {
            let value = u32::try_from(rng.below(1 << 32)).unwrap();
            driver.set(&rig, 4 * rng.below(0x60), value);
        }
        driver.set(&rig, 0x50, 0);
        driver.set(&rig, 0x50, 1);
        std::thread::sleep(Duration::from_micros(200));
        broken += u32::from(driver.is_broken(&rig));
    }
    assert!(broken > 0, "no ring was ever broken");
    while wire.receive(Duration::from_millis(20)).is_some() {}
    let mut driver = NetDriver::new(&rig, CARD, MERGE);
    driver.give(&rig, 0, 64, 2048);
    let mark = frame([1; 6], HOST, 9, 64);
    assert!(wire.send(&mark));
    until("the card works again", || {
        driver.receive(&rig).is_some_and(|(bytes, heads)| {
            heads.iter().for_each(|head| driver.offer(&rig, 0, *head));
            bytes[HEADER..] == mark
        })
    });
    passes(&rig, &mut driver, &wire, 3);
}

/// A saved machine goes on as another one, on another interface: frames that the first one had
/// under way are not sent again, its driver sees the link go down and come up, and nothing passes
/// before the guest knows who it is.
#[test]
fn a_restored_machine_is_another_station() {
    let Some(net) = Net::new("a_restored_machine_is_another_station") else { return };
    let (rig, first) = booted(&net, "t0");
    net.tap("t1");
    let mut driver = NetDriver::new(&rig, CARD, MERGE);
    driver.give(&rig, 0, 8, 2048);
    passes(&rig, &mut driver, &first, 1);
    rig.devices.quiesce().unwrap();
    // Asked for after the stop: it waits in the ring of both machines.
    driver.send(&rig, NO_HEADER, &frame(HOST, [1; 6], 2, 300), 1);
    assert!(first.send(&frame([1; 6], HOST, 3, 300)));
    let state = rig.devices.save().unwrap();
    let ram = rig.ram.clone();
    drop(rig);
    assert!(!net.is_connected("t0"), "the host sees that nobody is there");

    let child = Rig::over(&config(Some("t1"), LinkWhen::Identified), ram);
    let wire = net.wire("t1");
    child.devices.restore(&state, &identity(2)).unwrap();
    assert_eq!(child.devices.save().unwrap(), state, "saved again it is the same");
    let told = child.wires.line(layout::virtio_gsi(CARD));
    assert_eq!(told.get(), 0);
    child.devices.resume().unwrap();
    assert!(told.get() > 0 && driver.get(&child, 0x60) & 2 != 0, "it is told of a change");
    driver.sent(&child);
    assert_eq!(driver.address(&child), identity(2).mac);
    assert_eq!((status(&child).link, driver.is_up(&child)), (LinkState::WaitsForIdentity, false));
    driver.send(&child, NO_HEADER, &frame(HOST, [2; 6], 4, 300), 1);
    driver.sent(&child);
    assert!(!net.is_connected("t1") && wire.receive(A_WHILE).is_none());
    assert!(driver.receive(&child).is_none());
    assert_eq!(status(&child).counts.dropped, 2);

    let generation = identity(2).generation_id;
    let acknowledge = Gpa(layout::IDENTITY_MMIO.0.0 + 8);
    child.devices.bus().mmio_write(acknowledge, &[1; 8]);
    std::thread::sleep(A_WHILE);
    assert_eq!(status(&child).link, LinkState::WaitsForIdentity, "that was another identity");
    driver.set(&child, 0x64, 3);
    child.devices.bus().mmio_write(acknowledge, &generation[..8]);
    until("the link is up", || status(&child).link == LinkState::Up);
    until("the host sees it", || net.is_connected("t1"));
    assert!(driver.get(&child, 0x60) & 2 != 0 && driver.is_up(&child));
    passes(&child, &mut driver, &wire, 5);
    assert!(first.receive(A_WHILE).is_none());
}

/// Without waiting for the guest's identity the driver has to see the link down all the same; a
/// driver that does not look at links need not; without an interface there is no link.
#[test]
fn the_link_goes_down_for_every_driver_that_looks() {
    let Some(net) = Net::new("the_link_goes_down_for_every_driver_that_looks") else { return };
    for (features, tap, link, before) in [
        (MERGE, Some("t1"), LinkWhen::AtOnce, LinkState::WaitsForDriver),
        (MERGE & !(1 << 16), Some("t2"), LinkWhen::AtOnce, LinkState::Up),
        (MERGE, None, LinkWhen::AtOnce, LinkState::NoTap),
    ] {
        tap.iter().for_each(|tap| net.tap(tap));
        let rig = Rig::new(&config(None, LinkWhen::default()));
        assert_eq!(status(&rig).link, LinkState::NoTap);
        let mut driver = NetDriver::new(&rig, CARD, features);
        driver.give(&rig, 0, 8, 2048);
        rig.devices.quiesce().unwrap();
        let (state, ram) = (rig.devices.save().unwrap(), rig.ram.clone());
        drop(rig);
        let child = Rig::over(&config(tap, link), ram);
        child.devices.restore(&state, &identity(2)).unwrap();
        child.devices.resume().unwrap();
        if before == LinkState::Up {
            until("the link is up", || status(&child).link == before);
        } else {
            std::thread::sleep(A_WHILE);
            assert_eq!(status(&child).link, before);
            assert!(!driver.is_up(&child), "it sees the link down first");
        }
        let Some(tap) = tap else {
            assert!(!driver.is_up(&child));
            continue;
        };
        until("the link is up", || driver.is_up(&child));
        passes(&child, &mut driver, &net.wire(tap), 1);
    }
}

/// An interface that is removed under a machine is a link that goes down: the guest is told, and
/// what it sends goes nowhere.
#[test]
fn an_interface_that_is_removed_is_a_link_that_goes_down() {
    let Some(net) = Net::new("an_interface_that_is_removed_is_a_link_that_goes_down") else {
        return;
    };
    let (rig, wire) = booted(&net, "t0");
    let mut driver = NetDriver::new(&rig, CARD, MERGE);
    driver.give(&rig, 0, 8, 2048);
    passes(&rig, &mut driver, &wire, 1);
    // One that is only taken down takes no frames, and may come back.
    net.link(&["set", "t0", "down"]);
    driver.send(&rig, NO_HEADER, &frame(HOST, [1; 6], 2, 100), 1);
    driver.sent(&rig);
    assert_eq!((status(&rig).link, status(&rig).counts.dropped), (LinkState::Up, 1));
    net.link(&["set", "t0", "up"]);
    while wire.receive(A_WHILE).is_some() {}
    passes(&rig, &mut driver, &wire, 3);

    driver.set(&rig, 0x64, 3);
    net.link(&["del", "t0"]);
    until("the link is down", || status(&rig).link == LinkState::TapGone);
    assert!(!driver.is_up(&rig) && driver.get(&rig, 0x60) & 2 != 0);
    for i in 0..600 {
        driver.send(&rig, NO_HEADER, &frame(HOST, [1; 6], i, 100), 1);
        driver.sent(&rig);
    }
    assert_eq!(status(&rig).counts.dropped, 601);
    rig.devices.quiesce().unwrap();
    rig.devices.resume().unwrap();
}

/// A machine is stopped again and again under traffic in both directions: each stop is short, and
/// no frame is lost or done twice.
#[test]
fn stops_under_traffic_lose_nothing() {
    let Some(net) = Net::new("stops_under_traffic_lose_nothing") else { return };
    let (rig, wire) = booted(&net, "t0");
    let mut driver = NetDriver::new(&rig, CARD, MERGE);
    driver.give(&rig, 0, 64, 2048);
    let (mut sent, mut came, mut echoed, mut longest) = (0u64, 0u64, 0u64, Duration::ZERO);
    let start = Instant::now();
    while came < 3000 {
        while sent < came + 16 {
            assert!(wire.send(&frame([1; 6], HOST, sent, 100 + usize::from(sent % 7 == 0) * 3000)));
            sent += 1;
        }
        if came % 10 == 3 {
            let before = Instant::now();
            rig.devices.quiesce().unwrap();
            rig.devices.save().unwrap();
            rig.devices.resume().unwrap();
            longest = longest.max(before.elapsed());
        }
        while let Some((bytes, heads)) = driver.receive(&rig) {
            let number = u64::from_le_bytes(bytes[HEADER + 14..][..8].try_into().unwrap());
            assert_eq!(number, came, "in order, each once");
            heads.iter().for_each(|head| driver.offer(&rig, 0, *head));
            driver.send(&rig, NO_HEADER, &bytes[HEADER..], 3);
            driver.sent(&rig);
            came += 1;
        }
        while let Some(back) = wire.receive(Duration::ZERO) {
            assert_eq!(u64::from_le_bytes(back[14..22].try_into().unwrap()), echoed);
            echoed += 1;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{came} of {sent}");
    }
    until("all of them are back", || {
        echoed += u64::from(wire.receive(Duration::ZERO).is_some());
        echoed == came
    });
    assert!(longest < Duration::from_secs(1), "a stop took {longest:?}");
    assert_eq!(status(&rig).counts.dropped, 0);
}
