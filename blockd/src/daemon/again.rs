//! From one daemon to the next: what was served is served again, whether the last daemon ended in
//! order, was killed, or handed its sockets over.
//!
//! Invariant: what is remembered (`attachments.rs`) stays as it is when a daemon ends.

use format::Result;

use super::Daemon;
use super::attachments::Attachment;
use super::doors::{Door, HandedDoor};
use super::served::{Failed, Kept, Served, take_out_of_service};
use crate::api::types::{AttachDisk, EventKind, ExportSpec};

/// What opens the disk of an attachment as widely as any of its sockets needs it.
fn widest(attachment: &Attachment, first: &ExportSpec) -> AttachDisk {
    let exports = &attachment.exports;
    let export = ExportSpec {
        read_only: exports.iter().all(|e| e.read_only),
        queues: exports.iter().map(|e| e.queues).max().unwrap_or(first.queues),
        ..first.clone()
    };
    AttachDisk { export, limits: Some(attachment.limits), accept_lost_tail: false }
}

impl Daemon {
    /// Serves what was served when the last daemon ended, however it ended.
    ///
    /// # Errors
    /// `Corrupt` or `Unsupported` when what is remembered cannot be understood, or what the host
    /// reports. What goes wrong with one disk is told by its exports.
    pub fn serve_again(&self) -> Result<()> {
        let _changing = self.service.changing.lock();
        for attachment in self.service.file.read()? {
            if self.table().served.values().any(|served| served.disk == attachment.disk) {
                continue;
            }
            let name = self.name_of(&attachment)?;
            let served = self.open_again(&name, &attachment, Kept::default());
            self.go_on(&name, served, attachment, Vec::new());
        }
        Ok(())
    }

    /// The name that the disk of an attachment has now.
    pub(super) fn name_of(&self, attachment: &Attachment) -> Result<String> {
        let row = self.dir()?.disks().into_iter().find(|row| row.disk == attachment.disk);
        Ok(row.map_or_else(|| attachment.disk.to_string(), |row| row.name))
    }

    /// Goes on with what [`Daemon::open_again`] gave: serves the disk on its sockets, those of a
    /// predecessor as far as there are any. Tells how it went, and lists the disk as failed if it
    /// failed.
    pub(super) fn go_on(
        &self,
        name: &str,
        opened: Result<Option<Served>>,
        attachment: Attachment,
        handed: Vec<HandedDoor>,
    ) {
        let outcome = opened.and_then(|served| match served {
            Some(served) => self.open_doors(name, served, &attachment, handed),
            None => Ok(0),
        });
        let object = format!("disk {name}");
        match outcome {
            Ok(sockets) => {
                let detail = format!("again, on {sockets} sockets");
                self.events.add(EventKind::Attached, object, detail);
            }
            Err(e) => {
                let error = e.within("attach", object.clone()).to_string();
                self.events.add(EventKind::Failed, object, error.clone());
                self.table().failed.insert(name.to_owned(), Failed { attachment, error });
            }
        }
    }

    /// Opens a disk that is to be served again; `None` when it was served nowhere.
    pub(super) fn open_again(
        &self,
        name: &str,
        attachment: &Attachment,
        kept: Kept,
    ) -> Result<Option<Served>> {
        let Some(first) = attachment.exports.first() else { return Ok(None) };
        self.take_into_service(name, &widest(attachment, first), kept).map(Some)
    }

    /// Serves a disk on its sockets: those of a predecessor as far as there are any. Gives back how
    /// many are served: one that cannot be is told of, and takes no other with it.
    fn open_doors(
        &self,
        name: &str,
        mut served: Served,
        attachment: &Attachment,
        handed: Vec<HandedDoor>,
    ) -> Result<usize> {
        let dir = self.dir()?;
        let handed = handed.into_iter().chain(std::iter::repeat_with(HandedDoor::default));
        for (spec, handed) in attachment.exports.iter().zip(handed) {
            let door = Door::take_over(&dir, &served.volume, spec.clone(), handed);
            self.tell_of_failure(name, &door);
            served.doors.push(door);
        }
        let sockets = served.doors.iter().filter(|door| door.failure().is_none()).count();
        self.table().served.insert(name.to_owned(), served);
        Ok(sockets)
    }

    /// Tells of a door that nobody serves.
    pub(super) fn tell_of_failure(&self, name: &str, door: &Door) {
        if let Some(why) = door.failure() {
            let detail = format!("{}: {why}", door.spec().socket);
            self.events.add(EventKind::Failed, format!("disk {name}"), detail);
        }
    }

    /// Takes all disks out of service in order; what is remembered stays, so that the next daemon
    /// serves them again.
    pub fn end_service(&self) {
        self.jobs.suspend_resumable();
        let _changing = self.service.changing.lock();
        let served = std::mem::take(&mut self.table().served);
        for (name, mut served) in served {
            served.doors.drain(..).for_each(Door::close);
            if let Err(error) = take_out_of_service(served) {
                // What completed is in its tail, and goes to who opens it next.
                tracing::error!(disk = %name, %error, "not closed in order");
            }
        }
    }
}
