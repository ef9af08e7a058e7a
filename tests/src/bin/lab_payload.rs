//! What payload guests show, one line a check: `lab_payload [exact]`.
//!
//! The first line is a sum of this program, guests included. A line `NAME SUM` follows for each
//! check of `offshoot_tests::payload::checks`, which does not depend on the machine or on time; so
//! whoever runs the program twice, under different KVMs, can compare what it prints. With `exact`
//! it does the checks that hold on some machines only. The first one that fails ends it, with a
//! panic.

use std::process::ExitCode;
use std::time::Instant;

use offshoot_tests::payload::checks::{ALL, EXACT};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let checks = match words[..] {
        [] => &ALL[..],
        ["exact"] => &EXACT[..],
        _ => {
            eprintln!("[exact]");
            return ExitCode::from(2);
        }
    };
    let program = std::fs::read("/proc/self/exe").expect("this program can be read");
    println!("program {}", blake3::hash(&program).to_hex());
    for (name, check) in checks {
        let start = Instant::now();
        println!("{name} {}", check());
        eprintln!("{name}: {:.2} s", start.elapsed().as_secs_f64());
    }
    ExitCode::SUCCESS
}
