//! Rounds of kill -9 under load, at any moment of the guest's writes and of a snapshot's life.
//!
//! The guest's threads note each write before they issue it and when it is answered. After each kill and remount:
//! - every answered write is in the disk, and of one under way all or nothing (a block is one page);
//! - the chain of checkpoints is whole: each that was answered is there, none that was not taken is;
//! - the map since each checkpoint names every block that differs from the copy that was taken of the disk at it, and
//!   no granule that nobody wrote to since;
//! - views that were not dropped hold what they held.
//!
//! Every few rounds the daemon ends cleanly; of a qcow2 image QEMU's tools then find bitmaps and all else in order.

use crate::harness::*;
use crate::qcow2_cells::Random;
use fleecefs::storage::Storage;
use fleecefs::storage::os::{OpenOptions, OsFile};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

const BLOCK: u64 = 4096;
const DISK: u64 = 32 << 20;
const GRANULES: u64 = DISK / GRANULE;
const THREADS: u64 = 3;
/// Granules that are written to in one round: few enough that most stay clean.
const HOT: u64 = 40;
/// Rounds from one clean end to the next.
const CLEAN_EVERY: u64 = 4;

/// What a block holds: 0 is zeros, anything else the seed of a pattern.
type Content = u64;

fn bytes_of(content: Content) -> Vec<u8> {
    if content == 0 { vec![0; BLOCK as usize] } else { pattern(content, BLOCK as usize) }
}

fn read(path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(bytes.len() as u64, DISK);
    bytes
}

/// A copy of a disk, block by block, short enough to keep hundreds of them.
struct Copy(Vec<u64>);

impl Copy {
    fn of(bytes: &[u8]) -> Copy {
        let word = |word: &[u8]| u64::from_le_bytes(word.try_into().unwrap());
        let mix = |sum: u64, word: u64| (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Copy(bytes.chunks(BLOCK as usize).map(|block| block.chunks(8).map(word).fold(0, mix)).collect())
    }

    fn changed_granules(&self, other: &Copy) -> BTreeSet<u64> {
        let blocks = self.0.iter().zip(&other.0).zip(0..);
        blocks.filter(|((old, new), _)| old != new).map(|(_, block)| block * BLOCK / GRANULE).collect()
    }
}

/// A checkpoint that must be known: the disk at it, and the first round whose writes may have come after it.
struct Point {
    name: String,
    copy: Copy,
    round: u64,
}

/// One write of a thread.
struct Write {
    block: u64,
    content: Content,
    answered: bool,
}

/// Writes blocks that no other thread writes until the daemon is gone.
fn write(live: &Path, hot: &[u64], thread: u64, seed: u64, killing: &AtomicBool) -> Vec<Write> {
    let mut random = Random::new(seed);
    let Ok(file) = OsFile::open(live, &OpenOptions { write: true, ..Default::default() }) else {
        assert!(killing.load(SeqCst), "the live file cannot be opened");
        return Vec::new();
    };
    let mut log = Vec::new();
    let per_granule = GRANULE / BLOCK;
    for number in 1.. {
        let inside = random.below(per_granule / THREADS) * THREADS + thread;
        let block = random.one_of(hot) * per_granule + inside;
        let content = if random.below(8) == 0 { 0 } else { seed << 24 | number };
        log.push(Write { block, content, answered: false });
        let result = match content {
            0 => file.punch_hole(block * BLOCK, BLOCK),
            content => file.write_at(&bytes_of(content), block * BLOCK),
        };
        if let Err(e) = result {
            assert!(killing.load(SeqCst), "a write of the guest failed: {e}");
            break;
        }
        log.last_mut().unwrap().answered = true;
    }
    log
}

struct Rounds {
    image: PathBuf,
    is_qcow2: bool,
    random: Random,
    /// What the blocks hold.
    content: Vec<Content>,
    points: Vec<Point>,
    /// Granules that were written to, by round.
    written: Vec<BTreeSet<u64>>,
}

impl Rounds {
    /// What was answered is there; of the writes under way, all or nothing.
    fn check_live(&mut self, mount: &Mount, log: Vec<Write>) {
        let mut under_way: BTreeMap<u64, Content> = BTreeMap::new();
        for write in log {
            match write.answered {
                true => self.content[write.block as usize] = write.content,
                false => assert!(under_way.insert(write.block, write.content).is_none()),
            }
        }
        let live = read(&mount.live("vda"));
        for ((bytes, block), content) in live.chunks(BLOCK as usize).zip(0..).zip(&mut self.content) {
            if bytes != bytes_of(*content) {
                let other = under_way.get(&block).copied();
                let fits = other.is_some_and(|other| bytes == bytes_of(other));
                assert!(fits, "block {block} lost an answered write (under way: {})", other.is_some());
                *content = other.unwrap();
            }
        }
    }

