//! The verbs on disks.

use blockd::api::types::NewSize;
use clap::{Args, Subcommand};

use super::LostTail;
use super::bytes::{Discard, Range, Write};
use super::flatten::{DiskPolicy, Flatten};
use super::fork::Fork;
use super::images::{Diff, Export, Import, SourceFormat};
use super::modes::Mode;
use super::serve::{Attach, Detach, ExportNbd, Limit};
use crate::size;

/// `disk …`
#[derive(Debug, Subcommand)]
pub enum DiskVerb {
    /// Bring an image into the store as a new disk
    ///
    /// Reads raw images, block devices, qcow2 (with backing files, compressed clusters), VMDK and
    /// VHDX. Holes and zeroes take no space and next to no time. The disk appears when it is
    /// complete and durable; an import that fails, is stopped or killed leaves nothing behind.
    ///
    /// With `--format auto` the format is told by the first bytes. A guest can write any bytes into
    /// its raw disk: name the format of images that you do not trust.
    ///
    /// With `--over`, the image is a difference that `disk export --diff-from --format qcow2` made
    /// from a sealed disk, here or in another store. The new disk stands on BASE, which must be
    /// sealed and hold what that disk held, whatever their names. Another base is refused, and so
    /// is a file that is not as it was exported.
    #[command(after_help = "\
Examples:
  offshoot disk import debian-13.qcow2 debian
  offshoot disk import /dev/vg0/old-server old-server --format raw
  offshoot disk import small.raw data --size 100G
  offshoot disk import monday.qcow2 web1-monday --over web1-sunday")]
    Import(Import),

    /// Create an empty disk, or one that stands on a sealed disk
    ///
    /// A disk with a parent starts out with the parent's content, in an instant, whatever its size,
    /// and holds only what is written to it. The parent must be sealed.
    #[command(after_help = "\
Examples:
  offshoot disk create scratch --size 10G
  offshoot disk create web1 --parent debian
  offshoot disk create web2 --parent debian --size 40G")]
    Create(Create),

    /// Make children that start out with what a disk holds at this instant; the disk goes on
    ///
    /// Nothing is copied, whatever the size, and none sees what another writes from then on. Any of
    /// them can be removed at any time; what nobody stands on any more goes with the last.
    #[command(after_help = "\
Examples:
  offshoot disk fork web1 try1 try2 try3
  offshoot disk fork db db-copy --with logs:logs-copy
  offshoot disk fork web1 try4 --hold 5000
  offshoot disk fork golden desk1 desk2 --mode inherit
  offshoot disk fork web1 try4 --mode inherit --copy-threshold 256M")]
    Fork(Fork),

    /// Say what becomes of what is written to a disk
    ///
    /// `persistent` (every disk at first): it stays. In any other mode it is kept apart from what
    /// the disk holds now. `nonpersistent`: it is dropped when the machine is off, which is when
    /// the disk is detached, and not when the daemon ends, is killed or upgraded. `undoable`: `disk
    /// commit` or `disk undo` decides. `append`: it stays apart until `disk commit`.
    ///
    /// Nothing that the disk holds is dropped by this: from another mode to `persistent` is to keep
    /// all of it. A disk in service goes on.
    #[command(after_help = "\
Examples:
  offshoot disk mode kiosk nonpersistent
  offshoot disk mode web1 undoable")]
    Mode(Mode),

    /// Keep what was written to a disk: an undo goes back to here from now on
    ///
    /// For disks that are not persistent. Nothing is copied; a disk in service goes on.
    #[command(after_help = "\
Examples:
  offshoot disk commit web1")]
    Commit(Name),

    /// Drop what was written to a disk since the last commit
    ///
    /// The disk holds again, and is as large as, what it was when it was committed or got its mode.
    /// Refused for disks of modes persistent and append, and for disks in service: detach them
    /// first. There is no question and no way back.
    #[command(after_help = "\
Examples:
  offshoot disk undo web1")]
    Undo(Remove),
    /// Let a disk stand on fewer segments, in place
    ///
    /// What it has in the segments that are to go is copied into its own. It can be in service:
    /// its guest goes on, and the copy is as fast as the guest does not notice. Reads cost the same
    /// at any depth; what this is for is that segments nobody stands on any more are removed. A
    /// flatten that is killed goes on where it was, when the disk is in service again or by saying
    /// it again.
    #[command(after_help = "\
Examples:
  offshoot disk flatten web1 --wait
  offshoot disk flatten try1 --to nothing --rate 100M
  offshoot disk flatten try1 --to debian")]
    Flatten(Flatten),

