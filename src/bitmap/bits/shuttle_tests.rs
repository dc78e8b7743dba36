//! Marks of one word by several threads at once.

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
