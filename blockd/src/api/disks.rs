//! Routes about disks as a whole.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use format::Result;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;
use uuid::Uuid;

use super::jobs::{Waiting, run};
use super::reply::{Answer, Asked, Named, Params, blocking};
use super::types::{
    ByteRange, CheckDisk, Checked, Compare, Compared, CreateDisk, CutFork, CutForks, Df, Digested,
    Disk, DiskDetails, FailureBody, ForkAnswer, ForkDisks, ForkMode, ForkedDisks, Job, JobKind,
    JobOrCut, LostTail, ReleasedFork, RemovedDisk, RenameDisk, RepairDisk, Repaired, ResizeDisk,
    Scrubbed,
};
use crate::daemon::{Daemon, Noted, Running};
use crate::verbs;

type Shared = State<Arc<Daemon>>;

/// Whether a disk may be opened although completed writes of a live session are missing.
#[derive(Debug, Clone, Copy, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct TailParams {
    /// Open it, and lose them.
    pub accept_lost_tail: bool,
}

/// Runs long work as a job, and waits for its end unless the client does not want to.
pub(super) async fn as_job<T: Serialize>(
    daemon: Arc<Daemon>,
    (kind, object): (JobKind, String),
    waiting: Waiting,
    work: impl FnOnce(&Daemon, &Running) -> Result<T> + Send + 'static,
) -> Answer {
    let running = daemon.jobs().start(kind, &object, None);
    run(running, waiting, move |job| work(&daemon, job)).await
}

/// The space that the store takes and has left
#[utoipa::path(get, path = "/v1/store", tag = "store",
    responses((status = 200, body = Df), (status = "default", body = FailureBody)))]
pub async fn df(State(daemon): Shared) -> Answer<Json<Df>> {
    Ok(Json(blocking(&daemon, |d| d.df()).await?))
}

/// The disks
#[utoipa::path(get, path = "/v1/disks", tag = "disks",
    responses((status = 200, body = Vec<Disk>), (status = "default", body = FailureBody)))]
pub async fn list(State(daemon): Shared) -> Answer<Json<Vec<Disk>>> {
    Ok(Json(blocking(&daemon, |d| d.list()).await?))
}

/// Create an empty disk, or one that stands on a sealed disk
#[utoipa::path(post, path = "/v1/disks", tag = "disks", request_body = CreateDisk,
    responses((status = 201, body = Disk), (status = "default", body = FailureBody)))]
pub async fn create(State(daemon): Shared, Asked(new): Asked<CreateDisk>) -> Answer {
    let disk = blocking(&daemon, move |d| d.create(&new)).await?;
    Ok((StatusCode::CREATED, Json(disk)).into_response())
}

/// Everything about a disk
#[utoipa::path(get, path = "/v1/disks/{name}", tag = "disks",
    params(("name" = String, Path, description = "Name of the disk"), TailParams),
    responses((status = 200, body = DiskDetails), (status = "default", body = FailureBody)))]
pub async fn show(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(tail): Params<TailParams>,
) -> Answer<Noted<DiskDetails>> {
    blocking(&daemon, move |d| d.show(&name, tail.accept_lost_tail)).await
}

/// Remove a disk and give its space back
#[utoipa::path(delete, path = "/v1/disks/{name}", tag = "disks",
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = RemovedDisk), (status = "default", body = FailureBody)))]
pub async fn remove(
    State(daemon): Shared,
    Named(name): Named<String>,
) -> Answer<Json<RemovedDisk>> {
    Ok(Json(blocking(&daemon, move |d| d.remove(&name)).await?))
}

/// Fork disks at one instant: they go on, and children start out with what they hold
///
/// Making children that inherit (`mode`) may take a while, and is a job; any other fork ends before
/// it is answered, unless the answer is to come at the cut, or when all is ready for it (`return`):
/// then it is durable, and the children are there, when `GET` with the token is answered.
#[utoipa::path(post, path = "/v1/forks", tag = "disks", request_body = ForkDisks,
    params(Waiting),
    responses((status = 201, body = ForkedDisks), (status = 202, body = JobOrCut),
        (status = "default", body = FailureBody)))]
