//! Machines as files, through the real command line: memory, processors, devices and disks of one
//! instant; there whole or not at all; restored any number of times, and never when something of it
//! was altered.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use forkd::devices::layout::GENERATION_ID;
use forkd::kvm::blob::{Reader, Writer};
use forkd::kvm::state::tag;
use forkd::snapshot::{FileSum, Manifest};
use offshoot_tests::mount::Mount;
use offshoot_tests::rng::{Rng, seed};
use offshoot_tests::trace::{Step, Tracer, steps_of};
use offshoot_tests::until;
use offshoot_tests::vm::{Console, Lab, kill, parts, processes_in, word};
use rustix::process::Signal;

/// An address that the guest itself does not use, and pages from there.
const AT: (u64, u64) = (0x80_0000, 256);

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn fill(console: &mut Console, from: u64) {
    console.number(&format!("f {} {} {from}", AT.0, AT.1));
}

fn sum(console: &mut Console) -> u64 {
    console.number(&format!("s {} {}", AT.0, AT.1))
}

/// The numbers that a guest has in memory and on its disk.
fn log_of(line: &str) -> (u64, u64) {
    let number = |key: &str| word(line, key).parse::<u64>().unwrap();
    assert_eq!(number("wrong"), 0, "{line}");
    (number("ram"), number("disk"))
}

fn manifest(snap: &Path) -> Manifest {
    let path = snap.join("manifest.json");
    Manifest::decode(&fs::read(&path).unwrap(), &path).unwrap()
}

/// What is in a folder.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

/// A folder in which snapshots are made.
fn place(lab: &Lab) -> PathBuf {
    let place = lab.store.path("snaps");
    fs::create_dir(&place).unwrap();
    place
}

/// A guest writes numbers to its disk, and each to memory when the disk has it, and is written down
/// meanwhile. Each machine that is made of that has, on a disk of its own, what its memory says and
/// at most the next number; all of them begin alike, and are nobody else.
#[test]
fn a_snapshot_of_a_writing_machine_is_of_one_instant_and_restored_twice() {
    let Some(lab) = Lab::new("a_snapshot_of_a_writing_machine_is_of_one_instant") else { return };
    let place = place(&lab);
    lab.disk("root");
    let mut p = lab.run("p", &["root"]);
    fill(&mut p, 1000);
    let at_snapshot = sum(&mut p);
    assert_eq!(p.ask("w"), "writing");
    let mut last = 0;
    for round in 0..4 {
        let snap = place.join(format!("s{round}"));
        let taken = lab.json(&["vm", "snapshot", "p", text(&snap)]);
        assert_eq!(names(&snap), ["manifest.json", "memory", "state"].map(str::to_owned).into());
        let disk = taken["disks"][0]["disk"].as_str().unwrap().to_owned();
        assert!(lab.traces().disks.contains(&disk), "{taken}");
        assert!(taken["pause_us"].as_u64().unwrap() > 0, "{taken}");

        let mut seen = BTreeSet::new();
        let mut logs = BTreeSet::new();
        for name in ["a", "b"].map(|n| format!("{n}{round}")) {
            lab.done(&["vm", "restore", text(&snap), &name]);
            let mut console = lab.console(&name);
            let (ram, on_disk) = log_of(&console.hear("= forked"));
            assert!(on_disk >= ram && on_disk <= ram + 1, "round {round}: {ram} {on_disk}");
            assert!(ram >= last, "round {round}: {ram} after {last}");
            last = ram;
            logs.insert((ram, on_disk));
            // What is typed ends the loop.
            console.say("");
            let (ram, on_disk) = log_of(&console.hear("= wrote"));
            assert_eq!(ram, on_disk);
            let vm = lab.show(&name);
            assert_eq!((&vm["parent"]["name"], &vm["state"]), (&"p".into(), &"running".into()));
            assert_eq!(sum(&mut console), at_snapshot);
            let says = console.ask("i");
            assert_eq!(word(&says, "name"), name);
            let own = ["generation", "mac", "seed"].map(|key| word(&says, key));
            own.into_iter().chain([console.ask("n"), vm["id"].to_string()]).for_each(|value| {
                assert!(seen.insert(value.clone()), "{name}: {value} is another machine's, too");
            });
            // What one writes, the snapshot and the other one do not see.
            fill(&mut console, 5000);
            console.number("p 9 77");
        }
        assert_eq!(logs.len(), 1, "both begin alike: {logs:?}");
        // One that was restored is a machine like any other.
        lab.done(&["vm", "fork", &format!("a{round}"), &format!("c{round}")]);
        assert_eq!(lab.console(&format!("c{round}")).number("g 9"), 77);
        let refused = lab.refused(&["vm", "snapshot-rm", text(&snap)], "in-use");
        assert!(refused.contains(&format!("a{round}-disk0")), "{refused}");
        for name in ["a", "b", "c"].map(|n| format!("{n}{round}")) {
            lab.done(&["vm", "rm", &name, "--force"]);
        }
        let removed = lab.done(&["vm", "snapshot-rm", text(&snap)]);
        assert!(removed.contains(&disk), "{removed}");
    }
    p.say("");
    let (ram, disk) = log_of(&p.hear("= wrote"));
    assert!(ram == disk && ram >= last, "the machine goes on: {ram} {disk}");
    lab.settle();
    assert_eq!(lab.traces().disks, BTreeSet::from(["root".to_owned()]));
    assert!(names(&place).is_empty());
}

