//! The server: connections, and the end of them.
//!
//! It is blockd's, and forkd's as well: what they offer is a [`Served`].
//!
//! Invariants:
//! - What a connection opened (sessions) ends with it.
//! - When the daemon is going to stop, nobody new is let in, answers under way are finished for
//!   [`GRACE`], then connections are cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use format::{Context as _, Result};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::socket::ApiSocket;

/// How long answers under way may take when the daemon stops.
const GRACE: Duration = Duration::from_secs(10);
/// Wait after a failed accept: the host is out of descriptors, and that passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections at a time.
const CONNECTIONS_MAX: usize = 512;

/// Names a connection.
#[derive(Debug, Clone, Copy)]
pub struct Client(pub u64);

/// A daemon that answers requests.
pub trait Served: Send + Sync + 'static {
    /// Every route that it has.
    fn routes(self: &Arc<Self>) -> Router;

    /// Tells when it is going to end.
    fn stopping(&self) -> watch::Receiver<bool>;

    /// Asks it to end.
    fn stop(&self);

    /// Called when a connection has ended. Must not wait.
    fn ended(self: &Arc<Self>, client: Client) {
        let _ = client;
    }

    /// True when the socket's file is another process's by now.
    fn left_its_socket(&self) -> bool {
        false
    }
}

/// Serves until the daemon is asked to stop.
///
/// # Errors
/// What the host reports about the socket.
pub async fn serve<D: Served>(daemon: Arc<D>, socket: ApiSocket) -> Result<()> {
    let listener = UnixListener::from_std(socket.listener()?)
        .context("listen on", || "the socket of the interface".into())?;
    let app = daemon.routes();
    let numbers = AtomicU64::new(0);
    let mut stopping = daemon.stopping();
    let mut connections = JoinSet::new();
    loop {
        let room = connections.len() < CONNECTIONS_MAX;
        tokio::select! {
            () = told_to_stop(&mut stopping) => break,
            accepted = listener.accept(), if room => match accepted {
                Ok((stream, _)) if socket.admits(&stream) => {
                    // Relaxed: only a number that nobody else gets.
                    let client = Client(numbers.fetch_add(1, Ordering::Relaxed));
                    connections.spawn(converse(Arc::clone(&daemon), app.clone(), stream, client));
                }
                Ok(_) => tracing::warn!("turned away a client that may not connect"),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
    drop(listener);
    if daemon.left_its_socket() {
        socket.leave();
    } else {
        drop(socket);
    }
    let rest = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, rest).await.is_err() {
        tracing::warn!("cut {} connections that did not end", connections.len());
    }
    Ok(())
}

async fn told_to_stop(stopping: &mut watch::Receiver<bool>) {
    // An error would mean that the daemon is gone, which is an end as well.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Tells of the end of a connection, however it ended.
struct Ends<D: Served> {
    daemon: Arc<D>,
    client: Client,
}

impl<D: Served> Drop for Ends<D> {
    fn drop(&mut self) {
        self.daemon.ended(self.client);
    }
}

async fn converse<D: Served>(daemon: Arc<D>, app: Router, stream: UnixStream, client: Client) {
    let mut stopping = daemon.stopping();
    let _ends = Ends { daemon, client };
    let app = TowerToHyperService::new(app);
    // Not as a layer: that would be put around every route anew for every connection.
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(client);
        app.call(request)
    });
    // Without a time limit on silence: a connection that holds a session may be silent for long.
    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = told_to_stop(&mut stopping) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}
