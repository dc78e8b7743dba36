//! The core under shuttle: its very code on shuttle's locks, atomics and threads, over memory, under thousands of
//! schedules, random ones and PCT's.
//!
//! `cargo test --features shuttle --test shuttle`; `FLEECEFS_SHUTTLE_ITERATIONS=20000` looks longer. A failure prints
//! its schedule. shuttle takes every atomic access as sequentially consistent; `tests/loom.rs` has the weaker orders.

#![cfg(feature = "shuttle")]

#[path = "shuttle/bitmaps.rs"]
mod bitmaps;
#[path = "shuttle/power.rs"]
mod power;
#[path = "shuttle/rig.rs"]
mod rig;

use fleecefs::error::errno;
use fleecefs::fleece::{Options, SnapshotRequest, StoreErrorPolicy};
use fleecefs::storage::faulty::Call;
use rig::{GRANULE, PAGE, Rig, assert_covered, content, explore, is_dirty, live, pages};
use shuttle::thread;

/// I2, I3: reads of a view while the guest overwrites the same chunks.
#[test]
fn a_view_reads_frozen_bytes_while_the_guest_writes() {
    explore(2, || {
        let rig = Rig::filled(3);
        rig.freeze("s");
        let writer = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.fill(1, 2, 2);
                rig.fill(0, 2, 3);
            }
        });
        let view = rig.view("s");
        assert_eq!(pages(&content(&view)), [1, 1, 1]);
        let status = view.block_status(0, view.size()).unwrap();
        assert!(!status.zero, "data that reads as a hole");
        assert_eq!(pages(&content(&view)), [1, 1, 1]);
        writer.join().unwrap();
        assert_eq!(pages(&content(&view)), [1, 1, 1]);
        assert_eq!(pages(&live(&rig.disk("a"))), [3, 3, 2]);
    });
}

/// I3, where one read of the image goes over copied chunks.
#[test]
fn a_view_reads_frozen_bytes_around_copied_chunks_while_the_guest_writes() {
    explore(2, || {
        let rig = Rig::filled(4);
        rig.freeze("s");
        rig.fill(1, 1, 2);
        let writer = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.fill(3, 1, 2);
                rig.fill(0, 1, 3);
            }
        });
        let view = rig.view("s");
        assert_eq!(pages(&content(&view)), [1, 1, 1, 1]);
        assert_eq!(pages(&content(&view)), [1, 1, 1, 1]);
        writer.join().unwrap();
        assert_eq!(pages(&live(&rig.disk("a"))), [3, 2, 1, 2]);
    });
}

/// I4: a snapshot taken in mid-read puts the copies where the walk that began before does not look.
#[test]
fn a_view_reads_frozen_bytes_while_a_newer_snapshot_takes_the_copies() {
    explore(2, || {
        let rig = Rig::filled(2);
        rig.freeze("s");
        let other = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.fill(0, 1, 2);
                rig.freeze("t");
                rig.fill(0, 2, 3);
            }
        });
        let view = rig.view("s");
        for _ in 0..2 {
            assert_eq!(pages(&content(&view)), [1, 1]);
            assert!(!view.block_status(PAGE, PAGE).unwrap().zero);
        }
        other.join().unwrap();
        assert_eq!(pages(&content(&view)), [1, 1]);
        assert_eq!(pages(&content(&rig.view("t"))), [2, 1]);
        assert_eq!(pages(&live(&rig.disk("a"))), [3, 3]);
    });
}

