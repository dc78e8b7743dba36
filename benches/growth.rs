//! What many bitmaps and many checkpoints of a disk of 1 TiB cost.
//!
//! ```text
//! cargo bench --bench growth -- [--dir DIR] [--bitmaps N] [--checkpoints N]
//! ```
//!
//! Two tables: so many bitmaps written to a sidecar, read again and put into words in tmpfs, as a mount does with those
//! that record; and snapshots of one disk, taken and completed until there are so many checkpoints, with what a write
//! of the guest costs before and after. Each figure is on the clock and, behind it, on a processor: the second is the one
//! to compare on a machine that has other work. Files lie in DIR, by default in the target directory; they are sparse.

mod options;

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
    options::each(|option, value| match option {
        "--dir" => settings.dir = value.into(),
        "--bitmaps" => settings.bitmaps = value.parse().expect("a number of bitmaps"),
        "--checkpoints" => settings.checkpoints = value.parse().expect("a number of checkpoints"),
        _ => panic!("unknown option {option}"),
    });
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

/// Time on the clock, and of it this thread's time on a processor.
#[derive(Clone, Copy, Default)]
struct Cost {
    clock: Duration,
    cpu: Duration,
}

fn cost<R>(work: impl FnOnce() -> R) -> (R, Cost) {
    let cpu = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat of Linux");
        Duration::from_nanos(text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("a number"))
    };
    let (start, before) = (Instant::now(), cpu());
    let result = work();
    (result, Cost { cpu: cpu() - before, clock: start.elapsed() })
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.clock += other.clock;
        self.cpu += other.cpu;
    }
}

/// In milliseconds.
impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        f.pad(&format!("{:.1} {:8.1}", ms(self.clock), ms(self.cpu)))
    }
}

fn median(all: &[Cost]) -> Cost {
    let middle = |part: fn(&Cost) -> Duration| {
        let mut all: Vec<_> = all.iter().map(part).collect();
        all.sort();
        all.get(all.len() / 2).copied().unwrap_or_default()
    };
    Cost { clock: middle(|cost| cost.clock), cpu: middle(|cost| cost.cpu) }
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
    println!("{:<14} | {:>18} | {:>18} | {:>18}", "dirty granules", "write", "read", "to tmpfs");
    println!("{:-<15}|{:->20}|{:->20}|{:->19}", "", "", "", "");
    let granules = TIB / GRANULARITY;
    let patterns = [("16", granules / 16), ("1 in 4096", 4096), ("1 in 64", 64), ("every second", 2), ("all", 1)];
    for (name, step) in patterns {
        let path = dir.join("dirty.log");
        let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
        let file = Arc::new(OsFile::open(&path, &options).expect("a file"));
        let sidecar = Sidecar::create(file, Directory::new(uuid::Uuid::new_v4(), TIB)).expect("a sidecar");
        let bitmap = DirtyBitmap::heap(GRANULARITY, TIB).expect("a bitmap");
        (0..granules).step_by(step as usize).for_each(|granule| bitmap.mark(granule * GRANULARITY, 1));
        let save = |_| {
            let area = sidecar.allocate(granules / 8).expect("an area");
            let crc = sidecar.write_bits(&area, bitmap.bits()).expect("write");
            (area, crc)
        };
        let (written, wrote) = cost(|| (0..count).map(save).collect::<Vec<(Area, u32)>>());
        sidecar.sync().expect("sync");
        let (mut read, mut filled) = (Cost::default(), Cost::default());
        let shm = OsShmRoot.create(&format!("growth-{}", std::process::id())).expect("shared memory");
        for (index, (area, crc)) in written.iter().enumerate() {
            let (bits, time) = cost(|| sidecar.read_bits(area, granules, Some(*crc)).expect("read"));
            read += time;
            let there = DirtyBitmap::new(GRANULARITY, TIB, bits).expect("a bitmap");
            let (kept, time) = cost(|| {
                let words = shm.create(&index.to_string(), Bits::words_for(granules)).expect("words");
                there.resized(TIB, Bits::zeroed(words, granules), true).expect("a bitmap")
            });
            filled += time;
            assert_eq!(kept.count_bytes(), bitmap.count_bytes());
        }
        shm.remove_all().expect("remove the words");
        println!("{name:<14} | {wrote:>18} | {read:>18} | {filled:>18}");
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
        let ((), time) = cost(|| {
            for _ in 0..times {
                disk.write(&block, random.below(within / 4096) * 4096).expect("write");
            }
        });
        format!("{} {:8}", time.clock.as_nanos() as u64 / times, time.cpu.as_nanos() as u64 / times)
    };
    // Blocks that are there already: what a file system does for a new one would hide the rest.
    write(100_000, 64 << 20);
    let untracked = write(200_000, 64 << 20);
    println!("\nOne disk of 1 TiB, milliseconds, and nanoseconds for a write:\n");
    println!(
        "{:<11} | {:>18} | {:>18} | {:>18} | {:>18}",
        "checkpoints", "take a snapshot", "complete it", "map since the first", "a write"
    );
    println!("{:-<12}|{:->20}|{:->20}|{:->21}|{:->19}", "", "", "", "", "");
    println!("{:<11} | {:>18} | {:>18} | {:>19} | {untracked:>18}", 0, "", "", "");
    let (mut takes, mut completes) = (Vec::new(), Vec::new());
    for index in 1..=count {
        write(16, TIB / 256);
        let name = format!("c{index}");
        let request = SnapshotRequest { name: name.clone(), ..SnapshotRequest::default() };
        let (snapshot, time) = cost(|| fleece.create_snapshot(&request).expect("a snapshot"));
        takes.push(time);
        let told = [SAMPLE, 10 * SAMPLE, 100 * SAMPLE, count].contains(&index).then(|| {
            let view = snapshot.view("disk").expect("a view");
            cost(|| view.map(view.since().first().map(|point| point.uuid)).expect("a map")).1
        });
        drop(snapshot);
        completes.push(cost(|| fleece.complete_snapshot(&name, None).expect("complete")).1);
        if let Some(map) = told {
            fleece.reap();
            let newest = |all: &[Cost]| median(&all[all.len() - SAMPLE.min(all.len())..]);
            write(100_000, 64 << 20);
            let (take, complete, written) = (newest(&takes), newest(&completes), write(200_000, 64 << 20));
            println!("{index:<11} | {take:>18} | {complete:>18} | {map:>19} | {written:>18}");
        }
    }
    fleece.close().expect("close");
}
