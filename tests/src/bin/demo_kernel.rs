//! Writes the small kernel that tests and the demo boot to standard output.

use std::io::Write as _;

fn main() -> std::io::Result<()> {
    std::io::stdout().write_all(offshoot_tests::vm::GUEST)
}
