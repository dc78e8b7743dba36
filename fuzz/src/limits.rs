//! Counts what an input makes the driver allocate.
//!
//! Counted per thread, since tests run beside each other; no target starts threads.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Largest single allocation in bytes: a bitmap directory of 64 MiB (QEMU's limit) is the longest thing that is read at
/// once.
const SINGLE_MAX_BYTES: usize = (64 << 20) + 4096;
/// Most memory of one input in bytes: the L2 cache of two images (64 MiB each at most), two L1 tables as bytes and as
/// words (32 MiB each), and what the fake disk holds.
const LIVE_MAX_BYTES: isize = 320 << 20;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn note(taken: usize, given: usize) {
    LARGEST.set(LARGEST.get().max(taken));
    LIVE.set(LIVE.get() + taken as isize - given as isize);
    PEAK.set(PEAK.get().max(LIVE.get()));
}

// SAFETY: all is left to `System`; counting touches only thread-local cells that need neither memory nor a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), 0);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), 0);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note(0, layout.size());
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        note(bytes, layout.size());
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

/// Does `work`, and panics where it has taken more memory than it may.
pub fn within(work: impl FnOnce()) {
    LARGEST.set(0);
    LIVE.set(0);
    PEAK.set(0);
    work();
    let (largest, peak) = (LARGEST.get(), PEAK.get());
    assert!(largest <= SINGLE_MAX_BYTES, "one allocation of {largest} bytes");
    assert!(peak <= LIVE_MAX_BYTES, "{peak} bytes of memory at once");
}
