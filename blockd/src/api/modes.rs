//! Routes about persistence modes.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::reply::{Answer, Asked, Named, blocking};
use super::types::{Disk, FailureBody, LostTail, SetMode};
use crate::daemon::Daemon;

type Shared = State<Arc<Daemon>>;

/// Say what becomes of what is written to a disk
#[utoipa::path(post, path = "/v1/disks/{name}/mode", tag = "disks", request_body = SetMode,
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = Disk), (status = "default", body = FailureBody)))]
pub async fn set(
    State(daemon): Shared,
    Named(name): Named<String>,
    Asked(request): Asked<SetMode>,
) -> Answer<Json<Disk>> {
    let shared = Arc::clone(&daemon);
    Ok(Json(blocking(&daemon, move |_| shared.set_mode(&name, &request)).await?))
}

/// Keep what was written to a disk: an undo goes back to here from now on
#[utoipa::path(post, path = "/v1/disks/{name}/commit", tag = "disks", request_body = LostTail,
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = Disk), (status = "default", body = FailureBody)))]
pub async fn commit(
    State(daemon): Shared,
    Named(name): Named<String>,
    Asked(tail): Asked<LostTail>,
) -> Answer<Json<Disk>> {
    let shared = Arc::clone(&daemon);
    Ok(Json(blocking(&daemon, move |_| shared.commit(&name, tail.accept_lost_tail)).await?))
}

/// Drop what was written to a disk since it was committed
#[utoipa::path(post, path = "/v1/disks/{name}/undo", tag = "disks",
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = Disk), (status = "default", body = FailureBody)))]
pub async fn undo(State(daemon): Shared, Named(name): Named<String>) -> Answer<Json<Disk>> {
    Ok(Json(blocking(&daemon, move |d| d.undo(&name)).await?))
}
