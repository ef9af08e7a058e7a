//! `forkd`: the daemon that runs virtual machines and forks them. It stays in the foreground.
//!
//! The same program is the process of each machine, forked from one that only the daemon starts
//! (`forkd zygote`).
//!
//! Order of a start, and what it defends against: the folder's lock first, so that no machine is
//! touched that another daemon has; then machines are found again; then the socket, so that whoever
//! is answered sees all of them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use blockd::api::{Access, ApiSocket, group_id, serve};
use blockd::daemon::sandbox;
use blockd::program;
use clap::{Parser, Subcommand, ValueEnum};
use forkd::daemon::{Daemon, Options};
use forkd::process;
use format::{Context as _, Error, Result};

/// Threads for requests that take time.
const BLOCKING_THREADS_MAX: usize = 64;
/// How long threads may take to end after everything was closed.
const LAST_GRACE: Duration = Duration::from_secs(2);

/// Run virtual machines whose disks are blockd's, and fork them while they run.
///
/// Each machine is a process of its own, which goes on when the daemon ends; a daemon that starts
/// with the same folder finds it again. blockd has to be allowed to make sockets in that folder
/// (`blockd --socket-dir`), unless it is below /run or /tmp.
#[derive(Debug, Parser)]
#[command(name = "forkd", version, max_term_width = 100)]
#[command(subcommand_negates_reqs = true, args_conflicts_with_subcommands = true)]
struct Args {
    /// The folder in which machines are found again
    #[arg(long, env = "OFFSHOOT_FORKD_STATE", value_name = "DIR")]
    #[arg(default_value = "/run/offshoot/forkd")]
    state: PathBuf,

    /// The socket of the blockd that has the disks
    #[arg(long, value_name = "SOCK", default_value = "/run/offshoot/blockd.sock")]
    blockd: PathBuf,

    /// The socket of the control interface
    #[arg(long, env = "OFFSHOOT_FORKD", value_name = "SOCK")]
    #[arg(default_value = "/run/offshoot/forkd.sock")]
    api: PathBuf,

    /// Let the members of a group use the control interface, too; its owner and root always may
    #[arg(long, value_name = "GROUP")]
    allow_group: Option<String>,

    /// Shells that are kept ready for forks, of each size of machine that is in use
    #[arg(long, value_name = "N", default_value = "4")]
    pool_size: u16,

    /// Have children stand by for a machine that was forked, connected to their disks before it is
    /// forked again into as many: these then run in half the time
    #[arg(long, value_name = "MODE", default_value = "on")]
    standby: Standby,

    /// Give up what the daemon and the processes of machines do not need: files and dangerous
    /// system calls
    #[arg(long, value_name = "MODE", default_value = "on")]
    sandbox: Sandbox,

    #[command(subcommand)]
    part: Option<Part>,
}

/// What this program is besides the daemon.
#[derive(Debug, Subcommand)]
enum Part {
    /// Be the process of which those of machines are forked; standard input is the connection to
    /// the daemon
    #[command(hide = true)]
    Zygote {
        /// Room for what these processes call themselves
        room: String,
    },
}

/// Whether children stand by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Standby {
    /// When it is quiet, of shells that are ready.
    On,
    /// Never.
    Off,
}

/// Whether a process confines itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sandbox {
    /// As far as the kernel can.
    On,
    /// Not at all.
    Off,
}

fn main() -> ExitCode {
    let args = Args::parse();
    program::log_to_standard_error();
    program::allow_many_files();
    match &args.part {
        None => program::ended("forkd", run(&args)),
        // What it tells of is what became of a machine's process.
        Some(Part::Zygote { .. }) => program::ended("forkd vm", process::zygote::serve()),
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context("find", || path.display().to_string())
}

fn run(args: &Args) -> Result<()> {
    let api = absolute(&args.api)?;
    let group = args.allow_group.as_deref().map(group_id).transpose()?;
    let options = Options {
        state: absolute(&args.state)?,
        blockd: absolute(&args.blockd)?,
        pool_size: args.pool_size.into(),
        standby: args.standby == Standby::On,
        sandbox: args.sandbox == Sandbox::On,
    };
    let mut confined_by = Vec::new();
    if options.sandbox {
        // It starts the processes of machines, which confine themselves further.
        sandbox::refuse_calls(&[libc::SYS_execve])?;
        confined_by.push("seccomp".to_owned());
    }
    let daemon = Daemon::open(&options, confined_by)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_name("control")
        .build()
        .context("start", || "the control runtime".into())?;
    let socket = ApiSocket::bind(&api, Access { group })?;
    let served = runtime.block_on(async {
        program::watch_signals(&daemon)?;
        program::tell_the_service_manager("READY=1");
        tracing::info!(state = %options.state.display(), api = %api.display(), "ready");
        serve(daemon.clone(), socket).await
    });
    program::tell_the_service_manager("STOPPING=1");
    daemon.end_service();
    runtime.shutdown_timeout(LAST_GRACE);
    served.map_err(|e: Error| e.tried("serve").on("the control interface"))
}
