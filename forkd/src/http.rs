//! One question over HTTP/1.1 to a daemon on this host, by a thread that waits for the answer.
//!
//! It is made for blockd's interface and knows no more of HTTP than that needs: one request at a
//! time on a connection, answers of a stated length. A VM process asks like this within the pause
//! of a fork, on a connection that was opened before: nothing here needs a runtime or a new file.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use blockd::api::types::FailureBody;
use format::{Error, Kind, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of the head of an answer at most.
const HEAD_MAX: usize = 64 << 10;
/// Bytes of an answer at most: a thousand children take less.
const BODY_MAX: usize = 16 << 20;
/// Fields in the head of an answer at most.
const FIELDS_MAX: usize = 64;

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Its body.
    pub body: Vec<u8>,
}

impl Reply {
    /// What it says.
    ///
    /// # Errors
    /// The failure that it tells of; `Unsupported` when it says something that is not known here.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T> {
        self.refused()?;
        let body: &[u8] = if self.body.is_empty() { b"null" } else { &self.body };
        serde_json::from_slice(body).map_err(unknown)
    }

    /// # Errors
    /// The failure that it tells of.
    pub fn refused(&self) -> Result<()> {
        if (200..300).contains(&self.status) {
            return Ok(());
        }
        let body: FailureBody = serde_json::from_slice(&self.body).map_err(unknown)?;
        Err(body.error.into())
    }
}

fn unknown(e: serde_json::Error) -> Error {
    Error::new(Kind::Unsupported, "it answers something that is not known here")
        .caused_by(e)
        .hint("use the same version of forkd and blockd")
}

/// A request, ready to be sent.
///
/// # Errors
/// What cannot be written as JSON.
pub fn request(method: &str, path: &str, body: &impl Serialize) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec(body).map_err(std::io::Error::from)?;
    if json == b"null" {
        json.clear();
    }
    let mut bytes = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        json.len()
    )
    .into_bytes();
    bytes.append(&mut json);
    Ok(bytes)
}

/// Connects to the daemon that listens at `socket`; answers may take `patience`.
///
/// # Errors
/// `NotFound` when nobody answers there, or what the host reports.
pub fn connect(socket: &Path, patience: Duration) -> Result<UnixStream> {
    let stream = UnixStream::connect(socket).map_err(|e| {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        match e.kind() {
            NotFound | ConnectionRefused => Error::new(Kind::NotFound, "nobody answers there")
                .hint("start blockd, and name its socket with --blockd"),
            _ => e.into(),
        }
    })?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    Ok(stream)
}

/// Sends a request, and waits for its answer.
///
/// # Errors
/// As [`send`] and [`receive`].
pub fn exchange(stream: &UnixStream, request: &[u8]) -> Result<Reply> {
    send(stream, request)?;
    receive(stream)
}

/// Sends a request.
///
/// # Errors
/// `Failed` when the other side went away or takes too long.
pub fn send(mut stream: &UnixStream, request: &[u8]) -> Result<()> {
    stream.write_all(request).map_err(lost)
}

/// Waits for the answer to a request that was sent.
///
/// # Errors
/// `Failed` when the other side went away or takes too long, so that nobody knows what became of
/// the request; `Corrupt` when what comes is no answer.
pub fn receive(mut stream: &UnixStream) -> Result<Reply> {
    let (mut bytes, mut piece) = (Vec::new(), [0; 16 << 10]);
    let (head, status, length) = loop {
        if let Some(found) = head(&bytes)? {
            break found;
        }
        match stream.read(&mut piece).map_err(lost)? {
            0 => return Err(gone()),
            n => bytes.extend_from_slice(&piece[..n]),
        }
    };
    let mut body = bytes.split_off(head);
    let have = body.len();
    if have > length {
        return Err(Error::corrupt("more comes than was asked for"));
    }
    body.resize(length, 0);
    stream.read_exact(&mut body[have..]).map_err(lost)?;
    Ok(Reply { status, body })
}

/// Length of the head, status, and length of the body; `None` while the head is not whole.
fn head(bytes: &[u8]) -> Result<Option<(usize, u16, usize)>> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    let strange = || Error::corrupt("what comes is no answer");
    let end = match response.parse(bytes).map_err(|e| strange().caused_by(e))? {
        httparse::Status::Complete(end) => end,
        httparse::Status::Partial if bytes.len() < HEAD_MAX => return Ok(None),
        httparse::Status::Partial => return Err(strange()),
    };
    let status = response.code.ok_or_else(strange)?;
    let named = |f: &&httparse::Header| f.name.eq_ignore_ascii_case("content-length");
    let length = match response.headers.iter().find(named) {
        Some(field) => std::str::from_utf8(field.value).ok().and_then(|text| text.parse().ok()),
        None if status == 204 => Some(0),
        None => None,
    };
    let length = length.filter(|length| *length <= BODY_MAX).ok_or_else(strange)?;
    Ok(Some((end, status, length)))
}

/// What can be done when blockd has gone away.
pub const SEE_BLOCKD: &str = "see whether blockd runs, and try again";

fn gone() -> Error {
    Error::new(Kind::Failed, "it went away before it had answered").hint(SEE_BLOCKD)
}

fn lost(e: std::io::Error) -> Error {
    use std::io::ErrorKind::{TimedOut, WouldBlock};
    match e.kind() {
        TimedOut | WouldBlock => Error::new(Kind::Failed, "it does not answer in time"),
        _ => gone().caused_by(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of an answer that arrives in these pieces.
    fn answered(pieces: &[&[u8]]) -> Result<Reply> {
        let (here, mut there) = UnixStream::pair().unwrap();
        std::thread::scope(|s| {
            s.spawn(move || {
                let mut request = [0; 1024];
                assert!(there.read(&mut request).unwrap() > 0);
                for piece in pieces {
                    there.write_all(piece).unwrap();
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            exchange(&here, &request("GET", "/", &()).unwrap())
        })
    }

    #[test]
    fn an_answer_is_read_however_it_arrives() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nx: y\r\n\r\ntrue";
        for cut in 1..whole.len() {
            let (a, b) = whole.split_at(cut);
            let reply = answered(&[a, b]).unwrap();
            assert!(reply.read::<bool>().unwrap(), "{cut}");
        }
        assert_eq!(answered(&[b"HTTP/1.1 204 No Content\r\n\r\n"]).unwrap().status, 204);
    }

    #[test]
    fn half_an_answer_and_nonsense_are_failures() {
        let half: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ntr";
        for (bytes, kind) in [
            (half, Kind::Failed),
            (b"HTTP/1.1 200 OK\r\n", Kind::Failed),
            (b"", Kind::Failed),
            (b"nonsense\r\n\r\n", Kind::Corrupt),
            (b"HTTP/1.1 200 OK\r\n\r\n", Kind::Corrupt),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\ntrue", Kind::Corrupt),
        ] {
            assert_eq!(answered(&[bytes]).unwrap_err().kind(), kind, "{bytes:?}");
        }
    }

    #[test]
    fn a_refusal_keeps_its_kind() {
        let error = Error::new(Kind::Exists, "it is there").on("disk a");
        let failure = FailureBody { error: (&error).into() };
        let reply = Reply { status: 409, body: serde_json::to_vec(&failure).unwrap() };

        let refused = reply.read::<()>().unwrap_err();

        assert_eq!((refused.kind(), refused.object()), (Kind::Exists, Some("disk a")));
    }
}
