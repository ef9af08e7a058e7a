//! `vm …`: machines, by the daemon that has them.

use std::path::{Path, PathBuf, absolute};

use forkd::api::types::{
    DiskPath, ForkVm, ForkedVms, Health, NetStatus, RemovedVm, RunVm, Vm, VmDisk, VmNet, VmState,
    VmStats,
};
use format::{Error, Result};

use super::{Session, console, events, snapshots};
use crate::cli::{self, VmName, VmVerb};
use crate::client::{Client, FORKD, path_of};
use crate::output::{Outcome, Table, Verdict, fields, utc};
use crate::size::show;

/// Where forkd listens unless it is told otherwise.
const USUAL_SOCKET: &str = "/run/offshoot/forkd.sock";

impl Session {
    /// The daemon that has the machines.
    pub(super) fn forkd(&self) -> Result<Client> {
        let socket = self.global.forkd.clone().unwrap_or_else(|| USUAL_SOCKET.into());
        Client::open_to(&FORKD, &socket, self.out)
    }
}

pub(super) fn path(name: &str, what: &str) -> String {
    path_of("/v1/vms/", name, what)
}

/// Does what is asked for.
pub fn vm(s: &Session, verb: &VmVerb) -> Outcome {
    match verb {
        VmVerb::Run(args) => run(s, args),
        VmVerb::Ls => ls(s),
        VmVerb::Show(args) => show_vm(s, args),
        VmVerb::Console(args) => attach(s, &args.name),
        VmVerb::Pause(args) => change(s, args, "pause", "paused"),
        VmVerb::Resume(args) => change(s, args, "resume", "resumed"),
        VmVerb::Fork(args) => fork(s, args),
        VmVerb::Snapshot(args) => snapshots::take(s, args),
        VmVerb::Restore(args) => snapshots::restore(s, args),
        VmVerb::SnapshotRm(args) => snapshots::rm(s, args),
        VmVerb::Stop(args) => stop(s, args),
        VmVerb::Rm(args) => rm(s, args),
        VmVerb::Stats => stats(s),
        VmVerb::Status => status(s),
        VmVerb::Events(args) => events::of_forkd(s, args),
    }
}

fn run(s: &Session, args: &cli::RunVm) -> Outcome {
    let whole = |path: &Path| -> Result<PathBuf> { Ok(absolute(path)?) };
    let request = RunVm {
        name: args.name.clone(),
        kernel: whole(&args.kernel)?,
        initrd: args.initrd.as_deref().map(whole).transpose()?,
        cmdline: args.cmdline.clone(),
        disks: args.disks.clone(),
        net: args.net.clone(),
        memory_bytes: args.mem,
        vcpus: args.cpus,
        paused: args.paused,
    };
    let vm: Vm = s.forkd()?.post("/v1/vms".into(), &request)?;
    s.out
        .confirm(&vm, || format!("vm {} is {}: process {}", vm.name, vm.state.name(), pid(&vm)))?;
    if args.console { attach(s, &args.name) } else { Ok(Verdict::Done) }
}

pub(super) fn pid(vm: &Vm) -> String {
    vm.pid.map_or("-".into(), |pid| pid.to_string())
}

fn ls(s: &Session) -> Outcome {
    let vms: Vec<Vm> = s.forkd()?.get("/v1/vms".into())?;
    s.out.result(&vms, || {
        let head = ["NAME", "STATE", "CPUS", "MEMORY", "DISKS", "PARENT", "PROCESS"];
        let mut table = Table::new(&head, &[2, 3, 6]);
        for vm in &vms {
            let disks: Vec<String> = vm.disks.iter().map(disk).collect();
            let parent = vm.parent.as_ref().map_or("-", |p| &p.name);
            table.row([
                vm.name.clone(),
                state(vm),
                vm.vcpus.to_string(),
                show(vm.memory_bytes),
                if disks.is_empty() { "-".into() } else { disks.join(",") },
                parent.to_owned(),
                pid(vm),
            ]);
        }
        table.render()
    })?;
    Ok(Verdict::Done)
}

/// How it is, and why it ended if it did.
fn state(vm: &Vm) -> String {
    match (&vm.end, vm.state) {
        (Some(end), VmState::Ended) => format!("ended: {}", end.reason),
        (_, state) => state.name().to_owned(),
    }
}

fn disk(disk: &VmDisk) -> String {
    let read_only = if disk.read_only { ":ro" } else { "" };
    let direct = if disk.path == DiskPath::Direct { ":direct" } else { "" };
    format!("{}{read_only}{direct}", disk.disk)
}

fn show_vm(s: &Session, args: &VmName) -> Outcome {
    let vm: Vm = s.forkd()?.get(path(&args.name, ""))?;
    s.out.result(&vm, || render(&vm))?;
    Ok(Verdict::Done)
}

fn render(vm: &Vm) -> String {
    let detail = vm.end.as_ref().map(|end| end.detail.as_str()).filter(|detail| !detail.is_empty());
    let parent = vm.parent.as_ref().map_or("-".into(), |p| format!("{} ({})", p.name, p.id));
    let mut lines = vec![
        ("name", vm.name.clone()),
        ("identity", vm.id.to_string()),
        ("state", state(vm)),
        ("process", pid(vm)),
        ("processors", vm.vcpus.to_string()),
        ("memory", show(vm.memory_bytes)),
        ("layers", vm.layers.to_string()),
        ("generation", vm.generation_id.to_string()),
        ("address", vm.mac.clone()),
        ("parent", parent),
        ("created", utc(vm.created)),
        ("console", vm.console.display().to_string()),
    ];
    if let Some(end) = &vm.end {
        lines.insert(3, ("ended", utc(end.at)));
    }
    if let Some(detail) = detail {
        lines.insert(4, ("detail", detail.to_owned()));
    }
    for d in &vm.disks {
        let own = if d.own { ", made for this machine" } else { "" };
        lines.push(("disk", format!("{}{own}", disk(d))));
    }
    if let Some(net) = &vm.net {
        lines.push(("network", network(net)));
    }
    fields(lines)
}

