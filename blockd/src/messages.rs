//! Messages with open files between two processes of one host.
//!
//! A message is its length and its number of files (two 32-bit little-endian words), its bytes, and
//! then the files in groups, each with one byte of its own: the kernel bounds how many files travel
//! with one byte, and a busy host has more. Two `blockd` speak like this at a hand-over, and
//! `forkd` with the processes of its machines.

use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use format::{Context as _, Error, Kind, Result};
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Files of one group; the kernel takes 253.
const GROUP: usize = 128;
const GROUP_SPACE: usize = rustix::cmsg_space!(ScmRights(GROUP));
/// The byte that carries a group.
const CARRIER: [u8; 1] = [0xfd];
/// Bytes of a message at most: thousands of disks.
const BYTES_MAX: usize = 64 << 20;
/// Files of a message at most.
const FILES_MAX: usize = 1 << 20;

/// A connection that broke says that the other one is gone; anything else is the host's.
fn broken(e: std::io::Error) -> Error {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match e.kind() {
        BrokenPipe | ConnectionReset | UnexpectedEof => cut_short(),
        _ => e.into(),
    }
}

fn cut_short() -> Error {
    Error::new(Kind::Failed, "the other process ended, or closed the connection")
}

/// Sends a message.
///
/// # Errors
/// What the host reports, among it that the other one is gone.
pub fn send(socket: &UnixStream, message: &impl Serialize, files: &[BorrowedFd<'_>]) -> Result<()> {
    let put = || -> Result<()> {
        let body = serde_json::to_vec(message).map_err(std::io::Error::from)?;
        let too_much = || Error::new(Kind::Unsupported, "it is more than one message holds");
        if body.len() > BYTES_MAX || files.len() > FILES_MAX {
            return Err(too_much());
        }
        let word = |n: usize| u32::try_from(n).map(u32::to_le_bytes).map_err(|_| too_much());
        let mut bytes = [word(body.len())?, word(files.len())?].concat();
        bytes.extend(body);
        (&mut &*socket).write_all(&bytes).map_err(broken)?;
        files.chunks(GROUP).try_for_each(|group| send_group(socket, group))
    };
    put().context("tell", || "the other process".into())
}

fn send_group(socket: &UnixStream, group: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); GROUP_SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(group)) {
        return Err(Error::new(Kind::Failed, "a group of files does not fit its own buffer"));
    }
    let data = [IoSlice::new(&CARRIER)];
    // The call blocks while the receiver is busy; one byte is sent whole or not at all.
    retry_on_intr(|| sendmsg(socket, &data, &mut control, SendFlags::NOSIGNAL))
        .map_err(|e| broken(e.into()))?;
    Ok(())
}

/// Receives a message.
///
/// # Errors
/// `Failed` when the other one is gone, `Corrupt` when it says something that is not understood, or
/// what the host reports.
pub fn receive<T: DeserializeOwned>(socket: &UnixStream) -> Result<(T, Vec<OwnedFd>)> {
    let get = || -> Result<(T, Vec<OwnedFd>)> {
        let mut head = [0; 8];
        fill(socket, &mut head)?;
        let [a, b, c, d, e, f, g, h] = head;
        let (bytes, count) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        let (bytes, count) = (bytes as usize, count as usize);
        if bytes > BYTES_MAX || count > FILES_MAX {
            return Err(Error::corrupt("a message is longer than any"));
        }
        let mut body = vec![0; bytes];
        fill(socket, &mut body)?;
        let mut files = Vec::new();
        while files.len() < count {
            receive_group(socket, &mut files)?;
        }
        let message = serde_json::from_slice(&body)
            .map_err(|e| Error::corrupt("a message that is not known here").caused_by(e))?;
        Ok((message, files))
    };
    get().context("hear from", || "the other process".into())
}

fn fill(mut socket: &UnixStream, buf: &mut [u8]) -> Result<()> {
    socket.read_exact(buf).map_err(broken)
}

fn receive_group(socket: &UnixStream, files: &mut Vec<OwnedFd>) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); GROUP_SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let mut data = [IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = retry_on_intr(|| recvmsg(socket.as_fd(), &mut data, &mut control, flags))
        .map_err(|e| broken(e.into()))?;
    let before = files.len();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    if got.bytes == 0 {
        return Err(cut_short());
    }
    if got.flags.contains(ReturnFlags::CTRUNC) || files.len() == before || byte != CARRIER {
        return Err(Error::new(Kind::Failed, "files are missing; most likely too many are open")
            .hint("raise the limit of open files (`ulimit -n`)"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Seek as _, SeekFrom};

    #[test]
    fn files_arrive_in_their_order_however_many() {
        let (left, right) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..300u64)
            .map(|i| {
                let mut file = tempfile::tempfile().unwrap();
                file.seek(SeekFrom::Start(i)).unwrap();
                file
            })
            .collect();
        let sent: Vec<_> = files.iter().map(std::os::fd::AsFd::as_fd).collect();
        std::thread::scope(|s| {
            s.spawn(|| send(&left, &"hello", &sent).unwrap());
            let (text, received) = receive::<String>(&right).unwrap();
            assert_eq!((text.as_str(), received.len()), ("hello", 300));
            for (i, fd) in (0..).zip(received) {
                assert_eq!(File::from(fd).stream_position().unwrap(), i);
            }
        });
    }

    #[test]
    fn an_end_in_the_middle_and_nonsense_are_told() {
        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(&[3, 0, 0, 0, 0, 0, 0, 0, b'1']).unwrap();
        drop(left);
        assert_eq!(receive::<u64>(&right).unwrap_err().kind(), Kind::Failed);

        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(&[0xff; 8]).unwrap();
        assert_eq!(receive::<u64>(&right).unwrap_err().kind(), Kind::Corrupt);

        let (left, right) = UnixStream::pair().unwrap();
        send(&left, &"text", &[]).unwrap();
        assert_eq!(receive::<u64>(&right).unwrap_err().kind(), Kind::Corrupt);

        // A file is promised, and a byte comes without one.
        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, b'1', 0xfd]).unwrap();
        assert_eq!(receive::<u64>(&right).unwrap_err().kind(), Kind::Failed);
    }
}
