//! Machines in the lab, by the command line.

use std::collections::{BTreeMap, BTreeSet};

use offshoot_tests::lab::{Lab, play};
use serde_json::Value;

use crate::PROGRAMS;

/// Plays `scenario` in a lab: see [`play`].
pub fn in_a_lab(test: &str, scenario: impl Fn(&mut Machines)) {
    play(test, || Lab::start(&PROGRAMS).map(Machines::new), Machines::spoiled, scenario);
}

/// The daemons of a lab, and what runs there.
pub struct Machines {
    pub lab: Lab,
    forked: BTreeSet<String>,
    consoles: BTreeMap<String, String>,
}

const OFFSHOOT: &str = "offshoot --store /run/store --forkd /run/forkd.sock";

impl Machines {
    /// Starts the daemons, with two disks: a system, and one to count on.
    fn new(mut lab: Lab) -> Machines {
        let create = format!("{OFFSHOOT} disk create");
        lab.run(&format!(
            "{OFFSHOOT} init && {OFFSHOOT} disk import /lab/system root && rm /lab/system && \
             {create} count --size 1M && \
             (blockd --store /run/store --api /run/blockd.sock >/run/blockd.log 2>&1 & \
              forkd --state /run/forkd --blockd /run/blockd.sock --api /run/forkd.sock \
                --pool-size 1 >/run/forkd.log 2>&1 &) && \
             until [ -S /run/blockd.sock ] && [ -S /run/forkd.sock ]; do sleep 0.1; done"
        ));
        Machines { lab, forked: BTreeSet::new(), consoles: BTreeMap::new() }
    }

    /// How a fault of the emulator has spoiled the lab, if one has.
    fn spoiled(&mut self) -> Option<String> {
        if !self.lab.is_running() {
            return Some("the emulator has ended".to_owned());
        }
        if self.lab.try_run("[ -S /run/forkd.sock ]").0 != 0 {
            return Some("the kernel of the lab has crashed, and booted again".to_owned());
        }
        let vms = self.verb("vm ls").as_array().expect("machines").clone();
        let faulted = vms.iter().find(|vm| vm["end"]["reason"] == "triple-fault")?;
        Some(format!("{} triple-faulted in the lab", faulted["name"]))
    }

    /// Runs a verb and returns what it says as JSON.
    fn verb(&mut self, words: &str) -> Value {
        let (code, said) = self.lab.try_run(&format!("{OFFSHOOT} --json {words}"));
        if code != 0 {
            let logs = self.lab.run("tail -n 20 /run/forkd.log /run/blockd.log; dmesg | tail -n 5");
            panic!("{words}: {said}\n{logs}");
        }
        serde_json::from_str(&said).unwrap_or_else(|e| panic!("{words}: {e}: {said}"))
    }

    /// Boots a machine from the one disk, with the other.
    pub fn run(&mut self, name: &str) {
        self.run_with(name, "");
    }

    /// The same with what else the options say.
    pub fn run_with(&mut self, name: &str, options: &str) {
        self.verb(&format!(
            "vm run {name} {options} --kernel /lab/kernel --initrd /lab/initramfs --mem 160M \
             --disk root --disk count \
             --cmdline \"console=ttyS0 root=/dev/vda pci=off panic=-1 quiet \
             mitigations=off nokaslr\""
        ));
    }

    /// Forks a machine.
    pub fn fork(&mut self, parent: &str, children: &[&str]) {
        let said = self.verb(&format!("vm fork {parent} {}", children.join(" ")));
        println!("{said}");
        self.forked.extend(children.iter().map(|c| (*c).to_owned()));
    }

    /// Writes a machine to files.
    pub fn snapshot(&mut self, name: &str, path: &str) {
        println!("{}", self.verb(&format!("vm snapshot {name} {path}")));
    }

    /// Makes a machine of files.
    pub fn restore(&mut self, path: &str, name: &str) {
        self.verb(&format!("vm restore {path} {name}"));
        self.forked.insert(name.to_owned());
    }

    /// Stops a machine, which has some seconds to turn itself off, and says how it ended.
    pub fn stop(&mut self, name: &str, seconds: u32) -> String {
        let vm = self.verb(&format!("vm stop {name} --timeout {seconds}"));
        vm["end"]["reason"].as_str().expect("a reason").to_owned()
    }

    /// Everything about a machine.
    pub fn show(&mut self, name: &str) -> Value {
        self.verb(&format!("vm show {name}"))
    }

    /// Runs a line of shell in a machine and returns what it wrote.
    pub fn ask(&mut self, name: &str, command: &str) -> String {
        let (code, said) = self.try_ask(name, command);
        if code != 0 {
            let logs = self.lab.run("tail -n 20 /run/forkd.log /run/blockd.log");
            panic!("{name}: {command}: {code} {said}\n{logs}\n{:#}", self.show(name));
        }
        said
    }

    /// As [`Machines::ask`], whatever comes of it: exit code and output.
    pub fn try_ask(&mut self, name: &str, command: &str) -> (i32, String) {
        if !self.consoles.contains_key(name) {
            let console = self.show(name)["console"].as_str().expect("a console").to_owned();
            self.consoles.insert(name.to_owned(), console);
        }
        let console = &self.consoles[name];
        let forked = if self.forked.contains(name) { "--forked" } else { "" };
        self.lab.try_run(&format!("lab_console {forked} {console} '{command}'"))
    }

    /// Has a machine turn itself off.
    pub fn turn_off(&mut self, name: &str) {
        // The console goes with the machine.
        self.try_ask(name, "sync; poweroff -f");
        let end = (0..100).find_map(|_| {
            self.lab.run("sleep 0.1");
            self.show(name)["end"]["reason"].as_str().map(str::to_owned)
        });
        assert_eq!(end.as_deref(), Some("power-off"), "{name}");
    }
}
