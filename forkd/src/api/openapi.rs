//! The description of the interface, made from the handlers and the types.
//!
//! Invariant: it is served, and stands in `docs/openapi-forkd.json`; a test compares the two, and
//! another one compares it with the routes.

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use utoipa::OpenApi;

use super::{daemon, snapshots, vms};

/// All paths.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "forkd",
        description = "The control interface of a daemon that runs and forks virtual machines. \
                       HTTP/1.1 on a Unix socket. Sizes are bytes, times seconds since 1970. A \
                       failure is a status and an object with the stable name of its kind.",
    ),
    paths(
        daemon::version,
        daemon::health,
        daemon::shutdown,
        daemon::events,
        daemon::metrics,
        served,
        vms::list,
        vms::run,
        vms::show,
        vms::remove,
        vms::pause,
        vms::resume,
        vms::stop,
        vms::fork,
        vms::stats,
        snapshots::take,
        snapshots::restore,
        snapshots::remove,
        snapshots::jobs,
        snapshots::job,
        snapshots::cancel,
    )
)]
struct Document;

/// The description, as text.
///
/// # Panics
/// Never: it is plain JSON.
#[must_use]
pub fn document() -> String {
    let mut text = Document::openapi().to_pretty_json().expect("it is plain JSON");
    text.push('\n');
    text
}

/// This description
#[utoipa::path(get, path = "/openapi.json", tag = "daemon",
    responses((status = 200, body = Object)))]
pub async fn served() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], document())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Set to write the document anew.
    const WRITE: &str = "OFFSHOOT_WRITE_OPENAPI";

    /// To write it anew: `OFFSHOOT_WRITE_OPENAPI=1 cargo test -p forkd openapi`.
    #[test]
    fn the_checked_in_document_is_what_is_served() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi-forkd.json");
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(path, document()).unwrap();
        }

        let checked_in = std::fs::read_to_string(path).unwrap();

        let old = format!("docs/openapi-forkd.json is old; set {WRITE}=1 to write it");
        assert!(checked_in == document(), "{old}");
    }

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let routes = include_str!("mod.rs");
        let mut routed = BTreeSet::new();
        for line in routes.lines().filter_map(|l| l.trim().strip_prefix(".route(\"")) {
            let (path, handlers) = line.split_once('"').unwrap();
            for method in ["get", "post", "put", "delete"] {
                if handlers.contains(&format!("{method}(")) {
                    routed.insert(format!("{method} {path}"));
                }
            }
        }
        let document: serde_json::Value = serde_json::from_str(&document()).unwrap();
        let described: BTreeSet<String> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, methods)| {
                methods.as_object().unwrap().keys().map(move |m| format!("{m} {path}"))
            })
            .collect();

        assert!(routed.len() > 10);
        assert_eq!(routed, described);
    }
}
