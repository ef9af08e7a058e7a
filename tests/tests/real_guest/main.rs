//! A real Linux guest in QEMU on disks of our vhost-user-blk device: file systems, cache modes,
//! discard, resize, resets, a backend or a virtual machine that dies, live migration.
//!
//! The disks are files served by `vhost_disk`, so a failure here is one of the protocol side.

mod backend;

use std::fs;
use std::process::Command;
use std::time::Duration;

use backend::{Backend, Served};
use offshoot_tests::guest::{Guest, GuestOptions, Image, RUN};
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::skip;

/// The feature bit of packed rings.
const RING_PACKED: usize = 34;

/// How long each half of a migration may take.
const MIGRATION: Duration = Duration::from_secs(90);

/// The image to boot, or `None` after saying that `test` is skipped.
fn image(test: &str) -> Option<&'static Image> {
    Image::get().map_err(|why| skip(test, &why)).ok()
}

/// A verified run of the whole life of a file system.
fn use_file_system(image: &Image, served: Served) {
    let (queues, packed) = (served.queues, served.flags.contains(&"packed"));
    let mut backend = Backend::new(served);
    let mut guest = Guest::boot(image, &GuestOptions::with(vec![backend.disk()]));
    assert_eq!(guest.run("ls /sys/block/vda/mq | wc -l").trim(), queues.to_string());
    let features = guest.run("cat /sys/block/vda/device/features");
    assert_eq!(&features[RING_PACKED..=RING_PACKED], if packed { "1" } else { "0" });
    assert_eq!(guest.run("cat /sys/block/vda/serial"), "offshoot-test-disk");
    guest.run("mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/a bs=1M count=24 conv=fsync");
    guest.run("cp /mnt/a /mnt/b; sha256sum /mnt/a > /mnt/sums; sync");
    guest.run("umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount /dev/vda /mnt");
    guest.run("sha256sum -c /mnt/sums && cmp /mnt/a /mnt/b");

    // What the guest deletes is space again on the host.
    let full = backend.allocated();
    guest.run("rm /mnt/b; sync; fstrim /mnt");
    assert!(backend.count("discards") > 0);
    assert!(backend.allocated() + (20 << 20) < full, "{full} to {}", backend.allocated());

    // A reset in the middle of work: the journal repairs what it left.
    guest.run("(while :; do cp /mnt/a /mnt/c; sync; done) >/dev/null 2>&1 & sleep 0.5");
    guest.reset();
    guest.run("e2fsck -p /dev/vda; e2fsck -fn /dev/vda");
    guest.run("mount /dev/vda /mnt && sha256sum -c /mnt/sums && umount /mnt");
    assert_eq!((backend.count("queues_failed"), backend.count("sessions_failed")), (0, 0));
}

#[test]
fn file_system_in_a_guest_keeps_its_files() {
    let Some(image) = image("file_system_in_a_guest_keeps_its_files") else { return };
    use_file_system(image, Served { queues: 2, ..Served::plain(128) });
}

#[test]
fn file_system_over_packed_rings_keeps_its_files() {
    let Some(image) = image("file_system_over_packed_rings_keeps_its_files") else { return };
    use_file_system(image, Served { queues: 2, flags: vec!["packed"], ..Served::plain(128) });
}

/// The guest is told the truth about the cache, and what it does about it arrives: in write-back
/// mode its fsync becomes a flush; in write-through mode every write is durable when it completes
/// and no flush is needed. (A device that says "write through" and is not loses what was synced.)
#[test]
fn guest_sees_the_cache_as_it_is() {
    let Some(image) = image("guest_sees_the_cache_as_it_is") else { return };
    let mut backend = Backend::new(Served::plain(64));
    let write = "dd if=/dev/urandom of=/dev/vda bs=64k count=16 conv=fsync";
    for config_wce in [true, false] {
        let mut disk = backend.disk();
        disk.config_wce = config_wce;
        let mut guest = Guest::boot(image, &GuestOptions::with(vec![disk]));
        assert_eq!(guest.run("cat /sys/block/vda/queue/write_cache").trim(), "write back");
        let before = backend.count("flushes");
        guest.run(write);
        assert!(backend.count("flushes") > before, "fsync sends a flush");
        if config_wce {
            switch_cache(&mut backend, &mut guest, write);
        }
    }
}

