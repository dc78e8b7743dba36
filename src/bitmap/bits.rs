//! A fixed number of bits, marked by many threads at once without a lock.
//!
//! Invariants:
//! - **Nothing is lost.** A bit changes by an atomic read-modify-write of its word only, so marks of neighbours in one
//!   word never undo each other. A word whose wanted bits are all set is left alone: a plain load keeps its cache line
//!   shared, which is what makes rewriting a hot block cheap.
//! - **Marked before written.** [`Bits::set`], [`Bits::set_range`] and [`Bits::or_from`] end in a full fence, also
//!   where they found the bits set already. So whatever the caller does after them (the image write) is seen only
//!   together with the bits: who saw the write, passed a [`full_fence`] and then looks here, finds them set. Setting
//!   releases and looking acquires, so what was written before a bit was set (a store's copy) is seen with it.
//! - **The tail is clear.** Bits of the last word at and beyond [`Bits::len`] are never set; counting and merging go
//!   by whole words because of it.
//! - **Ranges are clamped** to `0..len`, and one that ends before it begins is empty: no argument can panic.
//!
//! Clearing is as atomic as setting, but a clear that races with a mark of the same bit may win: the callers clear
//! only while they keep markers away.
//!
//! Looking for the next bit walks the words: 16 TiB at 64 KiB are 32 MiB of words, a few milliseconds when nearly
//! empty. There is no summary level above them: keeping one safe against concurrent clears costs the marking path more
//! than the walk does.

use crate::storage::Words;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::full_fence;
use std::ops::Range;

const WORD_BITS: u64 = u64::BITS as u64;

/// A fixed number of bits over [`Words`].
pub struct Bits {
    words: Words,
    len: u64,
}

impl Bits {
    /// The first `bits` bits of `words`, as they are; fewer where `words` is too short. Bits of the last word behind
    /// them are cleared.
    pub fn new(words: Words, bits: u64) -> Self {
        let len = bits.min((words.len() as u64).saturating_mul(WORD_BITS));
        if let Some(last) = words.get((len / WORD_BITS) as usize)
            && !len.is_multiple_of(WORD_BITS)
        {
            last.fetch_and(tail_mask(len), Ordering::AcqRel);
        }
        Bits { words, len }
    }

    /// `bits` clear bits in this process' heap.
    pub fn heap(bits: u64) -> Self {
        Bits::new(Words::heap(Bits::words_for(bits)), bits)
    }

    /// How many words hold `bits` bits.
    pub fn words_for(bits: u64) -> usize {
        bits.div_ceil(WORD_BITS) as usize
    }

    /// Number of bits.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True where there is no bit at all, set or clear.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The words that hold the bits, bit `i` being bit `i % 64` of word `i / 64`.
    pub fn words(&self) -> &[AtomicU64] {
        self.words.get(..Bits::words_for(self.len)).unwrap_or_default()
    }

    /// Sets bit `i`; true where it was clear.
    pub fn set(&self, i: u64) -> bool {
        let was_clear = match self.word_of(i) {
            Some((word, mask)) => set_in(word, mask) & mask != 0,
            None => false,
        };
        full_fence();
        was_clear
    }

    /// Sets all bits of `range`.
    pub fn set_range(&self, range: Range<u64>) {
        for (word, mask) in self.masked(range) {
            set_in(word, mask);
        }
        full_fence();
    }

    /// Clears all bits of `range`. The caller keeps markers of the range away.
    pub fn clear_range(&self, range: Range<u64>) {
        for (word, mask) in self.masked(range) {
            if word.load(Ordering::Acquire) & mask != 0 {
                word.fetch_and(!mask, Ordering::AcqRel);
            }
        }
        full_fence();
    }

    /// Clears every bit. The caller keeps markers away.
    pub fn clear_all(&self) {
        self.clear_range(0..self.len);
    }