    /// Show or set when the daemon flattens a disk by itself
    ///
    /// Looked at after a fork, and when the disk is taken into service: `manual` (never),
    /// `after-fork`, `depth>N` (when more segments are below), `bytes<SIZE` (when so little is to
    /// be copied), or `default` for what `store flatten-policy` says.
    #[command(after_help = "\
Examples:
  offshoot disk flatten-policy web1 after-fork
  offshoot disk flatten-policy web1 'bytes<256M'")]
    FlattenPolicy(DiskPolicy),

    /// List the disks
    ///
    /// ALLOCATED is what the host has allocated for the disk's own data and metadata, DEPTH the
    /// number of segments below it. States: active, sealed, sealing (`disk seal` was cut short and
    /// has to be repeated), missing and unreadable (see `disk check`).
    #[command(visible_alias = "list")]
    #[command(after_help = "\
Examples:
  offshoot disk ls
  offshoot disk ls --json | jq -r '.[] | select(.state == \"sealed\") | .name'")]
    Ls,

    /// Show everything about a disk
    #[command(after_help = "\
Examples:
  offshoot disk show web1
  offshoot disk show web1 --json | jq .dependents")]
    Show(Name),

    /// List the ranges of a disk, and where their data lies
    ///
    /// States: hole (never written, reads as zeroes), zero (written as zeroes or discarded), data
    /// (with the segment and the offset in its file), damaged (cannot be read).
    #[command(after_help = "\
Examples:
  offshoot disk map web1
  offshoot disk map web1 --json | jq '[.[] | select(.state == \"data\") | .length] | add'")]
    Map(Name),

    /// Remove a disk and give its space back
    ///
    /// Refused while other disks stand on it; they are named. There is no question and no way back.
    #[command(visible_alias = "remove")]
    #[command(after_help = "\
Examples:
  offshoot disk rm web1")]
    Rm(Remove),

    /// Change the size of a disk
    ///
    /// New space reads as zeroes. Making a disk smaller is refused when that would drop data,
    /// unless you say `--drop-data`.
    #[command(after_help = "\
Examples:
  offshoot disk resize web1 40G
  offshoot disk resize web1 +10G
  offshoot disk resize web1 -1G --drop-data")]
    Resize(Resize),

    /// Make a disk immutable, so that others can stand on it
    ///
    /// Every block gets a checksum, and the content a digest. There is no way back: to go on
    /// writing, create a disk over it. A seal that was cut short is finished by sealing again.
    #[command(after_help = "\
Examples:
  offshoot disk seal debian")]
    Seal(Name),

    /// Give a disk another name
    #[command(visible_alias = "mv")]
    #[command(after_help = "\
Examples:
  offshoot disk rename web1 www")]
    Rename(Rename),

    /// Write a disk to an image file
    ///
    /// Raw images are sparse, qcow2 images hold only what is there. The file appears under its name
    /// when it is complete and durable.
    ///
    /// With `--diff-from`, only what was changed since that disk is written, by comparing the two
    /// maps. A raw file then holds the changed ranges at their places and holes elsewhere; the list
    /// of ranges is printed, and is needed to apply it. A qcow2 file is a whole overlay: it gives
    /// the disk back when it is put over an export of the other disk, or when `disk import --over`
    /// applies it to a disk of the same content, for which the other disk must be sealed.
    #[command(after_help = "\
Examples:
  offshoot disk export web1 /tmp/web1.raw
  offshoot disk export web1 /tmp/web1.qcow2 --format qcow2 --verify
  offshoot disk export web1 /tmp/delta.qcow2 --format qcow2 --diff-from debian
  qemu-img rebase -u -F raw -b debian.raw /tmp/delta.qcow2")]
    Export(Export),

