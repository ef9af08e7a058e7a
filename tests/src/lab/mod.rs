//! The nested lab: a machine in QEMU whose emulated processor has AMD's virtualisation, with a
//! stock kernel and its own KVM, in which our programs run Linux guests.
//!
//! It shows what this machine's own `/dev/kvm` may not be able to: that a distribution's kernel
//! boots under `forkd`, with disks of `blockd`. Everything is emulated, so nothing here says
//! anything about speed.
//!
//! The lab boots the same image as the other test guests, with a second archive behind it: our
//! programs as they are built for the tests, and what the inner guest boots from.

mod anew;
mod archive;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub use anew::play;
pub use archive::Archive;

use crate::daemon::program;
use crate::guest::{Guest, GuestOptions, Image, Nested};

/// How long a command in the lab may take: an inner guest boots in a fraction of it.
pub const RUN: Duration = Duration::from_secs(120);

/// First process of the guests in the lab.
const INIT: &[u8] = include_bytes!("../../lab/init");
/// Of the disk that they boot from, as `mke2fs` takes it.
const SYSTEM_SIZE: &str = "48M";

/// A lab that runs.
#[derive(Debug)]
pub struct Lab {
    guest: Guest,
    _dir: tempfile::TempDir,
}

impl Lab {
    /// Starts a lab with `programs` of this workspace in it, and what a Linux guest boots from.
    ///
    /// # Errors
    /// What this machine lacks, as a reason for [`crate::skip`].
    ///
    /// # Panics
    /// When the lab does not boot, or has no KVM.
    pub fn start(programs: &[&str]) -> Result<Lab, String> {
        let image = Image::get()?;
        let mut archive = guest_of(image)?;
        add_programs(&mut archive, programs);
        Lab::boot(image, archive, 2048, Nested::ThreadEach)
    }

    /// Starts a lab with `programs` and the libraries that they need, and nothing besides. One
    /// thread emulates it: slower, and right about memory that guests give back and get again.
    ///
    /// # Errors
    /// As [`Lab::start`].
    ///
    /// # Panics
    /// As [`Lab::start`].
    pub fn bare(programs: &[&str]) -> Result<Lab, String> {
        let mut archive = Archive::default();
        add_programs(&mut archive, programs);
        Lab::boot(Image::get()?, archive, 1024, Nested::OneThread)
    }

    fn boot(
        image: &Image,
        archive: Archive,
        memory_mib: u32,
        nested: Nested,
    ) -> Result<Lab, String> {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let second = dir.path().join("lab.cpio");
        fs::write(&second, archive.finish()).map_err(|e| e.to_string())?;
        let options = GuestOptions {
            memory_mib,
            nested: Some(nested),
            second_archive: Some(second),
            ..GuestOptions::default()
        };
        let mut guest = Guest::boot(image, &options);
        if guest.try_run("modinfo kvm_amd", RUN).code != 0 {
            return Err("the distribution's kernel comes without kvm_amd".to_owned());
        }
        guest.run("modprobe kvm_amd && test -c /dev/kvm");
        Ok(Lab { guest, _dir: dir })
    }

    /// Whether the emulator still runs.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn is_running(&mut self) -> bool {
        self.guest.is_running()
    }

    /// Runs a line of shell in the lab and returns what it wrote.
    ///
    /// # Panics
    /// When it fails or takes longer than [`RUN`].
    pub fn run(&mut self, command: &str) -> String {
        let output = self.guest.try_run(command, RUN);
        assert_eq!(output.code, 0, "`{command}`: {}", output.text);
        output.text
    }

    /// Runs a line of shell in the lab, whatever comes of it: exit code and output.
    ///
    /// # Panics
    /// When it takes longer than [`RUN`].
    pub fn try_run(&mut self, command: &str) -> (i32, String) {
        let output = self.guest.try_run(command, RUN);
        (output.code, output.text)
    }
}

/// What a Linux guest in the lab boots from: a kernel, drivers to find its disk with, and a system
/// for that disk, where its tools and our agent are.
fn guest_of(image: &Image) -> Result<Archive, String> {
    let first = fs::read(&image.initramfs).expect("the guest image was just made");
    let mut overlay = Archive::default();
    overlay.add("init", INIT);
    overlay.add("sbin/init", INIT);
    let mut drivers = first.clone();
    drivers.extend(overlay.finish());

    let mut agent = Archive::default();
    agent.add("sbin/init", INIT);
    add_programs(&mut agent, &["lab_agent"]);
    let system = file_system_of(&[first, agent.finish()]).map_err(|e| e.to_string())?;

    let mut archive = Archive::default();
    archive.add("lab/initramfs", &drivers);
    archive.add("lab/system", &system);
    archive.add("lab/kernel", &fs::read(&image.kernel).expect("as above"));
    Ok(archive)
}

/// An ext4 file system with what is in the archives, the later over the earlier.
fn file_system_of(archives: &[Vec<u8>]) -> std::io::Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let (tree, disk) = (dir.path().join("tree"), dir.path().join("disk"));
    fs::create_dir(&tree)?;
    for archive in archives {
        let from = dir.path().join("archive");
        fs::write(&from, archive)?;
        let unpack = ["--quiet", "--extract", "--make-directories", "--unconditional"];
        done(Command::new("cpio").args(unpack).stdin(fs::File::open(from)?).current_dir(&tree))?;
    }
    let make = ["-q", "-t", "ext4", "-E", "root_owner=0:0", "-d"];
    // Not in the path of everybody.
    let mke2fs = crate::tool("mke2fs").ok_or_else(|| std::io::Error::other("no mke2fs here"))?;
    done(Command::new(mke2fs).args(make).arg(&tree).arg(&disk).arg(SYSTEM_SIZE))?;
    fs::read(disk)
}

fn done(command: &mut Command) -> std::io::Result<()> {
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(std::io::Error::other(said)) }
}

/// Adds programs of this workspace and the libraries that they need.
fn add_programs(archive: &mut Archive, names: &[&str]) {
    let mut libraries = Vec::new();
    for name in names {
        let path = program(name);
        archive.add(&format!("usr/bin/{name}"), &stripped(&path));
        libraries.extend(libraries_of(&path));
    }
    libraries.sort();
    libraries.dedup();
    for library in libraries {
        let name = library.to_str().expect("a plain path").trim_start_matches('/');
        archive.add(name, &fs::read(&library).expect("a library that ldd names"));
    }
}

/// A program without its debug information, which is most of it: as it is in a lab.
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn stripped(program: &Path) -> Vec<u8> {
    let copy = tempfile::NamedTempFile::new().expect("a temporary file");
    let done = Command::new("strip").arg("-o").arg(copy.path()).arg(program).status();
    // Without the tool the lab is larger and slower to start, and otherwise the same.
    let from = if done.is_ok_and(|s| s.success()) { copy.path() } else { program };
    fs::read(from).expect("a program that was just built")
}

fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.lines().filter_map(|l| l.split_whitespace().find(|w| w.starts_with('/')));
    words.map(PathBuf::from).collect()
}
