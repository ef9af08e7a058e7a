//! What a VM process gives up before a guest runs in it: every file but those of its own folder,
//! and the system calls that blockd gives up as well (`blockd::daemon::sandbox`), starting programs
//! among them.
//!
//! Memory of others, the kernel that it boots, its tap interface and the connection to blockd come
//! as open files, which have no names here. Sockets of disks are connected to by name, which
//! landlock lets pass.
//!
//! Invariant: entered before the first thread of the machine starts; all of them are confined.

use std::path::Path;

use blockd::daemon::sandbox;
use format::Result;

/// What processors are made by.
const KVM: &str = "/dev/kvm";
/// Files of its own that are open; and what the kernel says about memory.
const READ_ONLY: [&str; 3] = ["/proc", "/sys", "/dev/null"];

/// Confines the process of a machine in `folder`; gives back the names of what does.
///
/// # Errors
/// `Unsupported` when the kernel refuses what it should have.
pub fn enter(folder: &Path) -> Result<Vec<String>> {
    let files = sandbox::restrict_files(&[folder, Path::new(KVM)], &READ_ONLY.map(Path::new))?;
    sandbox::refuse_calls(&[])?;
    Ok(files.into_iter().chain(["seccomp".to_owned()]).collect())
}
