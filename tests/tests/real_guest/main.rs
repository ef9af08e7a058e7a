//! A real Linux guest in QEMU on disks of our vhost-user-blk device: file systems, cache modes,
//! discard, resize, resets, a backend or a virtual machine that dies, live migration.
//!
//! Most disks are of a store and served by `blockd`. Some are files served by `vhost_disk`, which
//! can stop in the middle of requests, and has nothing of a store behind it.

mod backend;
mod forked;
mod served;

use std::fs;
use std::process::Command;
use std::time::Duration;

use backend::{Backend, Setup};
use offshoot_tests::guest::{Accel, Guest, GuestDisk, GuestOptions, Image, RUN};
use offshoot_tests::mount::Mount;
use offshoot_tests::rng::{Rng, seed, soak};
use offshoot_tests::skip;
use served::{NAME, Served};

/// The feature bit of packed rings.
const RING_PACKED: usize = 34;

/// Says how the guest sees its cache.
const WRITE_CACHE: &str = "cat /sys/block/vda/queue/write_cache";

/// How long each half of a migration may take.
const MIGRATION: Duration = Duration::from_secs(90);

/// The image to boot, or `None` after saying that `test` is skipped.
fn image(test: &str) -> Option<&'static Image> {
    Image::get().map_err(|why| skip(test, &why)).ok()
}

/// A verified run of the whole life of a file system.
fn use_file_system(image: &Image, packed: bool) {
    let served = Served::new(128, 2);
    let disk = GuestDisk { packed, ..served.disk() };
    let mut guest = Guest::boot(image, &GuestOptions::with(vec![disk]));
    assert_eq!(guest.run("ls /sys/block/vda/mq | wc -l").trim(), "2");
    let features = guest.run("cat /sys/block/vda/device/features");
    assert_eq!(&features[RING_PACKED..=RING_PACKED], if packed { "1" } else { "0" });
    assert_eq!(guest.run("cat /sys/block/vda/serial"), NAME);
    guest.run("mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/a bs=1M count=24 conv=fsync");
    guest.run("cp /mnt/a /mnt/b; sha256sum /mnt/a > /mnt/sums; sync");
    guest.run("umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount /dev/vda /mnt");
    guest.run("sha256sum -c /mnt/sums && cmp /mnt/a /mnt/b");

    // What the guest deletes is space again on the host.
    let full = served.allocated();
    guest.run("rm /mnt/b; sync; fstrim /mnt; sync");
    assert!(served.count("discard") > 0);
    assert!(served.allocated() + (20 << 20) < full, "{full} to {}", served.allocated());

    // A reset in the middle of work: the journal repairs what it left.
    guest.run("(while :; do cp /mnt/a /mnt/c; sync; done) >/dev/null 2>&1 & sleep 0.5");
    guest.reset();
    guest.run("e2fsck -p /dev/vda; e2fsck -fn /dev/vda");
    guest.run("mount /dev/vda /mnt && sha256sum -c /mnt/sums && umount /mnt");
    assert_eq!(served.mistakes(), 0);
    drop(guest);
    served.check();
}

#[test]
fn file_system_in_a_guest_keeps_its_files() {
    let Some(image) = image("file_system_in_a_guest_keeps_its_files") else { return };
    use_file_system(image, false);
}

#[test]
fn file_system_over_packed_rings_keeps_its_files() {
    let Some(image) = image("file_system_over_packed_rings_keeps_its_files") else { return };
    use_file_system(image, true);
}

/// The guest is told the truth about the cache, and what it does about it arrives: in write-back
/// mode its fsync becomes a flush; in write-through mode every write is durable when it completes
/// and no flush is needed. (A device that says "write through" and is not loses what was synced.)
#[test]
fn guest_sees_the_cache_as_it_is() {
    let Some(image) = image("guest_sees_the_cache_as_it_is") else { return };
    let served = Served::new(64, 1);
    let write = "dd if=/dev/urandom of=/dev/vda bs=64k count=16 conv=fsync";
    for config_wce in [true, false] {
        let disk = GuestDisk { config_wce, ..served.disk() };
        let mut guest = Guest::boot(image, &GuestOptions::with(vec![disk]));
        assert_eq!(guest.run(WRITE_CACHE).trim(), "write back");
        let before = served.count("flush");
        guest.run(write);
        assert!(served.count("flush") > before, "fsync sends a flush");
        if config_wce {
            guest.run("echo 'write through' > /sys/block/vda/cache_type");
            assert_eq!(guest.run(WRITE_CACHE).trim(), "write through");
            let before = served.count("flush");
            guest.run(write);
            assert_eq!(served.count("flush"), before);
            guest.run("echo 'write back' > /sys/block/vda/cache_type");
            guest.run(write);
            assert!(served.count("flush") > before);
        }
    }
}

