//! Persistent dirty bitmaps in the image ("Bitmaps" of QEMU's docs/interop/qcow2), as they are read.
//!
//! The extension names a directory, each of its entries a table, each entry of that a cluster of bits. Trust is decided
//! in three steps, and what is not trusted is kept, listed and counted, but never used:
//! - the directory as a whole: [`Directory::read`] refuses one whose size, places or names are wrong;
//! - all bitmaps: with autoclear bit 0 clear, a program that knows no bitmaps has written to the image;
//! - each bitmap: [`Entry::fault`] says why it cannot be used (in use when its writer died, unknown flags or data).

use super::header::{Header, autoclear, be32, be64};
use super::refcount::read_table;
use super::tables::HostOffset;
use crate::bitmap::bits::Bits;
use crate::error::{Error, Result, errno};
use crate::image::persistent::BITS_MAX_BYTES;
use crate::storage::Storage;
use std::collections::HashSet;

/// Most bitmaps of an image.
pub(super) const COUNT_MAX: u32 = 65_535;
/// Largest directory in bytes.
pub(super) const DIRECTORY_MAX_BYTES: u64 = 64 << 20;
/// Bytes of a directory entry before its extra data and name.
pub(super) const FIXED_BYTES: usize = 24;
/// Granularities, as powers of two.
pub(super) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Longest name in bytes.
pub(super) const NAME_MAX_BYTES: usize = 1023;
/// Type of a bitmap, the only one there is.
const DIRTY_TRACKING: u8 = 1;
/// Bits of a table entry that are an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Bits of an entry's flags.
pub(super) mod flag {
    pub const IN_USE: u32 = 1 << 0;
    pub const AUTO: u32 = 1 << 1;
    pub const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
}

/// A bitmap as the directory names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Bytes 0-7: aligned, not 0.
    pub table_offset: HostOffset,
    /// Bytes 8-11: entries of the table.
    pub table_entries: u32,
    /// Bytes 12-15.
    pub flags: u32,
    /// Byte 17, within 9 to 31.
    pub granularity_bits: u8,
    /// 1 to 1023 bytes, unique, without NUL.
    pub name: String,
    /// Extra data, kept as it is.
    pub extra: Vec<u8>,
}

/// The directory of bitmaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// Where it lies.
    pub offset: HostOffset,
    /// Its length.
    pub bytes: u64,
    /// In its order.
    pub all: Vec<Entry>,
    /// Whether autoclear bit 0 vouches for the bitmaps.
    pub consistent: bool,
}

/// What an entry of a bitmap's table stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// All bits clear.
    Zeros,
    /// All bits set.
    Ones,
    /// Stored in a cluster; aligned.
    Stored(HostOffset),
}

pub(super) fn bad(what: impl std::fmt::Display, why: impl Into<String>) -> Error {
    Error::new(errno::EINVAL, format!("qcow2 bitmaps: {what}"), why)
}

/// Bytes that the bits of a disk take at a granularity.
pub fn data_bytes(disk_bytes: u64, granularity_bits: u8) -> u64 {
    disk_bytes.div_ceil(1 << granularity_bits.min(63)).div_ceil(8)
}

/// Decodes an entry of a bitmap's table.
pub fn decode_piece(raw: u64, cluster_bytes: u64) -> Result<Piece> {
    let offset = raw & OFFSET_MASK;
    if raw & !(OFFSET_MASK | 1) != 0 || (offset != 0 && raw & 1 != 0) {
        return Err(bad(format!("table entry {raw:#018x}"), "reserved bits are set"));
    }
    if !offset.is_multiple_of(cluster_bytes) {
        return Err(bad(format!("table entry {raw:#018x}"), "not aligned to a cluster"));
    }
    Ok(match (offset, raw & 1) {
        (0, 0) => Piece::Zeros,
        (0, _) => Piece::Ones,
        _ => Piece::Stored(HostOffset(offset)),
    })
}

impl Entry {
    /// The bitmap was being changed when its writer ended: its bits mean nothing.
    pub fn in_use(&self) -> bool {
        self.flags & flag::IN_USE != 0
    }

    /// The bitmap records writes.
    pub fn auto(&self) -> bool {
        self.flags & flag::AUTO != 0
    }

    /// The entry as it is when the bitmap is no longer in use.
    pub fn released(&self) -> Entry {
        Entry { flags: self.flags & !flag::IN_USE, ..self.clone() }
    }

