//! What confines the daemon: it serves content that it does not trust, so it gives up beforehand
//! what it will never need.
//!
//! - Landlock: it reaches the folders of its store, of its tails and of its sockets, reads what the
//!   kernel tells about the machine, and nothing else. Kernels without it exist; then this part is
//!   left out, and whoever asks for the daemon's health sees that.
//! - Seccomp: system calls that start programs, load code into the kernel, look into other
//!   processes, or change who one is, where one is and what time it is, fail. The other system
//!   calls stay: it is a list of what is refused, not of what is needed. Work that goes through
//!   io_uring is not seen by it; landlock covers the files that such work opens.
//!
//! Invariant: entered while the process has one thread, before any content is read; threads that
//! start later are confined as well.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use format::{Error, Kind, Result};
use landlock::{
    ABI, Access as _, AccessFs, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Where sockets of disks may be besides the folders of the store and of the control interface.
const SOCKET_FOLDERS: [&str; 2] = ["/run", "/tmp"];
/// What the kernel and the administrator tell about the machine.
const READ_ONLY: [&str; 3] = ["/proc", "/sys", "/etc"];
/// Folders of tails lie below it unless a store says otherwise.
const SHARED_MEMORY: &str = "/dev/shm";

/// System calls that fail from now on.
const REFUSED: [libc::c_long; 40] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_by_handle_at,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setresuid,
    libc::SYS_setgroups,
    libc::SYS_capset,
];

/// The folders that the daemon needs.
#[derive(Debug)]
pub struct Folders {
    /// Its store.
    pub store: PathBuf,
    /// The folder of tails of the store.
    pub tails: PathBuf,
    /// Where its control socket is.
    pub api: PathBuf,
    /// Where sockets of disks may be, besides the usual places.
    pub sockets: Vec<PathBuf>,
}

fn wrong(what: &'static str) -> impl Fn(String) -> Error {
    move |e| {
        Error::new(Kind::Unsupported, e)
            .tried("confine")
            .on(format!("the daemon with {what}"))
            .hint("--sandbox off runs it unconfined")
    }
}

/// Confines the process; gives back the names of what does.
///
/// # Errors
/// `Unsupported` when the kernel refuses what it should have.
pub fn enter(folders: &Folders) -> Result<Vec<String>> {
    let tails = folders.tails.ancestors().find(|f| f.exists()).unwrap_or(Path::new(SHARED_MEMORY));
    let own = [folders.store.as_path(), folders.api.as_path(), tails];
    let named = folders.sockets.iter().map(PathBuf::as_path);
    let usual = SOCKET_FOLDERS.iter().map(Path::new);
    let all: Vec<&Path> = own.into_iter().chain(named).chain(usual).collect();
    let applied = restrict_files(&all, &READ_ONLY.map(Path::new))?;
    refuse_calls(&[])?;
    Ok(applied.into_iter().chain(["seccomp".to_owned()]).collect())
}

/// Lets this thread, and those that it starts, do everything with what is below some paths, and
/// read what is below others, and nothing else with files that have names. Gives back the name of
/// what does that, which a kernel may not have.
///
/// # Errors
/// `Unsupported` when the kernel refuses what it should have.
pub fn restrict_files(all: &[&Path], read_only: &[&Path]) -> Result<Option<String>> {
    if restrict(all, read_only).map_err(|e| wrong("landlock")(e.to_string()))? {
        return Ok(Some("landlock".to_owned()));
    }
    tracing::warn!("this kernel has no landlock: files are not confined");
    Ok(None)
}

/// True when the kernel confines what files can be reached.
fn restrict(all: &[&Path], read_only: &[&Path]) -> std::result::Result<bool, RulesetError> {
    let abi = ABI::V3;
    let everything = AccessFs::from_all(abi);
    // Best effort: an older landlock confines what it knows of.
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let mut ruleset = ruleset.handle_access(everything)?.create()?;
    let reading = read_only.iter().map(|path| (path, AccessFs::from_read(abi)));
    for (path, access) in all.iter().map(|path| (path, everything)).chain(reading) {
        // What is not there cannot be used, confined or not.
        if let Ok(fd) = PathFd::new(path) {
            ruleset = ruleset.add_rule(PathBeneath::new(fd, access))?;
        }
    }
    let status = ruleset.restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// Has the system calls of the list fail from now on, in all threads, but for some.
///
/// # Errors
/// `Unsupported` when the kernel refuses what it should have.
pub fn refuse_calls(but: &[libc::c_long]) -> Result<()> {
    let wrong = wrong("seccomp");
    // No conditions: a call on the list is refused whatever its arguments are.
    let refused = REFUSED.into_iter().filter(|call| !but.contains(call));
    let rules: BTreeMap<i64, Vec<_>> = refused.map(|call| (call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = std::env::consts::ARCH.try_into().map_err(|e| wrong(format!("{e}")))?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch);
    let program: BpfProgram =
        filter.and_then(BpfProgram::try_from).map_err(|e| wrong(e.to_string()))?;
    seccompiler::apply_filter_all_threads(&program).map_err(|e| wrong(e.to_string()))
}