/// A guest that switched to write-through sends no flushes, and its virtual machine does not tell a
/// new daemon what it chose. What it writes after a restart must outlive a power cut all the same.
#[test]
fn write_through_outlives_the_daemon_and_then_a_power_cut() {
    let test = "write_through_outlives_the_daemon_and_then_a_power_cut";
    let Some(image) = image(test) else { return };
    let mut served = Served::new(64, 1);
    let mut guest = Guest::boot(image, &GuestOptions::with(vec![served.disk()]));
    guest.run("echo 'write through' > /sys/block/vda/cache_type");
    for (byte, at) in [("a", 0), ("b", 1)] {
        guest.run(&format!(
            "yes {byte} | tr -d '\\n' | dd of=/run/data bs=64k count=1 iflag=fullblock && \
             dd if=/run/data of=/dev/vda bs=64k seek={at} oflag=direct"
        ));
        if at == 0 {
            served.kill();
            served.revive();
        }
    }
    assert_eq!(served.count("flush"), 0);
    assert_eq!(served.count("write"), 1);
    served.cut_power();
    guest.kill();
    let bytes = served.read_after_cut(128 << 10);
    let (a, b) = bytes.split_at(64 << 10);
    assert!(a.iter().all(|x| *x == b'a'), "written before the daemon was killed");
    assert!(b.iter().all(|x| *x == b'b'), "written after it");
}

/// What a guest has synced is there after a power cut, whatever it was told about the cache and
/// chose: with a device that offers no choice, and with the cache switched to and fro by the guest.
/// The power cut is that of a real file system, which forgets what was not synced; a write that the
/// guest did not sync shows that it does.
#[test]
fn what_a_guest_synced_outlives_a_power_cut() {
    let test = "real_guest::what_a_guest_synced_outlives_a_power_cut";
    let Some(image) = image(test) else { return };
    let (back, through) = ("write back", "write through");
    let chosen: [&[&str]; 4] = [&[], &[back], &[through], &[through, back]];
    for modes in chosen {
        let Some(mount) = Mount::ext4(test, 256 << 20) else { return };
        let mut served = Served::on(Some(mount), 64, 1);
        let disk = GuestDisk { config_wce: !modes.is_empty(), ..served.disk() };
        let mut guest = Guest::boot(image, &GuestOptions::with(vec![disk]));
        for mode in modes {
            guest.run(&format!("echo '{mode}' > /sys/block/vda/cache_type"));
        }
        let mode = guest.run(WRITE_CACHE).trim().to_owned();
        assert_eq!(mode, *modes.last().unwrap_or(&back));
        let flushes = served.count("flush");

        guest.run("tr '\\0' s < /dev/zero | head -c 1048576 > /run/data");
        guest.run("dd if=/run/data of=/dev/vda bs=64k conv=fsync");

        let flushed = served.count("flush") > flushes;
        assert_eq!(flushed, mode == back, "a flush for the fsync, after {modes:?}");
        if mode == through {
            guest.run("echo 'write back' > /sys/block/vda/cache_type");
        }
        guest.run("dd if=/run/data of=/dev/vda bs=64k seek=16 oflag=direct");
        served.cut_power();
        guest.kill();
        let bytes = served.read_after_cut(2 << 20);
        let (synced, unsynced) = bytes.split_at(1 << 20);
        assert!(synced.iter().all(|b| *b == b's'), "what was synced is there, after {modes:?}");
        assert!(unsynced.contains(&0), "a power cut takes what was not synced");
    }
}

#[test]
fn guest_sees_a_resize_at_once() {
    let Some(image) = image("guest_sees_a_resize_at_once") else { return };
    let served = Served::new(64, 1);
    let mut guest = Guest::boot(image, &GuestOptions::with(vec![served.disk()]));
    guest.run("mke2fs -q -t ext4 /dev/vda");
    assert_eq!(guest.run("cat /sys/block/vda/size").trim(), "131072");
    served.resize(128);
    guest.run("until [ $(cat /sys/block/vda/size) = 262144 ]; do sleep 0.05; done");
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=64 seek=64 conv=fsync");
    guest.run("e2fsck -fn /dev/vda");
    assert_eq!(served.mistakes(), 0);
}

