//! The description of the interface, made from the handlers and the types.
//!
//! Invariant: it is served, and stands in `docs/openapi.json`; a test compares the two, and another
//! one compares it with the routes.

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use utoipa::OpenApi;

use super::{content, daemon, disks, exports, flatten, modes, sessions};

/// All paths.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "blockd",
        description = "The control interface of a daemon that serves the delta disks of a store. \
                       HTTP/1.1 on a Unix socket. Sizes and offsets are bytes, times seconds \
                       since 1970. A failure is a status and an object with the stable name of \
                       its kind. Lines for the user come in headers named `offshoot-note`.",
    ),
    paths(
        daemon::version,
        daemon::health,
        daemon::shutdown,
        daemon::hand_over,
        daemon::events,
        daemon::jobs,
        daemon::job,
        daemon::cancel,
        daemon::metrics,
        served,
        disks::df,
        disks::list,
        disks::create,
        disks::show,
        disks::remove,
        disks::fork,
        disks::cut,
        disks::give_up_fork,
        disks::forked,
        disks::release,
        flatten::flatten,
        flatten::disk_policy,
        flatten::policy,
        flatten::store_policy,
        disks::rename,
        disks::resize,
        disks::seal,
        modes::set,
        modes::commit,
        modes::undo,
        disks::check,
        disks::repair,
        disks::scrub,
        disks::compare,
        disks::digest,
        disks::diff,
        exports::list,
        exports::stats,
        exports::attach,
        exports::detach,
        exports::limit,
        exports::resume,
        content::map,
        content::read,
        content::write,
        content::discard,
        sessions::open,
        sessions::abandon,
        sessions::extents,
        sessions::read,
        sessions::write,
        sessions::zeroes,
        sessions::finish,
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

    /// To write it anew: `OFFSHOOT_WRITE_OPENAPI=1 cargo test -p blockd openapi`.
    #[test]
    fn the_checked_in_document_is_what_is_served() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(path, document()).unwrap();
        }

        let checked_in = std::fs::read_to_string(path).unwrap();

        assert!(checked_in == document(), "docs/openapi.json is old; set {WRITE}=1 to write it");
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

        assert!(routed.len() > 20);
        assert_eq!(routed, described);
    }
}
