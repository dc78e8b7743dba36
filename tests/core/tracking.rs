//! Checkpoints, reference points and consumers.

use crate::rig::*;
use fleecefs::backup::{Extent, ExtentSource};
use fleecefs::error::errno;
use fleecefs::fleece::{Fleece, Since};
use fleecefs::storage::Dir;
use fleecefs::storage::faulty::Call;

fn reference(fleece: &Fleece, snapshot: &str, disk: &str) -> Option<String> {
    view_of(fleece, snapshot, disk).reference().map(|point| point.name)
}

fn checkpoint_names(fleece: &Fleece) -> Vec<String> {
    fleece.checkpoints().into_iter().map(|info| info.name).collect()
}

#[test]
fn the_first_map_says_everything_with_zeros_told_apart() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", GRANULE, GRANULE, 1).unwrap();
    let snapshot = oracle.freeze(&fleece, "s").unwrap();
    let view = &snapshot.views()[0];
    assert_eq!(view.full_reason().as_deref(), Some("no completed checkpoint yet"));
    let map: Vec<_> = extents(view, None).unwrap().iter().map(|e| (e.start, e.length, e.dirty, e.zero)).collect();
    let expected = [
        (0, GRANULE, true, true),
        (GRANULE, GRANULE, true, false),
        (2 * GRANULE, DISK_BYTES - 2 * GRANULE, true, true),
    ];
    assert_eq!(map, expected);
    assert_eq!(snapshot.manifest()["disks"][0]["full_reason"], "no completed checkpoint yet");
}

#[test]
fn only_a_completed_checkpoint_is_a_reference_point() {
    let host = Host::one();
    let fleece = host.mount();
    freeze(&fleece, "done");
    fleece.complete_snapshot("done", None).unwrap();
    freeze(&fleece, "open");
    freeze(&fleece, "t1");
    assert_eq!(reference(&fleece, "t1", "a").as_deref(), Some("done"), "an open one is none");
    freeze(&fleece, "cancelled");
    fleece.cancel_snapshot("cancelled").unwrap();
    freeze(&fleece, "t2");
    assert_eq!(reference(&fleece, "t2", "a").as_deref(), Some("done"), "a cancelled one is none");
    drop(fleece);
    let fleece = host.mount();
    freeze(&fleece, "t3");
    assert_eq!(reference(&fleece, "t3", "a").as_deref(), Some("done"), "one that lived through a kill is none");
    fleece.close().unwrap();
    let fleece = host.mount();
    assert!(fleece.snapshots().is_empty());
    freeze(&fleece, "t4");
    assert_eq!(reference(&fleece, "t4", "a").as_deref(), Some("done"), "an unmounted one is none");
    fleece.complete_snapshot("t4", None).unwrap();
    freeze(&fleece, "t5");
    assert_eq!(reference(&fleece, "t5", "a").as_deref(), Some("t4"));
}

#[test]
fn a_crashed_snapshot_is_no_reference_point() {
    let mut host = Host::one();
    let fleece = host.mount();
    freeze(&fleece, "done");
    fleece.complete_snapshot("done", None).unwrap();
    freeze(&fleece, "crashed");
    drop(fleece);
    host.lose_power();
    let fleece = host.mount();
    assert!(fleece.snapshots().is_empty());
    freeze(&fleece, "t");
    assert_eq!(reference(&fleece, "t", "a").as_deref(), Some("done"));
}

#[test]
fn each_disk_has_its_own_newest_completed_checkpoint() {
    let host = Host::pair();
    let fleece = host.mount();
    freeze(&fleece, "both");
    fleece.complete_snapshot("both", None).unwrap();
    try_freeze(&fleece, "b-only", &["b"], None).unwrap();
    fleece.complete_snapshot("b-only", None).unwrap();
    freeze(&fleece, "t");
    assert_eq!(reference(&fleece, "t", "a").as_deref(), Some("both"));
    assert_eq!(reference(&fleece, "t", "b").as_deref(), Some("b-only"));
}

