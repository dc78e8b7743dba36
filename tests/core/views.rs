//! What frozen views show, what a guest write costs, and what is never copied.

use crate::rig::*;
use fleecefs::error::errno;
use fleecefs::fleece::StoreErrorPolicy;
use fleecefs::storage::Dir;
use fleecefs::storage::faulty::Call;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const PLACES: [u64; 4] = [0, MIB, 32 * MIB, SIZE - 65536];

/// Whole, left part, right part, and across both borders of the patterns at [`PLACES`].
fn overwrites() -> [(u64, u64); 5] {
    [(0, 65536), (MIB, 32768), (32 * MIB + 32768, 32768), (SIZE - 65536 - 1000, 3000), (32 * MIB - 5000, 5001)]
}

#[test]
fn a_view_shows_old_bytes_and_the_live_disk_new_ones() {
    let host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    for (seed, at) in PLACES.into_iter().enumerate() {
        oracle.write(&fleece, "a", at, 65536, seed as u8 * 3).unwrap();
    }
    oracle.freeze(&fleece, "s").unwrap();
    for (seed, (at, len)) in overwrites().into_iter().enumerate() {
        oracle.write(&fleece, "a", at, len, 100 + seed as u8).unwrap();
        oracle.check(&fleece, EXACT);
    }
    fleece.complete_snapshot("s", None).unwrap();
    fleece.reap();
    assert_same(&read_image(&host.files["a"].image), &oracle.0["a"].live, "image after the snapshot");
    fleece.close().unwrap();
    assert_same(&read_image(&host.files["a"].image), &oracle.0["a"].live, "image after the close");
}

#[test]
fn never_written_ranges_stay_zero_in_the_view() {
    let host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.freeze(&fleece, "s").unwrap();
    for (seed, (at, len)) in overwrites().into_iter().enumerate() {
        oracle.write(&fleece, "a", at, len, seed as u8).unwrap();
    }
    oracle.check(&fleece, EXACT);
    assert_eq!(view_of(&fleece, "s", "a").store_bytes(), 0, "zeros are not stored");
}

#[test]
fn with_break_snapshot_a_store_error_breaks_the_view_and_the_guest_goes_on() {
    let host = Host::pair();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.write(&fleece, "b", 0, DISK_BYTES, 2).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 10, 3).unwrap();
    oracle.check(&fleece, EXACT);
    host.files["a"].store_faults.fail_nth(Call::Write, host.files["a"].store_faults.calls(Call::Write) + 1, errno::EIO);
    oracle.write(&fleece, "a", 2 * CHUNK, 10, 4).unwrap();
    let view = view_of(&fleece, "s", "a");
    for at in [0, CHUNK, 2 * CHUNK, DISK_BYTES - 1] {
        let e = assert_errno(read_view(&view, at, 1), errno::EIO);
        assert!(e.to_string().contains("broken") && e.hint_text().is_some(), "{e}");
    }
    assert!(fleece.snapshot("s").unwrap().broken().is_some());
    assert_eq!(counter(&fleece, "views_broken"), 1);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 5).unwrap();
    assert_errno(read_view(&view, 0, 1), errno::EIO);
    oracle.check(&fleece, Allow { broken: true, ..EXACT });
    assert!(view_of(&fleece, "s", "b").broken().is_none(), "other disks are not concerned");
    assert!(fleece.problems().iter().any(|text| text.contains("'s'") && text.contains("'a'")));

    assert_errno(fleece.complete_snapshot("s", Some("daily")), errno::EIO);
    fleece.cancel_snapshot("s").unwrap();
    assert!(fleece.problems().is_empty(), "{:?}", fleece.problems());
    oracle.freeze(&fleece, "t").unwrap();
    oracle.write(&fleece, "a", 0, DISK_BYTES, 6).unwrap();
    oracle.check(&fleece, EXACT);
}

#[test]
fn with_fail_write_a_store_error_fails_the_write_and_the_view_stays_right() {
    for error in [errno::EIO, errno::ENOSPC] {
        let host = Host::one().with(|options| options.on_store_error = StoreErrorPolicy::FailWrite);
        let fleece = host.mount();
        let mut oracle = Oracle::new(&host);
        oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
        oracle.freeze(&fleece, "s").unwrap();
        host.files["a"].store_faults.fail_all(Call::Write, error);
        let before = oracle.0["a"].live.clone();
        assert_errno(oracle.write(&fleece, "a", 100, 5000, 2), error);
        assert_errno(oracle.zero(&fleece, "a", 65536, 5000, false), error);
        assert_errno(oracle.zero(&fleece, "a", 65536, 5000, true), error);
        assert_same(&oracle.0["a"].live, &before, "the disk after refused writes");
        oracle.check(&fleece, Allow { more: true, ..EXACT });
        assert_eq!(counter(&fleece, "views_broken"), 0);
        host.clear_faults();
        oracle.write(&fleece, "a", 100, 5000, 2).unwrap();
        oracle.check(&fleece, Allow { more: true, ..EXACT });
    }
}