pub async fn fork(
    State(daemon): Shared,
    Params(waiting): Params<Waiting>,
    Asked(request): Asked<ForkDisks>,
) -> Answer {
    let shared = Arc::clone(&daemon);
    if request.mode == ForkMode::Live && request.answer != ForkAnswer::Durable {
        let cut = daemon.fork_soon(request).await?;
        return Ok((StatusCode::ACCEPTED, Json(cut)).into_response());
    }
    if request.mode == ForkMode::Live {
        let forked = blocking(&daemon, move |_| shared.fork(&request)).await?;
        return Ok((StatusCode::CREATED, Json(forked)).into_response());
    }
    let what = (JobKind::Fork, verbs::named(&request));
    let work = move |_: &Daemon, job: &Running| shared.inherit(&request, job);
    let mut answer = as_job(daemon, what, waiting, work).await?;
    if answer.status() == StatusCode::OK {
        *answer.status_mut() = StatusCode::CREATED;
    }
    Ok(answer)
}

/// Say that the instant of a fork that is ready is now
#[utoipa::path(post, path = "/v1/forks/{token}/cut", tag = "disks", request_body = CutFork,
    params(("token" = Uuid, Path, description = "What the fork was answered with")),
    responses((status = 200, body = CutForks), (status = "default", body = FailureBody)))]
pub async fn cut(
    State(daemon): Shared,
    Named(token): Named<Uuid>,
    Asked(request): Asked<CutFork>,
) -> Answer<Json<CutForks>> {
    Ok(Json(daemon.cut_now(token, request).await?))
}

/// Give up a fork that is ready, and whose instant has not come
#[utoipa::path(delete, path = "/v1/forks/{token}", tag = "disks",
    params(("token" = Uuid, Path, description = "What the fork was answered with")),
    responses((status = 204), (status = "default", body = FailureBody)))]
pub async fn give_up_fork(State(daemon): Shared, Named(token): Named<Uuid>) -> Answer<StatusCode> {
    daemon.give_up_fork(token)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Wait until a fork that was answered at its cut is durable, and its children are there
#[utoipa::path(get, path = "/v1/forks/{token}", tag = "disks",
    params(("token" = Uuid, Path, description = "What the fork was answered with")),
    responses((status = 200, body = ForkedDisks), (status = "default", body = FailureBody)))]
pub async fn forked(State(daemon): Shared, Named(token): Named<Uuid>) -> Answer<Json<ForkedDisks>> {
    Ok(Json(daemon.forked(token).await?))
}

/// Let disks go on that are held at the instant of a fork
#[utoipa::path(post, path = "/v1/forks/{token}/release", tag = "disks",
    params(("token" = Uuid, Path, description = "What the fork was answered with")),
    responses((status = 200, body = ReleasedFork), (status = "default", body = FailureBody)))]
pub async fn release(
    State(daemon): Shared,
    Named(token): Named<Uuid>,
) -> Answer<Json<ReleasedFork>> {
    Ok(Json(blocking(&daemon, move |d| d.release(token)).await?))
}

/// Give a disk another name
#[utoipa::path(post, path = "/v1/disks/{name}/rename", tag = "disks", request_body = RenameDisk,
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = Disk), (status = "default", body = FailureBody)))]
pub async fn rename(
    State(daemon): Shared,
    Named(name): Named<String>,
    Asked(request): Asked<RenameDisk>,
) -> Answer<Json<Disk>> {
    Ok(Json(blocking(&daemon, move |d| d.rename(&name, &request)).await?))
}

/// Change the size of a disk
#[utoipa::path(post, path = "/v1/disks/{name}/resize", tag = "disks", request_body = ResizeDisk,
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = Disk), (status = "default", body = FailureBody)))]
pub async fn resize(
    State(daemon): Shared,
    Named(name): Named<String>,
    Asked(request): Asked<ResizeDisk>,
) -> Answer<Json<Disk>> {
    Ok(Json(blocking(&daemon, move |d| d.resize(&name, &request)).await?))
}

/// Make a disk immutable, so that others can stand on it
#[utoipa::path(post, path = "/v1/disks/{name}/seal", tag = "disks", request_body = LostTail,
    params(("name" = String, Path, description = "Name of the disk"), Waiting),
    responses((status = 200, body = Disk), (status = 202, body = Job),
        (status = "default", body = FailureBody)))]
