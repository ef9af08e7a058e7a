//! Builds the guest program of the virtual machine tests: a program for a bare machine, which
//! cargo cannot build beside programs for this one.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    let source = "src/payload/guest/main.rs";
    let script = "src/payload/guest/link.ld";
    println!("cargo::rerun-if-changed={source}");
    println!("cargo::rerun-if-changed={script}");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where")).join("guest.elf");
    let link = format!("-nostartfiles -nostdlib -static -Wl,-T,{script} -Wl,--build-id=none");
    let built = Command::new(env::var_os("RUSTC").expect("cargo says which compiler"))
        .args(["--edition", "2024", "--crate-type", "bin", "--crate-name", "guest", "-O"])
        .args(["-C", "panic=abort", "-C", "relocation-model=static", "-C", "target-cpu=x86-64"])
        .args(["--target", "x86_64-unknown-linux-gnu", "-C", "linker=gcc"])
        .args(["-C", &format!("link-args={link}"), "-o"])
        .arg(out)
        .arg(source)
        .status()
        .expect("the compiler starts");
    assert!(built.success(), "the guest program of the tests does not compile");
}
