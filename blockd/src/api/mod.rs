//! The control interface: HTTP/1.1 with JSON on a Unix socket.
//!
//! Invariants:
//! - The socket is for its owner and root, and for one more group if that is asked for; who calls
//!   is checked on every connection as well (`socket.rs`).
//! - Handlers never block the runtime: what may take time runs on a thread of its own.
//! - A failure is a status and a [`types::FailureBody`]; what else a user should know comes in
//!   headers named [`NOTE`].
//! - `docs/openapi.json` describes every route; tests compare the two.

pub mod body;
mod content;
mod daemon;
mod disks;
pub mod events;
mod exports;
mod flatten;
pub mod jobs;
mod modes;
mod openapi;
pub mod reply;
mod server;
mod sessions;
mod socket;
pub mod types;

use std::sync::Arc;

use axum::Router;
use axum::routing::{delete, get, post, put};
use tokio::sync::watch;

use crate::daemon::Daemon;

pub use openapi::document;
pub use server::{Client, Served, serve};
pub use socket::{Access, ApiSocket, group_id};

/// The header of a line for the user that is neither a result nor a failure.
pub const NOTE: &str = "offshoot-note";
/// Bytes of data that one request of a session may carry or ask for.
pub const DATA_MAX: usize = 8 << 20;

impl Served for Daemon {
    fn routes(self: &Arc<Self>) -> Router {
        router(Arc::clone(self))
    }

    fn stopping(&self) -> watch::Receiver<bool> {
        Daemon::stopping(self)
    }

    fn stop(&self) {
        Daemon::stop(self);
    }

    fn ended(self: &Arc<Self>, client: Client) {
        if self.has_sessions_of(client.0) {
            let daemon = Arc::clone(self);
            tokio::task::spawn_blocking(move || daemon.end_sessions_of(client.0));
        }
    }

    fn left_its_socket(&self) -> bool {
        self.has_handed_over()
    }
}

/// Every route.
pub fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/version", get(daemon::version))
        .route("/v1/health", get(daemon::health))
        .route("/v1/shutdown", post(daemon::shutdown))
        .route("/v1/handover", post(daemon::hand_over))
        .route("/v1/events", get(daemon::events))
        .route("/v1/jobs", get(daemon::jobs))
        .route("/v1/jobs/{id}", get(daemon::job).delete(daemon::cancel))
        .route("/metrics", get(daemon::metrics))
        .route("/openapi.json", get(openapi::served))
        .route("/v1/store", get(disks::df))
        .route("/v1/disks", get(disks::list).post(disks::create))
        .route("/v1/forks", post(disks::fork))
        .route("/v1/forks/{token}", get(disks::forked).delete(disks::give_up_fork))
        .route("/v1/forks/{token}/cut", post(disks::cut))
        .route("/v1/forks/{token}/release", post(disks::release))
        .route("/v1/disks/{name}", get(disks::show).delete(disks::remove))
        .route("/v1/disks/{name}/rename", post(disks::rename))
        .route("/v1/disks/{name}/resize", post(disks::resize))
        .route("/v1/disks/{name}/seal", post(disks::seal))
        .route("/v1/disks/{name}/mode", post(modes::set))
        .route("/v1/disks/{name}/commit", post(modes::commit))
        .route("/v1/disks/{name}/undo", post(modes::undo))
        .route("/v1/disks/{name}/flatten", post(flatten::flatten))
        .route("/v1/disks/{name}/flatten-policy", put(flatten::disk_policy))
        .route("/v1/store/flatten-policy", get(flatten::policy).put(flatten::store_policy))
        .route("/v1/disks/{name}/check", post(disks::check))
        .route("/v1/disks/{name}/repair", post(disks::repair))
        .route("/v1/disks/{name}/scrub", post(disks::scrub))
        .route("/v1/disks/{name}/digest", post(disks::digest))
        .route("/v1/disks/{name}/map", get(content::map))
        .route("/v1/disks/{name}/data", get(content::read).put(content::write))
        .route("/v1/disks/{name}/discard", post(content::discard))
        .route("/v1/disks/{name}/attach", post(exports::attach))
        .route("/v1/disks/{name}/detach", post(exports::detach))
        .route("/v1/disks/{name}/limits", put(exports::limit))
        .route("/v1/disks/{name}/resume", post(exports::resume))
        .route("/v1/exports", get(exports::list))
        .route("/v1/stats", get(exports::stats))
        .route("/v1/compare", post(disks::compare))
        .route("/v1/diff", get(disks::diff))
        .route("/v1/sessions", post(sessions::open))
        .route("/v1/sessions/{id}", delete(sessions::abandon))
        .route("/v1/sessions/{id}/extents", get(sessions::extents))
        .route("/v1/sessions/{id}/data", get(sessions::read))
        .route("/v1/sessions/{id}/data", put(sessions::write))
        .route("/v1/sessions/{id}/zeroes", post(sessions::zeroes))
        .route("/v1/sessions/{id}/finish", post(sessions::finish))
        .fallback(reply::no_such_path)
        .method_not_allowed_fallback(reply::no_such_method)
        .with_state(daemon)
}
