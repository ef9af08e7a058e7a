//! `disk fork`

use blockd::api::types::ForkDisk;
use clap::Args;

use super::LostTail;

/// `disk fork`
#[derive(Debug, Args)]
pub struct Fork {
    /// Name of the disk
    pub parent: String,
    /// Names of its children
    #[arg(required = true, value_name = "CHILD")]
    pub children: Vec<String>,
    /// Another disk to fork at the same instant, and its children: all are forked, or none
    #[arg(long, value_name = "DISK:CHILD[,CHILD...]", value_parser = with)]
    pub with: Vec<ForkDisk>,
    #[command(flatten)]
    pub tail: LostTail,
}

/// A disk and its children.
fn with(text: &str) -> Result<ForkDisk, String> {
    let (disk, children) = text.split_once(':').ok_or("it is a disk, a colon, and its children")?;
    let children = children.split(',').map(str::to_owned).collect();
    Ok(ForkDisk { disk: disk.to_owned(), children })
}
