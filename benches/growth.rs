//! What many bitmaps and many checkpoints of a disk of 1 TiB cost.
//!
//! ```text
//! cargo bench --bench growth -- [--dir DIR] [--bitmaps N] [--checkpoints N]
//! ```
//!
//! Two tables: so many bitmaps written to a sidecar, read again and put into words in tmpfs, as a mount does with those
//! that record; and snapshots of one disk, taken and completed until there are so many checkpoints, with what a write
//! of the guest costs before and after. Files lie in DIR, by default in the target directory; they are sparse.

use fleecefs::bitmap::{Area, Bits, Directory, DirtyBitmap, Sidecar};
use fleecefs::fleece::{DiskSpec, Fleece, Options, SnapshotRequest};
use fleecefs::storage::os::{OpenOptions, OsFile};
use fleecefs::storage::shm::{OsShmRoot, ShmRoot};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const TIB: u64 = 1 << 40;
const GRANULARITY: u64 = 64 << 10;

struct Settings {
    dir: PathBuf,
    bitmaps: usize,
    checkpoints: usize,
}

fn settings() -> Settings {
    let mut settings = Settings { dir: PathBuf::from(env!("CARGO_TARGET_TMPDIR")), bitmaps: 100, checkpoints: 1000 };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(option) = args.next() {
        let value = args.next().unwrap_or_else(|| panic!("{option} needs a value"));
        match option.as_str() {
            "--dir" => settings.dir = value.into(),
            "--bitmaps" => settings.bitmaps = value.parse().expect("a number of bitmaps"),
            "--checkpoints" => settings.checkpoints = value.parse().expect("a number of checkpoints"),
            _ => panic!("unknown option {option}"),
        }
    }
    settings
}

/// Numbers without a pattern, the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn median(mut all: Vec<Duration>) -> f64 {
    all.sort();
    all.get(all.len() / 2).copied().map_or(0.0, ms)
}

fn main() {
    let settings = settings();
    let dir = settings.dir.join(format!("growth.{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    bitmaps(&dir, settings.bitmaps);
    checkpoints(&dir, settings.checkpoints);
    std::fs::remove_dir_all(&dir).expect("remove the directory");
}

fn bitmaps(dir: &Path, count: usize) {
    println!("{count} bitmaps of 1 TiB at 64 KiB, milliseconds for all of them:\n");
    println!("{:<24} | {:>9} | {:>9} | {:>9}", "dirty granules", "write", "read", "to tmpfs");
    println!("{:-<25}|{:->11}|{:->11}|{:->10}", "", "", "", "");
    let granules = TIB / GRANULARITY;
    let patterns = [("16", granules / 16), ("1 in 4096", 4096), ("1 in 64", 64), ("every second", 2), ("all", 1)];
    for (name, step) in patterns {
        let path = dir.join("dirty.log");
        let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
        let file = Arc::new(OsFile::open(&path, &options).expect("a file"));
        let sidecar = Sidecar::create(file, Directory::new(uuid::Uuid::new_v4(), TIB)).expect("a sidecar");
        let bitmap = DirtyBitmap::heap(GRANULARITY, TIB).expect("a bitmap");
        (0..granules).step_by(step as usize).for_each(|granule| bitmap.mark(granule * GRANULARITY, 1));
        let start = Instant::now();
        let written: Vec<(Area, u32)> = (0..count)
            .map(|_| {
                let area = sidecar.allocate(granules / 8).expect("an area");
                let crc = sidecar.write_bits(&area, bitmap.bits()).expect("write");
                (area, crc)
            })
            .collect();
        let wrote = start.elapsed();
        sidecar.sync().expect("sync");
        let (mut read, mut filled) = (Duration::ZERO, Duration::ZERO);
        let shm = OsShmRoot.create(&format!("growth-{}", std::process::id())).expect("shared memory");
        for (index, (area, crc)) in written.iter().enumerate() {
            let start = Instant::now();
            let bits = sidecar.read_bits(area, granules, Some(*crc)).expect("read");
            let between = Instant::now();
            let words = shm.create(&index.to_string(), Bits::words_for(granules)).expect("words");
            let there = DirtyBitmap::new(GRANULARITY, TIB, bits).expect("a bitmap");
            let kept = there.resized(TIB, Bits::new(words, granules), true).expect("a bitmap");
            filled += between.elapsed();
            read += between - start;
            assert_eq!(kept.count_bytes(), bitmap.count_bytes());
        }
        shm.remove_all().expect("remove the words");
        println!("{name:<24} | {:>9.1} | {:>9.1} | {:>9.1}", ms(wrote), ms(read), ms(filled));
        std::fs::remove_file(&path).expect("remove");
    }
}

fn checkpoints(dir: &Path, count: usize) {
    const SAMPLE: usize = 10;
    let image = dir.join("disk.raw");
    let file = std::fs::File::create(&image).and_then(|file| file.set_len(TIB));
    file.expect("an image");
    let fleece = Fleece::new(Options::default());
    let disk = fleece.add_disk(&DiskSpec { file: image, ..DiskSpec::default() }).expect("a disk");
    let mut random = Random(1);
    let block = [7; 4096];
    let mut write = |times: u64, within: u64| {
        let start = Instant::now();
        for _ in 0..times {
            disk.write(&block, random.below(within / 4096) * 4096).expect("write");
        }
        start.elapsed().as_nanos() as u64 / times
    };
    // Blocks that are there already: what a file system does for a new one would hide the rest.
    write(100_000, 64 << 20);
    let untracked = write(200_000, 64 << 20);
    println!("\nOne disk of 1 TiB:\n");
    println!(
        "{:<12} | {:>16} | {:>16} | {:>14} | {:>13}",
        "checkpoints", "take a snapshot", "complete it", "map since all", "a write, ns"
    );
    println!("{:-<13}|{:->18}|{:->18}|{:->16}|{:->14}", "", "", "", "", "");
    println!("{:<12} | {:>16} | {:>16} | {:>14} | {untracked:>13}", 0, "", "", "");
    let (mut takes, mut completes) = (Vec::new(), Vec::new());
    for index in 1..=count {
        write(16, TIB / 256);
        let name = format!("c{index}");
        let start = Instant::now();
        let request = SnapshotRequest { name: name.clone(), ..SnapshotRequest::default() };
        let snapshot = fleece.create_snapshot(&request).expect("a snapshot");
        takes.push(start.elapsed());
        let told = [SAMPLE, 10 * SAMPLE, 100 * SAMPLE, count].contains(&index).then(|| {
            let view = snapshot.view("disk").expect("a view");
            let start = Instant::now();
            view.map(view.since().first().map(|point| point.uuid)).expect("a map");
            start.elapsed()
        });
        drop(snapshot);
        let start = Instant::now();
        fleece.complete_snapshot(&name, None).expect("complete");
        completes.push(start.elapsed());
        if let Some(map) = told {
            fleece.reap();
            let newest = |all: &[Duration]| median(all.iter().rev().take(SAMPLE).copied().collect());
            write(100_000, 64 << 20);
            println!(
                "{index:<12} | {:>13.1} ms | {:>13.1} ms | {:>11.1} ms | {:>13}",
                newest(&takes),
                newest(&completes),
                ms(map),
                write(200_000, 64 << 20)
            );
        }
    }
    fleece.close().expect("close");
}
