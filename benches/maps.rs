//! What a map of very many extents costs: made, written out, and read as a file.
//!
//! ```text
//! cargo bench --bench maps -- [--dir DIR] [--rounds N] [--extents N]
//! ```
//!
//! A sparse raw disk on which every second granule is dirty, so that there are --extents (1,048,576) of them: in the first
//! table all of it reads as zeros; in the second one each dirty granule holds 4 KiB of data, and there are a sixteenth as
//! many. Nanoseconds for an extent, medians of --rounds (5) with the formats taking turns: 'make' is the pass that
//! finds the length of the text (what `stat` waits for), 'write' writes it out in one pass, 'read' is a reader of 128 KiB
//! at a time from the beginning to the end, as the kernel reads ahead. 'anywhere' is the time for 4 KiB at a random place,
//! in microseconds. Files lie in DIR, by default in the target directory.

mod options;

use fleecefs::backup::{MapFile, MapFormat, MapMeta};
use fleecefs::fleece::{DiskSpec, Fleece, Options, SnapshotRequest, ViewMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

const GRANULARITY: u64 = 64 << 10;
const READ_BYTES: usize = 128 << 10;
const ANYWHERE: u64 = 200;

struct Settings {
    dir: PathBuf,
    rounds: usize,
    extents: u64,
}

fn settings() -> Settings {
    let mut settings = Settings { dir: PathBuf::from(env!("CARGO_TARGET_TMPDIR")), rounds: 5, extents: 1 << 20 };
    options::each(|option, value| match option {
        "--dir" => settings.dir = value.into(),
        "--rounds" => settings.rounds = value.parse().expect("a number of rounds"),
        "--extents" => settings.extents = value.parse().expect("a number of extents"),
        _ => panic!("unknown option {option}"),
    });
    settings
}

fn main() {
    let settings = settings();
    let dir = settings.dir.join(format!("maps.{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    table(&dir, "all zeros", settings.extents, settings.rounds, false);
    table(&dir, "4 KiB of data in each dirty granule", settings.extents / 16, settings.rounds, true);
    std::fs::remove_dir_all(&dir).expect("remove the directory");
}

fn table(dir: &Path, name: &str, extents: u64, rounds: usize, data: bool) {
    let image = dir.join(if data { "data.raw" } else { "zeros.raw" });
    let file = std::fs::File::create(&image).and_then(|file| file.set_len(extents * GRANULARITY));
    file.expect("an image");
    let fleece = Fleece::new(Options::default());
    let disk = fleece.add_disk(&DiskSpec { file: image, ..DiskSpec::default() }).expect("a disk");
    let snapshot = |name: &str| {
        let request = SnapshotRequest { name: name.to_owned(), ..SnapshotRequest::default() };
        fleece.create_snapshot(&request).expect("a snapshot")
    };
    drop(snapshot("old"));
    for offset in (0..extents * GRANULARITY).step_by(2 * GRANULARITY as usize) {
        if data {
            disk.write(&[7; 4096], offset).expect("write");
        } else {
            disk.discard(offset, GRANULARITY).expect("discard");
        }
    }
    let new = snapshot("new");
    let view = new.views().first().expect("a view").clone();
    let map = Arc::new(view.map(view.since().first().map(|point| point.uuid)).expect("a map"));
    println!("\nEvery second granule of {extents} is dirty, {name}; nanoseconds for an extent:\n");
    println!(
        "{:<9} | {:>8} | {:>8} | {:>8} | {:>8} | {:>12}",
        "format", "extents", "make", "write", "read", "anywhere, us"
    );
    println!("{:-<10}|{:->10}|{:->10}|{:->10}|{:->10}|{:->13}", "", "", "", "", "", "");
    let mut all = MapFormat::ALL.map(|format| (format, 0, [const { Vec::new() }; 4]));
    for _ in 0..rounds {
        for (format, extents, times) in &mut all {
            let (count, once) = measure(&map, *format);
            *extents = count;
            times.iter_mut().zip(once).for_each(|(times, time)| times.push(time));
        }
    }
    for (format, extents, times) in all {
        let [make, write, read, anywhere] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        let name = format.name();
        println!("{name:<9} | {extents:>8} | {make:>8.1} | {write:>8.1} | {read:>8.1} | {anywhere:>12.1}");
    }
    drop((map, view, new));
    fleece.close().expect("close");
}

/// The count of extents, and the four figures.
fn measure(map: &Arc<ViewMap>, format: MapFormat) -> (u64, [f64; 4]) {
    let start = Instant::now();
    let file = MapFile::new(map.clone(), format, &MapMeta::of(map)).expect("a map");
    let make = start.elapsed();
    let extents = file.totals().extents;
    let start = Instant::now();
    file.write_to(&mut std::io::sink()).expect("write out");
    let write = start.elapsed();
    let mut buffer = vec![0; READ_BYTES];
    let start = Instant::now();
    let mut at = 0;
    while at < file.len() {
        at += file.read_at(&mut buffer, at).expect("read") as u64;
    }
    let read = start.elapsed();
    let start = Instant::now();
    for index in 0..ANYWHERE {
        // Places without a pattern, the same in each run.
        let at = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) % file.len();
        file.read_at(&mut buffer[..4096], at).expect("read");
    }
    let anywhere = start.elapsed().as_secs_f64() * 1e6 / ANYWHERE as f64;
    let each = |time: std::time::Duration| time.as_secs_f64() * 1e9 / extents as f64;
    (extents, [each(make), each(write), each(read), anywhere])
}
