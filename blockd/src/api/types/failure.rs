//! A failure as it goes over the wire.
//!
//! Invariant: an [`Error`] that was sent and received says the same: same kind, same line.

use std::fmt;

use format::{Error, Kind};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// The class of failure, by its stable name.
    pub kind: String,
    /// What was tried.
    pub tried: Option<String>,
    /// On which object.
    pub object: Option<String>,
    /// Why it failed, as a clause.
    pub reason: String,
    /// What the reason was caused by, if that says more.
    pub cause: Option<String>,
    /// What to do next.
    pub hint: Option<String>,
    /// All of it as one line for people.
    pub message: String,
}

/// The body of a response that is no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FailureBody {
    /// The failure.
    pub error: Failure,
}

/// The cause of an error that was received.
#[derive(Debug)]
struct Cause(String);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Cause {}

impl From<&Error> for Failure {
    fn from(e: &Error) -> Self {
        Failure {
            kind: e.kind().name().into(),
            tried: e.attempted().map(str::to_owned),
            object: e.object().map(str::to_owned),
            reason: e.reason().into(),
            cause: std::error::Error::source(e).map(ToString::to_string),
            hint: e.next_step().map(str::to_owned),
            message: e.to_string(),
        }
    }
}

impl From<Failure> for Error {
    fn from(f: Failure) -> Self {
        // A kind that a newer server knows is a failure all the same.
        let kind = Kind::from_name(&f.kind).unwrap_or(Kind::Unsupported);
        let mut e = Error::new(kind, f.reason);
        if let Some(tried) = f.tried {
            e = e.tried(tried);
        }
        if let Some(object) = f.object {
            e = e.on(object);
        }
        if let Some(hint) = f.hint {
            e = e.hint(hint);
        }
        match f.cause {
            Some(cause) => e.caused_by(Cause(cause)),
            None => e,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_was_sent_says_the_same() {
        let io = std::io::Error::from_raw_os_error(28);
        for error in [
            Error::from(io).tried("write").on("disk a").hint("free some"),
            Error::corrupt("bad sum"),
            Error::new(Kind::TailLost, "it is gone").on("disk b"),
        ] {
            let wire = serde_json::to_string(&Failure::from(&error)).unwrap();
            let received: Failure = serde_json::from_str(&wire).unwrap();
            assert_eq!(received.message, error.to_string());

            let back = Error::from(received);

            assert_eq!((back.kind(), back.to_string()), (error.kind(), error.to_string()));
            assert_eq!((back.object(), back.next_step()), (error.object(), error.next_step()));
        }
    }
}
