//! `disk fork`

use blockd::api::types::{FlattenWhen, ForkDisk, ForkMode};
use blockd::storedir::BaseRule;
use clap::{Args, ValueEnum};
use uuid::Uuid;

use super::LostTail;
use crate::size;

/// `disk fork`
#[derive(Debug, Args)]
pub struct Fork {
    /// Name of the disk
    #[arg(required_unless_present = "release")]
    pub parent: Option<String>,
    /// Names of its children
    #[arg(required_unless_present = "release", value_name = "CHILD")]
    pub children: Vec<String>,
    /// Another disk to fork at the same instant, and its children: all are forked, or none
    #[arg(long, value_name = "DISK:CHILD[,CHILD...]", value_parser = with)]
    pub with: Vec<ForkDisk>,
    /// How children come to hold what their parents hold
    #[arg(long, default_value = "live")]
    pub mode: Mode,
    /// On which segment below its parent a child that inherits is to stand
    #[arg(long, value_name = "RULE")]
    pub base: Option<Base>,
    /// Inherit if fewer bytes than this are to be copied in all, else fork live
    #[arg(long, value_parser = size::parse, value_name = "BYTES")]
    pub copy_threshold: Option<u64>,
    /// Let no request of disks in service begin after the cut until `--release`, or for so many
    /// milliseconds (60,000 at most): the answer names the cut by a token
    #[arg(long, value_name = "MS")]
    pub hold: Option<u64>,
    /// Let the disks of a fork go on that was made with `--hold`
    #[arg(long, value_name = "TOKEN", conflicts_with_all = ["parent", "children", "with", "hold"])]
    pub release: Option<Uuid>,
    /// What becomes of the depth of the disks: `auto` (what their policies say, for disks in
    /// service), `manual` (nothing), or `now` (the disks and their children are flattened)
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    pub flatten: When,
    #[command(flatten)]
    pub tail: LostTail,
}

/// How children come to hold what their parents hold.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Mode {
    /// Parents and children go on over what is frozen; nothing is copied
    Live,
    /// Parents stay as they are; what they have of their own is copied into the children. A parent
    /// that stands on nothing is sealed, and the children stand on it
    Inherit,
}

impl From<Mode> for ForkMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Live => ForkMode::Live,
            Mode::Inherit => ForkMode::Inherit,
        }
    }
}

/// The base of children that inherit.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Base {
    /// The first segment above the parent's own in which anything was written; this is the default
    FirstNonempty,
    /// The root: all that was written above it is copied
    RootMerged,
}

impl From<Base> for BaseRule {
    fn from(base: Base) -> Self {
        match base {
            Base::FirstNonempty => BaseRule::FirstNonempty,
            Base::RootMerged => BaseRule::RootMerged,
        }
    }
}

/// When to flatten.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum When {
    Auto,
    Manual,
    Now,
}

impl From<When> for FlattenWhen {
    fn from(when: When) -> Self {
        match when {
            When::Auto => FlattenWhen::Auto,
            When::Manual => FlattenWhen::Manual,
            When::Now => FlattenWhen::Now,
        }
    }
}

/// A disk and its children.
fn with(text: &str) -> Result<ForkDisk, String> {
    let (disk, children) = text.split_once(':').ok_or("it is a disk, a colon, and its children")?;
    let children = children.split(',').map(str::to_owned).collect();
    Ok(ForkDisk { disk: disk.to_owned(), children, serve: Vec::new() })
}