#[test]
fn since_names_a_checkpoint_or_a_consumer_and_what_is_unknown_is_full_with_a_reason() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    for (round, name) in ["c1", "c2", "c3"].into_iter().enumerate() {
        oracle.write(&fleece, "a", round as u64 * GRANULE, 10, 1).unwrap();
        oracle.freeze(&fleece, name).unwrap();
        fleece.complete_snapshot(name, (name == "c2").then_some("daily")).unwrap();
    }
    oracle.write(&fleece, "a", 4 * GRANULE, 10, 1).unwrap();
    let take = |name: &str, since: Since| freeze_since(&fleece, name, since).views()[0].clone();
    let by_name = take("t1", Since::Checkpoint("c1".to_owned()));
    let by_consumer = take("t2", Since::Consumer("daily".to_owned()));
    let none = take("t3", Since::Checkpoint("c9".to_owned()));
    let nobody = take("t4", Since::Consumer("weekly".to_owned()));
    let open = take("t5", Since::Checkpoint("t1".to_owned()));
    let dirty = |view| dirty_granules(&extents(view, view.reference().map(|point| point.uuid)).unwrap());
    assert_eq!(by_name.reference().unwrap().name, "c1");
    assert_eq!(dirty(&by_name), [1, 2, 4].into());
    assert_eq!(by_consumer.reference().unwrap().name, "c2");
    assert_eq!(dirty(&by_consumer), [2, 4].into());
    for (view, word) in [(&none, "c9"), (&nobody, "weekly")] {
        assert!(view.reference().is_none());
        assert!(view.full_reason().unwrap().contains(word));
        assert_eq!(dirty(view).len(), 7, "everything");
    }
    assert_eq!(open.reference().unwrap().name, "t1", "asked for by name, an open one serves");
    assert!(dirty(&open).is_empty());
    let unknown = uuid::Uuid::new_v4();
    assert_errno(extents(&none, Some(unknown)), errno::ENOENT);
    assert_errno(extents(&none, Some(none.checkpoint().uuid)), errno::ENOENT);
}

#[test]
fn maps_since_every_earlier_point_are_exact() {
    let host = Host::pair();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    for round in 0..8_u64 {
        oracle.write(&fleece, "a", (round * 37 % 90) * CHUNK, 9 * CHUNK, round as u8).unwrap();
        oracle.zero(&fleece, "b", (round * 23 % 80) * CHUNK + 5, 20_000, round % 2 == 0).unwrap();
        oracle.freeze(&fleece, &format!("c{round}")).unwrap();
        oracle.check(&fleece, EXACT);
        if round % 3 == 0 {
            fleece.complete_snapshot(&format!("c{round}"), Some("daily")).unwrap();
        }
    }
    assert_eq!(view_of(&fleece, "c7", "a").since().len(), 7);
}

#[test]
fn a_deleted_checkpoint_forgets_no_change() {
    for victim in 0..5 {
        let host = Host::one();
        let fleece = host.mount();
        let mut oracle = Oracle::new(&host);
        for round in 0..5_u64 {
            let name = format!("c{round}");
            oracle.freeze(&fleece, &name).unwrap();
            fleece.complete_snapshot(&name, None).unwrap();
            oracle.write(&fleece, "a", round * GRANULE, 1, 1).unwrap();
        }
        let name = format!("c{victim}");
        fleece.delete_checkpoint(&name).unwrap();
        assert!(!checkpoint_names(&fleece).contains(&name));
        assert_errno(fleece.delete_checkpoint(&name), errno::ENOENT);
        oracle.write(&fleece, "a", 5 * GRANULE, 1, 1).unwrap();
        oracle.check_all(&fleece, "probe-1", EXACT);
        drop(fleece);
        let fleece = host.mount();
        oracle.check_all(&fleece, "probe-2", EXACT);
        oracle.write(&fleece, "a", 6 * GRANULE, 1, 1).unwrap();
        fleece.close().unwrap();
        let fleece = host.mount();
        oracle.check_all(&fleece, "probe-3", EXACT);
    }
}

#[test]
fn a_checkpoint_that_is_needed_cannot_be_deleted() {
    let host = Host::pair();
    let fleece = host.mount();
    freeze(&fleece, "base");
    let e = assert_errno(fleece.delete_checkpoint("base"), errno::EBUSY);
    assert!(e.to_string().contains("open snapshot 'base'"), "{e}");
    fleece.complete_snapshot("base", Some("daily")).unwrap();
    let e = assert_errno(fleece.delete_checkpoint("base"), errno::EBUSY);
    assert!(e.to_string().contains("consumer 'daily'"), "{e}");
    freeze(&fleece, "next");
    fleece.delete_consumer("daily").unwrap();
    let e = assert_errno(fleece.delete_checkpoint("base"), errno::EBUSY);
    assert!(e.to_string().contains("'next'"), "its map counts from there: {e}");
    fleece.cancel_snapshot("next").unwrap();
    fleece.delete_checkpoint("base").unwrap();
    assert!(fleece.checkpoints().is_empty());
    assert_errno(fleece.delete_consumer("daily"), errno::ENOENT);
    assert_errno(fleece.set_consumer("daily", "base"), errno::ENOENT);
}

