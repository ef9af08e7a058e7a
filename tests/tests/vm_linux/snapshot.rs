//! Linux written to files, made again of them, and asked to turn itself off.

use std::time::Instant;

use offshoot_tests::skip;

use crate::machine::in_a_lab;

/// A stock kernel that writes is written down and goes on; the machine that is made of that has
/// what was in memory and on the disk, and a sound file system. Asked by its power button, a kernel
/// whose user space listens turns itself off; one whose does not has its power cut.
#[test]
fn a_stock_kernel_is_restored_and_stopped() {
    in_a_lab("a_stock_kernel_is_restored_and_stopped", |vms| {
        let start = Instant::now();
        let said = |what: &str| println!("{:5.1} s: {what}", start.elapsed().as_secs_f64());
        vms.run("parent");
        vms.ask("parent", "echo disk >/mnt/a; sync; echo memory >/run/b");
        said("the guest has written");
        vms.snapshot("parent", "/run/snapshot");
        said("it is written down");
        vms.ask("parent", "rm /mnt/a /run/b && sync");
        vms.restore("/run/snapshot", "again");
        assert_eq!(vms.ask("again", "cat /mnt/a /run/b"), "disk\nmemory\n");
        vms.ask("again", "mount -o remount,ro / && e2fsck -fn /dev/vda");
        said("the restored one has what was written before, and nothing that came later");

        let button = "modprobe -a button evdev && test -c /dev/input/event0";
        if vms.ask("parent", &format!("{button} && echo yes || echo no")).trim() == "yes" {
            let obey = "(head -c 24 /dev/input/event0 && sync && poweroff -f) >/dev/null 2>&1 &";
            vms.ask("parent", obey);
            assert_eq!(vms.stop("parent", 100), "power-off");
        } else {
            skip(
                "a_stock_kernel_is_restored_and_stopped (power button)",
                "the kernel has no button",
            );
        }
        assert_eq!(vms.stop("again", 2), "stopped", "nobody in it listens");
        said("both are stopped");
    });
}
