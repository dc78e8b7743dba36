//! Threads that change one image at the same time.

use crate::cells::{CELL, Cells};
use crate::driver::{self, Files};
use crate::images::{Prepared, Recipe, bytes_of, has_qemu};
use fleecefs::image::Image;
use fleecefs::image::qcow2::Qcow2Image;
use fleecefs::image::qcow2::check::check;
use fleecefs::storage::os::{OpenOptions, OsFile};
use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// A small generator: the order of things is the scheduler's, so a seed would not repeat a run.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides.max(1) as u64) as usize
    }
}

/// So many times the ordinary size.
pub fn scale() -> usize {
    if std::env::var_os("FLEECEFS_FULL").is_some() { 20 } else { 1 }
}

/// Operations that all tests of this process have asked images for.
static ASKED: AtomicU64 = AtomicU64::new(0);

/// At the end of a test, not held back as what a test prints is.
fn tell(test: &str) {
    let _ = writeln!(std::io::stderr(), "{test}: so far {} operations", ASKED.load(Ordering::Relaxed));
}

/// What owners do, in parts of a hundred; the rest are reads of any range.
#[derive(Debug, Clone, Copy)]
struct Mix {
    write: usize,
    zero: usize,
    discard: usize,
    flush: usize,
}

const MIXED: Mix = Mix { write: 50, zero: 12, discard: 12, flush: 1 };

/// Threads that own interleaved pieces of a disk.
#[derive(Debug, Clone, Copy)]
struct Scene {
    recipe: Recipe,
    owners: usize,
    /// Bytes of a piece.
    piece: usize,
    mix: Mix,
    tiny_cache: bool,
    /// Images, one after the other, each with its first touches.
    rounds: usize,
    /// Operations of each owner in a round.
    operations: usize,
    /// A thread makes the disk larger meanwhile, up to this.
    grows_to: u64,
    /// On a file system instead of in memory.
    real_file: bool,
}

impl Scene {
    const fn new(recipe: Recipe, owners: usize, piece: usize) -> Scene {
        Scene {
            recipe,
            owners,
            piece,
            mix: MIXED,
            tiny_cache: false,
            rounds: 4,
            operations: 4000,
            grows_to: 0,
            real_file: false,
        }
    }

    fn run(&self) {
        let prepared = Prepared::make(self.recipe);
        for round in 0..self.rounds * scale() {
            let (files, _dir) = if self.real_file { on_disk(&prepared) } else { (prepared.files(), None) };
            self.round(&prepared, &files, round as u64);
        }
    }

    fn round(&self, prepared: &Prepared, files: &Files, round: u64) {
        let image = driver::read_write(files, prepared, self.tiny_cache).unwrap();
        let cells = Cells::new(&prepared.content, self.grows_to.max(prepared.content.len() as u64));
        let place = AtomicUsize::new(0);
        let busy = AtomicUsize::new(self.owners);
        std::thread::scope(|scope| {
            for owner in 0..self.owners {
                let (image, cells, place, busy) = (&image, &cells, &place, &busy);
                scope.spawn(move || {
                    let _end = Leaves(busy);
                    let dice = Dice::new(round << 8 | owner as u64);
                    Owner { scene: self, owner, image, cells, place, dice, number: 0, buf: Vec::new() }.work();
                });
            }
            if self.grows_to > 0 {
                let (image, busy, cells) = (&image, &busy, &cells);
                scope.spawn(move || grow(image, cells, self.grows_to, busy));
            }
        });
        finish(prepared, files, image, &cells, &format!("{self:?}"));
    }
}

/// Counts a thread as gone, also one that panicked.
struct Leaves<'a>(&'a AtomicUsize);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Makes the disk larger, little by little.
fn grow(image: &Qcow2Image, cells: &Cells, most: u64, busy: &AtomicUsize) {
    let step = ((most - image.size()) / 40 / CELL as u64 * CELL as u64).max(512);
    let mut buf = Vec::new();
    while busy.load(Ordering::SeqCst) > 0 && image.size() < most {
        let old = image.size();
        image.resize((old + step).min(most)).unwrap();
        cells.read(image, old as usize / CELL..image.size() as usize / CELL, &mut buf, "what was added");
        (0..20).for_each(|_| std::thread::yield_now());
    }
}

