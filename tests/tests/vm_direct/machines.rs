//! Whole machines, through the real command line.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use offshoot_tests::rng::{Rng, seed};
use offshoot_tests::until;
use offshoot_tests::vm::{Console, Lab, kill, stop, word};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::process::Signal;

/// An address that the guest itself does not use, and pages from there.
const AT: (u64, u64) = (0x80_0000, 512);

/// How disks of a machine are reached, as `show` and `ls` say.
fn paths(lab: &Lab, name: &str) -> Vec<String> {
    let of = |vm: &serde_json::Value| -> Vec<String> {
        let disks = vm["disks"].as_array().unwrap().iter();
        disks.map(|d| d["path"].as_str().unwrap().to_owned()).collect()
    };
    let shown = of(&lab.show(name));
    let all = lab.json(&["vm", "ls"]);
    let listed = all.as_array().unwrap().iter().find(|vm| vm["name"] == name).unwrap();
    assert_eq!(of(listed), shown);
    shown
}

fn maps_guest_memory(lab: &Lab) -> bool {
    let pid = lab.blockd.as_ref().expect("it runs").pid();
    fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().contains("memfd:guest-memory")
}

/// Events of this kind, what they are about and what they say.
fn events(lab: &Lab, kind: &str) -> Vec<(String, String)> {
    let asked = offshoot_tests::daemon::ask(&lab.forkd_api(), "GET", "/v1/events", b"").unwrap();
    let text = String::from_utf8(asked.body).unwrap();
    let found = text.lines().filter_map(|line| serde_json::from_str(line).ok());
    let found = found.filter(|e: &serde_json::Value| e["kind"] == kind);
    let text = |e: &serde_json::Value, key: &str| e[key].as_str().unwrap().to_owned();
    found.map(|e| (text(&e, "object"), text(&e, "detail"))).collect()
}

/// The numbers that a guest has in memory and on its disk, and how many are wrong.
fn log_of(line: &str) -> (u64, u64, u64) {
    let number = |key: &str| word(line, key).parse::<u64>().unwrap();
    (number("ram"), number("disk"), number("wrong"))
}

/// A disk whose every page has its number in every word.
fn numbered_disk(lab: &Lab, name: &str) {
    let file = lab.store.path("numbers.raw");
    let page = |number: u64| number.to_le_bytes().repeat(512);
    let bytes: Vec<u8> = (0..4096).flat_map(page).collect();
    fs::write(&file, bytes).unwrap();
    lab.done(&["disk", "import", file.to_str().unwrap(), name]);
}

fn stop_reading(console: &mut Console) -> u64 {
    console.say("");
    let line = console.hear("= read");
    assert_eq!(word(&line, "wrong"), "0", "{line}");
    word(&line, "read").parse().unwrap()
}

/// The interface says which path a disk takes; what guest and host write the other one reads; and
/// blockd lets go when the machine ends, in order or by a kill.
#[test]
fn a_disk_is_direct_where_that_was_asked_for() {
    let Some(lab) = Lab::new("a_disk_is_direct_where_that_was_asked_for") else { return };
    numbered_disk(&lab, "data");
    lab.disk("plain");
    lab.disk("base");
    lab.done(&["disk", "seal", "base"]);
    let before = lab.traces();
    let mut console = lab.run("web1", &["data:direct", "plain", "base:ro:direct"]);
    assert_eq!(paths(&lab, "web1"), ["direct", "arena", "direct"]);
    assert!(lab.show("web1")["disks"][2]["read_only"].as_bool().unwrap());
    assert!(lab.done(&["vm", "ls"]).contains("data:direct,plain,base:ro:direct"));
    assert!(maps_guest_memory(&lab));

    // What the host wrote, and what the guest did.
    assert_eq!(console.ask(&format!("l {} {}", AT.0, AT.1)), "reading");
    std::thread::sleep(Duration::from_millis(100));
    assert!(stop_reading(&mut console) > 0);
    assert_eq!(console.number("p 5 4242"), 4242);
    assert_eq!(console.number("g 5"), 4242);
    // A driver that waits for the interrupt and flushes.
    assert_eq!(console.number("d 20"), 20);

    lab.done(&["vm", "pause", "web1"]);
    console.say("g 5");
    assert!(console.is_silent_for(Duration::from_millis(100)));
    lab.done(&["vm", "resume", "web1"]);
    assert_eq!(console.hear("= "), "= 4242");
    assert_eq!(paths(&lab, "web1"), ["direct", "arena", "direct"], "a pause changes nothing");

    lab.done(&["vm", "stop", "web1"]);
    until("blockd has let go", || !maps_guest_memory(&lab));
    let sector = lab.store.read("data")[5 * 512..5 * 512 + 8].to_vec();
    assert_eq!(u64::from_le_bytes(sector.try_into().unwrap()), 4242);
    lab.done(&["vm", "rm", "web1"]);

    lab.run("web2", &["data:direct"]);
    kill(lab.pid("web2"), Signal::KILL);
    assert_eq!(lab.end_of("web2")["reason"], "killed");
    until("blockd has let go", || !maps_guest_memory(&lab));
    lab.done(&["vm", "rm", "web2"]);
    lab.settle();
    let after = lab.traces();
    assert_eq!((after.exports, &after.disks), (before.exports, &before.disks));
}

