//! The verbs on a daemon, its jobs and its events.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// `daemon …`
#[derive(Debug, Subcommand)]
pub enum DaemonVerb {
    /// Start a daemon on the store
    ///
    /// It goes on when this verb has ended, which is when it answers. Its socket is what `--api`
    /// says, or OFFSHOOT_API, or /run/offshoot/blockd.sock. To run it under a service manager,
    /// start `blockd` itself, which stays in the foreground.
    #[command(after_help = "\
Examples:
  offshoot --store /srv/vms daemon start
  offshoot --store ./store --api ./api.sock daemon start")]
    Start(StartDaemon),

    /// Show how the daemon is
    #[command(after_help = "\
Examples:
  offshoot daemon status
  offshoot daemon status --json | jq .pid")]
    Status,

    /// Replace the running daemon by another version of it while guests run
    ///
    /// The new one is started with the same arguments; the old one hands it disks, sockets and
    /// connected guests, which only see a short pause, and ends. If the new one cannot serve what
    /// the old one does, the old one goes on. NBD clients must connect again. Under a service
    /// manager, restart the service instead.
    #[command(after_help = "\
Examples:
  offshoot daemon upgrade
  offshoot daemon upgrade --program /opt/offshoot-next/blockd --json | jq .blackout_us")]
    Upgrade(UpgradeDaemon),

    /// End the daemon in order
    ///
    /// Jobs are cancelled, disks are closed. The verb ends when the store is free.
    #[command(after_help = "\
Examples:
  offshoot daemon stop")]
    Stop,
}

/// `daemon start`
#[derive(Debug, Args)]
pub struct StartDaemon {
    /// The program; without it, `blockd` beside this one, or on the PATH
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
    /// Where it writes what it has to say; without it, `daemon.log` in the store's folder
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Let sockets of disks be in this folder, too; always allowed are the folders of the store and
    /// of the daemon's own socket, /run and /tmp
    #[arg(long, value_name = "DIR")]
    pub socket_dir: Vec<PathBuf>,
    /// Let the members of a group ask it, too
    #[arg(long, value_name = "GROUP")]
    pub allow_group: Option<String>,
}

/// `daemon upgrade`
#[derive(Debug, Args)]
pub struct UpgradeDaemon {
    /// The new program; without it, `blockd` beside this one, or on the PATH
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
    /// Where it writes what it has to say; without it, `daemon.log` in the store's folder
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Cancel jobs that run and cut off NBD clients, instead of refusing
    #[arg(long)]
    pub force: bool,
}

/// `job …`
#[derive(Debug, Subcommand)]
pub enum JobVerb {
    /// List the jobs of the daemon
    ///
    /// Jobs that ended are kept for a while.
    #[command(visible_alias = "list")]
    #[command(after_help = "\
Examples:
  offshoot job ls
  offshoot job ls --json | jq '.[] | select(.state == \"running\")'")]
    Ls,

    /// Follow a job to its end
    ///
    /// Ends as the job does: with its failure, if it failed. A signal ends this verb, not the job.
    #[command(after_help = "\
Examples:
  offshoot job watch 7")]
    Watch(JobId),

    /// Ask a job to stop
    ///
    /// It stops between two pieces of work; what was unfinished is gone.
    #[command(after_help = "\
Examples:
  offshoot job cancel 7")]
    Cancel(JobId),
}

/// A job.
#[derive(Debug, Args)]
pub struct JobId {
    /// Its number
    pub id: u64,
}

/// `events`
#[derive(Debug, Args)]
pub struct Events {
    /// Go on with new ones as they come
    #[arg(long, short)]
    pub follow: bool,
    /// Only those after this number
    #[arg(long, value_name = "SEQ", default_value = "0")]
    pub since: u64,
}

/// `top`
#[derive(Debug, Args)]
pub struct Top {
    /// Print one look, also to a terminal
    #[arg(long)]
    pub once: bool,
    /// Seconds between two looks, 0.1 at least
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: f64,
}

fn interval(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!("`{text}` is not a number of seconds from 0.1 to 3600")),
    }
}