    /// Whether bit `i` is set; never past the end.
    pub fn get(&self, i: u64) -> bool {
        self.word_of(i).is_some_and(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
    }

    /// The first set bit in `from..end`.
    pub fn next_set(&self, from: u64, end: u64) -> Option<u64> {
        self.scan(from, end, 0)
    }

    /// The first clear bit in `from..end`.
    pub fn next_clear(&self, from: u64, end: u64) -> Option<u64> {
        self.scan(from, end, u64::MAX)
    }

    /// Whether no bit of `range` is clear; true for an empty one.
    pub fn all_set(&self, range: Range<u64>) -> bool {
        self.next_clear(range.start, range.end).is_none()
    }

    /// Whether a bit of `range` is set.
    pub fn any_set(&self, range: Range<u64>) -> bool {
        self.next_set(range.start, range.end).is_some()
    }

    /// The runs of equal bits that `range` consists of, in order and without gap or overlap.
    ///
    /// Bits that are set meanwhile may show or not; neighbouring runs may then be of one state.
    pub fn runs(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> {
        let end = range.end.min(self.len);
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let start = at;
            let set = self.get(start);
            let next = if set { self.next_clear(start + 1, end) } else { self.next_set(start + 1, end) };
            at = next.unwrap_or(end);
            Some((start..at, set))
        })
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        self.words().iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// Sets every bit that is set in `other`; where the lengths differ, as far as both reach.
    pub fn or_from(&self, other: &Bits) {
        let len = self.len.min(other.len);
        for ((word, mask), from) in self.masked(0..len).zip(other.words()) {
            set_in(word, from.load(Ordering::Acquire) & mask);
        }
        full_fence();
    }

    /// The word of bit `i` and the bit's mask in it.
    fn word_of(&self, i: u64) -> Option<(&AtomicU64, u64)> {
        if i >= self.len {
            return None;
        }
        Some((self.words.get((i / WORD_BITS) as usize)?, 1 << (i % WORD_BITS)))
    }

    /// The words that `range` touches, each with the mask of its bits in the range.
    fn masked(&self, range: Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let end = range.end.min(self.len);
        let start = range.start.min(end);
        let first = (start / WORD_BITS) as usize;
        let last = Bits::words_for(end);
        let words = self.words.get(first..last).unwrap_or_default();
        words.iter().zip(first..).map(move |(word, index)| {
            let mut mask = u64::MAX;
            if index == first {
                mask <<= start % WORD_BITS;
            }
            if index + 1 == last {
                mask &= tail_mask(end);
            }
            (word, mask)
        })
    }

    /// The first bit in `from..end` that differs from the bits of `flip`.
    fn scan(&self, from: u64, end: u64, flip: u64) -> Option<u64> {
        let end = end.min(self.len);
        if from >= end {
            return None;
        }
        let first = (from / WORD_BITS) as usize;
        let words = self.words.get(first..Bits::words_for(end))?;
        let mut mask = u64::MAX << (from % WORD_BITS);
        for (word, index) in words.iter().zip(first..) {
            let found = (word.load(Ordering::Acquire) ^ flip) & mask;
            if found != 0 {
                let at = index as u64 * WORD_BITS + u64::from(found.trailing_zeros());
                return (at < end).then_some(at);
            }
            mask = u64::MAX;
        }
        None
    }
}

impl std::fmt::Debug for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bits").field("len", &self.len).finish_non_exhaustive()
    }
}

/// The mask of the bits below `end` in the last word that `end` reaches into.
fn tail_mask(end: u64) -> u64 {
    u64::MAX >> ((WORD_BITS - end % WORD_BITS) % WORD_BITS)
}

