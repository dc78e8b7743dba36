//! Disks: resize, read-only ones, names, adding and removing, clean stops.

use crate::rig::*;
use fleecefs::bitmap::DirtyBitmap;
use fleecefs::error::errno;
use fleecefs::fleece::Since;
use fleecefs::storage::Storage;
use fleecefs::storage::faulty::Call;

#[test]
fn a_write_past_the_end_is_refused_and_one_across_it_is_cut() {
    let host = Host::one();
    let fleece = host.mount();
    let disk = fleece.disk("a").unwrap();
    assert_errno(disk.write(&[1], DISK_BYTES), errno::ENOSPC);
    assert_errno(disk.write(&[1], u64::MAX), errno::ENOSPC);
    assert_eq!(disk.write(&[1; 100], DISK_BYTES - 10).unwrap(), 10);
    assert_eq!(disk.write(&[], DISK_BYTES).unwrap(), 0);
    for offset in [DISK_BYTES, DISK_BYTES - 10, u64::MAX - 10] {
        assert_errno(disk.write_zeroes(offset, 11), errno::ENOSPC);
        assert_errno(disk.discard(offset, 11), errno::ENOSPC);
    }
    assert_eq!(disk.read(&mut [0; 100], DISK_BYTES - 10).unwrap(), 10);
    assert_eq!(disk.read(&mut [0; 100], u64::MAX).unwrap(), 0);
    assert_eq!(host.files["a"].image.len().unwrap(), DISK_BYTES);
}

#[test]
fn growing_keeps_views_and_marks_the_new_area_dirty() {
    let host = Host::pair();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", DISK_BYTES - 10, 10, 2).unwrap();
    oracle.grow(&fleece, "a", DISK_BYTES + 3 * GRANULE).unwrap();
    oracle.check(&fleece, EXACT);
    // Past the old end, and across it in the view's last chunk.
    oracle.write(&fleece, "a", DISK_BYTES + 2 * GRANULE, 5000, 3).unwrap();
    oracle.write(&fleece, "a", DISK_BYTES - 500, 1000, 4).unwrap();
    oracle.check(&fleece, EXACT);
    oracle.freeze(&fleece, "t").unwrap();
    oracle.write(&fleece, "a", DISK_BYTES - 2000, 9000, 5).unwrap();
    oracle.check(&fleece, EXACT);
    let map = extents_since(&view_of(&fleece, "t", "a"), "s");
    assert_eq!(dirty_granules(&map), [6, 7, 8, 9].into(), "old end, new area");
    // A layer that is larger is folded into one that is smaller.
    fleece.cancel_snapshot("t").unwrap();
    oracle.freeze(&fleece, "u").unwrap();
    fleece.reap();
    oracle.check(&fleece, EXACT);
    drop(fleece);
    let fleece = host.mount();
    oracle.check(&fleece, EXACT);
}

#[test]
fn shrinking_with_snapshots_is_refused_and_without_keeps_every_map_right() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    assert_errno(fleece.resize_disk("a", DISK_BYTES - 1), errno::EBUSY);
    let open = fleece.snapshot("s").unwrap();
    assert!(open.opened());
    fleece.complete_snapshot("s", None).unwrap();
    assert_errno(fleece.resize_disk("a", DISK_BYTES - 1), errno::EBUSY);
    open.closed();
    oracle.write(&fleece, "a", 2 * GRANULE, 10, 2).unwrap();
    fleece.resize_disk("a", 3 * GRANULE).unwrap();
    assert_eq!((fleece.disk("a").unwrap().size(), host.files["a"].image.len().unwrap()), (3 * GRANULE, 3 * GRANULE));
    oracle.story("a").live.truncate(3 * GRANULE as usize);
    oracle.freeze(&fleece, "t").unwrap();
    oracle.check(&fleece, EXACT);
    fleece.complete_snapshot("t", None).unwrap();
    oracle.grow(&fleece, "a", 5 * GRANULE).unwrap();
    oracle.freeze(&fleece, "u").unwrap();
    oracle.check(&fleece, EXACT);
    assert_errno(fleece.resize_disk("a", 0), errno::EINVAL);
    assert_errno(fleece.resize_disk("a", (1 << 60) + 1), errno::EINVAL);
    assert_errno(fleece.resize_disk("x", 1), errno::ENOENT);
}

