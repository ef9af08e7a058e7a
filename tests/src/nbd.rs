//! An NBD client that does exactly what it is told, and disks to serve to it.
//!
//! Invariant: the client waits for a reply no longer than [`PATIENCE`]; a server that does not
//! answer fails a test and does not stop it.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockd::disk::{Disk, Options};
use blockd::nbd::wire::{STRING_MAX, Style, command, option, reply};
use blockd::nbd::{Export, ExportEntry, Exports, Listener, NbdServer, ServerOptions};
use blockd::segment::file_name;
use blockd::serve::{Volume, VolumeOptions};
use blockd::store::file::{FileStore, FileStoreOptions};
use blockd::store::{Access, Store};
use format::{Error, Kind, Result};
use tempfile::TempDir;
use uuid::Uuid;

use crate::sim::{ByName, create};

/// How long a reply may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Exports by name.
pub struct Named(pub Vec<Arc<dyn Export>>);

impl Exports for Named {
    fn open(&self, name: &str) -> Result<Arc<dyn Export>> {
        let found = self.0.iter().find(|e| e.name() == name).cloned();
        found.ok_or_else(|| Error::new(Kind::NotFound, "no such export"))
    }

    fn list(&self) -> Vec<ExportEntry> {
        let entry = |e: &Arc<dyn Export>| ExportEntry {
            name: e.name().to_owned(),
            description: e.description(),
        };
        self.0.iter().map(entry).collect()
    }
}

/// A server on a Unix socket in a folder of its own.
pub struct Served {
    /// The server.
    pub server: NbdServer,
    dir: TempDir,
}

impl Served {
    /// Serves `exports`.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn new(exports: Vec<Arc<dyn Export>>, options: ServerOptions) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(dir.path().join("nbd.sock")).expect("bound");
        let exports = Arc::new(Named(exports));
        let server = NbdServer::start(vec![Listener::Unix(listener)], exports, options);
        Served { server: server.expect("started"), dir }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    /// What clients call the export `name`.
    #[must_use]
    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    /// A client past the greeting.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::connect(&self.socket()).greeted()
    }

    /// A client that transmits, with replies of this style.
    ///
    /// # Panics
    /// When the server refuses.
    #[must_use]
    pub fn transmitting(&self, name: &str, style: Style) -> Client {
        let mut client = self.client();
        client.agree(style);
        client.go(name);
        client
    }
}

/// An open disk, in service under a name.
///
/// # Panics
/// When the host does not let us.
#[must_use]
pub fn in_service(name: &str, disk: Arc<Disk>) -> Arc<Volume> {
    Volume::over(disk, name, &VolumeOptions::default()).expect("threads")
}

/// A store of disks in a folder.
pub struct Disks {
    store: FileStore,
    _dir: TempDir,
}

impl Disks {
    /// An empty store.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let store = FileStore::open(dir.path(), FileStoreOptions::default()).expect("a store");
        Disks { store, _dir: dir }
    }

    /// Makes disk `number`, over the sealed disk `parent` if one is given, and opens it.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn disk(&self, number: u128, sectors: u64, parent: Option<u128>) -> Arc<Disk> {
        let id = Uuid::from_u128(number);
        create(&self.store, id, sectors, parent.map(Uuid::from_u128)).expect("a disk");
        self.open(number)
    }

    /// Opens disk `number`.
    ///
    /// # Panics
    /// When it does not open.
    #[must_use]
    pub fn open(&self, number: u128) -> Arc<Disk> {
        let name = file_name(Uuid::from_u128(number));
        let file = self.store.open(&name, Access::Write).expect("the segment");
        let options = Options { lanes: 4, ..Options::default() };
        Arc::new(Disk::open(file, &ByName(&self.store), &options).expect("opened"))
    }

    /// Opens disk `number` for reading.
    ///
    /// # Panics
    /// When it does not open.
    #[must_use]
    pub fn open_read_only(&self, number: u128) -> Arc<Disk> {
        let name = file_name(Uuid::from_u128(number));
        let file = self.store.open(&name, Access::Read).expect("the segment");
        let opened = Disk::open_read_only(file, &ByName(&self.store), &Options::default());
        Arc::new(opened.expect("opened"))
    }

    /// Seals a disk that nobody else has open.
    ///
    /// # Panics
    /// When somebody has, or it fails.
    pub fn seal(&self, disk: Arc<Disk>) {
        let disk = Arc::into_inner(disk).expect("nobody else has it");
        disk.seal(&mut |_, _| Ok(())).expect("sealed");
    }
}

