//! Builds the guest programs of the virtual machine tests: programs for a bare machine, which cargo
//! cannot build beside programs for this one.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    build("src/payload/guest", "guest.elf");
    build("src/vm/guest", "kernel.elf");
}

/// Builds the program whose source is in `folder`.
fn build(folder: &str, name: &str) {
    let [source, script] = ["main.rs", "link.ld"].map(|file| format!("{folder}/{file}"));
    println!("cargo::rerun-if-changed={folder}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where")).join(name);
    let link = format!("-nostartfiles -nostdlib -static -Wl,-T,{script} -Wl,--build-id=none");
    let built = Command::new(env::var_os("RUSTC").expect("cargo says which compiler"))
        .args(["--edition", "2024", "--crate-type", "bin", "--crate-name", "guest", "-O"])
        .args(["-C", "panic=abort", "-C", "relocation-model=static", "-C", "target-cpu=x86-64"])
        .args(["--target", "x86_64-unknown-linux-gnu", "-C", "linker=gcc"])
        .args(["-C", &format!("link-args={link}"), "-o"])
        .arg(out)
        .arg(&source)
        .status()
        .expect("the compiler starts");
    assert!(built.success(), "the guest program {folder} does not compile");
}