#[test]
fn a_resize_that_fails_changes_nothing() {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    fleece.complete_snapshot("s", None).unwrap();
    host.files["a"].image_faults.fail_all(Call::SetLen, errno::EFBIG);
    assert_errno(fleece.resize_disk("a", 2 * DISK_BYTES), errno::EFBIG);
    assert_errno(fleece.resize_disk("a", DISK_BYTES / 2), errno::EFBIG);
    assert_eq!(fleece.disk("a").unwrap().size(), DISK_BYTES);
    host.clear_faults();
    oracle.write(&fleece, "a", DISK_BYTES - 1, 1, 2).unwrap();
    oracle.check_all(&fleece, "probe", Allow { more: true, ..EXACT });
    drop(fleece);
    let fleece = host.mount();
    oracle.check_all(&fleece, "probe-2", Allow { more: true, ..EXACT });
}

/// The intent page covers 32 GiB in regions of 1 MiB; beyond, regions must be larger.
#[test]
fn a_disk_may_grow_and_shrink_across_32_gib() {
    let small = 1_u64 << 30;
    let large = 40_u64 << 30;
    let host = Host::new(&["a"], small);
    let fleece = host.mount();
    freeze(&fleece, "s");
    fleece.complete_snapshot("s", None).unwrap();
    fleece.resize_disk("a", large).unwrap();
    fleece.disk("a").unwrap().write(&[1; 10], large - 10).unwrap();
    fleece.close().unwrap();
    let fleece = host.mount();
    assert_eq!(fleece.disk("a").unwrap().size(), large);
    fleece.resize_disk("a", small).unwrap();
    fleece.close().unwrap();
    let fleece = host.mount();
    freeze(&fleece, "t");
    let map = extents_since(&view_of(&fleece, "t", "a"), "s");
    assert!(!map[0].dirty);
}

#[test]
fn an_image_that_another_program_shrank_can_be_mounted() {
    for clean in [true, false] {
        let host = Host::new(&["a"], 40 << 30);
        let fleece = host.mount();
        freeze(&fleece, "s");
        fleece.complete_snapshot("s", None).unwrap();
        if clean {
            fleece.close().unwrap();
        }
        drop(fleece);
        host.files["a"].image.set_len(1 << 30).unwrap();
        let fleece = host.mount();
        let snapshot = freeze(&fleece, "t");
        if clean {
            assert!(snapshot.views()[0].full_reason().is_some());
        }
        assert_eq!(snapshot.views()[0].size(), 1 << 30);
    }
}

#[test]
fn a_grown_disk_marks_dirty_past_the_old_end_with_every_granularity() {
    for granularity in [32 << 10, 64 << 10, 128 << 10] {
        let bitmap = DirtyBitmap::heap(granularity, 1 << 20).unwrap();
        let bits = fleecefs::bitmap::Bits::heap(DirtyBitmap::bits_for(granularity, 2 << 20).unwrap());
        let grown = bitmap.resized(2 << 20, bits, false).unwrap();
        assert_eq!(grown.count_bytes(), 0);
        grown.mark((2 << 20) - 1, 1);
        assert_eq!(grown.count_bytes(), granularity);
        assert!(grown.is_dirty((2 << 20) - granularity) && !grown.is_dirty((2 << 20) - granularity - 1));
    }
    assert_errno(DirtyBitmap::heap(64_000, 1 << 20), errno::EINVAL);
}

#[test]
fn a_read_only_disk_is_served_frozen_and_never_changed() {
    let host = Host::pair();
    host.files["a"].image.write_at(&pattern(1, 0, DISK_BYTES), 0).unwrap();
    let before = host.files["a"].image.stamp().unwrap();
    let fleece = host.empty_mount();
    let disk = host.attach_as(&fleece, "a", true).unwrap();
    host.attach(&fleece, "b").unwrap();
    assert!(disk.read_only());
    assert_errno(disk.write(&[1], 0), errno::EROFS);
    assert_errno(disk.write_zeroes(0, 1), errno::EROFS);
    assert_errno(disk.discard(0, 1), errno::EROFS);
    assert_errno(fleece.resize_disk("a", 2 * DISK_BYTES), errno::EROFS);
    disk.flush().unwrap();
    freeze(&fleece, "s");
    assert_same(&read_view(&view_of(&fleece, "s", "a"), 0, DISK_BYTES).unwrap(), &pattern(1, 0, DISK_BYTES), "view");
    fleece.complete_snapshot("s", None).unwrap();
    freeze(&fleece, "t");
    let map = extents_since(&view_of(&fleece, "t", "a"), "s");
    assert!(dirty_granules(&map).is_empty());
    fleece.complete_snapshot("t", None).unwrap();
    fleece.close().unwrap();
    assert_eq!(host.files["a"].image.stamp().unwrap(), before);
}

