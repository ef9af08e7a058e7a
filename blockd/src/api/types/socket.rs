//! Where a disk is served: the name of a socket, and what TLS needs.
//!
//! Invariant: TCP goes with TLS and with nothing less. [`Place`] cannot say otherwise, and whoever
//! makes a socket makes it from one.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use format::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use super::{ExportKind, ExportSpec};

/// A socket by its name: an absolute path, or an address and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketName {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP socket.
    Tcp(SocketAddr),
}

impl fmt::Display for SocketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketName::Unix(path) => path.display().fmt(f),
            SocketName::Tcp(address) => address.fmt(f),
        }
    }
}

impl FromStr for SocketName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if Path::new(name).is_absolute() {
            return Ok(SocketName::Unix(name.into()));
        }
        let address = name.parse().map_err(|_| {
            Error::invalid("it is neither an absolute path nor an address with a port")
                .on(format!("socket {name}"))
        });
        address.map(SocketName::Tcp)
    }
}

impl Serialize for SocketName {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            SocketName::Unix(path) => path.serialize(serializer),
            SocketName::Tcp(address) => serializer.collect_str(address),
        }
    }
}

impl<'de> Deserialize<'de> for SocketName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The files that TLS needs, by absolute paths. They are read when the socket is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The server's certificate, and those that lead from it to its authority: PEM.
    #[schema(value_type = String)]
    pub cert: PathBuf,
    /// The private key of the certificate: PEM.
    #[schema(value_type = String)]
    pub key: PathBuf,
    /// The authorities that may have signed the certificates which clients then have to show: PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub client_ca: Option<PathBuf>,
}

/// What a socket is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// A path.
    Unix(&'a Path),
    /// An address, and what its clients are met with.
    Tls(SocketAddr, &'a TlsFiles),
}

impl ExportSpec {
    /// Where it is to be served.
    ///
    /// # Errors
    /// `Invalid` for what there is no socket for.
    pub fn place(&self) -> Result<Place<'_>> {
        self.checked_place().map_err(|e| e.on(format!("socket {}", self.socket)))
    }

    fn checked_place(&self) -> Result<Place<'_>> {
        match (&self.socket, &self.tls) {
            (SocketName::Unix(path), None) => Ok(Place::Unix(path)),
            (SocketName::Unix(_), Some(_)) => Err(Error::invalid("a Unix socket has no TLS")
                .hint("leave the certificate out: the file's permissions say who gets in")),
            (SocketName::Tcp(_), _) if self.kind == ExportKind::VhostUser => {
                Err(Error::invalid("vhost-user shares memory, which only a Unix socket can"))
            }
            (SocketName::Tcp(_), None) => {
                Err(Error::invalid("TCP is served under TLS only, and there is no certificate")
                    .hint("name a certificate and its key: --tls-cert and --tls-key"))
            }
            (SocketName::Tcp(address), Some(_)) if address.port() == 0 => {
                Err(Error::invalid("port 0 is none"))
            }
            (SocketName::Tcp(address), Some(files)) => {
                let named = [Some(&files.cert), Some(&files.key), files.client_ca.as_ref()];
                match named.into_iter().flatten().find(|path| !path.is_absolute()) {
                    Some(path) => Err(Error::invalid("the path is not absolute")
                        .on(format!("TLS file {}", path.display()))),
                    None => Ok(Place::Tls(*address, files)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: &str, socket: &str, tls: bool) -> std::result::Result<ExportSpec, String> {
        let mut json = serde_json::json!({"kind": kind, "socket": socket});
        if tls {
            json["tls"] = serde_json::json!({"cert": "/etc/c.pem", "key": "/etc/k.pem"});
        }
        serde_json::from_value(json).map_err(|e| e.to_string())
    }

    #[test]
    fn names_of_sockets_stay_what_they_are() {
        for name in ["/run/a.sock", "127.0.0.1:10809", "[::1]:10809"] {
            let parsed: SocketName = name.parse().unwrap();
            assert_eq!(parsed.to_string(), name);
            let json = serde_json::to_string(&parsed).unwrap();
            assert_eq!(json, format!("{name:?}"));
            assert_eq!(serde_json::from_str::<SocketName>(&json).unwrap(), parsed);
        }
        for name in ["", "a.sock", "localhost:10809", "127.0.0.1", ":10809"] {
            assert!(name.parse::<SocketName>().is_err(), "{name}");
        }
    }

    #[test]
    fn tcp_goes_with_tls_and_unix_without() {
        let of = |kind, socket, tls| {
            let spec = spec(kind, socket, tls).unwrap();
            spec.place().map(|place| matches!(place, Place::Tls(..))).map_err(|e| e.to_string())
        };
        assert_eq!(of("nbd", "/run/a", false), Ok(false));
        assert_eq!(of("nbd", "127.0.0.1:1", true), Ok(true));
        for (kind, socket, tls, word) in [
            ("nbd", "127.0.0.1:1", false, "under TLS only"),
            ("nbd", "127.0.0.1:0", true, "port 0"),
            ("nbd", "/run/a", true, "has no TLS"),
            ("vhost-user", "127.0.0.1:1", true, "only a Unix socket"),
            ("vhost-user", "/run/a", true, "has no TLS"),
        ] {
            let refused = of(kind, socket, tls).unwrap_err();
            assert!(refused.contains(word) && refused.contains(socket), "{refused}");
        }
        let mut relative = spec("nbd", "127.0.0.1:1", true).unwrap();
        relative.tls.as_mut().unwrap().client_ca = Some("ca.pem".into());
        assert!(relative.place().unwrap_err().to_string().contains("TLS file ca.pem"));
    }
}
