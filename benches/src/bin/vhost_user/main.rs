//! A disk behind a vhost-user socket, side by side with `qemu-storage-daemon`.
//!
//! Both serve the same content, are driven by the same client, and take turns within one run; what
//! counts is the ratio of neighbouring measurements, with its spread over rounds. The table goes to
//! standard output as markdown.
//!
//! `vhost_user [--rounds N] [--seconds S] [--only NAME]`

mod load;
mod server;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use blockd::serve::vhost::{VhostOptions, VhostServer};
use blockd::serve::{Volume, VolumeOptions};
use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{NewDisk, OpenOptions, StoreDir, boot_id};
use load::{Job, Order, Outcome};
use server::Server;

const SPAN: u64 = 512 << 20;

fn store_at(path: &Path, cache: CacheMode) -> StoreDir {
    let how = OpenOptions { access: Access::Write, cache, boot: boot_id() };
    StoreDir::open(path, &how).expect("the store opens")
}

/// Serves until killed.
fn serve(args: &[String]) {
    let [cache, store, disk, socket] = args else { panic!("serve CACHE STORE DISK SOCKET") };
    let cache = if cache == "buffered" { CacheMode::Buffered } else { CacheMode::Direct };
    let store = store_at(Path::new(store), cache);
    let volume = Volume::open(&store, disk, &VolumeOptions::default()).expect("the disk opens");
    let listener = UnixListener::bind(socket).expect("the socket is free");
    let options = VhostOptions { queues: 2, ..VhostOptions::default() };
    let _server = VhostServer::start(Arc::clone(&volume), listener, options).expect("it serves");
    loop {
        std::thread::park();
    }
}

const JOB: Job = Job {
    name: "",
    queues: 1,
    depth: 32,
    block: 4096,
    write_percent: 0,
    order: Order::Random,
    flush: false,
    span: SPAN,
    client_polls: false,
};

const WRITE: Job = Job { write_percent: 100, ..JOB };

const LARGE: Job = Job { depth: 8, block: 128 << 10, order: Order::Sequential, ..JOB };

const FIRST: Job =
    Job { name: "first 4k writes over a parent, depth 32", order: Order::Scattered, ..WRITE };

fn jobs() -> Vec<Job> {
    vec![
        Job { name: "4k random read, depth 32, 1 queue", ..JOB },
        Job { name: "4k random read, depth 32, 2 queues", queues: 2, ..JOB },
        Job { name: "4k random overwrite, depth 32, 1 queue", ..WRITE },
        Job { name: "4k random overwrite, depth 32, 2 queues", queues: 2, ..WRITE },
        Job { name: "4k random read, depth 1", depth: 1, ..JOB },
        Job { name: "4k random read, depth 1, client polls", depth: 1, client_polls: true, ..JOB },
        Job { name: "4k overwrite and flush, depth 1", depth: 1, flush: true, ..WRITE },
        Job { name: "128k sequential read, depth 8", ..LARGE },
        Job { name: "128k sequential write, depth 8", write_percent: 100, ..LARGE },
    ]
}

struct Args {
    rounds: usize,
    time: Duration,
    only: Option<String>,
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
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }
}

/// Fills the first bytes of our disk and of a raw file alike.
fn prepare(dir: &Path) -> (PathBuf, PathBuf) {
    let (store, raw) = (dir.join("store"), dir.join("raw.img"));
    StoreDir::init(&store, None).expect("a new store");
    let open = store_at(&store, CacheMode::Auto);
    for name in ["disk", "base"] {
        let import = open.import(&NewDisk::root(name, SPAN), 1).expect("a new disk");
        let bytes = vec![0x5a; 1 << 20];
        for i in 0..SPAN >> 20 {
            import.disk().write(0, i << 20, &bytes).expect("space");
        }
        import.finish().expect("an import");
    }
    open.seal("base", &mut |_, _| Ok(())).expect("a seal");
    let content = std::io::Read::take(std::io::repeat(0x5a), SPAN);
    let mut file = std::fs::File::create(&raw).expect("a file");
    std::io::copy(&mut { content }, &mut file).expect("space");
    file.sync_all().expect("a sync");
    warm(&store, &raw);
    (store, raw)
}