/// With all threads gone: every cell is right, also after the close, and nothing is wrong with the image.
fn finish(prepared: &Prepared, files: &Files, image: Qcow2Image, cells: &Cells, what: &str) {
    cells.read_all(&image, what);
    image.close().unwrap();
    cells.read_all(&image, what);
    drop(image);
    let report = check(&*files.image).unwrap();
    assert!(report.is_clean() && !report.dirty, "{what}: {report:?}");
    cells.read_all(&driver::read_only(files, prepared, None).unwrap(), what);
    for (name, content) in &prepared.snapshots {
        let snapshot = driver::read_only(files, prepared, Some(name)).unwrap();
        assert!(bytes_of(&snapshot).unwrap() == *content, "{what}: internal snapshot {name}");
    }
}

/// The files of an image in a directory.
fn on_disk(prepared: &Prepared) -> (Files, Option<tempfile::TempDir>) {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let options = OpenOptions { write: true, ..Default::default() };
        let file: fleecefs::storage::SharedStorage = Arc::new(OsFile::open(&path, &options).unwrap());
        file
    };
    let data = prepared.data.as_ref().map(|bytes| put("data", bytes));
    (Files { image: put("image", &prepared.image), data }, Some(dir))
}

struct Owner<'a> {
    scene: &'a Scene,
    owner: usize,
    image: &'a Qcow2Image,
    cells: &'a Cells,
    /// A cell near which all owners work.
    place: &'a AtomicUsize,
    dice: Dice,
    number: u64,
    buf: Vec<u8>,
}

impl Owner<'_> {
    fn work(&mut self) {
        for _ in 0..self.scene.operations {
            let Mix { write, zero, discard, flush } = self.scene.mix;
            let sum = [write, write + zero, write + zero + discard, write + zero + discard + flush];
            match self.dice.roll(100) {
                n if n < sum[0] => self.change(None),
                n if n < sum[1] => self.change(Some(false)),
                n if n < sum[2] => self.change(Some(true)),
                n if n < sum[3] => self.image.flush().unwrap(),
                _ => self.read(),
            }
        }
        ASKED.fetch_add(self.scene.operations as u64, Ordering::Relaxed);
    }

    fn count(&self) -> usize {
        (self.image.size() as usize / CELL).min(self.cells.count())
    }

    /// Some cells of one of its pieces: all of them, or a part.
    fn own(&mut self) -> Option<Range<usize>> {
        if self.dice.roll(40) == 0 {
            self.place.store(self.dice.roll(self.count()), Ordering::Relaxed);
        }
        let near = match self.dice.roll(4) {
            0 => self.dice.roll(self.count()),
            _ => self.place.load(Ordering::Relaxed) + self.dice.roll(4 * self.scene.piece / CELL),
        };
        let piece = self.scene.piece / CELL;
        let turn = piece * self.scene.owners;
        let start = near / turn * turn + self.owner * piece;
        let end = (start + piece).min(self.count());
        if start >= end {
            return None;
        }
        if self.dice.roll(3) == 0 {
            return Some(start..end);
        }
        let first = start + self.dice.roll(end - start);
        Some(first..first + 1 + self.dice.roll(end - first))
    }

    fn change(&mut self, zeros: Option<bool>) {
        let Some(range) = self.own() else { return };
        // Odd numbers write, even ones zero.
        self.number += if (self.number + 1) % 2 == u64::from(zeros.is_none()) { 1 } else { 2 };
        let (offset, len) = ((range.start * CELL) as u64, (range.len() * CELL) as u64);
        self.cells.begin(range.clone(), self.number);
        let done = match zeros {
            None => self.image.write_at(&self.cells.bytes(range.clone(), self.number), offset),
            Some(discard) => self.image.write_zeroes(offset, len, discard),
        };
        done.unwrap_or_else(|e| panic!("{:?}: {range:?}: {e}", self.scene));
        self.cells.end(range.clone(), self.number);
        if self.dice.roll(2) == 0 {
            self.cells.read(self.image, range, &mut self.buf, "own cells");
        }
    }

    fn read(&mut self) {
        let near =
            if self.dice.roll(2) == 0 { self.place.load(Ordering::Relaxed) } else { self.dice.roll(self.count()) };
        let start = near.min(self.count() - 1);
        let end = (start + 1 + self.dice.roll(300)).min(self.count());
        self.cells.read(self.image, start..end, &mut self.buf, "any cells");
    }
}

const K: u64 = 1024;

/// Small clusters, so that few bytes make many of them.
const SMALL: Recipe = Recipe::new("cluster_size=4k", 512 * K);

