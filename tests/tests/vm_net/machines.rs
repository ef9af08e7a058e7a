//! Machines with network cards, by the command line: their interfaces, their children's, and what
//! passes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use offshoot_tests::netns::{Net, Wire, frame};
use offshoot_tests::until;
use offshoot_tests::vm::{Console, Lab, word};

const HOST: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
const ALL: [u8; 6] = [0xff; 6];
/// For what must not come.
const A_WHILE: Duration = Duration::from_millis(150);

fn lab(test: &str) -> Option<(Net, Lab)> {
    // First the network: the daemons live in it.
    let net = Net::new(test)?;
    Some((net, Lab::new(test)?))
}

fn run(lab: &Lab, name: &str, net: &str, disks: &[&str]) -> Console {
    let kernel = lab.store.path("kernel");
    let kernel = kernel.to_str().unwrap();
    let mut args = vec!["vm", "run", name, "--kernel", kernel, "--mem", "32M", "--net", net];
    args.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
    lab.done(&args);
    let mut console = lab.console(name);
    assert_eq!(console.hear("= "), "= ready");
    console
}

/// How `vm show` says the link is.
fn link(lab: &Lab, name: &str) -> String {
    lab.show(name)["net"]["status"]["link"].as_str().expect("it has a card").to_owned()
}

fn is_up(lab: &Lab, name: &str) {
    until("the link is up", || link(lab, name) == "up");
}

fn mac(lab: &Lab, name: &str) -> [u8; 6] {
    let text = lab.show(name)["mac"].as_str().expect("an address").to_owned();
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16).expect("a byte"));
    bytes.collect::<Vec<_>>().try_into().expect("six of them")
}

fn sender(frame: &[u8]) -> [u8; 6] {
    frame[6..12].try_into().unwrap()
}

fn number(frame: &[u8]) -> u64 {
    u64::from_le_bytes(frame[14..22].try_into().unwrap())
}

/// A guest that echoes sends a frame back.
fn echoes(wire: &Wire, from: [u8; 6], number: u64, len: usize) {
    assert!(wire.send(&frame(ALL, HOST, number, len)));
    let back = wire.expect("the echo");
    assert!(back == frame(HOST, from, number, len), "{back:?}");
}

/// A guest sends and receives, frames of several sizes; the interface shows it, the metrics count
/// it, a daemon that starts again knows it, and the interface is free when the machine is gone.
#[test]
fn a_machine_has_a_network_card() {
    let Some((net, mut lab)) = lab("a_machine_has_a_network_card") else { return };
    net.tap("t0");
    lab.disk("data");
    let mut console = run(&lab, "web1", "tap=t0", &["data"]);
    let wire = net.wire("t0");
    is_up(&lab, "web1");
    let mac = mac(&lab, "web1");
    for (count, len) in [(3u64, 60u64), (2, 1514), (2, 9014)] {
        let told = console.ask(&format!("h {count} {len}"));
        assert_eq!((word(&told, "link"), word(&told, "cause") != "0"), ("1".into(), true));
        for _ in 0..count {
            let came = wire.expect("from the guest");
            assert!(came == frame(ALL, mac, number(&came), usize::try_from(len).unwrap()));
        }
    }
    assert_eq!(console.ask("j"), "echoing");
    for (i, len) in (0..).zip([60, 100, 1514, 2036, 2037, 9014].repeat(20)) {
        echoes(&wire, mac, i, len);
    }
    lab.kill_forkd();
    lab.start_forkd();
    echoes(&wire, mac, 7, 100);
    lab.done(&["vm", "pause", "web1"]);
    assert!(wire.send(&frame(ALL, HOST, 8, 100)));
    assert!(wire.receive(A_WHILE).is_none());
    lab.done(&["vm", "resume", "web1"]);
    assert!(wire.expect("what waited") == frame(HOST, mac, 8, 100));
    console.say("");
    let told = console.hear("= link");
    assert_eq!((word(&told, "got"), word(&told, "wrong")), ("122".into(), "0".into()));

    let vm = lab.show("web1");
    let status = &vm["net"]["status"];
    assert_eq!((&vm["net"]["tap"], &status["received_frames"]), (&"t0".into(), &122.into()));
    assert_eq!((&status["sent_frames"], &status["dropped"]), (&129.into(), &0.into()));
    assert!(lab.done(&["vm", "show", "web1"]).contains("interface t0, link up; received 122"));
    let metrics = offshoot_tests::daemon::ask(&lab.forkd_api(), "GET", "/metrics", b"").unwrap();
    let metrics = String::from_utf8(metrics.body).unwrap();
    assert!(metrics.contains("forkd_vm_net_sent_frames_total{vm=\"web1\"} 129"), "{metrics}");
    lab.done(&["vm", "rm", "web1", "--force"]);
    assert!(!net.is_connected("t0"));
    run(&lab, "web2", "tap=t0", &[]);
}