#[test]
fn names_of_disks_are_checked_and_taken_once() {
    let host = Host::pair();
    let fleece = host.mount();
    assert_errno(host.attach(&fleece, "a"), errno::EEXIST);
    for bad in ["", "a.b", "a/b", "ä", &"x".repeat(65)] {
        let files = Files::new("x", CHUNK);
        let (state, stores) = (std::sync::Arc::new(files.state), std::sync::Arc::new(files.stores));
        assert_errno(attach_over(&fleece, bad, files.image.shared(), state, stores, false), errno::EINVAL);
    }
    assert_eq!(fleece.disks().iter().map(|disk| disk.name().to_owned()).collect::<Vec<_>>(), PAIR);
}

#[test]
fn names_of_snapshots_and_consumers_are_checked_and_taken_once() {
    let host = Host::one();
    let fleece = host.mount();
    for bad in ["", ".a", "a/b", "a\nb", "latest"] {
        assert_errno(try_freeze(&fleece, bad, &[], None), errno::EINVAL);
    }
    assert_errno(try_freeze(&fleece, &"x".repeat(201), &[], None), errno::ENAMETOOLONG);
    let long = "ü".repeat(100);
    freeze(&fleece, &long);
    freeze(&fleece, "s");
    for bad in ["", ".a", "latest"] {
        assert_errno(fleece.complete_snapshot("s", Some(bad)), errno::EINVAL);
        assert_errno(fleece.set_consumer(bad, "s"), errno::EINVAL);
    }
    assert_errno(try_freeze(&fleece, "s", &[], None), errno::EEXIST);
    fleece.complete_snapshot("s", None).unwrap();
    assert_errno(try_freeze(&fleece, "s", &[], None), errno::EEXIST);
    fleece.delete_checkpoint("s").unwrap();
    freeze(&fleece, "s");
    fleece.cancel_snapshot("s").unwrap();
    freeze(&fleece, "s");
    assert_errno(fleece.complete_snapshot("x", None), errno::ENOENT);
    assert_errno(fleece.cancel_snapshot("x"), errno::ENOENT);
    drop(fleece);
    let fleece = host.mount();
    assert_errno(try_freeze(&fleece, &long, &[], None), errno::EEXIST);
    assert_errno(try_freeze(&host.empty_mount(), "s", &[], None), errno::ENODEV);
}

#[test]
fn a_disk_is_removed_only_when_nobody_uses_it() {
    let host = Host::pair();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, 100, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    assert_errno(fleece.remove_disk("a"), errno::EBUSY);
    let snapshot = fleece.snapshot("s").unwrap();
    assert!(snapshot.opened());
    fleece.complete_snapshot("s", Some("daily")).unwrap();
    assert_errno(fleece.remove_disk("a"), errno::EBUSY);
    snapshot.closed();
    let disk = fleece.disk("a").unwrap();
    disk.opened();
    assert_errno(fleece.remove_disk("a"), errno::EBUSY);
    disk.closed();
    drop(disk);
    oracle.write(&fleece, "a", GRANULE, 1, 2).unwrap();
    fleece.remove_disk("a").unwrap();
    assert_errno(fleece.disk("a"), errno::ENOENT);
    assert_errno(fleece.remove_disk("a"), errno::ENOENT);
    host.attach(&fleece, "a").unwrap();
    oracle.check_all(&fleece, "probe", EXACT);
    assert_eq!(fleece.consumers()[0].disks, PAIR);
}

/// A disk that comes back brings its part of a snapshot whose other part is open.
#[test]
fn a_disk_that_joins_an_open_snapshot_does_not_end_its_holds() {
    let host = Host::pair();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    drop(fleece);
    let fleece = host.empty_mount();
    host.attach(&fleece, "a").unwrap();
    let snapshot = fleece.snapshot("s").unwrap();
    assert!(snapshot.opened());
    let view = snapshot.view("a").unwrap().clone();
    host.attach(&fleece, "b").unwrap();
    assert_eq!(fleece.snapshots().len(), 1);
    assert_eq!(fleece.snapshot("s").unwrap().views().len(), 2);
    fleece.complete_snapshot("s", None).unwrap();
    fleece.reap();
    oracle.write(&fleece, "a", 0, DISK_BYTES, 2).unwrap();
    oracle.0["a"].check_view(&view, EXACT);
}

