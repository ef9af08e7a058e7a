//! Every verb of the command line: what it does, its exit codes and the shape of its JSON.

#[path = "../support/mod.rs"]
#[allow(dead_code)] // Each test file uses a part of it.
mod support;

mod damage;
mod disks;
mod images;
mod signals;
mod usage;

use serde_json::Value;

use support::Ran;

const MIB: u64 = 1 << 20;

/// Names of the fields of an object.
fn fields(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

/// Fails the test unless an object has these fields and no others.
fn has_fields(value: &Value, expected: &[&str]) {
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    let mut found = fields(value);
    found.sort_unstable();
    assert_eq!(found, expected, "{value:#}");
}

const DISK: [&str; 12] = [
    "name",
    "disk",
    "segment",
    "size",
    "allocated",
    "state",
    "parent",
    "depth",
    "created",
    "mode",
    "flattening",
    "flatten_policy",
];

fn disk_and(more: &[&'static str]) -> Vec<&'static str> {
    [&DISK[..], more].concat()
}

/// The `error` object of a failure with `--json`, which is told on both ends.
fn error(ran: &Ran) -> Value {
    let told = ran.json();
    has_fields(&told, &["error"]);
    has_fields(&told["error"], &["kind", "object", "reason", "next", "message"]);
    let message = told["error"]["message"].as_str().expect("text");
    assert!(ran.err.contains(&format!("offshoot: {message}\n")), "{ran:?}");
    told["error"].clone()
}
