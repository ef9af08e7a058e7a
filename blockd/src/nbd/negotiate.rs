//! The handshake after the greeting, without I/O: options in, replies out.
//!
//! Invariants:
//! - With TLS required, nothing about exports is said before TLS is on.
//! - Turning TLS on forgets what was agreed before it: somebody else may have agreed to it.
//! - Contexts count only for the export that they were selected for.

use std::sync::Arc;

use format::{Error, Kind};

use super::command::Limits;
use super::contexts::{self, Context, SELECTED_MAX};
use super::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, InfoRequest, MetaRequest, PAYLOAD_MAX, Style, info,
    option, option_reply, reply, text, transmission,
};
use super::{BLOCK_MIN, BLOCK_PREFERRED, Export, Exports};

/// Zeroes behind the reply to `EXPORT_NAME` for clients that want them.
const PADDING: usize = 124;
/// Longest error message for a client, in bytes.
const MESSAGE_MAX: usize = 512;

/// What to do after an option was answered.
pub enum Next {
    /// Wait for the next option.
    Option,
    /// Start TLS, then wait for the next option.
    StartTls,
    /// Leave the handshake.
    Transmit(Agreed),
    /// Close the connection.
    Close,
}

/// What client and server agreed on.
pub struct Agreed {
    /// The export.
    pub export: Arc<dyn Export>,
    /// What requests are checked against.
    pub limits: Limits,
    pub(super) contexts: Vec<Context>,
}

/// How far TLS has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// There is none on this socket.
    Never,
    /// It must come first.
    Required,
    /// It is on.
    On,
}

/// One handshake.
pub struct Negotiator {
    exports: Arc<dyn Exports>,
    tls: Tls,
    refuse: Option<(u32, String)>,
    client_flags: u32,
    style: Style,
    /// The export they were selected for, and the contexts.
    contexts: Option<(String, Vec<Context>)>,
}

/// Why an option is refused: a reply type, and a message for people.
struct Refused(u32, String);

impl Refused {
    fn invalid(message: &str) -> Self {
        Refused(reply::ERR_INVALID, message.to_owned())
    }
}

impl From<Error> for Refused {
    fn from(e: Error) -> Self {
        let kind = if e.kind() == Kind::NotFound { reply::ERR_UNKNOWN } else { reply::ERR_POLICY };
        // The reason alone: what object and cause would add concerns the host, not the client.
        Refused(kind, e.reason().to_owned())
    }
}

impl Negotiator {
    /// A handshake about `exports`.
    #[must_use]
    pub fn new(exports: Arc<dyn Exports>, tls: Tls) -> Self {
        let style = Style::Simple;
        Negotiator { exports, tls, refuse: None, client_flags: 0, style, contexts: None }
    }

    /// From now on every option is answered with the error `kind` and `message`.
    pub fn refuse(&mut self, kind: u32, message: &str) {
        self.refuse = Some((kind, message.to_owned()));
    }

    /// Takes the client's flags; false when the connection must be closed.
    #[must_use]
    pub fn client_flags(&mut self, flags: u32) -> bool {
        self.client_flags = flags;
        flags & !(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) == 0
    }

    /// TLS is on: begins anew.
    pub fn secured(&mut self) {
        self.tls = Tls::On;
        self.style = Style::Simple;
        self.contexts = None;
    }

