//! The one public error of the project: a small stable [`Kind`] for control flow, what was tried,
//! on which object, what to do next, and the cause.
//!
//! Invariant: every error that reaches a user names an object. A message reads
//! `cannot <tried> <object>: <reason>; <hint>`.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

/// What class of failure this is. Callers branch on this and on nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The host reported an I/O error.
    Io,
    /// Stored content contradicts itself: bad checksum, impossible value, truncated structure.
    Corrupt,
    /// Valid, but from a newer version, or using a feature this build does not understand.
    Unsupported,
    /// The named object does not exist.
    NotFound,
    /// The named object exists already.
    Exists,
    /// Another process or another operation holds the object.
    Busy,
    /// Other objects depend on this one.
    InUse,
    /// The host has no space left; nothing was lost, the operation may be repeated.
    NoSpace,
    /// The host has no memory left; nothing was lost, the operation may be repeated.
    NoMemory,
    /// The host does not reach its storage; nothing was lost, the operation may be repeated.
    Unreachable,
    /// The request itself makes no sense (offset past the end, bad name, bad size).
    Invalid,
    /// The object may not be written.
    ReadOnly,
    /// A parent segment is not in the store.
    ParentMissing,
    /// A parent segment is there, but is not the one that was recorded.
    ParentChanged,
    /// The object failed earlier (for example a failed sync) and refuses work until it is reopened.
    Failed,
    /// The in-memory tail of a disk is gone although its client may still be alive.
    TailLost,
    /// The user or a signal stopped the operation.
    Cancelled,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 17] = [
        Kind::Io,
        Kind::Corrupt,
        Kind::Unsupported,
        Kind::NotFound,
        Kind::Exists,
        Kind::Busy,
        Kind::InUse,
        Kind::NoSpace,
        Kind::NoMemory,
        Kind::Unreachable,
        Kind::Invalid,
        Kind::ReadOnly,
        Kind::ParentMissing,
        Kind::ParentChanged,
        Kind::Failed,
        Kind::TailLost,
        Kind::Cancelled,
    ];

    /// The kind that is called `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The exit code of a program that failed so; it is never given another meaning.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Invalid => 2,
            Kind::NotFound => 3,
            Kind::Exists => 4,
            Kind::Busy | Kind::InUse => 5,
            Kind::Corrupt => 6,
            Kind::NoSpace => 7,
            Kind::Unsupported => 8,
            Kind::ReadOnly => 9,
            Kind::Io => 10,
            Kind::ParentMissing | Kind::ParentChanged => 11,
            Kind::TailLost => 12,
            Kind::Failed => 13,
            Kind::NoMemory | Kind::Unreachable => 15,
            Kind::Cancelled => 130,
        }
    }

    /// Whether the host may do the same later: nothing was lost, and nothing has to be mended.
    #[must_use]
    pub fn may_pass(self) -> bool {
        matches!(self, Kind::NoSpace | Kind::NoMemory | Kind::Unreachable)
    }

    /// Whether it tells of the host only: what is stored may be sound.
    #[must_use]
    pub fn is_of_host(self) -> bool {
        matches!(self, Kind::Io | Kind::NoMemory | Kind::Unreachable)
    }

    /// The stable name used in JSON output, logs and documentation.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Io => "io",
            Kind::Corrupt => "corrupt",
            Kind::Unsupported => "unsupported",
            Kind::NotFound => "not-found",
            Kind::Exists => "exists",
            Kind::Busy => "busy",
            Kind::InUse => "in-use",
            Kind::NoSpace => "no-space",
            Kind::NoMemory => "no-memory",
            Kind::Unreachable => "unreachable",
            Kind::Invalid => "invalid",
            Kind::ReadOnly => "read-only",
            Kind::ParentMissing => "parent-missing",
            Kind::ParentChanged => "parent-changed",
            Kind::Failed => "failed",
            Kind::TailLost => "tail-lost",
            Kind::Cancelled => "cancelled",
        }
    }
}

#[derive(Debug)]
struct Inner {
    kind: Kind,
    reason: Cow<'static, str>,
    tried: Option<Cow<'static, str>>,
    object: Option<String>,
    hint: Option<Cow<'static, str>>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// An error: kind, reason, and (added on the way up) what was tried, on which object, what to do.
#[derive(Debug)]
pub struct Error(Box<Inner>);

/// Result with the project's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A new error of `kind`; `reason` is a clause without capital and full stop.
    pub fn new(kind: Kind, reason: impl Into<Cow<'static, str>>) -> Self {
        Error(Box::new(Inner {
            kind,
            reason: reason.into(),
            tried: None,
            object: None,
            hint: None,
            source: None,
        }))
    }

