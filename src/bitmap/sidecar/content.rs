//! The bits of a bitmap, to and from their area.
//!
//! Both stream through a buffer of [`BUFFER_BYTES`]. Pages without a set bit become holes, so that a nearly empty
//! bitmap costs a few pages on disk whatever its length. Nor is it walked: the bits' summary says what not to write, the
//! file's holes what not to read, and the checksum goes over zeros by arithmetic (see `crc.rs`).
//!
//! A hole is believed only under a checksum, which covers it: where a file system took data for a hole, the bitmap is
//! refused, as after any other damage. An area without one is read byte for byte.

use super::areas::Area;
use super::crc;
use super::directory::area_len_for;
use super::layout::{AREA_MAX_BYTES, PAGE};
use crate::bitmap::bits::Bits;
use crate::error::{Error, Result, errno};
use crate::storage::Storage;
use crate::storage::buffer::is_zero;
use std::collections::BTreeSet;
use std::ops::Range;

const BUFFER_BYTES: u64 = 64 << 10;
const WORD_BYTES: u64 = 8;

/// Makes `bits` the content of the whole `area`; returns the area's crc32c.
pub(super) fn write(file: &dyn Storage, area: &Area, bits: &Bits) -> Result<u32> {
    let mut buffer = vec![0; BUFFER_BYTES as usize];
    let mut crc = 0;
    // Where the hole in front of `at` begins: holes are punched in one piece.
    let mut hole = area.offset;
    let mut at = area.offset;
    while at < area.end() {
        let len = (area.end() - at).min(BUFFER_BYTES) as usize;
        let first = ((at - area.offset) / WORD_BYTES) as usize;
        if !bits.any_in_words(first, len / WORD_BYTES as usize) {
            crc = crc::append_zeros(crc, len as u64);
            at += len as u64;
            continue;
        }
        let chunk = buffer.get_mut(..len).unwrap_or_default();
        fill(chunk, bits.words_from(first));
        crc = crc32c::crc32c_append(crc, chunk);
        for run in data_runs(chunk) {
            let (start, end) = (at + run.start as u64, at + run.end as u64);
            punch(file, hole, start)?;
            file.write_at(chunk.get(run).unwrap_or_default(), start)?;
            hole = end;
        }
        at += len as u64;
    }
    punch(file, hole, area.end())?;
    Ok(crc)
}

/// Writes the pages of `area` that hold the bits `ranges`, with all that `bits` have in them. Pages without a set bit
/// are left out: bits only come, so the area has none there either.
pub(super) fn write_pages(file: &dyn Storage, area: &Area, bits: &Bits, ranges: &[Range<u64>]) -> Result<()> {
    const PAGE_BITS: u64 = PAGE * 8;
    let touched = ranges.iter().filter(|range| !range.is_empty());
    let pages: BTreeSet<u64> =
        touched.flat_map(|range| range.start / PAGE_BITS..range.end.div_ceil(PAGE_BITS)).collect();
    let mut buffer = vec![0; PAGE as usize];
    for page in pages {
        let first = (page * PAGE_BITS / 64) as usize;
        fill(&mut buffer, bits.words_from(first));
        if !is_zero(&buffer) && (page + 1) * PAGE <= area.len {
            file.write_at(&buffer, area.offset + page * PAGE)?;
        }
    }
    Ok(())
}

/// The first `nbits` bits of `area`; EIO where the area does not have the checksum `crc`.
pub(super) fn read(file: &dyn Storage, area: &Area, nbits: u64, crc: Option<u32>) -> Result<Bits> {
    let wrong =
        |errno, why: &str| Err(Error::new(errno, "dirty log: bitmap", why).at_path(file.path()).at_offset(area.offset));
    if let Some(fault) = area.fault() {
        return wrong(errno::EINVAL, &format!("its area {fault}"));
    }
    if area_len_for(nbits) > area.len {
        return wrong(errno::EINVAL, "its area is too short");
    }
    let mut bits = Bits::heap(nbits);
    let mut buffer = vec![0; BUFFER_BYTES as usize];
    let mut found = 0;
    let mut at = area.offset;
    let end = if crc.is_some() { area.end() } else { area.offset + area_len_for(nbits) };
    while at < end {
        let (until, hole) = if crc.is_some() { run_at(file, at, end)? } else { (end, false) };
        if hole {
            found = crc::append_zeros(found, until - at);
            at = until;
        }
        while at < until {
            let len = (until - at).min(BUFFER_BYTES);
            let chunk = buffer.get_mut(..len as usize).unwrap_or_default();
            file.read_at(chunk, at)?;
            found = crc32c::crc32c_append(found, chunk);
            let words = chunk.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
            bits.or_words(((at - area.offset) / WORD_BYTES) as usize, words);
            at += len;
        }
    }
    if crc.is_some_and(|crc| crc != found) {
        return wrong(errno::EIO, "its checksum does not match");
    }
    Ok(bits)
}

/// Checks that an area for `bytes` bytes can exist; its length.
pub(super) fn area_len(bytes: u64) -> Result<u64> {
    if bytes > AREA_MAX_BYTES {
        let why = format!("a bitmap of {bytes} bytes is longer than {AREA_MAX_BYTES}");
        return Err(Error::new(errno::EFBIG, "dirty log", why).hint("choose a coarser granularity"));
    }
    Ok(bytes.div_ceil(PAGE).max(1) * PAGE)
}

/// Where the run of pages from `at` on ends that is a hole (true) or to be read.
fn run_at(file: &dyn Storage, at: u64, end: u64) -> Result<(u64, bool)> {
    let status = file.block_status(at, end - at)?;
    let pages = if status.zero { status.len / PAGE } else { status.len.div_ceil(PAGE) };
    // A hole of less than a page is read.
    Ok(((at + pages.max(1) * PAGE).min(end), status.zero && pages > 0))
}

/// The runs of pages that hold a set bit.
fn data_runs(chunk: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    for page in chunk.chunks(PAGE as usize) {
        let end = at + page.len();
        if !is_zero(page) {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end = end,
                _ => runs.push(at..end),
            }
        }
        at = end;
    }
    runs
}

fn punch(file: &dyn Storage, from: u64, end: u64) -> Result<()> {
    if from < end { file.punch_hole(from, end - from) } else { Ok(()) }
}

/// Fills `chunk` with words, then zeros.
fn fill(chunk: &mut [u8], words: impl Iterator<Item = u64>) {
    for (to, word) in chunk.as_chunks_mut().0.iter_mut().zip(words.chain(std::iter::repeat(0))) {
        *to = word.to_le_bytes();
    }
}
