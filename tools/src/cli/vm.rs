//! The verbs on virtual machines.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use forkd::api::types::{DiskPath, ForkNet, LinkWhen, RunNet, UseDisk};

use super::Events;
use crate::size;

/// `vm …`
#[derive(Debug, Subcommand)]
pub enum VmVerb {
    /// Boot a machine
    ///
    /// The kernel is a Linux bzImage, or an ELF file (vmlinux or another program) with a PVH entry.
    /// Disks are blockd's, in the order in which the machine sees them; `:ro` after a name refuses
    /// writes. With `:direct`, blockd maps the machine's memory and serves its requests there,
    /// without a copy; the first fork or snapshot ends that: the disk goes on as others do, which
    /// an event tells and `vm show` shows. The tap interface of a network card has to be there
    /// already, and is nobody else's. The verb ends when the machine runs; `vm console` shows what
    /// it prints. Names have letters, digits and . _ -, 64 at most.
    #[command(after_help = "\
Examples:
  offshoot vm run web1 --kernel /boot/vmlinuz --initrd /boot/initrd.img --disk web1-root \\
      --cmdline 'console=ttyS0 root=/dev/vda1' --mem 512M --cpus 2
  offshoot vm run tool --kernel ./vmlinux --disk data --disk base:ro --mem 128M --console
  offshoot vm run db1 --kernel ./vmlinux --disk db1-root --disk db1-data:direct --mem 8G
  ip tuntap add dev tap0 mode tap && ip link set tap0 up
  offshoot vm run web1 --kernel /boot/vmlinuz --disk web1-root --net tap=tap0")]
    Run(RunVm),

    /// List the machines
    ///
    /// Those that ended are listed until they are removed.
    #[command(visible_alias = "list")]
    #[command(after_help = "\
Examples:
  offshoot vm ls
  offshoot vm ls --json | jq -r '.[] | select(.state == \"running\") | .name'")]
    Ls,

    /// Show everything about a machine
    #[command(after_help = "\
Examples:
  offshoot vm show web1
  offshoot vm show web1 --json | jq -r .mac")]
    Show(VmName),

    /// Attach to the serial console of a machine
    ///
    /// First comes what it printed lately. On a terminal, Ctrl-] detaches, and everything else is
    /// for the machine; it goes on in any case. One may be attached at a time: a new one takes
    /// over.
    #[command(after_help = "\
Examples:
  offshoot vm console web1
  offshoot vm console web1 < commands.txt > output.txt")]
    Console(VmName),

    /// Stop a machine between two instructions
    ///
    /// None of its requests is under way then. `vm resume` lets it go on; forks of it can be made
    /// meanwhile.
    #[command(after_help = "\
Examples:
  offshoot vm pause web1")]
    Pause(VmName),

    /// Let a paused machine go on
    #[command(after_help = "\
Examples:
  offshoot vm resume web1")]
    Resume(VmName),

    /// Make children of a machine while it runs
    ///
    /// Each child starts out with the memory, the processors and the disks that the machine has at
    /// one instant; only what is written later is stored twice. A child is another machine from its
    /// first instruction on: another name, identity, generation, network address and seed for
    /// random numbers, which its guest has to take up (an agent, or a kernel that minds the
    /// generation). Its disks are called CHILD-disk0, CHILD-disk1 and so on, and go with it. There
    /// are all of the children, or none; the machine goes on in any case.
    ///
    /// No child gets its parent's network: --net names an interface for each. The link of a child
    /// is down until its guest has taken its new identity (or not for longer than its driver needs
    /// to see it, with link=at-once).
    #[command(after_help = "\
Examples:
  offshoot vm fork web1 web2 web3
  offshoot vm fork template job-17 --json | jq .pause_us
  offshoot vm fork template job-{1..100} --net 'tap=t-{name}'")]
    Fork(ForkVm),

    /// Write a machine to files while it runs
    ///
    /// Memory, processors, devices and disks are of one instant; the machine stands for as long as
    /// for a fork, and goes on. DEST becomes a folder with a manifest, the state and the memory,
    /// made by forkd and for its user only; it is there whole or not at all. The disks stay in
    /// blockd's store, sealed, as NAME-snap-ID-disk0 and so on.
    #[command(after_help = "\
Examples:
  offshoot vm snapshot web1 /var/snapshots/web1-monday
  offshoot vm snapshot web1 ./before-upgrade --json | jq '.pause_us, .disks'")]
    Snapshot(Snapshot),