fn play(test: &str, scenes: &[Scene]) {
    if has_qemu(test) {
        scenes.iter().for_each(Scene::run);
        tell(test);
    }
}

#[test]
fn zeros_and_writes_in_one_cluster_keep_each_others_bytes() {
    let mix = Mix { write: 40, zero: 20, discard: 20, flush: 0 };
    play(
        "zeros_and_writes_in_one_cluster_keep_each_others_bytes",
        &[
            Scene { mix, ..Scene::new(SMALL, 2, 2048) },
            Scene { mix, ..Scene::new(SMALL, 4, 64) },
            Scene { mix, ..Scene::new(SMALL.based(300 * K).empty(), 3, 512) },
            Scene { mix, ..Scene::new(Recipe::new("compat=0.10,cluster_size=4k", 256 * K).based(300 * K), 2, 512) },
            Scene { mix, real_file: true, rounds: 1, ..Scene::new(SMALL, 2, 1024) },
        ],
    );
}

#[test]
fn readers_beside_discards_see_old_bytes_new_bytes_or_zeros() {
    let mix = Mix { write: 25, zero: 5, discard: 25, flush: 1 };
    play(
        "readers_beside_discards_see_old_bytes_new_bytes_or_zeros",
        &[
            Scene { mix, ..Scene::new(SMALL, 3, 4096) },
            Scene { mix, ..Scene::new(SMALL.snapshots(), 3, 8192) },
            Scene { mix, ..Scene::new(Recipe::new("compat=0.10,cluster_size=4k", 512 * K), 3, 4096) },
            Scene { mix, ..Scene::new(Recipe::new("cluster_size=4k,data_file=DATA", 512 * K), 3, 4096) },
            Scene { mix, real_file: true, rounds: 1, ..Scene::new(SMALL, 3, 4096) },
        ],
    );
}

#[test]
fn allocating_writers_leave_overwriters_alone() {
    let mix = Mix { write: 80, zero: 0, discard: 4, flush: 2 };
    play(
        "allocating_writers_leave_overwriters_alone",
        &[
            Scene { mix, rounds: 12, operations: 1500, ..Scene::new(SMALL, 3, 4096) },
            Scene { mix, rounds: 12, operations: 1500, ..Scene::new(SMALL.snapshots(), 3, 1024) },
            Scene {
                mix,
                rounds: 12,
                operations: 1500,
                ..Scene::new(Recipe::new("compat=0.10,cluster_size=512", 300 * K), 3, 512)
            },
        ],
    );
}

/// Every change of an entry meets tables that are dropped and loaded again.
#[test]
fn tables_that_come_and_go_lose_no_change() {
    let scene = |recipe, piece| Scene { tiny_cache: true, operations: 3000, ..Scene::new(recipe, 3, piece) };
    play(
        "tables_that_come_and_go_lose_no_change",
        &[
            scene(Recipe::new("cluster_size=512", 2048 * K), 512),
            scene(Recipe::new("cluster_size=512", 1024 * K).snapshots(), 256),
            scene(Recipe::new("compat=0.10,cluster_size=512", 1024 * K), 1024),
            scene(Recipe::new("cluster_size=16k,extended_l2=on", 64 << 20).empty(), 4096),
        ],
    );
}

#[test]
fn subclusters_of_one_cluster_have_writers_of_their_own() {
    let recipe = Recipe::new("cluster_size=16k,extended_l2=on", 512 * K);
    play(
        "subclusters_of_one_cluster_have_writers_of_their_own",
        &[
            Scene::new(recipe, 4, 512),
            Scene::new(recipe, 3, 256),
            Scene::new(recipe.based(512 * K).empty(), 3, 1024),
            Scene { rounds: 10, operations: 1500, ..Scene::new(recipe.compressed().snapshots(), 3, 2048) },
        ],
    );
}

/// Freed clusters are used again while readers still look at what was in them.
#[test]
fn readers_of_compressed_clusters_meet_no_reused_ones() {
    let mix = Mix { write: 30, zero: 2, discard: 4, flush: 6 };
    let scene = |recipe, piece| Scene { mix, rounds: 30, operations: 600, ..Scene::new(recipe, 3, piece) };
    let recipe = Recipe::new("cluster_size=4k", 1024 * K).compressed();
    play(
        "readers_of_compressed_clusters_meet_no_reused_ones",
        &[
            scene(recipe, 4096),
            scene(recipe.based(512 * K), 1024),
            scene(Recipe::new("compat=0.10,cluster_size=4k", 512 * K).compressed(), 4096),
            scene(Recipe::new("cluster_size=64k,compression_type=zstd", 2048 * K).compressed(), 8192),
        ],
    );
}

