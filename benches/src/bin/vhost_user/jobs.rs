//! The jobs, and what they are to reach.

use super::content::{BASE, SPAN};
use super::load::{Job, Order};
use super::report::Aim;

/// 4 KiB reads all over, 32 at a time, on one queue.
pub const JOB: Job = Job {
    name: "",
    queues: 1,
    depth: 32,
    block: 4096,
    write_percent: 0,
    order: Order::Random,
    flush: false,
    span: SPAN,
    flush_at_end: false,
    client_polls: false,
    client_cpu: None,
};

const WRITE: Job = Job { write_percent: 100, ..JOB };

const LARGE: Job = Job { depth: 8, block: 128 << 10, order: Order::Sequential, ..JOB };

/// Each write is the first in its extent.
pub const FIRST: Job = Job {
    name: "4k first writes, one in each 64 KiB",
    order: Order::Once(64 << 10),
    span: BASE,
    ..WRITE
};

/// Each write is the first to its block.
pub const DENSE: Job =
    Job { name: "4k first writes, every block of 512 MiB", order: Order::Once(4096), ..WRITE };

/// The jobs for a disk without a parent.
pub fn jobs() -> Vec<(Job, Aim)> {
    let one = Aim { iops: Some(1.0), cpu: Some(0.8) };
    let two = Aim { iops: Some(1.3), cpu: Some(0.8) };
    let equal = Aim { iops: Some(1.0), cpu: None };
    // Ten percent more time for each.
    let flush = Aim { iops: Some(0.91), cpu: None };
    let (write, flushed) = (Job { write_percent: 100, ..LARGE }, Job { flush: true, ..WRITE });
    vec![
        (Job { name: "4k random read, depth 32, 1 queue", ..JOB }, one),
        (Job { name: "4k random read, depth 32, 2 queues", queues: 2, ..JOB }, two),
        (Job { name: "4k random overwrite, depth 32, 1 queue", ..WRITE }, one),
        (Job { name: "4k random overwrite, depth 32, 2 queues", queues: 2, ..WRITE }, two),
        (Job { name: "4k overwrite and flush, depth 1", depth: 1, ..flushed }, flush),
        (Job { name: "128k sequential read, depth 8", ..LARGE }, equal),
        (Job { name: "128k sequential write, depth 8", ..write }, equal),
    ]
}
