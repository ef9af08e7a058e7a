//! What `README.md` shows is what happens: its console blocks are run, one after the other, in one
//! shell and an empty folder, and every command has to print what stands below it.
//!
//! Rules for who edits the README:
//! - A `console` block is a list of `$ command` lines, each with its output below. All blocks share
//!   one shell: a variable set in one is there in the next.
//! - A command has to succeed, unless the next one is `echo $?`.
//! - Identities, absolute paths, numbers of processes and milliseconds may differ from run to
//!   run, and so may sizes in KiB and MiB, which depend on the host's file system. White space is
//!   compared as one blank.

#[allow(dead_code)] // Each test file uses a part of it.
mod support;

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use offshoot_tests::daemon::program;
use offshoot_tests::mount::have;
use offshoot_tests::store::Leftovers;
use support::OFFSHOOT;

/// A command of the README and what it prints there.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    command: String,
    output: Vec<String>,
}

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

fn readme() -> String {
    fs::read_to_string(top().join("README.md")).expect("there is a README")
}

/// The steps of all console blocks.
fn steps(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if let (true, Some(command)) = (inside, line.strip_prefix("$ ")) {
            steps.push(Step { command: command.to_owned(), output: Vec::new() });
        } else if inside {
            let step = steps.last_mut().expect("a block starts with a command");
            step.output.push(line.to_owned());
        }
    }
    steps
}

/// A script that runs all steps and leaves output and exit code of number n in `n.out`, `n.code`.
fn script(steps: &[Step], results: &Path) -> String {
    let results = results.display();
    // Within `step`, `$?` is still that of the step before.
    let mut script = String::from("step() { eval \"$1\"; }\n");
    for (n, step) in steps.iter().enumerate() {
        let quoted = step.command.replace('\'', r"'\''");
        script += &format!("step '{quoted}' >'{results}/{n}.out' 2>&1\n");
        // To write the exit code down must not change it for the next step.
        script += &format!("code=$?; echo $code >'{results}/{n}.code'; (exit $code)\n");
    }
    script
}

fn is_identity(word: &str) -> bool {
    let parts: Vec<_> = word.split('-').map(str::len).collect();
    parts == [8, 4, 4, 4, 12] && word.chars().all(|c| c == '-' || c.is_ascii_hexdigit())
}

/// A line without what may differ from run to run.
fn plain(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let unit = |word: Option<&&str>| {
        word.is_some_and(|w| matches!(w.trim_end_matches([',', ';', ':']), "KiB" | "MiB"))
    };
    let shown = words.iter().enumerate().map(|(i, word)| {
        if is_identity(word) {
            "<identity>"
        } else if word.starts_with('/') {
            if word.ends_with(':') { "<path>:" } else { "<path>" }
        } else if i > 0 && words[i - 1] == "process" {
            "<process>"
        } else if words.get(i + 1).is_some_and(|w| w.trim_end_matches(',') == "ms") {
            "<time>"
        } else if word.parse::<f64>().is_ok() && unit(words.get(i + 1)) {
            "<size>"
        } else if unit(Some(word)) {
            "<unit>"
        } else {
            word
        }
    });
    shown.collect::<Vec<_>>().join(" ")
}

fn compare(steps: &[Step], results: &Path) {
    for (n, step) in steps.iter().enumerate() {
        let read = |what: &str| fs::read_to_string(results.join(format!("{n}.{what}")));
        let (found, code) = (read("out").expect("it ran"), read("code").expect("it ended"));
        let wanted: Vec<_> = step.output.iter().map(|l| plain(l)).collect();
        let printed: Vec<_> = found.lines().map(plain).collect();
        assert_eq!(printed, wanted, "`{}` prints now:\n{found}", step.command);
        let asked = steps.get(n + 1).is_some_and(|next| next.command == "echo $?");
        assert!(asked || code.trim() == "0", "`{}` ends with {code}", step.command);
    }
}

#[test]
fn console_blocks_print_what_they_show() {
    if !have("readme::console_blocks_print_what_they_show", &["bash", "qemu-img"]) {
        return;
    }
    let steps = steps(&readme());
    assert!(steps.len() > 10, "the tour is gone");
    let place = tempfile::tempdir().expect("a folder");
    let at = |name: &str| {
        let dir = place.path().join(name);
        fs::create_dir(&dir).expect("a folder");
        dir
    };
    let (bin, work, results) = (at("bin"), at("work"), at("results"));
    symlink(OFFSHOOT, bin.join("offshoot")).expect("a link");
    symlink(program("blockd"), bin.join("blockd")).expect("a link");
    let _leftovers = Leftovers(work.join("store"));
    let inherited = env::var("PATH").unwrap_or_default();

    let status = Command::new("bash")
        .args(["-c", &script(&steps, &results)])
        .env("PATH", format!("{}:{inherited}", bin.display()))
        .env_remove("OFFSHOOT_STORE")
        .current_dir(&work)
        .stdin(Stdio::null())
        .status()
        .expect("a shell");

    assert!(status.success(), "the last step ends with {status}");
    compare(&steps, &results);
}

/// `make x` is written down only where the Makefile has `x`.
#[test]
fn the_targets_it_names_are_in_the_makefile() {
    let makefile = fs::read_to_string(top().join("Makefile")).expect("there is a Makefile");
    let text = readme();
    let in_prose = text.split("`make ").skip(1);
    let named: Vec<_> = in_prose
        .chain(text.lines().filter_map(|line| line.strip_prefix("make ")))
        .map(|rest| rest.split(|c: char| !c.is_ascii_lowercase()).next().unwrap_or_default())
        .collect();
    assert!(named.len() >= 2, "{named:?}");
    for target in named {
        let there = makefile.lines().any(|l| l.starts_with(&format!("{target}:")));
        assert!(there, "the README names `make {target}`, the Makefile does not have it");
    }
}

#[test]
fn a_changed_output_is_noticed() {
    let text =
        "```console\n$ echo a 5 KiB\na 6 KiB\n$ false\n$ echo $?\n1\n```\n$ no\n```sh\nx\n```\n";
    let found = steps(text);
    let expected = [("echo a 5 KiB", vec!["a 6 KiB"]), ("false", vec![]), ("echo $?", vec!["1"])];
    let expected = expected.map(|(command, output)| Step {
        command: command.into(),
        output: output.into_iter().map(str::to_owned).collect(),
    });
    assert_eq!(found, expected);

    assert_eq!(plain("a  5.5 KiB, b"), plain("a 70 MiB, b"));
    assert_ne!(plain("a 5 GiB"), plain("a 6 GiB"));
    assert_ne!(plain("at 4096"), plain("at 8192"));
    let id = "de14f07d-f482-48fd-b7da-3945b4c49a3f";
    assert_eq!(plain(id), "<identity>");
}
