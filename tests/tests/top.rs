//! `offshoot top` on a terminal: what it shows moves with what the disks do, and the terminal is
//! left as it was found.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use offshoot_tests::daemon::program;
use offshoot_tests::load;
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, tcgetattr};

/// What comes before each picture: the cursor goes to the corner, and what is below it goes.
const REDRAW: &str = "\x1b[H\x1b[J";

/// A program on a terminal of its own.
struct OnTerminal {
    child: Child,
    screen: File,
    terminal: OwnedFd,
    shown: Receiver<String>,
}

impl OnTerminal {
    fn start(mut command: Command) -> OnTerminal {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = open(ptsname(&ours, Vec::new()).unwrap(), flags, Mode::empty()).unwrap();
        let end = || Stdio::from(terminal.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: both are system calls that may be made between fork and exec.
        let child = unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?)
            })
        };
        let child = child.spawn().unwrap();
        let (screen, mut reader) = (File::from(ours.try_clone().unwrap()), File::from(ours));
        let (send, shown) = channel();
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut piece) {
                if send.send(String::from_utf8_lossy(&piece[..len]).into_owned()).is_err() {
                    return;
                }
            }
        });
        OnTerminal { child, screen, terminal, shown }
    }

    fn modes(&self) -> Termios {
        tcgetattr(self.terminal.as_fd()).unwrap()
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // Mostly it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads per second of disk `vm`, the only one, in a picture that is whole.
fn reads_per_s(picture: &str) -> u64 {
    let lines: Vec<&str> = picture.lines().collect();
    assert_eq!(lines.len(), 2, "a head and one disk: {picture}");
    assert!(lines[0].starts_with("DISK"), "{picture}");
    let words: Vec<&str> = lines[1].split_whitespace().collect();
    assert_eq!(words[..2], ["vm", "1"], "the disk and its front end: {picture}");
    words[2].parse().unwrap()
}

#[test]
fn top_shows_what_disks_do_until_it_is_interrupted() {
    let disk = ServedDisk::new(TestStore::new());
    let _daemon = disk.daemon();
    disk.attach();
    let (_client, queues) = disk.connect(false);
    load::during(disk.loads(queues, 1), |_| {
        let mut command = Command::new(program("offshoot"));
        command.env_remove("OFFSHOOT_API").arg("--store").arg(disk.store());
        let mut top = {
            command.args(["top", "--interval", "0.1"]);
            OnTerminal::start(command)
        };
        let before = top.modes();
        let end = Instant::now() + Duration::from_secs(60);
        let mut shown = String::new();
        let mut rates = Vec::new();
        while rates.len() < 4 || rates.iter().all(|rate| *rate == rates[0]) {
            assert!(Instant::now() < end, "it does not move: {shown}");
            shown += &top.shown.recv_timeout(Duration::from_secs(20)).expect("it goes on");
            // The last picture may not be whole.
            let mut pictures: Vec<&str> = shown.split(REDRAW).skip(1).collect();
            pictures.pop();
            rates = pictures.into_iter().map(reads_per_s).collect();
        }
        assert!(rates.iter().any(|rate| *rate > 0), "{rates:?}");

        top.screen.write_all(b"\x03").unwrap();

        let status = top.child.wait().unwrap();
        assert_eq!(status.code(), Some(130), "{status}: {shown}");
        let after = top.modes();
        let modes = |t: &Termios| (t.input_modes, t.output_modes, t.control_modes, t.local_modes);
        assert_eq!(modes(&after), modes(&before));
        shown.extend(top.shown.try_iter());
        assert!(!shown.contains("\x1b[?"), "no mode was set that would have to be set back");
    });
}
