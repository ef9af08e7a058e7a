//! Routes about the content of one disk, for programs without a session: curl, for example.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_LENGTH;
use axum::response::Response;
use format::limits::SECTOR;
use format::units::index;
use format::{Context as _, Error, Kind, Result};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use utoipa::IntoParams;

use super::NOTE;
use super::body::{Pieces, streamed};
use super::disks::TailParams;
use super::reply::{Answer, Asked, Named, Params, blocking, note_header};
use super::sessions::piece;
use super::types::{ByteRange, FailureBody, MapRange, Moved, OpenSession, SessionUse};
use crate::daemon::{Content, Daemon, Noted};
use crate::store::buf::AlignedBuf;

type Shared = State<Arc<Daemon>>;

/// Bytes moved at once.
const PIECE: u64 = 1 << 20;
/// The owner of sessions that live as long as one request.
const NO_CLIENT: u64 = u64::MAX;

fn add_notes(response: &mut Response, notes: &[String]) {
    for value in notes.iter().filter_map(|n| note_header(n)) {
        response.headers_mut().append(NOTE, value);
    }
}

/// Waits for room; an error means that the client has gone away.
fn send(pieces: &Pieces, bytes: Bytes) -> Result<()> {
    let gone = |_| Error::new(Kind::Cancelled, "the client has gone away");
    pieces.blocking_send(Ok(bytes)).map_err(gone)
}

/// Tells the client, by cutting the answer off, that it is not complete.
fn cut_off(pieces: &Pieces, error: Error) {
    if error.kind() != Kind::Cancelled {
        tracing::warn!(%error, "an answer was cut off");
    }
    // A client that has gone away need not be told.
    let _ = pieces.blocking_send(Err(std::io::Error::other(error)));
}

/// The ranges of a disk, and where their data lies
///
/// A JSON array with one range per line. An answer that is cut off is not complete.
#[utoipa::path(get, path = "/v1/disks/{name}/map", tag = "content",
    params(("name" = String, Path, description = "Name of the disk"), TailParams),
    responses((status = 200, body = Vec<MapRange>), (status = "default", body = FailureBody)))]
pub async fn map(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(tail): Params<TailParams>,
) -> Answer {
    let (pieces, mut response) = streamed("application/json");
    let (begun, begins) = tokio::sync::oneshot::channel();
    let mut begun = Some(begun);
    let walk = move |d: &Arc<Daemon>| {
        let mut lines = Lines { pieces, text: vec![b'['], first: true };
        let walked = d.map(
            &name,
            tail.accept_lost_tail,
            // The client may have gone away.
            &mut |notes| drop(begun.take().map(|b| b.send(notes))),
            &mut |range| lines.add(&range),
        );
        // Before the first range the failure is the answer, after it the answer is cut off.
        match walked {
            Err(e) if begun.is_some() => Err(e),
            Err(e) => {
                cut_off(&lines.pieces, e);
                Ok(())
            }
            Ok(()) => lines.end(),
        }
    };
    let walk = tokio::spawn(async move { blocking(&daemon, walk).await });
    match begins.await {
        Ok(notes) => {
            add_notes(&mut response, &notes);
            Ok(response)
        }
        Err(_) => match walk.await {
            Ok(Err(refused)) => Err(refused),
            _ => Err(Error::new(Kind::Failed, "internal error of the daemon").into()),
        },
    }
}

/// A JSON array on its way.
struct Lines {
    pieces: Pieces,
    text: Vec<u8>,
    first: bool,
}

impl Lines {
    fn add(&mut self, range: &MapRange) -> Result<()> {
        self.text.extend_from_slice(if self.first { b"\n" } else { b",\n" });
        self.first = false;
        let line = serde_json::to_vec(range);
        self.text.extend(line.map_err(std::io::Error::from)?);
        if self.text.len() < 64 << 10 {
            return Ok(());
        }
        send(&self.pieces, std::mem::take(&mut self.text).into())
    }

    fn end(mut self) -> Result<()> {
        self.text.extend_from_slice(b"\n]\n");
        send(&self.pieces, self.text.into())
    }
}

/// A part of a disk. Bytes.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
pub struct ReadParams {
    /// First byte.
    pub offset: u64,
    /// Number of bytes; without it, to the end of the disk.
    pub length: Option<u64>,
    /// Go on although completed writes of a live session are missing.
    pub accept_lost_tail: bool,
}

/// Ends a session of one request, whatever becomes of the request.
struct OneRequest {
    daemon: Arc<Daemon>,
    id: u64,
}

impl Drop for OneRequest {
    fn drop(&mut self) {
        let (daemon, id) = (Arc::clone(&self.daemon), self.id);
        // One that ended in order is not there any more.
        tokio::task::spawn_blocking(move || drop(daemon.drop_session(id)));
    }
}

/// Opens a session that lives as long as a request.
fn one_request(
    daemon: &Arc<Daemon>,
    (disk, purpose): (String, SessionUse),
    accept_lost_tail: bool,
) -> Result<(OneRequest, Noted<u64>)> {
    let request =
        OpenSession { disk, purpose, size: None, parent: None, total: None, accept_lost_tail };
    let Noted { value, notes } = daemon.open_session(NO_CLIENT, &request)?;
    let guard = OneRequest { daemon: Arc::clone(daemon), id: value.id };
    Ok((guard, Noted { value: value.size, notes }))
}

