//! Routes about the daemon itself: who it is, what it does, what happened.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::events::{EventParams, told};
use super::jobs::{self, WaitParams};
use super::reply::{Answer, Asked, Named, Params, blocking};
use super::types::{Event, FailureBody, HandOver, HandedOver, Health, Job, Version};
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

/// End the daemon in order
///
/// The answer comes at once; jobs are cancelled, disks are closed after it.
#[utoipa::path(post, path = "/v1/shutdown", tag = "daemon", responses((status = 202)))]
pub async fn shutdown(State(daemon): Shared) -> StatusCode {
    daemon.stop();
    StatusCode::ACCEPTED
}

/// Hand everything to a successor, and end
///
/// Guests stay connected. The answer comes when the successor serves them; after a failure the
/// daemon goes on as before.
#[utoipa::path(post, path = "/v1/handover", tag = "daemon", request_body = HandOver,
    responses((status = 200, body = HandedOver), (status = "default", body = FailureBody)))]
pub async fn hand_over(
    State(daemon): Shared,
    Asked(request): Asked<HandOver>,
) -> Answer<Json<HandedOver>> {
    let hand_over = move |d: &Arc<Daemon>| {
        // Who goes on after all takes up what was stopped for it.
        d.hand_over(&request).inspect_err(|_| d.go_on_in_background())
    };
    Ok(Json(blocking(&daemon, hand_over).await?))
}

/// The jobs, oldest first; those that ended are kept for a while
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", responses((status = 200, body = Vec<Job>)))]
pub async fn jobs(State(daemon): Shared) -> Json<Vec<Job>> {
    Json(daemon.jobs().list())
}

/// A job
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs",
    params(("id" = u64, Path, description = "The job"), WaitParams),
    responses((status = 200, body = Job), (status = "default", body = FailureBody)))]
pub async fn job(
    State(daemon): Shared,
    Named(id): Named<u64>,
    Params(wait): Params<WaitParams>,
) -> Answer<Json<Job>> {
    let entry = daemon.jobs().get(id)?;
    Ok(jobs::described(&entry, wait).await)
}

/// Ask a job to stop; one that has ended stays as it is
#[utoipa::path(delete, path = "/v1/jobs/{id}", tag = "jobs",
    params(("id" = u64, Path, description = "The job")),
    responses((status = 200, body = Job), (status = "default", body = FailureBody)))]
pub async fn cancel(State(daemon): Shared, Named(id): Named<u64>) -> Answer<Json<Job>> {
    let entry = daemon.jobs().get(id)?;
    entry.cancel();
    Ok(Json(entry.describe()))
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