/// Story: one run in six on an emulated processor ended with a program of the disk killed in the
/// middle of an instruction, because the emulator ran an old translation of it. Trying again hid
/// that on some machines and not on others; a guest that copies its programs itself
/// (`tests/guest/init`) never meets it.
#[test]
fn system_boots_from_the_disk_and_again_after_a_change() {
    let test = "system_boots_from_the_disk_and_again_after_a_change";
    let Some(image) = image(test) else { return };
    let backend = Backend::with(Setup::plain(512), |file| image.make_disk(file).unwrap());
    let with_disk = GuestOptions::with(vec![backend.disk()]);
    let options = GuestOptions { root_on_disk: true, ..with_disk };
    let mut guest = Guest::boot(image, &options);
    let mounts = guest.run("cat /proc/mounts");
    let root = match options.accel {
        Accel::Kvm => "/dev/vda",
        Accel::Tcg => {
            let below = guest.run("cat /sys/block/loop0/loop/backing_file");
            assert_eq!(below.trim(), "/dev/vda");
            "/dev/loop0"
        }
    };
    assert!(mounts.contains(&format!("{root} / ext4 rw")), "{mounts}");
    guest.run("echo kept > /root-was-here; sync");
    guest.reset();
    assert_eq!(guest.run("cat /root-was-here"), "kept\n");
}

