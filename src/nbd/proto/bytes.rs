//! A cursor over received bytes. It never panics and never copies.

use super::STRING_MAX_BYTES;

/// Why bytes of a client are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// They break a rule.
    Invalid(&'static str),
    /// They are more than is taken.
    TooBig(&'static str),
}

/// What is left of a message.
#[derive(Debug, Clone, Copy)]
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed::Invalid("data ends early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed::Invalid("data ends early"))?;
        self.0 = rest;
        Ok(*taken)
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string behind its length in 32 bits.
    pub fn string(&mut self) -> Result<&'a str, Malformed> {
        let len = self.u32()? as usize;
        string(self.take(len)?)
    }

    /// Nothing may be left.
    pub fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::Invalid("data is longer than what it says")) }
    }
}

/// A string as the protocol has it: UTF-8 without NUL, at most [`STRING_MAX_BYTES`] (Conventions).
pub fn string(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > STRING_MAX_BYTES {
        return Err(Malformed::TooBig("a string is longer than 4096 bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Malformed::Invalid("a string is not UTF-8"))?;
    if text.contains('\0') { Err(Malformed::Invalid("a string holds NUL")) } else { Ok(text) }
}
