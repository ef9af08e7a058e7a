//! Runs a line of shell in the guest of a machine, over its console: `lab_console [--forked]
//! SOCKET COMMAND`.
//!
//! The other side is `tests/lab/init`. A guest that boots says that it is ready; one that was
//! forked has said so before it had a console of its own. Exits with the command's code, or with
//! 125 when the console says nothing for a minute.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (socket, command, forked) = match &words[..] {
        [socket, command] => (socket, command, false),
        [forked, socket, command] if forked == "--forked" => (socket, command, true),
        _ => {
            eprintln!("[--forked] SOCKET COMMAND");
            return ExitCode::from(2);
        }
    };
    match ask(socket, command, forked) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("{socket}: {e}");
            ExitCode::from(125)
        }
    }
}

fn ask(socket: &str, command: &str, forked: bool) -> std::io::Result<u8> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut lines = BufReader::new(stream.try_clone()?).split(b'\n');
    let mut stream = stream;
    // What was printed before we came is sent first, so old answers are there too.
    let id = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |t| t.as_nanos());
    let (ready, mark) = ("@0 ready".to_owned(), format!("@{id} "));
    if forked {
        writeln!(stream, "{id} {command}")?;
    }
    loop {
        let line = lines.next().ok_or_else(|| std::io::Error::other("the console is gone"))??;
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if line.ends_with(&ready) && !forked {
            writeln!(stream, "{id} {command}")?;
        } else if let Some(at) = line.find(&mark) {
            let mut words = line[at + mark.len()..].split(' ');
            let code = words.next().and_then(|w| w.parse().ok()).unwrap_or(125);
            std::io::stdout().write_all(&decoded(words.next().unwrap_or("")))?;
            return Ok(code);
        }
    }
}

/// The bytes of a text in base64.
fn decoded(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter_map(|b| DIGITS.iter().position(|d| *d == b));
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for digit in digits {
        bits = bits << 6 | u32::try_from(digit).unwrap_or(0);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).unwrap_or(0));
        }
    }
    bytes
}
