//! Option haggling: what clients ask, and the replies.

use super::bytes::{Bytes, Malformed};
use super::{
    BLOCK_MIN_BYTES, BLOCK_PREFERRED_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_MAX_BYTES, QUERIES_MAX, clip,
    info, reply,
};

/// Length of an option's header.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Length of a reply's header.
pub const REPLY_HEADER_BYTES: usize = 20;
/// Zeros behind the answer to `NBD_OPT_EXPORT_NAME`, for clients that want them.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// An option's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Its number.
    pub option: u32,
    /// Length of its data.
    pub len: u32,
}

impl OptionHeader {
    /// `None` where the magic number is not there.
    pub fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Option<OptionHeader> {
        let mut bytes = Bytes(bytes);
        let (magic, option, len) = (bytes.u64().ok()?, bytes.u32().ok()?, bytes.u32().ok()?);
        (magic == OPTION_MAGIC).then_some(OptionHeader { option, len })
    }
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Clone, Copy)]
pub struct InfoRequest<'a> {
    /// Which export.
    pub name: &'a str,
    wants: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    /// Decodes all of `data`.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut bytes = Bytes(data);
        let name = bytes.string()?;
        let count = bytes.u16()?;
        let wants = bytes.take(usize::from(count) * 2)?;
        bytes.end()?;
        Ok(InfoRequest { name, wants })
    }

    /// Whether the client asks for an information.
    pub fn wants(&self, kind: u16) -> bool {
        self.wants.chunks_exact(2).any(|one| one == kind.to_be_bytes())
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, Clone, Copy)]
pub struct ContextRequest<'a> {
    /// Of which export.
    pub name: &'a str,
    /// How many queries.
    pub count: u32,
    queries: Bytes<'a>,
}

impl<'a> ContextRequest<'a> {
    /// Decodes all of `data`.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut bytes = Bytes(data);
        let name = bytes.string()?;
        let count = bytes.u32()?;
        if count > QUERIES_MAX {
            return Err(Malformed::TooBig("more than 512 queries"));
        }
        let request = ContextRequest { name, count, queries: bytes };
        for _ in 0..count {
            bytes.string()?;
        }
        bytes.end()?;
        Ok(request)
    }

    /// The queries, in order.
    pub fn queries(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut bytes = self.queries;
        (0..self.count).map_while(move |_| bytes.string().ok())
    }

    /// Whether a query asks for the context `name`; where `listing`, a namespace (`qemu:`, and `qemu:dirty-bitmap:`
    /// with QEMU's names) asks for all in it, and no query for all there are.
    pub fn matches(&self, name: &str, listing: bool) -> bool {
        let asks = |query: &str| query == name || (listing && query.ends_with(':') && name.starts_with(query));
        (listing && self.count == 0) || self.queries().any(asks)
    }
}

fn reply_header(out: &mut Vec<u8>, option: u32, kind: u32, len: usize) {
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((len as u32).to_be_bytes());
}

/// A reply of a type without data, or an error with a text for a human.
pub fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, text: &str) {
    let text = clip(text);
    reply_header(out, option, kind, text.len());
    out.extend(text.as_bytes());
}

/// `NBD_REP_SERVER`.
pub fn put_server(out: &mut Vec<u8>, option: u32, name: &str, description: &str) {
    let (name, description) = (clip(name), clip(description));
    reply_header(out, option, reply::SERVER, 4 + name.len() + description.len());
    out.extend((name.len() as u32).to_be_bytes());
    out.extend(name.as_bytes());
    out.extend(description.as_bytes());
}

/// `NBD_REP_META_CONTEXT`.
pub fn put_context(out: &mut Vec<u8>, option: u32, id: u32, name: &str) {
    let name = clip(name);
    reply_header(out, option, reply::META_CONTEXT, 4 + name.len());
    out.extend(id.to_be_bytes());
    out.extend(name.as_bytes());
}

/// `NBD_INFO_EXPORT`.
pub fn put_info_export(out: &mut Vec<u8>, option: u32, size: u64, flags: u16) {
    reply_header(out, option, reply::INFO, 12);
    out.extend(info::EXPORT.to_be_bytes());
    out.extend(size.to_be_bytes());
    out.extend(flags.to_be_bytes());
}

/// `NBD_INFO_NAME` and `NBD_INFO_DESCRIPTION`.
pub fn put_info_text(out: &mut Vec<u8>, option: u32, kind: u16, text: &str) {
    let text = clip(text);
    reply_header(out, option, reply::INFO, 2 + text.len());
    out.extend(kind.to_be_bytes());
    out.extend(text.as_bytes());
}

/// `NBD_INFO_BLOCK_SIZE`.
pub fn put_info_block_size(out: &mut Vec<u8>, option: u32) {
    reply_header(out, option, reply::INFO, 14);
    out.extend(info::BLOCK_SIZE.to_be_bytes());
    for bytes in [BLOCK_MIN_BYTES, BLOCK_PREFERRED_BYTES, PAYLOAD_MAX_BYTES] {
        out.extend(bytes.to_be_bytes());
    }
}

/// The answer to `NBD_OPT_EXPORT_NAME`, which has no header.
pub fn put_export_name(out: &mut Vec<u8>, size: u64, flags: u16, zeroes: bool) {
    out.extend(size.to_be_bytes());
    out.extend(flags.to_be_bytes());
    if zeroes {
        out.extend([0; EXPORT_NAME_ZEROES]);
    }
}