#[test]
fn read_only_disk_is_read_and_not_written() {
    let Some(image) = image("read_only_disk_is_read_and_not_written") else { return };
    let files = tempfile::tempdir().unwrap();
    let raw = files.path().join("image");
    fs::create_dir(files.path().join("root")).unwrap();
    fs::write(files.path().join("root/word"), "what was there").unwrap();
    let mke2fs = offshoot_tests::tool("mke2fs").expect("the image was made with it");
    let mut made = Command::new(mke2fs);
    made.args(["-q", "-t", "ext4", "-d"]).arg(files.path().join("root")).arg(&raw).arg("64M");
    assert!(made.output().unwrap().status.success());
    let served = Served::read_only(&raw);
    let mut guest = Guest::boot(image, &GuestOptions::with(vec![served.disk()]));
    assert_eq!(guest.run("cat /sys/block/vda/ro").trim(), "1");
    assert_eq!(guest.run("mount -o ro /dev/vda /mnt && cat /mnt/word"), "what was there");
    // The kernel's own refusal, and with that out of the way the device's.
    for first in ["true", "blockdev --setrw /dev/vda"] {
        let write = format!("{first}; dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct");
        assert_ne!(guest.try_run(&write, RUN).code, 0);
    }
    drop(guest);
    assert!(served.content() == fs::read(raw).unwrap(), "the disk did not change");
    served.check();
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
fn killed_and_upgraded_daemons_lose_nothing_under_a_running_guest() {
    let test = "killed_and_upgraded_daemons_lose_nothing_under_a_running_guest";
    let Some(image) = image(test) else { return };
    if image.initramfs_fio.is_none() {
        return skip(test, "no fio on this machine");
    }
    let mut rng = Rng::new(seed(1));
    let mut served = Served::new(64, 2);
    let options = GuestOptions { fio: true, ..GuestOptions::with(vec![served.disk()]) };
    let mut guest = Guest::boot(image, &options);
    let (kills, seconds) = if soak() { (200, 300) } else { (8, 12) };
    guest.submit(&verified_load(seconds));
    for _ in 0..kills {
        // The load runs, whatever the last kill did.
        served.wait_for("write", 100 + rng.below(100));
        served.kill();
        served.revive();
    }
    // An upgrade in place is less than a death, and the guest's monitor sees nothing of it.
    for _ in 0..2 {
        served.wait_for("write", 100 + rng.below(100));
        served.upgrade();
    }
    served.wait_for("write", 100);
    let told = served.events();
    assert!(!told.iter().any(|e| e.starts_with("disconnected")), "{told:?}");
    let output = guest.collect(Duration::from_secs(u64::from(seconds) + 60));
    assert_eq!(output.code, 0, "{}", output.text);
    assert_eq!(served.mistakes(), 0);
    drop(guest);
    served.check();
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
        let mut backend = Backend::new(Setup { flags, ..Setup::plain(64) });
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
    let served = Served::new(64, 2);
    let options = GuestOptions::with(vec![served.disk()]);
    let mut guest = Guest::boot(image, &options);
    guest.run("mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/a bs=1M count=8; sha256sum /mnt/a > /mnt/sums; sync");
    guest.submit("while :; do cp /mnt/a /mnt/b; sync; done");
    served.wait_for("write", served.count("write") + 40);
    guest.kill();
    let mut guest = Guest::boot(image, &options);
    guest.run("e2fsck -p /dev/vda || [ $? = 1 ]; e2fsck -fn /dev/vda");
    guest.run("mount /dev/vda /mnt && sha256sum -c /mnt/sums");
    assert_eq!(served.mistakes(), 0);
    drop(guest);
    served.check();
}

/// What the device writes into guest memory while it migrates must reach the other side through the
/// dirty log: nothing else touches the page cache that a read fills. So a file is read after all
/// memory was copied once, and compared over there before anything is read again.
#[test]
fn guest_migrates_while_it_reads_and_writes() {
    let Some(image) = image("guest_migrates_while_it_reads_and_writes") else { return };
    for packed in [false, true] {
        migrate(image, packed, |_, _| {});
    }
}

/// A daemon that is killed while a guest migrates: source and destination find the next one, the
/// source tells it of the dirty log again, what the dead one had in work is done, and what either
/// of them wrote into the guest's memory is there at the destination.
#[test]
fn guest_migrates_although_the_daemon_is_killed() {
    let Some(image) = image("guest_migrates_although_the_daemon_is_killed") else { return };
    for packed in [false, true] {
        migrate(image, packed, |served, source| {
            source.run("dd if=/mnt/a of=/dev/null bs=1M count=8");
            served.wait_for("write", served.count("write") + 20);
            served.kill();
            served.revive();
            served.wait_connected(2);
            served.wait_for("write", 20);
        });
    }
}

/// Migrates a guest under load. `meanwhile` is called with the source when all of its memory was
/// copied once, before it reads what the destination must know.
fn migrate(image: &Image, packed: bool, meanwhile: impl Fn(&mut Served, &mut Guest)) {
    let mut served = Served::new(128, 2);
    let options = GuestOptions::with(vec![GuestDisk { packed, ..served.disk() }]);
    let through = served.place("migration");
    let mut source = Guest::boot(image, &options);
    let target = Guest::incoming(image, &options, &through);
    source.run("mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    source.run("dd if=/dev/urandom of=/mnt/a bs=1M count=16; sha256sum /mnt/a > /mnt/sums");
    source.run("sync; echo 3 > /proc/sys/vm/drop_caches");
    source.run("dd if=/dev/urandom of=/run/noise bs=1M count=8");
    // Writes go on all the time, and what was written is read back and compared each time.
    source.run(
        "(while [ ! -e /run/stop ]; do dd if=/run/noise of=/run/changed conv=notrunc bs=64k; \
         dd if=/run/noise of=/mnt/b bs=64k count=4 conv=fsync; \
         dd if=/mnt/b iflag=direct bs=64k count=4 | cmp -n 262144 - /run/noise || break; \
         n=$((n+1)); echo $n > /run/rounds; done; \
         sha256sum /mnt/b >> /mnt/sums; touch /run/done) > /run/log 2>&1 &",
    );
    source.start_migration(&through, MIGRATION);
    served.wait_connected(2);
    meanwhile(&mut served, &mut source);
    source.run("cat /mnt/a > /dev/null");
    let before: u32 = source.run("cat /run/rounds").trim().parse().unwrap();
    let mut guest = source.finish_migration(target, MIGRATION);
    guest.run("sha256sum -c /mnt/sums");
    guest.run(&format!("until [ $(cat /run/rounds) -gt {} ]; do sleep 0.1; done", before + 1));
    guest.run("touch /run/stop; until [ -e /run/done ]; do sleep 0.1; done");
    guest.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum -c /mnt/sums");
    guest.run("umount /mnt; e2fsck -fn /dev/vda");
    assert_eq!(served.mistakes(), 0);
    let told = served.events();
    let failed: Vec<_> = told.iter().filter(|e| e.contains("failed") || e.contains(": ")).collect();
    assert!(failed.is_empty(), "packed {packed}: {failed:?}");
    served.wait_connected(1);
    drop(guest);
    served.check();
}
