//! QEMU's control socket (QMP): JSON values, one a line.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A connection that has left the negotiation behind.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// What came of a line when its time ran out.
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

/// How long QEMU may think about a command.
const ANSWER: Duration = Duration::from_secs(30);

impl Qmp {
    /// Takes over a connection: reads the greeting, and leaves the negotiation.
    ///
    /// # Errors
    /// What QEMU said instead.
    pub fn new(stream: UnixStream) -> Result<Qmp, String> {
        let mut qmp =
            Qmp { stream: BufReader::new(stream), partial: Vec::new(), events: VecDeque::new() };
        let greeting = qmp.receive(Instant::now() + ANSWER)?;
        if greeting.get("QMP").is_none() {
            return Err(format!("not a greeting: {greeting}"));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returns.
    ///
    /// # Errors
    /// QEMU's error, or that it does not answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let line = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream.get_mut(), "{line}").map_err(|e| format!("{command}: {e}"))?;
        let end = Instant::now() + ANSWER;
        loop {
            let mut value = self.receive(end).map_err(|e| format!("{command}: {e}"))?;
            if value.get("event").is_some() {
                self.events.push_back(value);
            } else if let Some(result) = value.get_mut("return") {
                return Ok(result.take());
            } else {
                return Err(format!("{command}: {value}"));
            }
        }
    }

    /// Waits for the next event called `name` and returns it; others before it are dropped.
    ///
    /// # Errors
    /// That it did not come in time.
    pub fn event(&mut self, name: &str, within: Duration) -> Result<Value, String> {
        let end = Instant::now() + within;
        loop {
            let value = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive(end).map_err(|e| format!("event {name}: {e}"))?,
            };
            if value["event"] == name {
                return Ok(value);
            }
        }
    }

    fn receive(&mut self, end: Instant) -> Result<Value, String> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("no answer in time".to_owned());
            }
            self.stream.get_ref().set_read_timeout(Some(left)).map_err(|e| e.to_string())?;
            match self.stream.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Err("QEMU closed its control socket".to_owned()),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    return serde_json::from_slice(&line).map_err(|e| e.to_string());
                }
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.to_string()),
            }
        }
    }
}
