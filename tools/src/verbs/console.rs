//! The serial console of a machine, on a terminal or in a pipe.
//!
//! Invariant: a terminal is left as it was found, whether the machine ends, somebody detaches, or a
//! signal comes: modes are put back before this process can end by itself, and signals are looked
//! at while it waits.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use forkd::api::types::{Vm, VmState};
use format::{Error, Kind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::Termios;

use crate::output::{Outcome, wrote};
use crate::signals;
use crate::terminal::Modes;

/// Ctrl-]: detaches.
const ESCAPE: u8 = 0x1d;
/// Time between two looks at signals.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// Copies both ways until somebody detaches or the machine ends.
pub fn attach(vm: &Vm) -> Outcome<()> {
    if vm.state == VmState::Ended {
        return Err(Error::new(Kind::Failed, "the machine has ended").into());
    }
    let mut socket = UnixStream::connect(&vm.console).map_err(Error::from)?;
    signals::ask_to_be_told();
    // Every key goes to the machine.
    let raw = Modes::set(Termios::make_raw);
    if raw.is_some() {
        crate::output::say("attached; Ctrl-] detaches\r");
    }
    let copied = copy(&mut socket, raw.is_some());
    let attached = raw.is_some();
    drop(raw);
    if attached {
        crate::output::say("detached");
    }
    copied
}

fn copy(socket: &mut UnixStream, terminal: bool) -> Outcome<()> {
    let (stdin, mut stdout) = (std::io::stdin(), std::io::stdout().lock());
    let mut piece = [0; 4096];
    let mut reading = true;
    loop {
        let (from_machine, from_user) = {
            let both = [PollFd::new(&*socket, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
            let mut fds = both;
            let fds = if reading { &mut fds[..] } else { &mut fds[..1] };
            // An interrupted wait is a signal, which is looked at below.
            let _ = poll(fds, Some(&TICK));
            let ready = |fd: Option<&PollFd>| fd.is_some_and(|fd| !fd.revents().is_empty());
            (ready(fds.first()), ready(fds.get(1)))
        };
        signals::check()?;
        if from_machine {
            match socket.read(&mut piece).map_err(Error::from)? {
                0 => return Ok(()),
                n => wrote(stdout.write_all(&piece[..n]).and_then(|()| stdout.flush()))?,
            }
        }
        if from_user {
            // Past the library's buffer, in which a wait would not see what is left.
            let n = rustix::io::read(&stdin, &mut piece).map_err(std::io::Error::from);
            let n = n.map_err(Error::from)?;
            let escape = piece[..n].iter().position(|byte| terminal && *byte == ESCAPE);
            socket.write_all(&piece[..escape.unwrap_or(n)]).map_err(Error::from)?;
            if escape.is_some() {
                return Ok(());
            }
            reading = n > 0;
        }
    }
}