/// An interface that cannot be had is refused by name, with what to do, and nothing is left.
#[test]
fn interfaces_that_cannot_be_had_are_named() {
    let Some((net, lab)) = lab("interfaces_that_cannot_be_had_are_named") else { return };
    net.tap("t0");
    run(&lab, "web1", "tap=t0", &[]);
    run(&lab, "bare", "none", &[]);
    assert_eq!(link(&lab, "bare"), "no-tap");
    lab.run("old", &[]);
    lab.settle();
    let before = lab.traces();
    let kernel = lab.store.path("kernel");
    let boot = ["vm", "run", "new", "--kernel", kernel.to_str().unwrap(), "--mem", "32M"];
    let refused = |args: &[&str], kind: &str, says: &[&str]| {
        let message = lab.refused(args, kind);
        says.iter().for_each(|word| assert!(message.contains(word), "{word:?}: {message}"));
        lab.settle();
        assert_eq!(lab.traces(), before, "{args:?}");
    };
    let run_on = |tap: &str, kind: &str, says: &[&str]| {
        refused(&[&boot[..], &["--net", &format!("tap={tap}")]].concat(), kind, says);
    };
    run_on("t9", "not-found", &["interface t9", "vm new"]);
    run_on("t0", "in-use", &["interface t0"]);
    run_on("lo", "invalid", &["interface lo", "no tap"]);
    run_on("a-name-too-long-by-far", "invalid", &["15 characters"]);
    let output = lab.offshoot(&[&boot[..], &["--net", "tap=t9"]].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("ip tuntap add dev t9 mode tap"), "{said}");
    assert!(!lab.offshoot(&[&boot[..], &["--net", "t9"]].concat()).status.success());

    let fork = |parent: &str, tap: &str, kind: &str, says: &[&str]| {
        let net = format!("tap={tap}");
        refused(&["vm", "fork", parent, "a", "b", "--net", &net], kind, says);
    };
    fork("web1", "t1", "invalid", &["interface t1", "same interface"]);
    fork("web1", "t-{name}", "not-found", &["interface t-a"]);
    fork("old", "t-{name}", "invalid", &["no network card"]);
    // One of two is there: neither child is made, and the one interface is free again.
    net.tap("t-a");
    fork("web1", "t-{name}", "not-found", &["interface t-b"]);
    net.tap("t-b");
    lab.done(&["vm", "fork", "web1", "a", "b", "--net", "tap=t-{name}"]);
}