/// What is written down, made a machine of and written down again is the same, byte for byte,
/// except for time and the identity: registers, devices, memory, content of the disk.
#[test]
fn saved_restored_and_saved_is_the_same() {
    let Some(lab) = Lab::new("saved_restored_and_saved_is_the_same") else { return };
    let (first, second) = (place(&lab).join("first"), lab.store.path("second"));
    lab.disk("root");
    let mut p = lab.run("p", &["root"]);
    fill(&mut p, 1000);
    p.number("p 9 1234");
    lab.done(&["vm", "pause", "p"]);
    lab.done(&["vm", "snapshot", "p", text(&first)]);
    assert_eq!(lab.show("p")["state"], "paused", "it stands as it did");
    lab.done(&["vm", "restore", text(&first), "q", "--paused"]);
    assert_eq!(lab.show("q")["state"], "paused");
    lab.done(&["vm", "snapshot", "q", text(&second)]);

    let states = [&first, &second].map(|snap| parts(&fs::read(snap.join("state")).unwrap()));
    let name = |part: &(String, Vec<u8>)| part.0.clone();
    let [a, b] = &states;
    assert!(a.iter().map(name).eq(b.iter().map(name)));
    for ((name, a), (_, b)) in a.iter().zip(b) {
        assert_eq!(a, b, "section {name}");
    }
    let [mut a, mut b] = [&first, &second].map(|snap| fs::read(snap.join("memory")).unwrap());
    assert_eq!((a.len(), b.len()), (32 << 20, 32 << 20));
    let id = usize::try_from(GENERATION_ID.0).unwrap();
    assert_ne!(a[id..id + 16], b[id..id + 16], "the generation is another one");
    for memory in [&mut a, &mut b] {
        memory[id..id + 16].fill(0);
    }
    assert!(a == b, "memory differs");
    let [a, b] = [&first, &second].map(|snap| manifest(snap).disks[0].disk.clone());
    lab.done(&["disk", "compare", &a, &b]);
    // Few of the 32 MiB were ever written, and no more is on the host.
    let held = first.join("memory").metadata().unwrap().blocks() * 512;
    assert!(held < 8 << 20, "{held} bytes");
    // The content of a machine's memory is its owner's alone.
    assert_eq!(first.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    // The first one goes, and takes nothing of the second one.
    lab.done(&["vm", "rm", "q", "--force"]);
    let stands = lab.refused(&["vm", "snapshot-rm", text(&first)], "in-use");
    assert!(stands.contains(&b), "{stands}");
    lab.done(&["vm", "snapshot-rm", text(&second)]);
    lab.done(&["vm", "snapshot-rm", text(&first)]);
    assert_eq!(lab.traces().disks, BTreeSet::from(["root".to_owned()]));
}

/// Makes a snapshot say something else, with sums that agree.
fn forge(snap: &Path, change: impl FnOnce(&mut Manifest)) {
    let mut forged = manifest(snap);
    change(&mut forged);
    fs::write(snap.join("manifest.json"), forged.encode().unwrap()).unwrap();
}

/// Gives a snapshot another state, with sums that agree.
fn forge_state(snap: &Path, state: &[u8]) {
    fs::write(snap.join("state"), state).unwrap();
    let sum = FileSum { bytes: state.len() as u64, crc32c: crc32c::crc32c(state) };
    forge(snap, |manifest| manifest.state = sum);
}

/// A state of processors of another maker.
fn of_another_vendor(state: &[u8]) -> Vec<u8> {
    let mut out = Writer::default();
    for (tag, number, content) in Reader::new(state).unwrap().sections() {
        let mut content = content.to_vec();
        if tag == tag::CPUID {
            let row = content.chunks_exact_mut(40).find(|row| row[..4] == [0; 4]);
            row.expect("the leaf")[16] ^= 0xff;
        }
        out.section(tag, number, &content);
    }
    out.finish()
}

/// A snapshot to which things are done, and undone.
struct Harmed {
    snap: PathBuf,
    whole: [(Vec<u8>, PathBuf); 3],
}

/// The kind of failure that a harm makes, what the message says, and the harm.
type Harm<'a> = (&'static str, &'static str, Box<dyn Fn() + 'a>);