#[test]
fn views_do_not_survive_a_clean_stop_unless_they_are_kept() {
    for keep in [false, true] {
        let host = Host::pair().with(|options| options.keep_snapshots = keep);
        let fleece = host.mount();
        let mut oracle = Oracle::new(&host);
        oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
        for name in ["s1", "s2", "s3"] {
            oracle.freeze(&fleece, name).unwrap();
            oracle.write(&fleece, "a", 3000, 50_000, name.as_bytes()[1]).unwrap();
            oracle.write(&fleece, "b", DISK_BYTES - 1, 1, 1).unwrap();
        }
        fleece.release("s1", "b", 0, 2 * CHUNK).unwrap();
        fleece.cancel_snapshot("s2").unwrap();
        let map = extents(&view_of(&fleece, "s3", "a"), None).unwrap();
        fleece.close().unwrap();
        drop(fleece);
        let fleece = host.mount();
        assert!(fleece.disk_infos().iter().all(|info| info.tracking == "exact"));
        if keep {
            let names: Vec<String> = fleece.snapshots().iter().map(|s| s.name().to_owned()).collect();
            assert_eq!(names, ["s1", "s3"]);
            assert_errno(read_view(&view_of(&fleece, "s1", "b"), CHUNK, 1), errno::EIO);
            oracle.write(&fleece, "a", 0, DISK_BYTES, 9).unwrap();
            for (snapshot, disk) in [("s1", "a"), ("s3", "a"), ("s3", "b")] {
                oracle.0[disk].check_view(&view_of(&fleece, snapshot, disk), EXACT);
            }
            assert_eq!(extents(&view_of(&fleece, "s3", "a"), None).unwrap(), map);
            fleece.close().unwrap();
        } else {
            assert!(fleece.snapshots().is_empty());
            assert!(host.files.values().all(|files| files.layers().is_empty()), "their space is freed");
            let t = oracle.freeze(&fleece, "t").unwrap();
            assert_eq!(t.views()[0].reference(), None, "unmounted snapshots are no reference");
            oracle.check(&fleece, EXACT);
        }
    }
}

#[test]
fn kept_views_survive_many_stops_and_kills() {
    let host = Host::pair().with(|options| options.keep_snapshots = true);
    let mut oracle = Oracle::new(&host);
    for round in 0..6_u64 {
        let fleece = host.mount();
        oracle.check(&fleece, EXACT);
        oracle.write(&fleece, "a", round * 5000, 70_000, round as u8).unwrap();
        oracle.freeze(&fleece, &format!("s{round}")).unwrap();
        oracle.write(&fleece, "b", round * 7000, 9_000, round as u8).unwrap();
        oracle.check(&fleece, EXACT);
        if round == 3 {
            fleece.complete_snapshot("s1", None).unwrap();
            fleece.reap();
        }
        if round % 2 == 0 {
            fleece.close().unwrap();
        }
    }
    let fleece = host.mount();
    assert_eq!(fleece.snapshots().len(), 5);
    oracle.check_all(&fleece, "probe", EXACT);
}

#[test]
fn a_broken_view_stays_broken_over_kill_and_clean_stop() {
    for clean in [false, true] {
        let host = Host::one().with(|options| options.keep_snapshots = true);
        let fleece = host.mount();
        let mut oracle = Oracle::new(&host);
        oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
        oracle.freeze(&fleece, "s").unwrap();
        host.files["a"].store_faults.fail_all(Call::Write, errno::EIO);
        oracle.write(&fleece, "a", 0, DISK_BYTES, 2).unwrap();
        host.clear_faults();
        if clean {
            fleece.close().unwrap();
        }
        drop(fleece);
        let fleece = host.mount();
        let view = view_of(&fleece, "s", "a");
        assert!(view.broken().is_some());
        assert_errno(read_view(&view, 0, 1), errno::EIO);
        assert_errno(fleece.complete_snapshot("s", Some("daily")), errno::EIO);
    }
}

#[test]
fn an_unknown_since_of_the_consumer_is_full_with_a_reason_on_every_disk() {
    let host = Host::pair();
    let fleece = host.mount();
    let snapshot = freeze_since(&fleece, "s", Since::Consumer("daily".to_owned()));
    for view in snapshot.views() {
        assert!(view.reference().is_none());
        assert!(view.full_reason().unwrap().contains("daily"));
    }
}