/// I2, I4: while a writer copies for one layer, a snapshot comes and the chunk is overwritten behind it. The copy must
/// not hold what came later, and the writer must not forget that a newer layer needs the chunk.
#[test]
fn a_copy_that_a_snapshot_overtakes_holds_nothing_newer() {
    explore(2, || {
        let rig = Rig::filled(1);
        rig.freeze("s");
        let overtaken = thread::spawn({
            let rig = rig.clone();
            move || rig.fill(0, 1, 2)
        });
        let other = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.freeze("t");
                let frozen = pages(&content(&rig.view("t")));
                rig.fill(0, 1, 3);
                frozen
            }
        });
        assert_eq!(pages(&content(&rig.view("s"))), [1]);
        overtaken.join().unwrap();
        let frozen = other.join().unwrap();
        assert_eq!(pages(&content(&rig.view("s"))), [1]);
        assert!([[1], [2]].contains(&[frozen[0]]), "{frozen:?}");
        assert_eq!(pages(&content(&rig.view("t"))), frozen);
        let now = pages(&live(&rig.disk("a")));
        assert!(now == [3] || (now, frozen[0]) == (vec![2], 1), "the last write is there");
    });
}

/// I2, first writers: one copies, the other waits; parts of one chunk lose nothing of each other.
#[test]
fn two_first_writers_of_one_chunk_keep_both_writes_and_the_old_content() {
    explore(1, || {
        let rig = Rig::new(Options { chunk: 2 * PAGE, ..Options::default() }, &[4 * PAGE]);
        rig.fill(0, 4, 1);
        rig.freeze("s");
        let write = |offset: u64, len: usize, byte: u8| {
            let rig = rig.clone();
            thread::spawn(move || assert_eq!(rig.disk("a").write(&vec![byte; len], offset).unwrap(), len))
        };
        let writers = [write(0, 100, 2), write(100, 2 * PAGE as usize, 3)];
        let view = rig.view("s");
        assert_eq!(pages(&content(&view)), [1; 4]);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!(pages(&content(&view)), [1; 4]);
        let now = live(&rig.disk("a"));
        let runs: Vec<(u8, usize)> = now.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect();
        assert_eq!(runs, [(2, 100), (3, 2 * PAGE as usize), (1, 2 * PAGE as usize - 100)]);
    });
}

/// I5: the guest writes A, then B; no frozen B is ahead of its frozen A. I6: every later map covers.
#[test]
fn two_disks_are_frozen_at_one_instant() {
    explore(1, || {
        let rig = Rig::new(Options::default(), &[4 * GRANULE, 4 * GRANULE]);
        let first = rig.freeze("r");
        let writer = thread::spawn({
            let rig = rig.clone();
            move || {
                for step in 1..4 {
                    for disk in ["a", "b"] {
                        rig.disk(disk).write(&[1; 8], step * GRANULE).unwrap();
                    }
                }
            }
        });
        let second = rig.freeze("s");
        writer.join().unwrap();
        let third = rig.freeze("t");
        let steps = |disk: &str| {
            let bytes = content(second.view(disk).unwrap());
            let done: Vec<bool> = (1..4).map(|step| bytes[(step * GRANULE) as usize] == 1).collect();
            let count = done.iter().filter(|done| **done).count();
            assert!(done[..count].iter().all(|done| *done), "a write is frozen without the one before it");
            count
        };
        let (a, b) = (steps("a"), steps("b"));
        assert!(b <= a, "disk b is frozen at step {b}, disk a at {a}");
        assert!(a <= b + 1);
        for disk in ["a", "b"] {
            let [r, s, t] = [&first, &second, &third].map(|snapshot| snapshot.view(disk).unwrap().clone());
            assert_covered(&r, &s);
            assert_covered(&s, &t);
            assert_covered(&r, &t);
        }
    });
}

/// I5, I6: a write is in the view and the old bitmap, or in the new bitmap; nothing in between.
#[test]
fn a_write_is_on_one_side_of_a_freeze() {
    explore(2, || {
        let rig = Rig::new(Options::default(), &[2 * GRANULE]);
        rig.freeze("r");
        let writer = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.disk("a").write(&[1; 8], GRANULE).unwrap();
            }
        });
        rig.freeze("s");
        writer.join().unwrap();
        rig.freeze("t");
        let (s, t) = (rig.view("s"), rig.view("t"));
        let before = content(&s)[GRANULE as usize] == 1;
        assert_eq!(is_dirty(&s, "r", 1), before, "the bitmap up to the freeze");
        assert_eq!(is_dirty(&t, "s", 1), !before, "the bitmap from the freeze on");
        assert!(is_dirty(&t, "r", 1));
    });
}

