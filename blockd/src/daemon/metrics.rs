//! Numbers for Prometheus, in its text format 0.0.4.

use std::fmt::{Display, Write as _};
use std::time::Duration;

use format::Result;

use super::Daemon;
use crate::api::types::DiskStats;
use crate::serve::KindStats;

/// A page of numbers.
#[derive(Default)]
pub struct Page(String);

impl Page {
    /// Begins a family of numbers.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    /// A number of the family, with labels.
    pub fn value(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> =
            labels.iter().map(|(key, text)| format!("{key}=\"{}\"", escaped(text))).collect();
        match labels.is_empty() {
            true => self.line(format_args!("{name} {value}")),
            false => self.line(format_args!("{name}{{{}}} {value}", labels.join(","))),
        }
    }

    /// All of it.
    #[must_use]
    pub fn text(self) -> String {
        self.0
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to memory cannot fail.
        let _ = writeln!(self.0, "{line}");
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

impl Daemon {
    /// The numbers of now.
    ///
    /// # Errors
    /// What the host reports.
    pub fn metrics(&self) -> Result<String> {
        let mut page = Page::default();
        page.family("offshoot_build_info", "gauge", "Always 1; the label is the version.");
        page.value("offshoot_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        page.family("offshoot_start_time_seconds", "gauge", "Start, in seconds since 1970.");
        page.value("offshoot_start_time_seconds", &[], self.started);
        page.family("offshoot_jobs_running", "gauge", "Jobs that are running.");
        page.value("offshoot_jobs_running", &[], self.jobs.running());
        let df = self.df()?;
        page.family("offshoot_store_disks", "gauge", "Disks in the store.");
        page.value("offshoot_store_disks", &[], df.disks.len());
        page.family("offshoot_store_used_bytes", "gauge", "Bytes allocated to the store's files.");
        page.value("offshoot_store_used_bytes", &[], df.used);
        page.family("offshoot_store_free_bytes", "gauge", "Bytes left on its file system.");
        page.value("offshoot_store_free_bytes", &[], df.free);
        let stats = self.stats();
        gauges(&mut page, &stats);
        requests(&mut page, &stats);
        Ok(page.text())
    }
}

/// A number of a disk in service: name, kind, what it says, how to get it.
type Number = (&'static str, &'static str, &'static str, fn(&DiskStats) -> u64);

const NUMBERS: [Number; 11] = [
    ("offshoot_disk_size_bytes", "gauge", "Size of the virtual disk.", |d| d.size),
    ("offshoot_disk_front_ends", "gauge", "Front ends that are connected.", |d| {
        d.exports.iter().map(|e| e.connected).sum()
    }),
    ("offshoot_disk_in_flight", "gauge", "Requests not answered yet.", |d| d.stats.in_flight),
    ("offshoot_disk_held", "gauge", "Requests held back until the host can do them.", |d| {
        d.stats.held.as_ref().map_or(0, |held| held.requests)
    }),
    ("offshoot_disk_journal_pages_used", "gauge", "Journal pages in use.", |d| {
        d.stats.journal_pages.0
    }),
    ("offshoot_disk_journal_pages", "gauge", "Journal pages in all.", |d| d.stats.journal_pages.1),
    ("offshoot_disk_map_bytes", "gauge", "Memory that the map takes.", |d| d.stats.map_bytes),
    ("offshoot_disk_polls_hit_total", "counter", "Polls that found work.", |d| d.stats.polls_hit),
    ("offshoot_disk_polls_missed_total", "counter", "Polls that found none.", |d| {
        d.stats.polls_missed
    }),
    ("offshoot_disk_refused_total", "counter", "Requests that broke a rule.", |d| d.stats.refused),
    ("offshoot_disk_slow_total", "counter", "Requests that waited on a thread.", |d| d.stats.slow),
];

fn gauges(page: &mut Page, stats: &[DiskStats]) {
    for (name, kind, help, number) in NUMBERS {
        page.family(name, kind, help);
        stats.iter().for_each(|d| page.value(name, &[("disk", &d.disk)], number(d)));
    }
}

/// Counters by disk and kind of request, and how long requests took.
fn requests(page: &mut Page, stats: &[DiskStats]) {
    type Counter = (&'static str, &'static str, fn(&KindStats) -> u64);
    let counters: [Counter; 3] = [
        ("offshoot_disk_requests_total", "Requests that were answered.", |k| k.requests),
        ("offshoot_disk_bytes_total", "Bytes of those.", |k| k.bytes),
        ("offshoot_disk_errors_total", "Requests that were answered with an error.", |k| k.errors),
    ];
    for (name, help, number) in counters {
        page.family(name, "counter", help);
        for d in stats {
            for kind in &d.stats.kinds {
                page.value(name, &[("disk", &d.disk), ("kind", &kind.kind)], number(kind));
            }
        }
    }
    let name = "offshoot_disk_request_seconds";
    page.family(name, "histogram", "How long requests took.");
    for d in stats {
        d.stats.kinds.iter().for_each(|kind| histogram(page, name, &d.disk, kind));
    }
}

fn histogram(page: &mut Page, name: &str, disk: &str, kind: &KindStats) {
    let labels = [("disk", disk), ("kind", kind.kind.as_str())];
    let (bucket, mut sum) = (format!("{name}_bucket"), 0);
    for (end_ns, n) in &kind.latency.buckets {
        sum += n;
        let end = Duration::from_nanos(*end_ns).as_secs_f64().to_string();
        page.value(&bucket, &[labels[0], labels[1], ("le", &end)], sum);
    }
    page.value(&bucket, &[labels[0], labels[1], ("le", "+Inf")], sum);
    let seconds = Duration::from_nanos(kind.time_ns).as_secs_f64();
    page.value(&format!("{name}_sum"), &labels, seconds);
    page.value(&format!("{name}_count"), &labels, sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut page = Page::default();
        page.family("x", "gauge", "A number.");
        page.value("x", &[("disk", "a\"b\\c\nd"), ("op", "read")], 7);
        page.value("x", &[], 0.5);

        let lines: Vec<&str> = page.0.lines().collect();

        assert_eq!(lines[..2], ["# HELP x A number.", "# TYPE x gauge"]);
        assert_eq!(lines[2..], [r#"x{disk="a\"b\\c\nd",op="read"} 7"#, "x 0.5"]);
    }
}
