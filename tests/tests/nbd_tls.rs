//! NBD over TCP: with TLS, and with nothing less. Clients that show no certificate, a stranger's,
//! or talk in plain text get nowhere; those with the right one work as over the Unix socket.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use blockd::disk::Disk;
use blockd::nbd::wire::{option, reply};
use blockd::nbd::{Listener, NbdServer, ServerOptions, TlsConfig, VolumeExport};
use format::Kind;
use offshoot_tests::nbd::{Disks, Named, in_service, info_request};
use offshoot_tests::tls::Authority;
use offshoot_tests::{skip, tool};

const SIZE: u64 = 16 << 20;

fn config(authority: &Authority, client_ca: Option<&Path>) -> TlsConfig {
    let (chain, key) = (authority.path("server-cert.pem"), authority.path("server-key.pem"));
    TlsConfig::from_files(&chain, &key, client_ca).unwrap()
}

/// A server on a TCP port.
struct Tcp {
    server: NbdServer,
    port: u16,
    disk: Arc<Disk>,
    _disks: Disks,
}

impl Tcp {
    fn new(config: TlsConfig, options: ServerOptions) -> Self {
        let disks = Disks::new();
        let disk = disks.disk(1, SIZE / 512, None);
        let exports = Named(vec![Arc::new(VolumeExport::new(in_service("vm", Arc::clone(&disk))))]);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let listeners = vec![Listener::Tls(listener, config)];
        let server = NbdServer::start(listeners, Arc::new(exports), options).unwrap();
        Tcp { server, port, disk, _disks: disks }
    }

    fn uri(&self, certificates: &Path) -> String {
        let dir = certificates.display();
        format!("nbds://localhost:{}/vm?tls-certificates={dir}", self.port)
    }

    fn plain(&self) -> TcpStream {
        let mut socket = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.read_exact(&mut [0; 18]).unwrap();
        socket.write_all(&3u32.to_be_bytes()).unwrap();
        socket
    }
}

fn have(test: &str, name: &str) -> bool {
    let found = tool(name).is_some();
    if !found {
        skip(test, &format!("this machine has no {name}"));
    }
    found
}