/// Puts everything into the page cache in the same way, whichever way it was written.
fn warm(store: &Path, raw: &Path) {
    let files = std::fs::read_dir(store).expect("a store");
    let files = files.filter_map(|entry| Some(entry.ok()?.path()));
    for path in files.chain([raw.to_owned()]) {
        let mut file = std::fs::File::open(path).expect("a file");
        file.sync_all().expect("a sync");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
        std::io::copy(&mut file, &mut std::io::sink()).expect("a readable file");
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Rounds of two servers that took turns: ours and the peer's.
type Rounds = Vec<(Outcome, Outcome)>;

fn head(title: &str, peer: &str) {
    println!("\n### {title}\n");
    println!(
        "| job | ours, IOPS | {peer}, IOPS | ratio [spread] | ours p50/p99 µs | {peer} p50/p99 µs \
         | ours CPU µs/IO | {peer} CPU µs/IO | CPU ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
}

fn row(name: &str, rounds: &Rounds) {
    let of = |pick: &dyn Fn(&(Outcome, Outcome)) -> f64| {
        median(&mut rounds.iter().map(pick).collect::<Vec<_>>())
    };
    let mut ratios: Vec<f64> = rounds.iter().map(|(o, p)| o.iops / p.iops).collect();
    let ratio = median(&mut ratios);
    println!(
        "| {name} | {:.0} | {:.0} | **{ratio:.2}** [{:.2}–{:.2}] | {:.0}/{:.0} | {:.0}/{:.0} \
         | {:.1} | {:.1} | {:.2} |",
        of(&|r| r.0.iops),
        of(&|r| r.1.iops),
        ratios[0],
        ratios[ratios.len() - 1],
        of(&|r| r.0.p50_us),
        of(&|r| r.0.p99_us),
        of(&|r| r.1.p50_us),
        of(&|r| r.1.p99_us),
        of(&|r| r.0.cpu_us),
        of(&|r| r.1.cpu_us),
        of(&|r| r.0.cpu_us / r.1.cpu_us),
    );
}

fn measure(args: &Args, job: &Job, server: &Server) -> Outcome {
    load::run(job, &server.socket, server.child.id(), args.time)
}

fn own_against_raw(args: &Args, dir: &Path, (store, raw): (&Path, &Path)) {
    let wanted: Vec<Job> = jobs().into_iter().filter(|job| args.wants(job.name)).collect();
    if wanted.is_empty() {
        return;
    }
    for buffered in [true, false] {
        let ours = Server::ours(store, "disk", dir, buffered);
        let peer = Server::qsd("raw", &server::raw(raw, buffered), dir);
        let how = if buffered { "through the page cache" } else { "direct I/O" };
        head(&format!("A disk without a parent against a raw file, {how}"), "qsd raw");
        for job in &wanted {
            let turn = |_| (measure(args, job, &ours), measure(args, job, &peer));
            row(job.name, &(0..args.rounds).map(turn).collect());
        }
    }
}

/// The overlay of the peer: made anew for each round, like our child.
fn overlay(dir: &Path, raw: &Path, options: &str) -> String {
    let top = dir.join("overlay.qcow2");
    let _ = std::fs::remove_file(&top);
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-o", options, "-b"])
        .args([raw, &top])
        .status();
    assert!(made.is_ok_and(|s| s.success()), "qemu-img makes an overlay");
    server::overlay(&top, raw, true)
}

fn child(store: &Path) {
    let open = store_at(store, CacheMode::Auto);
    let _ = open.remove("child");
    let child = NewDisk { parent: Some("base".into()), ..NewDisk::root("child", SPAN) };
    open.create(&child).expect("a child");
}

fn first_writes(args: &Args, dir: &Path, (store, raw): (&Path, &Path)) {
    if !args.wants(FIRST.name) {
        return;
    }
    head("First writes over a parent, through the page cache", "qsd qcow2");
    let plain = ("64 KiB clusters", "cluster_size=65536");
    let fine = ("extended L2, 128 KiB clusters", "extended_l2=on,cluster_size=128k");
    for (what, options) in [plain, fine] {
        let turn = |_| {
            child(store);
            let ours = measure(args, &FIRST, &Server::ours(store, "child", dir, true));
            let peer = Server::qsd("overlay", &overlay(dir, raw, options), dir);
            (ours, measure(args, &FIRST, &peer))
        };
        row(&format!("{} ({what})", FIRST.name), &(0..args.rounds).map(turn).collect());
    }
}

fn main() {
    let list: Vec<String> = std::env::args().skip(1).collect();
    if list.first().is_some_and(|a| a == "serve") {
        return serve(&list[1..]);
    }
    let args = Args::parse(&list);
    if Command::new("qemu-storage-daemon").arg("--version").output().is_err() {
        eprintln!("qemu-storage-daemon is not installed: nothing to compare with");
        std::process::exit(1);
    }
    let dir = tempfile::tempdir().expect("a scratch folder");
    let (store, raw) = prepare(dir.path());
    own_against_raw(&args, dir.path(), (&store, &raw));
    first_writes(&args, dir.path(), (&store, &raw));
}
