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
//! - **A group that counts as full is full.** Looking for clear bits, counting and merging believe it without a look at
//!   the words, so a merge into a full 1 TiB takes microseconds, too. It is noted after the last bit, by who set that or
//!   has the words alone, and taken back before a bit is cleared.
//!
//! Clearing is as atomic as setting, but a clear that races with a mark may win, and who marks may note a group as full
//! that it saw full before: the callers clear only while they keep all markers away, those of other bits, too.

use crate::bitmap::put::Put;
use crate::bitmap::scale::cut;
use crate::bitmap::summary::{GROUP_WORDS, Summary};
use crate::storage::Words;
use crate::sync::atomic::{AtomicU64, Ordering, fence};
use crate::sync::full_fence;
use std::cell::Cell;
use std::ops::Range;

const WORD_BITS: u64 = u64::BITS as u64;
const GROUP_BITS: u64 = GROUP_WORDS as u64 * WORD_BITS;

#[cfg(all(test, feature = "shuttle"))]
mod shuttle_tests;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

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
                bits.note_if_full(first / GROUP_WORDS);
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
        let (mut put, mut values) = (self.put(), values.into_iter());
        let mut at = first;
        loop {
            let mut group = [0; GROUP_WORDS];
            let room = GROUP_WORDS - at % GROUP_WORDS;
            let taken = group.iter_mut().take(room).zip(&mut values).map(|(to, value)| *to = value).count();
            put.or(at, group.get(..taken).unwrap_or_default());
            if taken < room {
                return;
            }
            at += taken;
        }
    }

    /// As [`Bits::or_from`], into bits that nobody marks yet.
    pub fn or_from_mut(&mut self, other: &Bits) {
        let mut put = self.put();
        let there = put.summary();
        other.each_group(put.len(), |group| there.is_full(group), |first, words| put.or(first, words));
    }

    /// Sets bit `i`; true where it was clear.
    pub fn set(&self, i: u64) -> bool {
        let was_clear = match self.word_of(i) {
            Some((word, mask)) => self.set_in((i / WORD_BITS) as usize, word, mask) & mask != 0,
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
            self.set_in(index, word, mask);
        }
    }

    /// Clears all bits of `range`. The caller keeps markers away.
    pub fn clear_range(&self, range: Range<u64>) {
        self.summary.not_full(range.start / GROUP_BITS, range.end.min(self.len).div_ceil(GROUP_BITS));
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
        let end = end.min(self.len);
        let mut at = from;
        while at < end {
            let group = at / GROUP_BITS;
            let here = end.min((group + 1) * GROUP_BITS);
            // Where somebody walks from run to run, the answer mostly is near.
            let full = at.is_multiple_of(GROUP_BITS) && self.summary.is_full(group as usize);
            let found = if full { None } else { self.scan(at, here, u64::MAX) };
            if found.is_some() {
                return found;
            }
            at = here;
        }
        None
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
        let (mut count, full_groups) = (0, Cell::new(0));
        let counted = |group: usize| {
            let full = self.summary.is_full(group);
            full_groups.set(full_groups.get() + u64::from(full));
            full
        };
        self.each_group(self.len, counted, |_, words| {
            count += words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>()
        });
        count + full_groups.get() * GROUP_BITS
    }

    /// Sets every bit that is set in `other`; where the lengths differ, as far as both reach.
    pub fn or_from(&self, other: &Bits) {
        let mut put = self.put_shared();
        other.each_group(put.len(), |group| self.summary.is_full(group), |first, words| put.or(first, words));
        full_fence();
    }

    /// To set bits word by word beside markers; the caller passes a fence behind it.
    pub(super) fn put_shared(&self) -> Put<'_> {
        Put::Shared(self)
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

    /// Calls `f` with a copy of each group of words that may have a set bit below `end` and that `skip` does not take
    /// by its index, and the index of the first of them. Bits at and beyond `end` are clear in it, and so is what is
    /// missing of a last group.
    pub(super) fn each_group(
        &self,
        end: u64,
        skip: impl Fn(usize) -> bool,
        mut f: impl FnMut(usize, &[u64; GROUP_WORDS]),
    ) {
        let end = end.min(self.len);
        let words = self.words.get(..Bits::words_for(end)).unwrap_or_default();
        let mut next = 0;
        while let Some(group) = self.summary.next(next, words.len().div_ceil(GROUP_WORDS)) {
            next = group + 1;
            if skip(group) {
                continue;
            }
            let first = group * GROUP_WORDS;
            let mut copy = [u64::MAX; GROUP_WORDS];
            if !self.summary.is_full(group) {
                copy = [0; GROUP_WORDS];
                for (to, from) in copy.iter_mut().zip(words.get(first..).unwrap_or_default()) {
                    *to = from.load(Ordering::Relaxed);
                }
                fence(Ordering::Acquire);
            }
            cut(&mut copy, first, end);
            f(first, &copy);
        }
    }

    /// The summary, for who sets bits word by word.
    pub(super) fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Sets `mask` in the word of that index, touching it only where something is missing; returns the bits that were
    /// clear in it.
    #[inline(always)]
    pub(super) fn set_in(&self, index: usize, word: &AtomicU64, mask: u64) -> u64 {
        if word.load(Ordering::Acquire) & mask == mask {
            return 0;
        }
        self.summary.note(index);
        let before = word.fetch_or(mask, Ordering::AcqRel);
        if before | mask == u64::MAX {
            self.note_if_full(index / GROUP_WORDS);
        }
        !before & mask
    }

    /// Looks from the end, where one that is filled from the start has its gap.
    #[cold]
    fn note_if_full(&self, group: usize) {
        let first = group * GROUP_WORDS;
        if let Some(words) = self.used().get(first..first + GROUP_WORDS)
            && words.iter().rev().all(|word| word.load(Ordering::Acquire) == u64::MAX)
        {
            self.summary.note_full(group);
        }
    }

    pub(super) fn used(&self) -> &[AtomicU64] {
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