    /// Takes a snapshot in a quiet moment and holds chain and maps against all that is known.
    fn check_maps(&mut self, mount: &Mount, name: &str, round: u64) {
        let tracking = mount.status()["disks"][0]["tracking"].as_str().unwrap().to_owned();
        assert!(tracking.starts_with("exact") || self.points.is_empty(), "round {round}: {tracking}");
        mount.snap(name);
        let copy = Copy::of(&read(&mount.view(name, "vda")));
        assert!(copy.changed_granules(&Copy::of(&read(&mount.live("vda")))).is_empty(), "round {round}: the view");
        let since = fs::read_dir(mount.snapshot_dir(name).join("vda/since")).unwrap();
        let since: BTreeSet<String> = since.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let known: BTreeSet<String> = self.points.iter().map(|point| point.name.clone()).collect();
        assert_eq!(since, known, "round {round}: the chain of checkpoints");
        let oldest = self.random.below(self.points.len().max(1) as u64) as usize;
        for point in self.points.iter().rev().take(5).chain(self.points.get(oldest)) {
            let map: BTreeSet<u64> = mount.map_since(name, "vda", &point.name).granules().into_iter().collect();
            let changed = point.copy.changed_granules(&copy);
            let missed: Vec<_> = changed.difference(&map).collect();
            assert!(missed.is_empty(), "round {round}: changes since {} that its map misses: {missed:?}", point.name);
            let written: BTreeSet<u64> = self.written.iter().skip(point.round as usize).flatten().copied().collect();
            let invented: Vec<_> = map.difference(&written).collect();
            assert!(invented.is_empty(), "round {round}: nobody wrote to {invented:?} since {}", point.name);
        }
        self.points.push(Point { name: name.to_owned(), copy, round });
    }