/// A parent's traffic goes on over forks, without a loss. Its children have interfaces and
/// addresses of their own, are not heard before they know who they are, and never by the parent's
/// interface; who gets no interface has no link.
#[test]
fn children_are_stations_of_their_own() {
    let Some((net, lab)) = lab("children_are_stations_of_their_own") else { return };
    ["t0", "t-a", "t-b"].iter().for_each(|tap| net.tap(tap));
    let mut console = run(&lab, "p", "tap=t0", &[]);
    let [wire, of_a, of_b] = ["t0", "t-a", "t-b"].map(|tap| net.wire(tap));
    is_up(&lab, "p");
    let parent = mac(&lab, "p");
    assert_eq!(console.ask("j"), "echoing");
    let ending = AtomicBool::new(false);
    let echoed = std::thread::scope(|s| {
        let traffic = s.spawn(|| {
            let mut number = 0;
            while !ending.load(Ordering::Relaxed) {
                echoes(&wire, parent, number, 60 + usize::try_from(number % 9 * 300).unwrap());
                number += 1;
            }
            number
        });
        // Twice: the second time only what was written since the first is copied.
        lab.done(&["vm", "fork", "p", "none1"]);
        std::thread::sleep(A_WHILE);
        lab.done(&["vm", "fork", "p", "a", "b", "--net", "tap=t-{name}"]);
        std::thread::sleep(A_WHILE);
        ending.store(true, Ordering::Relaxed);
        traffic.join().unwrap()
    });
    assert!(echoed > 5, "{echoed}");
    assert_eq!(link(&lab, "none1"), "no-tap");
    assert_eq!(lab.show("p")["net"]["status"]["dropped"], 0);

    for (name, own) in [("a", &of_a), ("b", &of_b)] {
        let address = mac(&lab, name);
        assert_ne!(address, parent);
        assert_eq!(link(&lab, name), "waits-for-identity");
        assert!(!net.is_connected(&format!("t-{name}")));
        let mut child = lab.console(name);
        child.say("");
        let told = child.hear("= link");
        assert_eq!((word(&told, "link"), word(&told, "wrong")), ("0".into(), "0".into()));
        let cause: u64 = word(&told, "cause").parse().unwrap();
        assert_eq!(cause & 2, 2, "the driver is told to look");
        // It sends as its parent did, and is not heard.
        child.ask("h 5 100");
        assert!(own.receive(A_WHILE).is_none());
        child.ask("a");
        is_up(&lab, name);
        assert!(net.is_connected(&format!("t-{name}")));
        let told = child.ask("z");
        let own_address: String = address.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!((word(&told, "link"), word(&told, "address")), ("1".into(), own_address));
        assert_eq!(child.ask("j"), "echoing");
        (0..20).for_each(|i| echoes(own, address, i, 60 + 400 * usize::try_from(i).unwrap()));
        // And perhaps an echo that its parent had under way.
        assert!(lab.show(name)["net"]["status"]["dropped"].as_u64().unwrap() >= 5);
    }
    echoes(&wire, parent, 1, 100);
    assert!(wire.receive(A_WHILE).is_none(), "nothing of a child came here");
    console.say("");
    let told = console.hear("= link");
    assert_eq!(word(&told, "got"), (echoed + 1).to_string());
    assert_eq!(word(&told, "wrong"), "0");
}

/// Who has no agent need not be waited for, if that is said; and a child's child is another one
/// again.
#[test]
fn a_link_comes_up_at_once_if_that_is_wanted() {
    let Some((net, lab)) = lab("a_link_comes_up_at_once_if_that_is_wanted") else { return };
    (0..3).for_each(|i| net.tap(&format!("t{i}")));
    run(&lab, "p", "none", &[]);
    lab.done(&["vm", "fork", "p", "a", "b", "--net", "tap=t{n},link=at-once"]);
    lab.done(&["vm", "fork", "a", "c", "--net", "tap=t2,link=at-once"]);
    let mut seen = BTreeSet::new();
    for (name, tap) in [("a", "t0"), ("b", "t1"), ("c", "t2")] {
        assert_eq!(lab.show(name)["net"]["tap"], tap);
        let wire = net.wire(tap);
        let mut child = lab.console(name);
        assert_eq!(link(&lab, name), "waits-for-driver");
        assert_eq!(word(&child.ask("v"), "link"), "0", "down first");
        is_up(&lab, name);
        assert_eq!(word(&child.ask("z"), "link"), "1");
        child.ask("h 1 60");
        let from = sender(&wire.expect("from the child"));
        assert_eq!(from, mac(&lab, name));
        assert!(seen.insert(from));
    }
}

