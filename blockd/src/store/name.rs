//! The one rule for file names, shared by all stores.

use format::{Error, Result};

/// Longest file name that Linux file systems take, in bytes.
const NAME_MAX: usize = 255;

/// Accepts plain file names and nothing that could leave the folder.
pub(super) fn check(name: &str) -> Result<()> {
    let reason = match name {
        "" => "a file name may not be empty",
        "." | ".." => "this is a folder, not a file name",
        _ if name.contains('/') => "a file name may not contain a slash",
        _ if name.contains('\0') => "a file name may not contain a zero byte",
        _ if name.len() > NAME_MAX => "a file name may have at most 255 bytes",
        _ => return Ok(()),
    };
    Err(Error::invalid(reason).tried("use the name").on(format!("{name:?}")))
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn only_plain_names_pass() {
        for good in ["a", "disk 1", ".hidden", "...", &"x".repeat(255), "ä"] {
            assert!(check(good).is_ok(), "{good:?}");
        }
        for bad in ["", ".", "..", "a/b", "/", "../a", "a\0", &"x".repeat(256)] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }
}
