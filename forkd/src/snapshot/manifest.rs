//! What a snapshot says about itself: JSON, with a version and a sum over all that it says.

use std::path::Path;

use format::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::memory::CHUNK;
use crate::api::types::{SnapshotDisk, VmParent};
use crate::devices::DISKS_MAX;
use crate::machine::SizeClass;
use crate::memory::PAGE;

/// Version of the manifest and of the files beside it.
pub const LAYOUT: u32 = 1;
/// Bytes of a manifest at most: that of a machine with 4 TiB is smaller.
pub const BYTES_MAX: u64 = 64 << 20;

/// Who and what a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Its identity.
    pub id: Uuid,
    /// The machine that it was taken of.
    pub vm: VmParent,
    /// Seconds since 1970 at its instant.
    pub created: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Processors.
    pub vcpus: u8,
    /// Its disks, in the order in which the machine sees them.
    pub disks: Vec<SnapshotDisk>,
    /// Whether it has a network card.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub network_card: bool,
    /// Processors and devices.
    pub state: FileSum,
    /// Memory.
    pub memory: MemorySums,
}

/// Length and sum of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSum {
    /// Its bytes.
    pub bytes: u64,
    /// CRC-32C of all of them.
    pub crc32c: u32,
}

/// Sums of guest memory, part by part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySums {
    /// Bytes of a part; the last one may be shorter.
    pub chunk_bytes: u64,
    /// CRC-32C of each part.
    pub crc32c: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    layout: u32,
    /// CRC-32C of the version, and of the rest as compact JSON.
    crc32c: u32,
    snapshot: Manifest,
}

fn sum(manifest: &Manifest) -> Result<u32> {
    let text = serde_json::to_vec(manifest).map_err(std::io::Error::from)?;
    Ok(crc32c::crc32c_append(crc32c::crc32c(&LAYOUT.to_le_bytes()), &text))
}

impl Manifest {
    /// As text.
    ///
    /// # Errors
    /// None that is met here.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let sealed = Sealed { layout: LAYOUT, crc32c: sum(self)?, snapshot: self.clone() };
        let mut text = serde_json::to_vec(&sealed).map_err(std::io::Error::from)?;
        text.push(b'\n');
        Ok(text)
    }

    /// From the text at `path`.
    ///
    /// # Errors
    /// `Corrupt` when it was altered or makes no sense, `Unsupported` when it is of another
    /// version.
    pub fn decode(text: &[u8], path: &Path) -> Result<Manifest> {
        /// Read first: what else there is depends on it.
        #[derive(Deserialize)]
        struct Version {
            layout: u32,
        }
        let within = |e: Error| e.tried("read").on(path.display().to_string());
        let strange =
            |e: serde_json::Error| within(Error::corrupt("it is no manifest").caused_by(e));
        let Version { layout } = serde_json::from_slice(text).map_err(strange)?;
        if layout != LAYOUT {
            let reason = format!("it is of version {layout}, this program knows {LAYOUT}");
            return Err(within(Error::new(Kind::Unsupported, reason)));
        }
        let Sealed { crc32c, snapshot, .. } = serde_json::from_slice(text).map_err(strange)?;
        if sum(&snapshot)? != crc32c {
            return Err(within(Error::corrupt("its checksum does not agree")));
        }
        match snapshot.contradicts_itself() {
            Some(why) => Err(within(Error::corrupt(why))),
            None => Ok(snapshot),
        }
    }

    fn contradicts_itself(&self) -> Option<&'static str> {
        let size = self.memory_bytes;
        let chunks = u64::try_from(self.memory.crc32c.len()).unwrap_or(u64::MAX);
        if size == 0 || !size.is_multiple_of(PAGE) {
            return Some("its memory is no number of pages");
        }
        if self.memory.chunk_bytes != CHUNK || chunks != size.div_ceil(CHUNK) {
            return Some("the sums of its memory are not as many as its memory needs");
        }
        (self.disks.len() > DISKS_MAX).then_some("it has more disks than a machine can have")
    }

    /// The shells that fit.
    #[must_use]
    pub fn class(&self) -> SizeClass {
        SizeClass { memory_bytes: self.memory_bytes, vcpus: self.vcpus }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn manifest() -> Manifest {
        Manifest {
            id: Uuid::from_u128(1),
            vm: VmParent { name: "web1".into(), id: Uuid::from_u128(2) },
            created: 3,
            memory_bytes: 3 << 20,
            vcpus: 2,
            disks: vec![SnapshotDisk {
                disk: "web1-snap-1-disk0".into(),
                id: Uuid::from_u128(4),
                read_only: false,
            }],
            network_card: true,
            state: FileSum { bytes: 5, crc32c: 6 },
            memory: MemorySums { chunk_bytes: CHUNK, crc32c: vec![7, 8, 9] },
        }
    }

    fn decode(text: &[u8]) -> Result<Manifest> {
        Manifest::decode(text, Path::new("/snap/manifest.json"))
    }

    /// Every character is turned into another one. What comes of it is the same manifest (a
    /// character that JSON does not look at) or a refusal that names the file.
    #[test]
    fn an_altered_manifest_is_refused_or_says_the_same() {
        let text = manifest().encode().unwrap();
        assert_eq!(decode(&text).unwrap(), manifest());
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut bad = text.clone();
                bad[at] ^= 1 << bit;
                match decode(&bad) {
                    Ok(read) => assert_eq!(read, manifest(), "byte {at}"),
                    Err(e) => {
                        let kind = e.kind();
                        assert!(matches!(kind, Kind::Corrupt | Kind::Unsupported), "{e}");
                        assert!(e.to_string().contains("/snap/manifest.json"), "{e}");
                    }
                }
            }
            if at + 1 < text.len() {
                assert!(decode(&text[..at]).is_err(), "cut at {at}");
            }
        }
    }

    #[test]
    fn another_version_and_contradictions_are_refused() {
        let text = String::from_utf8(manifest().encode().unwrap()).unwrap();
        let newer = decode(text.replace("\"layout\":1", "\"layout\":2").as_bytes()).unwrap_err();
        assert_eq!(newer.kind(), Kind::Unsupported);
        assert!(newer.to_string().contains("version 2"), "{newer}");
        let of = |change: fn(&mut Manifest)| {
            let mut changed = manifest();
            change(&mut changed);
            decode(&changed.encode().unwrap()).unwrap_err().to_string()
        };
        assert!(of(|m| m.memory_bytes = 5).contains("pages"));
        assert!(of(|m| m.memory.crc32c.truncate(2)).contains("as many"));
        assert!(of(|m| m.memory.chunk_bytes = 1).contains("as many"));
        assert!(of(|m| m.disks = vec![m.disks[0].clone(); 99]).contains("more disks"));
    }
}
