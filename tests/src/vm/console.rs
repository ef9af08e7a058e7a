//! The console of a guest.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long a guest may take for a line.
const LINE_MAX: Duration = Duration::from_secs(60);

/// A connection to the console of a guest.
pub struct Console {
    socket: BufReader<UnixStream>,
    name: String,
}

impl Console {
    /// Attaches; what the guest printed lately comes first.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn attach(path: &Path, name: &str) -> Console {
        let socket = UnixStream::connect(path).unwrap_or_else(|e| panic!("console of {name}: {e}"));
        socket.set_read_timeout(Some(LINE_MAX)).expect("a time limit");
        Console { socket: BufReader::new(socket), name: name.to_owned() }
    }

    /// Types a line.
    ///
    /// # Panics
    /// When nobody is there.
    pub fn say(&mut self, line: &str) {
        let typed = self.socket.get_mut().write_all(format!("{line}\n").as_bytes());
        typed.unwrap_or_else(|e| panic!("console of {}: {e}", self.name));
    }

    /// The next line that begins like this.
    ///
    /// # Panics
    /// When it does not come.
    pub fn hear(&mut self, begin: &str) -> String {
        loop {
            let mut line = Vec::new();
            let read = self.socket.read_until(b'\n', &mut line);
            let n = read.unwrap_or_else(|e| panic!("{} says nothing of {begin:?}: {e}", self.name));
            assert!(n > 0, "{} is gone, and said nothing of {begin:?}", self.name);
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if line.starts_with(begin) {
                return line;
            }
        }
    }

    /// Types a line, and gives back the answer without its mark.
    ///
    /// # Panics
    /// When there is none.
    pub fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.hear("= ")[2..].to_owned()
    }

    /// As [`Console::ask`], for a number.
    ///
    /// # Panics
    /// When it is none.
    pub fn number(&mut self, line: &str) -> u64 {
        let answer = self.ask(line);
        answer.parse().unwrap_or_else(|e| panic!("{line:?} to {}: {e}: {answer:?}", self.name))
    }

    /// True when nothing comes for a while.
    ///
    /// # Panics
    /// When the host does not let us wait.
    #[must_use]
    pub fn is_silent_for(&mut self, time: Duration) -> bool {
        self.socket.get_ref().set_read_timeout(Some(time)).expect("a time limit");
        let silent = self.socket.fill_buf().is_err();
        self.socket.get_ref().set_read_timeout(Some(LINE_MAX)).expect("a time limit");
        silent
    }

    /// Ends the loop of a payload guest that writes to its disk and its memory, and compares them.
    ///
    /// # Panics
    /// When they differ, or the guest does not answer.
    pub fn ends_whole(&mut self) {
        self.say("");
        let line = self.hear("= wrote");
        let [wrong, ram, disk] = ["wrong", "ram", "disk"].map(|key| word(&line, key));
        assert!(wrong == "0" && ram == disk, "{line}");
    }
}

/// The word after `key` in a line.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn word(line: &str, key: &str) -> String {
    let mut words = line.split_whitespace().skip_while(|word| *word != key);
    words.nth(1).unwrap_or_else(|| panic!("no {key} in {line:?}")).to_owned()
}
