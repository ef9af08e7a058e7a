//! Routes about the depth of disks.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::disks::as_job;
use super::jobs::Waiting;
use super::reply::{Answer, Asked, Named, Params, blocking};
use super::types::{Disk, FailureBody, FlattenDisk, Flattened, Job, JobKind, SetFlattenPolicy};
use crate::daemon::Daemon;

type Shared = State<Arc<Daemon>>;

/// Flatten a disk in place, in service or not
#[utoipa::path(post, path = "/v1/disks/{name}/flatten", tag = "disks", request_body = FlattenDisk,
    params(("name" = String, Path, description = "Name of the disk"), Waiting),
    responses((status = 200, body = Flattened), (status = 202, body = Job),
        (status = "default", body = FailureBody)))]
pub async fn flatten(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(waiting): Params<Waiting>,
    Asked(request): Asked<FlattenDisk>,
) -> Answer {
    let what = (JobKind::Flatten, format!("disk {name}"));
    as_job(daemon, what, waiting, move |d, job| d.flatten(&name, &request, job)).await
}

/// Set when the daemon flattens a disk by itself
#[utoipa::path(put, path = "/v1/disks/{name}/flatten-policy", tag = "disks",
    request_body = SetFlattenPolicy,
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = Disk), (status = "default", body = FailureBody)))]
pub async fn disk_policy(
    State(daemon): Shared,
    Named(name): Named<String>,
    Asked(request): Asked<SetFlattenPolicy>,
) -> Answer<Json<Disk>> {
    Ok(Json(blocking(&daemon, move |d| d.set_disk_policy(&name, &request)).await?))
}

/// When the daemon flattens disks by itself that say nothing of their own
#[utoipa::path(get, path = "/v1/store/flatten-policy", tag = "store",
    responses((status = 200, body = SetFlattenPolicy), (status = "default", body = FailureBody)))]
pub async fn policy(State(daemon): Shared) -> Answer<Json<SetFlattenPolicy>> {
    Ok(Json(blocking(&daemon, |d| d.store_policy()).await?))
}

/// Set when the daemon flattens disks by itself that say nothing of their own
#[utoipa::path(put, path = "/v1/store/flatten-policy", tag = "store",
    request_body = SetFlattenPolicy,
    responses((status = 200, body = SetFlattenPolicy), (status = "default", body = FailureBody)))]
pub async fn store_policy(
    State(daemon): Shared,
    Asked(request): Asked<SetFlattenPolicy>,
) -> Answer<Json<SetFlattenPolicy>> {
    Ok(Json(blocking(&daemon, move |d| d.set_store_policy(&request)).await?))
}