/// A guest writes numbers to its disk, and each to memory when the disk has it. The first fork
/// changes the disk to an arena, which is told; in every child the disk has what memory says, and
/// at most the next one; and parent and children go on through arenas.
#[test]
fn a_fork_under_write_load_changes_the_path_and_tells() {
    let Some(lab) = Lab::new("a_fork_under_write_load_changes_the_path_and_tells") else { return };
    for round in 0..4 {
        let (root, p) = (format!("root{round}"), format!("p{round}"));
        lab.disk(&root);
        let mut parent = lab.run(&p, &[&format!("{root}:direct")]);
        assert_eq!(parent.ask("w"), "writing");
        std::thread::sleep(Duration::from_millis(30 * round));
        assert_eq!(paths(&lab, &p), ["direct"]);
        assert_eq!(events(&lab, "path-changed").len() as u64, round);
        for child in [format!("a{round}"), format!("b{round}")] {
            lab.done(&["vm", "fork", &p, &child]);
            let (ram, disk, wrong) = log_of(&lab.console(&child).hear("= forked"));
            assert!(disk >= ram && disk <= ram + 1 && wrong == 0, "{ram} {disk} {wrong}");
            assert!(ram > 0, "nothing was written before the fork");
            assert_eq!(
                (paths(&lab, &p), paths(&lab, &child)),
                (vec!["arena".into()], vec!["arena".into()])
            );
            lab.done(&["vm", "rm", &child, "--force"]);
        }
        // Once, and by name.
        let told = events(&lab, "path-changed");
        assert_eq!(told.len() as u64, round + 1);
        let (object, detail) = told.last().unwrap();
        assert!(object == &format!("vm {p}") && detail.contains(&root), "{object}: {detail}");
        parent.say("");
        let (ram, disk, wrong) = log_of(&parent.hear("= wrote"));
        assert!(ram == disk && wrong == 0, "{ram} {disk} {wrong}");
        lab.done(&["vm", "rm", &p, "--force"]);
    }
    assert!(!maps_guest_memory(&lab));
    lab.settle();
    let disks = BTreeSet::from(["root0", "root1", "root2", "root3"].map(String::from));
    assert_eq!(lab.traces().disks, disks);
}

/// A guest reads its disk into pages that it has just written, over and over, while it is forked
/// for the first time, and snapshotted: parent, child and restored machine go on with the loop, and
/// every word of every page is what the disk has. A read that blockd did into memory that was
/// mapped anew meanwhile would be missing there.
#[test]
fn what_blockd_read_into_memory_is_in_every_machine() {
    let Some(lab) = Lab::new("what_blockd_read_into_memory_is_in_every_machine") else { return };
    let seed = seed(0xd9);
    println!("repeat with: OFFSHOOT_SEED={seed} cargo test --test vm_direct what_blockd_read");
    let mut rng = Rng::new(seed);
    numbered_disk(&lab, "numbers");
    for round in 0..8 {
        let mut parent = lab.run("p", &["numbers:direct"]);
        assert_eq!(parent.ask(&format!("l {} {}", AT.0, AT.1)), "reading");
        std::thread::sleep(Duration::from_micros(rng.below(200_000)));
        let mut other = if round % 4 == 3 {
            let place = lab.store.path(&format!("snapshot{round}"));
            let place = place.to_str().unwrap();
            lab.done(&["vm", "snapshot", "p", place]);
            lab.done(&["vm", "restore", place, "c"]);
            lab.console("c")
        } else {
            lab.done(&["vm", "fork", "p", "c"]);
            lab.console("c")
        };
        assert_eq!(
            (paths(&lab, "p"), paths(&lab, "c")),
            (vec!["arena".into()], vec!["arena".into()])
        );
        std::thread::sleep(Duration::from_millis(50));
        let (in_parent, in_other) = (stop_reading(&mut parent), stop_reading(&mut other));
        println!("round {round}: {in_parent} and {in_other} reads");
        lab.done(&["vm", "rm", "c", "--force"]);
        lab.done(&["vm", "rm", "p", "--force"]);
    }
    assert_eq!(events(&lab, "path-changed").len(), 8);
}

