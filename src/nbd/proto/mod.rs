//! NBD's wire format: what comes from clients decoded, what goes to them encoded. Pure: no I/O, and nothing is
//! allocated by a number that a client sent.
//!
//! Source: the NBD project's `doc/proto.md`; for extended headers the same file on its branch `extension-ext-header`.
//! All numbers are big-endian.

pub mod bytes;
pub mod options;
pub mod replies;
pub mod requests;

use crate::error::errno;

/// `NBDMAGIC`, the first bytes of a server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before each option and in the greeting.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before a structured chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Before an extended chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string: "MUST NOT exceed 4096 bytes" (Conventions).
pub const STRING_MAX_BYTES: usize = 4096;
/// Longest data of an option that is looked at: a name and some hundred queries.
pub const OPTION_MAX_BYTES: u32 = 64 << 10;
/// Longest data of an option that is skipped, and answered; more ends the connection.
pub const OPTION_SKIP_MAX_BYTES: u32 = 1 << 20;
/// Most queries of one option.
pub const QUERIES_MAX: u32 = 512;
/// Most meta contexts of one session.
pub const CONTEXTS_MAX: usize = 128;
/// Longest data of a request or of a reply's chunk (Size constraints: the default).
pub const PAYLOAD_MAX_BYTES: u32 = 32 << 20;
/// Longest data of a refused request that is skipped; more ends the connection.
pub const PAYLOAD_SKIP_MAX_BYTES: u64 = 64 << 20;
/// Most extents of one chunk. The specification would allow 2^20.
pub const EXTENTS_MAX: usize = 64 << 10;
/// `NBD_INFO_BLOCK_SIZE`: smallest and preferred request.
pub const BLOCK_MIN_BYTES: u32 = 1;
/// See [`BLOCK_MIN_BYTES`].
pub const BLOCK_PREFERRED_BYTES: u32 = 4096;

/// Handshake flags, of the server.
pub mod handshake_flags {
    #![allow(missing_docs)]
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Client flags.
pub mod client_flags {
    #![allow(missing_docs)]
    pub const FIXED_NEWSTYLE: u32 = 1 << 0;
    pub const NO_ZEROES: u32 = 1 << 1;
}

/// Transmission flags.
pub mod export_flags {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Option types.
pub mod option {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types.
pub mod reply {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_POLICY: u32 = 1 << 31 | 2;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub const ERR_SHUTDOWN: u32 = 1 << 31 | 7;
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
    pub const ERR_EXT_HEADER_REQD: u32 = 1 << 31 | 10;
}

/// Information types of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Request types.
pub mod command {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod command_flags {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks, and their flag.
pub mod chunk {
    #![allow(missing_docs)]
    pub const DONE: u16 = 1 << 0;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = 1 << 15 | 1;
}

/// Flags of `base:allocation`.
pub mod allocation {
    #![allow(missing_docs)]
    pub const HOLE: u32 = 1 << 0;
    pub const ZERO: u32 = 1 << 1;
}

/// Error values (Transmission phase, Error values).
pub mod wire_errno {
    #![allow(missing_docs)]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// How replies look, as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Style {
    /// Simple replies alone.
    #[default]
    Simple,
    /// Structured chunks.
    Structured,
    /// Extended headers both ways.
    Extended,
}

/// The value of an errno of Linux on the wire. What has none there is EIO, as it tells a client the least wrong.
pub fn wire_error(errno: i32) -> u32 {
    match errno {
        errno::EPERM | errno::EACCES | errno::EROFS => wire_errno::EPERM,
        12 => wire_errno::ENOMEM,
        errno::EINVAL => wire_errno::EINVAL,
        // EDQUOT has no name in `error`.
        errno::ENOSPC | errno::EFBIG | 122 => wire_errno::ENOSPC,
        75 => wire_errno::EOVERFLOW,
        errno::EOPNOTSUPP => wire_errno::ENOTSUP,
        108 => wire_errno::ESHUTDOWN,
        _ => wire_errno::EIO,
    }
}

/// The start of `text` that fits into a string of the protocol.
pub fn clip(text: &str) -> &str {
    let mut end = text.len().min(STRING_MAX_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests;
