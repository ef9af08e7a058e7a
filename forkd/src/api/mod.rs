//! The control interface: HTTP/1.1 with JSON on a Unix socket, by blockd's server.
//!
//! Invariants: those of blockd's interface. Handlers never block the runtime; a failure is a status
//! and an object with the stable name of its kind; `docs/openapi-forkd.json` describes every route,
//! and tests compare the two.

mod daemon;
mod openapi;
mod snapshots;
pub mod types;
mod vms;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};
use blockd::api::{Served, reply};
use tokio::sync::watch;

use crate::daemon::Daemon;

pub use openapi::document;

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
}

/// Every route.
pub fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/version", get(daemon::version))
        .route("/v1/health", get(daemon::health))
        .route("/v1/shutdown", post(daemon::shutdown))
        .route("/v1/events", get(daemon::events))
        .route("/metrics", get(daemon::metrics))
        .route("/openapi.json", get(openapi::served))
        .route("/v1/vms", get(vms::list).post(vms::run))
        .route("/v1/vms/{name}", get(vms::show).delete(vms::remove))
        .route("/v1/vms/{name}/pause", post(vms::pause))
        .route("/v1/vms/{name}/resume", post(vms::resume))
        .route("/v1/vms/{name}/stop", post(vms::stop))
        .route("/v1/vms/{name}/fork", post(vms::fork))
        .route("/v1/vms/{name}/snapshot", post(snapshots::take))
        .route("/v1/snapshots/restore", post(snapshots::restore))
        .route("/v1/snapshots/remove", post(snapshots::remove))
        .route("/v1/jobs", get(snapshots::jobs))
        .route("/v1/jobs/{id}", get(snapshots::job).delete(snapshots::cancel))
        .route("/v1/stats", get(vms::stats))
        .fallback(reply::no_such_path)
        .method_not_allowed_fallback(reply::no_such_method)
        .with_state(daemon)
}
