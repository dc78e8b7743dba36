//! The handshake: fixed newstyle, until an export is agreed on or the client leaves.
//!
//! * **Nothing survives STARTTLS**: neither what was negotiated in the clear nor bytes that came behind the option.
//! * **Contexts belong to the export of the last `NBD_OPT_SET_META_CONTEXT`**, and count only where it is the one that is
//!   entered.
//! * **Bounded**: options are counted, their data is limited ([`super::proto`]), and the server ends what takes too long.

use super::export::{Context, Export, Exports};
use super::input::Input;
use super::proto::bytes::{Malformed, string};
use super::proto::options::{
    ContextRequest, InfoRequest, OPTION_HEADER_BYTES, OptionHeader, put_context, put_export_name, put_info_block_size,
    put_info_export, put_info_text, put_reply, put_server,
};
use super::proto::{
    CONTEXTS_MAX, INIT_MAGIC, OPTION_MAGIC, OPTION_MAX_BYTES, OPTION_SKIP_MAX_BYTES, Style, client_flags, export_flags,
    handshake_flags, info, option, reply,
};
use super::transport::{Socket, Tls, Transport};
use crate::error::{Error, Result, errno};
use std::io::IoSlice;
use std::sync::Arc;

/// Most options of one handshake: some for each of a thousand exports.
const OPTIONS_MAX: usize = 4096;
/// Replies are sent when so many bytes of them are there.
const REPLIES_BYTES: usize = 64 << 10;

/// What a server offers to those who shake hands.
#[derive(Clone, Copy)]
pub struct Offer<'a> {
    /// What may be entered.
    pub exports: &'a dyn Exports,
    /// What puts TLS over a connection.
    pub tls: Option<&'a dyn Tls>,
    /// Whether nothing is said without it.
    pub tls_required: bool,
    /// Told the name of an export before it is opened to be entered, and nothing where it is not entered.
    pub entering: &'a dyn Fn(Option<&str>),
}

/// What was agreed on.
pub struct Agreed {
    /// The export.
    pub export: Arc<dyn Export>,
    /// Its canonical name.
    pub name: String,
    /// How replies look.
    pub style: Style,
    /// The contexts, by their numbers.
    pub contexts: Vec<Arc<dyn Context>>,
    /// Where requests come from.
    pub input: Input,
}

/// The type and text of an error reply.
type Refusal = (u32, String);
type Answer = std::result::Result<Next, Refusal>;

fn refused(kind: u32, text: &str) -> Answer {
    Err((kind, text.to_owned()))
}

impl From<Malformed> for Refusal {
    fn from(malformed: Malformed) -> Refusal {
        match malformed {
            Malformed::Invalid(why) => (reply::ERR_INVALID, why.to_owned()),
            Malformed::TooBig(why) => (reply::ERR_TOO_BIG, why.to_owned()),
        }
    }
}

/// What an option comes to.
enum Next {
    More,
    Left,
    Entered(Arc<dyn Export>, String),
}

struct Handshake<'a> {
    offer: Offer<'a>,
    socket: Option<Arc<Socket>>,
    input: Input,
    out: Vec<u8>,
    secure: bool,
    no_zeroes: bool,
    style: Style,
    contexts: Option<(String, Vec<Arc<dyn Context>>)>,
}

/// Shakes hands. `None` where the client left in good order. `socket` is what TLS would be put over.
pub fn shake(transport: Arc<dyn Transport>, socket: Option<Arc<Socket>>, offer: Offer<'_>) -> Result<Option<Agreed>> {
    let handshake = Handshake {
        offer,
        socket,
        input: Input::new(transport),
        out: Vec::new(),
        secure: false,
        no_zeroes: false,
        style: Style::Simple,
        contexts: None,
    };
    handshake.run()
}

fn broken(why: &str) -> Error {
    Error::new(errno::EINVAL, "handshake", why)
}