    /// One kill and what is left of it. The daemon comes back on the same directory.
    fn round(&mut self, mount: Mount, round: u64) -> Mount {
        let name = format!("r{round}");
        self.check_maps(&mount, &name, round);
        let frozen = &self.points.last().unwrap().copy.0.clone();
        let hot: Vec<u64> = (0..HOT).map(|_| self.random.below(GRANULES)).collect();
        self.written.push(hot.iter().copied().collect());
        let pause = |random: &mut Random, most_ms: u64| {
            std::thread::sleep(Duration::from_micros(random.below(most_ms * 1000)));
        };
        let (act, killing) = (self.random.below(4), AtomicBool::new(false));
        let taken = format!("m{round}");
        let (live, seed) = (mount.live("vda"), round * THREADS + 1);
        let (first, second) = (mount.snapshot_dir(&name), mount.snapshot_dir(&taken));
        let (dir, log, done) = std::thread::scope(|scope| {
            let (live, hot, killing) = (&live, &hot, &killing);
            let guests: Vec<_> =
                (0..THREADS).map(|n| scope.spawn(move || write(live, hot, n, seed + n, killing))).collect();
            pause(&mut self.random, 60);
            // Killed with the view open, after its end, in the midst of it, or in the midst of another's beginning.
            let (first, second) = (&first, &second);
            let actor = scope.spawn(move || match act {
                0 => Ok(()),
                1 | 2 => fs::remove_dir(first),
                _ => fs::create_dir(second),
            });
            let mut actor = Some(actor);
            let done = (act < 2).then(|| actor.take().unwrap().join().unwrap().unwrap());
            pause(&mut self.random, if act < 2 { 60 } else { 25 });
            killing.store(true, SeqCst);
            let dir = mount.kill();
            let done = done.is_some() || actor.is_some_and(|actor| actor.join().unwrap().is_ok());
            (dir, guests.into_iter().flat_map(|guest| guest.join().unwrap()).collect::<Vec<_>>(), done)
        });
        let mount = Mount::at(dir, [&self.image]);
        self.check_live(&mount, log);
        if mount.snapshot_dir(&name).exists() {
            assert!(act != 1, "round {round}: a view that was dropped is back");
            assert!(Copy::of(&read(&mount.view(&name, "vda"))).0 == *frozen, "round {round}: the view of {name}");
            mount.drop_snap(&name);
        } else {
            assert!(act == 1 || act == 2, "round {round}: the view of {name} is gone");
        }
        if mount.snapshot_dir(&taken).exists() {
            let copy = Copy::of(&read(&mount.view(&taken, "vda")));
            self.points.push(Point { name: taken.clone(), copy, round });
            mount.drop_snap(&taken);
        } else {
            assert!(act != 3 || !done, "round {round}: a snapshot that was answered is gone");
        }
        mount
    }

    /// A clean end and a new beginning.
    fn clean(&mut self, mount: Mount) -> Mount {
        let dir = mount.dir.clone();
        mount.umount();
        if self.is_qcow2 {
            let newest = &self.points.last().unwrap().name;
            let info = ok(tool("qemu-img").args(["info", "--output=json"]).arg(&self.image));
            let info: Value = serde_json::from_str(&info).unwrap();
            let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
            assert_eq!(bitmaps.len(), 1, "{bitmaps:?}");
            assert_eq!((&bitmaps[0]["name"], &bitmaps[0]["flags"]), (&newest.as_str().into(), &["auto"][..].into()));
            ok(tool("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&self.image));
        }
        Mount::at(dir, [&self.image])
    }
}

fn rounds(format: &str, count: u64) {
    let rig = Rig::new();
    let image = rig.path(&format!("vda.{format}"));
    let is_qcow2 = format == "qcow2";
    match is_qcow2 {
        true => drop(ok(tool("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg(DISK.to_string()))),
        false => fs::File::create(&image).unwrap().set_len(DISK).unwrap(),
    }
    let mut rounds = Rounds {
        image: image.clone(),
        is_qcow2,
        random: Random::new(if is_qcow2 { 2 } else { 1 }),
        content: vec![0; (DISK / BLOCK) as usize],
        points: Vec::new(),
        written: Vec::new(),
    };
    let mut mount = rig.mount([&image]);
    for round in 0..count {
        mount = rounds.round(mount, round);
        if round % CLEAN_EVERY == CLEAN_EVERY - 1 {
            mount = rounds.clean(mount);
            rounds.check_live(&mount, Vec::new());
        }
    }
    rounds.check_maps(&mount, "end", count);
    let points = rounds.points.len();
    mount.umount();
    say(&format!("{format}: {count} kills, {points} checkpoints"));
}

#[test]
fn kills_under_load_lose_no_write_no_checkpoint_and_no_change_raw() {
    requires!();
    rounds("raw", sized(8, 200));
}

#[test]
fn kills_under_load_lose_no_write_no_checkpoint_and_no_change_qcow2() {
    requires!("qemu-img");
    rounds("qcow2", sized(8, 200));
}
