//! The bits of a bitmap, to and from their area.
//!
//! Both stream through a buffer of [`BUFFER_BYTES`]. Pages without a set bit become holes, so that a nearly empty
//! bitmap costs a few pages on disk whatever its length.

use super::areas::Area;
use super::directory::area_len_for;
use super::layout::{AREA_MAX_BYTES, PAGE};
use crate::bitmap::bits::Bits;
use crate::error::{Error, Result, errno};
use crate::storage::buffer::is_zero;
use crate::storage::{Storage, Words};
use crate::sync::atomic::{AtomicU64, Ordering};
use std::ops::Range;

const BUFFER_BYTES: u64 = 64 << 10;

/// Makes `bits` the content of the whole `area`; returns the area's crc32c.
pub(super) fn write(file: &dyn Storage, area: &Area, bits: &Bits) -> Result<u32> {
    let mut buffer = vec![0; BUFFER_BYTES as usize];
    let mut words = bits.words().iter();
    let mut crc = 0;
    // Where the hole in front of `at` begins: holes are punched in one piece.
    let mut hole = area.offset;
    let mut at = area.offset;
    while at < area.end() {
        let len = (area.end() - at).min(BUFFER_BYTES) as usize;
        let chunk = buffer.get_mut(..len).unwrap_or_default();
        fill(chunk, &mut words);
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
    let words = Words::heap(Bits::words_for(nbits));
    let mut unread = words.iter();
    let mut buffer = vec![0; BUFFER_BYTES as usize];
    let mut found = 0;
    let mut at = area.offset;
    while at < area.end() && (crc.is_some() || unread.len() > 0) {
        let len = (area.end() - at).min(BUFFER_BYTES) as usize;
        let chunk = buffer.get_mut(..len).unwrap_or_default();
        file.read_at(chunk, at)?;
        found = crc32c::crc32c_append(found, chunk);
        let (from, _) = chunk.as_chunks();
        for (from, word) in from.iter().zip(&mut unread) {
            word.store(u64::from_le_bytes(*from), Ordering::Relaxed);
        }
        at += len as u64;
    }
    if crc.is_some_and(|crc| crc != found) {
        return wrong(errno::EIO, "its checksum does not match");
    }
    Ok(Bits::new(words, nbits))
}

/// Checks that an area for `bytes` bytes can exist; its length.
pub(super) fn area_len(bytes: u64) -> Result<u64> {
    if bytes > AREA_MAX_BYTES {
        let why = format!("a bitmap of {bytes} bytes is longer than {AREA_MAX_BYTES}");
        return Err(Error::new(errno::EFBIG, "dirty log", why).hint("choose a coarser granularity"));
    }
    Ok(bytes.div_ceil(PAGE).max(1) * PAGE)
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

/// Fills `chunk` with the next words, then zeros.
fn fill<'a>(chunk: &mut [u8], words: &mut impl Iterator<Item = &'a AtomicU64>) {
    for to in chunk.as_chunks_mut::<8>().0 {
        *to = words.next().map_or(0, |word| word.load(Ordering::Acquire)).to_le_bytes();
    }
}
