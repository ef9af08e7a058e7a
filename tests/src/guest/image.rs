//! What a test guest boots from, and whether this machine can run it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fs};

use crate::tool;

/// Kernel and first file systems, made once by `tests/guest/build.sh`.
#[derive(Debug, Clone)]
pub struct Image {
    /// The emulator.
    pub qemu: PathBuf,
    /// Version of the emulator: major and minor.
    pub version: (u32, u32),
    /// The kernel.
    pub kernel: PathBuf,
    /// File system tools and drivers.
    pub initramfs: PathBuf,
    /// The same with fio; `None` when this machine has no fio.
    pub initramfs_fio: Option<PathBuf>,
}

impl Image {
    /// The image, made now if it was not there.
    ///
    /// # Errors
    /// Why this machine cannot run a guest, as a reason for [`crate::skip`].
    pub fn get() -> Result<&'static Image, String> {
        static IMAGE: OnceLock<Result<Image, String>> = OnceLock::new();
        IMAGE.get_or_init(find).as_ref().map_err(Clone::clone)
    }

    /// Makes `file` a raw disk of 512 MiB with a system that boots with this kernel.
    ///
    /// # Errors
    /// What the script says.
    pub fn make_disk(&self, file: &Path) -> Result<(), String> {
        build(&[OsStr::new("disk"), file.as_os_str()]).map(drop)
    }
}

fn find() -> Result<Image, String> {
    let qemu = tool("qemu-system-x86_64").ok_or("no qemu-system-x86_64 on this machine")?;
    let version = version_of(&qemu).ok_or("qemu-system-x86_64 does not tell its version")?;
    let dir = PathBuf::from(build(&[])?);
    let fio = dir.join("initramfs-fio.cpio");
    Ok(Image {
        qemu,
        version,
        kernel: dir.join("vmlinuz"),
        initramfs: dir.join("initramfs.cpio"),
        initramfs_fio: fio.is_file().then_some(fio),
    })
}

fn version_of(qemu: &Path) -> Option<(u32, u32)> {
    let output = Command::new(qemu).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let mut parts = text.split("version ").nth(1)?.split(['.', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Runs the script and returns what it prints; two test programs at the same time wait for each
/// other there.
fn build(arguments: &[&OsStr]) -> Result<String, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/build.sh");
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let target = env::var_os("CARGO_TARGET_DIR").map_or(target, PathBuf::from);
    let output = Command::new(&script)
        .args(arguments)
        .env("CARGO_TARGET_DIR", target)
        .output()
        .map_err(|e| format!("{}: {e}", script.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or("it did not say why");
        return Err(format!("no guest image: {last}"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// How the guest's processor is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// By the hardware.
    Kvm,
    /// By emulation.
    Tcg,
}

impl Accel {
    /// Hardware when a guest kernel runs on it. `/dev/kvm` alone does not say so: without the
    /// processor's own virtualisation it may offer a KVM on which no stock kernel boots.
    /// `OFFSHOOT_GUEST_ACCEL` (`kvm` or `tcg`) decides otherwise.
    #[must_use]
    pub fn best() -> Accel {
        match env::var("OFFSHOOT_GUEST_ACCEL").as_deref() {
            Ok("kvm") => return Accel::Kvm,
            Ok("tcg") => return Accel::Tcg,
            _ => {}
        }
        let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let hardware = flags
            .lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|line| line.split(' ').any(|flag| flag == "svm" || flag == "vmx"));
        let usable = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        if hardware && usable { Accel::Kvm } else { Accel::Tcg }
    }

    pub(super) fn arguments(self) -> [&'static str; 4] {
        match self {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "qemu64"],
        }
    }
}

/// How many threads emulate processors that have virtualisation of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nested {
    /// One for each processor. Memory that a nested guest has given back may still be written to
    /// by it (`docs/decisions.md`).
    ThreadEach,
    /// One for all of them.
    OneThread,
}

impl Nested {
    /// Processors with AMD's virtualisation and nested paging.
    pub(super) fn arguments(self) -> [&'static str; 4] {
        let how = match self {
            Nested::ThreadEach => "tcg,thread=multi",
            Nested::OneThread => "tcg,thread=single",
        };
        ["-accel", how, "-cpu", "max,+svm,+npt"]
    }
}
