//! A fixed number of bits, marked by many threads at once without a lock.
//!
//! Invariants:
//! - **Nothing is lost.** A bit changes by an atomic read-modify-write of its word, so marks of neighbours in one word
//!   never undo each other; a plain store is for whoever sets all bits of a word, or owns the words alone. A word whose
//!   wanted bits are all set is left alone: a plain load keeps its cache line shared, which is what makes rewriting a
//!   hot block cheap.
//! - **Marked before written.** [`Bits::set`], [`Bits::set_range`] and [`Bits::or_from`] end in a full fence, also
//!   where they found the bits set already; after [`Bits::set_range_unfenced`] the caller passes it. So whatever the
//!   caller does after them (the image write) is seen only together with the bits: who saw the write, passed a
//!   [`full_fence`] and then looks here, finds them set. Setting releases and looking acquires, so what was written
//!   before a bit was set (a store's copy) is seen with it.
//! - **The tail is clear.** Bits of the last word at and beyond [`Bits::len`] are never set; counting and merging go
//!   by whole words because of it.
//! - **Ranges are clamped** to `0..len`, and one that ends before it begins is empty: no argument can panic.
//! - **No bit escapes the summary.** Looking for set bits, counting and merging skip groups of words that [`Summary`]
//!   does not name, so a nearly empty 16 TiB (32 MiB of words at 64 KiB) is walked in microseconds. It is noted before
//!   each bit, and only here: nobody else gets at the words of a `Bits` to change them.
//!
//! Clearing is as atomic as setting, but a clear that races with a mark of the same bit may win: the callers clear
//! only while they keep markers away.

use crate::bitmap::scale::cut;
use crate::bitmap::summary::{GROUP_WORDS, Summary};
use crate::storage::Words;
use crate::sync::atomic::{AtomicU64, Ordering, fence};
use crate::sync::full_fence;
use std::ops::Range;

const WORD_BITS: u64 = u64::BITS as u64;
const GROUP_BITS: u64 = GROUP_WORDS as u64 * WORD_BITS;

/// A fixed number of bits over [`Words`].
pub struct Bits {
    words: Words,
    summary: Summary,
    len: u64,
}

impl Bits {
    /// The first `bits` bits of `words`, as they are; fewer where `words` is too short. Bits of the last word behind
    /// them are cleared. From here on the words are changed through this alone; nobody else may hold them for that.
    pub fn new(words: Words, bits: u64) -> Self {
        let len = bits.min((words.len() as u64).saturating_mul(WORD_BITS));
        if let Some(last) = words.get((len / WORD_BITS) as usize)
            && !len.is_multiple_of(WORD_BITS)
        {
            last.fetch_and(tail_mask(len), Ordering::AcqRel);
        }
        let bits = Bits { summary: Summary::new(Bits::words_for(len)), words, len };
        for (group, first) in bits.used().chunks(GROUP_WORDS).zip((0..).step_by(GROUP_WORDS)) {
            if group.iter().any(|word| word.load(Ordering::Acquire) != 0) {
                bits.summary.note(first);
            }
        }
        bits
    }

    /// The same of words that are all 0, as [`crate::storage::Shm::create`] makes them: without a look at them, which
    /// for 32 MiB of fresh memory takes three times as long as to make it.
    pub fn zeroed(words: Words, bits: u64) -> Self {
        debug_assert!(words.iter().all(|word| word.load(Ordering::Acquire) == 0), "a bit that the summary hides");
        let len = bits.min((words.len() as u64).saturating_mul(WORD_BITS));
        Bits { summary: Summary::new(Bits::words_for(len)), words, len }
    }

