//! The real daemon as a process, and raw HTTP to its socket.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a daemon may take to be ready, or to end.
const LIMIT: Duration = Duration::from_secs(60);

/// Set when all programs of the workspace were built already, as `make test` does.
const BUILT: &str = "OFFSHOOT_PROGRAMS_BUILT";

/// The program `name` of this workspace, built if need be.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    static DONE: OnceLock<std::sync::Mutex<Vec<String>>> = OnceLock::new();
    let test = std::env::current_exe().expect("a test has a path");
    // target/PROFILE/deps/TEST, or target/PROFILE/BENCHMARK
    let folder = test.parent().expect("a test lies in a target folder");
    let folder = folder.parent().filter(|_| folder.ends_with("deps")).unwrap_or(folder).to_owned();
    let mut done = DONE.get_or_init(std::sync::Mutex::default).lock().expect("no panic here");
    if std::env::var_os(BUILT).is_none() && !done.iter().any(|b| b == name) {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        // Of the whole workspace, so that its packages are built with the features that they
        // have when everything is.
        cargo.args(["build", "--quiet", "--workspace", "--bin", name]);
        cargo.args(folder.ends_with("release").then_some("--release"));
        cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
        let status = cargo.stdin(Stdio::null()).status().expect("cargo runs");
        assert!(status.success(), "{name} cannot be built");
        done.push(name.to_owned());
    }
    folder.join(name)
}

/// A daemon that runs. It is killed when this is dropped.
pub struct Daemon {
    child: Child,
    api: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts a daemon on a store, and waits until it is ready. Its socket is at `api`, its log
    /// beside it.
    ///
    /// # Panics
    /// When it does not get ready.
    #[must_use]
    pub fn start(store: &Path, api: &Path) -> Self {
        Self::start_with(store, api, &[])
    }

    /// As [`Daemon::start`], with further options.
    ///
    /// # Panics
    /// When it does not get ready.
    #[must_use]
    pub fn start_with(store: &Path, api: &Path, options: &[&str]) -> Self {
        Self::start_by(Command::new(program("blockd")), store, api, options)
    }

    /// As [`Daemon::start_with`], by another program that is given all of it as arguments.
    ///
    /// # Panics
    /// When it does not get ready.
    #[must_use]
    pub fn start_by(mut command: Command, store: &Path, api: &Path, options: &[&str]) -> Self {
        let log = api.with_extension("log");
        let output = fs::File::options().create(true).append(true).open(&log).expect("a log");
        command.env_remove("OFFSHOOT_STORE").env_remove("OFFSHOOT_API");
        command.arg("--store").arg(store).arg("--api").arg(api).args(options);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(output);
        let child = command.spawn().expect("the daemon starts");
        let mut daemon = Daemon { child, api: api.to_owned(), log };
        let start = Instant::now();
        while !daemon.answers() {
            let ended = daemon.child.try_wait().expect("a child");
            assert!(ended.is_none(), "it ended ({ended:?}): {}", daemon.log());
            assert!(start.elapsed() < LIMIT, "it is not ready: {}", daemon.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon
    }

    fn answers(&self) -> bool {
        UnixStream::connect(&self.api).is_ok() && self.try_ask("GET", "/v1/health").is_some()
    }

    fn try_ask(&self, method: &str, path: &str) -> Option<Reply> {
        ask(&self.api, method, path, b"").ok()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its socket.
    #[must_use]
    pub fn api(&self) -> &Path {
        &self.api
    }

    /// What it logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks for something.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn ask(&self, method: &str, path: &str, body: &[u8]) -> Reply {
        ask(&self.api, method, path, body).unwrap_or_else(|e| panic!("{e}: {}", self.log()))
    }

    /// Asks for something that must succeed, with a body of JSON, and gives back what it says.
    ///
    /// # Panics
    /// When it does not.
    pub fn json(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let reply = self.ask(method, path, body.as_bytes());
        assert!((200..300).contains(&reply.status), "{method} {path}: {reply:?}");
        reply.json()
    }

    /// Kills it in the middle of whatever it does.
    ///
    /// # Panics
    /// When it is not there.
    pub fn kill(mut self) {
        self.child.kill().expect("it was there");
        self.child.wait().expect("it is waited for");
    }

    /// Asks it to end by a signal, and waits.
    ///
    /// # Panics
    /// When it does not end.
    #[must_use]
    pub fn terminate(mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it is there");
        self.wait()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "it does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer.
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Its head, line by line.
    pub head: Vec<String>,
    /// Its body.
    pub body: Vec<u8>,
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body = &self.body[..self.body.len().min(2000)];
        write!(f, "{} {:?} {}", self.status, self.head, String::from_utf8_lossy(body))
    }
}

impl Reply {
    /// Its body as JSON.
    ///
    /// # Panics
    /// When it is not.
    #[must_use]
    pub fn json(&self) -> Value {
        if self.body.is_empty() {
            return Value::Null;
        }
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"))
    }
}

/// Asks over a connection of its own, with nothing but a socket.
///
/// # Errors
/// What the host reports, or an answer that is not whole.
pub fn ask(api: &Path, method: &str, path: &str, body: &[u8]) -> io::Result<Reply> {
    Talk::to(api)?.ask(method, path, body)
}

/// One connection, for as many questions as one likes.
pub struct Talk {
    socket: BufReader<UnixStream>,
}

impl Talk {
    /// Connects.
    ///
    /// # Errors
    /// What the host reports.
    pub fn to(api: &Path) -> io::Result<Talk> {
        let socket = UnixStream::connect(api)?;
        socket.set_read_timeout(Some(LIMIT))?;
        Ok(Talk { socket: BufReader::new(socket) })
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// What the host reports.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.get_mut().write_all(bytes)
    }

    /// Asks.
    ///
    /// # Errors
    /// What the host reports, or an answer that is not whole.
    pub fn ask(&mut self, method: &str, path: &str, body: &[u8]) -> io::Result<Reply> {
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}");
        self.send(format!("{head}\r\n\r\n").as_bytes())?;
        // A server that refuses early does not read all of it.
        let _ = self.send(body);
        self.answer()
    }

    /// Reads an answer.
    ///
    /// # Errors
    /// What the host reports, or an answer that is not whole.
    pub fn answer(&mut self) -> io::Result<Reply> {
        let strange = || io::Error::other("not an answer");
        let status = self.line()?.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.ok_or_else(strange)?;
        let mut head = Vec::new();
        loop {
            match self.line()? {
                line if line.is_empty() => break,
                line => head.push(line),
            }
        }
        let value = |name: &str| {
            let mut fields = head.iter().filter_map(|l| l.split_once(": "));
            fields.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, v)| v.to_owned())
        };
        let mut body = Vec::new();
        if value("transfer-encoding").as_deref() == Some("chunked") {
            loop {
                let length = usize::from_str_radix(&self.line()?, 16).map_err(|_| strange())?;
                self.take(length, &mut body)?;
                self.line()?;
                if length == 0 {
                    break;
                }
            }
        } else if let Some(length) = value("content-length") {
            self.take(length.parse().map_err(|_| strange())?, &mut body)?;
        }
        Ok(Reply { status, head, body })
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.socket.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end_matches("\r\n").to_owned())
    }

    fn take(&mut self, length: usize, body: &mut Vec<u8>) -> io::Result<()> {
        let from = body.len();
        body.resize(from + length, 0);
        self.socket.read_exact(&mut body[from..])
    }
}
