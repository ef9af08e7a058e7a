//! What a program in a guest has to do that can be forked, and a count of which a fork must take
//! disk and memory at one instant: `lab_agent DEVICE` in the guest of the nested lab.
//!
//! It looks at the identity page. A new generation means: this is another machine now. It then
//! mixes the new seed into the kernel's random numbers, acknowledges, and writes `NAME MAC
//! GENERATION` to `/run/identity`. Kernels that have a driver for the generation id do the part of
//! the random numbers themselves; the stock kernel of the lab has none.
//!
//! Meanwhile it counts: first on the device, past the page cache, then in `/run/count`. Whatever
//! instant a fork takes, a child that has finished the step it was in finds the same number in
//! both; `/run/instant` has the two of them.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use forkd::devices::layout::IDENTITY_MMIO;

const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// One block, aligned as unbuffered access wants it.
#[repr(align(4096))]
struct Block([u8; 4096]);

/// The identity page, mapped.
struct Page(*mut u64);

impl Page {
    fn open() -> Page {
        let mut how = File::options();
        how.read(true).write(true).custom_flags(libc::O_SYNC);
        let mem = how.open("/dev/mem").expect("root has /dev/mem");
        let (prot, len) = (libc::PROT_READ | libc::PROT_WRITE, 4096);
        let at = i64::try_from(IDENTITY_MMIO.0.0).expect("below 4 GiB");
        // SAFETY: a new mapping of a device's registers, which alias nothing.
        let page = unsafe {
            libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, mem.as_raw_fd(), at)
        };
        assert_ne!(page, libc::MAP_FAILED, "the identity page can be mapped");
        Page(page.cast())
    }

    fn read<const N: usize>(&self, at: usize) -> Vec<u8> {
        // SAFETY: words inside the mapped page.
        let word = |i| unsafe { self.0.add(at / 8 + i).read_volatile() };
        (0..N).flat_map(|i| word(i).to_le_bytes()).collect()
    }

    fn acknowledge(&self, generation: &[u8]) {
        let word = u64::from_le_bytes(generation[..8].try_into().expect("8 of 16 bytes"));
        // SAFETY: the second word of the mapped page.
        unsafe { self.0.add(1).write_volatile(word) };
    }
}

/// Mixes `seed` into the kernel's random numbers, for all that are drawn from now on.
fn reseed(seed: &[u8]) {
    let random = File::options().write(true).open("/dev/random").expect("a random device");
    let mut asked = Vec::new();
    asked.extend(i32::try_from(seed.len() * 8).expect("bits").to_ne_bytes());
    asked.extend(i32::try_from(seed.len()).expect("bytes").to_ne_bytes());
    asked.extend(seed);
    // SAFETY: the request reads two numbers and as many bytes as the second says.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, asked.as_ptr()) };
    // SAFETY: the request has no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    assert_eq!((added, reseeded), (0, 0), "{}", std::io::Error::last_os_error());
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn publish(path: &str, line: &str) {
    let new = format!("{path}.new");
    let written = File::create(&new).and_then(|mut f| writeln!(f, "{line}"));
    written.and_then(|()| fs::rename(&new, path)).expect("memory for a line");
}

fn main() {
    let device = std::env::args().nth(1).expect("a device");
    let flags = libc::O_DIRECT | libc::O_DSYNC;
    let device = File::options().read(true).write(true).custom_flags(flags).open(&device);
    let device = device.expect("the device is there");
    let page = Page::open();
    let mut block = Block([0; 4096]);
    let mut generation = Vec::new();
    for count in 1u64.. {
        let now = page.read::<2>(0x10);
        if now != generation {
            device.read_exact_at(&mut block.0, 0).expect("the device reads");
            let on_disk = u64::from_le_bytes(block.0[..8].try_into().expect("8 bytes"));
            reseed(&page.read::<4>(0x40));
            page.acknowledge(&now);
            let name = page.read::<16>(0x80);
            let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned();
            publish("/run/instant", &format!("{on_disk} {}", count - 1));
            let mac = &page.read::<1>(0x30)[..6];
            publish("/run/identity", &format!("{name} {} {}", hex(mac), hex(&now)));
            generation = now;
        }
        block.0[..8].copy_from_slice(&count.to_le_bytes());
        device.write_all_at(&block.0, 0).expect("the device writes");
        publish("/run/count", &count.to_string());
        std::thread::sleep(Duration::from_millis(20));
    }
}