#[test]
fn a_cancelled_snapshot_keeps_the_checkpoint_that_a_consumer_points_at() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.freeze(&fleece, "s").unwrap();
    fleece.set_consumer("replica", "s").unwrap();
    oracle.write(&fleece, "a", 0, 1, 1).unwrap();
    fleece.cancel_snapshot("s").unwrap();
    assert_eq!(checkpoint_names(&fleece), ["s"]);
    oracle.note("t");
    let view = freeze_since(&fleece, "t", Since::Consumer("replica".to_owned())).views()[0].clone();
    assert_eq!(view.reference().unwrap().name, "s");
    oracle.check(&fleece, EXACT);
}

#[test]
fn consumers_move_on_all_disks_of_the_snapshot_and_stay_on_the_others() {
    let host = Host::pair();
    let fleece = host.mount();
    freeze(&fleece, "c1");
    fleece.complete_snapshot("c1", Some("daily")).unwrap();
    try_freeze(&fleece, "c2", &["b"], None).unwrap();
    fleece.complete_snapshot("c2", Some("daily")).unwrap();
    let rows = |fleece: &Fleece| -> Vec<(String, Vec<String>)> {
        fleece.consumers().into_iter().map(|row| (row.checkpoint, row.disks)).collect()
    };
    let expected = [("c1".to_owned(), vec!["a".to_owned()]), ("c2".to_owned(), vec!["b".to_owned()])];
    assert_eq!(rows(&fleece), expected);
    let t = freeze_since(&fleece, "t", Since::Consumer("daily".to_owned()));
    assert_eq!(t.view("a").unwrap().reference().unwrap().name, "c1");
    assert_eq!(t.view("b").unwrap().reference().unwrap().name, "c2");
    fleece.cancel_snapshot("t").unwrap();
    drop(fleece);
    let fleece = host.mount();
    assert_eq!(rows(&fleece), expected, "after a kill");
    fleece.close().unwrap();
    let fleece = host.mount();
    assert_eq!(rows(&fleece), expected, "after a clean stop");
    fleece.set_consumer("daily", "c1").unwrap();
    assert_eq!(rows(&fleece), [("c1".to_owned(), vec!["a".to_owned(), "b".to_owned()])]);
}

#[test]
fn a_failed_backup_does_not_move_the_consumer_and_the_retry_has_every_change() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    let mut copy = vec![0; DISK_BYTES as usize];
    for round in 0..6_u64 {
        oracle.write(&fleece, "a", round * 40_000, 30_000, round as u8).unwrap();
        oracle.zero(&fleece, "a", round * 11_000, 8_000, true).unwrap();
        let name = format!("r{round}");
        oracle.note(&name);
        let view = freeze_since(&fleece, &name, Since::Consumer("daily".to_owned())).views()[0].clone();
        oracle.write(&fleece, "a", 300_000, 50_000, 90 + round as u8).unwrap();
        if round == 2 || round == 3 {
            fleece.cancel_snapshot(&name).unwrap();
            continue;
        }
        for extent in extents(&view, view.reference().map(|point| point.uuid)).unwrap() {
            let range = extent.start as usize..(extent.start + extent.length) as usize;
            match (extent.dirty, extent.zero) {
                (true, true) => copy[range].fill(0),
                (true, false) => copy[range].copy_from_slice(&read_view(&view, extent.start, extent.length).unwrap()),
                _ => {}
            }
        }
        fleece.complete_snapshot(&name, Some("daily")).unwrap();
        assert_same(&copy, oracle.0["a"].at(&name), "full plus increments");
    }
}

#[test]
fn no_more_checkpoints_are_kept_than_the_limit_and_never_one_that_is_needed_goes() {
    let host = Host::one().with(|options| options.keep_checkpoints = 4);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    for round in 0..12_u64 {
        let name = format!("c{round}");
        oracle.freeze(&fleece, &name).unwrap();
        oracle.check(&fleece, EXACT);
        let consumer = (round == 1).then_some("slow");
        fleece.complete_snapshot(&name, consumer).unwrap();
        oracle.write(&fleece, "a", round % 7 * GRANULE, 1, 1).unwrap();
    }
    let names = checkpoint_names(&fleece);
    assert!(names.contains(&"c1".to_owned()), "a consumer points at it: {names:?}");
    assert_eq!(names, ["c1", "c9", "c10", "c11"]);
    oracle.check_all(&fleece, "probe", EXACT);
}

#[test]
fn checkpoints_tell_what_changed_since() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.freeze(&fleece, "c1").unwrap();
    oracle.write(&fleece, "a", 10, 2 * GRANULE, 1).unwrap();
    oracle.freeze(&fleece, "c2").unwrap();
    oracle.write(&fleece, "a", DISK_BYTES - 1, 1, 1).unwrap();
    let rows = fleece.checkpoints();
    let row = |index: usize| (rows[index].name.as_str(), rows[index].disks[0].dirty, rows[index].disks[0].recording);
    assert_eq!(row(0), ("c1", 3 * GRANULE, false));
    assert_eq!(row(1), ("c2", GRANULE, true));
    assert!(rows.iter().all(|row| !row.disks[0].completed && row.disks[0].granularity == GRANULE));
}

