//! A disk behind a vhost-user socket, side by side with `qemu-storage-daemon`.
//!
//! Both serve the same content, are driven by the same client, and take turns within one run; what
//! counts is the ratio of neighbouring measurements, with its spread over rounds. Tables go to
//! standard output as Markdown, graphs to a folder.
//!
//! `vhost_user [--rounds N] [--seconds S] [--only NAME] [--graphs DIR] [--dir DIR]`; `--only !NAME`
//! is all but these. A folder given with `--dir` keeps what was prepared for the next run.

mod content;
mod host;
mod jobs;
mod load;
mod report;
mod server;
mod svg;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use content::{BASE, Pair, SPAN};
use jobs::{DENSE, FIRST, JOB, jobs};
use load::{Job, Outcome};
use report::{Aim, Report, Rounds, head};
use server::{Disk, Server};

/// Depths of chains; the peer goes as far as its second number.
const DEPTHS: [u64; 6] = [0, 1, 8, 32, 64, 256];
const PEER_DEPTH_MAX: u64 = 64;

struct Args {
    rounds: usize,
    time: Duration,
    only: Option<String>,
    graphs: Option<PathBuf>,
    dir: Option<PathBuf>,
}

impl Args {
    fn parse(list: &[String]) -> Args {
        let value = |name: &str| {
            let at = list.iter().position(|a| a == name)?;
            list.get(at + 1).cloned()
        };
        let seconds = value("--seconds").map_or(1.5, |v| v.parse().expect("seconds"));
        Args {
            rounds: value("--rounds").map_or(5, |v| v.parse().expect("a number of rounds")),
            time: Duration::from_secs_f64(seconds),
            only: value("--only"),
            graphs: value("--graphs").map(PathBuf::from),
            dir: value("--dir").map(PathBuf::from),
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| match only.strip_prefix('!') {
            Some(not) => !name.contains(not),
            None => name.contains(only.as_str()),
        })
    }

    /// `turn` once for each round.
    fn rounds<T>(&self, mut turn: impl FnMut() -> T) -> Vec<T> {
        (0..self.rounds).map(|_| turn()).collect()
    }

    fn measure(&self, job: &Job, server: &Server) -> Outcome {
        load::run(job, &server.socket, server.pid, self.time)
    }

    /// Takes turns; before each, what is in the page cache is read, so that it stays there.
    fn compare(&self, job: &Job, ours: &Server, peer: &Server, cached: &[&Path]) -> Rounds {
        self.rounds(|| {
            content::keep_warm(cached);
            (self.measure(job, ours), self.measure(job, peer))
        })
    }
}

impl Pair {
    fn places(&self) -> [&Path; 2] {
        [&self.store, &self.raw]
    }

    fn ours(&self, name: &str, buffered: bool, cpu: Option<usize>) -> Server {
        Server::ours(Disk { store: &self.store, name }, &self.dir, buffered, cpu)
    }

    fn peer(&self, buffered: bool, cpu: Option<usize>) -> Server {
        Server::qsd("raw", &server::raw(&self.raw, buffered), &self.dir, cpu)
    }
}

fn floor(args: &Args, pair: &Pair, report: &mut Report) {
    let about = "Nothing is read or written: a disk of holes against `null-co` with \
                 `read-zeroes`. Ours goes its whole way up to the map, and finds a hole.";
    let one = Job { name: "4k random read of nothing, depth 32, 1 queue", ..JOB };
    let two = Job { name: "4k random read of nothing, depth 32, 2 queues", queues: 2, ..JOB };
    if !args.wants(one.name) && !args.wants(two.name) {
        return;
    }
    head("Transport floor", about, "null-co");
    content::holes(&pair.store);
    let ours = pair.ours("holes", true, None);
    let peer = Server::qsd("null", &server::null(SPAN), &pair.dir, None);
    for job in [one, two] {
        let rounds = args.compare(&job, &ours, &peer, &[]);
        report.row("", job.name, &rounds, Aim { iops: Some(1.0), cpu: None });
    }
}

/// How files are in the page cache, which decides what overwrites cost.
const CACHED: &str = "Both files are in the page cache as single pages. Where a file lies there in \
                      pieces of 2 MiB, as sequential readers have the host read it ahead, a 4k \
                      overwrite takes some ten times as long, whoever serves it \
                      (docs/decisions.md).";

fn own_against_raw(args: &Args, pair: &Pair, report: &mut Report) {
    let wanted: Vec<(Job, Aim)> = jobs().into_iter().filter(|(j, _)| args.wants(j.name)).collect();
    if wanted.is_empty() {
        return;
    }
    for (buffered, how) in [(true, "page cache"), (false, "direct I/O")] {
        let ours = pair.ours("disk", buffered, None);
        let peer = pair.peer(buffered, None);
        let places = pair.places();
        content::warm(&places);
        let cached = if buffered { &places[..] } else { &[] };
        let about = if buffered { CACHED } else { "" };
        head(&format!("A disk without a parent against a raw file, {how}"), about, "qsd raw");
        let mut limits = Vec::new();
        for (job, aim) in &wanted {
            let mut host = Vec::new();
            let rounds = args.rounds(|| {
                content::keep_warm(cached);
                let both = (args.measure(job, &ours), args.measure(job, &peer));
                if job.queues > 1 {
                    host.push(host::run(job, &pair.raw, buffered, args.time));
                }
                both
            });
            report.row(how, job.name, &rounds, *aim);
            if job.queues > 1 {
                limits.push(report::limit(job.name, &rounds, host));
            }
        }
        report::limits(&limits);
    }
}

