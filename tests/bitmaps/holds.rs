//! Holds: what a job does to a bitmap, however it ends, with the guest's writes meanwhile.

use crate::rig::*;
use crate::steps::*;
use fleecefs::bitmap::DirtyBitmap;
use fleecefs::error::errno;
use fleecefs::fleece::{Fleece, HoldEnd};

/// Of the granules that the holder saw, those that were not copied.
fn rest(granules: &[u64]) -> DirtyBitmap {
    let bits = DirtyBitmap::heap(GRANULE, DISK_BYTES).unwrap();
    granules.iter().for_each(|granule| bits.mark(granule * GRANULE, 1));
    bits
}

fn end(fleece: &Fleece, hold: &fleecefs::fleece::Hold, end: HoldEnd) {
    fleece.end_holds(&[(hold, end)]).unwrap();
}

#[test]
fn a_held_bitmap_ends_as_the_job_says() {
    for (how, expected) in [
        (HoldEnd::Abdicate, &[2u64, 3][..]),
        (HoldEnd::Reclaim, &[0, 1, 2, 3]),
        (HoldEnd::ReclaimWith(rest(&[1])), &[1, 2, 3]),
    ] {
        for persistent in [false, true] {
            let host = Host::one();
            let fleece = host.mount();
            apply(&fleece, &[added("a/x", Some(GRANULE), persistent, false)]);
            touch(&fleece, "a", &[0, 1]);
            let hold = fleece.hold("a", "x").unwrap();
            touch(&fleece, "a", &[2, 3]);
            assert_eq!(granules_of(hold.bitmap()), [0, 1]);
            let seen = info(&fleece, "a/x");
            assert!(seen.busy && seen.recording && seen.count == 2 * GRANULE, "{seen:?}");
            assert_eq!(hash(&fleece, "a/x"), hash_of(&[0, 1]));
            let how = match &how {
                HoldEnd::ReclaimWith(_) => HoldEnd::ReclaimWith(rest(&[1])),
                HoldEnd::Abdicate => HoldEnd::Abdicate,
                HoldEnd::Reclaim => HoldEnd::Reclaim,
            };
            let told = format!("{how:?}, persistent: {persistent}");
            end(&fleece, &hold, how);
            assert_eq!((hash(&fleece, "a/x"), info(&fleece, "a/x").busy), (hash_of(expected), false), "{told}");
            end(&fleece, &hold, HoldEnd::Abdicate);
            touch(&fleece, "a", &[5]);
            let all: Vec<u64> = expected.iter().copied().chain([5]).collect();
            assert_eq!(hash(&fleece, "a/x"), hash_of(&all), "{told}");
            fleece.close().unwrap();
            drop((fleece, hold));
            let fleece = host.mount();
            assert_eq!(names(&fleece, "a").is_empty(), !persistent);
            if persistent {
                assert_eq!(hash(&fleece, "a/x"), hash_of(&all), "{told}");
            }
        }
    }
}

#[test]
fn a_held_bitmap_that_is_disabled_is_followed_by_a_clear_one() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    touch(&fleece, "a", &[1, 2]);
    apply(&fleece, &[disable("a/x")]);
    let reclaimed = fleece.hold("a", "x").unwrap();
    touch(&fleece, "a", &[4]);
    assert!(!info(&fleece, "a/x").recording);
    end(&fleece, &reclaimed, HoldEnd::Reclaim);
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[1, 2]));
    let with = fleece.hold("a", "x").unwrap();
    end(&fleece, &with, HoldEnd::ReclaimWith(rest(&[2])));
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[2]));
    let abdicated = fleece.hold("a", "x").unwrap();
    end(&fleece, &abdicated, HoldEnd::Abdicate);
    assert_eq!((count(&fleece, "a/x"), info(&fleece, "a/x").recording), (0, false));
}

