//! Linux guests under `forkd`, in the nested lab: see `offshoot_tests::lab`.

use std::time::Instant;

use offshoot_tests::lab::Lab;
use offshoot_tests::skip;

const CONSOLE: &str = "/run/console";

/// Starts a machine of the library with disks at `sockets`; its console is at [`CONSOLE`].
fn start_machine(lab: &mut Lab, sockets: &str) {
    lab.run(&format!(
        "(lab_machine /lab/kernel /lab/initramfs 160 {CONSOLE} {sockets} >/run/machine 2>&1; \
          echo code $? >>/run/machine) >/dev/null 2>&1 & \
         until [ -S {CONSOLE} ] || grep -q code /run/machine; do sleep 0.1; done; cat /run/machine"
    ));
}

/// A stock kernel boots from nothing but a kernel and an initramfs, finds everything that the
/// firmware announces, works on a disk of blockd's, and turns its machine off.
#[test]
fn a_stock_kernel_boots_and_works_on_its_disk() {
    let start = Instant::now();
    let mut lab = match Lab::start(&["lab_machine", "lab_console", "blockd", "offshoot"]) {
        Ok(lab) => lab,
        Err(reason) => return skip("a_stock_kernel_boots_and_works_on_its_disk", &reason),
    };
    println!("lab up after {:?}", start.elapsed());
    lab.run(
        "offshoot --store /run/store init; \
         offshoot --store /run/store disk create root --size 64M; \
         blockd --store /run/store --api /run/api >/run/blockd 2>&1 & \
         until [ -S /run/api ]; do sleep 0.1; done; \
         offshoot --store /run/store disk attach root --socket /run/disk",
    );
    println!("blockd up after {:?}", start.elapsed());
    start_machine(&mut lab, "/run/disk");
    let release = lab.run("uname -r");
    assert_eq!(lab.ask(CONSOLE, "uname -r"), release);
    println!("guest up after {:?}: {}", start.elapsed(), lab.ask(CONSOLE, "cat /proc/uptime"));

    let devices = lab.ask(CONSOLE, "ls /sys/bus/acpi/devices /sys/bus/virtio/devices");
    for device in ["ACPI0013:00", "LNRO0005:01", "VMGENCTR:00", "PNP0C0C:00", "virtio1"] {
        assert!(devices.contains(device), "{device}: {devices}");
    }
    assert_eq!(lab.ask(CONSOLE, "blockdev --getsize64 /dev/vda").trim(), "67108864");
    lab.ask(CONSOLE, "head -c 16 /dev/hwrng | wc -c | grep -qx 16");
    lab.ask(CONSOLE, "mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    lab.ask(CONSOLE, "head -c 3000000 /dev/urandom >/mnt/a && cp /mnt/a /mnt/b && umount /mnt");
    lab.ask(CONSOLE, "e2fsck -fn /dev/vda && mount /dev/vda /mnt && cmp /mnt/a /mnt/b");
    println!("disk done after {:?}", start.elapsed());
    lab.try_run(&format!("lab_console {CONSOLE} 'umount /mnt; poweroff -f'"));
    let said = lab.run("until grep code /run/machine; do sleep 0.1; done; cat /run/machine");
    assert!(said.contains("exit: power-off") && said.contains("code 0"), "{said}");
    println!("off after {:?}", start.elapsed());
}
