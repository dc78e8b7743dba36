//! Setting bits a group of words at a time: what merges and loads are made of.

use crate::bitmap::bits::Bits;
use crate::bitmap::scale::cut;
use crate::bitmap::summary::{GROUP_WORDS, Summary};
use crate::sync::atomic::Ordering;

/// The words of a group whose bits are all set.
const ALL: [u64; GROUP_WORDS] = [u64::MAX; GROUP_WORDS];

/// Sets bits word by word; see [`Bits::put`].
pub(super) enum Put<'a> {
    /// The words are nobody else's: plain stores.
    Own { words: &'a mut [u64], summary: &'a Summary, len: u64 },
    /// Others mark them too.
    Shared(&'a Bits),
}

impl<'a> Put<'a> {
    /// Number of bits.
    pub(super) fn len(&self) -> u64 {
        match self {
            Put::Own { len, .. } => *len,
            Put::Shared(bits) => bits.len(),
        }
    }

    /// What is known of the groups that bits are put in.
    pub(super) fn summary(&self) -> &'a Summary {
        match self {
            Put::Own { summary, .. } => summary,
            Put::Shared(bits) => bits.summary(),
        }
    }

    /// Sets the bits of `values` in the words from index `first` on, which are of one group; what is behind the end is
    /// left out.
    pub(super) fn or(&mut self, first: usize, values: &[u64]) {
        if self.summary().is_full(first / GROUP_WORDS) {
            return;
        }
        if (first + values.len()) as u64 > self.len() / u64::from(u64::BITS) {
            let mut copy = [0; GROUP_WORDS];
            copy.iter_mut().zip(values).for_each(|(to, from)| *to = *from);
            cut(&mut copy, first, self.len());
            self.or_within(first, &copy);
        } else if *values == ALL {
            self.fill(first);
        } else {
            self.or_within(first, values);
        }
    }

    /// Sets all bits of the group that begins with word `first`, which ends before the last bit.
    fn fill(&mut self, first: usize) {
        let group = first..first + GROUP_WORDS;
        self.summary().note(first);
        match self {
            Put::Own { words, .. } => words.get_mut(group).unwrap_or_default().fill(u64::MAX),
            Put::Shared(bits) => {
                for word in bits.used().get(group).unwrap_or_default() {
                    // No neighbour in the word can be undone where all of them are set.
                    if word.load(Ordering::Acquire) != u64::MAX {
                        word.store(u64::MAX, Ordering::Release);
                    }
                }
            }
        }
        self.summary().note_full(first / GROUP_WORDS);
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
            Put::Shared(bits) => {
                for ((word, value), index) in
                    bits.used().get(first..).unwrap_or_default().iter().zip(values).zip(first..)
                {
                    bits.set_in(index, word, *value);
                }
            }
        }
    }
}
