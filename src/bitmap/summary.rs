//! Which groups of words may have a set bit, so that who looks for one need not read the others.
//!
//! Invariants:
//! - **Never too little.** A group's bit is set before a bit of its words is: [`Summary::note`] comes first, on every
//!   way that sets one. Not after, and not only before the marker's fence: a second marker that finds the bit set
//!   already goes on to write the image without a look at the summary, and who saw that write would look past a group
//!   whose first marker has not come to note it. In the order kept here, whoever finds a bit set (or saw a write that
//!   follows one, over full fences) finds its group noted: the note happened before, and notes are not taken back.
//! - **Perhaps too much.** Clearing bits leaves the notes of their groups, since a marker that has noted and not yet
//!   set would be missed. Only who keeps every marker away takes them back, all of them ([`Summary::forget`]).

use crate::sync::atomic::{AtomicU64, Ordering};

/// Words of one group: a page of 4096 bits and 512 bytes, 256 MiB of a disk at 64 KiB a bit.
pub(super) const GROUP_WORDS: usize = 64;

const WORD_BITS: usize = u64::BITS as usize;

/// One bit for each group of [`GROUP_WORDS`] words.
pub(super) struct Summary {
    words: Box<[AtomicU64]>,
}

impl Summary {
    /// For so many words, none of which has a set bit.
    pub(super) fn new(words: usize) -> Self {
        let groups = words.div_ceil(GROUP_WORDS);
        Summary { words: (0..groups.div_ceil(WORD_BITS)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The word of that index is about to have a set bit.
    #[inline]
    pub(super) fn note(&self, word: usize) {
        let group = word / GROUP_WORDS;
        let bit = 1 << (group % WORD_BITS);
        if let Some(word) = self.words.get(group / WORD_BITS)
            && word.load(Ordering::Acquire) & bit == 0
        {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// The first group in `from..end` that may have a set bit.
    pub(super) fn next(&self, from: usize, end: usize) -> Option<usize> {
        let first = from / WORD_BITS;
        let mut mask = u64::MAX << (from % WORD_BITS);
        for (word, index) in self.words.get(first..)?.iter().zip(first..) {
            if index * WORD_BITS >= end {
                return None;
            }
            let found = word.load(Ordering::Acquire) & mask;
            if found != 0 {
                let group = index * WORD_BITS + found.trailing_zeros() as usize;
                return (group < end).then_some(group);
            }
            mask = u64::MAX;
        }
        None
    }

    /// No word has a set bit any more. The caller keeps all markers away.
    pub(super) fn forget(&self) {
        self.words.iter().for_each(|word| word.store(0, Ordering::Release));
    }
}
