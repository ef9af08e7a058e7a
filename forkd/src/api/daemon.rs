//! Routes about the daemon itself: who it is, what it does, what happened.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use blockd::api::body::streamed;
use blockd::api::reply::{Answer, Params, blocking};
use blockd::api::types::{FailureBody, Version};
use serde::Deserialize;
use utoipa::IntoParams;

use super::types::{Event, Health};
use crate::daemon::Daemon;

type Shared = State<Arc<Daemon>>;

/// Who answers
#[utoipa::path(get, path = "/v1/version", tag = "daemon",
    responses((status = 200, body = Version)))]
pub async fn version(State(daemon): Shared) -> Json<Version> {
    Json(daemon.version())
}

/// How the daemon is
#[utoipa::path(get, path = "/v1/health", tag = "daemon", responses((status = 200, body = Health)))]
pub async fn health(State(daemon): Shared) -> Json<Health> {
    Json(daemon.health())
}

/// End the daemon; machines go on
#[utoipa::path(post, path = "/v1/shutdown", tag = "daemon", responses((status = 202)))]
pub async fn shutdown(State(daemon): Shared) -> StatusCode {
    daemon.stop();
    StatusCode::ACCEPTED
}

/// Which events.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct EventParams {
    /// Those after this number.
    pub since: u64,
    /// Go on with new ones as they come.
    pub follow: bool,
}

/// What happened
///
/// One JSON object per line. The last thousand events are kept; numbers without gaps tell a
/// follower whether it missed any.
#[utoipa::path(get, path = "/v1/events", tag = "daemon", params(EventParams),
    responses((status = 200, body = Event, content_type = "application/x-ndjson")))]
pub async fn events(State(daemon): Shared, Params(p): Params<EventParams>) -> Response {
    let (pieces, response) = streamed("application/x-ndjson");
    tokio::spawn(async move {
        let mut latest = daemon.events().follow();
        let mut stopping = daemon.stopping();
        let mut seq = p.since;
        loop {
            latest.mark_unchanged();
            let mut text = Vec::new();
            for event in daemon.events().since(seq) {
                seq = event.seq;
                // An event is plain data: writing it to memory cannot fail.
                let _ = serde_json::to_writer(&mut text, &event);
                text.push(b'\n');
            }
            if !text.is_empty() && pieces.send(Ok(Bytes::from(text))).await.is_err() {
                return;
            }
            if !p.follow || *stopping.borrow() {
                return;
            }
            tokio::select! {
                changed = latest.changed() => if changed.is_err() { return },
                // One more round: what is told about the end is told to followers, too.
                _ = stopping.wait_for(|stop| *stop) => {}
                () = pieces.closed() => return,
            }
        }
    });
    response
}

/// Numbers for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "daemon",
    responses((status = 200, body = String, content_type = "text/plain; version=0.0.4"),
        (status = "default", body = FailureBody)))]
pub async fn metrics(State(daemon): Shared) -> Answer {
    let text = blocking(&daemon, |d| d.metrics()).await?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}