impl Harmed {
    fn new(snap: &Path) -> Harmed {
        let whole = ["manifest.json", "memory", "state"].map(|name| {
            let path = snap.join(name);
            (fs::read(&path).unwrap(), path)
        });
        Harmed { snap: snap.to_owned(), whole }
    }

    fn mend(&self) {
        self.whole.iter().for_each(|(content, path)| fs::write(path, content).unwrap());
    }

    fn flip(&self, name: &str, at: u64) {
        let path = self.snap.join(name);
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }

    fn cut(&self, name: &str, len: u64) {
        let file = fs::File::options().write(true).open(self.snap.join(name)).unwrap();
        file.set_len(len).unwrap();
    }

    fn newer(&self) {
        let text = String::from_utf8(self.whole[0].0.clone()).unwrap();
        let newer = text.replace("\"layout\":1", "\"layout\":2");
        fs::write(self.snap.join("manifest.json"), newer).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.snap.join(name)).unwrap();
    }

    fn forge(&self, change: fn(&mut Manifest)) {
        forge(&self.snap, change);
    }

    fn harms(&self) -> Vec<Harm<'_>> {
        let state = &self.whole[2].0;
        let nobody = |m: &mut Manifest| m.disks[0].id = uuid::Uuid::from_u128(1);
        vec![
            ("corrupt", "snap/memory", Box::new(|| self.flip("memory", AT.0 + 5000))),
            ("corrupt", "snap/memory", Box::new(|| self.flip("memory", (32 << 20) - 1))),
            ("corrupt", "snap/memory", Box::new(|| self.cut("memory", (32 << 20) - 4096))),
            ("not-found", "snap/memory", Box::new(|| self.remove("memory"))),
            ("corrupt", "snap/state", Box::new(|| self.flip("state", 100))),
            ("corrupt", "snap/state", Box::new(|| self.cut("state", 100))),
            ("corrupt", "saved state", Box::new(|| forge_state(&self.snap, &state[..100]))),
            (
                "unsupported",
                "vendor",
                Box::new(|| forge_state(&self.snap, &of_another_vendor(state))),
            ),
            ("unsupported", "processors", Box::new(|| self.forge(|m| m.vcpus = 2))),
            ("corrupt", "manifest.json", Box::new(|| self.flip("manifest.json", 60))),
            ("corrupt", "manifest.json", Box::new(|| self.cut("manifest.json", 60))),
            ("unsupported", "version 2", Box::new(|| self.newer())),
            ("not-found", "snapshot", Box::new(|| self.remove("manifest.json"))),
            ("not-found", "p-snap", Box::new(move || self.forge(nobody))),
        ]
    }
}

