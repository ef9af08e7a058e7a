//! Routes about machines.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use blockd::api::reply::{Answer, Asked, Named, Params, blocking};
use blockd::api::types::FailureBody;

use super::types::{ForkVm, ForkedVms, RemoveVm, RemovedVm, RunVm, StopVm, Vm, VmStats};
use crate::daemon::Daemon;

type Shared = State<Arc<Daemon>>;

/// Most time that a guest is given to turn itself off.
const STOP_MAX: Duration = Duration::from_secs(3600);
/// Time between two looks at whether it has.
const STOP_LOOK: Duration = Duration::from_millis(20);

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

/// End a machine
///
/// Its power button is pressed, if its guest listens to that, and the guest has some time to turn
/// itself off (`power-off` is then how it ended). A guest that does not listen or takes too long
/// has its power cut (`stopped`): what it wrote and flushed is on its disks. blockd no longer
/// serves them when the answer comes. When the client goes away meanwhile, the guest was asked, and
/// no more is done.
#[utoipa::path(post, path = "/v1/vms/{name}/stop", tag = "vms",
    params(("name" = String, Path, description = "Name of the machine"), StopVm),
    responses((status = 200, body = Vm), (status = "default", body = FailureBody)))]
pub async fn stop(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(how): Params<StopVm>,
) -> Answer<Json<Vm>> {
    let until = Instant::now() + Duration::from_millis(how.timeout_ms).min(STOP_MAX);
    let asked = name.clone();
    let mut waits = !how.force && blocking(&daemon, move |d| d.press_power_button(&asked)).await?;
    // Without a thread that waits: many machines may be stopped at once.
    while waits && Instant::now() < until {
        tokio::time::sleep(STOP_LOOK).await;
        waits = !daemon.has_ended(&name)?;
    }
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
