//! Several snapshots of a disk: in which order they may go, and what they cost.

use crate::rig::*;
use fleecefs::error::errno;
use fleecefs::fleece::Fleece;
use fleecefs::storage::Dir;

/// A disk under four snapshots, each with its own and with shared overwrites after it.
fn four(host: &Host) -> (std::sync::Arc<Fleece>, Oracle) {
    let fleece = host.mount();
    let mut oracle = Oracle::new(host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    for round in 0..4_u64 {
        oracle.freeze(&fleece, &format!("s{round}")).unwrap();
        oracle.write(&fleece, "a", round * 3 * CHUNK, 5 * CHUNK + 7, 10 + round as u8).unwrap();
        oracle.write(&fleece, "a", 40 * CHUNK, CHUNK, 20 + round as u8).unwrap();
        oracle.zero(&fleece, "a", (60 + round) * CHUNK, 2 * CHUNK, round % 2 == 0).unwrap();
        oracle.write(&fleece, "a", DISK_BYTES - 1 - round, 1, 30).unwrap();
    }
    (fleece, oracle)
}

fn orders() -> Vec<[usize; 4]> {
    let mut orders = Vec::new();
    for a in 0..4 {
        for b in (0..4).filter(|b| *b != a) {
            for c in (0..4).filter(|c| ![a, b].contains(c)) {
                orders.push([a, b, c, 6 - a - b - c]);
            }
        }
    }
    orders
}

#[test]
fn snapshots_may_be_dropped_in_every_order_and_the_others_stay_right() {
    for (number, order) in orders().into_iter().enumerate() {
        let host = Host::one();
        let (fleece, mut oracle) = four(&host);
        for (step, index) in order.into_iter().enumerate() {
            let name = format!("s{index}");
            if (number + step) % 2 == 0 {
                fleece.complete_snapshot(&name, None).unwrap();
            } else {
                fleece.cancel_snapshot(&name).unwrap();
            }
            oracle.check(&fleece, EXACT);
            // Reaping must not be needed, nor harm.
            if (number / 2 + step) % 2 == 0 {
                fleece.reap();
                oracle.check(&fleece, EXACT);
            }
            oracle.write(&fleece, "a", step as u64 * 11 * CHUNK, 3 * CHUNK, 40 + step as u8).unwrap();
            oracle.check(&fleece, EXACT);
        }
        fleece.reap();
        assert_eq!(counter(&fleece, "store_bytes"), 0, "{order:?}");
        wait_for("the stores are removed", || host.files["a"].layers().is_empty());
        oracle.check_all(&fleece, "probe", EXACT);
    }
}

#[test]
fn hourly_snapshots_under_one_old_view_do_not_pile_up_layers() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "old").unwrap();
    for hour in 0..100_u64 {
        let name = format!("hour-{hour}");
        oracle.freeze(&fleece, &name).unwrap();
        oracle.write(&fleece, "a", hour % 16 * 6 * CHUNK, 2 * CHUNK, hour as u8).unwrap();
        fleece.complete_snapshot(&name, None).unwrap();
        fleece.reap();
        wait_for("at most three layers are left", || host.files["a"].layers().len() <= 3);
        if hour % 10 == 0 {
            oracle.check(&fleece, EXACT);
        }
    }
    oracle.check(&fleece, EXACT);
    assert!(counter(&fleece, "layers_folded") >= 97);
    assert!(counter(&fleece, "store_bytes") <= (32 + 2) * CHUNK, "each chunk that the old view needs is kept once");
    drop(fleece);
    let fleece = host.mount();
    oracle.check(&fleece, EXACT);
    fleece.complete_snapshot("old", None).unwrap();
    fleece.reap();
    wait_for("all layers are gone", || host.files["a"].layers().is_empty());
}

#[test]
fn folding_keeps_what_older_views_need_and_nothing_else() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "old").unwrap();
    oracle.write(&fleece, "a", 0, 4 * CHUNK, 2).unwrap();
    oracle.freeze(&fleece, "middle").unwrap();
    // Two chunks that `old` has already, two that it lacks.
    oracle.write(&fleece, "a", 2 * CHUNK, 4 * CHUNK, 3).unwrap();
    oracle.freeze(&fleece, "new").unwrap();
    fleece.cancel_snapshot("middle").unwrap();
    assert_eq!(counter(&fleece, "store_bytes"), 8 * CHUNK);
    fleece.reap();
    assert_eq!(counter(&fleece, "layers_folded"), 1);
    assert_eq!(view_of(&fleece, "old", "a").store_bytes(), 6 * CHUNK);
    assert_eq!(counter(&fleece, "store_bytes"), 6 * CHUNK);
    oracle.check(&fleece, EXACT);
}

