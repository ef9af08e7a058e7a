//! The start: what a daemon before this one has left.
//!
//! What was under way counts as not done, and is removed first. A machine whose process answers is
//! taken up as it is; one whose process is gone has ended. A folder that is nobody's was a shell's,
//! or that of a machine which was never finished: it goes.

use std::fs;
use std::sync::Arc;

use format::{Kind, Result};
use uuid::Uuid;

use super::Daemon;
use super::state::Description;
use super::table::Machine;
use super::undo::Undo;
use crate::api::types::{EventKind, VmState};
use crate::process::Process;
use crate::process::link::how_it_ended;
use crate::process::wire::{Folder, Phase};

impl Daemon {
    /// Finds machines again, and removes what was left unfinished.
    pub(super) fn recover(self: &Arc<Self>) -> Result<()> {
        let left = self.state.machines()?;
        self.clean_up();
        let mut nobodys = Vec::new();
        for (id, found) in left {
            if self.janitor.condemns(id) || !self.state.vm(id).exists() {
                continue;
            }
            match found {
                Ok(Some(is)) => self.take_up(is)?,
                Ok(None) => nobodys.push(id),
                // Somebody's, so it is left alone, and told of.
                Err(e) => self.events.add(EventKind::Failed, format!("vm {id}"), e.to_string()),
            }
        }
        if nobodys.is_empty() {
            return Ok(());
        }
        self.remove_nobodys(&nobodys);
        Ok(())
    }

    fn take_up(self: &Arc<Self>, is: Description) -> Result<()> {
        let (process, phase) = match Process::find(is.id, self.state.vm(is.id)) {
            Ok((process, phase @ (Phase::Paused | Phase::Running))) => (Arc::new(process), phase),
            // One that does not answer is of no use to anybody.
            Ok((_, Phase::Shell)) | Err(_) => return self.take_up_ended(is),
        };
        self.janitor.know(Arc::clone(&process));
        let running = phase == Phase::Running;
        let state = if running { VmState::Running } else { VmState::Paused };
        match self.add(is.clone(), Arc::clone(&process), state) {
            Ok(machine) => {
                self.events.add(EventKind::Found, super::table::object(&is.name), state.name());
                self.ask_for_paths(&machine);
                Ok(())
            }
            // It was killed since it answered.
            Err(_) if process.is_dying() => self.take_up_ended(is),
            Err(e) => Err(e),
        }
    }

    /// Its disks are not let go before its process is gone.
    fn take_up_ended(self: &Arc<Self>, is: Description) -> Result<()> {
        let (id, folder) = (is.id, self.state.vm(is.id));
        self.end_process(id)?;
        let released = !is.disks.is_empty();
        self.table.add(Arc::new(Machine::ended(is, how_it_ended(&Folder(folder)))));
        if released {
            self.janitor.release(id);
        }
        Ok(())
    }

    fn remove_nobodys(&self, nobodys: &[Uuid]) {
        // blockd is asked only if something is served there: without it this is a removal of files.
        let serves = |id: &Uuid| {
            fs::read_dir(self.state.vm(*id)).is_ok_and(|entries| {
                let mut names = entries.flatten().map(|e| e.file_name());
                names.any(|name| name.to_string_lossy().starts_with("disk"))
            })
        };
        let attached = nobodys.iter().any(serves);
        let undo = Undo::of(nobodys.to_vec(), attached, Vec::new());
        match self.give_up(undo) {
            Ok(()) => {}
            Err(error) if error.kind() == Kind::NotFound => {
                tracing::info!("what is left of unfinished machines goes when blockd answers");
            }
            Err(error) => tracing::warn!(%error, "not all of unfinished machines is removed yet"),
        }
    }
}