#[test]
fn a_growing_disk_loses_no_write() {
    let scene = |recipe, most| Scene { grows_to: most, rounds: 10, operations: 1500, ..Scene::new(recipe, 3, 1024) };
    play(
        "a_growing_disk_loses_no_write",
        &[
            scene(Recipe::new("cluster_size=512", 200 * K), 3000 * K),
            scene(Recipe::new("cluster_size=4k", 100 * K).based(400 * K), 500 * K),
            // Clusters with old bytes in them are used for the last, partial, cluster of the disk.
            scene(Recipe::new("cluster_size=64k", 2048 * K).compressed(), 3000 * K),
            scene(Recipe::new("cluster_size=16k,extended_l2=on,data_file=DATA", 100 * K), 2000 * K),
        ],
    );
}

/// All threads step through the clusters together; each has its part of every one of them.
fn first_touches(recipe: Recipe, threads: usize, interleaved: bool, zeros: fn(usize, usize) -> Option<bool>) {
    let prepared = Prepared::make(recipe);
    let what = format!("{recipe:?}, {threads} threads, interleaved {interleaved}");
    for round in 0..6 * scale() {
        let files = prepared.files();
        let image = driver::read_write(&files, &prepared, round % 3 == 2).unwrap();
        let cells = Cells::new(&prepared.content, prepared.content.len() as u64);
        let per_cluster = prepared.cluster_size as usize / CELL;
        let arrived = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (image, cells, arrived, failed) = (&image, &cells, &arrived, &failed);
                scope.spawn(move || {
                    let _guard = Fails(failed);
                    for cluster in 0..cells.count() / per_cluster {
                        arrived.fetch_add(1, Ordering::SeqCst);
                        wait_until(|| {
                            assert!(!failed.load(Ordering::SeqCst), "another thread failed");
                            arrived.load(Ordering::SeqCst) >= (cluster + 1) * threads
                        });
                        let number = match zeros(thread, cluster + round) {
                            None => 1,
                            Some(_) => 2,
                        };
                        for range in parts(cluster * per_cluster, per_cluster, thread, threads, interleaved) {
                            let (offset, len) = ((range.start * CELL) as u64, (range.len() * CELL) as u64);
                            cells.begin(range.clone(), number);
                            match zeros(thread, cluster + round) {
                                None => image.write_at(&cells.bytes(range.clone(), number), offset).unwrap(),
                                Some(discard) => image.write_zeroes(offset, len, discard).unwrap(),
                            }
                            cells.end(range, number);
                            ASKED.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        finish(&prepared, &files, image, &cells, &what);
    }
}

/// Spins for a moment, so that threads go on at the same time, then lets others have the processor.
fn wait_until(done: impl Fn() -> bool) {
    for turn in 0.. {
        if done() {
            return;
        }
        if turn < 200 { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}

/// Tells the others that they wait in vain.
struct Fails<'a>(&'a AtomicBool);

impl Drop for Fails<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::SeqCst);
        }
    }
}

/// The cells of a cluster that a thread has: one run, or two that others stand between.
fn parts(first: usize, count: usize, thread: usize, threads: usize, interleaved: bool) -> Vec<Range<usize>> {
    let pieces = if interleaved { 2 * threads } else { threads };
    let border = |piece: usize| first + count * piece / pieces;
    (0..pieces).filter(|piece| piece % threads == thread).map(|piece| border(piece)..border(piece + 1)).collect()
}

const FIRST_TOUCHED: [Recipe; 6] = [
    Recipe::new("cluster_size=4k", 1024 * K).empty(),
    Recipe::new("cluster_size=4k", 512 * K).based(512 * K).empty(),
    Recipe::new("cluster_size=4k", 1024 * K).compressed(),
    Recipe::new("cluster_size=4k", 512 * K).snapshots(),
    Recipe::new("cluster_size=16k,extended_l2=on", 1024 * K).based(700 * K).empty(),
    Recipe::new("compat=0.10,cluster_size=4k", 256 * K).based(256 * K),
];

#[test]
fn first_writers_of_a_cluster_keep_each_others_bytes() {
    if !has_qemu("first_writers_of_a_cluster_keep_each_others_bytes") {
        return;
    }
    for recipe in FIRST_TOUCHED {
        for (threads, interleaved) in [(2, false), (2, true), (3, true)] {
            first_touches(recipe, threads, interleaved, |_, _| None);
        }
    }
    tell("first_writers_of_a_cluster_keep_each_others_bytes");
}

#[test]
fn a_first_writer_beside_one_that_zeroes_keeps_its_bytes() {
    if !has_qemu("a_first_writer_beside_one_that_zeroes_keeps_its_bytes") {
        return;
    }
    for recipe in FIRST_TOUCHED {
        for (threads, interleaved) in [(2, false), (3, true)] {
            first_touches(recipe, threads, interleaved, |thread, turn| match (thread + turn) % threads_of(turn) {
                0 => None,
                1 => Some(true),
                _ => Some(false),
            });
        }
    }
    tell("a_first_writer_beside_one_that_zeroes_keeps_its_bytes");
}

fn threads_of(turn: usize) -> usize {
    2 + turn % 2
}

/// A write in place runs into a discard of the whole cluster, with or without a rewrite after it. What was there before
/// is gone for good; what the write put there while the cluster was discarded does not come back later.
#[test]
fn a_discard_beside_an_overwrite_brings_nothing_back() {
    if !has_qemu("a_discard_beside_an_overwrite_brings_nothing_back") {
        return;
    }
    let recipes = [
        Recipe::new("cluster_size=4k", 64 * K),
        Recipe::new("cluster_size=16k,extended_l2=on", 256 * K),
        Recipe::new("compat=0.10,cluster_size=4k", 64 * K),
        Recipe::new("cluster_size=4k,data_file=DATA", 64 * K),
    ];
    for recipe in recipes {
        for rewrite in [false, true] {
            let prepared = Prepared::make(recipe);
            let files = prepared.files();
            let image = driver::read_write(&files, &prepared, false).unwrap();
            overwrite_and_discard(&image, prepared.cluster_size as usize, rewrite);
            image.close().unwrap();
            let report = check(&*files.image).unwrap();
            assert!(report.is_clean(), "{report:?}");
        }
    }
    tell("a_discard_beside_an_overwrite_brings_nothing_back");
}

fn overwrite_and_discard(image: &Qcow2Image, cluster: usize, rewrite: bool) {
    let turn = AtomicU64::new(0);
    let rounds = 6000 * scale() as u64;
    let (part, other) = (cluster / 4..cluster / 2, cluster / 2..cluster * 3 / 4);
    let overwritten = part.clone();
    // Turn 2n: both may begin; 2n + 1: the other one has done its part.
    std::thread::scope(|scope| {
        let turn = &turn;
        scope.spawn(move || {
            for round in 0..rounds {
                wait_until(|| turn.load(Ordering::SeqCst) > 2 * round);
                image.write_at(&vec![0xA0; overwritten.len()], overwritten.start as u64).unwrap();
                turn.fetch_add(1, Ordering::SeqCst);
            }
        });
        let mut bytes = vec![0; cluster];
        for round in 0..rounds {
            image.write_at(&vec![0x01; cluster], 0).unwrap();
            turn.store(2 * round + 1, Ordering::SeqCst);
            image.write_zeroes(0, cluster as u64, true).unwrap();
            if rewrite {
                image.write_at(&vec![0xB0; cluster], 0).unwrap();
            }
            wait_until(|| turn.load(Ordering::SeqCst) == 2 * round + 2);
            let ground = if rewrite { 0xB0 } else { 0 };
            image.read_at(&mut bytes, 0).unwrap();
            let held = bytes[part.clone()].to_vec();
            let what = format!("round {round}, rewrite {rewrite}");
            assert!(held.iter().all(|byte| [0xA0, ground].contains(byte)), "{what}: {:?}", &held[..16]);
            image.write_at(&vec![0xC0; other.len()], other.start as u64).unwrap();
            image.read_at(&mut bytes, 0).unwrap();
            assert!(bytes[part.clone()] == held, "{what}: what a discard took came back");
            let rest = bytes[..part.start].iter().chain(&bytes[other.end..]);
            assert!(rest.into_iter().all(|byte| *byte == ground), "{what}");
        }
        // In a round: three or four writes, a discard, two reads.
        ASKED.fetch_add(rounds * if rewrite { 7 } else { 6 }, Ordering::Relaxed);
    });
}