    /// `bits` clear bits in this process' heap.
    pub fn heap(bits: u64) -> Self {
        Bits::zeroed(Words::heap(Bits::words_for(bits)), bits)
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

    /// The words that hold the bits, as they are now; bit `i` is bit `i % 64` of word `i / 64`.
    pub fn words(&self) -> impl ExactSizeIterator<Item = u64> {
        self.words_from(0)
    }

    /// The words from that index on, without a look at those before it.
    pub fn words_from(&self, first: usize) -> impl ExactSizeIterator<Item = u64> {
        self.used().get(first..).unwrap_or_default().iter().map(|word| word.load(Ordering::Acquire))
    }

    /// Whether a bit may be set in so many words from word `first` on; false is certain for what was marked before a
    /// full fence that the caller has passed.
    pub fn any_in_words(&self, first: usize, count: usize) -> bool {
        let groups = first / GROUP_WORDS..first.saturating_add(count).div_ceil(GROUP_WORDS);
        count > 0 && self.summary.next(groups.start, groups.end).is_some()
    }

    /// Sets the bits that are set in `values`, the first of which is word `first`; what is behind the end is left out.
    /// For filling bits that nobody marks yet: plain stores where the words are this process' alone.
    pub fn or_words(&mut self, first: usize, values: impl IntoIterator<Item = u64>) {
        let mut put = self.put();
        for (value, index) in values.into_iter().zip(first..) {
            put.or(index, &[value]);
        }
    }

    /// As [`Bits::or_from`], into bits that nobody marks yet.
    pub fn or_from_mut(&mut self, other: &Bits) {
        let mut put = self.put();
        other.each_group(put.len(), |first, words| put.or(first, words));
    }

    /// Sets bit `i`; true where it was clear.
    pub fn set(&self, i: u64) -> bool {
        let was_clear = match self.word_of(i) {
            Some((word, mask)) => set_in(&self.summary, (i / WORD_BITS) as usize, word, mask) & mask != 0,
            None => false,
        };
        full_fence();
        was_clear
    }

    /// Sets all bits of `range`.
    pub fn set_range(&self, range: Range<u64>) {
        self.set_range_unfenced(range);
        full_fence();
    }

    /// As [`Bits::set_range`] without the fence, which the caller passes before the write: one for any number of bitmaps.
    pub fn set_range_unfenced(&self, range: Range<u64>) {
        for (index, word, mask) in self.masked(range) {
            set_in(&self.summary, index, word, mask);
        }
    }

    /// Clears all bits of `range`. The caller keeps markers of the range away.
    pub fn clear_range(&self, range: Range<u64>) {
        for (_, word, mask) in self.masked(range) {
            if word.load(Ordering::Acquire) & mask != 0 {
                word.fetch_and(!mask, Ordering::AcqRel);
            }
        }
        full_fence();
    }

    /// Clears every bit. The caller keeps markers away.
    pub fn clear_all(&self) {
        self.clear_range(0..self.len);
        self.summary.forget();
        full_fence();
    }

    /// Whether bit `i` is set; never past the end.
    pub fn get(&self, i: u64) -> bool {
        self.word_of(i).is_some_and(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
    }

    /// The first set bit in `from..end`.
    pub fn next_set(&self, from: u64, end: u64) -> Option<u64> {
        let end = end.min(self.len);
        if from >= end {
            return None;
        }
        let group = (from / GROUP_BITS) as usize;
        let here = end.min((group as u64 + 1) * GROUP_BITS);
        self.scan(from, here, 0).or_else(|| {
            let mut groups = group + 1..end.div_ceil(GROUP_BITS) as usize;
            while let Some(group) = self.summary.next(groups.start, groups.end) {
                let start = group as u64 * GROUP_BITS;
                let found = self.scan(start, end.min(start + GROUP_BITS), 0);
                if found.is_some() {
                    return found;
                }
                groups.start = group + 1;
            }
            None
        })
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
        let mut count = 0;
        self.each_group(self.len, |_, words| {
            count += words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>()
        });
        count
    }

    /// Sets every bit that is set in `other`; where the lengths differ, as far as both reach.
    pub fn or_from(&self, other: &Bits) {
        let mut put = self.put_shared();
        other.each_group(put.len(), |first, words| put.or(first, words));
        full_fence();
    }

    /// To set bits word by word beside markers; the caller passes a fence behind it.
    pub(super) fn put_shared(&self) -> Put<'_> {
        Put::Shared { words: self.used(), summary: &self.summary, len: self.len }
    }

    /// To set bits word by word where nobody marks yet.
    pub(super) fn put(&mut self) -> Put<'_> {
        // Asked twice, since the borrow checker takes the first answer for one that lives on.
        if self.words.get_mut().is_none() {
            return self.put_shared();
        }
        let words = self.words.get_mut().unwrap_or_default();
        Put::Own { words, summary: &self.summary, len: self.len }
    }