/// Many children at once, named by a pattern.
#[test]
fn a_pattern_names_the_interfaces_of_many() {
    let Some((net, lab)) = lab("a_pattern_names_the_interfaces_of_many") else { return };
    run(&lab, "p", "none", &[]);
    let names: Vec<String> = (0..20).map(|i| format!("job-{i}")).collect();
    names.iter().for_each(|name| net.tap(&format!("t-{name}")));
    let mut fork = vec!["vm", "fork", "p", "--net", "tap=t-{name}"];
    fork.extend(names.iter().map(String::as_str));
    lab.done(&fork);
    let mut seen = BTreeSet::new();
    for name in &names {
        let mut child = lab.console(name);
        child.ask("v");
        child.ask("a");
        is_up(&lab, name);
        child.ask("z");
        let wire = net.wire(&format!("t-{name}"));
        child.ask("h 1 60");
        assert!(seen.insert(sender(&wire.expect("from the child"))), "{name}");
    }
}

/// A snapshot of a machine with a card is restored with another interface, or without one.
#[test]
fn a_restored_machine_has_an_interface_of_its_own() {
    let Some((net, lab)) = lab("a_restored_machine_has_an_interface_of_its_own") else { return };
    ["t0", "t1"].iter().for_each(|tap| net.tap(tap));
    lab.disk("data");
    let mut console = run(&lab, "p", "tap=t0", &["data"]);
    let wire = net.wire("t0");
    is_up(&lab, "p");
    assert_eq!(console.ask("j"), "echoing");
    echoes(&wire, mac(&lab, "p"), 1, 3000);
    let place = lab.store.path("snap");
    let place = place.to_str().unwrap();
    lab.done(&["vm", "snapshot", "p", place]);
    echoes(&wire, mac(&lab, "p"), 2, 3000);

    lab.done(&["vm", "restore", place, "bare"]);
    assert_eq!(link(&lab, "bare"), "no-tap");
    assert!(
        lab.refused(&["vm", "restore", place, "x", "--net", "tap=t0"], "in-use").contains("t0")
    );
    lab.done(&["vm", "restore", place, "r", "--net", "tap=t1"]);
    let mut restored = lab.console("r");
    restored.say("");
    assert_eq!(word(&restored.hear("= link"), "link"), "0");
    assert_eq!(link(&lab, "r"), "waits-for-identity");
    restored.ask("a");
    is_up(&lab, "r");
    let told = restored.ask("z");
    assert_eq!((word(&told, "link"), word(&told, "got")), ("1".into(), "1".into()));
    assert_eq!(restored.ask("j"), "echoing");
    echoes(&net.wire("t1"), mac(&lab, "r"), 3, 3000);
    echoes(&wire, mac(&lab, "p"), 4, 3000);
    // A snapshot of a machine without a card has none.
    lab.run("old", &[]);
    let other = lab.store.path("other");
    let other = other.to_str().unwrap();
    lab.done(&["vm", "snapshot", "old", other]);
    lab.refused(&["vm", "restore", other, "x", "--net", "tap=t1"], "invalid");
    lab.done(&["vm", "restore", other, "y"]);
    assert!(lab.show("y")["net"].is_null());
}

/// An interface that is removed under a machine is a link that goes down; the machine goes on, can
/// be forked, and its process does not spin.
#[test]
fn a_machine_outlives_its_interface() {
    let Some((net, lab)) = lab("a_machine_outlives_its_interface") else { return };
    ["t0", "t1"].iter().for_each(|tap| net.tap(tap));
    let mut console = run(&lab, "p", "tap=t0", &[]);
    is_up(&lab, "p");
    net.link(&["del", "t0"]);
    until("it is told", || link(&lab, "p") == "tap-gone");
    assert_eq!(word(&console.ask("h 10 60"), "link"), "0");
    assert_eq!(lab.show("p")["net"]["status"]["dropped"], 10);
    let ran = || lab.json(&["vm", "stats"])[0]["cpu_ns"].as_u64().unwrap();
    // It sleeps for what is typed.
    let (before, start) = (ran(), Instant::now());
    std::thread::sleep(Duration::from_millis(500));
    let share = (ran() - before) / u64::try_from(start.elapsed().as_millis()).unwrap();
    assert!(share < 300_000, "it ran for {share} ns of each ms");
    lab.done(&["vm", "fork", "p", "c", "--net", "tap=t1,link=at-once"]);
    lab.console("c").ask("v");
    is_up(&lab, "c");
}