    /// Answers an option: appends replies to `out` and says what comes next.
    pub fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        let refused = match (&self.refuse, option) {
            (_, option::ABORT) => {
                option_reply(out, option, reply::ACK, &[]);
                return Next::Close;
            }
            (Some((kind, message)), _) => Some(Refused(*kind, message.clone())),
            (None, option::STARTTLS) => None,
            (None, _) if self.tls == Tls::Required => {
                Some(Refused(reply::ERR_TLS_REQD, "this server wants TLS".to_owned()))
            }
            (None, _) => None,
        };
        if option == option::EXPORT_NAME {
            // There is no way to refuse this one but to close.
            let agreed = refused.is_none().then(|| self.export_name(data, out)).flatten();
            return agreed.map_or(Next::Close, Next::Transmit);
        }
        let answered = match refused {
            Some(refused) => Err(refused),
            None => self.answer(option, data, out),
        };
        match answered {
            Ok(next) => {
                option_reply(out, option, reply::ACK, &[]);
                next
            }
            Err(Refused(kind, message)) => {
                option_reply(out, option, kind, &[clip(&message)]);
                Next::Option
            }
        }
    }

    /// Everything but the last `ACK`.
    fn answer(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Next, Refused> {
        let bare = matches!(
            option,
            option::LIST | option::STARTTLS | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS
        );
        if bare && !data.is_empty() {
            return Err(Refused::invalid("this option takes no data"));
        }
        match option {
            option::LIST => self.list(out),
            option::STARTTLS => return self.start_tls(),
            option::STRUCTURED_REPLY if self.style == Style::Extended => {
                let message = "extended headers are in use".to_owned();
                return Err(Refused(reply::ERR_EXT_HEADER_REQD, message));
            }
            option::STRUCTURED_REPLY => self.style = Style::Structured,
            option::EXTENDED_HEADERS => self.style = Style::Extended,
            option::INFO | option::GO => {
                let agreed = self.info(option, data, out)?;
                if option == option::GO {
                    return Ok(Next::Transmit(agreed));
                }
            }
            option::LIST_META_CONTEXT => self.list_contexts(data, out)?,
            option::SET_META_CONTEXT => self.set_contexts(data, out)?,
            _ => return Err(Refused(reply::ERR_UNSUP, "no such option here".to_owned())),
        }
        Ok(Next::Option)
    }

    fn list(&self, out: &mut Vec<u8>) {
        for entry in self.exports.list() {
            let name = entry.name.as_bytes();
            let len = u32::try_from(name.len()).expect("names are short").to_be_bytes();
            let parts = [&len, name, entry.description.as_bytes()];
            option_reply(out, option::LIST, reply::SERVER, &parts);
        }
    }

    fn start_tls(&self) -> Result<Next, Refused> {
        match self.tls {
            Tls::Never => Err(Refused(reply::ERR_POLICY, "no TLS on this socket".to_owned())),
            Tls::On => Err(Refused::invalid("TLS is on")),
            Tls::Required if self.client_flags & FLAG_FIXED_NEWSTYLE == 0 => {
                Err(Refused::invalid("TLS needs the fixed newstyle handshake"))
            }
            Tls::Required => Ok(Next::StartTls),
        }
    }

    fn export_name(&self, data: &[u8], out: &mut Vec<u8>) -> Option<Agreed> {
        if self.style == Style::Extended {
            return None;
        }
        let agreed = self.agree(text(data)?).ok()?;
        out.extend(agreed.limits.size.to_be_bytes());
        out.extend(agreed.flags().to_be_bytes());
        if self.client_flags & FLAG_NO_ZEROES == 0 {
            out.extend([0; PADDING]);
        }
        Some(agreed)
    }

    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Agreed, Refused> {
        let request = InfoRequest::decode(data)
            .ok_or_else(|| Refused::invalid("the lengths of the request do not add up"))?;
        let agreed = self.agree(request.name)?;
        let mut tell = |kind: u16, parts: &[&[u8]]| {
            let kind = kind.to_be_bytes();
            let parts: Vec<&[u8]> = [&kind[..]].into_iter().chain(parts.iter().copied()).collect();
            option_reply(out, option, reply::INFO, &parts);
        };
        let (size, flags) = (agreed.limits.size.to_be_bytes(), agreed.flags().to_be_bytes());
        tell(info::EXPORT, &[&size, &flags]);
        // Said unasked as well: a client that reads it is told the truth, others skip it.
        let maximum = u32::try_from(PAYLOAD_MAX).expect("a small number");
        let sizes = [BLOCK_MIN, BLOCK_PREFERRED, maximum].map(u32::to_be_bytes);
        tell(info::BLOCK_SIZE, &[sizes.as_flattened()]);
        if request.wanted.contains(&info::NAME) {
            tell(info::NAME, &[agreed.export.name().as_bytes()]);
        }
        if request.wanted.contains(&info::DESCRIPTION) {
            tell(info::DESCRIPTION, &[agreed.export.description().as_bytes()]);
        }
        Ok(agreed)
    }

    fn agree(&self, name: &str) -> Result<Agreed, Refused> {
        let export = self.exports.open(name)?;
        let contexts = match &self.contexts {
            Some((selected_for, contexts)) if selected_for == name => contexts.clone(),
            _ => Vec::new(),
        };
        let limits = Limits {
            size: export.size(),
            read_only: export.read_only(),
            style: self.style,
            contexts: !contexts.is_empty(),
        };
        Ok(Agreed { export, limits, contexts })
    }

    fn meta<'a>(&self, data: &'a [u8]) -> Result<(MetaRequest<'a>, Arc<dyn Export>), Refused> {
        if self.style == Style::Simple {
            return Err(Refused::invalid("structured replies must be agreed on first"));
        }
        let request = MetaRequest::decode(data)
            .ok_or_else(|| Refused::invalid("the lengths of the request do not add up"))?;
        let export = self.exports.open(request.name)?;
        Ok((request, export))
    }

    fn list_contexts(&self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refused> {
        let (request, export) = self.meta(data)?;
        for name in contexts::list(export.as_ref(), &request.queries) {
            let parts = [&[0; 4], name.as_bytes()];
            option_reply(out, option::LIST_META_CONTEXT, reply::META_CONTEXT, &parts);
        }
        Ok(())
    }

    fn set_contexts(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refused> {
        // What was selected before is gone, also when this fails.
        self.contexts = None;
        let (request, export) = self.meta(data)?;
        let mut selected: Vec<Context> = Vec::new();
        for query in &request.queries {
            if selected.iter().any(|c| c.name == *query) {
                continue;
            }
            if let Some(context) = contexts::select(&export, query)? {
                selected.push(context);
            }
            if selected.len() > SELECTED_MAX {
                let message = format!("at most {SELECTED_MAX} contexts");
                return Err(Refused(reply::ERR_TOO_BIG, message));
            }
        }
        for (id, context) in (0u32..).zip(&selected) {
            let parts = [&id.to_be_bytes(), context.name.as_bytes()];
            option_reply(out, option::SET_META_CONTEXT, reply::META_CONTEXT, &parts);
        }
        self.contexts = Some((request.name.to_owned(), selected));
        Ok(())
    }
}

impl Agreed {
    /// Transmission flags.
    fn flags(&self) -> u16 {
        use transmission as t;
        let mut flags = t::HAS_FLAGS | t::SEND_FLUSH | t::SEND_FUA | t::CAN_MULTI_CONN;
        if self.limits.read_only {
            flags |= t::READ_ONLY;
        } else {
            flags |= t::SEND_TRIM | t::SEND_WRITE_ZEROES | t::SEND_FAST_ZERO;
        }
        if self.limits.style != Style::Simple {
            flags |= t::SEND_DF;
        }
        flags
    }
}

/// At most `MESSAGE_MAX` bytes of a message, cut between characters.
pub(super) fn clip(message: &str) -> &[u8] {
    let mut end = message.len().min(MESSAGE_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message.as_bytes()[..end]
}
