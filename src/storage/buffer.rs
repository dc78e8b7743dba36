//! Page-aligned buffers (O_DIRECT asks for them), a scratch buffer per thread, and the search for zeros.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

/// Alignment of every buffer made here: no medium asks its memory for more.
pub const PAGE_BYTES: usize = 4096;

/// Largest scratch buffer that a thread keeps: a full transfer of 1 MiB with a page of padding at both ends.
const SCRATCH_BYTES: usize = (1 << 20) + 2 * PAGE_BYTES;

/// A buffer of fixed length whose address is a multiple of [`PAGE_BYTES`].
#[derive(Debug)]
pub struct AlignedBuf {
    raw: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// A buffer of `len` zeros.
    pub fn new(len: usize) -> Self {
        let raw = vec![0; len + PAGE_BYTES - 1];
        let start = raw.as_ptr().addr().wrapping_neg() % PAGE_BYTES;
        AlignedBuf { raw, start, len }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.raw[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.raw[self.start..self.start + self.len]
    }
}

thread_local! {
    static SCRATCH: Cell<Option<AlignedBuf>> = const { Cell::new(None) };
}

/// Runs `work` with a page-aligned buffer of `len` bytes that this thread reuses. Its content is arbitrary.
///
/// Calls may nest: the inner one gets a buffer of its own, as does one that asks for more than is kept.
pub fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    if len > SCRATCH_BYTES {
        return work(&mut AlignedBuf::new(len));
    }
    let mut buf = SCRATCH.take().unwrap_or_else(|| AlignedBuf::new(SCRATCH_BYTES));
    let result = work(&mut buf[..len]);
    SCRATCH.set(Some(buf));
    result
}

/// Whether all bytes of `buf` are zero. Stops at the first block that holds another.
pub fn is_zero(buf: &[u8]) -> bool {
    // 256 bytes ORed without a branch become vector instructions; a branch per byte would forbid them.
    let blocks = buf.chunks_exact(256);
    let rest = blocks.remainder();
    blocks.map(or_all).all(|sum| sum == 0) && or_all(rest) == 0
}

fn or_all(block: &[u8]) -> u8 {
    block.iter().fold(0, |sum, byte| sum | byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_page_aligned_and_zero() {
        for len in [0, 1, 511, 4096, 4097, 1 << 20] {
            let mut buf = AlignedBuf::new(len);
            assert_eq!(buf.as_ptr().addr() % PAGE_BYTES, 0);
            assert_eq!(buf.len(), len);
            assert!(is_zero(&buf));
            buf.fill(1);
        }
    }

    #[test]
    fn scratch_is_reused_aligned_and_nests() {
        let first = with_scratch(4096, |buf| {
            assert_eq!(buf.as_ptr().addr() % PAGE_BYTES, 0);
            buf.fill(7);
            with_scratch(4096, |inner| inner.fill(9));
            assert!(buf.iter().all(|b| *b == 7), "a nested scratch is another buffer");
            buf.as_ptr().addr()
        });
        with_scratch(100, |again| {
            assert_eq!(again.len(), 100);
            let _ = first;
        });
        with_scratch(SCRATCH_BYTES + 1, |big| assert_eq!(big.len(), SCRATCH_BYTES + 1));
    }

    #[test]
    fn one_set_byte_anywhere_is_found() {
        for len in [1, 255, 256, 257, 1000, 4096] {
            let mut buf = vec![0; len];
            assert!(is_zero(&buf));
            for at in [0, len / 2, len - 1] {
                buf[at] = 0x80;
                assert!(!is_zero(&buf), "byte {at} of {len}");
                buf[at] = 0;
            }
        }
        assert!(is_zero(&[]));
    }
}