#[test]
fn a_fold_that_fails_leaves_everything_as_it_was_and_is_tried_again() {
    use fleecefs::storage::faulty::Call;
    for (call, kind) in [(Call::Read, "read"), (Call::Write, "write")] {
        let host = Host::one();
        let (fleece, oracle) = four(&host);
        fleece.complete_snapshot("s1", None).unwrap();
        fleece.complete_snapshot("s2", None).unwrap();
        host.files["a"].store_faults.fail_all(call, errno::EIO);
        fleece.reap();
        assert_eq!(counter(&fleece, "layers_folded"), 0, "{kind}");
        host.clear_faults();
        oracle.check(&fleece, EXACT);
        fleece.reap();
        assert_eq!(counter(&fleece, "layers_folded"), 2, "{kind}");
        oracle.check(&fleece, EXACT);
    }
}

#[test]
fn an_open_file_of_a_dropped_snapshot_stays_valid_to_the_last_close() {
    let host = Host::one();
    let (fleece, mut oracle) = four(&host);
    let snapshot = fleece.snapshot("s1").unwrap();
    assert!(snapshot.opened() && snapshot.opened());
    fleece.complete_snapshot("s1", None).unwrap();
    assert_errno(fleece.snapshot("s1"), errno::ENOENT);
    for name in ["s0", "s2", "s3"] {
        fleece.complete_snapshot(name, None).unwrap();
    }
    let view = snapshot.view("a").unwrap().clone();
    for round in 0..3 {
        fleece.reap();
        oracle.write(&fleece, "a", round * 16 * CHUNK, 16 * CHUNK, 50).unwrap();
        oracle.0["a"].check_view(&view, EXACT);
        if round == 1 {
            snapshot.closed();
        }
    }
    assert!(fleece.snapshot_by_uuid(snapshot.uuid()).is_some());
    snapshot.closed();
    assert!(!snapshot.opened(), "it is gone");
    fleece.reap();
    assert!(fleece.snapshot_by_uuid(snapshot.uuid()).is_none());
    drop((view, snapshot));
    assert_eq!(counter(&fleece, "store_bytes"), 0);
    wait_for("the stores are removed", || host.files["a"].layers().is_empty());
}

/// Who holds a view without an open file must get an error after it has gone, never the live disk's bytes.
#[test]
fn a_view_whose_layer_is_gone_never_answers_with_live_bytes() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    let view = view_of(&fleece, "s", "a");
    fleece.complete_snapshot("s", None).unwrap();
    fleece.reap();
    oracle.write(&fleece, "a", 0, DISK_BYTES, 2).unwrap();
    assert_errno(read_view(&view, 0, CHUNK), errno::ESTALE);
}

#[test]
fn snapshots_of_some_disks_leave_the_others_alone() {
    let host = Host::pair();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.write(&fleece, "b", 0, DISK_BYTES, 2).unwrap();
    let snapshot = try_freeze(&fleece, "s", &["b"], None).unwrap();
    oracle.note("s");
    assert_eq!(snapshot.views().len(), 1);
    assert_errno(snapshot.view("a"), errno::ENOENT);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 3).unwrap();
    assert_eq!(counter(&fleece, "chunks_copied"), 0);
    assert!(host.files["a"].stores.list("layers").unwrap().is_empty());
    oracle.write(&fleece, "b", 0, DISK_BYTES, 4).unwrap();
    oracle.check(&fleece, EXACT);
    assert_eq!(fleece.checkpoints()[0].disks.iter().map(|row| row.disk.as_str()).collect::<Vec<_>>(), ["b"]);
    assert_errno(try_freeze(&fleece, "t", &["b", "c"], None), errno::ENOENT);
    let twice = try_freeze(&fleece, "u", &["b", "b"], None).unwrap();
    assert_eq!(twice.views().len(), 1);
}
