//! `daemon start`, `status`, `upgrade`, `stop`.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use blockd::api::types::{HandOver, HandedOver, Health};
use blockd::daemon::DaemonFile;
use format::{Context as _, Error, Kind, Result};
use hyper::Method;
use serde::Serialize;

use super::Session;
use super::place::{USUAL_CACHE, default_socket};
use crate::cli::{StartDaemon, UpgradeDaemon};
use crate::client::Client;
use crate::output::{Outcome, Verdict, fields, utc};
use crate::signals;

/// How long a daemon may take to answer, or to end.
const LIMIT: Duration = Duration::from_secs(60);
/// Wait between two looks.
const TICK: Duration = Duration::from_millis(20);

/// `daemon start`
pub fn start(s: &Session, args: &StartDaemon) -> Outcome {
    let store = std::path::absolute(s.store_path()?).map_err(Error::from)?;
    let object = || format!("the daemon of store {}", store.display());
    if let Some(client) = DaemonFile::read(&store).and_then(|f| Client::open(&f.api, s.out).ok()) {
        let reason = format!("one answers at {} already", client.socket().display());
        return Err(Error::new(Kind::Busy, reason).tried("start").on(object()).into());
    }
    let api = s.global.api.clone().unwrap_or_else(default_socket);
    let api = std::path::absolute(api).map_err(Error::from)?;
    let log = args.log.clone().unwrap_or_else(|| store.join("daemon.log"));
    let health = launch(s, args, (&store, &api, &log)).context("start", object)?;
    s.out.confirm(&health, || {
        format!("started the daemon of store {}: process {}", store.display(), health.pid)
    })?;
    Ok(Verdict::Done)
}

fn launch(s: &Session, args: &StartDaemon, paths: (&Path, &Path, &Path)) -> Result<Health> {
    let (store, api, log) = paths;
    let program = args.program.clone().unwrap_or_else(beside_this_one);
    let mut command = Command::new(&program);
    command.arg("--store").arg(store).arg("--api").arg(api);
    command.arg("--cache").arg(s.global.cache_mode().unwrap_or(USUAL_CACHE).name());
    command.args(args.socket_dir.iter().map(|dir| format!("--socket-dir={}", dir.display())));
    if let Some(group) = &args.allow_group {
        command.arg("--allow-group").arg(group);
    }
    run_logged(command, log, |child| wait_ready(s, child, api))
}

/// Starts a daemon whose output goes to a log, and does something with it; when that fails because
/// the daemon ended, the last line of it says why.
fn run_logged<T>(
    mut command: Command,
    log: &Path,
    work: impl FnOnce(&mut Child) -> Result<T>,
) -> Result<T> {
    let output = File::options().create(true).append(true).open(log);
    let output = output.context("open", || format!("log {}", log.display()))?;
    let said_before = output.metadata()?.len();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(output);
    // Signals that a terminal sends to its foreground do not reach it.
    command.process_group(0);
    let program = command.get_program().display().to_string();
    let mut child = command.spawn().context("run", || program)?;
    work(&mut child).map_err(|e| match said_since(log, said_before) {
        Some(line) if e.kind() == Kind::Failed => Error::new(Kind::Failed, line),
        _ => e.hint(format!("{} may say more", log.display())),
    })
}

/// `blockd` from the folder of this program, else the one that the PATH leads to.
fn beside_this_one() -> PathBuf {
    let own = std::env::current_exe().ok();
    let beside = own.and_then(|own| Some(own.parent()?.join("blockd")));
    beside.filter(|b| b.is_file()).unwrap_or_else(|| "blockd".into())
}

fn wait_ready(s: &Session, child: &mut Child, api: &Path) -> Result<Health> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Err(Error::new(Kind::Failed, format!("it ended at once, with {status}")));
        }
        let asked = Client::open(api, s.out).and_then(|c| c.get::<Health>("/v1/health".into()));
        match asked {
            Ok(health) if health.pid == child.id() => return Ok(health),
            Err(e) if e.kind() != Kind::NotFound => return Err(e),
            _ => {}
        }
        if start.elapsed() > LIMIT {
            return Err(Error::new(Kind::Busy, "it does not answer yet"));
        }
        signals::check()?;
        thread::sleep(TICK);
    }
}

/// The last line that the daemon wrote before it gave up.
fn said_since(log: &Path, before: u64) -> Option<String> {
    let text = fs::read(log).ok()?;
    let new = String::from_utf8_lossy(text.get(usize::try_from(before).ok()?..)?).into_owned();
    let lines = new.lines().rev();
    lines.filter_map(|line| line.strip_prefix("blockd: ")).map(str::to_owned).next()
}