/// Whatever of a snapshot is altered, cut short, missing, of another version or of another
/// processor: no machine is made of it, the message names what is wrong, and nothing is left.
#[test]
fn what_was_altered_or_does_not_fit_is_refused_by_name() {
    let test = "what_was_altered_or_does_not_fit_is_refused_by_name";
    // Without a pool, so that what is left shows.
    let Some(lab) = Lab::with(test, &["--pool-size", "0"]) else { return };
    let place = place(&lab);
    let snap = place.join("snap");
    lab.disk("root");
    let mut p = lab.run("p", &["root"]);
    fill(&mut p, 1000);
    lab.done(&["vm", "snapshot", "p", text(&snap)]);
    lab.settle();
    let before = lab.traces();
    let harmed = Harmed::new(&snap);
    for (i, (kind, says, harm)) in harmed.harms().iter().enumerate() {
        harm();
        let message = lab.refused(&["vm", "restore", text(&snap), "q"], kind);
        assert!(message.contains(says) && message.contains("vm q"), "{i}: {message}");
        lab.settle();
        assert_eq!(lab.traces(), before, "{i}: {message}");
        harmed.mend();
    }
    for (args, kind, says) in [
        (vec![text(&snap), "p"], "exists", "vm p"),
        (vec![text(&snap), "a/b"], "invalid", "letters"),
        (vec![text(&snap), "q", "--disk", "root", "--disk", "root"], "invalid", "1 disks"),
        (vec![text(&snap), "q", "--disk", "root"], "invalid", "disk root"),
        (vec![text(&snap), "q", "--disk", "none"], "not-found", "disk none"),
    ] {
        let message = lab.refused(&[&["vm", "restore"][..], &args].concat(), kind);
        assert!(message.contains(says), "{args:?}: {message}");
    }
    let taken = [(text(&snap), "exists"), (text(&place), "exists"), ("/no/where", "not-found")];
    for (path, kind) in taken {
        lab.refused(&["vm", "snapshot", "p", path], kind);
    }
    lab.refused(&["vm", "snapshot", "none", text(&place.join("x"))], "not-found");
    lab.settle();
    assert_eq!(lab.traces(), before);
    assert_eq!(names(&place), BTreeSet::from(["snap".to_owned()]));
    // Whole again, it is restored; its disk may have got another name meanwhile.
    let disk = manifest(&snap).disks[0].disk.clone();
    lab.done(&["disk", "rename", &disk, "kept"]);
    lab.done(&["vm", "restore", text(&snap), "q"]);
    assert_eq!(sum(&mut lab.console("q")), sum(&mut p));
    lab.done(&["vm", "restore", text(&snap), "r", "--disk", "kept"]);
    assert_eq!(sum(&mut lab.console("r")), sum(&mut p));
}

/// A host without room for a snapshot says so, the machine goes on, and nothing is left: no folder,
/// no disk.
#[test]
fn a_full_host_gets_no_snapshot_and_keeps_nothing_of_it() {
    let test = "a_full_host_gets_no_snapshot_and_keeps_nothing_of_it";
    let Some(mount) = Mount::tmpfs(test, 2 << 20) else { return };
    let Some(lab) = Lab::new(test) else { return };
    lab.disk("root");
    let mut p = lab.run("p", &["root"]);
    p.number(&format!("f {} 2048 1", AT.0));
    lab.settle();
    let before = lab.traces();
    for _ in 0..3 {
        let said = lab.refused(&["vm", "snapshot", "p", text(&mount.path().join("s"))], "no-space");
        assert!(said.contains("memory of snapshot") && said.contains("no space"), "{said}");
        lab.settle();
        assert_eq!(lab.traces(), before);
        assert!(names(&mount.path()).is_empty(), "{:?}", names(&mount.path()));
    }
    assert_eq!(p.number("p 9 9"), 9, "the machine goes on");
}

/// True if the snapshot is there; then it is whole, and goes again. If it is not there, nothing of
/// it is.
fn whole_or_not_at_all(lab: &Lab, snap: &Path) -> bool {
    lab.settle();
    let above = snap.parent().unwrap();
    let there = snap.exists();
    let name = snap.file_name().unwrap().to_string_lossy().into_owned();
    let expected = if there { BTreeSet::from([name]) } else { BTreeSet::new() };
    assert_eq!(names(above), expected);
    if there {
        lab.done(&["vm", "restore", text(snap), "q"]);
        let (ram, disk) = log_of(&lab.console("q").hear("= forked"));
        assert!(disk >= ram && disk <= ram + 1, "{ram} {disk}");
        lab.done(&["vm", "rm", "q", "--force"]);
        lab.done(&["vm", "snapshot-rm", text(snap)]);
    }
    lab.settle();
    assert_eq!(lab.traces().disks, BTreeSet::from(["root".to_owned()]));
    there
}

