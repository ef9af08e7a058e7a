//! One HTTP connection to a Unix socket, with calls that wait.
//!
//! Invariant: a connection does nothing between two calls. It has a small runtime of its own, which
//! runs only while somebody waits for an answer.

use std::path::Path;

use format::{Error, Kind, Result};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use blockd::api::NOTE;
use blockd::api::types::FailureBody;

use crate::output::{Outcome, Stop};

/// A kind of daemon.
#[derive(Debug)]
pub struct Whom {
    /// What messages call it.
    pub called: &'static str,
    /// What to do when there is none.
    pub hint: &'static str,
}

/// The daemon that has a store.
pub const BLOCKD: Whom = Whom { called: "the daemon", hint: "start one: `offshoot daemon start`" };
/// The daemon that has machines.
pub const FORKD: Whom =
    Whom { called: "forkd", hint: "start it: `forkd --state DIR`, or name its socket: --forkd" };

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Ask {
    /// How.
    pub method: Method,
    /// Path and parameters, encoded.
    pub path: String,
    /// What goes with it.
    pub body: Bytes,
    /// True when that is JSON.
    pub json: bool,
}

/// A whole answer.
pub struct Answer {
    /// What it says.
    pub body: Bytes,
    /// Lines for the user.
    pub notes: Vec<String>,
    /// The job is not done yet; the body describes it.
    pub accepted: bool,
}

/// A connection.
pub struct Connection {
    runtime: Runtime,
    sender: SendRequest<Full<Bytes>>,
    object: String,
}

impl Connection {
    /// Connects to the daemon that listens at `socket`.
    ///
    /// # Errors
    /// `NotFound` when nobody answers there, `ReadOnly` when it is not permitted, or what the host
    /// reports.
    pub fn open(whom: &Whom, socket: &Path) -> Result<Self> {
        let object = format!("{} at {}", whom.called, socket.display());
        let wrong = |e: Error| e.tried("reach").on(object.clone());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(|e| wrong(e.into()))?;
        let sender = runtime.block_on(async {
            let stream = UnixStream::connect(socket).await.map_err(|e| wrong(nobody(whom, e)))?;
            let (sender, connection) = http1::Builder::new()
                .max_headers(256)
                .handshake(TokioIo::new(stream))
                .await
                .map_err(|e| wrong(lost(e)))?;
            // Its failure shows in the call that it is about.
            tokio::spawn(async move { drop(connection.await) });
            Ok::<_, Error>(sender)
        })?;
        Ok(Connection { runtime, sender, object })
    }

    /// Asks, and waits for the whole answer.
    ///
    /// # Errors
    /// The failure that the daemon told of; `Io` when it went away.
    pub fn call(&mut self, ask: &Ask) -> Result<Answer> {
        let Connection { runtime, sender, object } = self;
        runtime.block_on(async {
            let response = send(sender, ask, object).await?;
            let notes = notes(&response);
            let accepted = response.status() == StatusCode::ACCEPTED;
            let body = response.into_body().collect().await;
            let body = body.map_err(|e| lost(e).tried("ask").on(object.clone()))?.to_bytes();
            Ok(Answer { body, notes, accepted })
        })
    }

    /// Asks, and passes the answer on as it comes: its notes, then its pieces.
    ///
    /// # Errors
    /// As [`Connection::call`], or what `each` reports.
    pub fn stream(
        &mut self,
        ask: &Ask,
        begin: &mut dyn FnMut(Vec<String>),
        each: &mut dyn FnMut(&[u8]) -> Outcome<()>,
    ) -> Outcome<()> {
        let Connection { runtime, sender, object } = self;
        runtime.block_on(async {
            let response = send(sender, ask, object).await?;
            begin(notes(&response));
            let mut body = response.into_body();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| Stop::from(lost(e).tried("ask").on(object.clone())));
                if let Ok(bytes) = frame?.into_data() {
                    each(&bytes)?;
                }
            }
            Ok(())
        })
    }
}

async fn send(
    sender: &mut SendRequest<Full<Bytes>>,
    ask: &Ask,
    object: &str,
) -> Result<Response<Incoming>> {
    let wrong = |e: Error| e.tried("ask").on(object.to_owned());
    let kind = if ask.json { "application/json" } else { "application/octet-stream" };
    let request = Request::builder()
        .method(&ask.method)
        .uri(&ask.path)
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, kind)
        .body(Full::new(ask.body.clone()))
        .map_err(|e| wrong(Error::invalid("it cannot be asked for").caused_by(e)))?;
    sender.ready().await.map_err(|e| wrong(lost(e)))?;
    let response = sender.send_request(request).await.map_err(|e| wrong(lost(e)))?;
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|e| wrong(lost(e)))?.to_bytes();
    Err(match serde_json::from_slice::<FailureBody>(&body) {
        Ok(failure) => Error::from(failure.error),
        Err(e) => {
            let reason = format!("it answers {status}, and says nothing that is known here");
            wrong(Error::new(Kind::Unsupported, reason).caused_by(e))
        }
    })
}

fn notes(response: &Response<Incoming>) -> Vec<String> {
    let notes = response.headers().get_all(NOTE).iter();
    notes.map(|note| String::from_utf8_lossy(note.as_bytes()).into_owned()).collect()
}

fn lost(e: hyper::Error) -> Error {
    Error::new(Kind::Io, "it went away before it had answered")
        .caused_by(e)
        .hint("see whether it runs, and what there is now")
}

fn nobody(whom: &Whom, e: std::io::Error) -> Error {
    use std::io::ErrorKind as E;
    match e.kind() {
        E::NotFound | E::ConnectionRefused => {
            Error::new(Kind::NotFound, "nobody answers there").hint(whom.hint)
        }
        _ => e.into(),
    }
}