/// What a network card is connected to, and what passed it.
fn network(net: &VmNet) -> String {
    let tap = net.tap.as_ref().map_or("not connected".into(), |tap| format!("interface {tap}"));
    let Some(NetStatus { link, counts: c }) = &net.status else { return tap };
    format!(
        "{tap}, link {}; received {} frames, {}; sent {} frames, {}; dropped {}",
        link.name(),
        c.received_frames,
        show(c.received_bytes),
        c.sent_frames,
        show(c.sent_bytes),
        c.dropped
    )
}

fn attach(s: &Session, name: &str) -> Outcome {
    let vm: Vm = s.forkd()?.get(path(name, ""))?;
    console::attach(&vm).map_err(|stop| match stop {
        crate::output::Stop::Failed(e) => {
            Error::tried(e, "attach to").on(format!("the console of vm {name}")).into()
        }
        unread => unread,
    })?;
    Ok(Verdict::Done)
}

fn change(s: &Session, args: &VmName, what: &str, done: &str) -> Outcome {
    let vm: Vm = s.forkd()?.post(path(&args.name, &format!("/{what}")), &())?;
    s.out.confirm(&vm, || format!("{done} vm {}", vm.name))?;
    Ok(Verdict::Done)
}

fn fork(s: &Session, args: &cli::ForkVm) -> Outcome {
    let (children, net) = (args.children.clone(), args.net.clone());
    let request = ForkVm { children, paused: args.paused, net };
    let forked: ForkedVms = s.forkd()?.post(path(&args.parent, "/fork"), &request)?;
    s.out.confirm(&forked, || {
        let ms = |us: u64| std::time::Duration::from_micros(us).as_secs_f64() * 1e3;
        let line = |vm: &Vm| format!("vm {} is {}: process {}", vm.name, vm.state.name(), pid(vm));
        let mut lines: Vec<String> = forked.children.iter().map(line).collect();
        lines.push(format!(
            "vm {} stood for {:.2} ms; the children were ready after {:.2} ms",
            args.parent,
            ms(forked.pause_us),
            ms(forked.ready_us)
        ));
        lines.join("\n")
    })?;
    Ok(Verdict::Done)
}

fn stop(s: &Session, args: &cli::StopVm) -> Outcome {
    let how = format!("/stop?force={}&timeout_ms={}", args.force, args.timeout * 1000);
    let vm: Vm = s.forkd()?.post(path(&args.name, &how), &())?;
    let reason = vm.end.as_ref().map_or("", |end| &end.reason);
    s.out.confirm(&vm, || match reason {
        "stopped" if !args.force => {
            format!("stopped vm {}: its power was cut, it did not turn itself off", vm.name)
        }
        _ => format!("stopped vm {}", vm.name),
    })?;
    Ok(Verdict::Done)
}

fn rm(s: &Session, args: &cli::RemoveVm) -> Outcome {
    let how = format!("?force={}&keep_disks={}", args.force, args.keep_disks);
    let removed: RemovedVm = s.forkd()?.delete(path(&args.name, &how))?;
    s.out.confirm(&removed, || match removed.disks.is_empty() {
        true => format!("removed vm {}", removed.removed),
        false => format!("removed vm {}, and {}", removed.removed, removed.disks.join(", ")),
    })?;
    Ok(Verdict::Done)
}

fn stats(s: &Session) -> Outcome {
    let stats: Vec<VmStats> = s.forkd()?.get("/v1/stats".into())?;
    s.out.result(&stats, || {
        let head = ["NAME", "STATE", "PRIVATE", "SHARED", "SHARE", "FAULTS", "CPU s"];
        let mut table = Table::new(&head, &[2, 3, 4, 5, 6]);
        for vm in &stats {
            let seconds = std::time::Duration::from_nanos(vm.cpu_ns).as_secs_f64();
            table.row([
                vm.name.clone(),
                vm.state.name().to_owned(),
                show(vm.private_bytes),
                show(vm.shared_bytes),
                show(vm.proportional_bytes),
                vm.faults.to_string(),
                format!("{seconds:.2}"),
            ]);
        }
        table.render()
    })?;
    Ok(Verdict::Done)
}

fn status(s: &Session) -> Outcome {
    let health: Health = s.forkd()?.get("/v1/health".into())?;
    s.out.result(&health, || {
        let list = |v: &[String]| if v.is_empty() { "-".into() } else { v.join(", ") };
        let class = |c: &forkd::api::types::PoolClass| {
            format!(
                "{} of {} ({}, {} CPUs)",
                c.ready,
                health.pool_size,
                show(c.memory_bytes),
                c.vcpus
            )
        };
        let lines = [
            ("folder", health.path.display().to_string()),
            ("process", health.pid.to_string()),
            ("version", health.version.clone()),
            ("blockd", health.blockd.display().to_string()),
            ("started", utc(health.started)),
            ("machines", health.vms.to_string()),
            ("shells", list(&health.pool.iter().map(class).collect::<Vec<_>>())),
            ("stand by", health.standby.as_ref().map_or("-".into(), |vm| format!("for {vm}"))),
            ("unfinished", health.unfinished.to_string()),
            ("confined by", list(&health.sandbox)),
        ];
        fields(lines)
    })?;
    Ok(Verdict::Done)
}