fn writing_parent(lab: &Lab) -> Console {
    lab.disk("root");
    let mut parent = lab.run("p", &["root"]);
    parent.number(&format!("f {} 2048 1", AT.0));
    assert_eq!(parent.ask("w"), "writing");
    parent
}

fn is_unharmed(parent: &mut Console) {
    parent.say("");
    let (ram, disk) = log_of(&parent.hear("= wrote"));
    assert_eq!(ram, disk);
}

/// Somebody is killed at a random moment of a snapshot: forkd, blockd, or the process of the
/// machine. The snapshot is there whole, or nothing of it is.
#[test]
fn a_snapshot_survives_the_death_of_anybody_whole_or_not_at_all() {
    let test = "a_snapshot_survives_the_death_of_anybody_whole_or_not_at_all";
    let Some(mut lab) = Lab::new(test) else { return };
    let place = place(&lab);
    let mut p = writing_parent(&lab);
    let seed = seed(1);
    println!("OFFSHOOT_SEED={seed}");
    let (mut rng, mut made) = (Rng::new(seed), 0);
    for round in 0..16 {
        let snap = place.join(format!("s{round}"));
        let after = Duration::from_micros(rng.below(120_000));
        println!("round {round}: after {after:?}");
        let mut command = lab.command(&["vm", "snapshot", "p", text(&snap)]);
        let command = command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut taking = command.spawn().unwrap();
        std::thread::sleep(after);
        if round % 4 == 3 {
            lab.kill_blockd();
            lab.start_blockd();
        } else {
            lab.kill_forkd();
            lab.start_forkd();
        }
        // It may fail or not: what counts is what is there.
        taking.wait().unwrap();
        made += u32::from(whole_or_not_at_all(&lab, &snap));
    }
    println!("{made} of 16 snapshots were done before the kill");
    is_unharmed(&mut p);

    // The process of the machine itself, when its part is done: the snapshot needs it no more.
    assert_eq!(p.ask("w"), "writing");
    let snap = place.join("last");
    let pid = lab.pid("p");
    let taking = std::thread::scope(|s| {
        let taking = s.spawn(|| lab.offshoot(&["vm", "snapshot", "p", text(&snap)]));
        until("memory is being written", || {
            names(&place).iter().any(|name| place.join(name).join("memory").exists())
        });
        kill(pid, Signal::KILL);
        taking.join().unwrap()
    });
    assert!(taking.status.success(), "{taking:?}");
    assert!(!processes_in(&lab.state()).contains(&pid));
    assert!(whole_or_not_at_all(&lab, &snap));
}

/// Runs the command line, and kills forkd at a step of its; then a new one is started. True if it
/// came to that; else the command did what it was asked for.
fn killed_at(lab: &mut Lab, step: &Step, args: &[&str]) -> bool {
    lab.settle();
    let tracer = Tracer::kill_at(lab.forkd_pid(), Some(step));
    let output = lab.offshoot(args);
    let killed = tracer.end();
    println!("{} at {} {}: killed {killed}", args[1], step.0, step.1);
    assert!(killed || output.status.success(), "{step:?}: {output:?}");
    if killed {
        lab.kill_forkd();
        lab.start_forkd();
    }
    killed
}

/// Looks at the steps of forkd for some work; `own` are among them, or nothing would be tried.
fn steps_with(lab: &Lab, args: &[&str], own: &[&str]) -> Vec<Step> {
    lab.settle();
    let steps = steps_of(lab.forkd_pid(), || drop(lab.done(args)));
    for step in own {
        assert!(steps.iter().any(|s| s.0 == *step), "no {step:?} among {steps:#?}");
    }
    steps
}

