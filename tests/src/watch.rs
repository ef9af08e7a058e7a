//! Nothing is left of a program that is killed.
//!
//! Virtual machines outlive their daemon by design, so a test or benchmark that is killed before it
//! cleans up would leave them at work for ever. A small process of its own holds the end of a pipe.
//! When the pipe closes without a word, it ends every process that names the folder on its command
//! line, and removes the folder and the tails of a store in it.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Its argument is the folder, without a slash after it: so it does not find itself.
const WATCH: &str = r#"
trap '' INT TERM HUP
read -r word && exit
for again in 1 2 3; do
    for process in /proc/[0-9]*; do
        if tr '\0' '\n' <"$process/cmdline" | grep -qF "$0/"; then
            kill -KILL "${process#/proc/}"
        fi
    done
    sleep 0.2
done
tails=$(sed -n 's,.*"\(/dev/shm/offshoot-[0-9a-f-]*\)".*,\1,p' "$0/store/offshoot.json")
rm -rf "$0" ${tails:+"$tails"}
"#;

/// A folder is watched over until this is dropped: whoever drops it has cleaned up.
#[derive(Debug)]
pub struct Watch(Child);

impl Watch {
    /// Watches over a folder that nobody else works in.
    ///
    /// # Panics
    /// When there is no shell.
    #[must_use]
    pub fn over(folder: &Path) -> Watch {
        let mut command = Command::new("sh");
        command.arg("-c").arg(WATCH).arg(folder);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // What is typed to end the program is not for the watch.
        command.process_group(0);
        Watch(command.spawn().expect("a shell"))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A watch that is gone needs no word.
        let _ = self.0.stdin.take().map(|mut pipe| pipe.write_all(b"done\n"));
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A test was killed from outside, and two virtual machines of it took a processor for hours.
    #[test]
    fn a_killed_program_leaves_nothing_and_one_that_ends_is_left_alone() {
        for killed in [true, false] {
            let folder = tempfile::tempdir().expect("a folder").keep();
            std::fs::write(folder.join("file"), "").expect("a file");
            let mut command = Command::new("tail");
            let mut other = command.arg("-f").arg(folder.join("file")).spawn().expect("a process");
            let mut watch = Watch::over(&folder);
            if killed {
                drop(watch.0.stdin.take());
                watch.0.wait().expect("a process");
            }
            drop(watch);

            assert_eq!(other.try_wait().expect("a process").is_some(), killed);
            assert_eq!(folder.exists(), !killed);
            let _ = other.kill();
            let _ = other.wait();
            let _ = std::fs::remove_dir_all(&folder);
        }
    }
}
