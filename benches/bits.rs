//! Marking, merging and walking dirty bitmaps.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use fleecefs::bitmap::{Bits, DirtyBitmap};
use fleecefs::sync::full_fence;
use std::hint::black_box;

const GRANULARITY: u64 = 64 << 10;
const TIB: u64 = 1 << 40;

fn bitmap(size: u64) -> DirtyBitmap {
    bitmap_of(GRANULARITY, size)
}

fn bitmap_of(granularity: u64, size: u64) -> DirtyBitmap {
    DirtyBitmap::heap(granularity, size).expect("sizes are good")
}

/// A bitmap in which `count` of each `of` granules are dirty.
fn partly(granularity: u64, size: u64, count: u64, of: u64) -> DirtyBitmap {
    let map = bitmap_of(granularity, size);
    (0..size).step_by((of * granularity) as usize).for_each(|offset| map.mark(offset, count * granularity));
    map
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
    // Each mark is of the next granule of a clean map; a map that is full is made clean again, once in 16 million.
    let map = bitmap(TIB);
    group.bench_function("4 KiB, first touch", |b| {
        b.iter(|| {
            block += GRANULARITY;
            if block >= TIB {
                block = 0;
                map.clear();
            }
            map.mark(black_box(block), 4096);
        })
    });
    for count in [1, 8, 64] {
        let maps: Vec<_> = (0..count).map(|_| bitmap(TIB)).collect();
        group.bench_function(format!("4 KiB in {count} bitmaps, dirty already, one fence"), |b| {
            b.iter(|| {
                maps.iter().for_each(|map| map.mark_unfenced(black_box(5 << 20), 4096));
                full_fence();
            })
        });
        group.bench_function(format!("4 KiB in {count} bitmaps, dirty already, a fence each"), |b| {
            b.iter(|| maps.iter().for_each(|map| map.mark(black_box(5 << 20), 4096)))
        });
    }
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
    let full = bitmap(TIB);
    full.mark_all();
    group.bench_function("full into full, 1 TiB at 64 KiB", |b| {
        let target = bitmap(TIB);
        target.mark_all();
        b.iter(|| target.merge_from(black_box(&full)));
    });
    // Filled as guests do it.
    let written = partly(GRANULARITY, TIB, 1, 1);
    group.bench_function("full into full, 1 TiB at 64 KiB, marked granule by granule", |b| {
        let target = partly(GRANULARITY, TIB, 1, 1);
        b.iter(|| target.merge_from(black_box(&written)));
    });
    // Nothing counts as full here, and each word is read.
    let nearly = partly(GRANULARITY, TIB, 4095, 4096);
    group.bench_function("all but one granule in 4096 into the same, 1 TiB at 64 KiB", |b| {
        let target = partly(GRANULARITY, TIB, 4095, 4096);
        b.iter(|| target.merge_from(black_box(&nearly)));
    });
    let sparse = partly(GRANULARITY, TIB, 1, 1 << 14);
    let fine = |count, of| partly(4096, TIB, count, of);
    let cases = [
        ("full into clean, 1 TiB at 64 KiB", GRANULARITY, &full),
        ("one granule per GiB into clean, 1 TiB at 64 KiB", GRANULARITY, &sparse),
        ("full, 1 TiB, 64 KiB to 4 KiB", 4096, &full),
        ("every second granule, 1 TiB, 64 KiB to 4 KiB", 4096, &partly(GRANULARITY, TIB, 1, 2)),
        ("full, 1 TiB, 4 KiB to 64 KiB", GRANULARITY, &fine(1 << 28, 1 << 28)),
        ("every third granule, 1 TiB, 4 KiB to 64 KiB", GRANULARITY, &fine(1, 3)),
        ("every third granule, 1 TiB, 4 KiB to 1 MiB", 1 << 20, &fine(1, 3)),
    ];
    for (name, granularity, from) in cases {
        // The same maps each time, or the kernel's clearing of fresh memory would be what is measured.
        let shared = bitmap_of(granularity, TIB);
        group.bench_function(format!("{name}, marked by others"), |b| {
            b.iter_batched(|| shared.clear(), |()| shared.merge_from(black_box(from)), BatchSize::PerIteration);
        });
        let mut own = bitmap_of(granularity, TIB);
        group.bench_function(format!("{name}, nobody else's"), |b| {
            b.iter_custom(|times| {
                (0..times)
                    .map(|_| {
                        own.clear();
                        let start = std::time::Instant::now();
                        own.absorb(black_box(from));
                        start.elapsed()
                    })
                    .sum()
            });
        });
    }
    group.finish();
}

fn counting(c: &mut Criterion) {
    let mut group = c.benchmark_group("count");
    let maps = [
        ("full, 1 TiB", partly(GRANULARITY, TIB, 1, 1)),
        ("every third granule, 1 TiB", partly(GRANULARITY, TIB, 1, 3)),
        ("one granule per GiB, 1 TiB", partly(GRANULARITY, TIB, 1, 1 << 14)),
    ];
    for (name, map) in &maps {
        group.bench_function(*name, |b| b.iter(|| black_box(map).count_bytes()));
    }
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

criterion_group!(benches, marking, merging, counting, walking);
criterion_main!(benches);
