//! NBD under TLS from the daemon itself, confined as it is by default: what is asked for is served,
//! is served again after a kill, and what cannot be served is refused with a word about why.

use std::fs;
use std::io::Read as _;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use blockd::nbd::wire::{command, option, reply};
use offshoot_tests::daemon::{Daemon, Reply, ask, program};
use offshoot_tests::mount::{have, run};
use offshoot_tests::nbd::{Client, PATIENCE};
use offshoot_tests::skip;
use offshoot_tests::store::TestStore;
use offshoot_tests::tls::{Authority, free_port};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};

const SIZE: u64 = 8 << 20;

/// The files of a server of this authority.
fn files(authority: &Authority, client_ca: bool) -> Value {
    let path = |name: &str| json!(authority.path(name));
    let ca = if client_ca { path("ca-cert.pem") } else { Value::Null };
    json!({"cert": path("server-cert.pem"), "key": path("server-key.pem"), "client_ca": ca})
}

fn attach(daemon: &Daemon, socket: &str, tls: &Value) -> Reply {
    let export = json!({"kind": "nbd", "socket": socket, "tls": tls});
    let body = json!({ "export": export }).to_string();
    daemon.ask("POST", "/v1/disks/vm/attach", body.as_bytes())
}

fn disk(daemon: &Daemon) {
    daemon.json("POST", "/v1/disks", &json!({"name": "vm", "size": SIZE}));
}

