//! The command line says the same whether a daemon has the store or nobody does.

#[allow(dead_code)] // Each test file uses a part of it.
mod support;

use std::fs;
use std::io::Write as _;
use std::process::Stdio;

use offshoot_tests::daemon::Daemon;
use support::{Bench, Ran, names, noise, offshoot, run, sparse, wait};

const MIB: u64 = 1 << 20;

/// A store, and perhaps a daemon that has it.
struct Side {
    bench: Bench,
    daemon: Option<Daemon>,
}

impl Side {
    fn new(with_daemon: bool) -> Self {
        let bench = Bench::new();
        let daemon = with_daemon.then(|| bench.daemon());
        let mut image = noise(7, 300_000);
        image.resize(8 * 1024 * 1024, 0);
        sparse(
            &bench.path("image.raw"),
            8 * MIB,
            &[(MIB, &image[..300_000]), (5 * MIB, &[9; 512])],
        );
        Side { bench, daemon }
    }

    fn run(&self, command: &str, input: &[u8]) -> Ran {
        let paths = command.replace("@", self.bench.path("").to_str().expect("a plain path"));
        let args: Vec<&str> = paths.split_whitespace().collect();
        self.bench.feed(&args, input)
    }

    /// Short names of the segments that there are, as verbs say them.
    fn shorts(&self) -> Vec<String> {
        let segments = self.bench.files(".seg");
        segments.iter().filter_map(|name| name.get(..8)).map(str::to_owned).collect()
    }
}

/// What differs from run to run: identities, digests, times, and folders.
/// `shorts` are short names of segments, which can happen to be plain numbers.
fn plain(text: &str, folder: &str, shorts: &[String]) -> String {
    let mut out = String::new();
    let mut word = String::new();
    let flush = |word: &mut String, out: &mut String| {
        let digits = word.chars().filter(char::is_ascii_hexdigit).count();
        let numeric = word.chars().all(|c| c.is_ascii_digit());
        // Eight hexadecimal digits and more, but no plain numbers.
        let long = digits >= 8 && !numeric && word.chars().any(|c| c.is_ascii_digit());
        match long || shorts.contains(word) {
            true => out.push('#'),
            false => out.push_str(word),
        }
        word.clear();
    };
    for c in text.replace(folder, "@").chars() {
        if c.is_ascii_hexdigit() || c == '-' {
            word.push(c);
        } else {
            flush(&mut word, &mut out);
            out.push(c);
        }
    }
    flush(&mut word, &mut out);
    let timeless = |line: &str| {
        let times = [
            "\"elapsed_ms\"",
            "\"created\"",
            "\"free\"",
            "\"used\"",
            "created ",
            " left on the file",
        ];
        let found = times.iter().find(|t| line.contains(**t));
        found.map_or_else(|| line.to_owned(), |time| format!("{time} ..."))
    };
    out.lines().map(timeless).collect::<Vec<_>>().join("\n")
}

/// Every verb, in an order that makes sense; `<` stands for what is on standard input.
const SCRIPT: &str = "
disk ls
disk ls --json
disk create a --size 8M --json
disk create a --size 8M
disk create a --size 8M --json
disk create .a --size 8M
disk create none --parent missing
disk create none --parent a
disk show a
disk show a --json
disk show missing
disk write a --offset 1000 <
disk write a --offset 4M --length 5000 --json <
disk write a --offset 8388000 <
disk write a --offset 99999999 <
disk write missing <
disk read a --offset 900 --length 70000
disk read a --offset 900 --length 70000 --json
disk read a --offset 8M --length 1
disk discard a --offset 4M --length 4096
disk discard a --offset 4M --length 4096 --json
disk discard a --offset 1 --length 4096
disk map a
disk map a --json
disk map missing
disk resize a +4M
disk resize a 2M
disk resize a 1M --json
disk resize a -1T
disk resize a 4G --json
disk resize missing 1M
disk check a
disk check a --data --json
disk check missing
disk seal a
disk seal a
disk seal missing --json
disk write a <
disk discard a --offset 0 --length 512
disk resize a 8G
disk create b --parent a
disk create c --parent a --size 5G --json
disk write b --offset 65536 <
disk compare a b
disk compare a b --json
disk compare a b --all --json
disk compare a a
disk compare a missing
disk compare b @/image.raw
disk compare @/image.raw b --all --json
disk export b @/b.raw
disk export b @/b.raw
disk export b @/b.raw --overwrite --json
disk export b @/b.qcow2 --format qcow2 --verify
disk export b @/delta.raw --diff-from a
disk export b @/delta.qcow2 --format qcow2 --diff-from a --json
disk export missing @/c.raw
disk export b @/c.raw --diff-from missing
disk compare b @/b.raw
disk compare b @/b.qcow2
disk import @/image.raw i
disk import @/image.raw i
disk import @/image.raw j --size 10G --json
disk import @/image.raw .j
disk import @/image.raw k --size 1M
disk import @/missing.raw k
disk compare i @/image.raw
disk map i --json
disk rename c d
disk rename c e
disk rename d b
disk rename d d
disk rename d .x --json
disk rm a
disk rm a --json
disk rm d
disk rm j --json
disk rm missing
disk scrub b
disk scrub b --json
disk scrub missing
disk repair b --dry-run
disk repair b
disk repair b --json
disk repair missing
disk ls
disk ls --json
store df
store df --json
";

