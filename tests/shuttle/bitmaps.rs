//! Batches and holds beside writers: a write is on one side of the instant, the same one in every bitmap and view.

use crate::rig::*;
use fleecefs::bitmap::Bits;
use fleecefs::fleece::{Action, BitmapRef, Fleece, HoldEnd, Options, SnapshotRequest};
use shuttle::thread;
use std::sync::Arc;

fn bm(text: &str) -> BitmapRef {
    let (disk, name) = text.split_once('/').unwrap();
    BitmapRef::new(disk, name)
}

fn add(text: &str, disabled: bool) -> Action {
    let BitmapRef { disk, name } = bm(text);
    Action::Add { disk, name, granularity: Some(GRANULE), persistent: true, disabled }
}

fn merge(target: &str, sources: &[&str]) -> Action {
    Action::Merge { target: bm(target), sources: sources.iter().map(|source| bm(source)).collect() }
}

/// Set granules of a bitmap.
fn count(fleece: &Fleece, text: &str) -> u64 {
    let BitmapRef { disk, name } = bm(text);
    let all = fleece.bitmaps(&disk).unwrap();
    all.into_iter().find(|info| info.name == name).unwrap().count / GRANULE
}

/// Two disks with the recording bitmaps `all` and `x`, and `z` of the first one.
fn rig() -> Arc<Rig> {
    let rig = Rig::new(Options::default(), &[2 * GRANULE, 2 * GRANULE]);
    let steps = [add("a/all", false), add("a/x", false), add("a/z", false), add("b/all", false), add("b/x", false)];
    rig.fleece.apply(&steps).unwrap();
    rig
}

/// Writes to disk `a`, then to disk `b`, and once more to `a`.
fn writer(rig: &Arc<Rig>) -> thread::JoinHandle<()> {
    let rig = rig.clone();
    thread::spawn(move || {
        rig.disk("a").write(&[1; 8], 0).unwrap();
        rig.disk("b").write(&[1; 8], 0).unwrap();
        rig.disk("a").write(&[1; 8], GRANULE).unwrap();
    })
}

#[test]
fn a_write_is_on_one_side_of_a_batch_in_every_bitmap() {
    explore(1, || {
        let rig = rig();
        let writer = writer(&rig);
        let steps = [
            add("a/before", true),
            merge("a/before", &["a/x"]),
            add("b/before", true),
            merge("b/before", &["b/x"]),
            Action::Clear(bm("a/x")),
            Action::Clear(bm("b/x")),
            Action::Disable(bm("a/z")),
            add("a/after", false),
            Action::Snapshot(SnapshotRequest { name: "s".to_owned(), ..SnapshotRequest::default() }),
        ];
        rig.fleece.apply(&steps).unwrap();
        writer.join().unwrap();
        let count = |name: &str| count(&rig.fleece, name);
        let frozen = content(&rig.view("s"));
        let before = u64::from(frozen[0]) + u64::from(frozen[GRANULE as usize]);
        let before_b = count("b/before");
        assert_eq!([count("a/before"), count("a/z")], [before, before]);
        assert_eq!([count("a/x"), count("a/after"), count("a/s")], [2 - before; 3]);
        assert_eq!(count("b/x"), 1 - before_b);
        // One instant of both disks: the writes came one after the other.
        assert!(before >= before_b && (before < 2 || before_b == 1), "{before} {before_b}");
    });
}

/// What counts as full there is skipped by the merge.
#[test]
fn a_merge_beside_the_last_mark_of_a_group_leaves_no_bit_out() {
    const GROUP: u64 = 64 * 64;
    explore(1, || {
        let (bits, all) = (Arc::new(Bits::heap(GROUP)), Bits::heap(GROUP));
        bits.set_range(0..GROUP - 1);
        all.set_range(0..GROUP);
        let marker = {
            let bits = bits.clone();
            thread::spawn(move || bits.set_range(GROUP - 1..GROUP))
        };
        bits.or_from(&all);
        assert!(bits.get(GROUP - 1));
        marker.join().unwrap();
        assert_eq!((bits.count(), bits.next_clear(0, GROUP)), (GROUP, None));
    });
}

#[test]
fn a_merge_beside_writers_forgets_nothing() {
    explore(1, || {
        let rig = rig();
        let writer = writer(&rig);
        rig.fleece.apply(&[merge("a/z", &["b/all"]), merge("a/x", &["a/z"])]).unwrap();
        rig.fleece.apply(&[Action::Disable(bm("a/z")), Action::Enable(bm("a/z"))]).unwrap();
        writer.join().unwrap();
        assert_eq!([count(&rig.fleece, "a/z"), count(&rig.fleece, "a/x"), count(&rig.fleece, "a/all")], [2; 3]);
    });
}

#[test]
fn what_a_hold_did_not_see_its_successor_has() {
    for abdicate in [true, false] {
        explore(1, move || {
            let rig = rig();
            let writer = writer(&rig);
            let hold = rig.fleece.apply(&[Action::Hold(bm("a/x")), add("a/since", false)]).unwrap().holds.remove(0);
            let seen = hold.bitmap().count_bytes() / GRANULE;
            let end = if abdicate { HoldEnd::Abdicate } else { HoldEnd::Reclaim };
            rig.fleece.end_holds(&[(&hold, end)]).unwrap();
            writer.join().unwrap();
            let (x, since) = (count(&rig.fleece, "a/x"), count(&rig.fleece, "a/since"));
            assert_eq!(seen + since, 2);
            assert_eq!(x, if abdicate { since } else { 2 });
        });
    }
}

#[test]
fn a_jobs_view_and_its_bitmap_are_of_one_instant() {
    explore(1, || {
        let rig = rig();
        let writer = writer(&rig);
        let freeze = Action::Freeze { disk: "a".to_owned(), record: Some(GRANULE) };
        let applied = rig.fleece.apply(&[freeze, Action::Hold(bm("a/x"))]).unwrap();
        writer.join().unwrap();
        let (frozen, hold) = (&applied.frozen[0], &applied.holds[0]);
        let content = content(frozen.view());
        let mut later = 0;
        for at in [0, GRANULE] {
            let there = content[at as usize] != 0;
            later += u64::from(!there);
            assert_eq!(hold.bitmap().is_dirty(at), there);
            assert_eq!(frozen.overwritten().unwrap().is_dirty(at), !there);
        }
        rig.fleece.end_holds(&[(hold, HoldEnd::Abdicate)]).unwrap();
        assert_eq!(count(&rig.fleece, "a/x"), later);
    });
}
