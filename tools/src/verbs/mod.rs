//! The verbs: each opens the store the way it needs, does one thing through the library, and says
//! what came of it. Nothing is decided here that the library could decide.

mod bytes;
mod check;
mod compare;
mod export;
mod import;
mod inspect;
mod manage;
mod map;
mod store;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use blockd::disk::{Disk, Options};
use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{OpenOptions, StoreDir, boot_id};
use clap::CommandFactory as _;
use format::{Context as _, Error, Kind, Result};
use serde::Serialize;

use crate::cli::{Cache, Cli, DiskVerb, Global, LostTail, StoreVerb, Verb};
use crate::output::{Outcome, Output, Verdict, wrote};
use crate::{pump, signals};

/// How long a verb waits for another process to let go of the store.
const PATIENCE: Duration = Duration::from_secs(1);

/// What every verb has at hand.
struct Session {
    global: Global,
    out: Output,
}

/// Does what the command line asks for.
///
/// # Errors
/// When the verb failed, or its output is not read.
pub fn run(cli: Cli, out: Output) -> Outcome {
    let session = Session { global: cli.global, out };
    let s = &session;
    match cli.verb {
        Verb::Init(args) => store::init(s, args),
        Verb::Store(StoreVerb::Rebuild) => store::rebuild(s),
        Verb::Store(StoreVerb::Df) => store::df(s),
        Verb::Completions { shell } => completions(s, shell),
        Verb::Disk(verb) => match verb {
            DiskVerb::Import(args) => import::import(s, &args),
            DiskVerb::Create(args) => manage::create(s, args),
            DiskVerb::Ls => inspect::ls(s),
            DiskVerb::Show(args) => inspect::show(s, &args),
            DiskVerb::Map(args) => map::map(s, &args),
            DiskVerb::Rm(args) => manage::rm(s, &args),
            DiskVerb::Resize(args) => manage::resize(s, &args),
            DiskVerb::Seal(args) => manage::seal(s, &args),
            DiskVerb::Rename(args) => manage::rename(s, &args),
            DiskVerb::Export(args) => export::export(s, &args),
            DiskVerb::Compare(args) => compare::compare(s, &args),
            DiskVerb::Check(args) => check::check(s, &args),
            DiskVerb::Repair(args) => check::repair(s, &args),
            DiskVerb::Scrub(args) => check::scrub(s, &args),
            DiskVerb::Read(args) => bytes::read(s, &args),
            DiskVerb::Write(args) => bytes::write(s, &args),
            DiskVerb::Discard(args) => bytes::discard(s, &args),
        },
    }
}

impl Session {
    fn store_path(&self) -> Result<&Path> {
        self.global.store.as_deref().ok_or_else(|| {
            Error::invalid("nothing says which one")
                .tried("open")
                .on("store")
                .hint("say --store DIR, or set OFFSHOOT_STORE")
        })
    }

    fn options(&self, access: Access) -> OpenOptions {
        let cache = match self.global.cache {
            Cache::Direct => CacheMode::Direct,
            Cache::Buffered => CacheMode::Buffered,
            Cache::Auto => CacheMode::Auto,
        };
        OpenOptions { access, cache, boot: boot_id() }
    }

    /// Opens the store, and says what was mended in it. A verb that writes is told of signals from
    /// here on, so that it ends between two steps.
    fn open(&self, access: Access) -> Result<StoreDir> {
        if access == Access::Write {
            signals::ask_to_be_told();
        }
        let path = self.store_path()?;
        let dir = with_patience(|| StoreDir::open(path, &self.options(access)));
        let dir = dir.context("open", || format!("store {}", path.display()))?;
        dir.notes.iter().for_each(|n| self.out.note(n));
        Ok(dir)
    }

    /// Opens a disk for reading, and says what is wrong with it.
    fn disk(&self, dir: &StoreDir, name: &str, tail: LostTail) -> Result<Disk> {
        self.disk_as(dir, name, tail, Access::Read)
    }

    fn disk_as(&self, dir: &StoreDir, name: &str, tail: LostTail, access: Access) -> Result<Disk> {
        let disk = dir
            .open_disk(name, access, &disk_options(dir, tail))
            .context("open", || format!("disk {name}"))?;
        for problem in &disk.problems {
            let (object, detail) = (&problem.object, &problem.detail);
            self.out.note(&format!("warning: disk {name}: {object}: {detail}"));
        }
        Ok(disk)
    }
}

/// Tries again for a second while the store is busy: a process that was killed, or whose reader
/// went away, has the lock until the kernel is done with it.
fn with_patience<T>(mut open: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match open() {
            Err(e) if e.kind() == Kind::Busy && start.elapsed() < PATIENCE => {
                signals::check()?;
                thread::sleep(PATIENCE / 50);
            }
            opened => return opened,
        }
    }
}

fn disk_options(dir: &StoreDir, tail: LostTail) -> Options {
    Options { lanes: pump::lanes(), accept_lost_tail: tail.accept_lost_tail, ..dir.disk_options() }
}

fn completions(s: &Session, shell: clap_complete::Shell) -> Outcome {
    #[derive(Serialize)]
    struct Script {
        shell: String,
        script: String,
    }
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "offshoot", &mut script);
    if s.out.json {
        let script = String::from_utf8_lossy(&script).into_owned();
        s.out.object(&Script { shell: shell.to_string(), script })?;
    } else {
        use std::io::Write as _;
        wrote(std::io::stdout().lock().write_all(&script))?;
    }
    Ok(Verdict::Done)
}
