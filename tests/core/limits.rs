//! The space that stores may take, exactly at its edge, and what is told about it.

use crate::rig::*;
use fleecefs::error::errno;
use fleecefs::fleece::{Event, Fleece, StoreErrorPolicy};
use fleecefs::storage::Space;
use fleecefs::storage::faulty::Call;
use std::sync::{Arc, Mutex};

const GIB: u64 = 1 << 30;

fn written(host: &Host) -> (Arc<Fleece>, Oracle) {
    let fleece = host.mount();
    let mut oracle = Oracle::new(host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    (fleece, oracle)
}

/// The 'nearly full' events from now on.
fn nearly_full(fleece: &Fleece) -> Arc<Mutex<Vec<(u64, u64)>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    fleece.subscribe(Box::new(move |event| {
        if let Event::StoreNearlyFull { disk, used, limit } = event {
            assert_eq!(disk, "a");
            sink.lock().unwrap().push((*used, *limit));
        }
    }));
    seen
}

#[test]
fn the_store_limit_holds_exactly_to_the_byte() {
    let host = Host::one().with(|options| options.store_limit = Some(10 * CHUNK));
    let (fleece, mut oracle) = written(&host);
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 10 * CHUNK, 2).unwrap();
    oracle.check(&fleece, EXACT);
    assert_eq!(counter(&fleece, "store_bytes"), 10 * CHUNK);
    // Full: a snapshot cannot even begin, and says the figure and what helps.
    let e = assert_errno(try_freeze(&fleece, "t", &[], None), errno::ENOSPC);
    assert!(e.to_string().contains("40.0 KiB"), "{e}");
    assert!(e.hint_text().unwrap().contains("--store-limit"));
    assert_eq!(fleece.snapshots().len(), 1);
    oracle.check(&fleece, EXACT);
    // What is stored already goes on; one chunk more breaks the view.
    oracle.write(&fleece, "a", 0, 10 * CHUNK, 3).unwrap();
    oracle.check(&fleece, EXACT);
    oracle.write(&fleece, "a", 10 * CHUNK, 1, 3).unwrap();
    let reason = view_of(&fleece, "s", "a").broken().unwrap();
    assert!(reason.contains("40.0 KiB"), "{reason}");
    oracle.check(&fleece, Allow { broken: true, ..EXACT });
    // Dropped, its space can be used again.
    fleece.cancel_snapshot("s").unwrap();
    fleece.reap();
    assert_eq!(counter(&fleece, "store_bytes"), 0);
    oracle.freeze(&fleece, "u").unwrap();
    oracle.write(&fleece, "a", 20 * CHUNK, 10 * CHUNK, 4).unwrap();
    oracle.check(&fleece, EXACT);
}

#[test]
fn the_store_limit_counts_all_disks_of_the_mount() {
    let host = Host::pair().with(|options| {
        options.store_limit = Some(4 * CHUNK);
        options.on_store_error = StoreErrorPolicy::FailWrite;
    });
    let (fleece, mut oracle) = written(&host);
    oracle.write(&fleece, "b", 0, DISK_BYTES, 2).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 3 * CHUNK, 3).unwrap();
    oracle.write(&fleece, "b", 0, CHUNK, 3).unwrap();
    assert_errno(oracle.write(&fleece, "b", CHUNK, CHUNK, 3), errno::ENOSPC);
    assert_errno(oracle.write(&fleece, "a", 3 * CHUNK, CHUNK, 3), errno::ENOSPC);
    oracle.check(&fleece, Allow { more: true, ..EXACT });
    fleece.release("s", "a", 0, 2 * CHUNK).unwrap();
    wait_for("the space is freed", || counter(&fleece, "store_bytes") == 2 * CHUNK);
    oracle.write(&fleece, "b", CHUNK, CHUNK, 4).unwrap();
}