impl Default for Disks {
    fn default() -> Self {
        Self::new()
    }
}

/// A reply chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Its flags.
    pub flags: u16,
    /// Its type.
    pub kind: u16,
    /// The request it belongs to.
    pub cookie: u64,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// The client.
pub struct Client<S = UnixStream> {
    /// The socket.
    pub socket: S,
    style: Style,
}

impl Client {
    /// Connects, and neither says nor expects anything.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn connect(socket: &Path) -> Self {
        let socket = UnixStream::connect(socket).expect("connected");
        socket.set_read_timeout(Some(PATIENCE)).expect("set");
        Client::over(socket)
    }
}

impl<S: Read + Write> Client<S> {
    /// A client that has said nothing yet, over any stream.
    #[must_use]
    pub fn over(socket: S) -> Self {
        Client { socket, style: Style::Simple }
    }

    /// Exchanges greetings.
    ///
    /// # Panics
    /// When the server's is none.
    #[must_use]
    pub fn greeted(mut self) -> Self {
        assert_eq!(self.bytes(18), b"NBDMAGICIHAVEOPT\x00\x03");
        self.send(&3u32.to_be_bytes());
        self
    }

    /// Sends bytes.
    ///
    /// # Panics
    /// When the server is gone.
    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("sent");
    }

    /// Receives this many bytes.
    ///
    /// # Panics
    /// When they do not come.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.socket.read_exact(&mut bytes).expect("received");
        bytes
    }

    /// Waits for the end of the stream; what came before it is returned.
    ///
    /// # Panics
    /// When the server keeps the connection.
    pub fn until_closed(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => rest,
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => rest,
            Err(e) => panic!("the server does not close the connection: {e}"),
        }
    }

    fn number<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().expect("as asked")
    }

    /// Sends the header of an option.
    pub fn option_header(&mut self, option: u32, len: u32) {
        let parts = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &len.to_be_bytes()];
        self.send(&parts.concat());
    }

    /// Sends an option and receives its replies, the last of which ends it.
    ///
    /// # Panics
    /// When the replies are none.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.option_header(option, u32::try_from(data.len()).expect("short"));
        self.send(data);
        let mut replies = Vec::new();
        loop {
            assert_eq!(u64::from_be_bytes(self.number()), 0x0003_e889_0455_65a9);
            assert_eq!(u32::from_be_bytes(self.number()), option);
            let kind = u32::from_be_bytes(self.number());
            let len = u32::from_be_bytes(self.number()) as usize;
            assert!(len <= 4 * STRING_MAX, "a reply of {len} bytes");
            replies.push((kind, self.bytes(len)));
            if kind == reply::ACK || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    /// Sends an option and returns the type of the last reply.
    pub fn outcome(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option(option, data).last().expect("one at least").0
    }

    /// Agrees on how messages look.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn agree(&mut self, style: Style) {
        match style {
            Style::Simple => {}
            Style::Structured => {
                assert_eq!(self.outcome(option::STRUCTURED_REPLY, &[]), reply::ACK);
            }
            Style::Extended => {
                assert_eq!(self.outcome(option::EXTENDED_HEADERS, &[]), reply::ACK);
            }
        }
        self.style = style;
    }

    /// Begins to transmit; returns size and transmission flags.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn go(&mut self, name: &str) -> (u64, u16) {
        let replies = self.option(option::GO, &info_request(name, &[3]));
        assert_eq!(replies.last().expect("one at least").0, reply::ACK, "{replies:?}");
        let export =
            replies.iter().find(|(kind, data)| *kind == reply::INFO && data[..2] == [0; 2]);
        let data = &export.expect("the export's size").1;
        let size = u64::from_be_bytes(data[2..10].try_into().expect("8 bytes"));
        (size, u16::from_be_bytes([data[10], data[11]]))
    }

    /// Sends a request; a write's payload goes with it.
    pub fn request(&mut self, command: (u16, u16), cookie: u64, range: (u64, u64), data: &[u8]) {
        let bytes = request(self.style, command, cookie, range);
        self.send(&[&bytes, data].concat());
    }

    /// Receives a simple reply with `len` bytes of data if it is a success.
    ///
    /// # Panics
    /// When it is none.
    pub fn simple(&mut self, len: usize) -> (u64, u32, Vec<u8>) {
        assert_eq!(u32::from_be_bytes(self.number()), 0x6744_6698);
        let error = u32::from_be_bytes(self.number());
        let cookie = u64::from_be_bytes(self.number());
        let data = if error == 0 { self.bytes(len) } else { Vec::new() };
        (cookie, error, data)
    }

    /// Receives a chunk; a simple reply, where one is allowed, looks like an empty one or an error.
    ///
    /// # Panics
    /// When it is none.
    pub fn chunk(&mut self) -> Chunk {
        let magic = u32::from_be_bytes(self.number());
        if magic == 0x6744_6698 && self.style == Style::Structured {
            let error: [u8; 4] = self.number();
            let cookie = u64::from_be_bytes(self.number());
            let kind = if error == [0; 4] { 0 } else { (1 << 15) + 1 };
            return Chunk { flags: 1, kind, cookie, payload: error.to_vec() };
        }
        let extended = self.style == Style::Extended;
        assert_eq!(magic, if extended { 0x6e8a_278c } else { 0x668e_33ef });
        let flags = u16::from_be_bytes(self.number());
        let kind = u16::from_be_bytes(self.number());
        let cookie = u64::from_be_bytes(self.number());
        let len = if extended {
            let _offset: [u8; 8] = self.number();
            u64::from_be_bytes(self.number())
        } else {
            u32::from_be_bytes(self.number()).into()
        };
        let payload = self.bytes(usize::try_from(len).expect("short"));
        Chunk { flags, kind, cookie, payload }
    }

    /// Receives the chunks of one reply, when nothing else is under way.
    pub fn chunks(&mut self) -> Vec<Chunk> {
        let mut chunks = vec![self.chunk()];
        while chunks.last().is_some_and(|c| c.flags & 1 == 0) {
            chunks.push(self.chunk());
        }
        chunks
    }

    /// Sends a request and returns the error number of its reply, with any style; a read's data is
    /// received and forgotten.
    pub fn errno(&mut self, command: (u16, u16), range: (u64, u64), data: &[u8]) -> u32 {
        self.request(command, 77, range, data);
        if self.style == Style::Simple {
            let len = if command.0 == command::READ { range.1 } else { 0 };
            return self.simple(usize::try_from(len).expect("short")).1;
        }
        let chunks = self.chunks();
        let error = chunks.iter().find(|c| c.kind >> 15 == 1);
        error.map_or(0, |c| u32::from_be_bytes(c.payload[..4].try_into().expect("4 bytes")))
    }
}

/// The bytes of a request header; `command` is the command and its flags.
#[must_use]
pub fn request(style: Style, command: (u16, u16), cookie: u64, range: (u64, u64)) -> Vec<u8> {
    let extended = style == Style::Extended;
    let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(command.1.to_be_bytes());
    bytes.extend(command.0.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(range.0.to_be_bytes());
    if extended {
        bytes.extend(range.1.to_be_bytes());
    } else {
        bytes.extend(u32::try_from(range.1).expect("short").to_be_bytes());
    }
    bytes
}

/// The data of `INFO` and `GO`.
#[must_use]
pub fn info_request(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u16::try_from(wanted.len()).expect("few").to_be_bytes());
    wanted.iter().for_each(|w| data.extend(w.to_be_bytes()));
    data
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[must_use]
pub fn meta_request(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u32::try_from(queries.len()).expect("few").to_be_bytes());
    queries.iter().for_each(|q| data.extend(string(q)));
    data
}

fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("short");
    [&len.to_be_bytes(), text.as_bytes()].concat()
}
