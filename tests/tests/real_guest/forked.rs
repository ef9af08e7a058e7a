//! Live forks under a real guest: it goes on, and another guest starts from what its disk held.

use offshoot_tests::guest::{Guest, GuestDisk, GuestOptions};

use super::image;
use super::served::Served;

/// Starts something that writes files all the time, and says what it has done in `/run/rounds`.
const WORK: &str = "(while [ ! -e /run/stop ]; do n=$((n+1)); \
     dd if=/dev/urandom of=/mnt/f$((n%8)) bs=64k count=8 2>/dev/null; \
     cp /mnt/f$((n%8)) /mnt/g$((n%8)); sync; cmp /mnt/f$((n%8)) /mnt/g$((n%8)) || break; \
     echo $n > /run/rounds; done; touch /run/done) > /run/log 2>&1 &";

/// A guest with a file system that something works on, and a file that nothing changes.
fn at_work(image: &'static offshoot_tests::guest::Image, served: &Served, packed: bool) -> Guest {
    let disk = GuestDisk { packed, ..served.disk() };
    let mut guest = Guest::boot(image, &GuestOptions::with(vec![disk]));
    guest.run("mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/a bs=1M count=8; sha256sum /mnt/a > /mnt/sums; sync");
    guest.run(WORK);
    guest
}

fn rounds(guest: &mut Guest, more: u32) {
    let told = guest.run("cat /run/rounds 2>/dev/null || echo 0");
    let before: u32 = told.trim().parse().unwrap();
    guest.run(&format!("until [ $(cat /run/rounds) -ge {} ]; do sleep 0.05; done", before + more));
}

/// Ends the work of a guest, which found nothing wrong.
fn end(mut guest: Guest) {
    guest.run("touch /run/stop; until [ -e /run/done ]; do sleep 0.05; done");
    assert_eq!(guest.run("cat /run/log"), "");
    guest.run("sha256sum -c /mnt/sums; umount /mnt; e2fsck -fn /dev/vda");
}

/// D-h, D-k: three forks in the middle of work; a guest on the second child finds a file system as
/// a power cut would have left it, with all that was synced, and the two go on side by side.
#[test]
fn guest_goes_on_while_its_disk_is_forked() {
    let Some(image) = image("guest_goes_on_while_its_disk_is_forked") else { return };
    for packed in [false, true] {
        let served = Served::new(128, 2);
        let mut guest = at_work(image, &served, packed);
        let [_, child, _] = ["first", "second", "third"].map(|name| {
            rounds(&mut guest, 2);
            served.fork(name)
        });
        let mut other = Guest::boot(image, &GuestOptions::with(vec![child]));
        other.run("e2fsck -p /dev/vda || [ $? = 1 ]; e2fsck -fn /dev/vda");
        other.run("mount /dev/vda /mnt && sha256sum -c /mnt/sums");
        other.run(WORK);
        rounds(&mut guest, 3);
        rounds(&mut other, 3);

        end(other);
        end(guest);
        assert_eq!(served.mistakes(), 0);
        served.check();
    }
}

/// A guest that freezes its file system for the fork gives the child a clean one.
#[test]
fn frozen_file_system_is_clean_in_the_child() {
    let Some(image) = image("frozen_file_system_is_clean_in_the_child") else { return };
    let served = Served::new(128, 2);
    let mut guest = at_work(image, &served, false);
    rounds(&mut guest, 2);
    guest.run("fsfreeze --freeze /mnt");
    let child = served.fork("child");
    guest.run("fsfreeze --unfreeze /mnt");
    let mut other = Guest::boot(image, &GuestOptions::with(vec![child]));

    other.run("e2fsck -fn /dev/vda");
    other.run("mount -o ro /dev/vda /mnt && sha256sum -c /mnt/sums");

    rounds(&mut guest, 2);
    end(guest);
    assert_eq!(served.mistakes(), 0);
}