#[test]
fn the_first_overwrite_copies_only_the_chunks_it_touches_and_the_next_none() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    let copied = || {
        (counter(&fleece, "chunks_copied"), counter(&fleece, "copied_bytes"), view_of(&fleece, "s", "a").store_bytes())
    };
    for (offset, len, chunks) in [
        (CHUNK, 1, 1),
        (CHUNK + 5, 100, 1),
        (3 * CHUNK - 1, 2, 3),
        (CHUNK, 2 * CHUNK, 3),
        (0, 5 * CHUNK, 5),
        (16 * CHUNK, CHUNK, 6),
    ] {
        oracle.write(&fleece, "a", offset, len, 9).unwrap();
        assert_eq!(copied(), (chunks, chunks * CHUNK, chunks * CHUNK), "after {offset} {len}");
    }
    assert_eq!(host.files["a"].layers().len(), 1);
    oracle.check(&fleece, EXACT);
}

#[test]
fn an_overwrite_is_copied_once_however_many_snapshots_need_it() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    for name in ["s1", "s2", "s3"] {
        oracle.freeze(&fleece, name).unwrap();
    }
    oracle.write(&fleece, "a", 0, 10 * CHUNK, 2).unwrap();
    assert_eq!((counter(&fleece, "chunks_copied"), counter(&fleece, "store_bytes")), (10, 10 * CHUNK));
    assert_eq!(view_of(&fleece, "s3", "a").store_bytes(), 10 * CHUNK, "it lies in the newest one");
    oracle.check(&fleece, EXACT);
}

#[test]
fn without_a_snapshot_nothing_is_copied_or_stored() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    fleece.complete_snapshot("s", None).unwrap();
    fleece.reap();
    let calls = host.files["a"].store_faults.calls(Call::Write);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 2).unwrap();
    assert_eq!((counter(&fleece, "chunks_copied"), host.files["a"].store_faults.calls(Call::Write)), (0, calls));
    oracle.check_all(&fleece, "probe", EXACT);
}

#[test]
fn a_chunk_of_zeros_is_a_hole_in_the_store() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, 8 * CHUNK, 1).unwrap();
    // Stored zeros, not holes.
    fleece.disk("a").unwrap().write(&vec![0; 2 * CHUNK as usize], 2 * CHUNK).unwrap();
    oracle.story("a").live[2 * CHUNK as usize..4 * CHUNK as usize].fill(0);
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 8 * CHUNK, 2).unwrap();
    assert_eq!(counter(&fleece, "store_bytes"), 6 * CHUNK);
    let layer = &host.files["a"].layers()[0];

    let store = host.files["a"].stores.open(&format!("layers/{layer}/store.raw")).unwrap();
    assert_eq!(store.len().unwrap(), DISK_BYTES, "a store has the disk's own offsets");
    let hole = store.block_status(2 * CHUNK, 100 * CHUNK).unwrap();
    assert_eq!((hole.zero, hole.len), (true, 2 * CHUNK));
    oracle.check(&fleece, EXACT);
}

#[test]
fn a_discard_preserves_allocated_ranges_only() {
    let host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", MIB, 4 * CHUNK, 1).unwrap();
    oracle.write(&fleece, "a", 40 * MIB, CHUNK, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    oracle.zero(&fleece, "a", 0, SIZE, true).unwrap();
    assert_eq!((counter(&fleece, "chunks_copied"), counter(&fleece, "store_bytes")), (5, 5 * CHUNK));
    assert_eq!(host.files["a"].image.allocated_bytes(), 0, "the host has its space back");
    oracle.check(&fleece, EXACT);

    oracle.zero(&fleece, "a", 0, 4 * MIB, false).unwrap();
    assert_eq!(counter(&fleece, "chunks_copied"), 5, "zeros over zeros change nothing");
    oracle.write(&fleece, "a", 2 * MIB, CHUNK, 7).unwrap();
    assert_eq!(counter(&fleece, "store_bytes"), 5 * CHUNK);
    oracle.check(&fleece, EXACT);
}

#[test]
fn zeroing_part_of_a_chunk_preserves_all_of_it() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    oracle.zero(&fleece, "a", CHUNK - 10, 20, true).unwrap();
    oracle.zero(&fleece, "a", DISK_BYTES - 7, 7, false).unwrap();
    oracle.zero(&fleece, "a", 10 * CHUNK + 1, 3 * CHUNK, true).unwrap();
    oracle.check(&fleece, EXACT);
    assert_eq!(counter(&fleece, "chunks_copied"), 2 + 1 + 4);
}