pub async fn seal(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(waiting): Params<Waiting>,
    Asked(tail): Asked<LostTail>,
) -> Answer {
    let what = (JobKind::Seal, format!("disk {name}"));
    as_job(daemon, what, waiting, move |d, job| d.seal(&name, tail.accept_lost_tail, job)).await
}

/// Check the structure of a disk
#[utoipa::path(post, path = "/v1/disks/{name}/check", tag = "disks", request_body = CheckDisk,
    params(("name" = String, Path, description = "Name of the disk"), Waiting),
    responses((status = 200, body = Checked), (status = 202, body = Job),
        (status = "default", body = FailureBody)))]
pub async fn check(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(waiting): Params<Waiting>,
    Asked(request): Asked<CheckDisk>,
) -> Answer {
    let what = (JobKind::Check, format!("disk {name}"));
    as_job(daemon, what, waiting, move |d, job| d.check(&name, request, job)).await
}

/// Repair a disk
#[utoipa::path(post, path = "/v1/disks/{name}/repair", tag = "disks", request_body = RepairDisk,
    params(("name" = String, Path, description = "Name of the disk"), Waiting),
    responses((status = 200, body = Repaired), (status = 202, body = Job),
        (status = "default", body = FailureBody)))]
pub async fn repair(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(waiting): Params<Waiting>,
    Asked(request): Asked<RepairDisk>,
) -> Answer {
    let what = (JobKind::Repair, format!("disk {name}"));
    as_job(daemon, what, waiting, move |d, _| d.repair(&name, request)).await
}

/// Compare the sealed data of a disk with its checksums
#[utoipa::path(post, path = "/v1/disks/{name}/scrub", tag = "disks",
    params(("name" = String, Path, description = "Name of the disk"), Waiting),
    responses((status = 200, body = Scrubbed), (status = 202, body = Job),
        (status = "default", body = FailureBody)))]
pub async fn scrub(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(waiting): Params<Waiting>,
) -> Answer {
    let what = (JobKind::Scrub, format!("disk {name}"));
    as_job(daemon, what, waiting, move |d, job| d.scrub(&name, job)).await
}

/// The digest of a sealed disk's content
///
/// It does not depend on where and how the content is stored, nor on the store.
#[utoipa::path(post, path = "/v1/disks/{name}/digest", tag = "disks",
    params(("name" = String, Path, description = "Name of the disk"), Waiting),
    responses((status = 200, body = Digested), (status = 202, body = Job),
        (status = "default", body = FailureBody)))]
pub async fn digest(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(waiting): Params<Waiting>,
) -> Answer {
    let what = (JobKind::Digest, format!("disk {name}"));
    as_job(daemon, what, waiting, move |d, job| d.digest(&name, job)).await
}

/// Compare the contents of two disks
#[utoipa::path(post, path = "/v1/compare", tag = "disks", request_body = Compare, params(Waiting),
    responses((status = 200, body = Compared), (status = 202, body = Job),
        (status = "default", body = FailureBody)))]
pub async fn compare(
    State(daemon): Shared,
    Params(waiting): Params<Waiting>,
    Asked(request): Asked<Compare>,
) -> Answer {
    let what = (JobKind::Compare, format!("disks {} and {}", request.a, request.b));
    as_job(daemon, what, waiting, move |d, job| d.compare(&request, job)).await
}

/// Two disks.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DiffParams {
    /// Name of the disk.
    pub disk: String,
    /// Name of the disk that it is compared with.
    pub from: String,
    /// Go on although completed writes of a live session are missing.
    #[serde(default)]
    pub accept_lost_tail: bool,
}

/// The ranges of a disk that may differ from another disk, by their maps
#[utoipa::path(get, path = "/v1/diff", tag = "disks", params(DiffParams),
    responses((status = 200, body = Vec<ByteRange>), (status = "default", body = FailureBody)))]
pub async fn diff(
    State(daemon): Shared,
    Params(p): Params<DiffParams>,
) -> Answer<Noted<Vec<ByteRange>>> {
    blocking(&daemon, move |d| d.diff(&p.disk, &p.from, p.accept_lost_tail)).await
}
