//! Routes about disks in service.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse as _;

use super::reply::{Answer, Asked, Named, blocking};
use super::types::{AttachDisk, DetachDisk, DiskStats, Export, FailureBody};
use crate::daemon::Daemon;
use crate::serve::Limits;

type Shared = State<Arc<Daemon>>;

/// Where disks are served
#[utoipa::path(get, path = "/v1/exports", tag = "service",
    responses((status = 200, body = Vec<Export>), (status = "default", body = FailureBody)))]
pub async fn list(State(daemon): Shared) -> Answer<Json<Vec<Export>>> {
    Ok(Json(blocking(&daemon, |d| Ok(d.exports())).await?))
}

/// What disks in service did since they were taken into it
#[utoipa::path(get, path = "/v1/stats", tag = "service",
    responses((status = 200, body = Vec<DiskStats>), (status = "default", body = FailureBody)))]
pub async fn stats(State(daemon): Shared) -> Answer<Json<Vec<DiskStats>>> {
    Ok(Json(blocking(&daemon, |d| Ok(d.stats())).await?))
}

/// Serve a disk on a socket
///
/// It is remembered: a daemon that starts serves it again.
#[utoipa::path(post, path = "/v1/disks/{name}/attach", tag = "service", request_body = AttachDisk,
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 201, body = Export), (status = "default", body = FailureBody)))]
pub async fn attach(
    State(daemon): Shared,
    Named(name): Named<String>,
    Asked(request): Asked<AttachDisk>,
) -> Answer {
    let export = blocking(&daemon, move |d| d.attach(&name, &request)).await?;
    Ok((StatusCode::CREATED, Json(export)).into_response())
}

/// End exports of a disk; with the last one the disk is taken out of service
#[utoipa::path(post, path = "/v1/disks/{name}/detach", tag = "service", request_body = DetachDisk,
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = Vec<Export>), (status = "default", body = FailureBody)))]
pub async fn detach(
    State(daemon): Shared,
    Named(name): Named<String>,
    Asked(request): Asked<DetachDisk>,
) -> Answer<Json<Vec<Export>>> {
    Ok(Json(blocking(&daemon, move |d| d.detach(&name, &request)).await?))
}

/// Change what a disk in service may do at most
#[utoipa::path(put, path = "/v1/disks/{name}/limits", tag = "service", request_body = Limits,
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = Limits), (status = "default", body = FailureBody)))]
pub async fn limit(
    State(daemon): Shared,
    Named(name): Named<String>,
    Asked(limits): Asked<Limits>,
) -> Answer<Json<Limits>> {
    Ok(Json(blocking(&daemon, move |d| d.set_limits(&name, limits)).await?))
}

/// Have held requests of a disk in service tried again now
#[utoipa::path(post, path = "/v1/disks/{name}/resume", tag = "service",
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 204), (status = "default", body = FailureBody)))]
pub async fn resume(State(daemon): Shared, Named(name): Named<String>) -> Answer<StatusCode> {
    blocking(&daemon, move |d| d.resume(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}
