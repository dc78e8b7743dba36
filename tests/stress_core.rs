//! Real threads on the unmounted core: writers, snapshots that come and go, readers that hash every view twice.
//!
//! **The oracle.** A block belongs to one writer, which stamps it with a number that grows. It publishes the number
//! before it writes (`begun`) and after the write has returned (`done`). A snapshot was therefore frozen with a number
//! from `done` as it was before the freeze to `begun` as it was after it. From then on the block's number in that view
//! never changes, every byte of the block bears it, and of two blocks that one writer stamps in turn no view has the
//! second ahead of the first. What differs between two views is in the map from one to the other.
//!
//! 40 snapshots, a few seconds; `FLEECEFS_FULL=1` takes 4000.

#![cfg(not(any(feature = "shuttle", loom)))]

use fleecefs::error::errno;
use fleecefs::fleece::{Environment, Fleece, Options, Place, Snapshot, SnapshotRequest, View};
use fleecefs::image::raw::RawImage;
use fleecefs::image::{Cache, Image};
use fleecefs::storage::dir::OsDir;
use fleecefs::storage::mem::MemFile;
use fleecefs::storage::shm::{HeapShmRoot, OsShmRoot, ShmRoot};
use fleecefs::storage::{Dir, MemDir};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const BLOCK: usize = 4096;
const GRANULE: u64 = 65536;
const DISKS: [&str; 2] = ["a", "b"];
/// Blocks a disk: 2 MiB.
const BLOCKS: u64 = 512;
const WRITERS: u64 = 4;
/// Snapshots at a time.
const VIEWS: usize = 4;

/// How many snapshots a test takes.
fn rounds() -> u64 {
    if std::env::var_os("FLEECEFS_FULL").is_some() { 4000 } else { 40 }
}

/// A small generator (xorshift64*): the order of things is the scheduler's, so a seed would not repeat a run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }
}

/// The numbers of all blocks of both disks.
struct Numbers {
    begun: Vec<AtomicU64>,
    done: Vec<AtomicU64>,
}

impl Numbers {
    fn new() -> Numbers {
        let zeros = || (0..DISKS.len() as u64 * BLOCKS).map(|_| AtomicU64::new(0)).collect();
        Numbers { begun: zeros(), done: zeros() }
    }

    fn copy(of: &[AtomicU64]) -> Vec<u64> {
        of.iter().map(|number| number.load(Ordering::SeqCst)).collect()
    }
}

/// A snapshot and the interval that each block's number lies in.
struct Frozen {
    snapshot: Arc<Snapshot>,
    at_least: Vec<u64>,
    at_most: Vec<u64>,
    /// The numbers as the first reader found them, by disk.
    found: [Option<Vec<u64>>; 2],
}

struct Stress {
    fleece: Arc<Fleece>,
    numbers: Numbers,
    end: AtomicBool,
}

impl Stress {
    fn new(places: [(Arc<dyn Image>, Arc<dyn Dir>); 2], shm: Arc<dyn ShmRoot>) -> Arc<Stress> {
        let fleece = Fleece::with_environment(Options::default(), Environment { shm, background: true });
        for (name, (image, dir)) in DISKS.into_iter().zip(places) {
            fleece.attach(name, image, Place { state: dir.clone(), stores: dir, shm: None, lock: None }).unwrap();
        }
        Arc::new(Stress { fleece, numbers: Numbers::new(), end: AtomicBool::new(false) })
    }

    /// Stamps a block: every 8 bytes hold its number. Number 0 is never written: those blocks are holes.
    fn stamp(&self, disk: usize, block: u64) {
        let at = disk * BLOCKS as usize + block as usize;
        let number = self.numbers.begun[at].load(Ordering::SeqCst) + 1;
        self.numbers.begun[at].store(number, Ordering::SeqCst);
        let data: Vec<u8> = number.to_le_bytes().repeat(BLOCK / 8);
        let count = self.fleece.disk(DISKS[disk]).unwrap().write(&data, block * BLOCK as u64).unwrap();
        assert_eq!(count, BLOCK);
        self.numbers.done[at].store(number, Ordering::SeqCst);
    }

    /// Writer `index` owns the blocks that are `index` modulo the number of writers. It hits hot and cold places, and
    /// stamps the same block of both disks in turn.
    fn write(&self, index: u64) {
        let mut dice = Dice(0x9E37_79B9 + index);
        while !self.end.load(Ordering::SeqCst) {
            let hot = dice.roll(2) == 0;
            let block = dice.roll(if hot { 16 } else { BLOCKS / WRITERS }) * WRITERS + index;
            self.stamp(0, block);
            self.stamp(1, block);
        }
    }

    fn freeze(&self, name: String) -> Frozen {
        let at_least = Numbers::copy(&self.numbers.done);
        let snapshot = self.fleece.create_snapshot(&SnapshotRequest { name, ..SnapshotRequest::default() }).unwrap();
        let at_most = Numbers::copy(&self.numbers.begun);
        Frozen { snapshot, at_least, at_most, found: [None, None] }
    }

    fn drop(&self, frozen: &Frozen, how: u64) {
        let name = frozen.snapshot.name();
        if how == 0 {
            self.fleece.cancel_snapshot(name).unwrap();
            return;
        }
        self.fleece.complete_snapshot(name, None).unwrap();
        if how == 1 {
            match self.fleece.delete_checkpoint(name) {
                Ok(()) => (),
                Err(e) => assert_eq!(e.errno(), errno::EBUSY, "{e}"),
            }
        }
    }