#[test]
fn writes_of_the_store_that_fail_take_nothing_of_the_limit() {
    let host = Host::one().with(|options| {
        options.store_limit = Some(10 * CHUNK);
        options.on_store_error = StoreErrorPolicy::FailWrite;
    });
    let (fleece, mut oracle) = written(&host);
    oracle.freeze(&fleece, "s").unwrap();
    host.files["a"].store_faults.fail_all(Call::Write, errno::EIO);
    for _ in 0..30 {
        assert_errno(oracle.write(&fleece, "a", 0, CHUNK, 2), errno::EIO);
    }
    host.clear_faults();
    assert_eq!(counter(&fleece, "store_bytes"), 0);
    oracle.write(&fleece, "a", 0, 10 * CHUNK, 2).unwrap();
    oracle.check(&fleece, Allow { more: true, ..EXACT });
}

#[test]
fn a_removed_disk_gives_its_share_of_the_limit_back() {
    let host = Host::one().with(|options| options.store_limit = Some(10 * CHUNK));
    let (fleece, mut oracle) = written(&host);
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 10 * CHUNK, 2).unwrap();
    fleece.complete_snapshot("s", None).unwrap();
    fleece.remove_disk("a").unwrap();
    assert_eq!(counter(&fleece, "store_bytes"), 0);
    assert!(host.files["a"].layers().is_empty());
}

#[test]
fn a_snapshot_has_the_room_that_a_dropped_one_took() {
    let host = Host::one().with(|options| options.store_limit = Some(10 * CHUNK));
    let (fleece, mut oracle) = written(&host);
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 10 * CHUNK, 2).unwrap();
    assert_errno(try_freeze(&fleece, "full", &[], None), errno::ENOSPC);
    fleece.complete_snapshot("s", None).unwrap();
    // Nobody has reaped the dropped layer yet.
    try_freeze(&fleece, "next", &[], None).unwrap();
    assert_eq!(counter(&fleece, "store_bytes"), 0);
}

#[test]
fn a_store_leaves_the_larger_of_5_percent_and_1_gib_to_others() {
    for (total, reserve) in [(100 * GIB, 5 * GIB), (10 * GIB, GIB), (20 * GIB, GIB), (21 * GIB, 21 * GIB / 20)] {
        let host = Host::one().with(|options| options.on_store_error = StoreErrorPolicy::FailWrite);
        let space = |free| host.files["a"].stores.set_space(Space { total, free });
        let (fleece, mut oracle) = written(&host);
        space(reserve);
        let e = assert_errno(try_freeze(&fleece, "s", &[], None), errno::ENOSPC);
        let hint = e.hint_text().unwrap();
        assert!(hint.contains("--store-dir") && hint.contains("--store-limit"), "{hint}");
        assert!(e.to_string().contains("free of"), "{e}");
        assert!(fleece.checkpoints().is_empty(), "nothing is left of it");
        space(reserve + 3 * CHUNK);
        oracle.freeze(&fleece, "s").unwrap();
        oracle.write(&fleece, "a", 0, 2 * CHUNK, 2).unwrap();
        space(reserve + CHUNK);
        oracle.write(&fleece, "a", 2 * CHUNK, CHUNK, 2).unwrap();
        space(reserve);
        assert_errno(oracle.write(&fleece, "a", 3 * CHUNK, CHUNK, 2), errno::ENOSPC);
        oracle.check(&fleece, Allow { more: true, ..EXACT });
        space(reserve + CHUNK - 1);
        assert_errno(oracle.write(&fleece, "a", 3 * CHUNK, CHUNK, 2), errno::ENOSPC);
        space(reserve + CHUNK);
        oracle.write(&fleece, "a", 3 * CHUNK, CHUNK, 2).unwrap();
        oracle.check(&fleece, Allow { more: true, ..EXACT });
        wait_for("refused snapshots leave no store", || host.files["a"].layers().len() == 1);
    }
}

#[test]
fn with_a_limit_the_free_space_does_not_matter() {
    let host = Host::one().with(|options| options.store_limit = Some(10 * CHUNK));
    let (fleece, mut oracle) = written(&host);
    host.files["a"].stores.set_space(Space { total: 100 * GIB, free: 0 });
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 10 * CHUNK, 2).unwrap();
    oracle.check(&fleece, EXACT);
}

