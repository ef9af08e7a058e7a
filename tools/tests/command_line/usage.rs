//! What has nothing to do with a disk: stores, help, completions, and words that make no sense.

use std::fs;

use serde_json::json;

use super::support::{Bench, names, offshoot, run, sparse, wait};
use super::{MIB, error, has_fields};

#[test]
fn init_makes_a_store_once_and_only_in_an_empty_folder() {
    let bench = Bench::new();
    let other = bench.arg("other");

    let made = run(&mut offshoot(&["init", "--json", "-s", &other, "--tail-dir", "/dev/shm/x"]));

    let made = made.ok().json();
    has_fields(&made, &["path", "version", "store", "tail_dir"]);
    assert_eq!((&made["path"], &made["tail_dir"]), (&json!(other), &json!("/dev/shm/x")));
    bench.run(&["init"]).fails(4, &["it is a store already"]);
    let busy = bench.path("busy");
    fs::create_dir(&busy).unwrap();
    fs::write(busy.join("letter"), "dear").unwrap();
    let refused = run(offshoot(&["init", "--json", "--store"]).arg(&busy)).fails(4, &["letter"]);
    assert_eq!(error(&refused)["kind"], "exists");
    assert_eq!(names(&busy), ["letter"]);
}

#[test]
fn a_store_must_be_named_and_be_one() {
    let bench = Bench::new();

    run(&mut offshoot(&["disk", "ls"])).fails(2, &["--store", "OFFSHOOT_STORE"]);
    let missing = bench.arg("missing");
    let refused = run(&mut offshoot(&["disk", "ls", "--json", "--store", &missing]));
    let told = error(&refused.fails(3, &["it is not a store", "init"]));
    assert_eq!(told["kind"], "not-found");
    assert_eq!(told["object"], format!("store {missing}"));
    let by_environment = run(offshoot(&["disk", "ls"]).env("OFFSHOOT_STORE", bench.store()));
    assert!(by_environment.ok().text().starts_with("NAME"));
}

#[test]
fn a_command_line_that_makes_no_sense_is_exit_code_2() {
    let bench = Bench::new();

    for args in [
        &["disk", "frobnicate"][..],
        &["disk", "create", "a"],
        &["disk", "create", "a", "--size", "12 apples"],
        &["disk", "export", "a", "b", "--format", "vmdk"],
        &["disk", "discard", "a"],
        &[],
    ] {
        let ran = bench.run(args);
        assert_eq!((ran.code, ran.out.len()), (2, 0), "{ran:?}");
        let ran = bench.run(&[args, &["--json"]].concat());
        assert_eq!((ran.code, &ran.json()["error"]["kind"]), (2, &json!("invalid")), "{ran:?}");
    }
    for (args, words) in [
        (&["disk", "create", ".a", "--size", "1M"][..], "letters"),
        (&["disk", "create", "a", "--size", "1023k"], "1 MiB"),
        (&["disk", "create", "a", "--size", "1048577"], "512"),
        (&["disk", "create", "a", "--size", "1M", "--journal", "100k"], "64 KiB"),
    ] {
        bench.run(args).fails(2, &[words]);
    }
    assert_eq!(bench.disks(), [""; 0]);
}

#[test]
fn every_verb_explains_itself_with_examples() {
    let disk = "import create fork mode commit undo ls show map rm resize seal rename export \
                compare check repair scrub read write discard attach export-nbd detach limits \
                resume";
    let disk = disk.split_whitespace().map(|verb| vec!["disk", verb]);
    let vm = "run ls show console pause resume fork stop rm stats status";
    let vm = vm.split_whitespace().map(|verb| vec!["vm", verb]);
    let others = [
        "init",
        "store rebuild",
        "store df",
        "completions",
        "daemon start",
        "daemon status",
        "daemon stop",
        "job ls",
        "job watch",
        "job cancel",
        "events",
        "top",
    ];
    let others = others.map(|verb| verb.split(' ').collect());
    for verb in disk.chain(vm).chain(others) {
        for help in ["--help", "-h"] {
            let ran = run(&mut offshoot(&[&verb[..], &[help]].concat())).ok();
            let text = ran.text();
            assert!(text.contains("Examples:\n  offshoot"), "{verb:?}: {text}");
            assert!(text.contains("--json"), "{verb:?}");
        }
    }
    let all = run(&mut offshoot(&["--help"])).ok();
    for word in ["Exit codes", "OFFSHOOT_STORE", "tail-lost", "Examples:"] {
        assert!(all.text().contains(word), "{word}");
    }
    assert!(run(&mut offshoot(&["--version"])).ok().text().starts_with("offshoot "));
}

#[test]
fn completions_are_scripts() {
    for (shell, word) in [("bash", "complete"), ("zsh", "#compdef"), ("fish", "complete -c")] {
        let script = run(&mut offshoot(&["completions", shell])).ok();
        assert!(script.text().contains(word), "{shell}");
        let told = run(&mut offshoot(&["completions", shell, "--json"])).ok().json();
        assert_eq!(told, json!({"shell": shell, "script": script.text()}));
    }
    assert_eq!(run(&mut offshoot(&["completions", "ed"])).code, 2);
}

#[test]
fn quiet_verbs_say_nothing_but_what_was_asked_for() {
    let bench = Bench::new();
    sparse(&bench.path("in"), MIB, &[(0, b"x")]);
    let (from, to) = (bench.arg("in"), bench.arg("out"));
    for args in [
        &["disk", "import", &from, "a"][..],
        &["disk", "export", "a", &to],
        &["disk", "compare", "a", &to],
        &["disk", "check", "a"],
        &["disk", "resize", "a", "2M"],
        &["disk", "rename", "a", "b"],
        &["disk", "seal", "b"],
        &["disk", "scrub", "b"],
        &["disk", "rm", "b"],
    ] {
        let ran = bench.ok(&[args, &["--quiet"]].concat());
        assert_eq!((ran.text(), ran.err.as_str()), ("", ""), "{args:?}");
    }
    assert!(bench.ok(&["disk", "ls", "--quiet"]).text().starts_with("NAME"));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "64M"]);
    bench.write("a", MIB, b"data");
    for args in [
        &["disk", "read", "a"][..],
        &["disk", "map", "a"],
        &["disk", "map", "a", "--json"],
        &["disk", "show", "a", "--json"],
        &["completions", "bash"],
        &["--help"],
    ] {
        let mut child = bench.start(args);
        drop(child.stdout.take());
        drop(child.stdin.take());
        let ran = wait(child);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{args:?}");
    }
}