/// I4: the dropped middle view's layer is hidden and folded under the older view's reader and the guest.
#[test]
fn an_older_view_reads_frozen_bytes_while_a_dropped_layer_is_folded() {
    explore(2, || {
        let rig = Rig::filled(4);
        rig.freeze("old");
        rig.freeze("middle");
        rig.fill(0, 2, 2);
        rig.freeze("new");
        let folder = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.fleece.complete_snapshot("middle", None).unwrap();
                rig.fleece.reap();
            }
        });
        let guest = thread::spawn({
            let rig = rig.clone();
            move || rig.fill(1, 2, 3)
        });
        let (old, new) = (rig.view("old"), rig.view("new"));
        for _ in 0..2 {
            assert_eq!(pages(&content(&old)), [1; 4]);
        }
        assert_eq!(pages(&content(&new)), [2, 2, 1, 1]);
        folder.join().unwrap();
        guest.join().unwrap();
        rig.fill(0, 4, 4);
        rig.fleece.reap();
        assert_eq!(pages(&content(&old)), [1; 4]);
        assert_eq!(pages(&content(&new)), [2, 2, 1, 1]);
        let folded = rig.fleece.counters().into_iter().find(|counter| counter.name == "layers_folded").unwrap();
        assert_eq!(folded.value, 1);
    });
}

/// I4: a copy that began before a snapshot may end in a layer that is being folded, or gone.
#[test]
fn an_older_view_reads_frozen_bytes_while_a_layer_is_folded_that_still_takes_a_copy() {
    explore(1, || {
        let rig = Rig::filled(2);
        rig.freeze("old");
        rig.freeze("middle");
        let overtaken = thread::spawn({
            let rig = rig.clone();
            move || rig.fill(0, 2, 2)
        });
        let folder = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.freeze("new");
                rig.fleece.complete_snapshot("middle", None).unwrap();
                rig.fleece.reap();
            }
        });
        let guest = thread::spawn({
            let rig = rig.clone();
            move || rig.fill(1, 1, 3)
        });
        let old = rig.view("old");
        assert_eq!(pages(&content(&old)), [1, 1]);
        [overtaken, folder, guest].into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(pages(&content(&old)), [1, 1]);
        let frozen = content(&rig.view("new"));
        rig.fill(0, 2, 4);
        rig.fleece.reap();
        assert_eq!(pages(&content(&old)), [1, 1]);
        assert!(content(&rig.view("new")) == frozen, "the view changed");
    });
}

/// I4: what the oldest view needs is folded also where the neighbour's own view has released it.
#[test]
fn a_fold_keeps_what_the_oldest_view_needs() {
    explore(1, || {
        let rig = Rig::filled(2);
        rig.freeze("oldest");
        rig.freeze("neighbour");
        rig.freeze("hidden");
        rig.fill(0, 2, 2);
        rig.freeze("newest");
        rig.fleece.release("neighbour", "a", 0, PAGE).unwrap();
        rig.fleece.complete_snapshot("hidden", None).unwrap();
        let folder = thread::spawn({
            let rig = rig.clone();
            move || rig.fleece.reap()
        });
        let (oldest, neighbour) = (rig.view("oldest"), rig.view("neighbour"));
        let mut now = vec![0; PAGE as usize];
        for _ in 0..2 {
            assert_eq!(pages(&content(&oldest)), [1, 1]);
            neighbour.read(&mut now, PAGE).unwrap();
            assert_eq!(pages(&now), [1]);
        }
        folder.join().unwrap();
        assert_eq!(pages(&content(&oldest)), [1, 1]);
        assert_eq!(neighbour.read(&mut now, 0).unwrap_err().errno(), errno::EIO);
    });
}

