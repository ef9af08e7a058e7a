//! Finds out whether files of a folder can be open for direct I/O.
//!
//! Nothing is left behind: the probe uses an unnamed file where the file system has them, else
//! reads a file that is there already, else makes a file and unlinks it before use.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, StatxFlags};
use rustix::io::{Errno, pread, pwrite, retry_on_intr};

use super::super::buf::{ALIGN, AlignedBuf};
use super::bounce::Align;
use super::to_usize;

/// Says why direct I/O is not possible in `dir`.
pub(super) fn direct(dir: BorrowedFd<'_>) -> Result<(), String> {
    let (fd, writable) = match open_any(dir) {
        Ok(opened) => opened,
        Err(Errno::INVAL) => return Err("the file system refuses direct I/O".into()),
        Err(e) => return Err(format!("no file to try direct I/O on ({e})")),
    };
    alignment(fd.as_fd())?;
    let mut page = AlignedBuf::zeroed(ALIGN);
    let moved = match writable {
        true => retry_on_intr(|| pwrite(&fd, &page, 0)),
        false => retry_on_intr(|| pread(&fd, &mut *page, 0)),
    };
    match moved {
        Err(e @ (Errno::INVAL | Errno::OPNOTSUPP)) => Err(format!("a direct transfer failed: {e}")),
        // A full disk, for one, says nothing about direct I/O.
        _ => Ok(()),
    }
}

/// What direct I/O on this open file asks for, or why it is not possible.
pub(super) fn alignment(fd: BorrowedFd<'_>) -> Result<Align, String> {
    let usual = Align { memory: ALIGN, offset: ALIGN };
    let Ok(stat) = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return Ok(usual);
    };
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(usual);
    }
    judge(stat.stx_dio_mem_align.into(), stat.stx_dio_offset_align.into())
}

fn judge(memory: u64, offset: u64) -> Result<Align, String> {
    let usable = |bytes: u64| bytes.is_power_of_two() && bytes <= ALIGN as u64;
    if offset == 0 {
        return Err("the file system reports that this file cannot do direct I/O".into());
    }
    if !usable(memory) || !usable(offset) {
        return Err(format!(
            "direct I/O asks for {memory}-byte addresses and {offset}-byte offsets here, \
             more than {ALIGN}"
        ));
    }
    Ok(Align { memory: to_usize(memory), offset: to_usize(offset) })
}

/// Some file in `dir`, open for direct I/O, and whether it may be written.
fn open_any(dir: BorrowedFd<'_>) -> Result<(OwnedFd, bool), Errno> {
    let base = OFlags::DIRECT | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::openat(dir, ".", base | OFlags::TMPFILE | OFlags::RDWR, mode) {
        Ok(fd) => return Ok((fd, true)),
        Err(Errno::INVAL) => return Err(Errno::INVAL),
        Err(_) => {}
    }
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let flags = base | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        if entry.file_type() != FileType::RegularFile {
            continue;
        }
        match rustix::fs::openat(dir, entry.file_name(), flags, Mode::empty()) {
            Ok(fd) => return Ok((fd, false)),
            Err(Errno::INVAL) => return Err(Errno::INVAL),
            Err(_) => {}
        }
    }
    let name = format!(".direct-io-probe-{}", std::process::id());
    let flags = base | OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
    let opened = rustix::fs::openat(dir, &*name, flags, mode);
    if opened.is_ok() || opened.as_ref().is_err_and(|e| *e == Errno::INVAL) {
        // Some file systems refuse the flag only after they made the file.
        let _ = rustix::fs::unlinkat(dir, &*name, AtFlags::empty());
    }
    Ok((opened?, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reported_alignments_are_judged() {
        assert_eq!(judge(4, 512), Ok(Align { memory: 4, offset: 512 }));
        assert_eq!(judge(4096, 4096), Ok(Align { memory: 4096, offset: 4096 }));
        assert!(judge(0, 0).is_err_and(|reason| reason.contains("cannot do direct I/O")));
        assert!(judge(512, 65536).is_err_and(|reason| reason.contains("65536")));
        assert!(judge(3, 512).is_err());
    }
}