    /// List the ranges of a disk that may differ from another one
    ///
    /// The two are compared by their maps alone: ranges that lie in the same place, or read as
    /// zeroes in both, are left out; equal data in different places is not. Kinds are those of the
    /// first disk: data, and zero for what reads as zeroes in it.
    #[command(after_help = "\
Examples:
  offshoot disk diff web1 debian
  offshoot disk diff web1 debian --json | jq '[.[] | .length] | add'")]
    Diff(Diff),

    /// Compare the contents of two disks, or of a disk and an image
    ///
    /// An argument with a slash, or one that names a file and no disk, is an image file; `file:`
    /// before it says so explicitly. The answer is the exit code: 0 for the same content, 1 for
    /// different content. Disks of different sizes are different.
    #[command(after_help = "\
Examples:
  offshoot disk compare web1 web2
  offshoot disk compare web1 ./web1.qcow2
  offshoot disk compare --all --json web1 file:web1")]
    Compare(Compare),

    /// Check the structure of a disk
    ///
    /// Looks at superblocks, map pages, space used twice, leaks, parents and the journal; changes
    /// nothing. Exit code 1 says that something was found. With `--data`, the checksums of sealed
    /// data are verified, too.
    #[command(after_help = "\
Examples:
  offshoot disk check web1
  offshoot disk check web1 --data --json")]
    Check(Check),

    /// Repair a disk
    ///
    /// Without options, repairs what can be repaired without losing anything: superblock copies and
    /// leaks. Everything else is done only when asked for, and what is lost is listed. Exit code 1
    /// says that something is still wrong.
    #[command(after_help = "\
Examples:
  offshoot disk repair web1 --dry-run
  offshoot disk repair web1 --drop-damaged")]
    Repair(Repair),

    /// Read the sealed data of a disk and compare it with its checksums
    ///
    /// Checksums and digests are made when a disk is sealed; what lies in an active segment has
    /// none and is counted. Exit code 1 says that something was found.
    #[command(after_help = "\
Examples:
  offshoot disk scrub debian")]
    Scrub(Name),

    /// Write a part of a disk to standard output
    #[command(after_help = "\
Examples:
  offshoot disk read web1 --length 512 | xxd | head
  offshoot disk read web1 --offset 1M --length 4k > piece")]
    Read(Range),

    /// Write standard input to a disk
    ///
    /// Stops at the end of the input, after `--length` bytes, or with an error at the end of the
    /// disk. What was written is flushed before the verb ends, also when it ends early.
    #[command(after_help = "\
Examples:
  offshoot disk write web1 --offset 1M < piece
  printf 'hello' | offshoot disk write web1 --offset 4095")]
    Write(Write),

    /// Make a part of a disk read as zeroes, and give its space back
    ///
    /// Offset and length are multiples of 512.
    #[command(after_help = "\
Examples:
  offshoot disk discard web1 --offset 1G --length 512M")]
    Discard(Discard),

    /// Serve a disk to a virtual machine, on a vhost-user-blk socket
    ///
    /// Needs a daemon, which remembers it: when it is started again, it serves the disk again. A
    /// sealed disk can be served with `--readonly`. The same disk can be attached at several
    /// sockets, all but one of them with `--readonly`; at each, one front end runs it at a time.
    #[command(after_help = "\
Examples:
  offshoot disk attach web1 --socket /run/web1.sock
  offshoot disk attach web1 --socket /run/web1.sock --queues 4 --iops 20000 --bps 200M
  offshoot disk attach debian --socket /run/debian.sock --readonly")]
    Attach(Attach),

    /// Serve a disk to NBD clients, on a Unix socket or under TLS
    ///
    /// qemu-img, nbdcopy and backup tools can then read and write it, and see what is allocated and
    /// what was changed since a disk that it stands on. It is remembered as `disk attach` is.
    ///
    /// There is no TCP without TLS. The daemon reads the PEM files now, and whenever it starts.
    /// With `--tls-client-ca`, clients have to show a certificate; without it, everybody who can
    /// reach the port may read the disk and, without `--readonly`, write to it.
    #[command(after_help = "\
Examples:
  offshoot disk export-nbd web1 --socket /run/web1.nbd --readonly
  qemu-img convert -O qcow2 'nbd+unix:///web1?socket=/run/web1.nbd' web1.qcow2
  offshoot disk export-nbd web1 --tcp 192.0.2.7:10809 --tls-cert /etc/offshoot/cert.pem \\
    --tls-key /etc/offshoot/key.pem --tls-client-ca /etc/offshoot/clients.pem")]
    ExportNbd(ExportNbd),