/// Damage of the saved bits of one checkpoint is found, and told, where a map needs them.
#[test]
fn a_sealed_bitmap_that_cannot_be_read_means_everything_with_the_reason() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    for name in ["c1", "c2", "c3"] {
        oracle.freeze(&fleece, name).unwrap();
        fleece.complete_snapshot(name, None).unwrap();
        oracle.write(&fleece, "a", GRANULE, 1, name.as_bytes()[1]).unwrap();
    }
    let sidecar = host.files["a"].state.open("dirty.log").unwrap();
    let area = 8_454_144;
    let mut bits = [0; 1];
    sidecar.read_at(&mut bits, area).unwrap();
    assert_eq!(bits, [2], "the bits of c1");
    sidecar.write_at(&[0], area).unwrap();
    let view = oracle.freeze(&fleece, "t").unwrap().views()[0].clone();
    let map = view.map(view.since().first().map(|point| point.uuid)).unwrap();
    assert!(map.everything().is_some());
    assert_eq!(map.dirty_bytes(), DISK_BYTES);
    oracle.check(&fleece, Allow { more: true, ..EXACT });
    let c2 = extents_since(&view, "c2");
    assert_eq!(dirty_granules(&c2), [1].into(), "the others stand");
}

#[test]
fn a_flush_that_failed_once_fails_until_the_disk_is_mounted_again() {
    let host = Host::pair();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, 100, 1).unwrap();
    host.files["a"].image_faults.fail_nth(Call::Sync, 1, errno::EIO);
    let disk = fleece.disk("a").unwrap();
    assert_errno(disk.flush(), errno::EIO);
    for _ in 0..3 {
        assert_errno(disk.flush(), errno::EIO);
    }
    fleece.disk("b").unwrap().flush().unwrap();
    oracle.write(&fleece, "a", 50, 100, 2).unwrap();
    oracle.check_all(&fleece, "probe", EXACT);
    drop((disk, fleece));
    let fleece = host.mount();
    fleece.disk("a").unwrap().flush().unwrap();
}

/// What the failed flush lost may be what a backup has read: a later sync that succeeds says nothing about it.
#[test]
fn a_disk_whose_flush_failed_is_never_marked_clean() {
    let host = Host::one();
    let fleece = host.mount();
    freeze(&fleece, "s");
    fleece.complete_snapshot("s", None).unwrap();
    fleece.disk("a").unwrap().write(&[1; 100], 0).unwrap();
    host.files["a"].image_faults.fail_nth(Call::Sync, 1, errno::EIO);
    assert_errno(fleece.disk("a").unwrap().flush(), errno::EIO);
    assert_errno(fleece.close(), errno::EIO);
    drop(fleece);
    let fleece = host.mount();
    assert_ne!(fleece.disk_infos()[0].tracking, "exact");
}

#[test]
fn a_map_is_walked_from_any_of_its_extents_however_many_zero_runs_there_are() {
    const BLOCK: u64 = 4096;
    // More offsets than one window of the zero map holds: 8192 of 8 bytes.
    const RUNS: u64 = 9000;
    let host = Host::new(&["a"], RUNS * 2 * BLOCK);
    let fleece = host.mount();
    freeze(&fleece, "old");
    let disk = fleece.disk("a").unwrap();
    (0..RUNS).for_each(|run| assert_eq!(disk.write(&[1; BLOCK as usize], run * 2 * BLOCK).unwrap(), BLOCK as usize));
    freeze(&fleece, "new");
    let view = view_of(&fleece, "new", "a");
    let map = view.map(view.since().first().map(|point| point.uuid)).unwrap();
    let all: Vec<Extent> = map.extents_from(0).unwrap().map(|extent| extent.unwrap()).collect();
    let zero: Vec<bool> = all.iter().map(|extent| extent.zero).collect();
    assert_eq!((all.len() as u64, zero.iter().filter(|zero| **zero).count() as u64), (2 * RUNS, RUNS));
    assert!(all.iter().all(|extent| extent.length == BLOCK && extent.dirty));
    for index in (0..all.len()).map(|step| step * 7919 % all.len()).take(500).chain(8000..8400) {
        let some: Vec<Extent> =
            map.extents_from(all[index].start).unwrap().take(4).map(|extent| extent.unwrap()).collect();
        assert_eq!(some, all[index..all.len().min(index + 4)], "from extent {index}");
    }
}
