//! A host that gives no virtual machines: why not is told when one is to run, with what to do, and
//! the daemon goes on.

use std::process::Command;

use offshoot_tests::daemon::program;
use offshoot_tests::mount::have;
use offshoot_tests::vm::Lab;
use offshoot_tests::{skip, until};

/// Takes `/dev/kvm` away, in a `/dev` of its own with what programs need.
const MISSING: &str = "cd \"$0\" && mkdir dev && mount --bind /dev dev &&
    mount -t tmpfs tmpfs /dev && mkdir /dev/shm && mount --bind dev/shm /dev/shm &&
    for f in null zero random urandom; do : >/dev/$f && mount --bind dev/$f /dev/$f; done";
/// Where devices are not, nobody may open one.
const FORBIDDEN: &str = "mount --bind /dev/kvm /dev/kvm && mount -o remount,bind,nodev /dev/kvm";
/// Something else has its place, and knows no version of its interface.
const NO_KVM: &str = "mount --bind /dev/null /dev/kvm";

#[test]
fn a_host_without_kvm_is_told_of_with_what_to_do() {
    let test = "a_host_without_kvm_is_told_of_with_what_to_do";
    if !rustix::process::geteuid().is_root() {
        return skip(test, "mounting a file system needs root");
    }
    if !have(test, &["unshare", "mount"]) {
        return;
    }
    // No shells are made ahead, which would be tried again and again.
    let Some(mut lab) = Lab::with(test, &["--pool-size", "0"]) else { return };
    lab.disk("root");
    let kernel = lab.store.path("kernel").display().to_string();
    for (change, says, hint) in [
        (MISSING, "cannot open /dev/kvm", "kvm module"),
        (FORBIDDEN, "cannot open /dev/kvm", "group kvm"),
        (NO_KVM, "its interface has version -1, not 12", "kernel"),
    ] {
        lab.stop_forkd();
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("unshare");
        let script = format!("({change}) || exit 99; shift; exec \"$@\"");
        command.args(["--mount", "sh", "-c", &script]).arg(folder.path());
        command.arg("forkd").arg(program("forkd"));
        lab.start_forkd_by(command);
        let run = ["vm", "run", "web1", "--kernel", &kernel, "--mem", "32M", "--disk", "root"];
        let told = lab.refused(&run, "unsupported");
        assert!(told.contains(says) && told.contains(hint), "{told}");
        lab.refused(&["vm", "show", "web1"], "not-found");
        until("nothing is left", || {
            let left = lab.traces();
            (left.folders, left.processes, left.exports) == (0, 0, 0)
        });
        lab.done(&["disk", "check", "root"]);
    }
    lab.stop_forkd();
    lab.start_forkd();
    drop(lab.run("web1", &["root"]));
}
