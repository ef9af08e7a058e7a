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
use offshoot_tests::vm::{Lab, kill};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{ControlModes, InputModes, LocalModes, OutputModes, tcgetattr};

/// What comes before each picture: the cursor goes to the corner, and what is below it goes.
const REDRAW: &str = "\x1b[H\x1b[J";

/// A program on a terminal of its own.
struct OnTerminal {
    child: Child,
    screen: File,
    terminal: OwnedFd,
    shown: Receiver<String>,
    /// The modes in which it found the terminal.
    found: Modes,
}

/// The modes of a terminal that anybody sets.
type Modes = (InputModes, OutputModes, ControlModes, LocalModes);

fn modes_of(terminal: &OwnedFd) -> Modes {
    let t = tcgetattr(terminal.as_fd()).unwrap();
    (t.input_modes, t.output_modes, t.control_modes, t.local_modes)
}

impl OnTerminal {
    fn start(mut command: Command) -> OnTerminal {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = open(ptsname(&ours, Vec::new()).unwrap(), flags, Mode::empty()).unwrap();
        let found = modes_of(&terminal);
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
        OnTerminal { child, screen, terminal, shown, found }
    }

    /// Waits until a picture like this is shown; gives back all that was.
    fn until(&self, what: &str, is: impl Fn(&[&str]) -> bool) -> String {
        let end = Instant::now() + Duration::from_secs(60);
        let mut shown = String::new();
        loop {
            assert!(Instant::now() < end, "{what}: {shown}");
            shown += &self.shown.recv_timeout(Duration::from_secs(20)).expect("it goes on");
            // The last picture may not be whole.
            let mut pictures: Vec<&str> = shown.split(REDRAW).skip(1).collect();
            pictures.pop();
            if is(&pictures) {
                return shown;
            }
        }
    }

    /// Waits until keys are taken one by one, and not shown.
    fn until_keys_are_taken(&self) {
        let keys = LocalModes::ICANON | LocalModes::ECHO;
        offshoot_tests::until("keys are taken", || !modes_of(&self.terminal).3.intersects(keys));
    }

