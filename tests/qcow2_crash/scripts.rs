//! Sessions of a few operations, each through one rule of the order of writes, cut everywhere.

use crate::images::Recipe;
use crate::power::{Effort, Guest, cut_cases};
use crate::session::Op::{self, Discard, Flush, Pack, Read, Resize, Write, Zero};

const K: u64 = 1024;
const M: u64 = 1024 * K;

fn cut(test: &str, script: &'static [Op], recipes: &[Recipe]) {
    let cases: Vec<_> = recipes.iter().map(|recipe| (*recipe, Guest::Script(script))).collect();
    cut_cases(test, &cases, &Effort::of_scripts());
}

/// A subcluster was zeroed by its flag alone, so old bytes are below. The hole that a discard makes of them is not
/// there after a power loss.
#[test]
fn a_hole_that_is_not_durable_is_no_zeros() {
    cut(
        "a_hole_that_is_not_durable_is_no_zeros",
        &[Write(0..32 * K), Flush, Zero(0..4 * K), Flush, Discard(0..32 * K), Write(1024..1536), Write(2048..2560)],
        &[Recipe::new("extended_l2=on,cluster_size=32k", 256 * K).empty()],
    );
}

/// The file's new length is durable before a table points there.
#[test]
fn nothing_points_behind_the_end_of_the_file() {
    cut(
        "nothing_points_behind_the_end_of_the_file",
        &[Write(204 * K..208 * K), Write(220 * K..221 * K), Flush],
        &[
            Recipe::new("cluster_size=4k", 300 * K).empty(),
            Recipe::new("cluster_size=512", 300 * K).based(250 * K),
            Recipe::new("compat=0.10,cluster_size=4k", 300 * K).empty(),
        ],
    );
}

/// A table that internal snapshots have, too, is copied; the copy is durable before the L1 table points to it.
#[test]
fn a_copied_table_is_there_when_it_counts() {
    cut(
        "a_copied_table_is_there_when_it_counts",
        &[Write(8 * K..9 * K), Discard(40 * K..44 * K), Flush],
        &[
            Recipe::new("cluster_size=512", 100 * K).snapshots().long(),
            Recipe::new("compat=0.10,cluster_size=512", 100 * K).snapshots(),
        ],
    );
}

/// Compressed data are copied out, and what was freed is used for other clusters: not before a flush.
#[test]
fn a_freed_cluster_stays_as_it_is_until_a_flush() {
    cut(
        "a_freed_cluster_stays_as_it_is_until_a_flush",
        &[Write(0..16 * K), Write(64 * K..80 * K), Flush, Write(96 * K..100 * K), Write(120 * K..121 * K)],
        &[
            Recipe::new("cluster_size=4k", 200 * K).compressed().full().long(),
            Recipe::new("compat=0.10,cluster_size=4k", 200 * K).compressed().full(),
        ],
    );
}

/// Compressed data are durable before the entry that shows them; what is packed beside them stays, and a place that was
/// freed is used again only after a flush.
#[test]
fn compressed_data_are_there_when_they_count() {
    cut(
        "compressed_data_are_there_when_they_count",
        &[
            Pack(0..12 * K),
            Pack(4 * K..8 * K),
            Flush,
            Write(0..512),
            Pack(8 * K..12 * K),
            Flush,
            Pack(40 * K..60 * K),
            Read(0..64 * K),
        ],
        &[
            Recipe::new("cluster_size=4k", 100 * K).based(100 * K).empty().packs().long(),
            Recipe::new("cluster_size=4k,compression_type=zstd", 100 * K).compressed().packs(),
        ],
    );
}

/// What is cut off is let go of when the header says that it is gone: until then the old size shows the old bytes, not
/// what lies below.
#[test]
fn a_disk_shrinks_at_once() {
    cut(
        "a_disk_shrinks_at_once",
        &[Write(0..100 * K), Flush, Resize(20 * K), Write(0..8 * K), Flush],
        &[
            Recipe::new("cluster_size=4k", 100 * K).based(100 * K),
            Recipe::new("compat=0.10,cluster_size=4k", 100 * K).based(100 * K),
        ],
    );
}

/// The cluster in which the disk ends holds old bytes behind the end; so does the base.
#[test]
fn a_disk_grows_by_zeros() {
    cut(
        "a_disk_grows_by_zeros",
        &[Write(0..32 * K), Resize(9 * K), Flush, Resize(60 * K), Read(0..60 * K), Write(12 * K..13 * K), Flush],
        &[
            Recipe::new("cluster_size=4k", 64 * K),
            Recipe::new("cluster_size=4k", 64 * K).based(100 * K).empty(),
            Recipe::new("cluster_size=16k,extended_l2=on", 64 * K).based(100 * K),
            Recipe::new("compat=0.10,cluster_size=4k", 64 * K).based(100 * K),
        ],
    );
}

/// While the L1 table moves, the growth already needs clusters: what the base has there is to be zeroed.
#[test]
fn the_old_l1_table_stays_until_the_header_names_the_new_one() {
    cut(
        "the_old_l1_table_stays_until_the_header_names_the_new_one",
        &[Write(0..8 * K), Flush, Resize(2 * M + 64 * K), Write(0..512), Flush],
        &[Recipe::new("cluster_size=512", 2 * M - 32 * K).based(2 * M + 64 * K).empty().long()],
    );
}
