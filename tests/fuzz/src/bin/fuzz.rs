//! The fuzz engine around the targets. The environment variable `OFFSHOOT_FUZZ_TARGET` names the
//! target; everything else is the engine's own command line. `make fuzz` builds and calls it.
#![no_main]

use std::env;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static RUN: OnceLock<fn(&[u8]) -> bool> = OnceLock::new();

/// The negative control: the engine must find this panic, which it only can when the build has
/// coverage instrumentation and comparisons are traced.
fn canary(data: &[u8]) -> bool {
    let word = data.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    assert!(word != Some(0x7e57_ab1e_0ff5_4007), "the canary was found");
    false
}

fn chosen() -> fn(&[u8]) -> bool {
    let name = env::var("OFFSHOOT_FUZZ_TARGET").unwrap_or_default();
    match offshoot_fuzz::target(&name) {
        Some(target) => target.run,
        None if name == "canary" => canary,
        None => panic!("OFFSHOOT_FUZZ_TARGET={name}: there is no such target"),
    }
}

fuzz_target!(|data: &[u8]| {
    RUN.get_or_init(chosen)(data);
});