#[test]
fn passing_80_percent_is_told_once() {
    let host = Host::one().with(|options| options.store_limit = Some(20 * CHUNK));
    let (fleece, mut oracle) = written(&host);
    let seen = nearly_full(&fleece);
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 16 * CHUNK, 2).unwrap();
    assert!(seen.lock().unwrap().is_empty() && fleece.problems().is_empty());
    for chunk in 16..19 {
        oracle.write(&fleece, "a", chunk * CHUNK, CHUNK, 2).unwrap();
    }
    assert_eq!(*seen.lock().unwrap(), [(17 * CHUNK, 20 * CHUNK)], "at 80 % exactly it is not past it");
    assert_eq!(fleece.problems().len(), 1);
    fleece.cancel_snapshot("s").unwrap();
    fleece.reap();
    assert!(fleece.problems().is_empty(), "{:?}", fleece.problems());
    oracle.freeze(&fleece, "t").unwrap();
    oracle.write(&fleece, "a", 0, 20 * CHUNK, 3).unwrap();
    assert_eq!(seen.lock().unwrap().len(), 2, "passed anew, told anew");
}

#[test]
fn past_80_percent_a_release_that_frees_nothing_changes_nothing() {
    let host = Host::one().with(|options| options.store_limit = Some(20 * CHUNK));
    let (fleece, mut oracle) = written(&host);
    fleece.disk("a").unwrap().write(&[0; 4096], 30 * CHUNK).unwrap();
    oracle.story("a").live[30 * CHUNK as usize..31 * CHUNK as usize].fill(0);
    let seen = nearly_full(&fleece);
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 17 * CHUNK, 2).unwrap();
    // Zeros: preserved, and a hole in the store.
    oracle.write(&fleece, "a", 30 * CHUNK, CHUNK, 2).unwrap();
    assert_eq!(seen.lock().unwrap().len(), 1);
    let punches = || host.files["a"].store_faults.calls(Call::Punch);
    let before = punches();
    fleece.release("s", "a", 30 * CHUNK, CHUNK).unwrap();
    wait_for("the release is done", || punches() > before);
    // The punch is counted at its start: the next one in the background comes after its end.
    fleece.release("s", "a", 30 * CHUNK, CHUNK).unwrap();
    wait_for("the release is done", || punches() > before + 1);
    oracle.write(&fleece, "a", 17 * CHUNK, CHUNK, 2).unwrap();
    assert_eq!(fleece.problems().len(), 1);
    assert_eq!(seen.lock().unwrap().len(), 1, "told again though it was never below");
}

#[test]
fn more_unreadable_chunks_than_a_layer_keeps_apart_break_the_view_and_are_told() {
    let host = Host::new(&["a"], 600 * CHUNK);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, 600 * CHUNK, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    let told = Arc::new(Mutex::new(0));
    let count = told.clone();
    fleece.subscribe(Box::new(move |event| {
        if matches!(event, Event::ViewBroken { .. }) {
            *count.lock().unwrap() += 1;
        }
    }));
    host.files["a"].image_faults.fail_all(Call::Read, errno::EIO);
    oracle.write(&fleece, "a", 0, 400 * CHUNK, 2).unwrap();
    let view = view_of(&fleece, "s", "a");
    assert!(view.broken().is_none(), "some hundreds are kept apart");
    oracle.write(&fleece, "a", 400 * CHUNK, 200 * CHUNK, 2).unwrap();
    host.clear_faults();
    assert_same(&read_live(&fleece.disk("a").unwrap(), 0, 600 * CHUNK), &oracle.0["a"].live, "live");
    assert!(view.broken().is_some());
    assert_errno(read_view(&view, 599 * CHUNK, 1), errno::EIO);
    assert_eq!((*told.lock().unwrap(), counter(&fleece, "views_broken")), (1, 1));
}
