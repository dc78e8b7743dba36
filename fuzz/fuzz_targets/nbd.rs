//! libFuzzer's view of the target `nbd`; run it with `contrib/fuzz nbd`.

#![no_main]

use fleecefs_fuzz::{Target, mutate, run};

libfuzzer_sys::fuzz_target!(|input: &[u8]| run(Target::Nbd, input));
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed.is_multiple_of(2) {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let mut mutated = mutate(Target::Nbd, &data[..size], u64::from(seed));
    mutated.truncate(max_size);
    data[..mutated.len()].copy_from_slice(&mutated);
    mutated.len()
});
