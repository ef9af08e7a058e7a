//! What happened, to whoever asks or follows.

use std::sync::Arc;

use axum::body::Bytes;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::IntoParams;

use super::body::streamed;
use crate::daemon::{Events, Happened};

/// Which events.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct EventParams {
    /// Those after this number.
    pub since: u64,
    /// Go on with new ones as they come.
    pub follow: bool,
}

/// Events, one JSON object per line, for as long as there is somebody to read them.
pub fn told<E>(
    events: Arc<Events<E>>,
    mut stopping: watch::Receiver<bool>,
    asked: &EventParams,
) -> Response
where
    E: Happened + Serialize + Send + 'static,
{
    let (pieces, response) = streamed("application/x-ndjson");
    let &EventParams { since: mut seq, follow } = asked;
    tokio::spawn(async move {
        let mut latest = events.follow();
        loop {
            latest.mark_unchanged();
            let mut text = Vec::new();
            for event in events.since(seq) {
                seq = event.seq();
                // An event is plain data: writing it to memory cannot fail.
                let _ = serde_json::to_writer(&mut text, &event);
                text.push(b'\n');
            }
            if !text.is_empty() && pieces.send(Ok(Bytes::from(text))).await.is_err() {
                return;
            }
            if !follow || *stopping.borrow() {
                return;
            }
            tokio::select! {
                changed = latest.changed() => if changed.is_err() { return },
                // One more round: what is told about the end is told to followers, too.
                _ = stopping.wait_for(|stop| *stop) => {}
                () = pieces.closed() => return,
            }
        }
    });
    response
}