/// `daemon status`
pub fn status(s: &Session) -> Outcome {
    let health: Health = s.need_daemon()?.get("/v1/health".into())?;
    s.out.result(&health, || render(&health))?;
    Ok(Verdict::Done)
}

fn render(h: &Health) -> String {
    let list = |names: &[String]| if names.is_empty() { "-".into() } else { names.join(", ") };
    let lines = [
        ("store", h.path.display().to_string()),
        ("process", h.pid.to_string()),
        ("version", h.version.clone()),
        ("started", utc(h.started)),
        ("jobs", format!("{} running", h.jobs)),
        ("served", format!("{} disks, to {} front ends", h.served, h.connected)),
        ("held", list(&h.held)),
        ("failed", list(&h.failed)),
        ("confined by", list(&h.sandbox)),
    ];
    fields(lines)
}

/// What an upgrade did.
#[derive(Debug, Serialize)]
struct Upgraded {
    /// The new daemon.
    #[serde(flatten)]
    health: Health,
    /// Microseconds for which guests were not served.
    blackout_us: u64,
    /// Front ends that stayed connected.
    front_ends: u64,
}

/// `daemon upgrade`
pub fn upgrade(s: &Session, args: &UpgradeDaemon) -> Outcome {
    let client = s.need_daemon()?;
    let before: Health = client.get("/v1/health".into())?;
    let object = || format!("the daemon of store {}", before.path.display());
    let api = client.socket().to_owned();
    let log = args.log.clone().unwrap_or_else(|| before.path.join("daemon.log"));
    let meeting = PathBuf::from(format!("{}.next", api.display()));
    let program = args.program.clone().unwrap_or_else(beside_this_one);
    let mut command = Command::new(&program);
    command.args(&before.arguments).arg("--take-over").arg(&meeting);
    let upgraded = run_logged(command, &log, |child| {
        let handed = wait_meeting(child, &meeting).and_then(|()| {
            let request = HandOver { socket: meeting.clone(), force: args.force };
            client.post::<HandedOver>("/v1/handover".into(), &request)
        });
        let handed = handed.inspect_err(|_| {
            // It serves nobody; one that ended by itself is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
            let _ = fs::remove_file(&meeting);
        })?;
        let HandedOver { blackout_us, front_ends, .. } = handed;
        Ok(Upgraded { health: wait_ready(s, child, &api)?, blackout_us, front_ends })
    });
    let upgraded = upgraded.context("upgrade", object)?;
    s.out.confirm(&upgraded, || {
        let Upgraded { health, blackout_us, front_ends } = &upgraded;
        let ms = Duration::from_micros(*blackout_us).as_secs_f64() * 1e3;
        format!(
            "upgraded {}: process {} of version {}, {front_ends} front ends, paused for {ms:.1} ms",
            object(),
            health.pid,
            health.version
        )
    })?;
    Ok(Verdict::Done)
}

/// Waits until a successor waits for its predecessor.
fn wait_meeting(child: &mut Child, meeting: &Path) -> Result<()> {
    let start = Instant::now();
    while !meeting.exists() {
        if let Some(status) = child.try_wait()? {
            return Err(Error::new(Kind::Failed, format!("the new one ended, with {status}")));
        }
        if start.elapsed() > LIMIT {
            return Err(Error::new(Kind::Busy, "the new one does not get ready"));
        }
        signals::check()?;
        thread::sleep(TICK);
    }
    Ok(())
}

/// `daemon stop`
pub fn stop(s: &Session) -> Outcome {
    let client = s.need_daemon()?;
    let health: Health = client.get("/v1/health".into())?;
    client.tell_to(Method::POST, "/v1/shutdown".into(), &())?;
    drop(client);
    let start = Instant::now();
    // The file goes last: after the disks are closed.
    while DaemonFile::read(&health.path).is_some_and(|f| f.pid == health.pid) {
        if start.elapsed() > LIMIT {
            return Err(Error::new(
                Kind::Busy,
                "it has not ended yet; it may be busy closing disks",
            )
            .tried("stop")
            .on(format!("the daemon of store {}", health.path.display()))
            .into());
        }
        signals::check()?;
        thread::sleep(TICK);
    }
    s.out.confirm(&health, || format!("stopped the daemon of store {}", health.path.display()))?;
    Ok(Verdict::Done)
}
