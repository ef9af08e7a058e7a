//! The targets by name.

mod image;
mod journal;
mod map_page;
mod nbd;
mod segment_table;
mod superblock;

/// One fuzz target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: of the target on the command line, and of its corpus directory.
    pub name: &'static str,
    /// Tries one input and says whether anything in it was accepted; panics when a promise is
    /// broken.
    pub run: fn(&[u8]) -> bool,
    /// Inputs made from valid structures, each with a name. All are accepted but those whose name
    /// starts with `refused-`.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

/// Every target.
pub const TARGETS: [Target; 6] = [
    Target { name: "superblock", run: superblock::run, seeds: superblock::seeds },
    Target { name: "journal", run: journal::run, seeds: journal::seeds },
    Target { name: "map_page", run: map_page::run, seeds: map_page::seeds },
    Target { name: "segment_table", run: segment_table::run, seeds: segment_table::seeds },
    Target { name: "image", run: image::run, seeds: image::seeds },
    Target { name: "nbd", run: nbd::run, seeds: nbd::seeds },
];

/// The target called `name`.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|t| t.name == name)
}
