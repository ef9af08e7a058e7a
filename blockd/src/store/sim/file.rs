//! An open file of a [`super::SimStore`].

use std::sync::Arc;

use format::{Error, Kind, Result};
use parking_lot::{Mutex, MutexGuard};

use super::super::{File, range_end, to_usize};
use super::faults::{Call, Fault};
use super::log::{FileId, LiveFile, Op};
use super::pages::PAGE;
use super::survivors::middle;
use super::{State, injected, object};

pub(super) struct SimFile {
    state: Arc<Mutex<State>>,
    file: FileId,
    /// The name it was opened under.
    name: String,
    writable: bool,
}

impl SimFile {
    pub(super) fn new(state: Arc<Mutex<State>>, file: FileId, name: &str, writable: bool) -> Self {
        SimFile { state, file, name: name.to_owned(), writable }
    }

    /// Runs a call under the lock of the store and adds what every error must say.
    fn call<T>(
        &self,
        tried: impl FnOnce() -> String,
        call: impl FnOnce(&mut State) -> Result<T>,
    ) -> Result<T> {
        let mut state: MutexGuard<'_, State> = self.state.lock();
        call(&mut state).map_err(|e| e.tried(tried()).on(object(&self.name)))
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(Kind::ReadOnly, "the file was opened for reading only"))
    }

    fn live<'s>(&self, state: &'s State) -> &'s LiveFile {
        &state.live.files[&self.file]
    }

    fn write(&self, state: &mut State, offset: u64, data: &[u8]) -> Result<()> {
        let end = range_end(offset, data.len() as u64)?;
        let (mut offset, mut data, mut outcome) = (offset, data, Ok(()));
        match state.fault(Call::Write, &self.name) {
            None => {}
            Some(Fault::WriteLost) => return Ok(()),
            Some(Fault::WriteMisdirected { pages }) => {
                let bytes = pages.saturating_mul(PAGE.cast_signed() as i64);
                offset = offset.saturating_add_signed(bytes);
                if range_end(offset, data.len() as u64).is_err() {
                    return Ok(());
                }
            }
            Some(fault) => {
                let half = middle(&(offset..end)).unwrap_or(offset) - offset;
                data = &data[..to_usize(half)];
                outcome = Err(injected(fault));
            }
        }
        if let Some(limit) = state.faults.limit() {
            let pages = limit.saturating_sub(state.used()) / PAGE as u64;
            let fit = self.live(state).fits(offset, data.len(), pages);
            if fit < data.len() {
                data = &data[..fit];
                outcome = outcome.and(Err(injected(Fault::WriteNoSpace)));
            }
        }
        if !data.is_empty() {
            state.apply(Op::Write { file: self.file, offset, data: data.into() });
        }
        outcome
    }
}

impl File for SimFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len();
        let tried = || format!("read {len} bytes at offset {offset} of");
        self.call(tried, |state| {
            range_end(offset, len as u64)?;
            let fault = state.fault(Call::Read, &self.name);
            if let Some(fault @ (Fault::ReadIo | Fault::ReadShort)) = fault {
                return Err(injected(fault));
            }
            if !self.live(state).content.read_exact(offset, buf) {
                return Err(Error::corrupt("the file ends early"));
            }
            if let (Some(Fault::ReadFlip { bit }), 1..) = (fault, len) {
                let bit = to_usize(bit % (len as u64 * 8));
                buf[bit / 8] ^= 1 << (bit % 8);
            }
            Ok(())
        })
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let tried = || format!("write {} bytes at offset {offset} of", buf.len());
        self.call(tried, |state| {
            self.check_writable()?;
            self.write(state, offset, buf)
        })
    }

    fn sync(&self) -> Result<()> {
        self.call(
            || "sync".into(),
            |state| {
                let file = self.file;
                let Some(fault) = state.fault(Call::Sync, &self.name) else {
                    state.apply(Op::Sync { file });
                    return Ok(());
                };
                state.apply(Op::SyncFailed { file, dropped: fault == Fault::SyncIo });
                Err(injected(fault))
            },
        )
    }

    fn size(&self) -> Result<u64> {
        Ok(self.live(&self.state.lock()).content.len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let tried = || format!("set a length of {len} bytes for");
        self.call(tried, |state| {
            self.check_writable()?;
            range_end(0, len)?;
            state.refuse(Call::SetLen, &self.name)?;
            state.apply(Op::SetLen { file: self.file, len });
            Ok(())
        })
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        let tried = || format!("punch a hole of {len} bytes at offset {offset} into");
        self.call(tried, |state| {
            self.check_writable()?;
            range_end(offset, len)?;
            state.refuse(Call::Punch, &self.name)?;
            if len > 0 {
                state.apply(Op::Punch { file: self.file, offset, len });
            }
            Ok(())
        })
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.call(
            || format!("reserve {len} bytes at offset {offset} in"),
            |state| {
                self.check_writable()?;
                let end = range_end(offset, len)?;
                state.refuse(Call::Reserve, &self.name)?;
                let new = self.live(state).unallocated(offset..end);
                let free = state.faults.limit().map(|limit| limit.saturating_sub(state.used()));
                if free.is_some_and(|free| (new.len() * PAGE) as u64 > free) {
                    return Err(injected(Fault::ReserveNoSpace));
                }
                let file = state.live.files.get_mut(&self.file);
                file.expect("an open file").reserved.extend(new);
                Ok(())
            },
        )
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.live(&self.state.lock()).allocated())
    }

    fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        Ok(self.live(&self.state.lock()).content.next_data(from))
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        self.call(
            || "change the permissions of".into(),
            |state| {
                state.apply(Op::SetReadOnly { file: self.file, read_only });
                Ok(())
            },
        )
    }

    fn is_direct(&self) -> bool {
        false
    }
}
