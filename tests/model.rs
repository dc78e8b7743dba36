//! Model test of the core, unmounted: random operations on two disks in memory, with a plain `Vec<u8>` for each live
//! disk and each frozen point as the oracle, compared after every operation.
//!
//! The machine survives kills (the process' objects are dropped; files and words stay), clean stops with and without
//! kept views, and power losses (the words go). Longer runs: `PROPTEST_CASES=5000 cargo test --release --test model`.

#![cfg(not(feature = "shuttle"))]

#[path = "model/machine.rs"]
mod machine;
#[path = "model/oracle.rs"]
mod oracle;

use machine::{Machine, Op};
use proptest::prelude::*;

const DISK_BYTES: u64 = machine::DISK_BYTES;

/// 150 sequences of up to 60 operations, unless the environment asks for more.
fn cases() -> u32 {
    number("PROPTEST_CASES", 150)
}

fn number(variable: &str, default: u32) -> u32 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        // Chunk-aligned, odd, long, and around the end of the disk.
        (0..DISK_BYTES / 4096, 1..5_u64).prop_map(|(chunk, count)| (chunk * 4096, count * 4096)),
        (0..DISK_BYTES, 1..9000_u64),
        (0..DISK_BYTES, 1..300_000_u64),
        (DISK_BYTES - 6000..DISK_BYTES, 1..6000_u64),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        20 => (0..2_usize, range(), any::<u8>()).prop_map(|(disk, (offset, len), byte)| Op::Write { disk, offset, len, byte }),
        4 => (0..2_usize, range()).prop_map(|(disk, (offset, len))| Op::Zero { disk, offset, len }),
        4 => (0..2_usize, range()).prop_map(|(disk, (offset, len))| Op::Discard { disk, offset, len }),
        6 => (0..4_usize, 0..3_usize).prop_map(|(since, disks)| Op::Snapshot { since, disks }),
        3 => (0..8_usize, any::<bool>()).prop_map(|(which, consumer)| Op::Complete { which, consumer }),
        2 => (0..8_usize).prop_map(|which| Op::Cancel { which }),
        2 => (0..8_usize).prop_map(|which| Op::DeleteCheckpoint { which }),
        2 => (0..8_usize, 0..2_usize, range()).prop_map(|(which, disk, (offset, len))| Op::Release { which, disk, offset, len }),
        1 => (0..2_usize, 0..4_usize).prop_map(|(disk, step)| Op::Resize { disk, step }),
        3 => Just(Op::Reap),
        1 => Just(Op::Kill),
        1 => any::<bool>().prop_map(|keep| Op::CleanStop { keep, foreign: None }),
        1 => (any::<bool>(), 0..2_usize, 1..9000_u64)
            .prop_map(|(keep, disk, len)| Op::CleanStop { keep, foreign: Some((disk, len)) }),
        1 => Just(Op::PowerLoss),
        1 => (1..4_u64).prop_map(|nth| Op::FailStore { nth }),
        1 => (1..6_u64, 1..8_u64).prop_map(|(nth, count)| Op::FailState { nth, count }),
        1 => (0..DISK_BYTES / 4096).prop_map(|chunk| Op::BadSector { chunk }),
        1 => (0..8_usize).prop_map(|which| Op::LookAtMap { which }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        max_shrink_iters: number("PROPTEST_MAX_SHRINK_ITERS", 4000),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_view_and_map_agrees_with_the_model(ops in proptest::collection::vec(op(), 1..60), fail_write in any::<bool>()) {
        let mut machine = Machine::new(fail_write);
        for op in ops {
            machine.apply(&op);
            machine.check();
        }
    }
}