/// I4: the newest layer may be hidden: it takes the copies that older views need, and a fold leaves it alone.
#[test]
fn an_older_view_survives_the_drop_of_the_newest_under_writes() {
    explore(1, || {
        let rig = Rig::filled(3);
        rig.freeze("old");
        rig.freeze("new");
        let dropper = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.fleece.complete_snapshot("new", None).unwrap();
                rig.fleece.reap();
            }
        });
        let guest = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.fill(0, 2, 2);
                rig.fill(2, 1, 3);
            }
        });
        let old = rig.view("old");
        assert_eq!(pages(&content(&old)), [1; 3]);
        dropper.join().unwrap();
        guest.join().unwrap();
        assert_eq!(pages(&content(&old)), [1; 3]);
        rig.freeze("third");
        rig.fleece.reap();
        assert_eq!(pages(&content(&old)), [1; 3]);
        assert_eq!(pages(&content(&rig.view("third"))), [2, 2, 3]);
    });
}

/// Two reapers at once (the background's and a resize's) take away what is unneeded once, and nothing else.
#[test]
fn two_reapers_leave_the_views_that_are_read() {
    explore(1, || {
        let rig = Rig::filled(2);
        rig.freeze("one");
        rig.freeze("two");
        rig.fill(0, 1, 2);
        rig.freeze("three");
        rig.fleece.complete_snapshot("one", None).unwrap();
        let reaper = thread::spawn({
            let rig = rig.clone();
            move || rig.fleece.reap()
        });
        rig.fleece.resize_disk("a", 3 * PAGE).unwrap();
        reaper.join().unwrap();
        rig.fill(0, 2, 3);
        assert_eq!(pages(&content(&rig.view("two"))), [1, 1]);
        assert_eq!(pages(&content(&rig.view("three"))), [2, 1]);
    });
}

/// Release: of two views the newer one lets go; the older one reads on. A read of what was released is EIO or the
/// frozen bytes, never the guest's.
#[test]
fn a_release_races_first_writes_and_reads() {
    explore(2, || {
        let rig = Rig::filled(3);
        rig.freeze("old");
        rig.fill(2, 1, 2);
        rig.freeze("new");
        let release = thread::spawn({
            let rig = rig.clone();
            move || rig.fleece.release("new", "a", 0, 2 * PAGE).unwrap()
        });
        let guest = thread::spawn({
            let rig = rig.clone();
            move || rig.fill(0, 3, 3)
        });
        let (old, new) = (rig.view("old"), rig.view("new"));
        let mut now = vec![0; 2 * PAGE as usize];
        for _ in 0..2 {
            assert_eq!(pages(&content(&old)), [1; 3]);
            match new.read(&mut now, 0) {
                Ok(_) => assert_eq!(pages(&now), [1, 1]),
                Err(e) => assert_eq!(e.errno(), errno::EIO),
            }
        }
        release.join().unwrap();
        guest.join().unwrap();
        assert_eq!(pages(&content(&old)), [1; 3]);
        assert_eq!(new.read(&mut now, PAGE).unwrap_err().errno(), errno::EIO);
        new.read(&mut now[..PAGE as usize], 2 * PAGE).unwrap();
        assert_eq!(pages(&now[..PAGE as usize]), [2]);
    });
}