fn switch_cache(backend: &mut Backend, guest: &mut Guest, write: &str) {
    let cache = "/sys/block/vda/cache_type";
    guest.run(&format!("echo 'write through' > {cache}"));
    assert_eq!(guest.run("cat /sys/block/vda/queue/write_cache").trim(), "write through");
    let (flushes, durable) = (backend.count("flushes"), backend.count("write_through_writes"));
    guest.run(write);
    assert_eq!(backend.count("flushes"), flushes);
    assert!(backend.count("write_through_writes") > durable);
    guest.run(&format!("echo 'write back' > {cache}"));
    let durable = backend.count("write_through_writes");
    guest.run(write);
    assert!(backend.count("flushes") > flushes);
    assert_eq!(backend.count("write_through_writes"), durable);
}

#[test]
fn guest_sees_a_resize_at_once() {
    let Some(image) = image("guest_sees_a_resize_at_once") else { return };
    let mut backend = Backend::new(Served::plain(64));
    let mut guest = Guest::boot(image, &GuestOptions::with(vec![backend.disk()]));
    guest.run("mke2fs -q -t ext4 /dev/vda");
    assert_eq!(guest.run("cat /sys/block/vda/size").trim(), "131072");
    assert_eq!(backend.command("resize 262144"), "told 1");
    guest.run("until [ $(cat /sys/block/vda/size) = 262144 ]; do sleep 0.05; done");
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=64 seek=64 conv=fsync");
    guest.run("e2fsck -fn /dev/vda");
}

#[test]
fn system_boots_from_the_disk_and_again_after_a_change() {
    let Some(image) = image("system_boots_from_the_disk_and_again_after_a_change") else { return };
    let backend = Backend::with(Served::plain(512), |file| image.make_disk(file).unwrap());
    let with_disk = GuestOptions::with(vec![backend.disk()]);
    let options = GuestOptions { root_on_disk: true, ..with_disk };
    let mut guest = Guest::boot(image, &options);
    assert!(guest.run("cat /proc/mounts").contains("/dev/vda / ext4 rw"));
    guest.run("echo kept > /root-was-here; sync");
    guest.reset();
    assert_eq!(guest.run("cat /root-was-here"), "kept\n");
}

#[test]
fn read_only_disk_is_read_and_not_written() {
    let Some(image) = image("read_only_disk_is_read_and_not_written") else { return };
    let served = Served { flags: vec!["read-only"], ..Served::plain(64) };
    let backend = Backend::with(served, |file| {
        let files = tempfile::tempdir().unwrap();
        fs::write(files.path().join("word"), "what was there").unwrap();
        let mke2fs = offshoot_tests::tool("mke2fs").expect("the image was made with it");
        let done = Command::new(mke2fs)
            .args(["-q", "-t", "ext4", "-d"])
            .args([files.path(), file])
            .arg("64M")
            .output();
        assert!(done.unwrap().status.success());
    });
    let before = fs::read(backend.file()).unwrap();
    let mut guest = Guest::boot(image, &GuestOptions::with(vec![backend.disk()]));
    assert_eq!(guest.run("cat /sys/block/vda/ro").trim(), "1");
    assert_eq!(guest.run("mount -o ro /dev/vda /mnt && cat /mnt/word"), "what was there");
    // The kernel's own refusal, and with that out of the way the device's.
    for first in ["true", "blockdev --setrw /dev/vda"] {
        let write = format!("{first}; dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct");
        assert_ne!(guest.try_run(&write, RUN).code, 0);
    }
    drop(guest);
    assert!(fs::read(backend.file()).unwrap() == before, "the disk did not change");
}

/// A verifying load of both queues, as one line of shell that takes about `seconds`.
fn verified_load(seconds: u32) -> String {
    format!(
        "fio --name=load --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --bs=4k \
         --rw=randrw --rwmixread=30 --size=24M --numjobs=2 --offset_increment=24M \
         --time_based --runtime={seconds} --verify=crc32c --verify_fatal=1 \
         --verify_backlog=256 --group_reporting --output-format=terse"
    )
}

#[test]
fn killed_backend_loses_nothing_under_a_running_guest() {
    let test = "killed_backend_loses_nothing_under_a_running_guest";
    let Some(image) = image(test) else { return };
    if image.initramfs_fio.is_none() {
        return skip(test, "no fio on this machine");
    }
    let mut rng = Rng::new(seed(1));
    let mut backend = Backend::new(Served { queues: 2, ..Served::plain(64) });
    let options = GuestOptions { fio: true, ..GuestOptions::with(vec![backend.disk()]) };
    let mut guest = Guest::boot(image, &options);
    let (kills, seconds) = if soak() { (200, 300) } else { (8, 12) };
    guest.submit(&verified_load(seconds));
    for _ in 0..kills {
        // The load runs, whatever the last kill did.
        backend.wait_for("writes", 200 + rng.below(200));
        backend.kill();
        backend.revive();
    }
    backend.wait_for("writes", 200);
    let output = guest.collect(Duration::from_secs(u64::from(seconds) + 60));
    assert_eq!(output.code, 0, "{}", output.text);
    assert_eq!(backend.count("queues_failed"), 0);
}

