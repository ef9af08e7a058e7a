//! `disk flatten`, `disk flatten-policy`, `store flatten-policy`

use blockd::api::types::SetFlattenPolicy;
use clap::Args;

use super::LostTail;
use crate::size;

/// `disk flatten`
#[derive(Debug, Args)]
pub struct Flatten {
    /// Name of the disk
    pub name: String,
    /// What it is to stand on: `base` (the nearest ancestor that is a disk by itself, else the
    /// lowest segment), `nothing`, or the name of a disk that it stands on
    #[arg(long, value_name = "base|nothing|DISK", default_value = "base")]
    pub to: String,
    /// Bytes in a second that are copied at most; without it, as fast as guests do not notice
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub rate: Option<u64>,
    /// Wait until it is done (without a daemon, it always is)
    #[arg(long)]
    pub wait: bool,
    #[command(flatten)]
    pub tail: LostTail,
}

/// `disk flatten-policy`
#[derive(Debug, Args)]
pub struct DiskPolicy {
    /// Name of the disk
    pub name: String,
    /// `manual`, `after-fork`, `depth>N`, `bytes<SIZE`, or `default` for what the store says;
    /// without it, shows what is set
    #[arg(value_parser = policy)]
    pub policy: Option<SetFlattenPolicy>,
}

/// `store flatten-policy`
#[derive(Debug, Args)]
pub struct StorePolicy {
    /// `manual`, `after-fork`, `depth>N`, `bytes<SIZE` or `default`; without it, shows what is set
    #[arg(value_parser = policy)]
    pub policy: Option<SetFlattenPolicy>,
}

fn policy(text: &str) -> Result<SetFlattenPolicy, String> {
    if text == "default" {
        return Ok(SetFlattenPolicy { policy: None });
    }
    let bytes = text.strip_prefix("bytes<").map(size::parse).transpose()?;
    let text = bytes.map_or(text.to_owned(), |bytes| format!("bytes<{bytes}"));
    Ok(SetFlattenPolicy { policy: Some(text.parse()?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_policies_have_suffixes() {
        let shown = |text| policy(text).unwrap().policy.map(|p| p.to_string());
        assert_eq!(shown("bytes<1M").as_deref(), Some("bytes<1048576"));
        assert_eq!(shown("depth>3").as_deref(), Some("depth>3"));
        assert_eq!(shown("default"), None);
        assert!(policy("bytes<lots").is_err() && policy("often").is_err());
    }
}
