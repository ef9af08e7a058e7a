//! The verbs: each finds the store, asks it for one thing, and says what came of it. Nothing is
//! decided here that the library could decide.

mod bytes;
mod check;
mod compare;
mod console;
mod daemon;
mod diff;
mod events;
mod export;
mod flatten;
mod import;
mod inspect;
mod job;
mod manage;
mod map;
mod modes;
mod place;
mod serve;
mod snapshots;
mod store;
mod top;
mod vm;

use clap::CommandFactory as _;
use serde::Serialize;

use crate::cli::{Cli, DaemonVerb, DiskVerb, Global, JobVerb, StoreVerb, Verb};
use crate::output::{Outcome, Output, Verdict, wrote};

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
        Verb::Store(StoreVerb::FlattenPolicy(args)) => flatten::store_policy(s, &args),
        Verb::Vm(verb) => vm::vm(s, &verb),
        Verb::Daemon(DaemonVerb::Start(args)) => daemon::start(s, &args),
        Verb::Daemon(DaemonVerb::Status) => daemon::status(s),
        Verb::Daemon(DaemonVerb::Upgrade(args)) => daemon::upgrade(s, &args),
        Verb::Daemon(DaemonVerb::Stop) => daemon::stop(s),
        Verb::Job(JobVerb::Ls) => job::ls(s),
        Verb::Job(JobVerb::Watch(args)) => job::watch(s, &args),
        Verb::Job(JobVerb::Cancel(args)) => job::cancel(s, &args),
        Verb::Events(args) => events::of_blockd(s, &args),
        Verb::Top(args) => top::top(s, &args),
        Verb::Completions { shell } => completions(s, shell),
        Verb::Disk(verb) => match verb {
            DiskVerb::Import(args) => import::import(s, &args),
            DiskVerb::Create(args) => manage::create(s, args),
            DiskVerb::Fork(args) => manage::fork(s, args),
            DiskVerb::Mode(args) => modes::mode(s, args),
            DiskVerb::Commit(args) => modes::commit(s, &args),
            DiskVerb::Undo(args) => modes::undo(s, &args),
            DiskVerb::Flatten(args) => flatten::flatten(s, &args),
            DiskVerb::FlattenPolicy(args) => flatten::disk_policy(s, &args),
            DiskVerb::Ls => inspect::ls(s),
            DiskVerb::Show(args) => inspect::show(s, &args),
            DiskVerb::Map(args) => map::map(s, &args),
            DiskVerb::Rm(args) => manage::rm(s, &args),
            DiskVerb::Resize(args) => manage::resize(s, &args),
            DiskVerb::Seal(args) => manage::seal(s, &args),
            DiskVerb::Rename(args) => manage::rename(s, &args),
            DiskVerb::Export(args) => export::export(s, &args),
            DiskVerb::Diff(args) => diff::diff(s, &args),
            DiskVerb::Compare(args) => compare::compare(s, &args),
            DiskVerb::Check(args) => check::check(s, &args),
            DiskVerb::Repair(args) => check::repair(s, &args),
            DiskVerb::Scrub(args) => check::scrub(s, &args),
            DiskVerb::Read(args) => bytes::read(s, &args),
            DiskVerb::Write(args) => bytes::write(s, &args),
            DiskVerb::Discard(args) => bytes::discard(s, &args),
            DiskVerb::Attach(args) => serve::attach(s, &args),
            DiskVerb::ExportNbd(args) => serve::export_nbd(s, &args),
            DiskVerb::Detach(args) => serve::detach(s, &args),
            DiskVerb::Limits(args) => serve::limits(s, &args),
            DiskVerb::Resume(args) => serve::resume(s, &args),
        },
    }
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
