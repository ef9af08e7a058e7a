//! Terminals: modes that are put back, keys, and the size.
//!
//! Invariant: a terminal is left as it was found, however its user ends: modes are put back when
//! they go out of scope, also by a panic; who holds them has signals told ([`crate::signals`])
//! instead of being ended by them.

use std::io::{IsTerminal as _, Stdin, stdin, stdout};
use std::os::fd::AsFd as _;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{
    LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr,
};

/// Standard input in other modes than it was found in.
pub struct Modes(Termios);

impl Modes {
    /// Changes the modes of standard input; `None` when it is no terminal.
    pub fn set(change: impl FnOnce(&mut Termios)) -> Option<Modes> {
        let before = tcgetattr(stdin().as_fd()).ok()?;
        let mut modes = before.clone();
        change(&mut modes);
        tcsetattr(stdin().as_fd(), OptionalActions::Now, &modes).ok()?;
        Some(Modes(before))
    }
}

impl Drop for Modes {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = tcsetattr(stdin().as_fd(), OptionalActions::Now, &self.0);
    }
}

/// A standard stream that is a terminal.
#[derive(Debug, Clone, Copy)]
pub struct Terminal(());

impl Terminal {
    /// Standard output, if it is one.
    #[must_use]
    pub fn output() -> Option<Terminal> {
        stdout().is_terminal().then_some(Terminal(()))
    }

    /// Standard input, if it is one and keys are for this process: one in the background would be
    /// stopped by the kernel for looking at them.
    #[must_use]
    pub fn input() -> Option<Terminal> {
        let stdin = stdin();
        let front = tcgetpgrp(stdin.as_fd()).is_ok_and(|group| group == rustix::process::getpgrp());
        (stdin.is_terminal() && front).then_some(Terminal(()))
    }

    /// Lines of standard output, if it says.
    #[must_use]
    pub fn rows(self) -> Option<usize> {
        let size = tcgetwinsize(stdout().as_fd()).ok()?;
        (size.ws_row > 0).then_some(size.ws_row.into())
    }
}

/// The keys that are pressed, one by one and without an echo. Ctrl-C stays a signal.
pub struct Keys {
    stdin: Stdin,
    open: bool,
    _modes: Modes,
}

impl Keys {
    /// Takes them from the terminal that is standard input.
    #[must_use]
    pub fn take(_: Terminal) -> Option<Keys> {
        let modes = Modes::set(|modes| {
            modes.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
        })?;
        Some(Keys { stdin: stdin(), open: true, _modes: modes })
    }

    /// The keys that are pressed; waits for one, but not longer than `time`.
    pub fn pressed(&mut self, time: Duration) -> Vec<u8> {
        if !self.open {
            std::thread::sleep(time);
            return Vec::new();
        }
        let mut fds = [PollFd::new(&self.stdin, PollFlags::IN)];
        let timeout = Timespec::try_from(time).ok();
        // An interrupted wait is a signal, which the caller looks at.
        if !matches!(poll(&mut fds, timeout.as_ref()), Ok(1..)) {
            return Vec::new();
        }
        let mut keys = [0; 64];
        // Past the library's buffer, in which a wait would not see what is left.
        match rustix::io::read(&self.stdin, &mut keys) {
            Ok(n @ 1..) => keys[..n].to_vec(),
            Err(rustix::io::Errno::INTR) => Vec::new(),
            // The terminal is gone: nothing comes from it any more.
            Ok(_) | Err(_) => {
                self.open = false;
                Vec::new()
            }
        }
    }
}
