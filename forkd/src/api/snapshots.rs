//! Routes about snapshots, and the jobs that take and restore them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use blockd::api::jobs::{WaitParams, Waiting, described, run};
use blockd::api::reply::{Answer, Asked, Named, Params, blocking};
use blockd::api::types::{FailureBody, Job, JobKind};

use super::types::{RemoveSnapshot, RemovedSnapshot, RestoreVm, SnapshotTaken, TakeSnapshot, Vm};
use crate::daemon::Daemon;

type Shared = State<Arc<Daemon>>;

/// Write a machine to files
///
/// Memory, processors, devices and disks are of one instant; the machine goes on. The folder is
/// made by the daemon, for its own user only, and is there whole or not at all. The disks stay in
/// blockd's store, sealed, under names that the answer tells.
#[utoipa::path(post, path = "/v1/vms/{name}/snapshot", tag = "snapshots",
    request_body = TakeSnapshot,
    params(("name" = String, Path, description = "Name of the machine"), Waiting),
    responses((status = 200, body = SnapshotTaken), (status = 202, body = Job),
        (status = "default", body = FailureBody)))]
pub async fn take(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(waiting): Params<Waiting>,
    Asked(request): Asked<TakeSnapshot>,
) -> Answer {
    let job = daemon.jobs().start(JobKind::Snapshot, &format!("vm {name}"), None);
    run(job, waiting, move |job| daemon.snapshot(&name, &request, job)).await
}

/// Make a machine of a snapshot
///
/// It is another machine than the one of the snapshot: another name, identity, generation, network
/// address and random numbers, and disks of its own that stand on those of the snapshot.
#[utoipa::path(post, path = "/v1/snapshots/restore", tag = "snapshots", request_body = RestoreVm,
    params(Waiting),
    responses((status = 200, body = Vm), (status = 202, body = Job),
        (status = "default", body = FailureBody)))]
pub async fn restore(
    State(daemon): Shared,
    Params(waiting): Params<Waiting>,
    Asked(request): Asked<RestoreVm>,
) -> Answer {
    let job = daemon.jobs().start(JobKind::Restore, &format!("vm {}", request.name), None);
    run(job, waiting, move |job| daemon.restore(&request, job)).await
}

/// Remove a snapshot, and the disks that were made for it
#[utoipa::path(post, path = "/v1/snapshots/remove", tag = "snapshots",
    request_body = RemoveSnapshot,
    responses((status = 200, body = RemovedSnapshot), (status = "default", body = FailureBody)))]
pub async fn remove(
    State(daemon): Shared,
    Asked(request): Asked<RemoveSnapshot>,
) -> Answer<Json<RemovedSnapshot>> {
    Ok(Json(blocking(&daemon, move |d| d.remove_snapshot(&request.path)).await?))
}

/// Snapshots that are taken or restored, oldest first; those that ended are kept for a while
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
    Ok(described(&entry, wait).await)
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