fn exports(daemon: &Daemon) -> Value {
    daemon.json("GET", "/v1/exports", &Value::Null)
}

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A client that trusts `authority` and shows its client's certificate, past the handshake of TLS.
fn client(address: &str, authority: &Authority) -> Client<Tls> {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut plain = Client::over(socket).greeted();
    assert_eq!(plain.outcome(option::STARTTLS, &[]), reply::ACK);
    let mut roots = RootCertStore::empty();
    let pem = |name: &str| CertificateDer::from_pem_file(authority.path(name)).unwrap();
    roots.add(pem("ca-cert.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(authority.path("client-key.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![pem("client-cert.pem")], key)
        .unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut session = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut socket = plain.socket;
    while session.is_handshaking() {
        session.complete_io(&mut socket).unwrap();
    }
    Client::over(StreamOwned::new(session, socket))
}

fn read(client: &mut Client<Tls>, offset: u64, len: usize) -> Vec<u8> {
    client.request((command::READ, 0), 5, (offset, len as u64), &[]);
    let (cookie, error, data) = client.simple(len);
    assert_eq!((cookie, error), (5, 0));
    data
}

/// Story: what was written under TLS is there after the daemon was killed, at the same address and
/// under the same authority, and a certificate that was renewed meanwhile is the one that is shown.
#[test]
fn a_confined_daemon_serves_under_tls_and_again_after_a_kill() {
    let authority = Authority::new();
    let bench = TestStore::new();
    let daemon = bench.daemon();
    disk(&daemon);
    let address = format!("127.0.0.1:{}", free_port());

    let attached = attach(&daemon, &address, &files(&authority, true));

    assert_eq!(attached.status, 201, "{attached:?}");
    let export = attached.json();
    assert_eq!((&export["socket"], &export["state"]), (&json!(address), &json!("listening")));
    assert_eq!(export["tls"]["key"], json!(authority.path("server-key.pem")));
    let mut first = client(&address, &authority);
    assert_eq!(first.go("").0, SIZE);
    let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
    let bytes = &bytes[..65536];
    first.request((command::WRITE, 0), 4, (4096, 65536), bytes);
    assert_eq!(first.simple(0), (4, 0, Vec::new()));
    assert_eq!(exports(&daemon)[0]["state"], "connected");
    daemon.kill();
    let renewed = Authority::new();
    for name in ["server-cert.pem", "server-key.pem", "ca-cert.pem"] {
        fs::copy(renewed.path(name), authority.path(name)).unwrap();
    }

    let daemon = bench.daemon();

    assert_eq!(exports(&daemon)[0]["socket"], json!(address));
    let mut second = client(&address, &renewed);
    assert_eq!(second.go("vm").0, SIZE);
    assert!(read(&mut second, 4096, 65536) == bytes, "what was written is read");
    drop((first, second));
    let detach = json!({"socket": address, "force": true});
    let ended = daemon.json("POST", "/v1/disks/vm/detach", &detach);
    assert_eq!(ended.as_array().map(Vec::len), Some(1), "{ended}");
    assert!(TcpStream::connect(&address).is_err(), "nobody listens there any more");
    assert_eq!(exports(&daemon), json!([]));
    // The port is free at once, connections that were cut off or not.
    assert_eq!(attach(&daemon, &address, &files(&renewed, false)).status, 201);
}

/// Story: a key that was gone when the daemon started again took the whole disk out of service, and
/// the guest on the disk's vhost-user socket with it.
#[test]
fn an_export_whose_key_is_gone_fails_alone_and_is_mended_by_attaching_it_anew() {
    let authority = Authority::new();
    let bench = TestStore::new();
    let daemon = bench.daemon();
    disk(&daemon);
    let address = format!("127.0.0.1:{}", free_port());
    let (vhost, nbd) = (bench.path("vhost"), bench.path("nbd"));
    let tls = files(&authority, false);
    // In the middle: neither the one before it nor the one after it goes with it.
    let one = json!({"export": {"kind": "nbd", "socket": nbd}});
    daemon.json("POST", "/v1/disks/vm/attach", &one);
    assert_eq!(attach(&daemon, &address, &tls).status, 201);
    let two = json!({"export": {"kind": "vhost-user", "socket": vhost}});
    daemon.json("POST", "/v1/disks/vm/attach", &two);
    daemon.kill();
    let (key, aside) = (authority.path("server-key.pem"), bench.path("aside"));
    fs::rename(&key, &aside).unwrap();

    let daemon = bench.daemon();

    let state = |daemon: &Daemon| -> Vec<Value> {
        let all = exports(daemon);
        all.as_array().unwrap().iter().map(|e| e["state"].clone()).collect()
    };
    assert_eq!(state(&daemon), ["listening", "failed", "listening"]);
    let failed = exports(&daemon)[1].clone();
    assert_eq!(failed["socket"], json!(address));
    assert!(failed["error"].as_str().unwrap().contains("server-key.pem"), "{failed}");
    let health = daemon.json("GET", "/v1/health", &Value::Null);
    assert_eq!((&health["failed"], &health["served"]), (&json!(["vm"]), &json!(1)));
    let events = String::from_utf8(daemon.ask("GET", "/v1/events", b"").body).unwrap();
    assert!(events.contains("\"failed\"") && events.contains(&address), "{events}");
    assert!(vhost_blk::client::Client::connect(&vhost, Default::default()).is_ok());
    assert_eq!(Client::connect(&nbd).greeted().go("vm").0, SIZE);
    assert!(TcpStream::connect(&address).is_err(), "nobody listens there");
    let refused = attach(&daemon, &address, &tls);
    assert_eq!((refused.status, state(&daemon)[1].as_str()), (404, Some("failed")), "{refused:?}");
    // It is remembered all the same, in whatever way the daemon ends.
    assert!(daemon.terminate().success());
    let daemon = bench.daemon();
    assert_eq!(state(&daemon), ["listening", "failed", "listening"]);

    fs::rename(&aside, &key).unwrap();
    let mended = attach(&daemon, &address, &tls);

    assert_eq!(mended.status, 201, "{mended:?}");
    assert_eq!(state(&daemon), ["listening"; 3]);
    assert_eq!(client(&address, &authority).go("vm").0, SIZE);
    assert_eq!(daemon.json("GET", "/v1/health", &Value::Null)["failed"], json!([]));
    assert_eq!(attach(&daemon, &address, &tls).status, 409, "it is served now");
    daemon.kill();
    let daemon = bench.daemon();
    assert_eq!(state(&daemon), ["listening"; 3]);
    // One that failed can be forgotten, too, and the others stay.
    daemon.kill();
    fs::rename(&key, &aside).unwrap();
    let daemon = bench.daemon();
    daemon.json("POST", "/v1/disks/vm/detach", &json!({"socket": address}));
    assert_eq!(state(&daemon), ["listening"; 2]);
    assert!(vhost.exists() && nbd.exists());
}

/// A key that is gone when a daemon is upgraded costs that export, and no guest its connection.
#[test]
fn an_upgrade_without_the_key_of_an_export_goes_on_with_the_others() {
    let authority = Authority::new();
    let bench = TestStore::new();
    let mut daemon = bench.daemon();
    disk(&daemon);
    let address = format!("127.0.0.1:{}", free_port());
    let vhost = bench.path("vhost");
    assert_eq!(attach(&daemon, &address, &files(&authority, false)).status, 201);
    let other = json!({"export": {"kind": "vhost-user", "socket": vhost}});
    daemon.json("POST", "/v1/disks/vm/attach", &other);
    let (mut guest, _queues) =
        vhost_blk::client::Client::connect(&vhost, Default::default()).unwrap();
    fs::remove_file(authority.path("server-key.pem")).unwrap();

    let blockd = program("blockd");
    bench.done(&["daemon", "upgrade", "--program", blockd.to_str().unwrap()]);

    assert!(daemon.wait().success());
    let exports = ask(&bench.api(), "GET", "/v1/exports", b"").unwrap().json();
    let state = |i: usize| exports[i]["state"].as_str().unwrap().to_owned();
    assert_eq!((state(0), state(1)), ("failed".into(), "connected".into()), "{exports}");
    assert!(exports[0]["error"].as_str().unwrap().contains("server-key.pem"), "{exports}");
    assert_eq!(guest.disk_size().unwrap(), SIZE, "over the same connection");
    assert!(TcpStream::connect(&address).is_err(), "nobody listens there");
}

#[test]
fn tools_work_on_an_export_of_a_confined_daemon() {
    let test = "nbd_tls_served::tools_work_on_an_export_of_a_confined_daemon";
    if !have(test, &["nbdinfo", "qemu-img"]) {
        return;
    }
    let (authority, stranger) = (Authority::new(), Authority::new());
    let bench = TestStore::new();
    let daemon = bench.daemon();
    disk(&daemon);
    let bytes: Vec<u8> = (0..2_000_000_u32).map(|i| (i % 253) as u8).collect();
    assert_eq!(daemon.ask("PUT", "/v1/disks/vm/data?offset=12345", &bytes).status, 200);
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    assert_eq!(attach(&daemon, &address, &files(&authority, true)).status, 201);
    let uri =
        |folder: &Path| format!("nbds://localhost:{port}/vm?tls-certificates={}", folder.display());

    let size = run("nbdinfo", &["--size", &uri(authority.folder())]);

    assert_eq!(size.trim(), SIZE.to_string());
    fs::copy(authority.path("ca-cert.pem"), stranger.path("ca-cert.pem")).unwrap();
    let mut refused = std::process::Command::new("nbdinfo");
    let refused = refused.args(["--size", &uri(stranger.folder())]).output().unwrap();
    assert!(!refused.status.success(), "a stranger's certificate: {refused:?}");
    let raw = bench.path("raw");
    let folder = authority.folder().display();
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={folder}");
    let source = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=vm,\
         tls-creds=tls0"
    );
    let to = raw.to_str().unwrap();
    run("qemu-img", &["convert", "--object", &object, "--image-opts", &source, "-O", "raw", to]);
    assert!(fs::read(&raw).unwrap() == daemon.ask("GET", "/v1/disks/vm/data", b"").body);
}