    /// Waits for the end, after which the terminal is as it was found.
    fn ends_with(mut self, code: i32) {
        let status = self.child.wait().unwrap();
        let shown: String = self.shown.try_iter().collect();
        assert_eq!(status.code(), Some(code), "{status}: {shown}");
        assert_eq!(modes_of(&self.terminal), self.found, "modes stay that were set");
        assert!(!shown.contains("\x1b[?"), "no mode was set that would have to be set back");
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

fn top_of(disk: &ServedDisk) -> Command {
    let mut command = Command::new(program("offshoot"));
    command.env_remove("OFFSHOOT_API").env_remove("OFFSHOOT_FORKD");
    command.arg("--store").arg(disk.store()).args(["top", "--interval", "0.1"]);
    command
}

#[test]
fn top_shows_what_disks_do_until_it_is_interrupted() {
    let disk = ServedDisk::new(TestStore::new());
    let _daemon = disk.daemon();
    disk.attach();
    let (_client, queues) = disk.connect(false);
    load::during(disk.loads(queues, 1), |_| {
        let mut top = OnTerminal::start(top_of(&disk));
        top.until("it moves", |pictures| {
            let rates: Vec<u64> = pictures.iter().map(|p| reads_per_s(p)).collect();
            rates.len() >= 4 && rates.iter().any(|rate| *rate != rates[0] && *rate > 0)
        });
        top.screen.write_all(b"\x03").unwrap();
        top.ends_with(130);
    });
}

/// Who sees a screen full of numbers types `q`. Keys are not shown meanwhile, and afterwards they
/// are again; also when it is ended by a signal, or when there is nothing to type on.
#[test]
fn q_leaves_and_the_terminal_is_left_as_it_was_found() {
    let disk = ServedDisk::new(TestStore::new());
    let _daemon = disk.daemon();
    disk.attach();
    let mut top = OnTerminal::start(top_of(&disk));
    top.until_keys_are_taken();
    // Other keys do nothing.
    top.screen.write_all(b"xyz\n").unwrap();
    top.until("it goes on", |pictures| pictures.len() > 5);
    top.screen.write_all(b"q").unwrap();
    top.ends_with(0);

    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let top = OnTerminal::start(top_of(&disk));
        top.until_keys_are_taken();
        kill(top.child.id(), signal);
        top.ends_with(130);
    }

    // Standard input is a pipe, in which a `q` is no key, then one that has ended.
    for typed in [Some(b"q"), None] {
        let mut command = Command::new("sh");
        // As a shell takes it, with what is taken out of the environment.
        let inner = format!("{:?}", top_of(&disk));
        let from = if typed.is_some() { "(printf q; sleep 60)" } else { "true" };
        command.args(["-c", &format!("trap : INT; {from} | {inner}")]);
        let mut top = OnTerminal::start(command);
        top.until("it goes on", |pictures| pictures.len() > 5);
        assert_eq!(modes_of(&top.terminal), top.found);
        top.screen.write_all(b"\x03").unwrap();
        top.ends_with(130);
    }
}

/// Who waits for a flatten sees how far it has come beside what it does to the guest.
#[test]
fn top_shows_how_far_a_flatten_has_come() {
    let disk = ServedDisk::new(TestStore::new());
    disk.write("vm", 0, &[7; 16 << 20]);
    disk.done(&["disk", "fork", "vm", "child"]);
    let _daemon = disk.daemon();
    disk.attach();
    let percent = || disk.json(&["top", "--interval", "0.1"])[0]["flatten_percent"].clone();
    assert!(percent().is_null());
    let job = disk.json(&["disk", "flatten", "vm", "--to", "nothing", "--rate", "4M"]);
    offshoot_tests::until("some of it is done", || {
        percent().as_u64().expect("it is under way") > 0
    });
    let shown = String::from_utf8(disk.done(&["top", "--interval", "0.1"])).unwrap();
    assert!(shown.contains("FLATTEN"), "{shown}");
    disk.done(&["job", "cancel", &job["id"].to_string()]);
    offshoot_tests::until("it is not under way", || percent().is_null());
}

/// Machines have rows of their own: how they are, what memory they have to themselves and share,
/// and how busy they are.
#[test]
fn top_shows_machines_when_a_forkd_is_there() {
    let Some(lab) = Lab::new("top_shows_machines_when_a_forkd_is_there") else { return };
    lab.disk("root");
    let mut parent = lab.run("busy", &["root"]);
    lab.done(&["vm", "fork", "busy", "idle"]);
    lab.done(&["vm", "pause", "idle"]);
    assert_eq!(parent.ask("w"), "writing");
    let mut top = OnTerminal::start(lab.command(&["top", "--interval", "0.1"]));
    top.until("the busy one does something, the other one does not", |pictures| {
        pictures.iter().any(|picture| {
            let row = |name: &str| -> Vec<String> {
                let found = picture.lines().find(|line| line.starts_with(name));
                let line = found.unwrap_or_else(|| panic!("no {name} in {picture}"));
                line.split_whitespace().map(str::to_owned).collect()
            };
            assert!(picture.contains("\r\n\r\nVM "), "disks, then machines: {picture}");
            assert!(row("root")[0] == "root" && row("idle-disk0")[0] == "idle-disk0");
            let (busy, idle) = (row("busy "), row("idle "));
            assert_eq!((&*busy[1], &*idle[1]), ("running", "paused"));
            // The last two words are the percentage.
            let exits = |row: &[String]| row[row.len() - 3].parse::<u64>().unwrap();
            assert_eq!(exits(&idle), 0, "{picture}");
            exits(&busy) > 0
        })
    });
    top.screen.write_all(b"q").unwrap();
    top.ends_with(0);
    let rows = lab.json(&["top", "--interval", "0.2"]);
    let vms: Vec<_> = rows.as_array().unwrap().iter().filter(|row| !row["vm"].is_null()).collect();
    assert_eq!((vms.len(), &vms[0]["vm"]), (2, &"busy".into()));
    for key in ["private_bytes", "shared_bytes", "proportional_bytes", "exits_per_s"] {
        assert!(vms[0][key].as_f64().unwrap() > 0.0, "{key}: {rows}");
    }
    parent.say("");
}