/// Release by the only view: copies are spared and punched; whatever is answered is frozen truth.
#[test]
fn the_only_view_releases_while_the_guest_writes() {
    explore(1, || {
        let rig = Rig::filled(2);
        rig.freeze("s");
        let release = thread::spawn({
            let rig = rig.clone();
            move || rig.fleece.release("s", "a", 0, PAGE).unwrap()
        });
        let guest = thread::spawn({
            let rig = rig.clone();
            move || rig.fill(0, 2, 2)
        });
        let view = rig.view("s");
        let mut now = vec![0; PAGE as usize];
        for page in [0, 1, 0] {
            match view.read(&mut now, page * PAGE) {
                Ok(_) => assert_eq!(pages(&now), [1]),
                Err(e) => assert_eq!((e.errno(), page), (errno::EIO, 0)),
            }
            let status = view.block_status(page * PAGE, PAGE);
            assert!(status.is_ok_and(|status| !status.zero), "data that reads as a hole");
        }
        release.join().unwrap();
        guest.join().unwrap();
        view.read(&mut now, PAGE).unwrap();
        assert_eq!(pages(&now), [1]);
        assert_eq!(view.read(&mut now, 0).unwrap_err().errno(), errno::EIO);
    });
}

/// I7: a store fails under the guest's writes: a view answers frozen bytes or EIO, and the guest goes on.
#[test]
fn a_store_failure_breaks_views_before_the_guest_writes() {
    for nth in 1..4 {
        explore(1, move || {
            let rig = Rig::filled(3);
            rig.freeze("old");
            rig.fill(2, 1, 2);
            rig.freeze("new");
            let calls = rig.store_faults.calls(Call::Write);
            rig.store_faults.fail_nth(Call::Write, calls + nth, errno::ENOSPC);
            let guests = [(0, 3), (1, 4)].map(|(page, byte)| {
                let rig = rig.clone();
                thread::spawn(move || rig.fill(page, 2, byte))
            });
            let views = [(rig.view("old"), [1, 1, 1]), (rig.view("new"), [1, 1, 2])];
            let mut now = vec![0; 3 * PAGE as usize];
            for (view, frozen) in views.iter().chain(&views) {
                match view.read(&mut now, 0) {
                    Ok(_) => assert_eq!(pages(&now), *frozen),
                    Err(e) => assert_eq!(e.errno(), errno::EIO),
                }
            }
            guests.into_iter().for_each(|guest| guest.join().unwrap());
            let broken = views[0].0.broken().is_some();
            assert_eq!(broken, views[1].0.broken().is_some(), "all views look through the newest layer");
            for (view, frozen) in &views {
                match view.read(&mut now, 0) {
                    Ok(_) => assert_eq!((pages(&now), broken), (frozen.to_vec(), false)),
                    Err(_) => assert!(broken),
                }
            }
        });
    }
}

/// I7: a broken view says so to every question: no hole where the guest discarded.
#[test]
fn a_broken_view_knows_no_holes() {
    explore(1, || {
        let rig = Rig::filled(2);
        rig.freeze("s");
        rig.store_faults.fail_all(Call::Write, errno::EIO);
        let guest = thread::spawn({
            let rig = rig.clone();
            move || rig.disk("a").discard(0, 2 * PAGE).unwrap()
        });
        let view = rig.view("s");
        for _ in 0..3 {
            assert!(view.block_status(0, 2 * PAGE).err_or(|status| !status.zero));
        }
        guest.join().unwrap();
        assert!(view.broken().is_some());
        assert!(view.block_status(0, 2 * PAGE).err_or(|status| !status.zero));
    });
}

/// I7, the other policy: the guest's write fails, the views stay right.
#[test]
fn a_store_failure_fails_the_write_by_policy() {
    explore(1, || {
        let options = Options { on_store_error: StoreErrorPolicy::FailWrite, ..Options::default() };
        let rig = Rig::new(options, &[2 * PAGE]);
        rig.fill(0, 2, 1);
        rig.freeze("s");
        let calls = rig.store_faults.calls(Call::Write);
        rig.store_faults.fail_nth(Call::Write, calls + 1, errno::EIO);
        let guests = [2, 3].map(|byte| {
            let rig = rig.clone();
            thread::spawn(move || rig.disk("a").write(&vec![byte; 2 * PAGE as usize], 0).is_ok())
        });
        let view = rig.view("s");
        assert_eq!(pages(&content(&view)), [1, 1]);
        let done = guests.map(|guest| guest.join().unwrap());
        assert_eq!(done.iter().filter(|done| **done).count(), 1);
        assert_eq!(pages(&content(&view)), [1, 1]);
        assert_eq!(pages(&live(&rig.disk("a"))), [if done[0] { 2 } else { 3 }; 2]);
    });
}