/// Requests that a dead backend had taken and not done are done by the next one, which finds them
/// in the in-flight area: no kick announces them, and the guest waits for every one.
#[test]
fn requests_that_died_with_the_backend_are_done_by_the_next() {
    let Some(image) = image("requests_that_died_with_the_backend_are_done_by_the_next") else {
        return;
    };
    for packed in [false, true] {
        let flags = if packed { vec!["packed"] } else { vec![] };
        let mut backend = Backend::new(Served { flags, ..Served::plain(64) });
        let mut guest = Guest::boot(image, &GuestOptions::with(vec![backend.disk()]));
        guest.run("dd if=/dev/urandom of=/run/data bs=1M count=4");
        backend.command("hold");
        let taken = backend.count("taken");
        // Four writers at once, so that several requests are in work.
        guest.submit(
            "for i in 0 1 2 3; do dd if=/run/data of=/dev/vda bs=1M count=1 skip=$i seek=$i \
             oflag=direct & done; wait; cmp -n 4194304 /run/data /dev/vda",
        );
        backend.wait_for("taken", taken + 4);
        backend.kill();
        backend.revive();
        let output = guest.collect(RUN);
        assert_eq!(output.code, 0, "packed {packed}: {}", output.text);
    }
}

#[test]
fn disk_outlives_a_killed_virtual_machine() {
    let Some(image) = image("disk_outlives_a_killed_virtual_machine") else { return };
    let mut backend = Backend::new(Served { queues: 2, ..Served::plain(64) });
    let options = GuestOptions::with(vec![backend.disk()]);
    let mut guest = Guest::boot(image, &options);
    guest.run("mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/a bs=1M count=8; sha256sum /mnt/a > /mnt/sums; sync");
    guest.submit("while :; do cp /mnt/a /mnt/b; sync; done");
    let writes = backend.count("writes");
    backend.wait_for("writes", writes + 40);
    guest.kill();
    let mut guest = Guest::boot(image, &options);
    guest.run("e2fsck -p /dev/vda || [ $? = 1 ]; e2fsck -fn /dev/vda");
    guest.run("mount /dev/vda /mnt && sha256sum -c /mnt/sums");
    assert_eq!((backend.count("queues_failed"), backend.count("sessions_failed")), (0, 0));
}

/// What the device writes into guest memory while it migrates must reach the other side through the
/// dirty log: nothing else touches the page cache that a read fills. So a file is read after all
/// memory was copied once, and compared over there before anything is read again.
#[test]
fn guest_migrates_while_it_reads_and_writes() {
    let Some(image) = image("guest_migrates_while_it_reads_and_writes") else { return };
    for packed in [false, true] {
        let flags = if packed { vec!["packed"] } else { vec![] };
        let backend = Backend::new(Served { queues: 2, flags, ..Served::plain(128) });
        migrate(image, backend);
    }
}

fn migrate(image: &Image, mut backend: Backend) {
    let options = GuestOptions::with(vec![backend.disk()]);
    let through = backend.place("migration");
    let mut source = Guest::boot(image, &options);
    let target = Guest::incoming(image, &options, &through);
    source.run("mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    source.run("dd if=/dev/urandom of=/mnt/a bs=1M count=16; sha256sum /mnt/a > /mnt/sums");
    source.run("sync; echo 3 > /proc/sys/vm/drop_caches");
    source.run("dd if=/dev/urandom of=/run/noise bs=1M count=8");
    source.run(
        "(while [ ! -e /run/stop ]; do dd if=/run/noise of=/run/changed conv=notrunc bs=64k; \
         dd if=/run/noise of=/mnt/b bs=64k count=4 conv=fsync; done; \
         sha256sum /mnt/b >> /mnt/sums; touch /run/done) > /run/log 2>&1 &",
    );
    source.start_migration(&through, MIGRATION);
    source.run("cat /mnt/a > /dev/null");
    let mut guest = source.finish_migration(target, MIGRATION);
    guest.run("sha256sum -c /mnt/sums");
    guest.run("touch /run/stop; until [ -e /run/done ]; do sleep 0.1; done");
    guest.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum -c /mnt/sums");
    guest.run("umount /mnt; e2fsck -fn /dev/vda");
    assert_eq!((backend.count("queues_failed"), backend.count("sessions_failed")), (0, 0));
}
