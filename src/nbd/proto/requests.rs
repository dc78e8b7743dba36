//! Headers of requests.

use super::bytes::Bytes;
use super::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, Style, command, command_flags};

/// Length of a compact header.
pub const COMPACT_BYTES: usize = 28;
/// Length of an extended header.
pub const EXTENDED_BYTES: usize = 32;

/// A request without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Which command.
    pub command: u16,
    /// What the reply carries.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes it concerns, or how many follow.
    pub len: u64,
}

/// Length of a header, as negotiated.
pub fn header_bytes(style: Style) -> usize {
    if style == Style::Extended { EXTENDED_BYTES } else { COMPACT_BYTES }
}

impl Request {
    /// Decodes a header of [`header_bytes`]. `None` where its magic number is not there.
    pub fn decode(bytes: &[u8], style: Style) -> Option<Request> {
        let extended = style == Style::Extended;
        let mut bytes = Bytes(bytes);
        let magic = bytes.u32().ok()?;
        let (flags, command) = (bytes.u16().ok()?, bytes.u16().ok()?);
        let (cookie, offset) = (bytes.u64().ok()?, bytes.u64().ok()?);
        let len = if extended { bytes.u64().ok()? } else { u64::from(bytes.u32().ok()?) };
        let wanted = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        (magic == wanted).then_some(Request { flags, command, cookie, offset, len })
    }

    /// Bytes that follow the header. A write without `NBD_CMD_FLAG_PAYLOAD_LEN` under extended headers breaks a rule
    /// of clients, but means what it always meant.
    pub fn payload_len(&self, style: Style) -> u64 {
        let flagged = style == Style::Extended && self.has(command_flags::PAYLOAD_LEN);
        if flagged || self.command == command::WRITE { self.len } else { 0 }
    }

    /// Whether a command flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether it ends behind an export of `size` bytes.
    pub fn ends_behind(&self, size: u64) -> bool {
        self.offset.checked_add(self.len).is_none_or(|end| end > size)
    }

    /// The flags that its command takes; `None` for an unknown command. `NBD_CMD_FLAG_FUA` is valid for all.
    pub fn valid_flags(&self, style: Style) -> Option<u16> {
        let own = match self.command {
            command::READ if style > Style::Simple => command_flags::DF,
            command::WRITE if style == Style::Extended => command_flags::PAYLOAD_LEN,
            command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
            command::WRITE_ZEROES => command_flags::NO_HOLE | command_flags::FAST_ZERO,
            command::BLOCK_STATUS => command_flags::REQ_ONE,
            _ => return None,
        };
        Some(own | command_flags::FUA)
    }
}