#[test]
fn while_it_is_held_nothing_else_changes_a_bitmap_nor_its_disk() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), add("a/y")]);
    let hold = fleece.hold("a", "x").unwrap();
    let busy = "Bitmap 'x' is currently in use by another operation and cannot be used";
    for step in
        [clear("a/x"), enable("a/x"), disable("a/x"), remove("a/x"), merge("a/y", &["a/x"]), crate::steps::hold("a/x")]
    {
        let refused = refused(&fleece, std::slice::from_ref(&step));
        assert_eq!((refused.text.as_str(), refused.errno), (busy, errno::EBUSY), "{step:?}");
    }
    assert_eq!(refused(&fleece, &[merge("a/x", &["a/y"])]).text, busy);
    assert_eq!(refused(&fleece, &[add("a/x")]).text, "Bitmap already exists: x");
    assert_errno(fleece.resize_disk("a", 10 * GRANULE), errno::EBUSY);
    assert_errno(fleece.remove_disk("a"), errno::EBUSY);
    freeze(&fleece, "s");
    fleece.cancel_snapshot("s").unwrap();
    touch(&fleece, "a", &[3]);
    drop(hold);
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[3]), "a hold that is dropped is reclaimed");
    fleece.reap();
    fleece.resize_disk("a", 10 * GRANULE).unwrap();
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[3]));
    apply(&fleece, &[clear("a/x")]);
    fleece.remove_disk("a").unwrap();
}

#[test]
fn a_kill_while_held_is_a_reclaim() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), transient("a/t")]);
    touch(&fleece, "a", &[0]);
    let holds = apply(&fleece, &[hold("a/x"), hold("a/t")]).holds;
    touch(&fleece, "a", &[1]);
    drop(fleece);
    let fleece = host.mount();
    assert_eq!((hash(&fleece, "a/x"), info(&fleece, "a/x").busy), (hash_of(&[0, 1]), false));
    assert_eq!(names(&fleece, "a"), ["x"]);
    assert_errno(fleece.end_holds(&[(&holds[0], HoldEnd::Abdicate)]), errno::ESTALE);
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[0, 1]));
}

#[test]
fn holds_begin_at_the_instant_of_their_batch() {
    let host = Host::pair();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), add("b/x")]);
    touch(&fleece, "a", &[0]);
    touch(&fleece, "b", &[1]);
    let applied = apply(
        &fleece,
        &[snapshot("s"), merge("a/x", &["b/x"]), hold("a/x"), add("b/new"), hold("b/new"), clear("b/x"), hold("b/x")],
    );
    let seen: Vec<_> = applied.holds.iter().map(|hold| granules_of(hold.bitmap())).collect();
    assert_eq!(seen, [vec![0, 1], vec![], vec![]]);
    let told: Vec<_> = applied.holds.iter().map(|hold| (hold.disk(), hold.name())).collect();
    assert_eq!(told, [("a", "x"), ("b", "new"), ("b", "x")]);
    touch(&fleece, "a", &[5]);
    touch(&fleece, "b", &[5]);
    for hold in &applied.holds {
        end(&fleece, hold, HoldEnd::Abdicate);
    }
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[5]));
    assert_eq!([hash(&fleece, "b/x"), hash(&fleece, "b/new")], [hash_of(&[5]), hash_of(&[5])]);
}

#[test]
fn a_group_of_holds_ends_on_all_disks_or_on_none() {
    let host = Host::pair();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), add("b/x")]);
    touch(&fleece, "a", &[0]);
    touch(&fleece, "b", &[0]);
    let holds = apply(&fleece, &[hold("a/x"), hold("b/x")]).holds;
    touch(&fleece, "a", &[1]);
    touch(&fleece, "b", &[1]);
    let other = DirtyBitmap::heap(GRANULE, 2 * DISK_BYTES).unwrap();
    let ends = [(&holds[0], HoldEnd::Abdicate), (&holds[1], HoldEnd::ReclaimWith(other))];
    assert_errno(fleece.end_holds(&ends), errno::EINVAL);
    assert!(info(&fleece, "a/x").busy && info(&fleece, "b/x").busy);
    // One failed: all keep their old point.
    let ends: Vec<_> = holds.iter().map(|hold| (hold, HoldEnd::Reclaim)).collect();
    fleece.end_holds(&ends).unwrap();
    assert_eq!([hash(&fleece, "a/x"), hash(&fleece, "b/x")], [hash_of(&[0, 1]), hash_of(&[0, 1])]);
}
