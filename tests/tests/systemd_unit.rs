//! The unit for systemd that is shipped is one that systemd understands to the last line.

use std::fs;
use std::path::Path;
use std::process::Command;

use offshoot_tests::daemon::program;
use offshoot_tests::mount::have;

/// What systemd says of a unit: whether it takes it, and every complaint.
fn verify(unit: &str) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("offshoot-blockd.service");
    fs::write(&path, unit).unwrap();
    let mut command = Command::new("systemd-analyze");
    // What is wrong with other units of this machine is not ours.
    command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(path);
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn systemd_has_nothing_to_say_about_the_unit() {
    if !have("systemd_unit::systemd_has_nothing_to_say_about_the_unit", &["systemd-analyze"]) {
        return;
    }
    let path = "../tools/systemd/offshoot-blockd.service";
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let (installed, built) = ("/usr/bin/blockd", program("blockd"));
    let unit = fs::read_to_string(shipped).unwrap();
    assert_eq!(unit.matches(installed).count(), 1);
    let unit = unit.replace(installed, built.to_str().unwrap());

    assert_eq!(verify(&unit), (true, String::new()));

    let (_, said) = verify(&unit.replace("NoNewPrivileges=", "NoNewPrivilege="));
    assert!(said.contains("NoNewPrivilege"), "a complaint is noticed: {said:?}");
    let (taken, said) = verify(&unit.replace("ExecStart=", "#"));
    assert!(!taken, "{said}");
}