/// Deleting the checkpoint that records, under writes: the one before has every mark.
#[test]
fn a_merge_of_the_recording_checkpoint_loses_no_mark() {
    explore(2, || {
        let rig = Rig::new(Options::default(), &[4 * GRANULE]);
        rig.freeze("r");
        rig.freeze("s");
        rig.disk("a").write(&[1; 8], 0).unwrap();
        rig.fleece.complete_snapshot("s", None).unwrap();
        let guest = thread::spawn({
            let rig = rig.clone();
            move || {
                for granule in 1..4 {
                    rig.disk("a").write(&[1; 8], granule * GRANULE).unwrap();
                }
            }
        });
        rig.fleece.delete_checkpoint("s").unwrap();
        guest.join().unwrap();
        rig.freeze("t");
        let (r, t) = (rig.view("r"), rig.view("t"));
        assert_eq!(content(&t).iter().filter(|byte| **byte == 1).count(), 32);
        assert_covered(&r, &t);
    });
}

/// Cancelling a snapshot under writes: its checkpoint's marks go to the one before.
#[test]
fn a_cancel_loses_no_mark() {
    explore(1, || {
        let rig = Rig::new(Options::default(), &[3 * GRANULE]);
        rig.freeze("r");
        rig.freeze("s");
        let guest = thread::spawn({
            let rig = rig.clone();
            move || {
                for granule in 0..3 {
                    rig.disk("a").write(&[1; 8], granule * GRANULE).unwrap();
                }
            }
        });
        rig.fleece.cancel_snapshot("s").unwrap();
        rig.fleece.reap();
        guest.join().unwrap();
        rig.freeze("t");
        assert_covered(&rig.view("r"), &rig.view("t"));
        assert!(content(&rig.view("r")).iter().all(|byte| *byte == 0));
    });
}

/// Discard and write-zeroes against reads and a write of the same chunks.
#[test]
fn discards_and_zeroes_keep_what_a_view_needs() {
    explore(2, || {
        let rig = Rig::filled(4);
        rig.disk("a").discard(3 * PAGE, PAGE).unwrap();
        rig.freeze("s");
        let discard = thread::spawn({
            let rig = rig.clone();
            move || rig.disk("a").discard(0, 4 * PAGE).unwrap()
        });
        let zero = thread::spawn({
            let rig = rig.clone();
            move || rig.disk("a").write_zeroes(PAGE + 100, 3 * PAGE - 100).unwrap()
        });
        let view = rig.view("s");
        for _ in 0..2 {
            assert_eq!(pages(&content(&view)), [1, 1, 1, 0]);
            let mut at = 0;
            while at < view.size() {
                let status = view.block_status(at, view.size() - at).unwrap();
                assert!(!status.zero || at >= 3 * PAGE, "data at {at} that reads as a hole");
                at += status.len;
            }
        }
        discard.join().unwrap();
        zero.join().unwrap();
        rig.fill(3, 1, 5);
        assert_eq!(pages(&content(&view)), [1, 1, 1, 0]);
        assert_eq!(pages(&live(&rig.disk("a"))), [0, 0, 0, 5]);
    });
}

