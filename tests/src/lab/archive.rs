//! Archives that a kernel unpacks as its first file system (cpio, format "newc").
//!
//! A kernel unpacks several that follow each other, and what comes later replaces what came before.

use std::collections::BTreeSet;
use std::path::Path;

/// An archive in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

impl Archive {
    /// Adds a file that can be executed, and the folders above it. `path` has no slash in front.
    ///
    /// # Panics
    /// When the path is not plain text.
    pub fn add(&mut self, path: &str, content: &[u8]) {
        let parents: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
        for parent in parents.iter().rev() {
            let parent = parent.to_str().expect("a plain path").to_owned();
            if !parent.is_empty() && self.folders.insert(parent.clone()) {
                self.entry(&parent, FOLDER, &[]);
            }
        }
        self.entry(path, PROGRAM, content);
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("files below 4 GiB");
        let name = u32::try_from(path.len() + 1).expect("a path");
        // Inode, mode, owner, group, links, time, size, device and its kind twice, name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 1, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive with its end.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }
}
