//! Long work over the interface: run as a job, waited for or not. For the routes of every daemon
//! that has [`Jobs`](crate::daemon::Jobs).
//!
//! Invariant: a job goes on when its client goes away.

use std::time::Duration;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use format::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::NOTE;
use super::reply::{Answer, Refused, failure, note_header};
use super::types::Job;
use crate::daemon::{Entry, Noted, Running};

/// Longest wait for the end of a job.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Whether the answer waits for the end of the work.
#[derive(Debug, Clone, Copy, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct Waiting {
    /// `false`: answer at once, with status 202 and the job.
    pub wait: bool,
}

impl Default for Waiting {
    fn default() -> Self {
        Waiting { wait: true }
    }
}

/// Which jobs.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct WaitParams {
    /// Milliseconds to wait for the end of the job, 60,000 at most.
    pub wait_ms: u64,
}

/// Runs the work of a job, and waits for its end unless the client does not want to.
///
/// # Errors
/// What the work reports, when it is waited for.
pub async fn run<T: Serialize>(
    running: Running,
    waiting: Waiting,
    work: impl FnOnce(&Running) -> Result<T> + Send + 'static,
) -> Answer {
    let entry = std::sync::Arc::clone(running.entry());
    // Not awaited: the job goes on when its client goes away. A panic ends it as well.
    tokio::task::spawn_blocking(move || {
        // What came of it is told by the job.
        let _ = running.run(work);
    });
    if !waiting.wait {
        return Ok((StatusCode::ACCEPTED, Json(entry.describe())).into_response());
    }
    // An error would mean that the job is gone, and it is held here.
    let _ = entry.ended().wait_for(|ended| *ended).await;
    Ok(answer_of(&entry))
}

/// What an ended job has to say.
fn answer_of(entry: &Entry) -> Response {
    match entry.outcome() {
        Some(Ok(value)) => Noted { value, notes: entry.notes() }.into_response(),
        Some(Err(error)) => {
            let kind = Kind::from_name(&error.kind).unwrap_or(Kind::Failed);
            let mut response = failure(kind, *error);
            for value in entry.notes().iter().filter_map(|n| note_header(n)) {
                response.headers_mut().append(NOTE, value);
            }
            response
        }
        None => Refused(Error::new(Kind::Failed, "the job has not ended")).into_response(),
    }
}

/// A job as it is when it ended, or when the time is up.
pub async fn described(entry: &Entry, wait: WaitParams) -> Json<Job> {
    let mut ended = entry.ended();
    let longest = Duration::from_millis(wait.wait_ms).min(WAIT_MAX);
    // Whether it ended or the time is up: its description says which.
    let _ = tokio::time::timeout(longest, ended.wait_for(|ended| *ended)).await;
    Json(entry.describe())
}
