//! Headers of replies and chunks, on the stack: the data that follows them is sent from where it lies.

use super::{EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, Style, chunk, clip, requests::Request};

/// The longest of all headers with fixed fields: an extended one, and those of an error or of a status.
const HEAD_MAX_BYTES: usize = 48;

/// The first bytes of a reply or chunk.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    bytes: [u8; HEAD_MAX_BYTES],
    len: usize,
}

impl Head {
    fn empty() -> Head {
        Head { bytes: [0; HEAD_MAX_BYTES], len: 0 }
    }

    fn put<const N: usize>(mut self, bytes: [u8; N]) -> Head {
        if let Some(place) = self.bytes.get_mut(self.len..self.len + N) {
            place.copy_from_slice(&bytes);
            self.len += N;
        }
        self
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// A simple reply: what it says, then the data of a read.
    pub fn simple(request: &Request, error: u32) -> Head {
        Head::empty().put(SIMPLE_REPLY_MAGIC.to_be_bytes()).put(error.to_be_bytes()).put(request.cookie.to_be_bytes())
    }

    /// A chunk's header, of either style.
    fn chunk(style: Style, request: &Request, flags: u16, kind: u16, len: u64) -> Head {
        let extended = style == Style::Extended;
        let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        let head = Head::empty()
            .put(magic.to_be_bytes())
            .put(flags.to_be_bytes())
            .put(kind.to_be_bytes())
            .put(request.cookie.to_be_bytes());
        match extended {
            true => head.put(request.offset.to_be_bytes()).put(len.to_be_bytes()),
            false => head.put((len as u32).to_be_bytes()),
        }
    }

    /// The end of a reply that went well and has no data.
    pub fn none(style: Style, request: &Request) -> Head {
        Head::chunk(style, request, chunk::DONE, chunk::NONE, 0)
    }

    /// Before `len` bytes of data from `offset` on.
    pub fn data(style: Style, request: &Request, done: bool, offset: u64, len: u32) -> Head {
        let flags = if done { chunk::DONE } else { 0 };
        Head::chunk(style, request, flags, chunk::OFFSET_DATA, 8 + u64::from(len)).put(offset.to_be_bytes())
    }

    /// Before the extents of one context.
    pub fn status(style: Style, request: &Request, done: bool, id: u32, extents: &Extents) -> Head {
        let flags = if done { chunk::DONE } else { 0 };
        let len = extents.bytes.len() as u64;
        match style {
            Style::Extended => Head::chunk(style, request, flags, chunk::BLOCK_STATUS_EXT, 8 + len)
                .put(id.to_be_bytes())
                .put((extents.count as u32).to_be_bytes()),
            _ => Head::chunk(style, request, flags, chunk::BLOCK_STATUS, 4 + len).put(id.to_be_bytes()),
        }
    }

    /// Before the text of an error, which is to be [`clip`]ped by the caller.
    pub fn error(style: Style, request: &Request, error: u32, text: &str) -> Head {
        let text_len = clip(text).len();
        Head::chunk(style, request, chunk::DONE, chunk::ERROR, 6 + text_len as u64)
            .put(error.to_be_bytes())
            .put((text_len as u16).to_be_bytes())
    }
}

/// Descriptors of a status chunk.
#[derive(Debug, Default)]
pub struct Extents {
    bytes: Vec<u8>,
    count: usize,
}

impl Extents {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Their bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Room for others.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.count = 0;
    }

    /// Adds one. Under compact headers `len` is a part of a request's length, which has 32 bits.
    pub fn push(&mut self, style: Style, len: u64, flags: u32) {
        if style == Style::Extended {
            self.bytes.extend(len.to_be_bytes());
            self.bytes.extend(u64::from(flags).to_be_bytes());
        } else {
            self.bytes.extend((len as u32).to_be_bytes());
            self.bytes.extend(flags.to_be_bytes());
        }
        self.count += 1;
    }
}