/// One request at a time, with and without processors of their own for both sides.
fn one_by_one(args: &Args, pair: &Pair, report: &mut Report) {
    let job = Job { depth: 1, ..JOB };
    let apart = (Some(0), Some(1));
    let (aim, none) = (Aim { iops: Some(2.0), cpu: None }, Aim::default());
    let ways = [
        ("4k random read, depth 1, nothing pinned", (None, None), false, aim),
        ("4k random read, depth 1, server on CPU 0, client on CPU 1", apart, false, aim),
        ("4k random read, depth 1, CPU 0 and 1, client polls", apart, true, none),
        ("4k random read, depth 1, both on CPU 0", (Some(0), Some(0)), false, none),
    ];
    if !ways.iter().any(|(name, ..)| args.wants(name)) {
        return;
    }
    let about = "Through the page cache. What is measured is how soon both sides notice each \
                 other. The aim is for adaptive polling, and so for the first two rows, in which \
                 the client sleeps and the server may poll. In the other two there is nothing that \
                 polling could save: a client that polls is never woken, and on one processor a \
                 server that polls keeps the client from it. They show what a request takes \
                 beside: the client, the kernel's copy, and both servers.";
    head("One request at a time", about, "qsd raw");
    for (name, (cpu, client_cpu), client_polls, aim) in ways {
        if !args.wants(name) {
            continue;
        }
        let ours = pair.ours("disk", true, cpu);
        let peer = pair.peer(true, cpu);
        content::warm(&pair.places());
        let job = Job { name, client_cpu, client_polls, ..job };
        let rounds = args.compare(&job, &ours, &peer, &pair.places());
        report.row("", name, &rounds, aim);
    }
}

fn first_writes(args: &Args, pair: &Pair, report: &mut Report) {
    let plain = ("64 KiB clusters", "cluster_size=65536", Aim { iops: Some(5.0), cpu: None });
    let fine =
        ("extended L2", "extended_l2=on,cluster_size=128k", Aim { iops: Some(2.0), cpu: None });
    let flushed = |name, job: Job| Job { name, flush_at_end: true, ..job };
    let all = [
        (FIRST, true),
        (flushed("4k first writes, one in each 64 KiB, then flush", FIRST), false),
        (DENSE, false),
        (flushed("4k first writes, every block of 512 MiB, then flush", DENSE), false),
    ];
    if !all.iter().any(|(job, _)| args.wants(job.name)) {
        return;
    }
    let about = "Both start with an empty layer over a parent that is full and in the page cache, \
                 made anew for each round; places come in no order and never twice, depth 32, 1 \
                 queue. The aims are for the first job, where each write is the first in its \
                 cluster of 64 KiB, or in a half of one of 128 KiB (extended L2). Without the \
                 flush at the end neither side makes anything durable on its own, except that ours \
                 writes its journal whenever half of its tail is full (64,512 first writes).";
    head("First writes over a parent, page cache", about, "qsd qcow2");
    content::warm(&pair.places());
    for (job, aimed) in all.iter().filter(|(job, _)| args.wants(job.name)) {
        for (what, options, aim) in [&plain, &fine] {
            let rounds = args.rounds(|| {
                content::keep_warm(&[&pair.raw]);
                content::child(&pair.store);
                let ours = args.measure(job, &pair.ours("child", true, None));
                let top = content::overlay(&pair.dir, &pair.raw, options);
                let chain = server::overlay(&top, &pair.raw, true);
                let peer = Server::qsd("overlay", &chain, &pair.dir, None);
                (ours, args.measure(job, &peer))
            });
            let name = format!("{} ({what})", job.name);
            report.row("", &name, &rounds, if *aimed { *aim } else { Aim::default() });
        }
    }
}

fn depths(args: &Args, dir: &Path, report: &mut Report) {
    let name = "4k random read by depth of the chain";
    if !args.wants(name) {
        return;
    }
    let about = format!(
        "4 KiB random reads of a disk of 256 MiB, depth 32, 1 queue. Its extents are spread over \
         so many layers in turn, under an empty top; with 0 layers the top holds everything. The \
         peer ends at {PEER_DEPTH_MAX}."
    );
    head("Reads by depth of the chain, page cache", &about, "qsd qcow2");
    for depth in DEPTHS {
        let dir = tempfile::tempdir_in(dir).expect("a scratch folder");
        let store = content::own_chain(dir.path(), depth);
        let ours = Server::ours(Disk { store: &store, name: "top" }, dir.path(), true, None);
        let job = Job { name, span: content::CHAIN, ..JOB };
        if depth > PEER_DEPTH_MAX {
            report.depth(depth, args.rounds(|| args.measure(&job, &ours)), None);
            continue;
        }
        let files = content::qcow2_chain(dir.path(), depth);
        let peer = Server::qsd("chain", &server::chain(&files), dir.path(), None);
        let mut cached: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
        cached.push(&store);
        let rounds = args.compare(&job, &ours, &peer, &cached);
        let (ours, peer) = rounds.into_iter().unzip();
        report.depth(depth, ours, Some(peer));
    }
}

fn main() {
    let list: Vec<String> = std::env::args().skip(1).collect();
    let args = Args::parse(&list);
    if Command::new("qemu-storage-daemon").arg("--version").output().is_err() {
        eprintln!("qemu-storage-daemon is not installed: nothing to compare with");
        std::process::exit(1);
    }
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let dir = args.dir.as_deref().unwrap_or(scratch.path());
    let mut report = Report::default();
    let disk = content::pair(dir, "disk", SPAN, false);
    floor(&args, &disk, &mut report);
    own_against_raw(&args, &disk, &mut report);
    one_by_one(&args, &disk, &mut report);
    first_writes(&args, &content::pair(dir, "base", BASE, true), &mut report);
    depths(&args, dir, &mut report);
    report.finish(args.graphs.as_deref());
}
