//! Sessions cut at every change.
//!
//! At each instant the image is judged as a kill leaves it, and as power losses leave it: every subset of the unsynced
//! sectors where there are few, seeded subsets beyond. What was judged already is not judged again.

use crate::images::{Prepared, Recipe, has_qemu};
use crate::judge::{Depth, judge};
use crate::oracle::{Loss, Oracle};
use crate::qemu;
use crate::recorder::Medium;
use crate::session::{Dice, Op, Recording, play, play_script, play_together, story};
use std::collections::HashSet;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

/// How much is done for one recipe.
pub struct Effort {
    /// Images to judge at least, in whole sessions.
    images: usize,
    /// Operations of a session.
    operations: usize,
    /// Changes in a row that a session is cut at.
    window: usize,
    /// Things that can be lost up to which all subsets are judged.
    all_up_to: usize,
    /// Subsets beyond.
    seeds: u64,
    /// Of so many images one goes to QEMU.
    qemu_one_in: usize,
}

impl Effort {
    fn is_full() -> bool {
        std::env::var_os("FLEECEFS_FULL").is_some()
    }

    fn of_sessions() -> Effort {
        if Effort::is_full() {
            Effort { images: 750, operations: 20, window: usize::MAX, all_up_to: 10, seeds: 4, qemu_one_in: 20 }
        } else {
            Effort { images: 56, operations: 40, window: 28, all_up_to: 1, seeds: 1, qemu_one_in: 50 }
        }
    }

    /// A script is short, and meant to be cut everywhere.
    pub fn of_scripts() -> Effort {
        let all_up_to = if Effort::is_full() { 10 } else { 3 };
        Effort { images: 1, operations: 0, window: usize::MAX, all_up_to, seeds: 4, qemu_one_in: 50 }
    }
}

/// Who is at the disk.
#[derive(Debug, Clone, Copy)]
pub enum Guest {
    /// One that does this and that.
    Any,
    /// Several of these at once.
    Several,
    Script(&'static [Op]),
}

/// Images that all tests of this process have judged, and those that QEMU repaired.
static JUDGED: AtomicUsize = AtomicUsize::new(0);
static REPAIRED_BY_QEMU: AtomicUsize = AtomicUsize::new(0);

/// Images that were judged, of one recipe.
struct Bench<'a> {
    prepared: &'a Prepared,
    effort: &'a Effort,
    guest: Guest,
    judged: usize,
    /// Number of the next image for QEMU, which has several ways to look at one.
    shown_to_qemu: usize,
    repaired_by_qemu: usize,
}

impl Bench<'_> {
    /// Cuts one session everywhere.
    fn session(&mut self, seed: u64) {
        let medium = Medium::of(self.prepared);
        let working = medium.kill();
        let oracle = Oracle::new(&self.prepared.content, self.prepared.content.len() as u64 * 3 / 2);
        let (files, operations) = (working.files(), self.effort.operations);
        let recording = match self.guest {
            Guest::Any => play(self.prepared, &files, oracle, seed, operations),
            Guest::Several => play_together(self.prepared, &files, oracle, seed, operations),
            Guest::Script(script) => play_script(self.prepared, &files, oracle, script),
        };
        let instants = recording.events.len();
        let window = self.effort.window.min(instants + 1);
        let first = Dice::new(seed).roll((instants + 2 - window) as u64) as usize;
        let mut seen = HashSet::new();
        for instant in 0..first + window {
            if instant > 0 {
                medium.apply(&recording.events[instant - 1]);
            }
            if instant >= first {
                self.instant(&medium, &recording, instant, seed, &mut seen);
            }
        }
    }

    fn instant(
        &mut self,
        medium: &Medium,
        recording: &Recording,
        instant: usize,
        seed: u64,
        seen: &mut HashSet<(usize, u64)>,
    ) {
        let settled = recording.oracle.settled(instant, Loss::Power);
        let mut power = |left: Medium, bench: &mut Self, number: u64| {
            if seen.insert((settled, left.fingerprint())) {
                bench.judge(&left, recording, (instant, Loss::Power), (seed, number));
            }
        };
        match medium.all_survivors(self.effort.all_up_to) {
            Some(all) => all.zip(0..).for_each(|(left, number)| power(left, self, number)),
            None => (0..self.effort.seeds).for_each(|number| {
                let choice = seed << 32 | (instant as u64) << 8 | number;
                power(medium.survivor(choice), self, number);
            }),
        }
        if self.effort.window == usize::MAX || instant.is_multiple_of(4) {
            self.judge(&medium.kill(), recording, (instant, Loss::Kill), (seed, 0));
        }
    }

    fn judge(&mut self, left: &Medium, recording: &Recording, crash: (usize, Loss), (seed, number): (u64, u64)) {
        self.judged += 1;
        let depth = match self.judged % 8 {
            0 => Depth::Session,
            3 | 5 => Depth::Repair,
            _ => Depth::Image,
        };
        let choice = seed << 20 | self.judged as u64;
        let done = catch_unwind(AssertUnwindSafe(|| {
            let content = judge(self.prepared, left, &recording.oracle, crash, (depth, choice));
            if self.judged.is_multiple_of(self.effort.qemu_one_in) {
                let repaired = qemu::judge(self.prepared, left, &content, self.shown_to_qemu);
                self.shown_to_qemu += 1;
                self.repaired_by_qemu += usize::from(repaired);
            }
        }));
        if done.is_err() {
            let (instant, loss) = crash;
            let near = instant.saturating_sub(12)..(instant + 2).min(recording.events.len());
            let events: Vec<String> = near.clone().map(|at| format!("  {at} {}", recording.events[at])).collect();
            panic!(
                "session {seed}, cut at {instant} of {} ({loss:?}, subset {number})\n{}\nchanges:\n{}",
                recording.events.len(),
                story(self.prepared, &recording.steps, instant),
                events.join("\n")
            );
        }
    }
}