#[test]
fn the_last_partial_chunk_is_preserved_like_any_other() {
    for chunk in [4096, 65536, 1 << 20] {
        for tail in [1, 511, 1234, 4095] {
            let size = 2 * 65536 + tail;
            let host = Host::new(&["a"], size).with(|options| options.chunk = chunk);
            let fleece = host.mount();
            let mut oracle = Oracle::new(&host);
            oracle.write(&fleece, "a", size - 5000, 5000, 1).unwrap();
            oracle.freeze(&fleece, "s").unwrap();
            oracle.write(&fleece, "a", size - 1, 1, 2).unwrap();
            oracle.check(&fleece, EXACT);
            oracle.write(&fleece, "a", size - 4500, 4500, 3).unwrap();
            oracle.check(&fleece, EXACT);
            let view = view_of(&fleece, "s", "a");
            assert_eq!(read_view(&view, size - 1, 100).unwrap().len(), 1, "cut at the end");
            assert_eq!(read_view(&view, size, 100).unwrap().len(), 0);
            assert_eq!(read_view(&view, u64::MAX - 1, 100).unwrap().len(), 0);
        }
    }
}

#[test]
fn views_are_right_with_every_chunk_size() {
    for chunk in [4096, 65536, 1 << 20] {
        let host = Host::new(&["a"], 3 * MIB + 777).with(|options| options.chunk = chunk);
        let fleece = host.mount();
        let mut oracle = Oracle::new(&host);
        oracle.write(&fleece, "a", 5000, 2 * MIB, 1).unwrap();
        for round in 0..4_u8 {
            oracle.freeze(&fleece, &format!("s{round}")).unwrap();
            oracle.write(&fleece, "a", u64::from(round) * 400_000, 300_000, round + 10).unwrap();
            oracle.zero(&fleece, "a", 2 * MIB + u64::from(round), 70_000, round % 2 == 0).unwrap();
            oracle.write(&fleece, "a", 3 * MIB + 700 + u64::from(round), 3, round).unwrap();
            oracle.check(&fleece, EXACT);
        }
    }
}

#[test]
fn a_sector_that_cannot_be_read_is_lost_in_the_view_alone_and_healed_by_the_guest() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "old").unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    let faults = &host.files["a"].image_faults;
    faults.fail_range(Call::Read, 5 * CHUNK..6 * CHUNK, errno::EIO);
    assert_errno(read_view(&view_of(&fleece, "s", "a"), 5 * CHUNK, 1), errno::EIO);
    oracle.write(&fleece, "a", 0, 10 * CHUNK, 2).unwrap();
    faults.clear();
    assert_eq!(counter(&fleece, "chunks_lost"), 1);
    assert_same(&read_live(&fleece.disk("a").unwrap(), 0, DISK_BYTES), &oracle.0["a"].live, "live");
    for name in ["old", "s"] {
        let view = view_of(&fleece, name, "a");
        assert!(view.broken().is_none());
        assert_errno(read_view(&view, 5 * CHUNK, CHUNK), errno::EIO);
        assert_errno(read_view(&view, 6 * CHUNK - 1, 1), errno::EIO);
        assert_same(&read_view(&view, 0, 5 * CHUNK).unwrap(), &oracle.0["a"].at("s")[..5 * CHUNK as usize], "before");
        assert_same(&read_view(&view, 6 * CHUNK, CHUNK).unwrap(), &pattern(1, 6 * CHUNK, CHUNK), "after");
    }
    // The layer of `s` is folded into the one of `old`: the loss goes with it.
    oracle.freeze(&fleece, "t").unwrap();
    fleece.complete_snapshot("s", None).unwrap();
    fleece.reap();
    let view = view_of(&fleece, "old", "a");
    assert_errno(read_view(&view, 5 * CHUNK, CHUNK), errno::EIO);
    assert_same(&read_view(&view, 0, 5 * CHUNK).unwrap(), &pattern(1, 0, 5 * CHUNK), "before");
    assert_same(&read_view(&view_of(&fleece, "t", "a"), 0, DISK_BYTES).unwrap(), oracle.0["a"].at("t"), "t");
}

/// The first run of the status at `at`, where it is no error.
fn says_zero(view: &fleecefs::fleece::View, at: u64) -> bool {
    view.block_status(at, CHUNK).is_ok_and(|status| status.zero)
}

