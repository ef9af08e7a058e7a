//! `disk attach`, `export-nbd`, `detach`, `limits`, `resume`: disks in service.

use std::path::{Path, absolute};

use blockd::api::types::{
    AttachDisk, DetachDisk, Export, ExportKind, ExportSpec, SocketName, TlsFiles,
};
use blockd::serve::Limits;
use format::{Error, Result};
use hyper::Method;
use serde::Serialize;

use super::Session;
use crate::cli::{Attach, Detach, ExportNbd, Limit, Remove};
use crate::client::path_of;
use crate::output::{Outcome, Verdict};
use crate::size::show;

fn path(name: &str, what: &str) -> String {
    path_of("/v1/disks/", name, what)
}

fn unix(socket: &Path) -> Result<SocketName> {
    Ok(SocketName::Unix(absolute(socket)?))
}

/// `disk attach`
pub fn attach(s: &Session, args: &Attach) -> Outcome {
    let request = AttachDisk {
        export: ExportSpec {
            kind: ExportKind::VhostUser,
            socket: unix(&args.socket)?,
            tls: None,
            read_only: args.readonly,
            queues: args.queues,
            poll_us_max: args.poll_us,
            packed: true,
        },
        limits: args.limits.named(),
        accept_lost_tail: args.tail.accept_lost_tail,
    };
    put_into_service(s, &args.name, &request)
}

fn put_into_service(s: &Session, name: &str, request: &AttachDisk) -> Outcome {
    let export: Export = s.need_daemon()?.post(path(name, "/attach"), request)?;
    s.out.confirm(&export, || format!("disk {} is served at {}", export.disk, export.socket))?;
    Ok(Verdict::Done)
}

/// `disk export-nbd`
pub fn export_nbd(s: &Session, args: &ExportNbd) -> Outcome {
    let socket = match (&args.socket, args.tcp) {
        (_, Some(address)) => SocketName::Tcp(address),
        (Some(path), None) => unix(path)?,
        (None, None) => return Err(Error::invalid("nothing says where").into()),
    };
    let request = AttachDisk {
        export: ExportSpec {
            kind: ExportKind::Nbd,
            socket,
            tls: tls_files(args)?,
            read_only: args.readonly,
            queues: 1,
            poll_us_max: None,
            packed: true,
        },
        limits: args.limits.named(),
        accept_lost_tail: args.tail.accept_lost_tail,
    };
    put_into_service(s, &args.name, &request)
}

fn tls_files(args: &ExportNbd) -> Result<Option<TlsFiles>> {
    let (Some(cert), Some(key)) = (&args.tls_cert, &args.tls_key) else { return Ok(None) };
    let client_ca = args.tls_client_ca.as_deref().map(absolute).transpose()?;
    Ok(Some(TlsFiles { cert: absolute(cert)?, key: absolute(key)?, client_ca }))
}

/// The socket that a user names.
fn named(socket: &Path) -> Result<SocketName> {
    let address = socket.to_str().and_then(|text| text.parse().ok());
    address.map_or_else(|| unix(socket), |address| Ok(SocketName::Tcp(address)))
}

/// `disk detach`
pub fn detach(s: &Session, args: &Detach) -> Outcome {
    let socket = args.socket.as_deref().map(named).transpose()?;
    let request = DetachDisk { socket, force: args.force };
    let ended: Vec<Export> = s.need_daemon()?.post(path(&args.name, "/detach"), &request)?;
    s.out.confirm(&ended, || {
        let line = |e: &Export| format!("disk {} is no longer served at {}", e.disk, e.socket);
        ended.iter().map(line).collect::<Vec<_>>().join("\n")
    })?;
    Ok(Verdict::Done)
}

/// `disk limits`
pub fn limits(s: &Session, args: &Limit) -> Outcome {
    let limits = args.limits.named().unwrap_or_default();
    let set: Limits = s.need_daemon()?.put(path(&args.name, "/limits"), &limits)?;
    s.out.confirm(&set, || {
        let iops = if set.iops == 0 { "any number of".into() } else { set.iops.to_string() };
        let bytes =
            if set.bytes_per_s == 0 { "any number of bytes".into() } else { show(set.bytes_per_s) };
        format!("disk {} may do {iops} requests and {bytes} per second", args.name)
    })?;
    Ok(Verdict::Done)
}

/// `disk resume`
pub fn resume(s: &Session, args: &Remove) -> Outcome {
    #[derive(Serialize)]
    struct Resumed<'a> {
        resumed: &'a str,
    }
    s.need_daemon()?.tell_to(Method::POST, path(&args.name, "/resume"), &())?;
    let resumed = Resumed { resumed: &args.name };
    s.out.confirm(&resumed, || format!("held requests of disk {} are tried again", args.name))?;
    Ok(Verdict::Done)
}
