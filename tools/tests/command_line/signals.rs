//! Signals to a verb at work.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;

use super::support::{Bench, names, noise, signal, until, wait};
use super::{MIB, error};

#[test]
fn a_signal_ends_a_waiting_write_and_keeps_what_came_before() {
    use std::io::Write as _;
    let bench = Bench::new();
    bench.ok(&["disk", "create", "a", "--size", "16M"]);
    let bytes = noise(1, 3 << 20);
    for (which, name) in [(Signal::INT, "int"), (Signal::TERM, "term"), (Signal::HUP, "hup")] {
        let mut child = bench.start(&["disk", "write", "a", "--json"]);
        let mut pipe = child.stdin.take().unwrap();
        pipe.write_all(&bytes).unwrap();
        // All but the last pipeful was taken by the verb; give it the time to write that.
        std::thread::sleep(Duration::from_millis(300));

        signal(&child, which);
        let ran = wait(child).fails(130, &["cannot write disk a", "signal"]);

        assert_eq!(error(&ran)["kind"], "cancelled", "{name}");
        assert!(bench.read("a", 0, 2 * MIB) == bytes[..2 << 20], "{name}");
        assert_eq!(bench.json(&["disk", "show", "a"])["attached"], "no", "closed in order");
        bench.is_clean("a");
    }
}

/// Runs a verb until a signal, sent as soon as `begun` holds, ends it; it may be done before.
fn interrupted(bench: &Bench, args: &[&str], begun: impl Fn() -> bool, undo: impl Fn()) {
    for _ in 0..20 {
        let mut child = bench.start(args);
        drop(child.stdin.take());
        let mut early = false;
        until("it begins", || {
            early = child.try_wait().unwrap().is_some();
            early || begun()
        });
        if !early {
            signal(&child, Signal::INT);
        }
        let ran = wait(child);
        if ran.code == 0 {
            undo();
            continue;
        }
        ran.fails(130, &["cannot", "signal"]);
        return;
    }
    panic!("{args:?} was always faster than the signal");
}

#[test]
fn a_signal_leaves_nothing_of_an_import_or_an_export() {
    let bench = Bench::new();
    // Stored zeroes take the time that it takes to read them, and no space in the store.
    fs::write(bench.path("big"), vec![0; 400 << 20]).unwrap();
    let (from, to) = (bench.arg("big"), bench.arg("out"));

    let import = ["disk", "import", &from, "a"];
    let begun = || !bench.files(".new").is_empty();
    interrupted(&bench, &import, begun, || drop(bench.ok(&["disk", "rm", "a"])));
    assert_eq!(bench.disks(), [""; 0]);
    assert_eq!((bench.files(".new").len(), bench.files(".seg").len()), (0, 0));

    bench.ok(&["disk", "create", "b", "--size", "256M"]);
    bench.write("b", 0, &noise(1, 128 << 20));
    let before = names(&bench.path("")).len();
    let export = ["disk", "export", "b", &to];
    let begun = || names(&bench.path("")).len() > before;
    interrupted(&bench, &export, begun, || fs::remove_file(&to).unwrap());
    assert_eq!(names(&bench.path("")).len(), before);
}
