//! Routes about machines.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use blockd::api::reply::{Answer, Asked, Named, Params, blocking};
use blockd::api::types::FailureBody;

use super::types::{ForkVm, ForkedVms, RemoveVm, RemovedVm, RunVm, Vm, VmStats};
use crate::daemon::Daemon;

type Shared = State<Arc<Daemon>>;

/// The machines, by name; those that ended are there until they are removed
#[utoipa::path(get, path = "/v1/vms", tag = "vms",
    responses((status = 200, body = Vec<Vm>), (status = "default", body = FailureBody)))]
pub async fn list(State(daemon): Shared) -> Answer<Json<Vec<Vm>>> {
    Ok(Json(blocking(&daemon, |d| Ok(d.list())).await?))
}

/// Boot a machine
///
/// The answer comes when it runs; what it boots takes its time after that.
#[utoipa::path(post, path = "/v1/vms", tag = "vms", request_body = RunVm,
    responses((status = 201, body = Vm), (status = "default", body = FailureBody)))]
pub async fn run(
    State(daemon): Shared,
    Asked(request): Asked<RunVm>,
) -> Answer<(StatusCode, Json<Vm>)> {
    let vm = blocking(&daemon, move |d| d.run(&request)).await?;
    Ok((StatusCode::CREATED, Json(vm)))
}

/// Everything about a machine
#[utoipa::path(get, path = "/v1/vms/{name}", tag = "vms",
    params(("name" = String, Path, description = "Name of the machine")),
    responses((status = 200, body = Vm), (status = "default", body = FailureBody)))]
pub async fn show(State(daemon): Shared, Named(name): Named<String>) -> Answer<Json<Vm>> {
    Ok(Json(blocking(&daemon, move |d| d.show(&name)).await?))
}

/// Remove a machine that has ended, and the disks that were made for it
#[utoipa::path(delete, path = "/v1/vms/{name}", tag = "vms",
    params(("name" = String, Path, description = "Name of the machine"), RemoveVm),
    responses((status = 200, body = RemovedVm), (status = "default", body = FailureBody)))]
pub async fn remove(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(how): Params<RemoveVm>,
) -> Answer<Json<RemovedVm>> {
    Ok(Json(blocking(&daemon, move |d| d.rm(&name, how)).await?))
}

/// Stop a machine between two instructions, with none of its requests under way
#[utoipa::path(post, path = "/v1/vms/{name}/pause", tag = "vms",
    params(("name" = String, Path, description = "Name of the machine")),
    responses((status = 200, body = Vm), (status = "default", body = FailureBody)))]
pub async fn pause(State(daemon): Shared, Named(name): Named<String>) -> Answer<Json<Vm>> {
    Ok(Json(blocking(&daemon, move |d| d.pause(&name)).await?))
}

/// Let a machine go on
#[utoipa::path(post, path = "/v1/vms/{name}/resume", tag = "vms",
    params(("name" = String, Path, description = "Name of the machine")),
    responses((status = 200, body = Vm), (status = "default", body = FailureBody)))]
pub async fn resume(State(daemon): Shared, Named(name): Named<String>) -> Answer<Json<Vm>> {
    Ok(Json(blocking(&daemon, move |d| d.resume(&name)).await?))
}

/// End a machine as if its power was cut
///
/// What it wrote and flushed is on its disks, which blockd no longer serves when the answer comes.
#[utoipa::path(post, path = "/v1/vms/{name}/stop", tag = "vms",
    params(("name" = String, Path, description = "Name of the machine")),
    responses((status = 200, body = Vm), (status = "default", body = FailureBody)))]
pub async fn stop(State(daemon): Shared, Named(name): Named<String>) -> Answer<Json<Vm>> {
    Ok(Json(blocking(&daemon, move |d| d.end(&name)).await?))
}

/// Make children of a machine
///
/// Each starts out with the memory, processors, devices and disks that the machine has at one
/// instant, and is another machine from its first instruction on: another name, identity,
/// generation, network address and random numbers. The machine goes on. There are all of the
/// children or none.
#[utoipa::path(post, path = "/v1/vms/{name}/fork", tag = "vms", request_body = ForkVm,
    params(("name" = String, Path, description = "Name of the machine")),
    responses((status = 201, body = ForkedVms), (status = "default", body = FailureBody)))]
pub async fn fork(
    State(daemon): Shared,
    Named(name): Named<String>,
    Asked(request): Asked<ForkVm>,
) -> Answer<(StatusCode, Json<ForkedVms>)> {
    let forked = blocking(&daemon, move |d| d.fork(&name, &request)).await?;
    Ok((StatusCode::CREATED, Json(forked)))
}

/// What machines use of the host
#[utoipa::path(get, path = "/v1/stats", tag = "vms",
    responses((status = 200, body = Vec<VmStats>), (status = "default", body = FailureBody)))]
pub async fn stats(State(daemon): Shared) -> Answer<Json<Vec<VmStats>>> {
    Ok(Json(blocking(&daemon, |d| Ok(d.stats())).await?))
}