    /// Make a machine of a snapshot
    ///
    /// It goes on where the snapshot was taken, as another machine: with another name, identity,
    /// generation, network address and seed for random numbers, and with disks of its own, called
    /// NAME-disk0 and so on, that stand on those of the snapshot. A snapshot can be restored any
    /// number of times. What was altered, is missing, or does not fit this host's processor is
    /// refused. To start many, restore one with --paused, and fork it.
    #[command(after_help = "\
Examples:
  offshoot vm restore /var/snapshots/web1-monday web1b
  offshoot vm restore ./before-upgrade web1b --paused")]
    Restore(Restore),

    /// Remove a snapshot, and the disks that were made for it
    ///
    /// Refused while disks of restored machines stand on its disks.
    #[command(after_help = "\
Examples:
  offshoot vm snapshot-rm /var/snapshots/web1-monday")]
    SnapshotRm(SnapshotRm),

    /// End a machine
    ///
    /// Its power button is pressed, so that its guest shuts down and turns itself off. A guest that
    /// does not listen to the button (no ACPI, or not booted that far), or takes longer than
    /// --timeout, has its power cut: what it wrote and flushed is on its disks. It is listed as
    /// ended until it is removed: by `power-off` if it turned itself off, by `stopped` if its power
    /// was cut.
    #[command(after_help = "\
Examples:
  offshoot vm stop web1
  offshoot vm stop web1 --timeout 120
  offshoot vm stop web1 --force")]
    Stop(StopVm),

    /// Remove a machine that has ended
    ///
    /// The disks that a fork made for it go with it; those that it was started with stay.
    #[command(visible_alias = "remove")]
    #[command(after_help = "\
Examples:
  offshoot vm rm web2
  offshoot vm rm web3 --force --keep-disks")]
    Rm(RemoveVm),

    /// Show what machines use of the host
    #[command(after_help = "\
Examples:
  offshoot vm stats
  offshoot vm stats --json | jq '[.[].proportional_bytes] | add'")]
    Stats,

    /// Show how forkd is
    #[command(after_help = "\
Examples:
  offshoot vm status
  offshoot vm status --json | jq .pool")]
    Status,

    /// Show what happened to forkd and its machines
    ///
    /// One event a line, the last thousand of them, and with --follow those to come. What happens
    /// to disks is told by `offshoot events`.
    #[command(after_help = "\
Examples:
  offshoot vm events --follow
  offshoot vm events --json | jq -r 'select(.kind == \"ended\") | .object'")]
    Events(Events),
}

/// `vm run`
#[derive(Debug, Args)]
pub struct RunVm {
    /// Name of the machine
    pub name: String,
    /// What it boots
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// The first file system of a Linux kernel
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The command line of the kernel; without it, one that prints on the serial console
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// A disk; with `:ro`, for reading only; with `:direct`, served by blockd in the machine's
    /// memory. May be said several times
    #[arg(long = "disk", value_name = "NAME[:ro][:direct]", value_parser = disk)]
    pub disks: Vec<UseDisk>,
    /// A network card that is connected to this tap interface, or to nothing
    #[arg(long, value_name = "tap=IFNAME|none", value_parser = net_to_boot)]
    pub net: Option<RunNet>,
    /// Bytes of memory, a whole number of MiB
    #[arg(long, value_name = "BYTES", value_parser = size::parse, default_value = "256M")]
    pub mem: u64,
    /// Processors, 1 to 8
    #[arg(long, value_name = "N", default_value = "1")]
    pub cpus: u8,
    /// Do not let it run yet
    #[arg(long)]
    pub paused: bool,
    /// Attach to its console afterwards
    #[arg(long, conflicts_with = "json")]
    pub console: bool,
}