    /// End the exports of a disk
    ///
    /// Refused while a front end is connected, unless you say `--force`. With the last export the
    /// disk is closed.
    #[command(after_help = "\
Examples:
  offshoot disk detach web1
  offshoot disk detach web1 --socket /run/web1.sock --force")]
    Detach(Detach),

    /// Change what a disk in service may do at most
    ///
    /// What is not named has no limit afterwards.
    #[command(after_help = "\
Examples:
  offshoot disk limits web1 --iops 5000 --bps 100M --burst 500
  offshoot disk limits web1")]
    Limits(Limit),

    /// Have held requests of a disk tried again now
    ///
    /// Requests are held when the host has no space left; they are tried again every second anyway.
    #[command(after_help = "\
Examples:
  offshoot disk resume web1")]
    Resume(Remove),
}

/// A disk.
#[derive(Debug, Args)]
pub struct Name {
    /// Name of the disk
    pub name: String,
    #[command(flatten)]
    pub tail: LostTail,
}

/// `disk create`
#[derive(Debug, Args)]
pub struct Create {
    /// Name of the new disk
    pub name: String,
    /// Bytes of the disk: 1M to 64T, a multiple of 512, and not less than the parent has
    #[arg(long, value_parser = size::parse, required_unless_present = "parent")]
    pub size: Option<u64>,
    /// The sealed disk to stand on
    #[arg(long, value_name = "NAME")]
    pub parent: Option<String>,
    /// Bytes of the journal: 64k to 1G, a multiple of 64k
    ///
    /// A larger journal means fewer checkpoints under many small first writes, and a longer replay
    /// after a crash.
    #[arg(long, value_parser = size::parse, default_value = "16M", value_name = "SIZE")]
    pub journal: u64,
}

/// `disk resize`
#[derive(Debug, Args)]
pub struct Resize {
    /// Name of the disk
    pub name: String,
    /// The new size; with + or - before it, how much more or less
    #[arg(value_parser = size::parse_new, allow_hyphen_values = true)]
    pub size: NewSize,
    /// Drop the data that lies past the new end
    #[arg(long)]
    pub drop_data: bool,
    #[command(flatten)]
    pub tail: LostTail,
}

/// `disk rm`
#[derive(Debug, Args)]
pub struct Remove {
    /// Name of the disk
    pub name: String,
}

/// `disk rename`
#[derive(Debug, Args)]
pub struct Rename {
    /// Name of the disk
    pub name: String,
    /// Its new name
    #[arg(value_name = "NEW")]
    pub to: String,
}

/// `disk compare`
#[derive(Debug, Args)]
pub struct Compare {
    /// A disk or an image file
    pub a: String,
    /// A disk or an image file
    pub b: String,
    /// Count all differences instead of stopping at the first
    #[arg(long)]
    pub all: bool,
    /// Format of the image files
    #[arg(long, default_value = "auto")]
    pub format: SourceFormat,
    #[command(flatten)]
    pub tail: LostTail,
}

/// `disk check`
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    pub disk: Name,
    /// Verify the checksums of sealed data, too
    #[arg(long)]
    pub data: bool,
}

/// `disk repair`
#[derive(Debug, Args)]
pub struct Repair {
    #[command(flatten)]
    pub disk: Name,
    /// Make damaged ranges readable again, as zeroes; their data is lost
    #[arg(long)]
    pub drop_damaged: bool,
    /// Go back to an older state of the map; what was changed since is lost
    #[arg(long)]
    pub older_generation: bool,
    /// Forget flushed changes that the journal no longer has
    #[arg(long)]
    pub accept_journal_loss: bool,
    /// Give ranges that use one extent twice a copy each; at most one of them holds its own data
    #[arg(long)]
    pub unshare: bool,
    /// Say what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}