/// A machine that stands is forked, and goes on afterwards.
#[test]
fn a_paused_machine_is_forked() {
    let Some(lab) = Lab::new("a_paused_machine_is_forked") else { return };
    lab.disk("root");
    lab.disk("more");
    let mut parent = lab.run("p", &["root:direct", "more:direct"]);
    assert_eq!(parent.number("p 9 77"), 77);
    lab.done(&["vm", "pause", "p"]);
    lab.done(&["vm", "fork", "p", "a", "b"]);
    assert_eq!(lab.show("p")["state"], "paused");
    assert_eq!(paths(&lab, "p"), ["arena", "arena"]);
    let (_, detail) = events(&lab, "path-changed").remove(0);
    assert!(detail.contains("root") && detail.contains("more"), "{detail}");
    for name in ["a", "b"] {
        assert_eq!(lab.console(name).number("g 9"), 77);
    }
    lab.done(&["vm", "resume", "p"]);
    assert_eq!(parent.number("p 9 78"), 78);
    assert_eq!(lab.console("a").number("g 9"), 77);
}

/// blockd is killed and upgraded under a machine that writes; the path stays, and the machine can
/// be forked afterwards.
#[test]
fn a_machine_survives_the_death_of_blockd() {
    let Some(mut lab) = Lab::new("a_machine_survives_the_death_of_blockd") else { return };
    lab.disk("root");
    let mut parent = lab.run("p", &["root:direct"]);
    assert_eq!(parent.ask("w"), "writing");
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(50));
        lab.kill_blockd();
        std::thread::sleep(Duration::from_millis(20));
        lab.start_blockd();
        assert_eq!(paths(&lab, "p"), ["direct"]);
    }
    until("blockd has the memory again", || maps_guest_memory(&lab));
    lab.done(&["vm", "fork", "p", "c"]);
    let (ram, disk, wrong) = log_of(&lab.console("c").hear("= forked"));
    assert!(disk >= ram && disk <= ram + 1 && wrong == 0, "{ram} {disk} {wrong}");
    parent.say("");
    let (ram, disk, wrong) = log_of(&parent.hear("= wrote"));
    assert!(ram == disk && wrong == 0, "{ram} {disk} {wrong}");
}

/// When blockd does not give the ring back, the fork is refused by name, nothing is made, and the
/// machine goes on as before, also for a restarted forkd. A fork afterwards is made, and a forkd
/// that restarts then knows what became of the disk.
#[test]
fn a_fork_is_refused_when_the_path_cannot_change() {
    let Some(mut lab) = Lab::new("a_fork_is_refused_when_the_path_cannot_change") else { return };
    numbered_disk(&lab, "root");
    let mut parent = lab.run("p", &["root:direct"]);
    lab.settle();
    let before = lab.traces();
    assert_eq!(parent.ask(&format!("l {} {}", AT.0, AT.1)), "reading");
    // The ring is asked for by the process; what comes before that asks blockd as well, and is
    // refused in another way when it is gone. So it is stopped when it is asked.
    let blockd = lab.blockd.as_ref().expect("it runs").pid();
    let snapshot = lab.store.path("snapshot");
    let attempts = [vec!["fork", "p", "c"], vec!["snapshot", "p", snapshot.to_str().unwrap()]];
    for attempt in &attempts {
        stop(blockd);
        let said = lab.offshoot(&[&["vm"][..], attempt].concat());
        kill(blockd, Signal::CONT);
        assert!(!said.status.success(), "{said:?}");
        let said = String::from_utf8(said.stderr).unwrap();
        assert!(said.contains("vm p"), "{said}");
    }
    lab.settle();
    assert_eq!(lab.traces(), before);
    assert!(!snapshot.exists());
    assert_eq!((paths(&lab, "p"), events(&lab, "path-changed").len()), (vec!["direct".into()], 0));
    lab.kill_forkd();
    lab.start_forkd();
    assert_eq!(paths(&lab, "p"), ["direct"]);
    lab.done(&["vm", "fork", "p", "c"]);
    lab.kill_forkd();
    lab.start_forkd();
    assert_eq!((paths(&lab, "p"), paths(&lab, "c")), (vec!["arena".into()], vec!["arena".into()]));
    stop_reading(&mut parent);
    lab.done(&["vm", "stop", "p", "--force"]);
    lab.stop_forkd();
    lab.start_forkd();
    assert_eq!(paths(&lab, "p"), ["arena"], "also of one that has ended");
}

