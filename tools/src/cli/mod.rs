//! The command line: what can be asked for, and the help that says so.
//!
//! The first paragraph of a doc comment is the short help, all of it the long one.

mod bytes;
mod daemon;
mod disk;
mod flatten;
mod fork;
mod images;
mod modes;
mod serve;
mod vm;

use std::path::PathBuf;

use blockd::store::file::CacheMode;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

pub use bytes::{Discard, Range, Write};
pub use daemon::{DaemonVerb, Events, JobId, JobVerb, StartDaemon, Top, UpgradeDaemon};
pub use disk::{Check, Compare, Create, DiskVerb, Name, Remove, Rename, Repair, Resize};
pub use flatten::{DiskPolicy, Flatten, StorePolicy};
pub use fork::Fork;
pub use images::{Diff, Export, Import, SinkFormat};
pub use modes::Mode;
pub use serve::{Attach, Detach, ExportNbd, Limit};
pub use vm::{ForkVm, RemoveVm, Restore, RunVm, Snapshot, SnapshotRm, StopVm, VmName, VmVerb};

const ABOUT_CODES: &str = "\
Exit codes (stable; with --json, failures also come as an object {\"error\": …}):
    0  done; for compare, check, scrub and repair: nothing found, nothing left
    1  compare found a difference; check or scrub found a problem, repair left one
    2  the command line makes no sense (invalid)
    3  there is no such store, disk or file (not-found)
    4  the name is taken (exists)
    5  another process has the store (busy), or other disks or data depend on it (in-use)
    6  stored content is damaged (corrupt)
    7  the host has no space left; nothing was lost (no-space)
    8  a newer format, or a feature this build does not have (unsupported)
    9  sealed disk, read-only file system, or no permission (read-only)
   10  the host reported an I/O error (io)
   11  a parent segment is missing or is not the recorded one (parent-missing, parent-changed)
   12  completed but unflushed writes of a live session are missing (tail-lost)
   13  it failed before and must be opened anew (failed)
   14  a bug of this program
   15  the host has no memory left (no-memory), or does not reach its storage (unreachable)
  130  a signal stopped it; what was unfinished is gone (cancelled)

Examples:
  offshoot --store /srv/vms init
  export OFFSHOOT_STORE=/srv/vms
  offshoot disk import debian-13.qcow2 debian
  offshoot disk seal debian
  offshoot disk create web1 --parent debian
  offshoot disk ls
  offshoot disk export web1 /tmp/web1.qcow2 --format qcow2";

/// Delta disks in a store folder: import, fork, check and export them.
///
/// A store is a folder that holds virtual disks. A disk is a root (an image of its own) or stands
/// on a sealed disk, its parent, and holds only what is different from it. A verb asks
/// the daemon that has the store; when there is none it opens the folder itself, which it needs for
/// itself if it changes something.
///
/// Sizes and offsets are whole numbers of bytes, or have a suffix: k, M, G or T, by powers of 1024.
///
/// Writes go through the host's page cache and are synced before a verb ends. The power may be cut
/// and the process killed at any moment: the store opens again, what was complete is there, what
/// was unfinished is gone.
#[derive(Debug, Parser)]
#[command(name = "offshoot", version, after_long_help = ABOUT_CODES, max_term_width = 100)]
#[command(after_help = "`offshoot --help` has the exit codes and examples.")]
#[command(disable_help_subcommand = false, infer_subcommands = false)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options of every verb.
#[derive(Debug, Args)]
pub struct Global {
    /// The folder of the store
    #[arg(long, short = 's', global = true, env = "OFFSHOOT_STORE", value_name = "DIR")]
    #[arg(help_heading = "General options")]
    pub store: Option<PathBuf>,

    /// The socket of the daemon to ask
    ///
    /// Without it, the daemon that has the store of `--store` is asked, and when none does the
    /// folder is opened. Without a store either, the socket is what OFFSHOOT_API says, or
    /// /run/offshoot/blockd.sock.
    #[arg(long, global = true, value_name = "SOCK", help_heading = "General options")]
    pub api: Option<PathBuf>,

    /// The socket of the forkd to ask, for `vm` verbs
    ///
    /// Without it, it is what OFFSHOOT_FORKD says, or /run/offshoot/forkd.sock.
    #[arg(long, global = true, env = "OFFSHOOT_FORKD", hide_env = true, value_name = "SOCK")]
    #[arg(help_heading = "General options")]
    pub forkd: Option<PathBuf>,

    /// Print one JSON value instead of text
    ///
    /// Results and failures go to standard output as JSON. The exceptions are `disk read`, whose
    /// standard output is the data and whose JSON goes to standard error. Notes, and failures as
    /// text, still go to standard error.
    #[arg(long, global = true, help_heading = "General options")]
    pub json: bool,

    /// No confirmations, notes or progress
    #[arg(long, short, global = true, help_heading = "General options")]
    pub quiet: bool,

