//! The kept corpus: replayed without a fuzz engine, so that an input that once broke a target is
//! tried in every plain `cargo test`.
//!
//! Files called `seed-*` are made from valid structures by the targets themselves; they must be
//! what today's code makes, or the corpus would quietly stop reaching behind the first check. After
//! a wanted change of the format: `OFFSHOOT_WRITE_SEEDS=1 cargo test -p offshoot-fuzz kept_seeds`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use offshoot_fuzz::{TARGETS, Target};

const INPUT_BYTES_MAX: u64 = 64 << 10;
/// Mutated inputs from one seed, at most; the fuzz engine tries far more.
const MUTATIONS_MAX: usize = 500;

fn corpus(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries.map(|e| e.expect("a readable directory").path()).collect()
}

#[test]
fn every_kept_input_is_handled() {
    for target in TARGETS {
        let files = files(&corpus(&target));
        assert!(!files.is_empty(), "{} has no corpus", target.name);
        for file in files {
            let input = fs::read(&file).expect("a readable input");
            println!("{}", file.display());
            (target.run)(&input);
        }
    }
}

#[test]
fn seeds_get_as_far_as_their_names_say() {
    for target in TARGETS {
        for (name, seed) in (target.seeds)() {
            let refused = name.starts_with("refused-");
            assert_eq!((target.run)(&seed), !refused, "{} {name}", target.name);
        }
    }
}

#[test]
fn every_mutated_seed_is_handled() {
    for target in TARGETS {
        for (_, seed) in (target.seeds)() {
            for at in (0..seed.len()).step_by(seed.len() / MUTATIONS_MAX + 1) {
                let mut input = seed.clone();
                input[at] ^= 1 << (at % 8);
                (target.run)(&input);
                (target.run)(&seed[..at]);
            }
        }
    }
}

#[test]
fn kept_seeds_are_what_todays_code_makes() {
    for target in TARGETS {
        let dir = corpus(&target);
        let seeds = (target.seeds)();
        if std::env::var_os("OFFSHOOT_WRITE_SEEDS").is_some() {
            fs::create_dir_all(&dir).expect("a writable corpus");
            for (name, seed) in &seeds {
                fs::write(dir.join(format!("seed-{name}")), seed).expect("a writable corpus");
            }
        }
        for (name, seed) in &seeds {
            let path = dir.join(format!("seed-{name}"));
            let kept = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(kept == *seed, "{} is out of date: see the head of this file", path.display());
        }
    }
}

#[test]
fn the_corpus_holds_small_inputs_of_known_targets_only() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let known: BTreeSet<PathBuf> = TARGETS.iter().map(corpus).collect();

    let found: BTreeSet<PathBuf> = files(&top).into_iter().collect();

    assert_eq!(found, known);
    for file in known.iter().flat_map(|dir| files(dir)) {
        let length = fs::metadata(&file).expect("a readable input").len();
        assert!(length <= INPUT_BYTES_MAX, "{} has {length} bytes", file.display());
    }
}