/// Read a part of a disk
#[utoipa::path(get, path = "/v1/disks/{name}/data", tag = "content",
    params(("name" = String, Path, description = "Name of the disk"), ReadParams),
    responses((status = 200, body = [u8], content_type = "application/octet-stream"),
        (status = "default", body = FailureBody)))]
pub async fn read(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(p): Params<ReadParams>,
) -> Answer {
    let object = format!("disk {name}");
    let opened = blocking(&daemon, move |d| {
        let (guard, size) = one_request(d, (name, SessionUse::Read), p.accept_lost_tail)?;
        let length = p.length.unwrap_or(size.value.saturating_sub(p.offset));
        let end = crate::verbs::check_end(size.value, p.offset, length);
        let end = end.context("read", || object)?;
        Ok((guard, size.notes, end))
    });
    let (guard, notes, end) = opened.await?;
    let (pieces, mut response) = streamed("application/octet-stream");
    response.headers_mut().insert(CONTENT_LENGTH, (end - p.offset).into());
    add_notes(&mut response, &notes);
    tokio::task::spawn_blocking(move || {
        let sent = guard
            .daemon
            .session(guard.id)
            .and_then(|content| send_range(&content, (p.offset, end), &pieces))
            .and_then(|()| guard.daemon.finish_session(guard.id));
        if let Err(e) = sent {
            cut_off(&pieces, e);
        }
    });
    Ok(response)
}

fn send_range(content: &Content, (offset, end): (u64, u64), pieces: &Pieces) -> Result<()> {
    let mut at = offset;
    while at < end {
        let from = at / SECTOR * SECTOR;
        let to = (from + PIECE).min(end.next_multiple_of(SECTOR));
        let mut buf = AlignedBuf::zeroed(index(to - from));
        content.read(from, &mut buf)?;
        let stop = to.min(end);
        send(pieces, piece(buf, at - from, stop - from))?;
        at = stop;
    }
    Ok(())
}

/// Where bytes go.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct WriteParams {
    /// First byte.
    pub offset: u64,
    /// Go on although completed writes of a live session are missing.
    pub accept_lost_tail: bool,
}

/// Write to a disk
///
/// What was written is durable when the answer comes, also when it is a failure.
#[utoipa::path(put, path = "/v1/disks/{name}/data", tag = "content",
    params(("name" = String, Path, description = "Name of the disk"), WriteParams),
    request_body(content = [u8], content_type = "application/octet-stream"),
    responses((status = 200, body = Moved), (status = "default", body = FailureBody)))]
pub async fn write(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(p): Params<WriteParams>,
    request: Request,
) -> Answer<Noted<Moved>> {
    let disk = name.clone();
    let opened =
        blocking(&daemon, move |d| one_request(d, (name, SessionUse::Write), p.accept_lost_tail));
    let (guard, Noted { notes, .. }) = opened.await?;
    let content = daemon.session(guard.id)?;
    let written = copy_in(&daemon, &content, p.offset, request).await;
    let id = guard.id;
    // In order also after a failure: what was written is made durable.
    let finished = blocking(&daemon, move |d| d.finish_session(id)).await;
    let length = written?;
    finished?;
    Ok(Noted { value: Moved { disk, offset: p.offset, length }, notes })
}

/// Writes what the client sends; gives back how many bytes that was.
async fn copy_in(
    daemon: &Arc<Daemon>,
    content: &Arc<Content>,
    offset: u64,
    request: Request,
) -> Answer<u64> {
    let mut body = request.into_body();
    let mut waiting = Vec::new();
    let mut at = offset;
    loop {
        let frame = body.frame().await.transpose().map_err(|e| {
            Error::invalid("it was cut off")
                .caused_by(e)
                .tried("read")
                .on("the body of the request")
        })?;
        let last = frame.is_none();
        if let Some(data) = frame.and_then(|f| f.into_data().ok()) {
            waiting.extend_from_slice(&data);
        }
        if waiting.len() as u64 >= PIECE || (last && !waiting.is_empty()) {
            let (bytes, content, to) = (std::mem::take(&mut waiting), Arc::clone(content), at);
            at += bytes.len() as u64;
            blocking(daemon, move |_| content.write(to, &bytes)).await?;
        }
        if last {
            return Ok(at - offset);
        }
    }
}

/// Make a part of a disk read as zeroes, and give its space back
#[utoipa::path(post, path = "/v1/disks/{name}/discard", tag = "content",
    params(("name" = String, Path, description = "Name of the disk"), TailParams),
    request_body = ByteRange,
    responses((status = 200, body = Moved), (status = "default", body = FailureBody)))]
pub async fn discard(
    State(daemon): Shared,
    Named(name): Named<String>,
    Params(tail): Params<TailParams>,
    Asked(range): Asked<ByteRange>,
) -> Answer<Noted<Moved>> {
    blocking(&daemon, move |d| d.discard(&name, range, tail.accept_lost_tail)).await
}
