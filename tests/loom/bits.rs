//! The summary above a bitmap's words, beside marks: who saw a guest's write finds its mark.

use super::explore::{acts, always};
use fleecefs::bitmap::Bits;
use fleecefs::sync::full_fence;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::Arc;

/// In the second group of words, where only the summary leads to.
const BIT: u64 = 64 * 64 + 3;
/// The last word of the first group, where the search begins.
const FROM: u64 = 63 * 64;

/// The bits of the product, and one relaxed cell of the image for each of two guests.
struct Rig {
    bits: Bits,
    image: [AtomicU64; 2],
}

impl Rig {
    fn new() -> Arc<Rig> {
        Arc::new(Rig { bits: Bits::heap(65 * 64), image: [AtomicU64::new(0), AtomicU64::new(0)] })
    }

    fn writes(&self, guest: usize) {
        self.bits.set_range(BIT..BIT + 1);
        self.image[guest].store(1, Ordering::Relaxed);
    }

    fn finds(&self, guest: usize) -> bool {
        if self.image[guest].load(Ordering::Relaxed) == 0 {
            return true;
        }
        full_fence();
        self.bits.next_set(FROM, 65 * 64) == Some(BIT)
    }
}

#[test]
fn who_saw_a_write_finds_its_mark() {
    assert!(always(None, || {
        let rig = Rig::new();
        let guest = rig.clone();
        [acts(move || guest.writes(0)), Box::new(move || rig.finds(0))]
    }));
}

/// The second guest finds the bit set and sets nothing.
#[test]
fn who_saw_a_write_beside_the_first_mark_finds_it() {
    assert!(always(Some(3), || {
        let rig = Rig::new();
        let (first, second) = (rig.clone(), rig.clone());
        [acts(move || first.writes(0)), acts(move || second.writes(1)), Box::new(move || rig.finds(1))]
    }));
}

#[test]
fn who_finds_a_bit_set_finds_it_by_the_summary_too() {
    assert!(always(None, || {
        let rig = Rig::new();
        let guest = rig.clone();
        [
            acts(move || guest.bits.set_range_unfenced(BIT..BIT + 1)),
            Box::new(move || !rig.bits.get(BIT) || rig.bits.next_set(FROM, 65 * 64) == Some(BIT)),
        ]
    }));
}

/// The rules alone: a bit, its summary and the image.
#[derive(Default)]
struct Cells {
    summary: AtomicU64,
    bit: AtomicU64,
    image: [AtomicU64; 2],
}

#[derive(Clone, Copy)]
struct Rules {
    summary_first: bool,
    fence: bool,
}

impl Cells {
    fn note(&self) {
        if self.summary.load(Ordering::Acquire) == 0 {
            self.summary.fetch_or(1, Ordering::AcqRel);
        }
    }

    fn writes(&self, guest: usize, rules: Rules) {
        if self.bit.load(Ordering::Acquire) == 0 {
            if rules.summary_first {
                self.note();
            }
            self.bit.fetch_or(1, Ordering::AcqRel);
            if !rules.summary_first {
                self.note();
            }
        }
        if rules.fence {
            fence(Ordering::SeqCst);
        }
        self.image[guest].store(1, Ordering::Relaxed);
    }

    fn finds(&self, guest: usize) -> bool {
        if self.image[guest].load(Ordering::Relaxed) == 0 {
            return true;
        }
        fence(Ordering::SeqCst);
        self.summary.load(Ordering::Acquire) != 0 && self.bit.load(Ordering::Acquire) != 0
    }
}

fn found_beside_the_first_mark(rules: Rules) -> bool {
    always(None, move || {
        let cells = Arc::new(Cells::default());
        let (first, second) = (cells.clone(), cells.clone());
        [acts(move || first.writes(0, rules)), acts(move || second.writes(1, rules)), Box::new(move || cells.finds(1))]
    })
}

#[test]
fn the_summary_comes_before_the_bit_and_a_fence_after_it() {
    assert!(found_beside_the_first_mark(Rules { summary_first: true, fence: true }));
    assert!(
        !found_beside_the_first_mark(Rules { summary_first: false, fence: true }),
        "the second goes ahead of the note"
    );
    assert!(
        !found_beside_the_first_mark(Rules { summary_first: true, fence: false }),
        "the write goes ahead of the mark"
    );
}