/// forkd is killed at every one of its steps of a snapshot.
#[test]
fn the_daemon_may_die_at_any_step_of_a_snapshot() {
    let Some(mut lab) = Lab::new("the_daemon_may_die_at_any_step_of_a_snapshot") else { return };
    let place = place(&lab);
    let mut p = writing_parent(&lab);
    let snap = place.join("s");
    let take = ["vm", "snapshot", "p", text(&snap)];
    let own = [
        "rename undo/ID.json.new",
        "mkdir snaps/.s.ID.partial",
        "fsync .s.ID.partial/memory",
        "fsync .s.ID.partial/manifest.json",
        "rename snaps/.s.ID.partial",
        "unlink undo/ID.json",
        "wait for an answer",
    ];
    let steps = steps_with(&lab, &take, &own);
    assert!(whole_or_not_at_all(&lab, &snap));
    let (mut killed, mut made) = (0, 0);
    for step in &steps {
        let was_killed = killed_at(&mut lab, step, &take);
        let there = whole_or_not_at_all(&lab, &snap);
        assert!(there || was_killed);
        killed += usize::from(was_killed);
        made += u32::from(there);
    }
    println!("killed at {killed} of {} steps; {made} snapshots were there", steps.len());
    assert!(killed * 10 > steps.len() * 8, "{killed} of {steps:#?}");
    is_unharmed(&mut p);
}

/// forkd is killed at every one of its steps of a restore: the machine is there or not, and if not,
/// nothing of it is; the snapshot is there in any case.
#[test]
fn the_daemon_may_die_at_any_step_of_a_restore() {
    let Some(mut lab) = Lab::new("the_daemon_may_die_at_any_step_of_a_restore") else { return };
    let snap = place(&lab).join("s");
    lab.disk("root");
    lab.run("p", &["root"]).number("p 9 9");
    lab.done(&["vm", "snapshot", "p", text(&snap)]);
    let before = lab.traces();
    let restore = ["vm", "restore", text(&snap), "q"];
    let gone = |lab: &Lab, what: &str| {
        lab.settle();
        let there = lab.offshoot(&["vm", "show", "q"]).status.success();
        if there {
            assert_eq!(lab.console("q").number("g 9"), 9, "{what}");
            lab.done(&["vm", "rm", "q", "--force"]);
        }
        lab.settle();
        let after = lab.traces();
        assert_eq!((&after.disks, after.exports), (&before.disks, before.exports), "{what}");
        there
    };
    let own = ["rename undo/ID.json.new", "rename ID/vm.json.new", "unlink undo/ID.json"];
    let steps = steps_with(&lab, &restore, &own);
    assert!(gone(&lab, "nobody was killed"));
    for step in &steps {
        let killed = killed_at(&mut lab, step, &restore);
        let there = gone(&lab, &format!("{step:?}"));
        assert!(there || killed);
    }
}

/// The power of the disk that snapshots are written to is cut, at a random moment and when the verb
/// has said that it is done: then the snapshot is there and whole, before that it is whole or not
/// there.
#[test]
fn a_snapshot_survives_a_power_cut_whole_or_not_at_all() {
    let test = "a_snapshot_survives_a_power_cut_whole_or_not_at_all";
    let Some(mount) = Mount::ext4(test, 64 << 20) else { return };
    let Some(mut lab) = Lab::new(test) else { return };
    let mut p = writing_parent(&lab);
    let place = mount.path().join("snaps");
    fs::create_dir(&place).unwrap();
    rustix::fs::sync();
    let seed = seed(1);
    println!("OFFSHOOT_SEED={seed}");
    let mut rng = Rng::new(seed);
    for round in 0..8 {
        let snap = place.join(format!("s{round}"));
        let done = round % 4 == 0;
        let mut command = lab.command(&["vm", "snapshot", "p", text(&snap)]);
        let command = command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut taking = command.spawn().unwrap();
        if done {
            assert!(taking.wait().unwrap().success());
        } else {
            let after = Duration::from_micros(rng.below(120_000));
            println!("round {round}: after {after:?}");
            std::thread::sleep(after);
        }
        // In this order: a power cut takes forkd as well, and it must not see the difference.
        mount.cut_power();
        lab.kill_forkd();
        taking.wait().unwrap();
        mount.power_up();
        lab.start_forkd();
        let there = whole_or_not_at_all(&lab, &snap);
        assert!(there || !done, "round {round}: it was said to be done");
    }
    is_unharmed(&mut p);
}