/// The promise of the command line: who has the store is a matter of where it is done, and of
/// nothing else. Exit codes, output and messages are compared word for word.
#[test]
fn every_verb_says_the_same_with_a_daemon_and_without() {
    let sides = [Side::new(false), Side::new(true)];
    let input = noise(3, 100_000);
    for line in SCRIPT.lines().filter(|l| !l.is_empty()) {
        let (command, input) = match line.strip_suffix(" <") {
            Some(command) => (command, &input[..]),
            None => (line, &[][..]),
        };

        let before = sides.each_ref().map(Side::shorts);
        let ran = sides.each_ref().map(|side| side.run(command, input));

        let [local, remote] = [0, 1].map(|i| {
            let folder = sides[i].bench.path("").to_str().expect("a plain path").to_owned();
            let folder = folder.trim_end_matches('/').to_owned();
            let shorts = [before[i].clone(), sides[i].shorts()].concat();
            let data = command.starts_with("disk read");
            let mut out = if data { String::new() } else { plain(ran[i].text(), &folder, &shorts) };
            if command.starts_with("disk map i") {
                // Threads fill an imported disk: which extent comes first in its file is chance.
                out = out.lines().filter(|l| !l.contains("\"file_offset\"")).collect();
            }
            (ran[i].code, out, plain(&ran[i].err, &folder, &shorts))
        });
        assert_eq!(local, remote, "{line}");
        if command.starts_with("disk read") {
            assert_eq!(ran[0].out, ran[1].out, "{line}");
        }
    }
    let [local, remote] = sides;
    for file in ["b.raw", "b.qcow2", "delta.raw", "delta.qcow2"] {
        // By content: in which order clusters lie in a qcow2 file is chance.
        let [a, b] = [&local, &remote].map(|s| s.bench.arg(file));
        run(&mut offshoot(&["disk", "compare", &a, &b])).ok();
    }
    let daemon = remote.daemon.expect("it was started");
    assert!(daemon.terminate().success());
    for disk in ["a", "b", "i"] {
        remote.bench.is_clean(disk);
        assert_eq!(remote.bench.ok(&["disk", "compare", disk, disk]).code, 0);
    }
}

#[test]
fn a_daemon_is_found_by_its_store_and_by_its_socket() {
    let bench = Bench::new();
    let daemon = bench.daemon();
    let api = bench.arg("api.sock");
    bench.ok(&["disk", "create", "a", "--size", "1M"]);

    let by_option = run(&mut offshoot(&["disk", "ls", "--api", &api])).ok();
    let by_variable = run(offshoot(&["disk", "ls"]).env("OFFSHOOT_API", &api)).ok();

    assert_eq!(by_option.text(), bench.ok(&["disk", "ls"]).text());
    assert_eq!(by_variable.text(), by_option.text());
    let other = Bench::new();
    other.run(&["disk", "ls", "--api", &api]).fails(2, &["has", "--api"]);
    // A store that no daemon has is opened, whatever daemons there are.
    assert!(
        !run(other.command(&["disk", "ls"]).env("OFFSHOOT_API", &api)).ok().text().contains('a')
    );
    bench.run(&["store", "rebuild"]).fails(5, &["has it", "daemon stop"]);

    daemon.kill();

    // What it left behind stops nobody.
    assert!(bench.store().join("daemon.json").exists());
    assert_eq!(bench.ok(&["disk", "ls"]).text(), by_option.text());
    run(&mut offshoot(&["disk", "ls", "--api", &api])).fails(3, &["nobody answers"]);
}