    /// Snapshots come and go; each is read right after the freeze, at times between, and before its end.
    fn snapshots(&self) {
        let mut dice = Dice(0xC0FF_EE11);
        let mut kept: Vec<Frozen> = Vec::new();
        for round in 0..rounds() {
            kept.push(self.freeze(format!("s{round}")));
            let newest = kept.len() - 1;
            check(&mut kept[newest]);
            if let [.., older, newer] = &mut kept[..] {
                check_map(older, newer);
            }
            let again = dice.roll(kept.len() as u64) as usize;
            check(&mut kept[again]);
            if kept.len() >= VIEWS {
                // Any of them, so that middle layers are hidden and folded.
                let mut gone = kept.remove(dice.roll(kept.len() as u64) as usize);
                check(&mut gone);
                self.drop(&gone, dice.roll(3));
            }
        }
        kept.iter_mut().for_each(check);
    }
}

/// The numbers in a view; every block must bear one number.
fn numbers(view: &View) -> Vec<u64> {
    let mut bytes = vec![0xee; view.size() as usize];
    for (index, piece) in bytes.chunks_mut(128 << 10).enumerate() {
        assert_eq!(view.read(piece, (index * (128 << 10)) as u64).unwrap(), piece.len());
    }
    bytes
        .chunks_exact(BLOCK)
        .map(|block| {
            assert!(block[8..] == block[..BLOCK - 8], "a torn block");
            u64::from_le_bytes(block[..8].try_into().unwrap())
        })
        .collect()
}

fn check(frozen: &mut Frozen) {
    for (disk, name) in DISKS.into_iter().enumerate() {
        let view = frozen.snapshot.view(name).unwrap();
        let now = numbers(view);
        if let Some(before) = &frozen.found[disk] {
            assert!(*before == now, "view '{}' of disk {name} changed", frozen.snapshot.name());
            continue;
        }
        let first = disk * BLOCKS as usize;
        for (block, number) in now.iter().enumerate() {
            let allowed = frozen.at_least[first + block]..=frozen.at_most[first + block];
            assert!(allowed.contains(number), "disk {name}, block {block}: {number} is not in {allowed:?}");
        }
        check_status(view, &now);
        frozen.found[disk] = Some(now);
    }
    if let [Some(a), Some(b)] = &frozen.found {
        // A is stamped before B.
        let ahead = a.iter().zip(b).position(|(a, b)| b > a || b + 1 < *a);
        assert_eq!(ahead, None, "view '{}' is not of one instant", frozen.snapshot.name());
    }
}

/// What is said to be a hole reads as zeros.
fn check_status(view: &View, now: &[u64]) {
    let mut at = 0;
    while at < view.size() {
        let status = view.block_status(at, view.size() - at).unwrap();
        let blocks = at as usize / BLOCK..(at + status.len).div_ceil(BLOCK as u64) as usize;
        assert!(!status.zero || now[blocks].iter().all(|number| *number == 0), "a hole at {at} that is none");
        at += status.len;
    }
}

/// What differs between two views is in the newer one's map since the older one's checkpoint.
fn check_map(older: &Frozen, newer: &Frozen) {
    for (disk, name) in DISKS.into_iter().enumerate() {
        let (Some(old), Some(new)) = (&older.found[disk], &newer.found[disk]) else { continue };
        let view = newer.snapshot.view(name).unwrap();
        let base = older.snapshot.uuid();
        if view.since().iter().all(|point| point.uuid != base) {
            continue;
        }
        let map = view.map(Some(base)).unwrap();
        assert_eq!(map.everything(), None);
        for (block, (old, new)) in old.iter().zip(new).enumerate() {
            let offset = (block * BLOCK) as u64;
            assert!(old == new || map.dirty_run(offset, 1).0, "block {block} of disk {name} is not in the map");
        }
        assert!(map.dirty_bytes() <= view.size().next_multiple_of(GRANULE));
    }
}

fn run(stress: &Arc<Stress>) {
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS).map(|index| scope.spawn(move || stress.write(index))).collect();
        let snapshots = scope.spawn(move || stress.snapshots()).join();
        stress.end.store(true, Ordering::SeqCst);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        snapshots.unwrap();
    });
    let live = stress.fleece.disk("a").unwrap();
    let mut block = vec![0; 8];
    for (index, done) in stress.numbers.done[..BLOCKS as usize].iter().enumerate() {
        live.read(&mut block, (index * BLOCK) as u64).unwrap();
        assert_eq!(u64::from_le_bytes(block[..].try_into().unwrap()), done.load(Ordering::SeqCst));
    }
    stress.fleece.close().unwrap();
}

#[test]
fn views_in_memory_never_change() {
    let place = || {
        let image = RawImage::over(MemFile::new("image", BLOCKS * BLOCK as u64).shared(), false).unwrap();
        (Arc::new(image) as Arc<dyn Image>, Arc::new(MemDir::new()) as Arc<dyn Dir>)
    };
    run(&Stress::new([place(), place()], Arc::new(HeapShmRoot::new())));
}

#[test]
fn views_on_files_never_change() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| {
        let path = dir.path().join(format!("{name}.raw"));
        std::fs::File::create(&path).unwrap().set_len(BLOCKS * BLOCK as u64).unwrap();
        let image = RawImage::open(Path::new(&path), false, Cache::Writeback).unwrap();
        let state = OsDir::create(&dir.path().join(format!("{name}.fleece"))).unwrap();
        (Arc::new(image) as Arc<dyn Image>, Arc::new(state) as Arc<dyn Dir>)
    };
    run(&Stress::new([place("a"), place("b")], Arc::new(OsShmRoot)));
}
