//! Bodies that are made piece by piece while they are sent.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::response::Response;
use hyper::body::Frame;
use tokio::sync::mpsc;

/// Pieces that wait for a client to read them, at most.
const WAITING: usize = 8;

/// The end where pieces come in. When it is dropped the body is complete; an error cuts it off, so
/// that the client sees that it is not.
pub type Pieces = mpsc::Sender<Result<Bytes, std::io::Error>>;

struct Channel(mpsc::Receiver<Result<Bytes, std::io::Error>>);

impl hyper::body::Body for Channel {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        self.0.poll_recv(cx).map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

/// A response whose body comes through the other end.
pub fn streamed(content_type: &'static str) -> (Pieces, Response) {
    let (pieces, channel) = mpsc::channel(WAITING);
    let mut response = Response::new(Body::new(Channel(channel)));
    let value = axum::http::HeaderValue::from_static(content_type);
    response.headers_mut().insert(axum::http::header::CONTENT_TYPE, value);
    (pieces, response)
}
