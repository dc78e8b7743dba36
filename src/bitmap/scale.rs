//! Words of bits at another granularity, without a look at each bit.
//!
//! Both rounding rules are 'towards dirty': a coarse bit becomes all the fine bits that it covers, and a coarse bit is
//! set where any of its fine bits is. Bit 0 of both stands for byte 0.

use crate::bitmap::summary::GROUP_WORDS;

const WORD_BITS: u64 = u64::BITS as u64;
/// A shift by which one word becomes one bit.
const WORD_SHIFT: u32 = WORD_BITS.trailing_zeros();

/// The words of one group.
type Group = [u64; GROUP_WORDS];

/// Calls `put(first, words)` with the words that a group becomes, the first of which is word `first` of its own bits,
/// where each bit becomes 2^`shift` (`shift` is not 0): what is below bit `end` of them. All words of a call are of one
/// group, and not all of them are 0.
pub(super) fn expand(words: &Group, first: usize, shift: u32, end: u64, put: impl FnMut(usize, &[u64])) {
    match shift {
        1 => expand_by::<1, 2>(words, first, end, put),
        2 => expand_by::<2, 4>(words, first, end, put),
        3 => expand_by::<3, 8>(words, first, end, put),
        4 => expand_by::<4, 16>(words, first, end, put),
        5 => expand_by::<5, 32>(words, first, end, put),
        _ => expand_to_words(words, first, shift.saturating_sub(WORD_SHIFT), end, put),
    }
}

/// The same, where 2^`shift` bits become one.
pub(super) fn shrink(words: &Group, first: usize, shift: u32, mut put: impl FnMut(usize, &[u64])) {
    match shift {
        0 => put(first, words),
        1 => put(first >> 1, &shrink_by::<1, 32>(words)),
        2 => put(first >> 2, &shrink_by::<2, 16>(words)),
        3 => put(first >> 3, &shrink_by::<3, 8>(words)),
        4 => put(first >> 4, &shrink_by::<4, 4>(words)),
        5 => put(first >> 5, &shrink_by::<5, 2>(words)),
        _ => {
            // A word is a bit at most: what the group becomes is part of one word.
            let shift = shift - WORD_SHIFT;
            let bit = first.checked_shr(shift).unwrap_or(0);
            let bits = words
                .iter()
                .zip(0..u64::BITS)
                .fold(0, |bits, (word, index)| bits | u64::from(*word != 0) << index.checked_shr(shift).unwrap_or(0));
            put(bit / WORD_BITS as usize, &[bits << (bit as u64 % WORD_BITS)]);
        }
    }
}

fn expand_by<const SHIFT: u32, const TIMES: usize>(
    words: &Group,
    first: usize,
    end: u64,
    mut put: impl FnMut(usize, &[u64]),
) {
    for (words, first) in words.chunks_exact(GROUP_WORDS / TIMES).zip((first * TIMES..).step_by(GROUP_WORDS)) {
        if words.iter().all(|word| *word == 0) {
            continue;
        }
        let mut wide = [0; GROUP_WORDS];
        for (to, word) in wide.chunks_exact_mut(TIMES).zip(words) {
            match *word {
                0 => (),
                u64::MAX => to.fill(u64::MAX),
                word => {
                    for (to, part) in to.iter_mut().zip(0..) {
                        *to = Ratio::<SHIFT>::expand(word >> (part * Ratio::<SHIFT>::NARROW));
                    }
                }
            }
        }
        cut(&mut wide, first, end);
        put(first, &wide);
    }
}

/// Each bit becomes 2^`shift` whole words.
fn expand_to_words(words: &Group, first: usize, shift: u32, end: u64, mut put: impl FnMut(usize, &[u64])) {
    const ALL: Group = [u64::MAX; GROUP_WORDS];
    for (word, index) in words.iter().zip(first..) {
        let mut left = *word;
        while left != 0 {
            let bit = index as u64 * WORD_BITS + u64::from(left.trailing_zeros());
            left &= left - 1;
            let start = bit.saturating_mul(1 << shift);
            let stop = start.saturating_add(1 << shift).min(end.div_ceil(WORD_BITS));
            let mut at = start as usize;
            while (at as u64) < stop {
                let next = (at + 1).next_multiple_of(GROUP_WORDS).min(stop as usize);
                let mut wide = ALL;
                let wide = wide.get_mut(..next - at).unwrap_or_default();
                cut(wide, at, end);
                put(at, wide);
                at = next;
            }
        }
    }
}

fn shrink_by<const SHIFT: u32, const COUNT: usize>(words: &Group) -> [u64; COUNT] {
    let mut narrow = [0; COUNT];
    for (to, from) in narrow.iter_mut().zip(words.chunks_exact(1 << SHIFT)) {
        // Bitmaps are mostly all or nothing; what is neither goes without a branch for each word.
        *to = match (from.iter().fold(0, |any, word| any | word), from.iter().fold(u64::MAX, |all, word| all & word)) {
            (0, _) => 0,
            (_, u64::MAX) => u64::MAX,
            _ => from
                .iter()
                .zip(0..)
                .fold(0, |sum, (word, part)| sum | Ratio::<SHIFT>::shrink(*word) << (part * Ratio::<SHIFT>::NARROW)),
        };
    }
    narrow
}

