//! Flattening, as the catalogue knows it: of which disks it was begun, and when it begins by
//! itself.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a disk is being flattened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flattening {
    /// What it is to stand on: `base`, `nothing`, or the name of a disk.
    pub to: String,
    /// Bytes in a second that it may copy at most.
    #[serde(default)]
    pub rate: Option<u64>,
}

/// When a daemon flattens a disk by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum FlattenPolicy {
    /// Never.
    Manual,
    /// After every fork.
    AfterFork,
    /// When it stands on more segments than that.
    Depth(u64),
    /// When fewer bytes than that would be copied.
    Bytes(u64),
}

impl FlattenPolicy {
    /// What holds for disks when nobody has said anything: reads cost the same at any depth, so
    /// this is about the number of files.
    pub const DEFAULT: Self = FlattenPolicy::Depth(32);
}

impl fmt::Display for FlattenPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FlattenPolicy::Manual => f.write_str("manual"),
            FlattenPolicy::AfterFork => f.write_str("after-fork"),
            FlattenPolicy::Depth(n) => write!(f, "depth>{n}"),
            FlattenPolicy::Bytes(n) => write!(f, "bytes<{n}"),
        }
    }
}

impl FromStr for FlattenPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().map_err(|_| format!("{text} is not a number"));
        match (text, text.split_once('>'), text.split_once('<')) {
            ("manual", ..) => Ok(FlattenPolicy::Manual),
            ("after-fork", ..) => Ok(FlattenPolicy::AfterFork),
            (_, Some(("depth", n)), _) => number(n).map(FlattenPolicy::Depth),
            (_, _, Some(("bytes", n))) => number(n).map(FlattenPolicy::Bytes),
            _ => Err("a policy is `manual`, `after-fork`, `depth>N` or `bytes<N`".into()),
        }
    }
}

impl TryFrom<String> for FlattenPolicy {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<FlattenPolicy> for String {
    fn from(policy: FlattenPolicy) -> String {
        policy.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_read_as_they_are_written() {
        for text in ["manual", "after-fork", "depth>8", "bytes<1048576"] {
            assert_eq!(text.parse::<FlattenPolicy>().unwrap().to_string(), text);
        }
        for text in ["", "depth", "depth>", "depth<3", "bytes>3", "always"] {
            assert!(text.parse::<FlattenPolicy>().is_err(), "{text}");
        }
    }
}