#[test]
fn what_cannot_be_served_is_refused_and_not_remembered() {
    let authority = Authority::new();
    let bench = TestStore::new();
    let daemon = bench.daemon();
    disk(&daemon);
    let address = format!("127.0.0.1:{}", free_port());
    let (good, path) = (files(&authority, false), bench.path("nbd"));
    let missing = json!({"cert": authority.path("no.pem"), "key": authority.path("no.pem")});
    let swapped =
        json!({"cert": authority.path("server-key.pem"), "key": authority.path("ca-cert.pem")});
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let no_address = format!("192.0.2.1:{}", free_port());
    for (socket, tls, status, word) in [
        (address.as_str(), &Value::Null, 400, "under TLS only"),
        (address.as_str(), &missing, 404, "no.pem"),
        (address.as_str(), &swapped, 400, "server-key.pem"),
        ("127.0.0.1:0", &good, 400, "port 0"),
        ("localhost:10809", &good, 400, "neither an absolute path nor an address"),
        (path.to_str().unwrap(), &good, 400, "has no TLS"),
        (taken.as_str(), &good, 409, "another process listens"),
        (no_address.as_str(), &good, 404, "this machine does not have"),
    ] {
        let refused = attach(&daemon, socket, tls);
        assert_eq!(refused.status, status, "{socket}: {refused:?}");
        let message = refused.json()["error"]["message"].to_string();
        assert!(message.contains(word), "{word:?} is not in {message}");
        assert_eq!(exports(&daemon), json!([]));
    }
    let remembered = fs::read_to_string(bench.store().join("attachments.json")).unwrap();
    assert!(!remembered.contains("127.0.0.1"), "{remembered}");
    assert!(TcpStream::connect(&address).is_err(), "nobody listens there");
}

