//! Answers and requests as handlers see them.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::HeaderValue;
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use format::{Error, Kind, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::NOTE;
use super::types::{Failure, FailureBody};
use crate::daemon::Noted;

/// Bytes of a request that is JSON, at most.
const JSON_MAX: usize = 1 << 20;

/// A failure as an answer.
pub struct Refused(pub Error);

impl From<Error> for Refused {
    fn from(e: Error) -> Self {
        Refused(e)
    }
}

/// What handlers give back.
pub type Answer<T = Response> = std::result::Result<T, Refused>;

/// The status of a kind of failure.
fn status(kind: Kind) -> StatusCode {
    match kind {
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::ReadOnly => StatusCode::FORBIDDEN,
        Kind::Exists
        | Kind::Busy
        | Kind::InUse
        | Kind::Cancelled
        | Kind::TailLost
        | Kind::ParentMissing
        | Kind::ParentChanged => StatusCode::CONFLICT,
        Kind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        Kind::NoMemory | Kind::Unreachable => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        Kind::Io | Kind::Corrupt | Kind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The answer to a failure that came over the wire, or is going to.
pub fn failure(kind: Kind, failure: Failure) -> Response {
    (status(kind), Json(FailureBody { error: failure })).into_response()
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        failure(self.0.kind(), Failure::from(&self.0))
    }
}

/// A note as a header. Headers have no control characters.
pub fn note_header(note: &str) -> Option<HeaderValue> {
    let line: String = note.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    HeaderValue::from_bytes(line.as_bytes()).ok()
}

impl<T: Serialize> IntoResponse for Noted<T> {
    fn into_response(self) -> Response {
        let mut response = Json(self.value).into_response();
        self.notes.iter().filter_map(|n| note_header(n)).for_each(|value| {
            response.headers_mut().append(NOTE, value);
        });
        response
    }
}

/// Runs what may take time on a thread of its own.
///
/// # Errors
/// What `work` reports; `Failed` when it panics, which is a bug.
pub async fn blocking<D: Send + Sync + 'static, T: Send + 'static>(
    daemon: &Arc<D>,
    work: impl FnOnce(&Arc<D>) -> Result<T> + Send + 'static,
) -> Answer<T> {
    let daemon = Arc::clone(daemon);
    let done = tokio::task::spawn_blocking(move || work(&daemon)).await;
    let done = done.unwrap_or_else(|e| {
        tracing::error!(error = %e, "a request ended in a panic");
        Err(Error::new(Kind::Failed, "internal error of the daemon").hint("please report it"))
    });
    done.map_err(Refused)
}

/// A request that is JSON; an empty one stands for the default, where there is one.
pub struct Asked<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Asked<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, _: &S) -> Answer<Self> {
        let bytes = whole(request, JSON_MAX).await?;
        let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        let parsed = serde_json::from_slice(bytes);
        let parsed = parsed.map_err(|e| Error::invalid("it is not what is expected").caused_by(e));
        Ok(Asked(parsed.map_err(|e| e.tried("read").on("the body of the request"))?))
    }
}

/// All of a body.
///
/// # Errors
/// `Invalid` when it is longer than `limit` bytes, or ends early.
pub async fn whole(request: Request, limit: usize) -> Answer<Bytes> {
    let bytes = axum::body::to_bytes(request.into_body(), limit).await;
    Ok(bytes.map_err(|e| {
        let reason = format!("it is longer than {limit} bytes, or was cut off");
        Error::invalid(reason).caused_by(e).tried("read").on("the body of the request")
    })?)
}

/// The parameters after the path.
pub struct Params<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Answer<Self> {
        let parsed = Query::<T>::try_from_uri(&parts.uri);
        let Query(parsed) = parsed.map_err(|e| {
            let error = Error::invalid("they are not what is expected").caused_by(e);
            error.tried("read").on("the parameters of the request")
        })?;
        Ok(Params(parsed))
    }
}

/// The variable part of the path.
pub struct Named<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Named<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let parsed = Path::<T>::from_request_parts(parts, state).await;
        let Path(parsed) = parsed.map_err(|e| {
            let error = Error::invalid("it names nothing").caused_by(e);
            error.tried("read").on("the path of the request")
        })?;
        Ok(Named(parsed))
    }
}

/// The answer to a path that is not there.
pub async fn no_such_path(uri: Uri) -> Refused {
    let error = Error::new(Kind::NotFound, "there is no such path");
    Refused(error.on(uri.path().to_owned()).hint("/openapi.json lists them"))
}

/// The answer to a method that a path does not have.
pub async fn no_such_method(method: Method, uri: Uri) -> Response {
    let error = Error::invalid(format!("it has no method {method}"));
    let error = error.on(uri.path().to_owned()).hint("/openapi.json lists them");
    let body = FailureBody { error: Failure::from(&error) };
    (StatusCode::METHOD_NOT_ALLOWED, Json(body)).into_response()
}