/// Every recipe, cut until enough was judged.
fn cut(test: &str, recipes: &[Recipe]) {
    let cases: Vec<_> = recipes.iter().map(|recipe| (*recipe, Guest::Any)).collect();
    cut_cases(test, &cases, &Effort::of_sessions());
}

/// Every recipe with its guest.
pub fn cut_cases(test: &str, cases: &[(Recipe, Guest)], effort: &Effort) {
    if !has_qemu(test) {
        return;
    }
    let (mut judged, mut repaired) = (0, 0);
    for (index, (recipe, guest)) in cases.iter().enumerate() {
        let prepared = Prepared::make(*recipe);
        let (guest, shown_to_qemu) = (*guest, index);
        let mut bench = Bench { prepared: &prepared, effort, guest, judged: 0, shown_to_qemu, repaired_by_qemu: 0 };
        for seed in 1.. {
            bench.session(seed);
            if bench.judged >= effort.images {
                break;
            }
        }
        judged += bench.judged;
        repaired += bench.repaired_by_qemu;
    }
    let sum = |all: &AtomicUsize, these| all.fetch_add(these, Ordering::Relaxed) + these;
    // Not held back as what a test prints is.
    let _ = writeln!(
        std::io::stderr(),
        "{test}: {judged} images reopened, {repaired} of them repaired by qemu-img; so far {} and {}",
        sum(&JUDGED, judged),
        sum(&REPAIRED_BY_QEMU, repaired)
    );
}

const K: u64 = 1024;
const M: u64 = 1024 * K;

#[test]
fn plain_images_keep_what_was_flushed() {
    cut(
        "plain_images_keep_what_was_flushed",
        &[
            Recipe::new("cluster_size=4k", 300 * K).long(),
            Recipe::new("cluster_size=512", 100 * K).full(),
            Recipe::new("cluster_size=64k", 2 * M - 512),
            Recipe::new("cluster_size=4k,refcount_bits=1", 300 * K).direct(),
            Recipe::new("cluster_size=4k,lazy_refcounts=on", 300 * K),
            Recipe::new("cluster_size=4k,preallocation=metadata", 200 * K).empty(),
        ],
    );
}

#[test]
fn version_2_images_keep_what_was_flushed_and_lose_clusters_at_most() {
    cut(
        "version_2_images_keep_what_was_flushed_and_lose_clusters_at_most",
        &[
            Recipe::new("compat=0.10,cluster_size=4k", 300 * K).long(),
            Recipe::new("compat=0.10,cluster_size=512", 100 * K).snapshots(),
            Recipe::new("compat=0.10,cluster_size=64k", M).based(M / 2),
            Recipe::new("compat=0.10,cluster_size=4k", 200 * K).compressed().snapshots(),
        ],
    );
}

