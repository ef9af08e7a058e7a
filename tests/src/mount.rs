//! What tests ask of this machine: its tools, and file systems of their own.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{skip, tool};

/// How long a killed process may keep a file system busy.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs a tool of this machine that must end well; gives back its standard output.
///
/// # Panics
/// When it is not there or fails.
pub fn run(name: &str, args: &[&str]) -> String {
    let path = tool(name).unwrap_or_else(|| panic!("no {name} on this machine"));
    let output = Command::new(path).args(args).stdin(Stdio::null()).output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name} {args:?}: {text}{error}");
    text
}

/// True when all the tools are there; else the test is counted as skipped.
#[must_use]
pub fn have(test: &str, tools: &[&str]) -> bool {
    let missing: Vec<_> = tools.iter().filter(|t| tool(t).is_none()).copied().collect();
    if !missing.is_empty() {
        skip(test, &format!("this machine has no {}", missing.join(", ")));
    }
    missing.is_empty()
}

/// A file system of its own, mounted in a temporary folder; needs root.
pub struct Mount {
    dir: TempDir,
}

impl Mount {
    /// tmpfs of `size` bytes. Without root, the test is counted as skipped.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn tmpfs(test: &str, size: u64) -> Option<Self> {
        if !Self::may(test, &["mount", "umount"]) {
            return None;
        }
        let mount = Self::point();
        let size = format!("size={size}");
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", &mount.target()]);
        Some(mount)
    }

    /// ext4 of `size` bytes in a file of its own. Without root, the test is counted as skipped.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn ext4(test: &str, size: u64) -> Option<Self> {
        if !Self::may(test, &["mount", "umount", "mke2fs", "losetup"]) {
            return None;
        }
        let mount = Self::point();
        let image = mount.dir.path().join("image");
        let file = fs::File::create(&image).expect("a file");
        file.set_len(size).expect("a length");
        let image = image.to_str().expect("a plain path");
        run("mke2fs", &["-q", "-t", "ext4", "-m", "0", image]);
        mount.mount_image();
        Some(mount)
    }

    /// XFS of `size` bytes, 300 MiB at least, in a sparse file of its own: files there can share
    /// space. Without root, the test is counted as skipped.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn xfs(test: &str, size: u64) -> Option<Self> {
        if !Self::may(test, &["mount", "umount", "mkfs.xfs", "losetup"]) {
            return None;
        }
        let mount = Self::point();
        let image = mount.dir.path().join("image");
        let file = fs::File::create(&image).expect("a file");
        file.set_len(size).expect("a length");
        run("mkfs.xfs", &["-q", "-m", "reflink=1", image.to_str().expect("a plain path")]);
        mount.mount_image();
        Some(mount)
    }

    fn mount_image(&self) {
        let image = self.dir.path().join("image");
        run("mount", &["-o", "loop", image.to_str().expect("a plain path"), &self.target()]);
    }

    fn may(test: &str, tools: &[&str]) -> bool {
        if !rustix::process::geteuid().is_root() {
            skip(test, "mounting a file system needs root");
            return false;
        }
        have(test, tools)
    }

    fn point() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(dir.path().join("mnt")).expect("a folder");
        Mount { dir }
    }

    fn target(&self) -> String {
        self.path().to_str().expect("a plain path").to_owned()
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Does to an ext4 file system what a power cut does: what was not synced is gone, and the rest
    /// is what its journal says. What is open in it gets errors from now on; see
    /// [`Mount::power_up`].
    ///
    /// # Panics
    /// When the host does not let us.
    pub fn cut_power(&self) {
        /// `_IOR('X', 125, __u32)`, which ext4 has from XFS.
        const SHUTDOWN: libc::Ioctl = 0x8004_587d;
        // At once, without writing the log of the file system.
        let no_log_flush = 2_u32;
        let root = fs::File::open(self.path()).expect("the folder");
        // SAFETY: the call reads a 32-bit number, which outlives it.
        let done = unsafe { libc::ioctl(root.as_raw_fd(), SHUTDOWN, &raw const no_log_flush) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// Mounts an ext4 file system again after [`Mount::cut_power`], when those who had it open are
    /// dead.
    ///
    /// # Panics
    /// When somebody still has it open.
    pub fn power_up(&self) {
        let umount = tool("umount").expect("it was there");
        let end = Instant::now() + LIMIT;
        // The kernel closes the rings of a killed process, and the files in them, in its own time.
        loop {
            let output = Command::new(&umount).arg(self.target()).output().expect("it starts");
            if output.status.success() {
                break;
            }
            assert!(Instant::now() < end, "{output:?}");
            std::thread::sleep(LIMIT / 500);
        }
        self.mount_image();
    }

    /// Mounts it anew with an option, `ro` for example.
    pub fn remount(&self, option: &str) {
        run("mount", &["-o", &format!("remount,{option}"), &self.target()]);
    }

    /// Takes all the space that is left but for `spare` bytes, until the file is dropped.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn fill(&self, spare: u64) -> Filler {
        let path = self.path().join("filler");
        let file = fs::File::create(&path).expect("a file");
        let mut at = 0;
        for step in [1 << 20, 64 << 10, 4 << 10] {
            let bytes = vec![1; step];
            while file.write_all_at(&bytes, at).is_ok() {
                at += step as u64;
            }
        }
        file.sync_all().ok();
        file.set_len(at.saturating_sub(spare)).expect("a shorter file");
        file.sync_all().expect("nothing to write");
        Filler(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let path = tool("umount").expect("it was there");
        // Lazily: a test that failed may have left a process in it.
        let _ = Command::new(path).args(["-l", &self.target()]).status();
    }
}

/// A file that takes space until it is dropped.
pub struct Filler(PathBuf);

impl Drop for Filler {
    fn drop(&mut self) {
        fs::remove_file(&self.0).expect("it is there");
    }
}
