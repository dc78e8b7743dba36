//! Numbers and texts in what a guest wrote, and reads that stay inside of a disk.
//!
//! A number that is not wholly inside of the bytes is 0, so that no parser can panic; each of them looks at a magic
//! number first, and at the bounds of what it reads.

use super::Disk;
use crate::error::Result;
use std::ops::Range;

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let end = at.checked_add(N);
    end.and_then(|end| bytes.get(at..end)).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
}

pub(super) fn u8_at(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(field(bytes, at))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

/// Whether `magic` stands at `at`.
pub(super) fn stands(bytes: &[u8], at: usize, magic: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

/// The bytes at `at`, as many as there are of `len`.
pub(super) fn part(bytes: &[u8], at: usize, len: usize) -> &[u8] {
    let end = at.saturating_add(len).min(bytes.len());
    bytes.get(at..end).unwrap_or(&[])
}

/// A text that ends at the first NUL, without blanks around it and without control characters; None where nothing is
/// left.
pub(super) fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    clean(&String::from_utf8_lossy(bytes.get(..end)?))
}

/// The same of UTF-16, low byte first.
pub(super) fn text16(bytes: &[u8]) -> Option<String> {
    let units = bytes.as_chunks().0.iter().map(|unit| u16::from_le_bytes(*unit)).take_while(|unit| *unit != 0);
    clean(&char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect::<String>())
}

/// Labels go to terminals and logs.
fn clean(text: &str) -> Option<String> {
    let text: String = text.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    (!text.is_empty()).then_some(text)
}

/// A GUID as partition tables store it, in small letters.
pub(super) fn guid(bytes: &[u8], at: usize) -> String {
    uuid::Uuid::from_bytes_le(field(bytes, at)).to_string()
}

/// A UUID as file systems store it; None where it is all zeros.
pub(super) fn uuid(bytes: &[u8], at: usize) -> Option<String> {
    let uuid = uuid::Uuid::from_bytes(field(bytes, at));
    (!uuid.is_nil()).then(|| uuid.to_string())
}

/// Reads a range; None where it is not wholly on the disk. Callers bound `len`.
pub(super) fn read(disk: &dyn Disk, offset: u64, len: usize) -> Result<Option<Vec<u8>>> {
    if offset.checked_add(len as u64).is_none_or(|end| end > disk.size()) {
        return Ok(None);
    }
    let mut bytes = vec![0; len];
    disk.read_at(&mut bytes, offset)?;
    Ok(Some(bytes))
}

/// Reads a range, or what of it is on the disk.
pub(super) fn read_some(disk: &dyn Disk, offset: u64, len: usize) -> Result<Vec<u8>> {
    let len = disk.size().saturating_sub(offset).min(len as u64) as usize;
    Ok(read(disk, offset, len)?.unwrap_or_default())
}

/// A range of a disk as a disk.
pub(super) struct Part<'a> {
    disk: &'a dyn Disk,
    range: Range<u64>,
}

impl<'a> Part<'a> {
    /// `range` lies on the disk.
    pub fn new(disk: &'a dyn Disk, range: Range<u64>) -> Self {
        Part { disk, range }
    }
}

impl Disk for Part<'_> {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn size(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.disk.read_at(buf, self.range.start.saturating_add(offset))
    }
}
