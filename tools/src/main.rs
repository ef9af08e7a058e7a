//! `offshoot`: the administrator's command line. It asks the daemon that has the store, or opens
//! the store itself when none does: the same verbs, the same answers.
//!
//! How it ends: 0, or one of the codes in `errors.rs`. A panic is a bug; it is told as such in one
//! line, and what the store promises about a killed process holds for it.

mod cli;
mod client;
mod errors;
mod image;
mod output;
mod progress;
mod signals;
mod size;
mod store;
mod terminal;
mod verbs;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use clap::Parser as _;
use format::Error;

use cli::Cli;
use output::{Outcome, Output, Stop, Verdict};

/// What the last panic said. Some panics are caught on the way (a library that meets an image it
/// cannot take), so a hook that prints would accuse the program of what is the image's fault.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        let mut last = LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner);
        let text = info.to_string().lines().map(str::trim).collect::<Vec<_>>().join(" ");
        // Of two panics, one inside the other, the first is the cause.
        if !text.contains("a scoped thread panicked") || last.is_empty() {
            *last = text;
        }
    }));
    let code = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        let last = LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner);
        output::say(&format!("internal error: {last}; please report it"));
        errors::EXIT_BUG
    });
    ExitCode::from(code)
}

fn run() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let out = Output { json: cli.global.json, quiet: cli.global.quiet };
    // A `disk read` has the data on standard output.
    let data_on_stdout = matches!(&cli.verb, cli::Verb::Disk(cli::DiskVerb::Read(_)));
    let installed = signals::install().map_err(|e| Stop::from(e.tried("handle").on("signals")));
    finish(out, data_on_stdout, installed.and_then(|()| verbs::run(cli, out)))
}

fn finish(out: Output, data_on_stdout: bool, outcome: Outcome) -> u8 {
    let error = match outcome {
        Ok(Verdict::Done) | Err(Stop::Unread) => return 0,
        Ok(Verdict::Found) => return errors::EXIT_FOUND,
        Err(Stop::Failed(error)) => error,
    };
    tell(&error, out.json, data_on_stdout);
    error.kind().exit_code()
}

fn tell(error: &Error, json: bool, data_on_stdout: bool) {
    let line = errors::line(error);
    output::say(&line);
    if json {
        let told = errors::Envelope::new(error, &line);
        // The exit code tells as well, and there is nobody left to tell about a failure here.
        let _ = match data_on_stdout {
            true => output::write_object(std::io::stderr().lock(), &told),
            false => output::write_object(std::io::stdout().lock(), &told),
        };
    }
}

/// Help and version, and command lines that make no sense.
fn usage(e: &clap::Error) -> u8 {
    let printed = e.print();
    if !e.use_stderr() {
        return match output::wrote(printed) {
            Err(Stop::Failed(error)) => {
                finish(Output { json: false, quiet: true }, false, Err(Stop::Failed(error)))
            }
            _ => 0,
        };
    }
    if std::env::args_os().any(|a| a == "--json") {
        let text = e.to_string();
        let reason = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let error = Error::invalid(reason.to_owned()).hint("see `offshoot help`");
        let line = errors::line(&error);
        // See `tell`.
        let _ =
            output::write_object(std::io::stdout().lock(), &errors::Envelope::new(&error, &line));
    }
    errors::EXIT_USAGE
}