#[test]
fn overlays_keep_what_lies_below() {
    cut(
        "overlays_keep_what_lies_below",
        &[
            Recipe::new("cluster_size=4k", 300 * K).based(300 * K).empty().long(),
            Recipe::new("cluster_size=64k", M).based(700 * K),
            // The base is larger: what a growth uncovers is zeros.
            Recipe::new("cluster_size=4k", 200 * K).based(400 * K).direct(),
            Recipe::new("cluster_size=512", 100 * K).based(50 * K),
        ],
    );
}

#[test]
fn images_with_subclusters_keep_what_was_flushed() {
    cut(
        "images_with_subclusters_keep_what_was_flushed",
        &[
            Recipe::new("extended_l2=on,cluster_size=16k", M),
            Recipe::new("extended_l2=on,cluster_size=64k", M).based(M).empty().long(),
            Recipe::new("extended_l2=on,cluster_size=16k", 500 * K).based(300 * K).snapshots(),
        ],
    );
}

#[test]
fn compressed_clusters_are_copied_out_safely() {
    cut(
        "compressed_clusters_are_copied_out_safely",
        &[
            Recipe::new("cluster_size=4k", 200 * K).compressed().full().long(),
            Recipe::new("cluster_size=16k,compression_type=zstd", 600 * K).compressed().based(600 * K),
            Recipe::new("cluster_size=16k,extended_l2=on", 500 * K).compressed().snapshots(),
        ],
    );
}

#[test]
fn clusters_written_compressed_are_whole_or_what_they_were() {
    cut(
        "clusters_written_compressed_are_whole_or_what_they_were",
        &[
            Recipe::new("cluster_size=4k", 200 * K).packs().long(),
            Recipe::new("cluster_size=512", 100 * K + 512).packs().empty(),
            Recipe::new("cluster_size=16k,compression_type=zstd", 600 * K).packs().based(600 * K).compressed(),
            Recipe::new("cluster_size=16k,extended_l2=on,refcount_bits=1", 500 * K).packs().empty().direct(),
        ],
    );
}

#[test]
fn internal_snapshots_and_bitmaps_stay() {
    cut(
        "internal_snapshots_and_bitmaps_stay",
        &[
            Recipe::new("cluster_size=4k", 200 * K).snapshots().bitmaps().long(),
            Recipe::new("cluster_size=512,refcount_bits=2", 100 * K).snapshots(),
            Recipe::new("cluster_size=64k,refcount_bits=64", M).snapshots().bitmaps().direct(),
        ],
    );
}

#[test]
fn external_data_files_keep_what_was_flushed() {
    cut(
        "external_data_files_keep_what_was_flushed",
        &[
            Recipe::new("cluster_size=4k,data_file=DATA", 300 * K),
            Recipe::new("cluster_size=64k,data_file=DATA,data_file_raw=on", M),
            Recipe::new("cluster_size=16k,extended_l2=on,data_file=DATA", 500 * K).based(300 * K),
        ],
    );
}

/// A sync that serves several callers serves those alone who had written before it began.
#[test]
fn guests_that_write_at_once_keep_what_each_flushed() {
    let recipes = [
        Recipe::new("cluster_size=4k", 100 * K).based(100 * K).long(),
        Recipe::new("cluster_size=4k", 100 * K).compressed().snapshots(),
        Recipe::new("cluster_size=16k,extended_l2=on,data_file=DATA", 300 * K),
        Recipe::new("compat=0.10,cluster_size=4k", 100 * K),
    ];
    let test = "guests_that_write_at_once_keep_what_each_flushed";
    cut_cases(test, &recipes.map(|recipe| (recipe, Guest::Several)), &Effort::of_sessions());
}

/// The refcount table's one cluster is nearly used up; the L1 table's, too.
#[test]
fn tables_grow_safely() {
    cut(
        "tables_grow_safely",
        &[
            Recipe::new("cluster_size=512,refcount_bits=64,preallocation=metadata", 1_900 * K)
                .empty()
                .resized(2_100 * K),
            Recipe::new("cluster_size=512", 2 * M - 20 * K),
            Recipe::new("compat=0.10,cluster_size=512,preallocation=metadata", 7_900 * K).empty().resized(8_400 * K),
        ],
    );
}