/// The confined daemon reads keys only where its sandbox lets it, and says where that is.
#[test]
fn keys_are_read_where_the_sandbox_allows_it() {
    let test = "nbd_tls_served::keys_are_read_where_the_sandbox_allows_it";
    let bench = TestStore::new();
    let daemon = bench.daemon();
    disk(&daemon);
    let sandbox = daemon.json("GET", "/v1/health", &Value::Null)["sandbox"].clone();
    if !sandbox.as_array().unwrap().contains(&json!("landlock")) {
        return skip(test, "this kernel has no landlock");
    }
    let outside = tempfile::tempdir_in("/var/tmp").unwrap();
    let authority = Authority::new();
    let keep = |name: &str| {
        fs::copy(authority.path(name), outside.path().join(name)).unwrap();
        outside.path().join(name)
    };
    let (cert, key) = (keep("server-cert.pem"), keep("server-key.pem"));
    let address = format!("127.0.0.1:{}", free_port());

    let refused = attach(&daemon, &address, &json!({"cert": cert, "key": key}));

    assert_eq!(refused.status, 403, "{refused:?}");
    let error = refused.json()["error"].clone();
    assert!(error["message"].to_string().contains(cert.to_str().unwrap()), "{error}");
    assert!(error["hint"].to_string().contains("/etc"), "{error}");
    // What is below /etc can be read: the machine's own authorities, for example.
    let own = Path::new("/etc/ssl/certs/ca-certificates.crt");
    if !own.exists() {
        return skip(test, &format!("this machine has no {}", own.display()));
    }
    let (cert, key) = (authority.path("server-cert.pem"), authority.path("server-key.pem"));
    let tls = json!({"cert": cert, "key": key, "client_ca": own});
    let attached = attach(&daemon, &address, &tls);
    assert_eq!(attached.status, 201, "{attached:?}");
    // It is told so when it first reads: TLS 1.3 lets the client finish first.
    let refused = client(&address, &authority).socket.read(&mut [0]).unwrap_err().to_string();
    assert!(
        refused.contains("UnknownCA"),
        "the test's authority is none of the machine's: {refused}"
    );
}
