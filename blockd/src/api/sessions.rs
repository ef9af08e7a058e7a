//! Routes about sessions: disks that are held open for one client.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use format::units::index;
use format::{Error, Result};
use serde::Deserialize;
use utoipa::IntoParams;

use super::DATA_MAX;
use super::reply::{Answer, Asked, Named, Params, blocking, whole};
use super::server::Client;
use super::types::{ByteRange, Disk, Extent, FailureBody, OpenSession, Session, Stored};
use crate::daemon::Daemon;
use crate::store::buf::AlignedBuf;

type Shared = State<Arc<Daemon>>;

/// Hold a disk open
///
/// The session belongs to this connection and ends with it at the latest: an import that was not
/// finished leaves nothing. Its requests may come on any connection.
#[utoipa::path(post, path = "/v1/sessions", tag = "sessions", request_body = OpenSession,
    responses((status = 201, body = Session), (status = "default", body = FailureBody)))]
pub async fn open(
    State(daemon): Shared,
    Extension(client): Extension<Client>,
    Asked(request): Asked<OpenSession>,
) -> Answer {
    // Goes with this request, and the sessions of a connection end after its requests went. One
    // that is opened for a client that is gone by then is nobody's, and would stay for ever.
    let asking = Arc::new(());
    let asked = Arc::downgrade(&asking);
    let open = move |d: &Arc<Daemon>| {
        let opened = d.open_session(client.0, &request)?;
        if asked.strong_count() == 0 {
            // One that ended meanwhile is what is wanted.
            let _ = d.drop_session(opened.value.id);
        }
        Ok(opened)
    };
    let opened = blocking(&daemon, open).await?;
    drop(asking);
    Ok((StatusCode::CREATED, opened).into_response())
}

/// A part of a disk. Bytes.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct RangeParams {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

/// Where bytes go.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct OffsetParams {
    /// First byte.
    pub offset: u64,
}

/// What a part of the disk holds, in order and without gaps; perhaps not up to its end
#[utoipa::path(get, path = "/v1/sessions/{id}/extents", tag = "sessions",
    params(("id" = u64, Path, description = "The session"), RangeParams),
    responses((status = 200, body = Vec<Extent>), (status = "default", body = FailureBody)))]
pub async fn extents(
    State(daemon): Shared,
    Named(id): Named<u64>,
    Params(range): Params<RangeParams>,
) -> Answer<Json<Vec<Extent>>> {
    let end = range.offset.saturating_add(range.length);
    let found = blocking(&daemon, move |d| d.session(id)?.extents(range.offset, end)).await?;
    Ok(Json(found))
}

/// Bytes as an answer.
pub fn octets(bytes: Bytes) -> Response {
    let mut response = bytes.into_response();
    let value = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(CONTENT_TYPE, value);
    response
}

fn check_length(length: u64) -> Result<usize> {
    match usize::try_from(length) {
        Ok(length) if length <= DATA_MAX => Ok(length),
        _ => Err(Error::invalid(format!("{length} bytes are more than {DATA_MAX}"))
            .tried("read")
            .on("the parameters of the request")),
    }
}

/// Read a part of the disk: offset and length are multiples of 512, 8 MiB at most
#[utoipa::path(get, path = "/v1/sessions/{id}/data", tag = "sessions",
    params(("id" = u64, Path, description = "The session"), RangeParams),
    responses((status = 200, body = [u8], content_type = "application/octet-stream"),
        (status = "default", body = FailureBody)))]
pub async fn read(
    State(daemon): Shared,
    Named(id): Named<u64>,
    Params(range): Params<RangeParams>,
) -> Answer {
    let length = check_length(range.length)?;
    let bytes = blocking(&daemon, move |d| {
        let mut buf = AlignedBuf::zeroed(length);
        d.session(id)?.read(range.offset, &mut buf)?;
        Ok(Bytes::from_owner(buf))
    });
    Ok(octets(bytes.await?))
}

/// Store bytes, 8 MiB at most
///
/// In an import, the offset is a multiple of 4 KiB, and whole blocks of zeroes are not stored.
#[utoipa::path(put, path = "/v1/sessions/{id}/data", tag = "sessions",
    params(("id" = u64, Path, description = "The session"), OffsetParams),
    request_body(content = [u8], content_type = "application/octet-stream"),
    responses((status = 200, body = Stored), (status = "default", body = FailureBody)))]
pub async fn write(
    State(daemon): Shared,
    Named(id): Named<u64>,
    Params(to): Params<OffsetParams>,
    request: Request,
) -> Answer<Json<Stored>> {
    let bytes = whole(request, DATA_MAX).await?;
    let stored = blocking(&daemon, move |d| d.session(id)?.write(to.offset, &bytes)).await?;
    Ok(Json(Stored { stored }))
}

/// Make ranges read as zeroes
#[utoipa::path(post, path = "/v1/sessions/{id}/zeroes", tag = "sessions",
    params(("id" = u64, Path, description = "The session")), request_body = Vec<ByteRange>,
    responses((status = 204), (status = "default", body = FailureBody)))]
pub async fn zeroes(
    State(daemon): Shared,
    Named(id): Named<u64>,
    Asked(ranges): Asked<Vec<ByteRange>>,
) -> Answer<StatusCode> {
    blocking(&daemon, move |d| d.session(id)?.zero(&ranges)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// End a session in order
///
/// What was written is durable, a disk that was filled is there; the answer is that disk, or null.
#[utoipa::path(post, path = "/v1/sessions/{id}/finish", tag = "sessions",
    params(("id" = u64, Path, description = "The session")),
    responses((status = 200, body = Option<Disk>), (status = "default", body = FailureBody)))]
pub async fn finish(State(daemon): Shared, Named(id): Named<u64>) -> Answer<Json<Option<Disk>>> {
    Ok(Json(blocking(&daemon, move |d| d.finish_session(id)).await?))
}

/// Give a session up
#[utoipa::path(delete, path = "/v1/sessions/{id}", tag = "sessions",
    params(("id" = u64, Path, description = "The session")),
    responses((status = 204), (status = "default", body = FailureBody)))]
pub async fn abandon(State(daemon): Shared, Named(id): Named<u64>) -> Answer<StatusCode> {
    blocking(&daemon, move |d| d.drop_session(id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A piece of a buffer that is not needed any further.
pub fn piece(buf: AlignedBuf, from: u64, to: u64) -> Bytes {
    Bytes::from_owner(buf).slice(index(from)..index(to))
}
