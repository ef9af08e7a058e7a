//! What disks in service do, for `top`.

use std::collections::HashMap;

use blockd::api::types::{DiskStats, Job, JobKind, JobState};
use blockd::serve::{Histogram, VolumeStats};
use serde::Serialize;

use super::rate;
use crate::client::Client;
use crate::output::Table;
use crate::size::show;

/// What a disk did in the time between two looks.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    disk: String,
    /// Front ends that are connected.
    connected: u64,
    reads_per_s: f64,
    writes_per_s: f64,
    read_bytes_per_s: f64,
    write_bytes_per_s: f64,
    /// Upper bounds of how long reads and writes took, in microseconds; null when there were none.
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    in_flight: u64,
    /// Why requests are held, if they are.
    held: Option<String>,
    /// Pages of the journal in use, of 100.
    journal_percent: u64,
    /// Polls that found work, of 100; null when nothing polled.
    poll_hit_percent: Option<u64>,
    /// How far a flatten of it has come, of 100; null when there is none.
    flatten_percent: Option<u64>,
}

/// What was seen of the disks in service.
pub(super) struct Look {
    /// What they have done so far, by name.
    stats: HashMap<String, DiskStats>,
    /// How far their flattens have come, of 100, by what jobs call a disk.
    flattens: HashMap<String, u64>,
}

/// A look at all disks.
///
/// # Errors
/// What the daemon says.
pub(super) fn look(client: &Client) -> format::Result<Look> {
    let all: Vec<DiskStats> = client.get("/v1/stats".into())?;
    let jobs: Vec<Job> = client.get("/v1/jobs".into())?;
    let runs = |job: &Job| job.kind == JobKind::Flatten && job.state == JobState::Running;
    let percent = |job: &Job| job.total.and_then(|total| (job.done * 100).checked_div(total));
    let flattens = jobs.into_iter().filter(runs);
    Ok(Look {
        stats: all.into_iter().map(|d| (d.disk.clone(), d)).collect(),
        flattens: flattens.map(|job| (job.object.clone(), percent(&job).unwrap_or(0))).collect(),
    })
}

/// What they did between two looks, by name.
pub(super) fn rows(before: &Look, now: &Look, seconds: f64) -> Vec<Row> {
    let one = |d: &DiskStats| Row {
        flatten_percent: now.flattens.get(&format!("disk {}", d.disk)).copied(),
        ..row(before.stats.get(&d.disk), d, seconds)
    };
    let mut rows: Vec<Row> = now.stats.values().map(one).collect();
    rows.sort_by(|a, b| a.disk.cmp(&b.disk));
    rows
}

/// Requests, bytes and time of one kind.
struct Sum {
    requests: u64,
    bytes: u64,
    latency: Histogram,
}

fn sum(stats: &VolumeStats, kind: &str) -> Sum {
    let found = stats.kinds.iter().find(|k| k.kind == kind);
    found.map_or(Sum { requests: 0, bytes: 0, latency: Histogram::default() }, |k| Sum {
        requests: k.requests,
        bytes: k.bytes,
        latency: k.latency.clone(),
    })
}

/// What came to a histogram between two looks.
fn added(before: &Histogram, now: &Histogram) -> Histogram {
    let old: HashMap<u64, u64> = before.buckets.iter().copied().collect();
    let new = |(end, n): &(u64, u64)| (*end, n - old.get(end).unwrap_or(&0).min(n));
    Histogram { buckets: now.buckets.iter().map(new).filter(|(_, n)| *n > 0).collect() }
}

fn joined(a: &Histogram, b: &Histogram) -> Histogram {
    let mut sums = std::collections::BTreeMap::new();
    for (end, n) in a.buckets.iter().chain(&b.buckets) {
        *sums.entry(*end).or_insert(0) += n;
    }
    Histogram { buckets: sums.into_iter().collect() }
}

fn row(before: Option<&DiskStats>, now: &DiskStats, seconds: f64) -> Row {
    let nothing = VolumeStats::default();
    let (old, new) = (before.map_or(&nothing, |d| &d.stats), &now.stats);
    let [old_reads, reads] = [old, new].map(|s| sum(s, "read"));
    let [old_writes, writes] = [old, new].map(|s| sum(s, "write"));
    let latency = joined(
        &added(&old_reads.latency, &reads.latency),
        &added(&old_writes.latency, &writes.latency),
    );
    #[allow(clippy::cast_precision_loss)] // Microseconds for people.
    let percentile = |percent| match latency.buckets.is_empty() {
        true => None,
        false => Some(latency.percentile_ns(percent) as f64 / 1000.0),
    };
    let hits = new.polls_hit.saturating_sub(old.polls_hit);
    let polls = hits + new.polls_missed.saturating_sub(old.polls_missed);
    Row {
        disk: now.disk.clone(),
        connected: now.exports.iter().map(|e| e.connected).sum(),
        reads_per_s: rate(old_reads.requests, reads.requests, seconds),
        writes_per_s: rate(old_writes.requests, writes.requests, seconds),
        read_bytes_per_s: rate(old_reads.bytes, reads.bytes, seconds),
        write_bytes_per_s: rate(old_writes.bytes, writes.bytes, seconds),
        p50_us: percentile(50),
        p99_us: percentile(99),
        in_flight: new.in_flight,
        held: new.held.as_ref().map(|held| held.reason.clone()),
        journal_percent: new.journal_pages.0 * 100 / new.journal_pages.1.max(1),
        poll_hit_percent: (hits * 100).checked_div(polls),
        flatten_percent: None,
    }
}

pub(super) fn render(rows: &[Row]) -> String {
    let head = [
        "DISK",
        "FRONT ENDS",
        "READ/s",
        "WRITE/s",
        "READ",
        "WRITE",
        "p50 us",
        "p99 us",
        "IN WORK",
        "JOURNAL",
        "POLL HITS",
        "FLATTEN",
        "HELD",
    ];
    let mut table = Table::new(&head, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    let us = |us: Option<f64>| us.map_or("-".into(), |us| format!("{us:.0}"));
    let percent = |of: Option<u64>| of.map_or("-".into(), |p| format!("{p} %"));
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Rates are positive.
    let bytes = |rate: f64| format!("{}/s", show(rate as u64));
    for r in rows {
        table.row([
            r.disk.clone(),
            r.connected.to_string(),
            format!("{:.0}", r.reads_per_s),
            format!("{:.0}", r.writes_per_s),
            bytes(r.read_bytes_per_s),
            bytes(r.write_bytes_per_s),
            us(r.p50_us),
            us(r.p99_us),
            r.in_flight.to_string(),
            percent(Some(r.journal_percent)),
            percent(r.poll_hit_percent),
            percent(r.flatten_percent),
            r.held.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_of_what_came_between_two_looks() {
        let before = Histogram { buckets: vec![(10, 5), (20, 1)] };
        let now = Histogram { buckets: vec![(10, 5), (20, 4), (40, 2)] };

        let between = added(&before, &now);

        assert_eq!(between.buckets, [(20, 3), (40, 2)]);
        let both = joined(&between, &Histogram { buckets: vec![(20, 1), (80, 1)] });
        assert_eq!(both.buckets, [(20, 4), (40, 2), (80, 1)]);
    }
}