    /// Bytes of the disk that one bit stands for.
    pub fn granularity_bytes(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Bytes that the entry takes in the directory.
    pub fn len_bytes(&self) -> usize {
        (FIXED_BYTES + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    /// Appends the entry as it stands in the directory.
    pub(super) fn encode(&self, directory: &mut Vec<u8>) {
        directory.extend_from_slice(&self.table_offset.0.to_be_bytes());
        directory.extend_from_slice(&self.table_entries.to_be_bytes());
        directory.extend_from_slice(&self.flags.to_be_bytes());
        directory.extend_from_slice(&[DIRTY_TRACKING, self.granularity_bits]);
        directory.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        directory.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        directory.extend_from_slice(&self.extra);
        directory.extend_from_slice(self.name.as_bytes());
        directory.resize(directory.len().next_multiple_of(8), 0);
    }

    /// Why the bits cannot be used, where they cannot.
    pub fn fault(&self, header: &Header, consistent: bool) -> Option<String> {
        let bytes = data_bytes(header.size, self.granularity_bits);
        let needed = bytes.div_ceil(header.cluster_size());
        let known = flag::IN_USE | flag::AUTO | flag::EXTRA_DATA_COMPATIBLE;
        if !consistent {
            Some("a program without support for bitmaps has written to the image".into())
        } else if self.in_use() {
            Some("it was in use when its writer ended".into())
        } else if self.flags & !known != 0 {
            Some(format!("unknown flags {:#x}", self.flags & !known))
        } else if !self.extra.is_empty() && self.flags & flag::EXTRA_DATA_COMPATIBLE == 0 {
            Some("it has extra data of an unknown kind".into())
        } else if bytes > BITS_MAX_BYTES {
            Some("its bits take more than 512 MiB".into())
        } else if needed != u64::from(self.table_entries) {
            Some(format!("its table has {} entries, but the disk needs {needed}", self.table_entries))
        } else {
            None
        }
    }

    /// Reads the bits. EINVAL where [`Entry::fault`] finds something, the table is wrong, or bits behind the disk's
    /// end are set.
    pub fn load(&self, storage: &dyn Storage, header: &Header, consistent: bool) -> Result<Bits> {
        let what = format!("'{}'", self.name.escape_debug());
        if let Some(why) = self.fault(header, consistent) {
            return Err(bad(what, why).at_path(storage.path()));
        }
        let cluster_bytes = header.cluster_size();
        let file_bytes = storage.len()?;
        let mut bits = Bits::heap(header.size.div_ceil(self.granularity_bytes()));
        let table = read_table(storage, self.table_offset.0, u64::from(self.table_entries))?;
        let mut buf = vec![0; cluster_bytes as usize];
        let mut left = data_bytes(header.size, self.granularity_bits);
        for (raw, first) in table.into_iter().zip((0..).step_by(cluster_bytes as usize * 8)) {
            let here = left.min(cluster_bytes);
            left -= here;
            match decode_piece(raw, cluster_bytes).map_err(|e| e.context(format!("bitmap {what}")))? {
                Piece::Zeros => (),
                Piece::Ones => bits.set_range(first..first + here * 8),
                Piece::Stored(offset) if offset.0 >= file_bytes => {
                    return Err(bad(what, "its bits lie outside the file").at_path(storage.path()).at_offset(offset.0));
                }
                Piece::Stored(offset) => {
                    storage.read_at(&mut buf, offset.0)?;
                    if !store_bits(&mut bits, first, &buf) {
                        return Err(bad(what, "bits behind the end of the disk are set").at_offset(offset.0));
                    }
                }
            }
        }
        Ok(bits)
    }
}

/// Sets the bits of `bytes` from bit `first`, a multiple of 64; false where one lies behind the end.
fn store_bits(bits: &mut Bits, first: u64, bytes: &[u8]) -> bool {
    let word = |chunk: &[u8]| chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let words = || bytes.chunks_exact(8).map(word);
    let behind = words().zip((first..).step_by(64)).any(|(word, at)| {
        let here = bits.len().saturating_sub(at).min(64);
        word != 0 && (here == 0 || word.checked_shr(here as u32).unwrap_or(0) != 0)
    });
    if !behind {
        bits.or_words((first / 64) as usize, words());
    }
    !behind
}

impl Directory {
    /// Reads the directory; `None` where the image has none.
    pub fn read(storage: &dyn Storage, header: &Header) -> Result<Option<Directory>> {
        let Some(extension) = header.extensions.bitmaps() else { return Ok(None) };
        let (offset, bytes) = (extension.directory_offset, extension.directory_bytes);
        let end = offset.checked_add(bytes);
        let why = if !(1..=COUNT_MAX).contains(&extension.count) {
            Some(format!("nb_bitmaps: {} is not from 1 to {COUNT_MAX}", extension.count))
        } else if extension.reserved != 0 {
            Some("reserved: not 0".into())
        } else if bytes > DIRECTORY_MAX_BYTES {
            Some(format!("directory_size: {bytes} is more than 64 MiB"))
        } else if offset == 0 || !offset.is_multiple_of(header.cluster_size()) {
            Some(format!("directory_offset: {offset} is not the place of a cluster"))
        } else if end.is_none_or(|end| end > storage.len().unwrap_or(0)) {
            Some(format!("directory_offset: {bytes} bytes at {offset} are not inside the file"))
        } else {
            None
        };
        if let Some(why) = why {
            return Err(bad("extension", why).at_path(storage.path()));
        }
        let mut raw = vec![0; bytes as usize];
        storage.read_at(&mut raw, offset)?;
        let all = parse_entries(&raw, extension.count, header).map_err(|e| e.at_path(storage.path()))?;
        let consistent = header.autoclear_features & autoclear::BITMAPS != 0;
        Ok(Some(Directory { offset: HostOffset(offset), bytes, all, consistent }))
    }
}

fn parse_entries(raw: &[u8], count: u32, header: &Header) -> Result<Vec<Entry>> {
    let mut all = Vec::new();
    let mut names = HashSet::new();
    let mut rest = raw;
    for index in 0..count {
        let what = format!("directory entry {index}");
        let (entry, len) = parse_entry(rest, header).map_err(|why| bad(&what, why))?;
        if !names.insert(entry.name.clone()) {
            return Err(bad(what, format!("the name '{}' occurs twice", entry.name.escape_debug())));
        }
        all.push(entry);
        rest = rest.get(len..).unwrap_or_default();
    }
    if !rest.is_empty() {
        return Err(bad("directory_size", format!("{} bytes are left behind the last entry", rest.len())));
    }
    Ok(all)
}

/// The entry at the start of `raw`, and its length with padding.
fn parse_entry(raw: &[u8], header: &Header) -> std::result::Result<(Entry, usize), String> {
    let short = || "ends behind the directory".to_owned();
    let fixed = raw.get(..FIXED_BYTES).ok_or_else(short)?;
    let (table_offset, table_entries, flags) = (be64(fixed, 0), be32(fixed, 8), be32(fixed, 12));
    let kind = be32(fixed, 16).to_be_bytes()[0];
    let granularity_bits = be32(fixed, 16).to_be_bytes()[1];
    let name_bytes = (be32(fixed, 16) & 0xffff) as usize;
    let extra_bytes = be32(fixed, 20) as usize;
    let extra = raw.get(FIXED_BYTES..).and_then(|rest| rest.get(..extra_bytes)).ok_or_else(short)?;
    let tail = raw.get(FIXED_BYTES + extra_bytes..).unwrap_or_default();
    let name = tail.get(..name_bytes).ok_or_else(short)?;
    let len = (FIXED_BYTES + extra_bytes + name_bytes).next_multiple_of(8);
    let padding = raw.get(FIXED_BYTES + extra_bytes + name_bytes..len).ok_or_else(short)?;
    if !(1..=NAME_MAX_BYTES).contains(&name_bytes) || name.contains(&0) {
        return Err(format!("a name of {name_bytes} bytes, not 1 to {NAME_MAX_BYTES} without NUL"));
    }
    let name = String::from_utf8(name.to_vec()).map_err(|_| "the name is not UTF-8".to_owned())?;
    if kind != DIRTY_TRACKING {
        return Err(format!("'{}': type {kind} is unknown", name.escape_debug()));
    }
    if !GRANULARITY_BITS.contains(&granularity_bits) {
        return Err(format!("'{}': granularity_bits {granularity_bits} is not from 9 to 31", name.escape_debug()));
    }
    if table_offset == 0 || !table_offset.is_multiple_of(header.cluster_size()) {
        return Err(format!("'{}': table_offset {table_offset} is not the place of a cluster", name.escape_debug()));
    }
    if u64::from(table_entries) > BITS_MAX_BYTES / header.cluster_size() {
        return Err(format!("'{}': table_size {table_entries} stands for more than 512 MiB", name.escape_debug()));
    }
    if padding.iter().any(|byte| *byte != 0) {
        return Err(format!("'{}': the padding is not 0", name.escape_debug()));
    }
    let table_offset = HostOffset(table_offset);
    Ok((Entry { table_offset, table_entries, flags, granularity_bits, name, extra: extra.to_vec() }, len))
}

#[cfg(test)]
#[path = "bitmaps_format_tests.rs"]
mod tests;
