//! What payload guests show under this machine's own KVM they show under a stock one as well: the
//! same program, with the same guests in it, comes to the same sums under both. (F-l, D-k.)

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::{fs, io};

use offshoot_tests::daemon::program;
use offshoot_tests::lab::{Lab, play, stripped};
use offshoot_tests::payload::available;

const PROGRAM: &str = "lab_payload";

/// A lab, and what the program said there.
struct Tier {
    lab: Lab,
    said: String,
}

impl Tier {
    fn run(&mut self, command: &str) -> String {
        let (code, said) = self.lab.try_run(command);
        println!("{said}");
        self.said = said;
        assert_eq!(code, 0, "in the lab: {command}: {}", self.said);
        self.said.clone()
    }

    /// A machine that faults there shows in what the program says.
    fn spoiled(&mut self) -> Option<String> {
        if !self.lab.is_running() {
            return Some("the emulator has ended".to_owned());
        }
        let fault = self.said.lines().find(|line| line.contains("triple-fault"))?;
        Some(format!("a machine triple-faulted in the lab: {fault}"))
    }
}

/// What the program prints on this machine.
fn here() -> io::Result<String> {
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join(PROGRAM);
    fs::write(&copy, stripped(&program(PROGRAM)))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    let output = Command::new(copy).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    println!("{said}");
    assert!(output.status.success(), "on this machine: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Every check runs on this machine and in the lab, and comes to the same. In the lab, whose
/// processor leaves it to KVM, guests see the features and the time that forkd means them to see.
#[test]
fn one_program_comes_to_the_same_under_both() {
    let test = "vm_tiers::one_program_comes_to_the_same_under_both";
    if !available(test) {
        return;
    }
    let here = here().expect("the program runs");
    println!("{here}");
    let start = || Lab::bare(&[PROGRAM]).map(|lab| Tier { lab, said: String::new() });
    play(test, start, Tier::spoiled, |tier| {
        // What it says of time is for people; and why it failed, if it did.
        let said = tier.run(&format!("{PROGRAM} 2>/run/said || {{ cat /run/said; false; }}"));
        tier.run("cat /run/said");
        assert_eq!(said, here, "the program came to something else in the lab");
        tier.run(&format!("{PROGRAM} exact"));
    });
}