/// A hole that is filled while it is discarded stays preserved as a hole.
#[test]
fn a_hole_that_fills_under_a_discard_stays_a_hole_in_the_view() {
    explore(1, || {
        let rig = Rig::new(Options::default(), &[2 * PAGE]);
        rig.freeze("s");
        let guest = thread::spawn({
            let rig = rig.clone();
            move || rig.fill(0, 2, 2)
        });
        let zero = thread::spawn({
            let rig = rig.clone();
            move || rig.disk("a").write_zeroes(0, 2 * PAGE).unwrap()
        });
        rig.disk("a").discard(0, 2 * PAGE).unwrap();
        let view = rig.view("s");
        assert_eq!(pages(&content(&view)), [0, 0]);
        guest.join().unwrap();
        zero.join().unwrap();
        assert_eq!(pages(&content(&view)), [0, 0]);
    });
}

/// Growing under writes: every size is all or nothing, the view keeps its own, new bytes count as changed.
#[test]
fn a_resize_races_writes_and_reads() {
    explore(1, || {
        let rig = Rig::new(Options::default(), &[GRANULE]);
        rig.freeze("s");
        let guest = thread::spawn({
            let rig = rig.clone();
            move || {
                rig.disk("a").write(&[1; 8], 100).unwrap();
                match rig.disk("a").write(&[2; 8], GRANULE + 100) {
                    Ok(count) => assert_eq!(count, 8),
                    Err(e) => assert_eq!(e.errno(), errno::ENOSPC),
                }
                rig.disk("a").write(&[3; 8], 200).unwrap();
            }
        });
        let reader = thread::spawn({
            let rig = rig.clone();
            move || {
                let view = rig.view("s");
                assert_eq!(view.size(), GRANULE);
                assert!(content(&view).iter().all(|byte| *byte == 0));
            }
        });
        rig.fleece.resize_disk("a", 3 * GRANULE).unwrap();
        guest.join().unwrap();
        reader.join().unwrap();
        rig.freeze("t");
        let (s, t) = (rig.view("s"), rig.view("t"));
        assert_eq!(t.size(), 3 * GRANULE);
        assert!(content(&s).iter().all(|byte| *byte == 0));
        assert_covered(&s, &t);
        assert!((0..3).all(|granule| is_dirty(&t, "s", granule)));
        assert_eq!(rig.fleece.resize_disk("a", GRANULE).unwrap_err().errno(), errno::EBUSY);
    });
}

/// A snapshot that cannot be made durable leaves tracking and the views before it as they were.
#[test]
fn a_snapshot_that_fails_under_writes_loses_no_mark() {
    for nth in 1..12 {
        explore(1, move || {
            let rig = Rig::new(Options::default(), &[2 * GRANULE, 2 * GRANULE]);
            rig.freeze("r");
            let calls = rig.state_faults.calls(Call::Write);
            rig.state_faults.fail_nth(Call::Write, calls + nth, errno::EIO);
            let guest = thread::spawn({
                let rig = rig.clone();
                move || {
                    for disk in ["a", "b"] {
                        rig.disk(disk).write(&[1; 8], 0).unwrap();
                        rig.disk(disk).write(&[1; 8], GRANULE).unwrap();
                    }
                }
            });
            let taken =
                rig.fleece.create_snapshot(&SnapshotRequest { name: "s".to_owned(), ..SnapshotRequest::default() });
            guest.join().unwrap();
            rig.state_faults.clear();
            rig.fleece.reap();
            let third = rig.freeze("t");
            for disk in ["a", "b"] {
                let (r, t) = (rig.fleece.snapshot("r").unwrap(), third.view(disk).unwrap());
                assert!(content(r.view(disk).unwrap()).iter().all(|byte| *byte == 0));
                assert_covered(r.view(disk).unwrap(), t);
                if let Ok(second) = &taken {
                    assert_covered(second.view(disk).unwrap(), t);
                }
            }
        });
    }
}

/// Answers that may be refused, but not wrong.
trait ErrOr<T> {
    fn err_or(self, right: impl FnOnce(T) -> bool) -> bool;
}

impl<T> ErrOr<T> for fleecefs::error::Result<T> {
    fn err_or(self, right: impl FnOnce(T) -> bool) -> bool {
        self.map_or(true, right)
    }
}
