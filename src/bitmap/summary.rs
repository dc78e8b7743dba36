//! Which groups of words may have a set bit, and which have no clear one, so that who looks for either need not read the
//! others.
//!
//! Invariants, of set bits:
//! - **Never too little.** A group's bit is set before a bit of its words is: [`Summary::note`] comes first, on every
//!   way that sets one. Not after, and not only before the marker's fence: a second marker that finds the bit set
//!   already goes on to write the image without a look at the summary, and who saw that write would look past a group
//!   whose first marker has not come to note it. In the order kept here, whoever finds a bit set (or saw a write that
//!   follows one, over full fences) finds its group noted: the note happened before, and notes are not taken back.
//! - **Perhaps too much.** Clearing bits leaves the notes of their groups, since a marker that has noted and not yet
//!   set would be missed. Only who keeps every marker away takes them back, all of them ([`Summary::forget`]).
//!
//! And of groups that are full, the other way round:
//! - **Never too much.** A group is noted as full by who set bits of it, and saw all of them set or set them all, after
//!   that. Whoever finds the note finds them set, and may go on to write the image without a look at them: setting came
//!   before the note, and clearing takes the note back first, while every marker is kept away.
//! - **Perhaps too little.** Two that set the last two bits may each miss the other's; a group of fewer words than others
//!   is never noted.

use crate::sync::atomic::{AtomicU64, Ordering};

/// Words of one group: a page of 4096 bits and 512 bytes, 256 MiB of a disk at 64 KiB a bit.
pub(super) const GROUP_WORDS: usize = 64;

const WORD_BITS: usize = u64::BITS as usize;

/// Two bits for each group of [`GROUP_WORDS`] words.
pub(super) struct Summary {
    words: Box<[AtomicU64]>,
    full: Box<[AtomicU64]>,
}

impl Summary {
    /// For so many words, none of which has a set bit.
    pub(super) fn new(words: usize) -> Self {
        let groups = words.div_ceil(GROUP_WORDS);
        let clear = || (0..groups.div_ceil(WORD_BITS)).map(|_| AtomicU64::new(0)).collect();
        Summary { words: clear(), full: clear() }
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
        self.full.iter().chain(&self.words).for_each(|word| word.store(0, Ordering::Release));
    }

    /// All bits of that group are set.
    pub(super) fn note_full(&self, group: usize) {
        if let Some(word) = self.full.get(group / WORD_BITS) {
            word.fetch_or(1 << (group % WORD_BITS), Ordering::AcqRel);
        }
    }

    /// Whether all bits of that group are known to be set.
    #[inline]
    pub(super) fn is_full(&self, group: usize) -> bool {
        self.full
            .get(group / WORD_BITS)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (group % WORD_BITS) & 1 != 0)
    }

    /// Bits of the groups `from..end` are about to be cleared. The caller keeps all markers away.
    pub(super) fn not_full(&self, from: u64, end: u64) {
        let first = usize::try_from(from).unwrap_or(usize::MAX) / WORD_BITS;
        for (word, index) in self.full.iter().zip(0u64..).skip(first) {
            let start = index * WORD_BITS as u64;
            if start >= end {
                return;
            }
            // Those beside them, too: they are looked at again.
            word.store(0, Ordering::Release);
        }
    }
}
