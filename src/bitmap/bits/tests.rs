//! The rules of bits, one by one and against a vector of bools.

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
            bits.each_group(end, |_| false, |first, words| found.extend(words.iter().zip(first..).map(|(word, i)| (i, *word))));
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

/// The groups of two and a half that count as full.
fn full(bits: &Bits) -> Vec<usize> {
    (0..3).filter(|group| bits.summary.is_full(*group)).collect()
}

const LEN: u64 = 5 * GROUP_BITS / 2;

fn filled() -> Bits {
    let bits = Bits::heap(LEN);
    bits.set_range(0..LEN);
    bits
}

#[test]
fn groups_that_are_filled_in_any_way_count_as_full() {
    let one_by_one = |order: &mut dyn Iterator<Item = u64>| {
        let bits = Bits::heap(LEN);
        order.for_each(|i| {
            bits.set(i);
        });
        bits
    };
    let merged = Bits::heap(LEN);
    merged.or_from(&filled());
    let (mut own, mut loaded) = (Bits::heap(LEN), Bits::heap(LEN));
    own.or_from_mut(&filled());
    loaded.or_words(0, filled().words());
    let words = Words::heap(Bits::words_for(LEN));
    words.iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
    let found = Bits::new(words, LEN);
    let all = [
        filled(),
        one_by_one(&mut (0..LEN)),
        one_by_one(&mut (0..LEN).rev()),
        one_by_one(&mut (0..LEN).map(|i| i * 4099 % LEN)),
        merged,
        own,
        loaded,
        found,
    ];
    for (bits, way) in all.iter().zip(0..) {
        assert_eq!((bits.count(), full(bits)), (LEN, vec![0, 1]), "way {way}");
    }
}

#[test]
fn what_is_cleared_no_longer_counts_as_full() {
    for range in [0..1, GROUP_BITS - 1..GROUP_BITS, GROUP_BITS + 7..2 * GROUP_BITS, 0..LEN] {
        let bits = filled();
        bits.clear_range(range.clone());
        assert_eq!((bits.count(), bits.next_clear(0, LEN)), (LEN - (range.end - range.start), Some(range.start)));
        bits.or_from(&filled());
        assert_eq!((bits.count(), full(&bits)), (LEN, vec![0, 1]), "{range:?}");
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
