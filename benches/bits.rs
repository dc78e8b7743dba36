//! Marking, merging and walking dirty bitmaps.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use fleecefs::bitmap::{Bits, DirtyBitmap};
use std::hint::black_box;

const GRANULARITY: u64 = 64 << 10;
const TIB: u64 = 1 << 40;

fn bitmap(size: u64) -> DirtyBitmap {
    DirtyBitmap::heap(GRANULARITY, size).expect("sizes are good")
}

fn marking(c: &mut Criterion) {
    let mut group = c.benchmark_group("mark");
    let map = bitmap(TIB);
    let mut block = 0;
    group.bench_function("4 KiB, granule dirty already", |b| b.iter(|| map.mark(black_box(5 << 20), 4096)));
    group.bench_function("4 KiB, through the disk again and again", |b| {
        b.iter(|| {
            block = (block + GRANULARITY) % TIB;
            map.mark(black_box(block), 4096);
        })
    });
    let bits = Bits::heap(TIB / GRANULARITY);
    for (name, count) in [("16 bits (1 MiB)", 16), ("16384 bits (1 GiB)", 16384)] {
        group.bench_function(format!("set_range and clear_range of {name}"), |b| {
            b.iter(|| {
                bits.set_range(black_box(1000..1000 + count));
                bits.clear_range(black_box(1000..1000 + count));
            })
        });
    }
    group.finish();
}

fn merging(c: &mut Criterion) {
    let mut group = c.benchmark_group("merge");
    group.throughput(Throughput::Bytes(TIB / GRANULARITY / 8));
    let full = bitmap(TIB);
    full.mark_all();
    group.bench_function("full into full, 1 TiB at 64 KiB", |b| {
        let target = bitmap(TIB);
        target.mark_all();
        b.iter(|| target.merge_from(black_box(&full)));
    });
    group.bench_function("full into clean, 1 TiB at 64 KiB", |b| {
        b.iter_batched(|| bitmap(TIB), |target| target.merge_from(black_box(&full)), BatchSize::LargeInput);
    });
    group.finish();
}

fn walking(c: &mut Criterion) {
    let mut group = c.benchmark_group("walk");
    let walk = |map: &DirtyBitmap| {
        let (mut at, mut runs) = (0, 0);
        while let Some(run) = map.next_dirty_run(at, map.size()) {
            at = run.end;
            runs += 1u64;
        }
        runs
    };
    let dense = bitmap(TIB);
    dense.mark_all();
    let sparse = bitmap(TIB);
    (0..TIB).step_by(1 << 30).for_each(|offset| sparse.mark(offset, 1));
    let alternating = bitmap(TIB);
    (0..TIB).step_by(2 * GRANULARITY as usize).for_each(|offset| alternating.mark(offset, 1));
    let huge = bitmap(16 * TIB);
    huge.mark(15 * TIB, 1);
    let maps = [
        ("dense, 1 TiB", dense),
        ("one granule per GiB, 1 TiB", sparse),
        ("every second granule, 1 TiB", alternating),
        ("one granule of 16 TiB", huge),
    ];
    for (name, map) in &maps {
        group.bench_function(*name, |b| b.iter(|| walk(black_box(map))));
    }
    group.finish();
}

criterion_group!(benches, marking, merging, walking);
criterion_main!(benches);