/// Sets `mask` in `word`, touching it only where something is missing; returns the bits that were clear in it.
fn set_in(word: &AtomicU64, mask: u64) -> u64 {
    if word.load(Ordering::Acquire) & mask == mask {
        return 0;
    }
    !word.fetch_or(mask, Ordering::AcqRel) & mask
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model_of(bits: &Bits) -> Vec<bool> {
        (0..bits.len()).map(|i| bits.get(i)).collect()
    }

    #[derive(Debug, Clone)]
    enum Op {
        Set(u64),
        SetRange(u64, u64),
        ClearRange(u64, u64),
        ClearAll,
        Or(Vec<u64>, u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let at = || prop_oneof![8 => 0..400u64, 1 => Just(u64::MAX)];
        let op = prop_oneof![
            4 => at().prop_map(Op::Set),
            6 => (at(), at()).prop_map(|(a, b)| Op::SetRange(a, b)),
            4 => (at(), at()).prop_map(|(a, b)| Op::ClearRange(a, b)),
            1 => Just(Op::ClearAll),
            2 => (proptest::collection::vec(0..400u64, 0..9), 0..400u64).prop_map(|(set, len)| Op::Or(set, len)),
        ];
        proptest::collection::vec(op, 0..20)
    }

    fn apply(bits: &Bits, model: &mut [bool], op: &Op) {
        let fill = |model: &mut [bool], from: u64, end: u64, value: bool| {
            for i in (from..end).take_while(|i| *i < 1000) {
                if let Some(bit) = model.get_mut(i as usize) {
                    *bit = value;
                }
            }
        };
        match op {
            Op::Set(i) => {
                let was_clear = model.get(*i as usize) == Some(&false);
                assert_eq!(bits.set(*i), was_clear, "set {i}");
                fill(model, *i, i.saturating_add(1), true);
            }
            Op::SetRange(a, b) => {
                bits.set_range(*a..*b);
                fill(model, *a, *b, true);
            }
            Op::ClearRange(a, b) => {
                bits.clear_range(*a..*b);
                fill(model, *a, *b, false);
            }
            Op::ClearAll => {
                bits.clear_all();
                model.fill(false);
            }
            Op::Or(set, len) => {
                let other = Bits::heap(*len);
                set.iter().for_each(|i| {
                    other.set(*i);
                });
                bits.or_from(&other);
                set.iter().filter(|i| *i < len).for_each(|i| fill(model, *i, i + 1, true));
            }
        }
    }

    proptest! {
        #[test]
        fn every_operation_agrees_with_a_vector_of_bools(
            len in prop_oneof![Just(0u64), Just(64), Just(128), 1..330u64],
            ops in ops(),
            ask in proptest::collection::vec((0..340u64, 0..340u64), 4),
        ) {
            let bits = Bits::heap(len);
            let mut model = vec![false; len as usize];
            for op in &ops {
                apply(&bits, &mut model, op);
                prop_assert_eq!(model_of(&bits), model.clone(), "after {:?}", op);
            }
            prop_assert_eq!(bits.count(), model.iter().filter(|b| **b).count() as u64);
            for (from, end) in ask {
                let find = |value: bool| (from..end.min(len)).find(|i| model[*i as usize] == value);
                prop_assert_eq!(bits.next_set(from, end), find(true));
                prop_assert_eq!(bits.next_clear(from, end), find(false));
                prop_assert_eq!(bits.any_set(from..end), find(true).is_some());
                prop_assert_eq!(bits.all_set(from..end), find(false).is_none());
                let mut at = from;
                let mut last = None;
                for (run, set) in bits.runs(from..end) {
                    prop_assert!(run.start == at && run.end > at && last != Some(set));
                    prop_assert!(run.clone().all(|i| model[i as usize] == set));
                    (at, last) = (run.end, Some(set));
                }
                prop_assert_eq!(at, from.max(end.min(len)));
            }
        }
    }

    #[test]
    fn the_tail_of_the_last_word_stays_clear() {
        let words = Words::heap(2);
        for word in words.iter() {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        let bits = Bits::new(words, 65);
        assert_eq!(bits.count(), 65, "a tail that came with the words is cleared");
        bits.set_range(0..u64::MAX);
        assert_eq!(bits.words()[1].load(Ordering::Relaxed), 1);
        assert!(!bits.set(65) && !bits.get(65));
        assert_eq!(bits.next_clear(0, u64::MAX), None);
    }

    #[test]
    fn words_that_are_too_short_or_too_long_never_panic() {
        let short = Bits::new(Words::heap(1), 1000);
        assert_eq!(short.len(), 64);
        short.set_range(0..1000);
        assert_eq!(short.count(), 64);
        let long = Bits::new(Words::heap(3), 10);
        long.set_range(0..1000);
        assert_eq!((long.count(), long.words().len()), (10, 1));
        let none = Bits::heap(0);
        assert!(none.is_empty() && !none.set(0) && none.words().is_empty() && none.runs(0..9).next().is_none());
    }

    #[test]
    fn marks_of_many_threads_in_shared_words_are_all_kept() {
        let bits = Bits::heap(64 * 2048);
        let start = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for lane in 0..4 {
                let (bits, start) = (&bits, &start);
                scope.spawn(move || {
                    start.wait();
                    (lane..bits.len()).step_by(4).for_each(|i| bits.set_range(i..i + 1));
                });
            }
        });
        assert_eq!(bits.count(), bits.len());
    }

    #[test]
    fn of_many_threads_that_set_one_bit_exactly_one_was_first() {
        let bits = Bits::heap(64 * 256);
        let first = |bits: &Bits| (0..bits.len()).filter(|i| bits.set(*i)).count() as u64;
        let firsts: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| first(&bits))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(firsts, bits.len());
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod shuttle_tests {
    use super::*;
    use crate::sync::thread;
    use std::sync::Arc;

    #[test]
    fn concurrent_marks_of_one_word_are_all_kept_and_one_of_them_was_first() {
        shuttle::check_random(
            || {
                let bits = Arc::new(Bits::heap(70));
                let marker = |i: u64| {
                    let bits = bits.clone();
                    thread::spawn(move || {
                        bits.set_range(i..i + 2);
                        bits.set(66)
                    })
                };
                let threads: Vec<_> = (0..3).map(marker).collect();
                let firsts = threads.into_iter().filter_map(|t| t.join().ok()).filter(|first| *first);
                assert_eq!(firsts.count(), 1);
                assert_eq!(bits.count(), 5);
            },
            1000,
        );
    }
}