    /// Calls `f` with a copy of each group of words that may have a set bit below `end`, and the index of the first of
    /// them. Bits at and beyond `end` are clear in it, and so is what is missing of a last group.
    pub(super) fn each_group(&self, end: u64, mut f: impl FnMut(usize, &[u64; GROUP_WORDS])) {
        let end = end.min(self.len);
        let words = self.words.get(..Bits::words_for(end)).unwrap_or_default();
        let mut next = 0;
        while let Some(group) = self.summary.next(next, words.len().div_ceil(GROUP_WORDS)) {
            next = group + 1;
            let first = group * GROUP_WORDS;
            let mut copy = [0; GROUP_WORDS];
            for (to, from) in copy.iter_mut().zip(words.get(first..).unwrap_or_default()) {
                *to = from.load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            cut(&mut copy, first, end);
            f(first, &copy);
        }
    }

    fn used(&self) -> &[AtomicU64] {
        self.words.get(..Bits::words_for(self.len)).unwrap_or_default()
    }

    /// The word of bit `i` and the bit's mask in it.
    fn word_of(&self, i: u64) -> Option<(&AtomicU64, u64)> {
        if i >= self.len {
            return None;
        }
        Some((self.words.get((i / WORD_BITS) as usize)?, 1 << (i % WORD_BITS)))
    }

    /// The words that `range` touches, each with its index and the mask of its bits in the range.
    fn masked(&self, range: Range<u64>) -> impl Iterator<Item = (usize, &AtomicU64, u64)> {
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
            (index, word, mask)
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
#[inline(always)]
fn set_in(summary: &Summary, index: usize, word: &AtomicU64, mask: u64) -> u64 {
    if word.load(Ordering::Acquire) & mask == mask {
        return 0;
    }
    summary.note(index);
    !word.fetch_or(mask, Ordering::AcqRel) & mask
}

/// Sets bits word by word; see [`Bits::put`].
pub(super) enum Put<'a> {
    /// The words are nobody else's: plain stores.
    Own { words: &'a mut [u64], summary: &'a Summary, len: u64 },
    /// Others mark them too.
    Shared { words: &'a [AtomicU64], summary: &'a Summary, len: u64 },
}

impl Put<'_> {
    /// Number of bits.
    pub(super) fn len(&self) -> u64 {
        match self {
            Put::Own { len, .. } | Put::Shared { len, .. } => *len,
        }
    }

    /// Sets the bits of `values` in the words from index `first` on, which are of one group; what is behind the end is
    /// left out.
    pub(super) fn or(&mut self, first: usize, values: &[u64]) {
        if (first + values.len()) as u64 > self.len() / WORD_BITS {
            let mut copy = [0; GROUP_WORDS];
            copy.iter_mut().zip(values).for_each(|(to, from)| *to = *from);
            cut(&mut copy, first, self.len());
            self.or_within(first, &copy);
        } else {
            self.or_within(first, values);
        }
    }

    fn or_within(&mut self, first: usize, values: &[u64]) {
        match self {
            Put::Own { words, summary, .. } => {
                let words = words.get_mut(first..).unwrap_or_default().iter_mut().zip(values);
                // What is noted nowhere is 0: it need not be read.
                if summary.next(first / GROUP_WORDS, first / GROUP_WORDS + 1).is_some() {
                    words.for_each(|(word, value)| *word |= *value);
                } else if values.iter().any(|value| *value != 0) {
                    summary.note(first);
                    words.for_each(|(word, value)| *word = *value);
                }
            }
            Put::Shared { words, summary, .. } => {
                for ((word, value), index) in words.get(first..).unwrap_or_default().iter().zip(values).zip(first..) {
                    // No neighbour in the word can be undone where all of them are set.
                    if *value != u64::MAX {
                        set_in(summary, index, word, *value);
                    } else if word.load(Ordering::Acquire) != u64::MAX {
                        summary.note(index);
                        word.store(u64::MAX, Ordering::Release);
                    }
                }
            }
        }
    }
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

    /// The set bits, by a look at every word.
    fn set_bits(bits: &Bits) -> Vec<u64> {
        let bits_of = |(word, value): (usize, u64)| {
            (0..64).filter(move |bit| value >> bit & 1 != 0).map(move |bit| word as u64 * 64 + bit)
        };
        bits.words().enumerate().flat_map(bits_of).collect()
    }

    proptest! {
        /// Groups are 4096 bits, summary words 262144.
        #[test]
        fn the_summary_hides_no_bit(
            len in prop_oneof![1..20_000u64, 500_000..600_000u64],
            parts in proptest::collection::vec((0..7u32, 0..600_000u64, prop_oneof![1..3u64, 50..9000u64]), 0..9),
            asked in proptest::collection::vec((0..600_000u64, 0..600_000u64), 4),
        ) {
            let mut bits = Bits::heap(len);
            for (way, at, count) in parts {
                let range = at % len..(at % len + count).min(len);
                let other = || {
                    let other = Bits::heap(len + 9);
                    other.set_range(range.clone());
                    other
                };
                let before = set_bits(&bits);
                match way {
                    0 => bits.set_range(range.clone()),
                    1 => range.clone().for_each(|i| {
                        bits.set(i);
                    }),
                    2 => bits.or_from(&other()),
                    3 => bits.or_from_mut(&other()),
                    4 => bits.or_words((range.start / 64) as usize, other().words().skip((range.start / 64) as usize)),
                    5 => {
                        bits.clear_range(range.clone());
                        prop_assert!(!bits.any_set(range.clone()));
                        continue;
                    }
                    _ => {
                        // As found in words that somebody else filled.
                        let words = Words::heap(Bits::words_for(len));
                        bits.words().zip(words.iter()).for_each(|(value, word)| word.store(value, Ordering::Relaxed));
                        bits = Bits::new(words, len);
                        continue;
                    }
                }
                let mut expected: std::collections::BTreeSet<u64> = before.into_iter().collect();
                expected.extend(range);
                prop_assert_eq!(set_bits(&bits), expected.into_iter().collect::<Vec<_>>());
            }
            let set = set_bits(&bits);
            prop_assert_eq!(bits.count(), set.len() as u64);
            let runs = bits.runs(0..len).filter(|(_, set)| *set).flat_map(|(run, _)| run);
            prop_assert_eq!(runs.collect::<Vec<_>>(), set.clone());
            for end in [len, len / 2] {
                let mut found = Vec::new();
                bits.each_group(end, |first, words| found.extend(words.iter().zip(first..).map(|(word, i)| (i, *word))));
                let found = found.into_iter().flat_map(|(i, word)| {
                    (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| i as u64 * 64 + bit)
                });
                prop_assert_eq!(found.collect::<Vec<_>>(), set.iter().copied().filter(|i| *i < end).collect::<Vec<_>>());
            }
            for (from, end) in asked {
                prop_assert_eq!(bits.next_set(from, end), set.iter().copied().find(|i| (from..end).contains(i)));
                let (first, count) = ((from / 64) as usize, (end / 64) as usize);
                let any = bits.words_from(first).take(count).any(|word| word != 0);
                prop_assert!(bits.any_in_words(first, count) || !any);
            }
            bits.clear_all();
            prop_assert_eq!((bits.count(), bits.next_set(0, len), bits.any_in_words(0, usize::MAX)), (0, None, false));
            bits.set_range(len - 1..len);
            prop_assert_eq!(bits.next_set(0, len), Some(len - 1));
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
        assert_eq!(bits.words().nth(1), Some(1));
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
        assert!(none.is_empty() && !none.set(0) && none.words().len() == 0 && none.runs(0..9).next().is_none());
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