/// Clears the bits at and beyond bit `end` in words the first of which is word `first`.
#[inline]
pub(super) fn cut(words: &mut [u64], first: usize, end: u64) {
    let whole = (end / WORD_BITS) as usize;
    if first + words.len() > whole {
        let mut behind = words.iter_mut().skip(whole.saturating_sub(first));
        if first <= whole
            && let Some(last) = behind.next()
        {
            *last &= (1 << (end % WORD_BITS)) - 1;
        }
        behind.for_each(|word| *word = 0);
    }
}

/// Between [`Ratio::NARROW`] bits and a word of 2^`SHIFT` times as many; `SHIFT` is below 6.
struct Ratio<const SHIFT: u32>;

impl<const SHIFT: u32> Ratio<SHIFT> {
    const TIMES: u32 = 1 << SHIFT;
    const NARROW: u32 = WORD_BITS as u32 >> SHIFT;
    /// `PIECES[i]`: 2^i bits set at each multiple of 2^i * TIMES.
    const PIECES: [u64; 7] = {
        let mut pieces = [0; 7];
        let mut i = 0;
        while i < 7 {
            let mut at = 0;
            while at < 64 {
                if at % (Self::TIMES << i) < 1 << i {
                    pieces[i as usize] |= 1 << at;
                }
                at += 1;
            }
            i += 1;
        }
        pieces
    };

    /// The lowest NARROW bits, TIMES times each.
    #[inline(always)]
    fn expand(narrow: u64) -> u64 {
        if SHIFT == 0 {
            return narrow;
        }
        let mut x = narrow & (u64::MAX >> (WORD_BITS as u32 - Self::NARROW));
        // The upper half of each piece goes to its place, until each bit stands alone at a multiple of TIMES.
        for i in (0..WORD_SHIFT - SHIFT).rev() {
            x = (x | x << ((Self::TIMES - 1) << i)) & Self::PIECES[i as usize];
        }
        x.wrapping_mul((1 << Self::TIMES) - 1)
    }

    /// For each TIMES bits one, in the lowest NARROW bits.
    #[inline(always)]
    fn shrink(wide: u64) -> u64 {
        let mut x = wide;
        for i in 0..SHIFT {
            x |= x >> (1 << i);
        }
        x &= Self::PIECES[0];
        for i in 0..WORD_SHIFT - SHIFT {
            x = (x | x >> ((Self::TIMES - 1) << i)) & Self::PIECES[i as usize + 1];
        }
        x
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model_of(words: &[u64], bits: u64) -> Vec<bool> {
        (0..bits).map(|i| words.get((i / 64) as usize).is_some_and(|word| word >> (i % 64) & 1 != 0)).collect()
    }

    fn word() -> impl Strategy<Value = u64> {
        prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>(), (0..64u32).prop_map(|bit| 1 << bit)]
    }

    proptest! {
        #[test]
        fn words_scale_as_their_bits_do(
            some in proptest::collection::vec(word(), 1..65),
            group in 0..3usize,
            shift in 0..15u32,
            cut_off in 0..5000u64,
        ) {
            let first = group * GROUP_WORDS;
            let mut words = [0; GROUP_WORDS];
            words[..some.len()].copy_from_slice(&some);
            let all = [vec![0; first], words.to_vec()].concat();
            let bits = model_of(&all, all.len() as u64 * 64);

            let mut coarse = vec![0; all.len()];
            shrink(&words, first, shift, |at, words| words.iter().zip(at..).for_each(|(word, i)| coarse[i] |= word));
            let mut expected: Vec<bool> = bits.chunks(1 << shift).map(|bits| bits.contains(&true)).collect();
            expected.resize(bits.len(), false);
            prop_assert_eq!(model_of(&coarse, bits.len() as u64), expected);

            let shift = shift.clamp(1, 7);
            let end = ((bits.len() as u64) << shift).saturating_sub(cut_off);
            let mut fine = vec![0; all.len() << shift];
            expand(&words, first, shift, end, |at, words| {
                assert_eq!(at / GROUP_WORDS, (at + words.len() - 1) / GROUP_WORDS);
                words.iter().zip(at..).for_each(|(word, i)| fine[i] |= word);
            });
            for (i, set) in model_of(&fine, fine.len() as u64 * 64).into_iter().enumerate() {
                prop_assert_eq!(set, (i as u64) < end && bits[i >> shift], "bit {}", i);
            }
        }
    }

    #[test]
    fn shifts_and_ends_out_of_range_never_panic() {
        let all = [u64::MAX; GROUP_WORDS];
        for first in [0, usize::MAX / 64 - 63] {
            for shift in [6, 22, 31, 200] {
                shrink(&all, first, shift, |_, _| ());
            }
            expand(&all, 0, 22, 1000, |index, words| assert!(index < 16 && words[0] != 0));
        }
    }
}