/// Where a restored machine is asked for with a direct disk, that is refused, and so is a path that
/// does not exist.
#[test]
fn what_cannot_be_direct_is_refused() {
    let Some(lab) = Lab::new("what_cannot_be_direct_is_refused") else { return };
    lab.disk("root");
    lab.run("p", &["root"]);
    let place = lab.store.path("snapshot");
    let place = place.to_str().unwrap();
    lab.done(&["vm", "snapshot", "p", place]);
    let said = lab.offshoot(&["vm", "restore", place, "q", "--disk", "root:direct"]);
    let said = String::from_utf8(said.stderr).unwrap();
    assert!(said.contains("cannot be shared") && said.contains("leave out"), "{said}");
    let body = format!(
        r#"{{"name":"q","kernel":"{}","memory_bytes":33554432,"vcpus":1,
            "disks":[{{"disk":"root","path":"magic"}}]}}"#,
        lab.store.path("kernel").display()
    );
    let asked = |path: &str, body: &str| {
        offshoot_tests::daemon::ask(&lab.forkd_api(), "POST", path, body.as_bytes()).unwrap()
    };
    assert_eq!(asked("/v1/vms", &body).status, 400);
    lab.refused(&["vm", "show", "q"], "not-found");
}

/// The memory file of a machine, from its process.
fn memory_file(pid: u32) -> PathBuf {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let mut files = open.map(|fd| fd.path());
    let is = |fd: &PathBuf| {
        let to = fs::read_link(fd).unwrap_or_default();
        to.as_path() == Path::new("/memfd:guest-memory (deleted)")
    };
    files.find(is).expect("it has a memory file")
}

/// The negative control of the order: while somebody else could still write to the memory file
/// when a machine is cut, as blockd could if the path changed later, there is no cut. The machine
/// goes on, and is forked when that one is gone.
#[test]
fn nobody_may_write_to_memory_that_is_cut() {
    let Some(lab) = Lab::new("nobody_may_write_to_memory_that_is_cut") else { return };
    numbered_disk(&lab, "root");
    let mut parent = lab.run("p", &["root:direct"]);
    assert_eq!(parent.ask(&format!("l {} {}", AT.0, AT.1)), "reading");
    let file = fs::File::options().read(true).write(true).open(memory_file(lab.pid("p"))).unwrap();
    let file = OwnedFd::from(file);
    let len = 1 << 20;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a mapping of its own, never accessed.
    let map = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &file, 0) }.unwrap();
    let said = lab.refused(&["vm", "fork", "p", "c"], "busy");
    assert!(said.contains("maps the file for writing"), "{said}");
    assert_eq!(paths(&lab, "p"), ["arena"], "it had changed before, which an event told");
    assert_eq!(events(&lab, "path-changed").len(), 1);
    // SAFETY: made above.
    unsafe { munmap(map, len) }.unwrap();
    drop(file);
    lab.done(&["vm", "fork", "p", "c"]);
    let mut child = lab.console("c");
    std::thread::sleep(Duration::from_millis(50));
    stop_reading(&mut child);
    stop_reading(&mut parent);
    lab.settle();
    assert!(!lab.traces().disks.is_empty());
}
