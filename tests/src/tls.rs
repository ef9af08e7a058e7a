//! Certificates for TLS, made on the spot.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

/// An authority and what it signed, in the layout that GnuTLS clients look for: `ca-cert.pem`, and
/// `-cert.pem` and `-key.pem` of `server` (which is `localhost`) and `client`.
pub struct Authority {
    dir: TempDir,
}

impl Authority {
    /// A new one, in a folder of its own.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let ca = CertifiedIssuer::self_signed(params, key).expect("signed");
        let authority = Authority { dir };
        authority.keep("ca-cert.pem", &ca.pem());
        for who in ["server", "client"] {
            let key = KeyPair::generate().expect("a key");
            let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
            let signed = params.signed_by(&key, &ca).expect("signed");
            authority.keep(&format!("{who}-cert.pem"), &signed.pem());
            authority.keep(&format!("{who}-key.pem"), &key.serialize_pem());
        }
        authority
    }

    fn keep(&self, name: &str, pem: &str) {
        fs::write(self.path(name), pem).expect("written");
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// A file of it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A folder with the authority's certificate and no other.
    ///
    /// # Panics
    /// When the host does not let us.
    #[must_use]
    pub fn stranger(&self) -> TempDir {
        let dir = tempfile::tempdir().expect("a folder");
        fs::copy(self.path("ca-cert.pem"), dir.path().join("ca-cert.pem")).expect("copied");
        dir
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

/// A TCP port of this machine that nobody listens on.
///
/// # Panics
/// When the host does not let us.
#[must_use]
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("it has one").port()
}
