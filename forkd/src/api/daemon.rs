//! Routes about the daemon itself: who it is, what it does, what happened.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use blockd::api::events::{EventParams, told};
use blockd::api::reply::{Answer, Params, blocking};
use blockd::api::types::{FailureBody, Version};

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

/// What happened
///
/// One JSON object per line. The last thousand events are kept; numbers without gaps tell a
/// follower whether it missed any.
#[utoipa::path(get, path = "/v1/events", tag = "daemon", params(EventParams),
    responses((status = 200, body = Event, content_type = "application/x-ndjson")))]
pub async fn events(State(daemon): Shared, Params(p): Params<EventParams>) -> Response {
    told(Arc::clone(daemon.events()), daemon.stopping(), &p)
}

/// Numbers for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "daemon",
    responses((status = 200, body = String, content_type = "text/plain; version=0.0.4"),
        (status = "default", body = FailureBody)))]
pub async fn metrics(State(daemon): Shared) -> Answer {
    let text = blocking(&daemon, |d| d.metrics()).await?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}