    /// Use of the host's page cache by the store's files: buffered, direct or auto
    ///
    /// `buffered` goes through the page cache. `direct` bypasses it, and is refused where the file
    /// system cannot. `auto` is `direct` where possible. What is durable is the same in all of
    /// them. A daemon that has the store was told when it was started: another mode than that is
    /// refused then.
    ///
    /// Without it, it is buffered, or the daemon's.
    #[arg(long, global = true, value_name = "MODE", help_heading = "General options")]
    #[arg(hide_possible_values = true)]
    pub cache: Option<Cache>,
}

impl Global {
    /// The mode that was asked for, if one was.
    pub fn cache_mode(&self) -> Option<CacheMode> {
        self.cache.map(|cache| match cache {
            Cache::Direct => CacheMode::Direct,
            Cache::Buffered => CacheMode::Buffered,
            Cache::Auto => CacheMode::Auto,
        })
    }
}

/// Use of the host's page cache.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Cache {
    /// Past the page cache, or not at all.
    Direct,
    /// Through the page cache.
    Buffered,
    /// Direct where the file system can.
    Auto,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make a store in an empty folder
    ///
    /// The folder is created if it does not exist. It should be on a local file system with sparse
    /// files (ext4, XFS, btrfs).
    #[command(after_help = "\
Examples:
  offshoot --store /srv/vms init")]
    Init(Init),

    /// Work with the disks of a store
    #[command(subcommand)]
    Disk(DiskVerb),

    /// Look after a store as a whole
    #[command(subcommand)]
    Store(StoreVerb),

    /// Boot, fork and look after virtual machines
    #[command(subcommand)]
    Vm(VmVerb),

    /// Start, look at and end the daemon of a store
    #[command(subcommand)]
    Daemon(DaemonVerb),

    /// Look at the long work of a daemon, and stop it
    #[command(subcommand)]
    Job(JobVerb),

    /// Show what happened to a daemon and its disks
    ///
    /// The daemon keeps the last thousand events. With `--json` each is one JSON object on a line
    /// of its own.
    #[command(after_help = "\
Examples:
  offshoot events
  offshoot events --follow --json | jq 'select(.kind == \"held\")'")]
    Events(Events),

    /// Show what disks in service and machines do, second by second
    ///
    /// Machines are shown when a forkd is there that has its disks from this daemon, or that
    /// --forkd names. Percentiles are of the time between two looks. On a terminal, `q` leaves.
    /// Without a terminal, or with `--once` or `--json`, one look is printed.
    #[command(after_help = "\
Examples:
  offshoot top
  offshoot top --once --interval 5
  offshoot top --json | jq '.[] | select(.disk) | {disk, p99_us}'")]
    Top(Top),

    /// Print a completion script for a shell
    #[command(after_help = "\
Examples:
  offshoot completions bash > /etc/bash_completion.d/offshoot
  offshoot completions zsh > \"${fpath[1]}/_offshoot\"
  offshoot completions fish > ~/.config/fish/completions/offshoot.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// `init`
#[derive(Debug, Args)]
pub struct Init {
    /// Folder on tmpfs where writes of live disks are kept until they are flushed
    ///
    /// It must survive the processes that use the store, and vanish when the host restarts. The
    /// default is a folder below /dev/shm that carries the identity of the store.
    #[arg(long, value_name = "DIR")]
    pub tail_dir: Option<PathBuf>,
}

/// `store …`
#[derive(Debug, Subcommand)]
pub enum StoreVerb {
    /// Make the catalogue anew from the disks' own files
    ///
    /// The catalogue says which disks there are; all of it can be read off the segment files again.
    /// Use this when the catalogue is damaged or missing, or after segment files were copied into
    /// the folder. The old catalogue is not needed and is replaced as a whole. Two disks that claim
    /// one name both stay; one of them gets a new name.
    #[command(after_help = "\
Examples:
  offshoot store rebuild
  offshoot store rebuild --json | jq '.renamed, .missing'")]
    Rebuild,

    /// Show the space that the store takes and has left
    #[command(after_help = "\
Examples:
  offshoot store df
  offshoot store df --json | jq .free")]
    Df,

    /// Show or set when the daemon flattens disks by itself
    ///
    /// Holds for disks that say nothing of their own (`disk flatten-policy`): `manual` (never),
    /// `after-fork`, `depth>N` (when more segments are below; the default is 32) or `bytes<SIZE`
    /// (when so little is to be copied).
    #[command(after_help = "\
Examples:
  offshoot store flatten-policy
  offshoot store flatten-policy 'depth>8'")]
    FlattenPolicy(StorePolicy),
}

/// For verbs that open a disk.
#[derive(Debug, Clone, Copy, Args)]
pub struct LostTail {
    /// Go on although completed, unflushed writes of a live session may be missing
    ///
    /// A daemon that was killed leaves completed writes in memory that outlives it. When that is
    /// gone although the host was not restarted, a disk is not opened, because its client may still
    /// be running and believe in those writes. Say this only when the client is gone.
    #[arg(long)]
    pub accept_lost_tail: bool,
}
