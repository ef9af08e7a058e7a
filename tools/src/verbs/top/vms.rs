//! What machines do, for `top`.

use std::collections::HashMap;
use std::time::Duration;

use forkd::api::types::{VmState, VmStats};
use serde::Serialize;

use super::rate;
use crate::client::Client;
use crate::output::Table;
use crate::size::show;

/// What a machine did in the time between two looks, and what it has.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    vm: String,
    state: VmState,
    /// Bytes of the host's memory that only it uses, that it shares, and its share of both.
    private_bytes: u64,
    shared_bytes: u64,
    proportional_bytes: u64,
    /// Page faults that needed no I/O.
    faults_per_s: f64,
    /// Times that a processor came out of the guest to have something done.
    exits_per_s: f64,
    /// Of one processor of the host.
    cpu_percent: f64,
}

/// What machines have done so far, by name.
pub(super) type Look = HashMap<String, VmStats>;

/// A look at all machines that have not ended.
///
/// # Errors
/// What the daemon says.
pub(super) fn look(client: &Client) -> format::Result<Look> {
    let all: Vec<VmStats> = client.get("/v1/stats".into())?;
    let living = all.into_iter().filter(|vm| vm.state != VmState::Ended);
    Ok(living.map(|vm| (vm.name.clone(), vm)).collect())
}

/// What they did between two looks, by name.
pub(super) fn rows(before: &Look, now: &Look, seconds: f64) -> Vec<Row> {
    let mut rows: Vec<Row> =
        now.values().map(|vm| row(before.get(&vm.name), vm, seconds)).collect();
    rows.sort_by(|a, b| a.vm.cmp(&b.vm));
    rows
}

fn row(before: Option<&VmStats>, now: &VmStats, seconds: f64) -> Row {
    // One that came between the looks begins with the second: what it did is since its beginning.
    let per_s = |of: fn(&VmStats) -> u64| rate(of(before.unwrap_or(now)), of(now), seconds);
    let second = Duration::from_secs(1).as_secs_f64() * 1e9;
    Row {
        vm: now.name.clone(),
        state: now.state,
        private_bytes: now.private_bytes,
        shared_bytes: now.shared_bytes,
        proportional_bytes: now.proportional_bytes,
        faults_per_s: per_s(|vm| vm.faults),
        exits_per_s: per_s(|vm| vm.exits),
        cpu_percent: per_s(|vm| vm.cpu_ns) / second * 100.0,
    }
}

/// As a table.
pub(super) fn render(rows: &[Row]) -> String {
    let head = ["VM", "STATE", "PRIVATE", "SHARED", "SHARE", "FAULTS/s", "EXITS/s", "CPU"];
    let mut table = Table::new(&head, &[2, 3, 4, 5, 6, 7]);
    for r in rows {
        table.row([
            r.vm.clone(),
            r.state.name().to_owned(),
            show(r.private_bytes),
            show(r.shared_bytes),
            show(r.proportional_bytes),
            format!("{:.0}", r.faults_per_s),
            format!("{:.0}", r.exits_per_s),
            format!("{:.0} %", r.cpu_percent),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(name: &str, faults: u64, cpu_ns: u64) -> VmStats {
        VmStats {
            name: name.into(),
            state: VmState::Running,
            private_bytes: 1,
            shared_bytes: 2,
            proportional_bytes: 3,
            faults,
            exits: 2 * faults,
            cpu_ns,
            net: None,
        }
    }

    #[test]
    fn a_machine_that_came_between_two_looks_begins_at_nothing() {
        let look = |all: &[VmStats]| -> Look {
            all.iter().map(|vm| (vm.name.clone(), vm.clone())).collect()
        };
        let before = look(&[stats("b", 10, 1_000_000_000), stats("gone", 1, 1)]);
        let now = look(&[stats("b", 30, 2_000_000_000), stats("a", 500, 9)]);

        let rows = rows(&before, &now, 2.0);

        let told: Vec<_> =
            rows.iter().map(|r| (r.vm.as_str(), r.faults_per_s, r.exits_per_s)).collect();
        assert_eq!(told, [("a", 0.0, 0.0), ("b", 10.0, 20.0)]);
        assert!((rows[1].cpu_percent - 50.0).abs() < 0.1, "{rows:?}");
    }
}
