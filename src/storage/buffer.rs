//! Page-aligned buffers (O_DIRECT asks for them), scratch buffers that are used again, and the search for zeros.
//!
//! Buffers go from hand to hand between all threads, so that there are as many as are in use at once, not one for each
//! thread that ever needed one; and the C library's allocator, which keeps what it got for each thread apart, has nothing
//! to do with them: what is larger than [`SMALL_BYTES`] is mapped by itself, so that what is not kept is the system's again
//! at once. Small scratch buffers stay with their thread: no lock for a block of 4 KiB.

use memmap2::MmapMut;
use parking_lot::Mutex;
use std::cell::Cell;
use std::ops::{Deref, DerefMut};

/// Alignment of every buffer made here: no medium asks its memory for more.
pub const PAGE_BYTES: usize = 4096;

/// Largest buffer that is kept: a full transfer of 1 MiB with a page of padding at both ends.
const LARGE_BYTES: usize = (1 << 20) + 2 * PAGE_BYTES;
/// Largest of the small ones, and size of the scratch buffer that a thread keeps for itself.
const SMALL_BYTES: usize = 64 << 10;
/// Most buffers of either kind that are kept while nobody uses them.
const KEPT_MAX: usize = 16;

/// Buffers of one size that are free, the one used last at the end. Their content is arbitrary.
struct Free {
    bytes: usize,
    free: Mutex<Vec<Memory>>,
}

static SMALL: Free = Free { bytes: SMALL_BYTES, free: Mutex::new(Vec::new()) };
static LARGE: Free = Free { bytes: LARGE_BYTES, free: Mutex::new(Vec::new()) };

/// Those that are large enough for `len` bytes.
fn free_for(len: usize) -> Option<&'static Free> {
    [&SMALL, &LARGE].into_iter().find(|free| len <= free.bytes)
}

/// What a buffer lies in.
#[derive(Debug)]
enum Memory {
    Heap(Vec<u8>),
    Pages(MmapMut),
}

impl Memory {
    /// Zeros, `len` of them from the first page boundary on.
    fn zeros(len: usize) -> Memory {
        if len > SMALL_BYTES
            && let Ok(pages) = MmapMut::map_anon(len)
        {
            return Memory::Pages(pages);
        }
        Memory::Heap(vec![0; len + PAGE_BYTES - 1])
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => pages,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => pages,
        }
    }
}

/// A buffer of fixed length whose address is a multiple of [`PAGE_BYTES`].
#[derive(Debug)]
pub struct AlignedBuf {
    /// There until it is dropped.
    raw: Option<Memory>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// A buffer of `len` zeros.
    pub fn new(len: usize) -> Self {
        let (mut buf, used) = AlignedBuf::any(len);
        if used {
            buf.fill(0);
        }
        buf
    }

    /// A buffer of `len` bytes of arbitrary content, for who fills all of it.
    pub fn uncleared(len: usize) -> Self {
        AlignedBuf::any(len).0
    }

    /// A buffer, and whether it was used before; else it is zeros.
    fn any(len: usize) -> (Self, bool) {
        let free = free_for(len);
        let kept = free.and_then(|free| free.free.lock().pop());
        let used = kept.is_some();
        let room = free.map_or(len, |free| free.bytes);
        let raw = kept.unwrap_or_else(|| Memory::zeros(room));
        let start = raw.bytes().as_ptr().addr().wrapping_neg() % PAGE_BYTES;
        (AlignedBuf { raw: Some(raw), start, len }, used)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let Some(free) = free_for(self.len) else { return };
        let mut kept = free.free.lock();
        if kept.len() < KEPT_MAX {
            kept.extend(self.raw.take());
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let raw = self.raw.as_ref().map_or(&[][..], Memory::bytes);
        &raw[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let raw = self.raw.as_mut().map_or(&mut [][..], Memory::bytes_mut);
        &mut raw[self.start..self.start + self.len]
    }
}

thread_local! {
    static SCRATCH: Cell<Option<AlignedBuf>> = const { Cell::new(None) };
}

/// Runs `work` with a page-aligned buffer of `len` bytes that is used again and again. Its content is arbitrary.
///
/// Calls may nest: the inner one gets a buffer of its own.
pub fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    if len > SMALL_BYTES {
        return work(&mut AlignedBuf::uncleared(len));
    }
    let mut buf = SCRATCH.take().unwrap_or_else(|| AlignedBuf::new(SMALL_BYTES));
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
        for len in [4096, SMALL_BYTES + 1, LARGE_BYTES, LARGE_BYTES + 1] {
            with_scratch(len, |buf| {
                assert_eq!((buf.as_ptr().addr() % PAGE_BYTES, buf.len()), (0, len));
                buf.fill(7);
                with_scratch(len, |inner| inner.fill(9));
                assert!(buf.iter().all(|b| *b == 7), "a nested scratch is another buffer");
            });
        }
    }

    #[test]
    fn buffers_are_kept_up_to_a_number_and_come_back_cleared() {
        for len in [1, SMALL_BYTES, SMALL_BYTES + 1, LARGE_BYTES] {
            let mut all: Vec<_> = (0..2 * KEPT_MAX).map(|_| AlignedBuf::uncleared(len)).collect();
            all.iter_mut().for_each(|buf| buf.fill(0xee));
            // The other tests' threads use them, too.
            drop(all);
            assert!([&SMALL, &LARGE].iter().all(|free| free.free.lock().len() <= KEPT_MAX));
            let cleared: Vec<_> = (0..KEPT_MAX).map(|_| AlignedBuf::new(len)).collect();
            assert!(cleared.iter().all(|buf| is_zero(buf)));
        }
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