/// A client that is killed in the middle of an import leaves nothing: neither a disk, nor a
/// segment, nor a name that is held.
#[test]
fn an_import_that_is_cut_off_leaves_nothing() {
    let bench = Bench::new();
    let daemon = bench.daemon();
    let image = noise(1, 64 << 20);
    fs::write(bench.path("image"), &image).unwrap();
    let empty = names(&bench.segments());

    for _ in 0..3 {
        let mut command = bench.command(&["disk", "import", &bench.arg("image"), "a"]);
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        offshoot_tests::until("the import runs", || {
            let jobs = daemon.json("GET", "/v1/jobs", &serde_json::Value::Null);
            let jobs = jobs.as_array().unwrap();
            jobs.iter().any(|j| j["state"] == "running" && j["done"].as_u64() > Some(0))
        });
        child.kill().unwrap();
        wait(child);
        offshoot_tests::until("the daemon noticed", || names(&bench.segments()) == empty);
        assert!(bench.disks().is_empty());
    }

    bench.ok(&["disk", "import", &bench.arg("image"), "a"]);
    assert_eq!(bench.ok(&["disk", "compare", "a", &bench.arg("image")]).code, 0);
}

/// A signal to the verb stops the job that it started, and the verb says so in the words it has for
/// a signal.
#[test]
fn a_signal_stops_the_job_of_a_verb() {
    let bench = Bench::new();
    let daemon = bench.daemon();
    bench.ok(&["disk", "create", "a", "--size", "512M"]);
    bench.feed(&["disk", "write", "a"], &vec![1; 512 << 20]).ok();
    let seal = bench.start(&["disk", "seal", "a", "--json"]);
    let job = || {
        let jobs = daemon.json("GET", "/v1/jobs", &serde_json::Value::Null);
        let jobs = jobs.as_array().expect("a list").clone();
        jobs.into_iter().find(|j| j["kind"] == "seal")
    };
    offshoot_tests::until("it sums", || job().is_some_and(|j| j["done"].as_u64() > Some(0)));

    support::signal(&seal, rustix::process::Signal::INT);

    let ran = wait(seal).fails(130, &["a signal stopped it", "seal it again"]);
    assert_eq!(ran.json()["error"]["kind"], "cancelled");
    assert_eq!(job().expect("it is kept")["state"], "cancelled");
    assert_eq!(bench.json(&["disk", "ls"])[0]["state"], "sealing");
    assert_eq!(bench.json(&["disk", "seal", "a"])["state"], "sealed");
    bench.is_clean("a");
}

/// What a killed client of `disk write` sent before its death is whole pieces, durable, and the
/// disk can be used at once.
#[test]
fn a_write_that_is_cut_off_lets_go_of_the_disk() {
    let bench = Bench::new();
    let daemon = bench.daemon();
    bench.ok(&["disk", "create", "a", "--size", "16M"]);
    let mut child = bench.start(&["disk", "write", "a"]);
    let bytes = noise(2, 2 << 20);
    child.stdin.as_mut().unwrap().write_all(&bytes).unwrap();
    offshoot_tests::until("two pieces were written", || {
        let jobs = daemon.json("GET", "/v1/jobs", &serde_json::Value::Null);
        jobs.as_array().unwrap().iter().any(|j| j["done"] == 2 * MIB)
    });

    child.kill().unwrap();
    wait(child);

    assert_eq!(bench.read("a", 0, 2 * MIB), bytes);
    bench.is_clean("a");
    daemon.kill();
    assert_eq!(bench.read("a", 0, 2 * MIB), bytes);
}
