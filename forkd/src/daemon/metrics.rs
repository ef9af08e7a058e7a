//! Numbers: of each machine, and of the daemon for Prometheus, in its text format 0.0.4.

use std::fs;

use blockd::daemon::Page;
use format::Result;

use super::Daemon;
use super::net;
use super::table::Machine;
use crate::api::types::{NetCounts, VmState, VmStats};
use crate::process::wire::Ask;

/// Nanoseconds of a tick of the kernel's accounting, which Linux fixes for programs.
const TICK_NS: u64 = 10_000_000;

/// What the host says about a process.
#[derive(Debug, Default, PartialEq, Eq)]
struct Use {
    private: u64,
    shared: u64,
    proportional: u64,
    faults: u64,
    cpu_ns: u64,
}

impl Daemon {
    /// What machines use of the host; those that have ended use nothing.
    #[must_use]
    pub fn stats(&self) -> Vec<VmStats> {
        self.table.all().iter().map(|m| stats_of(m)).collect()
    }

    /// The numbers of now.
    ///
    /// # Errors
    /// None so far.
    pub fn metrics(&self) -> Result<String> {
        let mut page = Page::default();
        page.family("forkd_build_info", "gauge", "Always 1; the label is the version.");
        page.value("forkd_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        page.family("forkd_start_time_seconds", "gauge", "Start, in seconds since 1970.");
        page.value("forkd_start_time_seconds", &[], self.started);
        page.family("forkd_unfinished", "gauge", "Things to be removed that were not yet.");
        page.value("forkd_unfinished", &[], self.janitor.pending());
        let stats = self.stats();
        page.family("forkd_vms", "gauge", "Machines by state.");
        for state in [VmState::Running, VmState::Paused, VmState::Ended] {
            let count = stats.iter().filter(|vm| vm.state == state).count();
            page.value("forkd_vms", &[("state", state.name())], count);
        }
        self.pool_metrics(&mut page);
        let forks = self.forks.snapshot();
        page.family("forkd_forks_total", "counter", "Forks by outcome.");
        page.value("forkd_forks_total", &[("outcome", "done")], forks.done);
        page.value("forkd_forks_total", &[("outcome", "failed")], forks.failed);
        page.family("forkd_children_total", "counter", "Children that were made.");
        page.value("forkd_children_total", &[], forks.children);
        page.family("forkd_fork_pause_us_total", "counter", "Microseconds that parents stood.");
        page.value("forkd_fork_pause_us_total", &[], forks.pause_us);
        for (name, kind, help, get) in NUMBERS {
            page.family(name, kind, help);
            for vm in stats.iter().filter(|vm| vm.state != VmState::Ended) {
                page.value(name, &[("vm", &vm.name)], get(vm));
            }
        }
        for (name, help, get) in NET_NUMBERS {
            page.family(name, "counter", help);
            for vm in stats.iter() {
                if let Some(net) = &vm.net {
                    page.value(name, &[("vm", &vm.name)], get(&net.counts));
                }
            }
        }
        Ok(page.text())
    }

    fn pool_metrics(&self, page: &mut Page) {
        page.family("forkd_pool_ready", "gauge", "Shells that are ready.");
        for class in self.pool.classes() {
            let (memory, vcpus) = (class.memory_bytes.to_string(), class.vcpus.to_string());
            let labels = [("memory_bytes", memory.as_str()), ("vcpus", vcpus.as_str())];
            page.value("forkd_pool_ready", &labels, class.ready);
        }
        let counts = self.pool.counts();
        page.family("forkd_pool_taken_total", "counter", "Shells by where they came from.");
        page.value("forkd_pool_taken_total", &[("from", "pool")], counts.hits);
        page.value("forkd_pool_taken_total", &[("from", "made")], counts.misses);
    }
}

/// A number of a machine: name, kind, what it says, how to get it.
type Number = (&'static str, &'static str, &'static str, fn(&VmStats) -> u64);

const NUMBERS: [Number; 6] = [
    ("forkd_vm_private_bytes", "gauge", "Memory that only this machine uses.", |v| v.private_bytes),
    ("forkd_vm_shared_bytes", "gauge", "Memory that it shares.", |v| v.shared_bytes),
    ("forkd_vm_proportional_bytes", "gauge", "Its share of both.", |v| v.proportional_bytes),
    ("forkd_vm_faults_total", "counter", "Page faults without I/O.", |v| v.faults),
    ("forkd_vm_exits_total", "counter", "Times that processors left the guest.", |v| v.exits),
    ("forkd_vm_cpu_ns_total", "counter", "Nanoseconds of processor time.", |v| v.cpu_ns),
];

/// A number of a network card: name, what it says, how to get it.
type NetNumber = (&'static str, &'static str, fn(&NetCounts) -> u64);

const NET_NUMBERS: [NetNumber; 6] = [
    ("forkd_vm_net_received_frames_total", "Frames that it received.", |c| c.received_frames),
    ("forkd_vm_net_received_bytes_total", "Their bytes.", |c| c.received_bytes),
    ("forkd_vm_net_sent_frames_total", "Frames that it sent.", |c| c.sent_frames),
    ("forkd_vm_net_sent_bytes_total", "Their bytes.", |c| c.sent_bytes),
    ("forkd_vm_net_dropped_total", "Frames that went nowhere.", |c| c.dropped),
    ("forkd_vm_net_broken_total", "Times that its driver broke a ring.", |c| c.broken),
];

fn stats_of(machine: &Machine) -> VmStats {
    let state = machine.state();
    let process = machine.process.as_ref().filter(|_| state != VmState::Ended);
    // One that ended this moment uses nothing.
    let used = process.map_or_else(Use::default, |p| use_of(p.pid));
    VmStats {
        name: machine.is.name.clone(),
        state,
        private_bytes: used.private,
        shared_bytes: used.shared,
        proportional_bytes: used.proportional,
        faults: used.faults,
        // One that stands for a debugger, or ends, says none.
        exits: process.and_then(|p| p.ask_aside(&Ask::Exits).ok()).unwrap_or(0),
        cpu_ns: used.cpu_ns,
        net: net::status(machine),
    }
}

fn use_of(pid: u32) -> Use {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let rollup = read("smaps_rollup");
    let kib = |key: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let (faults, cpu_ns) = faults_and_time(&read("stat")).unwrap_or_default();
    Use {
        private: (kib("Private_Clean") + kib("Private_Dirty")) << 10,
        shared: (kib("Shared_Clean") + kib("Shared_Dirty")) << 10,
        proportional: kib("Pss") << 10,
        faults,
        cpu_ns,
    }
}

/// From a line of `/proc/PID/stat`.
fn faults_and_time(line: &str) -> Option<(u64, u64)> {
    // The name of the program, in brackets, may be anything.
    let (_, rest) = line.rsplit_once(')')?;
    // The first one is field 3, the state.
    let field = |n: usize| rest.split_whitespace().nth(n - 3)?.parse::<u64>().ok();
    Some((field(10)?, (field(14)? + field(15)?) * TICK_NS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_something() {
        let used = use_of(std::process::id());

        assert!(used.private > 0 && used.proportional > 0 && used.faults > 0, "{used:?}");
    }

    #[test]
    fn a_program_may_be_called_anything() {
        let line = "7 (a) b) S 1 7 7 0 -1 4194560 1500 0 3 0 20 30 0 0 20 0 4 0";

        assert_eq!(faults_and_time(line), Some((1500, 50 * TICK_NS)));
        assert_eq!(faults_and_time("7 (a"), None);
    }
}