/// A reader skips holes without reading them: it would take zeros for what is an error.
#[test]
fn what_cannot_be_read_is_never_called_a_hole() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    let view = view_of(&fleece, "s", "a");
    let zero_in_map = |at: u64| {
        let map = extents(&view, None).unwrap();
        map.iter().any(|extent| extent.zero && (extent.start..extent.start + extent.length).contains(&at))
    };
    let faults = &host.files["a"].image_faults;
    faults.fail_range(Call::Read, 2 * CHUNK..3 * CHUNK, errno::EIO);
    oracle.write(&fleece, "a", 0, 4 * CHUNK, 2).unwrap();
    faults.clear();
    assert!(!says_zero(&view, 2 * CHUNK), "lost");
    view.release(3 * CHUNK, CHUNK).unwrap();
    wait_for("the released chunk is punched", || counter(&fleece, "store_bytes") == 2 * CHUNK);
    assert_errno(read_view(&view, 3 * CHUNK, 1), errno::EIO);
    assert!(!says_zero(&view, 3 * CHUNK), "released");
    assert!(!zero_in_map(2 * CHUNK), "lost, in the map");
    assert!(!zero_in_map(3 * CHUNK), "released, in the map");

    host.files["a"].store_faults.fail_all(Call::Write, errno::EIO);
    oracle.zero(&fleece, "a", 65536, 65536, true).unwrap();
    assert_errno(read_view(&view, 65536, 1), errno::EIO);
    assert!(!says_zero(&view, 65536), "broken");
}

#[test]
fn block_status_of_a_view_tells_frozen_holes_from_data() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 4 * CHUNK, 2 * CHUNK, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    let view = view_of(&fleece, "s", "a");
    let runs = || {
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let mut at = 0;
        while at < view.size() {
            let run = view.block_status(at, view.size() - at).unwrap();
            match runs.last_mut() {
                Some(last) if last.1 == run.zero => last.0 += run.len,
                _ => runs.push((run.len, run.zero)),
            }
            at += run.len;
        }
        runs
    };
    let frozen = vec![(4 * CHUNK, true), (2 * CHUNK, false), (DISK_BYTES - 6 * CHUNK, true)];
    assert_eq!(runs(), frozen);
    oracle.write(&fleece, "a", 0, 8 * CHUNK, 2).unwrap();
    assert_eq!(runs(), frozen, "overwritten, it stays what it was");
    oracle.zero(&fleece, "a", 0, 8 * CHUNK, true).unwrap();
    assert_eq!(runs(), frozen, "discarded, too");
    assert_eq!(view.block_status(DISK_BYTES, 10).unwrap().len, 0);
}

#[test]
fn zero_in_a_map_never_changes_though_the_guest_overwrites() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, 3 * GRANULE, 1).unwrap();
    fleece.disk("a").unwrap().write(&[0; 65536], GRANULE).unwrap();
    oracle.story("a").live[GRANULE as usize..2 * GRANULE as usize].fill(0);
    oracle.freeze(&fleece, "s").unwrap();
    let view = view_of(&fleece, "s", "a");
    let first = extents(&view, None).unwrap();
    oracle.write(&fleece, "a", 0, DISK_BYTES, 2).unwrap();
    assert_eq!(extents(&view, None).unwrap(), first, "after an overwrite (stored zeros became a hole of the store)");
    oracle.zero(&fleece, "a", 0, DISK_BYTES, true).unwrap();
    assert_eq!(extents(&view, None).unwrap(), first, "after a discard");
    drop(view);
    drop(fleece);
    let fleece = host.mount();
    let view = view_of(&fleece, "s", "a");
    assert_eq!(extents(&view, None).unwrap(), first, "after a kill");
    oracle.0["a"].check_map(&first, "s", "s", Allow { more: true, ..EXACT }, "map");
}

#[test]
fn the_map_of_a_broken_view_still_covers_every_change_and_claims_no_zeros_it_cannot_know() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, 2 * GRANULE, 1).unwrap();
    oracle.freeze(&fleece, "s1").unwrap();
    fleece.complete_snapshot("s1", None).unwrap();
    oracle.write(&fleece, "a", GRANULE, 100, 2).unwrap();
    oracle.freeze(&fleece, "s2").unwrap();
    host.files["a"].store_faults.fail_all(Call::Write, errno::EIO);
    oracle.zero(&fleece, "a", 0, DISK_BYTES, true).unwrap();
    host.clear_faults();
    let view = view_of(&fleece, "s2", "a");
    assert!(view.broken().is_some());
    let map = extents_since(&view, "s1");
    oracle.0["a"].check_map(&map, "s1", "s2", EXACT, "map of a broken view");
}