#[allow(clippy::unnecessary_wraps)] // Clap wants a `Result`.
fn disk(text: &str) -> Result<UseDisk, String> {
    let (mut name, mut read_only, mut path) = (text, false, DiskPath::Arena);
    loop {
        match name.rsplit_once(':') {
            Some((rest, "ro")) if !read_only => (name, read_only) = (rest, true),
            Some((rest, "direct")) if path == DiskPath::Arena => {
                (name, path) = (rest, DiskPath::Direct);
            }
            _ => return Ok(UseDisk { disk: name.to_owned(), read_only, path }),
        }
    }
}

/// A disk of a machine that is restored: its memory cannot be shared.
fn restored_disk(text: &str) -> Result<String, String> {
    match disk(text)? {
        UseDisk { path: DiskPath::Direct, .. } => Err("the memory of a machine that is restored \
                                                       is its own, and cannot be shared with \
                                                       blockd: leave out `:direct`"
            .into()),
        _ => Ok(text.to_owned()),
    }
}

fn net_to_boot(text: &str) -> Result<RunNet, String> {
    let tap = match text.strip_prefix("tap=") {
        Some(name) => Some(name.to_owned()),
        None if text == "none" => None,
        None => return Err("say tap=IFNAME, or none".into()),
    };
    Ok(RunNet { tap })
}

fn net(text: &str) -> Result<ForkNet, String> {
    let wrong = || "say tap=PATTERN, or tap=PATTERN,link=at-once".to_owned();
    let tap = text.strip_prefix("tap=").ok_or_else(wrong)?;
    let (tap, link) = match tap.split_once(',') {
        None | Some((_, "link=identified")) => (tap.split(',').next(), LinkWhen::Identified),
        Some((tap, "link=at-once")) => (Some(tap), LinkWhen::AtOnce),
        Some(_) => return Err(wrong()),
    };
    Ok(ForkNet { tap: tap.unwrap_or_default().to_owned(), link })
}

/// A machine.
#[derive(Debug, Args)]
pub struct VmName {
    /// Name of the machine
    pub name: String,
}

/// `vm fork`
#[derive(Debug, Args)]
pub struct ForkVm {
    /// Name of the machine
    pub parent: String,
    /// Names of its children
    #[arg(required = true, value_name = "CHILD")]
    pub children: Vec<String>,
    /// Do not let the children run yet
    #[arg(long)]
    pub paused: bool,
    /// The tap interface of each child: {name} stands for its name, and a lone n in braces for its
    /// place among them, from 0. Without it the children's cards are connected to nothing
    #[arg(long, value_name = "tap=PATTERN[,link=at-once]", value_parser = net)]
    pub net: Option<ForkNet>,
}

/// `vm snapshot`
#[derive(Debug, Args)]
pub struct Snapshot {
    /// Name of the machine
    pub name: String,
    /// The folder to make
    pub dest: PathBuf,
}

/// `vm restore`
#[derive(Debug, Args)]
pub struct Restore {
    /// The folder of the snapshot
    pub dest: PathBuf,
    /// Name of the machine
    pub name: String,
    /// A sealed disk to stand on instead of one of the snapshot's, after it came to another store.
    /// Said once for each disk, in their order
    #[arg(long = "disk", value_name = "DISK", value_parser = restored_disk)]
    pub disks: Vec<String>,
    /// Do not let it run yet
    #[arg(long)]
    pub paused: bool,
    /// Its tap interface, as for `vm fork`. Without it its card is connected to nothing
    #[arg(long, value_name = "tap=IFNAME[,link=at-once]", value_parser = net)]
    pub net: Option<ForkNet>,
}

/// `vm snapshot-rm`
#[derive(Debug, Args)]
pub struct SnapshotRm {
    /// The folder of the snapshot
    pub dest: PathBuf,
}

/// `vm stop`
#[derive(Debug, Args)]
pub struct StopVm {
    /// Name of the machine
    pub name: String,
    /// Seconds that its guest has for turning itself off, 3600 at most
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    #[arg(value_parser = clap::value_parser!(u64).range(..=3600))]
    pub timeout: u64,
    /// Cut its power at once
    #[arg(long)]
    pub force: bool,
}

/// `vm rm`
#[derive(Debug, Args)]
pub struct RemoveVm {
    /// Name of the machine
    pub name: String,
    /// End it first, if it has not ended
    #[arg(long)]
    pub force: bool,
    /// Keep the disks that a fork made for it
    #[arg(long)]
    pub keep_disks: bool,
}