impl Handshake<'_> {
    fn run(mut self) -> Result<Option<Agreed>> {
        let failed = |e| Error::io("handshake", e);
        let fixed = self.greet()?;
        for _ in 0..OPTIONS_MAX {
            let mut header = [0; OPTION_HEADER_BYTES];
            if !self.input.fill_or_end(&mut header).map_err(failed)? {
                return Ok(None);
            }
            let header = OptionHeader::decode(&header).ok_or_else(|| broken("an option has no magic number"))?;
            if !fixed && header.option != option::EXPORT_NAME {
                return Err(broken("an option other than NBD_OPT_EXPORT_NAME without fixed newstyle"));
            }
            let next = self.option(header)?;
            self.send()?;
            match next {
                Next::More => (),
                Next::Left => return Ok(None),
                Next::Entered(export, name) => return Ok(Some(self.agreed(export, name))),
            }
        }
        Err(broken("more than 4096 options"))
    }

    /// The greeting and the client's flags: whether it knows fixed newstyle.
    fn greet(&mut self) -> Result<bool> {
        self.out.extend(INIT_MAGIC.to_be_bytes());
        self.out.extend(OPTION_MAGIC.to_be_bytes());
        self.out.extend((handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES).to_be_bytes());
        self.send()?;
        let mut flags = [0; 4];
        self.input.fill(&mut flags).map_err(|e| Error::io("handshake", e))?;
        let flags = u32::from_be_bytes(flags);
        if flags & !(client_flags::FIXED_NEWSTYLE | client_flags::NO_ZEROES) != 0 {
            return Err(broken("unknown client flags"));
        }
        self.no_zeroes = flags & client_flags::NO_ZEROES != 0;
        Ok(flags & client_flags::FIXED_NEWSTYLE != 0)
    }

    fn send(&mut self) -> Result<()> {
        if !self.out.is_empty() {
            let sent = self.input.transport().send(&[IoSlice::new(&self.out)]);
            self.out.clear();
            sent.map_err(|e| Error::io("handshake", e))?;
        }
        Ok(())
    }

    /// Receives an option's data and answers it.
    fn option(&mut self, header: OptionHeader) -> Result<Next> {
        let OptionHeader { option, len } = header;
        let failed = |e| Error::io("handshake", e);
        if len > OPTION_MAX_BYTES {
            if len > OPTION_SKIP_MAX_BYTES || option == option::EXPORT_NAME {
                return Err(broken("an option's data is too long"));
            }
            self.input.skip(u64::from(len)).map_err(failed)?;
            put_reply(&mut self.out, option, reply::ERR_TOO_BIG, "the option's data is longer than 64 KiB");
            return Ok(Next::More);
        }
        let mut data = vec![0; len as usize];
        self.input.fill(&mut data).map_err(failed)?;
        if option == option::EXPORT_NAME {
            return self.export_name(&data);
        }
        match self.answer(option, &data)? {
            Ok(next) => Ok(next),
            Err((kind, text)) => {
                put_reply(&mut self.out, option, kind, &text);
                Ok(Next::More)
            }
        }
    }

    /// The inner error is the client's to see, the outer one ends the connection.
    fn answer(&mut self, option: u32, data: &[u8]) -> Result<Answer> {
        let unsecured = self.offer.tls_required && !self.secure;
        if unsecured && ![option::ABORT, option::STARTTLS].contains(&option) {
            return Ok(refused(reply::ERR_TLS_REQD, "this server wants TLS first"));
        }
        let bare = [option::LIST, option::STARTTLS, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS];
        if bare.contains(&option) && !data.is_empty() {
            return Ok(refused(reply::ERR_INVALID, "the option takes no data"));
        }
        Ok(match option {
            option::ABORT => {
                put_reply(&mut self.out, option, reply::ACK, "");
                Ok(Next::Left)
            }
            option::LIST => self.list()?,
            option::STARTTLS => return self.start_tls(),
            option::INFO => self.info(option, data),
            option::GO => self.info(option, data).inspect_err(|_| (self.offer.entering)(None)),
            option::STRUCTURED_REPLY => match self.style {
                Style::Simple => self.agree(option, Style::Structured),
                Style::Structured => refused(reply::ERR_INVALID, "structured replies are negotiated already"),
                Style::Extended => refused(reply::ERR_EXT_HEADER_REQD, "extended headers are negotiated already"),
            },
            option::EXTENDED_HEADERS => match self.style {
                Style::Extended => refused(reply::ERR_INVALID, "extended headers are negotiated already"),
                _ => self.agree(option, Style::Extended),
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_contexts(option, data),
            _ => refused(reply::ERR_UNSUP, &format!("unknown option {option}")),
        })
    }

    fn agree(&mut self, option: u32, style: Style) -> Answer {
        self.style = style;
        put_reply(&mut self.out, option, reply::ACK, "");
        Ok(Next::More)
    }

    fn list(&mut self) -> Result<Answer> {
        for (name, description) in self.offer.exports.list() {
            put_server(&mut self.out, option::LIST, &name, &description);
            if self.out.len() > REPLIES_BYTES {
                self.send()?;
            }
        }
        put_reply(&mut self.out, option::LIST, reply::ACK, "");
        Ok(Ok(Next::More))
    }

    fn start_tls(&mut self) -> Result<Answer> {
        if self.secure {
            return Ok(refused(reply::ERR_INVALID, "TLS is in use already"));
        }
        let (Some(tls), Some(socket)) = (self.offer.tls, self.socket.clone()) else {
            return Ok(refused(reply::ERR_POLICY, "this server has no TLS"));
        };
        if self.input.buffered() > 0 {
            return Err(broken("data in the clear behind NBD_OPT_STARTTLS"));
        }
        put_reply(&mut self.out, option::STARTTLS, reply::ACK, "");
        self.send()?;
        self.input = Input::new(tls.accept(socket)?);
        (self.secure, self.style, self.contexts) = (true, Style::Simple, None);
        Ok(Ok(Next::More))
    }

    fn info(&mut self, option: u32, data: &[u8]) -> Answer {
        let request = InfoRequest::decode(data)?;
        let name = self.offer.exports.canonical(request.name);
        if option == option::GO {
            (self.offer.entering)(Some(&name));
        }
        let export = self.open(&name)?;
        let flags = self.flags(&*export);
        put_info_export(&mut self.out, option, export.size(), flags);
        if request.wants(info::NAME) {
            put_info_text(&mut self.out, option, info::NAME, &name);
        }
        if request.wants(info::DESCRIPTION) {
            put_info_text(&mut self.out, option, info::DESCRIPTION, &export.description());
        }
        if request.wants(info::BLOCK_SIZE) {
            put_info_block_size(&mut self.out, option);
        }
        put_reply(&mut self.out, option, reply::ACK, "");
        Ok(if option == option::GO { Next::Entered(export, name) } else { Next::More })
    }

    /// What cannot be answered with an error ends the connection.
    fn export_name(&mut self, data: &[u8]) -> Result<Next> {
        if self.offer.tls_required && !self.secure {
            return Err(broken("NBD_OPT_EXPORT_NAME without TLS"));
        }
        let name = string(data).map_err(|_| broken("an export's name is no string"))?;
        let name = self.offer.exports.canonical(name);
        (self.offer.entering)(Some(&name));
        let export = self.offer.exports.open(&name)?;
        let flags = self.flags(&*export);
        put_export_name(&mut self.out, export.size(), flags, !self.no_zeroes);
        Ok(Next::Entered(export, name))
    }

    fn open(&self, name: &str) -> std::result::Result<Arc<dyn Export>, Refusal> {
        self.offer.exports.open(name).map_err(|e| {
            let kind = match e.errno() {
                errno::ENOENT => reply::ERR_UNKNOWN,
                108 => reply::ERR_SHUTDOWN,
                _ => reply::ERR_POLICY,
            };
            (kind, e.to_string())
        })
    }

    fn flags(&self, export: &dyn Export) -> u16 {
        use export_flags::{
            CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_CACHE, SEND_DF, SEND_FAST_ZERO, SEND_FLUSH, SEND_FUA, SEND_TRIM,
            SEND_WRITE_ZEROES,
        };
        let all = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE;
        let writing = if export.read_only() { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO };
        all | writing | if self.style > Style::Simple { SEND_DF } else { 0 }
    }

    fn meta_contexts(&mut self, option: u32, data: &[u8]) -> Answer {
        let listing = option == option::LIST_META_CONTEXT;
        if !listing {
            self.contexts = None;
        }
        if self.style == Style::Simple {
            return refused(reply::ERR_INVALID, "meta contexts need structured replies");
        }
        let request = ContextRequest::decode(data)?;
        if let Some(query) = request.queries().find(|query| !query.contains(':')) {
            return refused(reply::ERR_INVALID, &format!("query '{query}' has no namespace"));
        }
        let name = self.offer.exports.canonical(request.name);
        let export = self.open(&name)?;
        let mut chosen = Vec::new();
        for name in export.contexts().iter().filter(|name| request.matches(name, listing)) {
            if listing {
                put_context(&mut self.out, option, 0, name);
            } else if let Some(context) = export.context(name) {
                if chosen.len() == CONTEXTS_MAX {
                    return refused(reply::ERR_TOO_BIG, "more than 128 contexts");
                }
                put_context(&mut self.out, option, chosen.len() as u32, name);
                chosen.push(context);
            }
        }
        put_reply(&mut self.out, option, reply::ACK, "");
        if !listing {
            self.contexts = Some((name, chosen));
        }
        Ok(Next::More)
    }

    fn agreed(self, export: Arc<dyn Export>, name: String) -> Agreed {
        let contexts = self.contexts.filter(|(of, _)| *of == name).map(|(_, contexts)| contexts).unwrap_or_default();
        Agreed { export, name, style: self.style, contexts, input: self.input }
    }
}