    /// Shorthand for [`Kind::Corrupt`].
    pub fn corrupt(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Corrupt, reason)
    }

    /// Shorthand for [`Kind::Invalid`].
    pub fn invalid(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Invalid, reason)
    }

    /// Says what was tried ("write", "open"). The innermost statement wins.
    #[must_use]
    pub fn tried(mut self, tried: impl Into<Cow<'static, str>>) -> Self {
        self.0.tried.get_or_insert_with(|| tried.into());
        self
    }

    /// Names the object ("disk vm1", "segment 4f…"). The innermost statement wins.
    #[must_use]
    pub fn on(mut self, object: impl Into<String>) -> Self {
        self.0.object.get_or_insert_with(|| object.into());
        self
    }

    /// Says what the reader can do next. The innermost statement wins.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The same failure as seen one level up: `tried` on `object` failed because of it. The message
    /// then names both objects. An error that names `object` already only gets what it lacks.
    #[must_use]
    pub fn within(mut self, tried: &'static str, object: impl Into<String>) -> Self {
        let object = object.into();
        if self.0.object.as_ref().is_none_or(|own| *own == object) {
            return self.tried(tried).on(object);
        }
        let hint = self.0.hint.take();
        let mut outer = Error::new(self.0.kind, self.to_string()).tried(tried).on(object);
        outer.0.hint = hint;
        outer
    }

    /// Attaches the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The class of failure.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The reason clause alone.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// The message without what to do next, and what to do next.
    #[must_use]
    pub fn split_hint(&self) -> (String, Option<String>) {
        let text = self.to_string();
        match self.next_step() {
            None => (text, None),
            Some(hint) => (text[..text.len() - hint.len() - 2].to_owned(), Some(hint.to_owned())),
        }
    }

    /// What was tried, if it was said.
    #[must_use]
    pub fn attempted(&self) -> Option<&str> {
        self.0.tried.as_deref()
    }

    /// The object the failed operation was about, if it was said.
    #[must_use]
    pub fn object(&self) -> Option<&str> {
        self.0.object.as_deref()
    }

    /// What to do next, if it was said.
    #[must_use]
    pub fn next_step(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.0.tried, &self.0.object) {
            (Some(tried), Some(object)) => write!(f, "cannot {tried} {object}: ")?,
            (Some(tried), None) => write!(f, "cannot {tried}: ")?,
            (None, Some(object)) => write!(f, "{object}: ")?,
            (None, None) => {}
        }
        write!(f, "{}", self.0.reason)?;
        if let Some(source) = &self.0.source {
            write!(f, " ({source})")?;
        }
        if let Some(hint) = &self.0.hint {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|s| s.as_ref() as _)
    }
}

/// Numbers of Linux for what has no kind of its own in the standard library.
const ENOLINK: i32 = 67;
const ENOBUFS: i32 = 105;
const ETIMEDOUT: i32 = 110;
const EHOSTDOWN: i32 = 112;

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        use std::io::ErrorKind as E;
        let (kind, reason) = match e.kind() {
            E::StorageFull | E::QuotaExceeded | E::FileTooLarge => {
                (Kind::NoSpace, "no space left on the host file system")
            }
            E::OutOfMemory => (Kind::NoMemory, "the host has no memory left"),
            _ if e.raw_os_error() == Some(ENOBUFS) => {
                (Kind::NoMemory, "the host has no memory left")
            }
            E::HostUnreachable | E::NetworkUnreachable | E::NetworkDown => {
                (Kind::Unreachable, "the host does not reach its storage")
            }
            // By number: programs make errors of the kind `TimedOut` themselves.
            _ if matches!(e.raw_os_error(), Some(ENOLINK | ETIMEDOUT | EHOSTDOWN)) => {
                (Kind::Unreachable, "the host does not reach its storage")
            }
            E::NotFound => (Kind::NotFound, "no such file"),
            E::AlreadyExists => (Kind::Exists, "exists already"),
            E::ReadOnlyFilesystem => (Kind::ReadOnly, "the file system is read-only"),
            E::PermissionDenied => (Kind::ReadOnly, "permission denied"),
            E::IsADirectory => (Kind::Invalid, "is a directory, not a file"),
            E::NotADirectory => (Kind::Invalid, "is a file, not a directory"),
            E::UnexpectedEof => (Kind::Corrupt, "the file ends early"),
            _ => (Kind::Io, "the host reported an I/O error"),
        };
        Error::new(kind, reason).caused_by(e)
    }
}

/// Adds context to the error of a result.
pub trait Context<T> {
    /// [`Error::tried`] and [`Error::on`] in one.
    ///
    /// # Errors
    /// The same error, with context.
    fn context(self, tried: &'static str, object: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for Result<T, E> {
    fn context(self, tried: &'static str, object: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.into().tried(tried).on(object()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_names_object_reason_and_next_step() {
        let e = Error::corrupt("checksum mismatch").tried("open").on("disk a").hint("run check");
        assert_eq!(e.to_string(), "cannot open disk a: checksum mismatch; run check");
    }

    #[test]
    fn a_level_up_names_both_objects_once() {
        let e = Error::corrupt("checksum mismatch").tried("read").on("file x").hint("run check");
        let e = e.within("open", "disk a").within("open", "disk a");
        assert_eq!(
            e.to_string(),
            "cannot open disk a: cannot read file x: checksum mismatch; run check"
        );
        assert_eq!((e.attempted(), e.object()), (Some("open"), Some("disk a")));
    }

    #[test]
    fn every_kind_is_found_by_its_name() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(Kind::from_name("no such kind"), None);
    }

    #[test]
    fn what_may_pass_is_told_from_what_stays() {
        let kind = |errno| Error::from(std::io::Error::from_raw_os_error(errno)).kind();
        // ENOMEM, ENOBUFS; ENOSPC, EDQUOT, EFBIG.
        assert_eq!([12, 105].map(kind), [Kind::NoMemory; 2]);
        assert_eq!([28, 122, 27].map(kind), [Kind::NoSpace; 3]);
        // ETIMEDOUT, ENOLINK, EHOSTDOWN, EHOSTUNREACH, ENETUNREACH, ENETDOWN.
        assert_eq!([110, 67, 112, 113, 101, 100].map(kind), [Kind::Unreachable; 6]);
        // EIO, ENODATA (a medium), EREMOTEIO (a target), ENODEV, ESTALE.
        assert_eq!([5, 61, 121, 19, 116].map(kind), [Kind::Io; 5]);
        let own = std::io::Error::from(std::io::ErrorKind::TimedOut);
        assert_eq!(Error::from(own).kind(), Kind::Io);
    }

    #[test]
    fn innermost_context_wins() {
        let e = Error::invalid("x").on("inner").on("outer");
        assert_eq!(e.object(), Some("inner"));
    }
}
