//! Linux guests under `forkd`, in the nested lab: see `offshoot_tests::lab`.

mod machine;
mod net;
mod snapshot;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use machine::{Machines, in_a_lab};

const PROGRAMS: [&str; 4] = ["blockd", "forkd", "offshoot", "lab_console"];

/// A stock kernel boots from its disk and works on it. While it writes it is forked twice over, and
/// all go on: each with a name, an address and random numbers of its own, with disk and memory of
/// one instant, and with sound file systems. Then they turn themselves off.
#[test]
fn a_stock_kernel_is_forked_while_it_writes() {
    in_a_lab("a_stock_kernel_is_forked_while_it_writes", |vms| {
        let start = Instant::now();
        let said = |what: &str| println!("{:5.1} s: {what}", start.elapsed().as_secs_f64());
        vms.run("parent");
        let release = vms.lab.run("uname -r");
        assert_eq!(vms.ask("parent", "uname -r"), release);
        said("the guest is up");
        has_what_the_firmware_announces(vms);
        begin_to_write(vms);
        said("the guest writes");
        vms.fork("parent", &["one", "two"]);
        said("the fork is done");
        let all = ["parent", "one", "two"];
        has_its_own_identity(vms, &all);
        said("all have their identity");
        for name in all {
            goes_on_counting(vms, name);
            has_a_sound_file_system(vms, name);
            vms.turn_off(name);
            said(name);
        }
    });
}

fn has_what_the_firmware_announces(vms: &mut Machines) {
    let devices = vms.ask("parent", "ls /sys/bus/acpi/devices /sys/bus/virtio/devices");
    for device in ["ACPI0013:00", "LNRO0005:02", "VMGENCTR:00", "PNP0C0C:00", "virtio2"] {
        assert!(devices.contains(device), "{device}: {devices}");
    }
    assert_eq!(vms.ask("parent", "blockdev --getsize64 /dev/vda").trim(), "50331648");
    vms.ask("parent", "grep -q \"^/dev/vda / ext4 rw\" /proc/mounts");
    vms.ask("parent", "head -c 16 /dev/hwrng | wc -c | grep -qx 16");
}

/// One program counts on the second disk, another one copies files on the system's.
fn begin_to_write(vms: &mut Machines) {
    vms.ask("parent", "head -c 300000 /dev/urandom >/mnt/a && cp /mnt/a /mnt/b");
    vms.ask(
        "parent",
        "while :; do cp /mnt/a /mnt/c && mv /mnt/c /mnt/b; sleep 0.1; done >/dev/null 2>&1 & \
         echo $! >/run/writer; lab_agent /dev/vdb >/run/agent 2>&1 & \
         until [ -s /run/identity ]; do sleep 0.1; done",
    );
    goes_on_counting(vms, "parent");
}

fn goes_on_counting(vms: &mut Machines, name: &str) {
    let count = |vms: &mut Machines| -> u64 {
        vms.ask(name, "cat /run/count").trim().parse().expect("a number")
    };
    let (before, end) = (count(vms), Instant::now() + Duration::from_secs(30));
    while count(vms) <= before {
        assert!(Instant::now() < end, "{name} does not go on: {}", vms.ask(name, "cat /run/agent"));
    }
}

fn has_its_own_identity(vms: &mut Machines, names: &[&str]) {
    let (mut identities, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for name in names {
        let wait = format!("until grep -q ^{name} /run/identity; do sleep 0.1; done");
        let line = vms.ask(name, &format!("{wait}; cat /run/identity"));
        let words: Vec<&str> = line.split_whitespace().collect();
        let [own, mac, generation] = words[..] else { panic!("{name}: {line}") };
        assert_eq!(own, *name);
        identities.extend([mac.to_owned(), generation.to_owned()]);
        let id = vms.show(name)["mac"].as_str().expect("an address").replace(':', "");
        assert_eq!(mac, id, "{name} has the address that it was given");
        numbers.insert(vms.ask(name, "head -c 32 /dev/urandom | sha256sum"));
        let instant = vms.ask(name, "cat /run/instant");
        let at: Vec<u64> = instant.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        assert_eq!(at[0], at[1], "{name}: the disk is of another instant than memory");
        assert!(*name == "parent" || at[0] > 0, "{name} has counted before it was forked");
    }
    assert_eq!(identities.len(), 2 * names.len(), "{identities:?}");
    assert_eq!(numbers.len(), names.len(), "two machines have the same random numbers");
}

fn has_a_sound_file_system(vms: &mut Machines, name: &str) {
    vms.ask(name, "kill $(cat /run/writer); while ! mount -o remount,ro /; do sleep 0.1; done");
    vms.ask(name, "e2fsck -fn /dev/vda && cmp /mnt/a /mnt/b");
}
