//! TLS of the server side: a certificate, its key, and optionally the authority that clients'
//! certificates must come from. TLS 1.2 and 1.3.

use std::path::Path;
use std::sync::Arc;

use format::{Error, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

/// What a TLS listener needs.
#[derive(Debug, Clone)]
pub struct TlsConfig(Arc<ServerConfig>);

impl TlsConfig {
    /// Reads PEM files: the certificate chain of the server, its private key, and, when clients
    /// must show a certificate, those of the authorities that may have signed it.
    ///
    /// # Errors
    /// `NotFound` and the like for a file that cannot be read, `Invalid` when what is in the files
    /// is no certificate or key, or they do not belong together.
    pub fn from_files(chain: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Self> {
        let chain_certs = certificates(chain)?;
        let pem = std::fs::read(key).map_err(|e| at(key, e.into()))?;
        let private = PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|e| at(key, Error::invalid("no private key in PEM form").caused_by(e)))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::invalid("no usable TLS version").on("TLS").caused_by(e))?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(|e| {
                        at(path, Error::invalid("a certificate cannot be used").caused_by(e))
                    })?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|e| {
                    at(path, Error::invalid("the authorities cannot be used").caused_by(e))
                })?)
            }
        };
        let config = builder.with_single_cert(chain_certs, private).map_err(|e| {
            at(chain, Error::invalid("certificate and key do not belong together").caused_by(e))
        })?;
        Ok(TlsConfig(Arc::new(config)))
    }

    pub(super) fn session(&self) -> Result<ServerConnection> {
        ServerConnection::new(Arc::clone(&self.0))
            .map_err(|e| Error::invalid("no TLS session can be made").on("TLS").caused_by(e))
    }
}

fn at(path: &Path, e: Error) -> Error {
    e.tried("use TLS file").on(path.display().to_string())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = std::fs::read(path).map_err(|e| at(path, e.into()))?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|e| at(path, Error::invalid("no certificates in PEM form").caused_by(e)))?;
    if found.is_empty() {
        return Err(at(path, Error::invalid("there is no certificate in it")));
    }
    Ok(found)
}
