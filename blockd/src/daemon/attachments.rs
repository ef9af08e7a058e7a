//! What is to be served, in a file of the store: a daemon that starts serves it again.
//!
//! Invariants:
//! - The file is replaced as a whole: new content synced, then renamed, then the name synced. A
//!   crash leaves the old or the new one.
//! - It says that a disk is served before its socket exists, and until after its socket is gone: a
//!   client that could connect before a crash can connect after it. The other way round, a guest
//!   that came to a new socket would wait for ever for a daemon that does not know it.
//! - Children of a fork are told ahead of its instant in a file of its own that nobody syncs: it is
//!   for who comes after a killed daemon. A power cut takes the clients, too.
//!
//! Tests: `daemon_serves::a_socket_that_exists_is_remembered`, `what_was_served_is_served_again`.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use format::{Context as _, Error, Kind, Result};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::api::types::ExportSpec;
use crate::serve::Limits;

/// Its name in the folder of the store.
const FILE: &str = "attachments.json";
const NEW_FILE: &str = "attachments.json.new";
const AHEAD_FILE: &str = "attachments.ahead.json";
const VERSION: u32 = 1;

/// A disk that is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its identity: names can change while no daemon runs.
    pub disk: Uuid,
    /// What it may do at most.
    #[serde(default)]
    pub limits: Limits,
    /// Where it is served.
    pub exports: Vec<ExportSpec>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    disks: Vec<Attachment>,
}

/// The file.
pub struct AttachmentsFile {
    folder: PathBuf,
}

impl AttachmentsFile {
    /// The file of a store.
    pub fn of(store: &Path) -> Self {
        AttachmentsFile { folder: store.to_owned() }
    }

    fn object(&self) -> String {
        self.folder.join(FILE).display().to_string()
    }

    /// What it says.
    ///
    /// # Errors
    /// `Corrupt` or `Unsupported` when it cannot be understood, or what the host reports.
    pub fn read(&self) -> Result<Vec<Attachment>> {
        let mut disks = self.read_durable()?;
        let ahead = self.read_ahead().into_iter();
        let more: Vec<_> = ahead.filter(|a| disks.iter().all(|d| d.disk != a.disk)).collect();
        disks.extend(more);
        Ok(disks)
    }

    /// What was told ahead of a fork: nothing, if a crash has left a part of it.
    fn read_ahead(&self) -> Vec<Attachment> {
        let text = fs::read(self.folder.join(AHEAD_FILE)).unwrap_or_default();
        let content = serde_json::from_slice::<Content>(&text).ok();
        content.filter(|content| content.version == VERSION).map_or(Vec::new(), |c| c.disks)
    }

    fn read_durable(&self) -> Result<Vec<Attachment>> {
        let text = match fs::read(self.folder.join(FILE)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            read => read.context("read", || self.object())?,
        };
        let content: Content = serde_json::from_slice(&text).map_err(|e| {
            Error::corrupt("it is not what a daemon writes")
                .caused_by(e)
                .tried("read")
                .on(self.object())
                .hint("move it away, and attach the disks again")
        })?;
        if content.version != VERSION {
            let reason = format!("version {} is not known here", content.version);
            return Err(Error::new(Kind::Unsupported, reason)
                .tried("read")
                .on(self.object())
                .hint("use a newer version of blockd"));
        }
        Ok(content.disks)
    }

    /// Says what is going to be served besides, for who comes after a killed daemon, until the next
    /// [`AttachmentsFile::write`].
    ///
    /// # Errors
    /// What the host reports.
    pub fn write_ahead(&self, disks: &[Attachment]) -> Result<()> {
        let content = Content { version: VERSION, disks: disks.to_vec() };
        let text = serde_json::to_vec_pretty(&content).map_err(io::Error::from);
        text.and_then(|text| fs::write(self.folder.join(AHEAD_FILE), text))
            .map_err(Error::from)
            .context("write", || self.folder.join(AHEAD_FILE).display().to_string())
    }

    /// Replaces what it says, durably.
    ///
    /// # Errors
    /// What the host reports; the file then says the old or the new.
    pub fn write(&self, disks: &[Attachment]) -> Result<()> {
        let content = Content { version: VERSION, disks: disks.to_vec() };
        self.replace(&content).map_err(Error::from).context("write", || self.object())
    }

    fn replace(&self, content: &Content) -> io::Result<()> {
        let new = self.folder.join(NEW_FILE);
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(content)?)?;
        // Before the rename: else a power cut can leave the new name with nothing in it.
        file.sync_all()?;
        fs::rename(&new, self.folder.join(FILE))?;
        // Emptied and not removed: to make it again for every fork costs more than to write it.
        match File::options().write(true).truncate(true).open(self.folder.join(AHEAD_FILE)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        File::open(&self.folder)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::ExportKind;

    #[test]
    fn what_was_written_is_read_back_and_damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = AttachmentsFile::of(dir.path());
        assert_eq!(file.read().unwrap(), []);
        let attachment = Attachment {
            disk: Uuid::from_u128(7),
            limits: Limits { iops: 100, ..Limits::default() },
            exports: vec![ExportSpec {
                kind: ExportKind::VhostUser,
                socket: "/run/a.sock".parse().unwrap(),
                tls: None,
                read_only: false,
                queues: 2,
                poll_us_max: None,
                packed: true,
            }],
        };
        file.write(std::slice::from_ref(&attachment)).unwrap();
        assert_eq!(file.read().unwrap(), std::slice::from_ref(&attachment));

        let child = Attachment { disk: Uuid::from_u128(8), ..attachment.clone() };
        file.write_ahead(&[child.clone(), attachment.clone()]).unwrap();
        assert_eq!(file.read().unwrap(), [attachment.clone(), child], "each of them once");
        fs::write(dir.path().join(AHEAD_FILE), "{").unwrap();
        assert_eq!(file.read().unwrap(), std::slice::from_ref(&attachment), "torn");
        file.write(&[]).unwrap();
        assert_eq!(file.read().unwrap(), []);

        fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(file.read().unwrap_err().kind(), Kind::Corrupt);
        fs::write(dir.path().join(FILE), r#"{"version": 9, "disks": []}"#).unwrap();
        assert_eq!(file.read().unwrap_err().kind(), Kind::Unsupported);
    }
}
