//! `blockd`: the daemon that has a store, and does with its disks what its control interface is
//! asked for. It stays in the foreground.
//!
//! Order of a start, and what it defends against: the store's lock first, so that nothing is
//! touched that another daemon has; then the socket; then the file that names it, so that whoever
//! finds the file finds somebody at the socket. The end runs the other way.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use blockd::api::{Access, ApiSocket, group_id, serve};
use blockd::daemon::sandbox::{self, Folders};
use blockd::daemon::{Daemon, DaemonFile, Predecessor};
use blockd::program;
use blockd::store::file::CacheMode;
use blockd::storedir::{IDENTITY_FILE, Identity};
use clap::builder::PossibleValue;
use clap::{Parser, ValueEnum};
use format::{Context as _, Result};

/// Threads for requests that take time, and for jobs.
const BLOCKING_THREADS_MAX: usize = 64;
/// How long threads may take to end after everything was closed.
const LAST_GRACE: Duration = Duration::from_secs(2);

/// Serve the delta disks of a store.
///
/// The daemon has the store to itself while it runs; `offshoot` finds it by the store's folder and
/// asks it. SIGTERM and SIGINT end it in order, a second signal at once, which is as safe as a
/// power cut.
#[derive(Debug, Parser)]
#[command(name = "blockd", version, max_term_width = 100)]
struct Args {
    /// The folder of the store
    #[arg(long, short = 's', env = "OFFSHOOT_STORE", value_name = "DIR")]
    store: PathBuf,

    /// The socket of the control interface
    #[arg(long, env = "OFFSHOOT_API", value_name = "SOCK")]
    #[arg(default_value = "/run/offshoot/blockd.sock")]
    api: PathBuf,

    /// Let the members of a group use the control interface, too; its owner and root always may
    #[arg(long, value_name = "GROUP")]
    allow_group: Option<String>,

    /// Use of the host's page cache by the store's files
    #[arg(long, value_name = "MODE", default_value = "buffered")]
    cache: Cache,

    /// Give up what the daemon does not need: other folders, and dangerous system calls
    #[arg(long, value_name = "MODE", default_value = "on")]
    sandbox: Sandbox,

    /// Let sockets of disks be in this folder, too; always allowed are the folders of the store and
    /// of the control socket, /run and /tmp
    #[arg(long, value_name = "DIR")]
    socket_dir: Vec<PathBuf>,

    /// Wait at this socket for the daemon that has the store, and take over all that it serves;
    /// `offshoot daemon upgrade` starts a daemon like this
    #[arg(long, value_name = "SOCK")]
    take_over: Option<PathBuf>,
}

/// Whether the daemon confines itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sandbox {
    /// As far as the kernel can.
    On,
    /// Not at all.
    Off,
}

/// Use of the host's page cache.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Cache {
    /// Past the page cache, or not at all.
    Direct,
    /// Through the page cache.
    Buffered,
    /// Direct where the file system can.
    Auto,
}

fn main() -> ExitCode {
    let args = Args::parse();
    program::log_to_standard_error();
    program::allow_many_files();
    program::ended("blockd", run(&args))
}

fn run(args: &Args) -> Result<()> {
    let cache = match args.cache {
        Cache::Direct => CacheMode::Direct,
        Cache::Buffered => CacheMode::Buffered,
        Cache::Auto => CacheMode::Auto,
    };
    let store = std::path::absolute(&args.store).context("find", || "the store".into())?;
    let api = std::path::absolute(&args.api).context("find", || "the socket".into())?;
    let group = args.allow_group.as_deref().map(group_id).transpose()?;
    let confined_by = confine(args, &store, &api)?;
    let predecessor = args.take_over.as_deref().map(Predecessor::meet).transpose()?;
    let daemon = Daemon::open(&store, cache)?;
    let daemon = Arc::new(daemon.started_with(args.for_a_successor(&store, &api), confined_by));
    let socket = take_service(&daemon, predecessor, &api, Access { group })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_name("control")
        .build()
        .context("start", || "the control runtime".into())?;
    let file = DaemonFile {
        pid: std::process::id(),
        api: api.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let served = runtime.block_on(async {
        program::watch_signals(&daemon)?;
        // On a full host, above all, the daemon is needed: it is found at its socket without.
        if let Err(error) = file.write(&store) {
            tracing::warn!(%error, "who looks in the store does not find this daemon");
        }
        program::tell_the_service_manager("READY=1");
        tracing::info!(store = %store.display(), api = %api.display(), "ready");
        serve(Arc::clone(&daemon), socket).await
    });
    program::tell_the_service_manager("STOPPING=1");
    daemon.end_service();
    if !daemon.has_handed_over() {
        DaemonFile::remove(&store);
    }
    runtime.shutdown_timeout(LAST_GRACE);
    served
}

impl Args {
    /// The arguments that start the same daemon from anywhere.
    fn for_a_successor(&self, store: &Path, api: &Path) -> Vec<String> {
        let value = |value: Option<PossibleValue>| {
            value.map_or_else(String::new, |v| v.get_name().to_owned())
        };
        let path = |path: &Path| path.display().to_string();
        let mut arguments = vec![
            "--store".to_owned(),
            path(store),
            "--api".to_owned(),
            path(api),
            "--cache".to_owned(),
            value(self.cache.to_possible_value()),
            "--sandbox".to_owned(),
            value(self.sandbox.to_possible_value()),
        ];
        if let Some(group) = &self.allow_group {
            arguments.extend(["--allow-group".to_owned(), group.clone()]);
        }
        for dir in &self.socket_dir {
            let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
            arguments.extend(["--socket-dir".to_owned(), path(&dir)]);
        }
        arguments
    }
}

/// Serves again what the last daemon served, and gives back the socket of the control interface.
fn take_service(
    daemon: &Arc<Daemon>,
    predecessor: Option<Predecessor>,
    api: &Path,
    access: Access,
) -> Result<ApiSocket> {
    let socket = match predecessor {
        None => {
            let socket = ApiSocket::bind(api, access)?;
            daemon.serve_again()?;
            socket
        }
        Some(predecessor) => {
            let mut inheritance = predecessor.inherit()?;
            let listener = inheritance.take_control()?;
            let outcome = daemon.take_over(inheritance);
            let socket = ApiSocket::inherit(api, listener, access)?;
            if let Err(e) = outcome {
                // The predecessor goes on with it.
                socket.leave();
                return Err(e);
            }
            socket
        }
    };
    daemon.controlled_at(socket.listener()?.into());
    daemon.go_on_in_background();
    Ok(socket)
}

/// Confines the process before it reads anything that others have written.
fn confine(args: &Args, store: &Path, api: &Path) -> Result<Vec<String>> {
    if args.sandbox == Sandbox::Off {
        return Ok(Vec::new());
    }
    let folder = api.parent().unwrap_or(Path::new("/"));
    // Made now: what is not there cannot be allowed.
    std::fs::create_dir_all(folder).context("create", || folder.display().to_string())?;
    sandbox::enter(&Folders {
        store: store.to_owned(),
        tails: tail_folder(store),
        api: folder.to_owned(),
        sockets: args.socket_dir.clone(),
    })
}

/// Where a store keeps its tails. A store that cannot be read fails to open with a better reason.
fn tail_folder(store: &Path) -> PathBuf {
    let identity = std::fs::read(store.join(IDENTITY_FILE)).ok();
    let identity = identity.and_then(|text| serde_json::from_slice::<Identity>(&text).ok());
    identity.map_or_else(|| "/dev/shm".into(), |identity| identity.tail_dir)
}