fn run(name: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new("timeout")
        .args(["120", name])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("it starts");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [&b"IHAVEOPT"[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

/// The type of the one reply to an option.
fn outcome(socket: &mut TcpStream, option: u32, data: &[u8]) -> u32 {
    socket.write_all(&option_bytes(option, data)).unwrap();
    let mut header = [0; 20];
    socket.read_exact(&mut header).unwrap();
    let len = u32::from_be_bytes(header[16..].try_into().unwrap());
    socket.read_exact(&mut vec![0; usize::try_from(len).unwrap()]).unwrap();
    u32::from_be_bytes(header[12..16].try_into().unwrap())
}

#[test]
fn in_plain_text_nothing_is_said() {
    let authority = Authority::new();
    let tcp = Tcp::new(config(&authority, None), ServerOptions::default());
    let mut socket = tcp.plain();
    for option in [option::LIST, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS, 4711] {
        assert_eq!(outcome(&mut socket, option, &[]), reply::ERR_TLS_REQD);
    }
    for option in [option::INFO, option::GO] {
        for name in ["vm", "other"] {
            let request = info_request(name, &[]);
            assert_eq!(outcome(&mut socket, option, &request), reply::ERR_TLS_REQD);
        }
    }
    socket.write_all(&option_bytes(option::EXPORT_NAME, b"vm")).unwrap();
    let mut rest = Vec::new();
    let _ = socket.read_to_end(&mut rest);
    assert_eq!(rest, b"", "the connection is closed without a word");
}

/// What a client sends together with STARTTLS, before TLS is on, must not count as said under TLS.
#[test]
fn nothing_slips_in_before_tls() {
    let authority = Authority::new();
    let tcp = Tcp::new(config(&authority, None), ServerOptions::default());
    let mut socket = tcp.plain();
    let go = option_bytes(option::GO, &info_request("vm", &[]));
    socket.write_all(&[option_bytes(option::STARTTLS, &[]), go].concat()).unwrap();
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    assert_eq!(answer[12..16], reply::ACK.to_be_bytes());
    assert!(answer.len() < 20 + 16, "an alert at most: {answer:?}");
    assert_eq!(tcp.server.status().connections.iter().filter(|c| c.export.is_some()).count(), 0);
}

#[test]
fn a_client_that_stalls_in_the_tls_handshake_is_dropped() {
    let authority = Authority::new();
    let handshake_max = Duration::from_millis(300);
    let options = ServerOptions { handshake_max, ..ServerOptions::default() };
    let tcp = Tcp::new(config(&authority, None), options);
    let mut socket = tcp.plain();
    assert_eq!(outcome(&mut socket, option::STARTTLS, &[]), reply::ACK);
    let mut rest = Vec::new();
    let _ = socket.read_to_end(&mut rest);
    assert!(rest.len() <= 7, "a goodbye of TLS at most: {rest:?}");
}

#[test]
fn nbdcopy_copies_under_tls() {
    if !have("nbd_tls::nbdcopy_copies_under_tls", "nbdcopy") {
        return;
    }
    let authority = Authority::new();
    let ca = authority.path("ca-cert.pem");
    let tcp = Tcp::new(config(&authority, Some(&ca)), ServerOptions::default());
    let content: Vec<u8> = (0..SIZE / 8).flat_map(|i| (i * i).to_le_bytes()).collect();
    let dir = tempfile::tempdir().unwrap();
    let (source, back) = (dir.path().join("source.raw"), dir.path().join("back.raw"));
    std::fs::write(&source, &content).unwrap();
    let uri = tcp.uri(authority.folder());

    for copy in [[source.to_str().unwrap(), &uri], [&uri, back.to_str().unwrap()]] {
        let (ok, said) =
            run("nbdcopy", &[&["--connections=2", "--requests=64"], &copy[..]].concat());
        assert!(ok, "{said}");
    }

    assert!(std::fs::read(back).unwrap() == content, "what came back is what went in");
    let mut on_disk = vec![0; content.len()];
    tcp.disk.read(0, 0, &mut on_disk).unwrap();
    assert!(on_disk == content);
}

#[test]
fn qemu_works_under_tls() {
    if !have("nbd_tls::qemu_works_under_tls", "qemu-io") {
        return;
    }
    let authority = Authority::new();
    let ca = authority.path("ca-cert.pem");
    let tcp = Tcp::new(config(&authority, Some(&ca)), ServerOptions::default());
    let dir = authority.folder().display();
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={dir}");
    let options = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.port={},export=vm,\
         tls-creds=tls0",
        tcp.port
    );
    let mut args = vec!["--object", &object, "--image-opts"];
    for command in ["write -P 0x5a 1M 4M", "read -P 0x5a 1M 4M", "write -z 2M 1M", "flush"] {
        args.extend(["-c", command]);
    }
    args.extend(["-c", "read -P 0 2M 1M", "-c", "aio_read 0 16M", "-c", "aio_write 8M 8M"]);
    args.push(&options);

    let (ok, said) = run("qemu-io", &args);

    assert!(ok && !said.contains("failed"), "{said}");
}

#[test]
fn only_clients_of_the_authority_get_in() {
    if !have("nbd_tls::only_clients_of_the_authority_get_in", "nbdinfo") {
        return;
    }
    let (authority, other) = (Authority::new(), Authority::new());
    let ca = authority.path("ca-cert.pem");
    let tcp = Tcp::new(config(&authority, Some(&ca)), ServerOptions::default());
    // The other authority's client, which trusts this server.
    std::fs::copy(&ca, other.path("ca-cert.pem")).unwrap();
    let stranger = authority.stranger();
    for dir in [stranger.path(), other.folder()] {
        let (ok, said) = run("nbdinfo", &["--size", &tcp.uri(dir)]);
        assert!(!ok, "{said}");
    }
    let (ok, said) = run("nbdinfo", &["--size", &tcp.uri(authority.folder())]);
    assert!(ok && said.trim() == SIZE.to_string(), "{said}");
    // Without an authority for clients, whoever trusts the server is let in.
    let tcp = Tcp::new(config(&authority, None), ServerOptions::default());
    let (ok, said) = run("nbdinfo", &["--size", &tcp.uri(stranger.path())]);
    assert!(ok, "{said}");
}

#[test]
fn files_that_are_no_certificates_are_refused_by_name() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (chain, key) = (authority.path("server-cert.pem"), authority.path("server-key.pem"));
    let missing = authority.path("missing.pem");
    for (chain, key, ca, kind, named) in [
        (&missing, &key, None, Kind::NotFound, &missing),
        (&chain, &missing, None, Kind::NotFound, &missing),
        (&key, &key, None, Kind::Invalid, &key),
        (&chain, &chain, None, Kind::Invalid, &chain),
        (&chain, &key, Some(key.as_path()), Kind::Invalid, &key),
        (&chain, &other.path("server-key.pem"), None, Kind::Invalid, &chain),
    ] {
        let e = TlsConfig::from_files(chain, key, ca).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert_eq!(e.object(), named.to_str(), "{e}");
    }
}
